"""C2SP notes and checkpoints against notes signed by other implementations, and refused in every changed form."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError, FormatError, LogError
from countermark.tlog.checkpoint import (
    ED25519,
    ML_DSA_44,
    Checkpoint,
    LogKeys,
    Note,
    Signature,
    checkpoint_text,
    cosigned_message,
    encode_checkpoint,
    encode_note,
    key_id,
    parse_checkpoint_text,
    parse_note,
    verify_checkpoint,
)

DATA = Path(__file__).parents[1] / "data" / "tlog"
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
    "\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
ORIGIN = "op.example/00ff"
ED_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
ML_KEY = mldsa.MLDSA44PrivateKey.from_seed_bytes(bytes(32))
KEYS = LogKeys(ed25519=ED_KEY.public_key().public_bytes_raw(), ml_dsa_44=ML_KEY.public_key().public_bytes_raw())
HEAD = Checkpoint(origin=ORIGIN, size=9, root=bytes(range(32)))


def verify(kind: int, public_key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        if kind == ED25519:
            ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        else:
            mldsa.MLDSA44PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def signed(head: Checkpoint = HEAD, *, timestamp: int = 1_800_000_000, text: str | None = None) -> bytes:
    text = checkpoint_text(head) if text is None else text
    message = cosigned_message(head.origin, timestamp, head)
    return encode_checkpoint(head, KEYS, ED_KEY.sign(text.encode()), ML_KEY.sign(message), timestamp)


def vkey(text: str) -> tuple[str, str, bytes]:
    name, short, encoded = text.strip().split("+", 2)
    return name, short, base64.b64decode(encoded)


def refused(code: str, data: bytes, origin: str = ORIGIN, keys: LogKeys = KEYS) -> None:
    with pytest.raises(CountermarkError) as caught:
        verify_checkpoint(data, origin, keys, verify)
    assert caught.value.code == code


def test_the_note_of_go_sumdb() -> None:
    name, short, key = vkey(GO_VKEY)
    note = parse_note(GO_NOTE.encode())
    assert key[0] == ED25519
    assert key_id(name, ED25519, key[1:]).hex() == short == note.signatures[0].key_id.hex()
    assert verify(ED25519, key[1:], note.signatures[0].blob, note.text.encode())
    assert encode_note(note) == GO_NOTE.encode()


def test_the_ml_dsa_44_checkpoint_of_torchwood() -> None:
    name, short, key = vkey((DATA / "mldsa_vkey.txt").read_text())
    note = parse_note((DATA / "mldsa_checkpoint.txt").read_bytes())
    head = parse_checkpoint_text(note.text)
    blob = note.signatures[0].blob
    assert key[0] == ML_DSA_44
    assert key_id(name, ML_DSA_44, key[1:]).hex() == short == note.signatures[0].key_id.hex()
    assert (head.size, int.from_bytes(blob[:8], "big")) == (1, 0)
    assert verify(ML_DSA_44, key[1:], blob[8:], cosigned_message(name, 0, head))
    assert not verify(ML_DSA_44, key[1:], blob[8:], cosigned_message(name, 1, head))


def test_both_signatures_hold() -> None:
    assert verify_checkpoint(signed(), ORIGIN, KEYS, verify) == HEAD


@pytest.mark.parametrize("dropped", [0, 1])
def test_one_signature_is_not_enough(dropped: int) -> None:
    note = parse_note(signed())
    kept = tuple(line for i, line in enumerate(note.signatures) if i != dropped)
    refused("log.signature_missing", encode_note(Note(text=note.text, signatures=kept)))


def test_lines_of_others_are_ignored_and_ours_may_not_repeat() -> None:
    note = parse_note(signed())
    witness = Signature(name="witness.example/w1", key_id=b"abcd", blob=bytes(72))
    same_name = Signature(name=ORIGIN, key_id=b"abcd", blob=bytes(72))
    data = encode_note(Note(text=note.text, signatures=(witness, *note.signatures, same_name)))
    assert verify_checkpoint(data, ORIGIN, KEYS, verify) == HEAD
    twice = encode_note(Note(text=note.text, signatures=(*note.signatures, note.signatures[0])))
    refused("log.signature_duplicate", twice)


def test_each_signature_is_over_this_head() -> None:
    other = Checkpoint(origin=ORIGIN, size=10, root=HEAD.root)
    ours, theirs = parse_note(signed()), parse_note(signed(other))
    for mixed in ((ours.signatures[0], theirs.signatures[1]), (theirs.signatures[0], ours.signatures[1])):
        refused("log.signature", encode_note(Note(text=ours.text, signatures=mixed)))


def test_other_keys_other_origin() -> None:
    refused("log.origin", signed(), origin="op.example/00fe")
    stranger = LogKeys(
        ed25519=ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw(), ml_dsa_44=KEYS.ml_dsa_44
    )
    refused("log.signature_missing", signed(), keys=stranger)


def test_extension_lines_are_refused() -> None:
    text = checkpoint_text(HEAD) + "extra\n"
    note = parse_note(signed(text=text))
    refused("tlog.extension", encode_note(Note(text=text, signatures=note.signatures)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\n1\n",
        "\n1\n" + "A" * 43 + "=\n",
        "a\n01\n" + "A" * 43 + "=\n",
        "a\n-1\n" + "A" * 43 + "=\n",
        "a\n1_0\n" + "A" * 43 + "=\n",
        "a\n\u0661\n" + "A" * 43 + "=\n",
        "a\n9223372036854775808\n" + "A" * 43 + "=\n",
        "a\n1\nAAAA\n",
        "a\n1\n" + "A" * 42 + "B=\n",
        "a b\n1\n" + "A" * 43 + "=\n",
        "a+b\n1\n" + "A" * 43 + "=\n",
        "a\n1\n" + "A" * 43 + "=",
    ],
)
def test_malformed_checkpoint_texts(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_checkpoint_text(text)
    assert caught.value.code == "tlog.checkpoint"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text\n",
        b"text\n\n",
        b"\n\n\xe2\x80\x94 a AAAAAAAA\n",
        b"text\n\n\xe2\x80\x94 a AAAAAAAA",
        b"text\n\n- a AAAAAAAA\n",
        b"text\n\n\xe2\x80\x94 a\n",
        b"text\n\n\xe2\x80\x94 a AAAA\n",
        b"text\n\n\xe2\x80\x94 a AAAAAAB=\n",
        b"text\n\n\xe2\x80\x94 a AAAAAA A\n",
        b"text\n\n\xe2\x80\x94 a+b AAAAAAAA\n",
        b"te\rxt\n\n\xe2\x80\x94 a AAAAAAAA\n",
        b"\xff\n\n\xe2\x80\x94 a AAAAAAAA\n",
        b"text\n\n" + b"\xe2\x80\x94 a AAAAAAAA\n" * 33,
        b"t" * (128 * 1024) + b"\n\n\xe2\x80\x94 a AAAAAAAA\n",
    ],
)
def test_malformed_notes(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_note(data)
    assert caught.value.code == "tlog.note"


def test_every_flipped_byte_is_refused() -> None:
    data = signed()
    codes = set()
    for at in range(0, len(data), 7):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises((FormatError, LogError)) as caught:
            verify_checkpoint(changed, ORIGIN, KEYS, verify)
        codes.add(caught.value.code)
    assert codes <= {"tlog.note", "tlog.checkpoint", "log.origin", "log.signature", "log.signature_missing"}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="ab\n— +=1A", max_size=120).map(str.encode))
def test_arbitrary_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        note = parse_note(data)
    except FormatError:
        return
    assert encode_note(note) == data


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_arbitrary_texts_parse_or_are_refused(text: str) -> None:
    try:
        head = parse_checkpoint_text(text)
    except FormatError:
        return
    assert checkpoint_text(head) == text
