"""Cosignatures: the specification's example, every form of a wrong line, and who counts."""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from countermark.errors import CountermarkError, FormatError, LogError, UsageError
from countermark.logkeys import SigningKeys, load_keys, new_keys, save_keys, verify_signature
from countermark.tlog.checkpoint import Checkpoint, Note, Signature, encode_note, parse_note, verify_checkpoint
from countermark.tlog.cosignature import (
    VerifierKey,
    cosignature_line,
    cosignature_message,
    log_keys,
    parse_vkey,
    verify_cosignatures,
    with_lines,
)

HEAD = Checkpoint(origin="log.example/starts", size=9, root=bytes(range(32)))
LOG, FIRST, SECOND = (new_keys(name) for name in (HEAD.origin, "w.example/1", "w.example/2"))
NOTE = LOG.sign_checkpoint(HEAD, 1_800_000_000)
NOW = 1_800_000_001


def cosigned(*witnesses: SigningKeys) -> bytes:
    return with_lines(NOTE, [line for keys in witnesses for line in keys.cosign(HEAD, NOW)])


def names(note: bytes, *keys: VerifierKey) -> tuple[str, ...]:
    return verify_cosignatures(note, keys, verify_signature)


def test_messages_are_those_of_the_specification() -> None:
    """tlog-cosignature: the example of the Ed25519 message, and the struct of the other, written out here."""
    head = Checkpoint(
        origin="example.com/behind-the-sofa",
        size=20852163,
        root=base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I="),
    )
    example = (
        "cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    )
    ed25519, ml_dsa = FIRST.as_witness
    assert cosignature_message(ed25519, 1679315147, head) == example.encode()
    wanted = b"subtree/v1\n\0" + b"\x0bw.example/1" + struct.pack(">Q", 1679315147)
    wanted += b"\x1bexample.com/behind-the-sofa" + struct.pack(">QQ", 0, 20852163) + head.root
    assert cosignature_message(ml_dsa, 1679315147, head) == wanted
    for key, kind in ((ed25519, 4), (ml_dsa, 6)):
        assert key.key_id == hashlib.sha256(b"w.example/1\n" + bytes([kind]) + key.public).digest()[:4]


def test_the_line_of_the_specifications_example_is_read() -> None:
    text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    lines = (
        "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"  # noqa: E501
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"  # noqa: E501
    )
    _, line = parse_note(f"{text}\n{lines}".encode()).signatures
    assert (line.name, line.key_id.hex(), len(line.blob)) == ("witness.example.com/w1", "8d66cf3f", 72)
    assert int.from_bytes(line.blob[:8], "big") == 1679315147


def test_who_has_signed_counts_and_others_are_ignored() -> None:
    keys = (*FIRST.as_witness, *SECOND.as_witness)
    assert names(NOTE, *keys) == ()
    assert names(cosigned(FIRST), *keys) == ("w.example/1",)
    assert names(cosigned(SECOND, FIRST), *keys) == ("w.example/1", "w.example/2")
    assert names(cosigned(FIRST, SECOND), *SECOND.as_witness) == ("w.example/2",)
    assert verify_checkpoint(cosigned(FIRST, SECOND), *log_keys(LOG.as_log), verify_signature) == HEAD


def test_a_witness_with_two_keys_must_sign_with_both() -> None:
    for line in FIRST.cosign(HEAD, NOW):
        note = with_lines(NOTE, [line])
        assert names(note, *FIRST.as_witness) == ()
        one = next(key for key in FIRST.as_witness if key.key_id == line.key_id)
        assert names(note, one) == ("w.example/1",)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change", ["flip", "timestamp", "cut", "extend", "other head", "zero time", "late", "another's", "twice"]
)
def test_a_line_of_a_named_key_that_does_not_hold_refuses_the_note(which: int, change: str) -> None:
    key, line = FIRST.as_witness[which], FIRST.cosign(HEAD, NOW)[which]
    blob = line.blob
    match change:
        case "flip":
            blob = blob[:-1] + bytes([blob[-1] ^ 1])
        case "timestamp":
            blob = struct.pack(">Q", NOW + 1) + blob[8:]
        case "cut":
            blob = blob[:-1]
        case "extend":
            blob += b"\0"
        case "other head":
            blob = FIRST.cosign(replace(HEAD, size=8), NOW)[which].blob
        case "zero time":
            blob = FIRST.cosign(HEAD, 0)[which].blob
        case "late":
            blob = struct.pack(">Q", 2**63) + blob[8:]
        case "another's":
            blob = SECOND.cosign(HEAD, NOW)[which].blob
    lines = [Signature(name=line.name, key_id=line.key_id, blob=blob)] * (2 if change == "twice" else 1)
    parsed = parse_note(NOTE)
    note = encode_note(Note(text=parsed.text, signatures=(*parsed.signatures, *lines)))
    with pytest.raises(LogError) as caught:
        names(note, key)
    assert caught.value.code == "log.cosignature"
    assert names(note, SECOND.as_witness[which]) == ()  # nobody else's line


