"""C2SP tlog-proof files: the form of the specification, the certificate-transparency tree, every wrong form."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from countermark.errors import CountermarkError
from countermark.logkeys import new_keys, verify_signature
from countermark.tlog.checkpoint import Checkpoint
from countermark.tlog.proof import LogProof, encode_proof, parse_proof, verify_proof
from tlog.test_merkle import LEAVES, PATH_0_OF_8, ROOTS

LOG = new_keys("log.example/measurements")
HEAD = Checkpoint(origin=LOG.name, size=8, root=bytes.fromhex(ROOTS[7]))
NOTE = LOG.sign_checkpoint(HEAD, 1_800_000_000)
PROOF = LogProof(index=0, hashes=tuple(map(bytes.fromhex, PATH_0_OF_8)), checkpoint=NOTE)


def written() -> bytes:
    """The file as tlog-proof.md describes it, line by line."""
    lines = [b"c2sp.org/tlog-proof@v1", b"index 0"]
    lines += [base64.b64encode(bytes.fromhex(item)) for item in PATH_0_OF_8]
    return b"\n".join(lines) + b"\n\n" + NOTE


def code(data: bytes) -> str:
    with pytest.raises(CountermarkError) as err:
        parse_proof(data)
    return err.value.code


def test_the_form_is_the_specifications() -> None:
    assert encode_proof(PROOF) == written()
    assert parse_proof(written()) == PROOF
    first = replace(PROOF, hashes=())
    assert parse_proof(encode_proof(first)) == first  # the only leaf of a log has no sibling


def test_a_leaf_is_found_under_the_head() -> None:
    assert verify_proof(PROOF, LEAVES[0], LOG.name, LOG.log_keys, verify_signature) == HEAD


@pytest.mark.parametrize(
    ("proof", "leaf", "wanted"),
    [
        (PROOF, LEAVES[1], "log.inclusion"),
        (replace(PROOF, index=1), LEAVES[0], "log.inclusion"),
        (replace(PROOF, index=8), LEAVES[0], "log.range"),
        (replace(PROOF, hashes=PROOF.hashes[:2]), LEAVES[0], "log.proof"),
        (
            replace(PROOF, checkpoint=new_keys(LOG.name).sign_checkpoint(HEAD, 1_800_000_000)),
            LEAVES[0],
            "log.signature_missing",
        ),
    ],
)
def test_another_proof_is_refused(proof: LogProof, leaf: bytes, wanted: str) -> None:
    with pytest.raises(CountermarkError) as err:
        verify_proof(parse_proof(encode_proof(proof)), leaf, LOG.name, LOG.log_keys, verify_signature)
    assert err.value.code == wanted


def test_another_log_is_refused() -> None:
    with pytest.raises(CountermarkError) as err:
        verify_proof(PROOF, LEAVES[0], "log.example/other", LOG.log_keys, verify_signature)
    assert err.value.code == "log.origin"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        NOTE,
        written().replace(b"@v1", b"@v2"),
        written().replace(b"index 0", b"extra AAAA\nindex 0"),
        written().replace(b"index 0", b"index 00"),
        written().replace(b"index 0", b"index -1"),
        written().replace(b"index 0", b"index 9223372036854775807"),
        written().replace(b"index 0", b"index " + b"9" * 5000),
        written().replace(b"index 0", b"index \xc2\xb2"),
        written().replace(b"=\n", b"\n", 1),
        written().replace(b"\nindex", b"\r\nindex"),
        encode_proof(replace(PROOF, hashes=(b"short",))),
        encode_proof(replace(PROOF, hashes=(bytes(32),) * 64)),
        b"x" * 200_000,
    ],
)
def test_another_form_is_refused(data: bytes) -> None:
    assert code(data) == "tlog.proof"


def test_the_checkpoint_must_be_a_note() -> None:
    assert code(written()[:-1]) == "tlog.note"