def test_a_name_is_covered_by_ml_dsa_alone() -> None:
    """Why the specification forbids one Ed25519 key under two names, and why we sign with both."""
    for which, holds in ((0, True), (1, False)):
        renamed = replace(FIRST.as_witness[which], name="w.example/other")
        blob = FIRST.cosign(HEAD, NOW)[which].blob
        note = with_lines(NOTE, [cosignature_line(renamed, NOW, blob[8:])])
        if holds:
            assert names(note, renamed) == ("w.example/other",)
        else:
            with pytest.raises(LogError):
                names(note, renamed)


def test_lines_replace_their_elders_and_stay_few() -> None:
    later = FIRST.cosign(HEAD, NOW + 60)
    note = with_lines(cosigned(FIRST), later)
    assert parse_note(note).signatures[2:] == later
    with pytest.raises(FormatError):
        with_lines(NOTE, [line for i in range(16) for line in new_keys(f"w{i}").cosign(HEAD, NOW)])


def test_verifier_keys_come_back_and_wrong_ones_do_not() -> None:
    for key in (*LOG.as_log, *FIRST.as_witness):
        text = str(key)
        assert parse_vkey(text) == key
        for wrong in (
            *("", "+", "name", text[:-4], text + "=", text.replace("+", "-", 1), text.upper(), f" {text}", f"{text}\n"),
            text.replace(key.key_id.hex(), "00000000"),
            text.replace(key.name, "other"),
            f"{key.name}+{key.key_id.hex()}+" + base64.b64encode(b"\x02" + key.public).decode(),
            f"{key.name}+{key.key_id.hex()}+" + base64.b64encode(bytes([key.kind])).decode(),
        ):
            with pytest.raises(FormatError) as caught:
                parse_vkey(wrong)
            assert caught.value.code == "tlog.vkey"


def test_a_known_verifier_key_of_another_implementation() -> None:
    """golang.org/x/mod/sumdb/note's example key, type 0x01."""
    key = parse_vkey("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    assert (key.name, key.kind, key.key_id.hex()) == ("PeterNeumann", 1, "c74f20a3")


@pytest.mark.parametrize("given", ["one", "witness", "names", "three"])
def test_a_log_has_two_keys_of_one_name(given: str) -> None:
    ed25519, ml_dsa = LOG.as_log
    keys = {
        "one": (ed25519,),
        "witness": FIRST.as_witness,
        "names": (ed25519, FIRST.as_log[1]),
        "three": (ed25519, FIRST.as_witness[0], ml_dsa),
    }[given]
    with pytest.raises(FormatError) as caught:
        log_keys(keys)
    assert caught.value.code == "tlog.vkey"


@pytest.mark.parametrize("secret", [None, b"correct horse"])
def test_keys_in_a_file(tmp_path: Path, secret: bytes | None) -> None:
    path = tmp_path / "keys"
    save_keys(FIRST, path, passphrase=secret)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_keys(path, passphrase=secret).as_witness == FIRST.as_witness
    assert (b"ENCRYPTED" in path.read_bytes()) == (secret is not None)
    for wrong in (None if secret else b"any", b"wrong"):
        with pytest.raises(CountermarkError) as caught:
            load_keys(path, passphrase=wrong)
        assert caught.value.code == "usage.key"
    with pytest.raises(UsageError) as exists:
        save_keys(SECOND, path)
    assert exists.value.code == "usage.file"
    data = path.read_bytes()
    for at in (0, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:at] + b"!" + data[at + 1 :])
        with pytest.raises(UsageError) as damaged:
            load_keys(path, passphrase=secret)
        assert damaged.value.code == "usage.key"
    path.chmod(0o640)
    with pytest.raises(UsageError) as open_to_others:
        load_keys(path, passphrase=secret)
    assert open_to_others.value.code == "usage.key_mode"


@pytest.mark.parametrize("name", ["", "with space", "plus+", "x" * 256, "line\nbreak"])
def test_names_that_no_key_can_have(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        new_keys(name)
    assert caught.value.code == "usage.key_name"
