"""OpenTimestamps: genuine proofs against a genuine block header, and every way to be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from calendars import attestation, pending
from hypothesis import given
from hypothesis import strategies as st

from countermark.anchors import bitcoin
from countermark.anchors.bitcoin import verify_blocks, verify_headers, verify_proof_of
from countermark.errors import CountermarkError, FormatError, LogError
from countermark.formats import ots
from countermark.formats.ots import Header, encode_proof, parse_headers, parse_proof, submission, upgrade

DATA = Path(__file__).parents[1] / "data" / "ots"
HELLO = b"Hello World!\n"
HEADER = (DATA / "block-358391.txt").read_bytes()
FIRST = (DATA / "block-0.txt").read_bytes()
HEAD_BYTES = len(ots.MAGIC) + 2 + 32
RIPEMD = bytes.fromhex("1df8859e60bc679503d16dcb870e6ce91a57e9df")  # RIPEMD-160 of the digest of HELLO


def proof(name: str) -> bytes:
    return bytes.fromhex((DATA / f"{name}.ots.hex").read_text())


def detached(tree: bytes, message: bytes = HELLO) -> bytes:
    return proof("hello-world")[: HEAD_BYTES - 32] + hashlib.sha256(message).digest() + tree


def refused(code: str, call: object, *arguments: object) -> None:
    with pytest.raises(CountermarkError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.code == code


def genuine() -> ots.Proof:
    """OpenTimestamps' first example, of 2015. It begins with RIPEMD-160, which no calendar uses and we refuse."""
    data = proof("hello-world")
    reader = ots._Tree(data, HEAD_BYTES + 1)
    reader.node(RIPEMD, 0)
    reader.end()
    return ots.Proof(digest=data[HEAD_BYTES - 32 : HEAD_BYTES], blocks=tuple(reader.blocks), pending=())


def test_a_genuine_proof_leads_to_its_block() -> None:
    headers = verify_headers(HEADER)
    found = genuine()
    assert found.digest == hashlib.sha256(HELLO).digest()
    assert [block.height for block in found.blocks] == [358391]
    assert [header.time for header in verify_blocks(found.blocks, headers)] == [1432827678]
    assert headers.by_height[358391].hash[::-1].hex().startswith("000000000000000003e892881a8cdcdc")
    refused("anchor.ots", parse_proof, proof("hello-world"))


def test_a_genuine_pending_proof() -> None:
    data = proof("two-calendars")
    found = parse_proof(data)
    assert [item.uri for item in found.pending] == [
        f"https://{host}.btc.calendar.opentimestamps.org" for host in ("alice", "bob")
    ]
    assert not found.blocks
    refused("anchor.imprint", verify_proof_of, data, HELLO)


def test_every_byte_of_a_proof_counts() -> None:
    """A proof that is changed anywhere leads to no block, or to none whose root it has."""
    tree = b"\xf0\x02ab\x08\xf1\x20" + bytes(range(32)) + b"\x08\x08" + attestation(ots.BITCOIN, b"\xf7\xef\x15")
    data = detached(tree)
    block = verify_proof_of(data, HELLO).blocks[0]
    header = bytearray.fromhex(HEADER.decode().split()[1])
    header[36:68] = block.message
    headers = bitcoin.Headers({358391: Header(height=358391, data=bytes(header))})
    assert verify_blocks((block,), headers)
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                blocks = verify_blocks(verify_proof_of(bytes(changed), HELLO).blocks, headers)
            except (FormatError, LogError):
                continue
            assert not blocks, at
    for end in range(len(data)):
        refused("anchor.ots", parse_proof, data[:end])
    refused("anchor.ots", parse_proof, data + b"\0")


def test_another_blocks_header() -> None:
    found = genuine()
    other = Header(height=358391, data=bytes.fromhex(FIRST.decode().split()[1]))
    refused("anchor.block", verify_blocks, found.blocks, bitcoin.Headers({358391: other}))
    assert verify_blocks(found.blocks, verify_headers(FIRST)) == ()


def test_work() -> None:
    verify_headers(FIRST + HEADER)
    height, text = HEADER.decode().split()
    for at in range(80):
        changed = bytearray.fromhex(text)
        changed[at] ^= 0x80
        refused("anchor.work", verify_headers, f"{height} {changed.hex()}\n".encode())


@pytest.mark.parametrize("bits", [0x207FFFFF, 0x1D010000, 0x1E00FFFF, 0xFF123456, 0x01003456, 0x04923456, 0])
def test_bits_that_ask_for_too_little_or_for_nonsense(bits: int) -> None:
    data = bytearray.fromhex(FIRST.decode().split()[1])
    data[72:76] = bits.to_bytes(4, "little")
    refused("anchor.work", verify_headers, b"7 " + data.hex().encode())


def test_headers_that_follow_one_another_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bytes.fromhex(FIRST.decode().split()[1])
    following = bytearray(first)
    following[4:36] = hashlib.sha256(hashlib.sha256(first).digest()).digest()
    good, bad = (FIRST + f"1 {data.hex()}\n".encode() for data in (following, first))
    monkeypatch.setattr(bitcoin, "_target", lambda _bits: 1 << 256)
    verify_headers(good)
    refused("anchor.link", verify_headers, bad)
    verify_headers(bad.replace(b"\n1 ", b"\n2 "))  # with a gap between them nothing can be said


@pytest.mark.parametrize(
    "text", ["", "1\n", "01 " + "0" * 160, "1 " + "0" * 159, "1 " + "A" * 160, "2147483648 " + "0" * 160, "\n\n"]
)
def test_files_of_headers_that_are_none(text: str) -> None:
    refused("anchor.headers", parse_headers, text.encode())


def test_headers_ascend() -> None:
    refused("anchor.headers", parse_headers, FIRST + FIRST)


def test_calendars_answers_become_a_proof_and_are_upgraded() -> None:
    """Two calendars: each gets its own digest; one promise is kept later, the other stands."""
    digest = hashlib.sha256(HELLO).digest()
    nonces = (bytes(16), bytes(range(16)))
    a, b = "https://a.example", "https://b.example"
    data = encode_proof(digest, ((nonces[0], b"\xf0\x01x\x08" + pending(a)), (nonces[1], pending(b))))
    found = verify_proof_of(data, HELLO)
    assert [item.uri for item in found.pending] == [a, b]
    assert found.pending[0].message == hashlib.sha256(submission(digest, nonces[0]) + b"x").digest()
    assert found.pending[1].message == submission(digest, nonces[1])
    later = upgrade(data, found.pending[0], b"\xf1\x01y\x08" + attestation(ots.BITCOIN, b"\x07"))
    after = parse_proof(later)
    assert [(item.height, item.message) for item in after.blocks] == [
        (7, hashlib.sha256(b"y" + found.pending[0].message).digest())
    ]
    assert [item.uri for item in after.pending] == [b]
    refused("anchor.ots", upgrade, data, found.pending[1], b"\xff" + pending(a) + pending(b))
    refused("anchor.ots", upgrade, data, found.pending[1], b"\x08")


@pytest.mark.parametrize(
    "tree",
    [
        b"",
        b"\x08",
        b"\x02" + attestation(ots.BITCOIN, b"\x01"),  # SHA-1
        b"\x03" + attestation(ots.BITCOIN, b"\x01"),  # RIPEMD-160
        b"\xf2" + attestation(ots.BITCOIN, b"\x01"),  # reverse
        b"\xf0\x00" + attestation(ots.BITCOIN, b"\x01"),  # append nothing
        attestation(ots.BITCOIN, b"\x80\x00"),  # not the shortest number
        attestation(ots.BITCOIN, b"\x01\x00"),
        attestation(ots.BITCOIN, b"\xff\xff\xff\xff\xff"),
        attestation(ots.PENDING, b"\x03a?b"),
        attestation(ots.PENDING, b"\x02a"),
        b"\xff" + attestation(ots.BITCOIN, b"\x01"),
        b"\x08" * 300 + attestation(ots.BITCOIN, b"\x01"),
        (b"\xf0\x80\x10" + bytes(2048)) * 2 + attestation(ots.BITCOIN, b"\x01"),
        (b"\xff" + attestation(ots.BITCOIN, b"\x01")) * 1100 + attestation(ots.BITCOIN, b"\x01"),
    ],
)
def test_trees_that_are_none(tree: bytes) -> None:
    refused("anchor.ots", parse_proof, detached(tree))


def test_unknown_attestations_are_passed_over() -> None:
    found = parse_proof(detached(b"\xff" + attestation(bytes(8), b"anything") + attestation(ots.BITCOIN, b"\x05")))
    assert [block.height for block in found.blocks] == [5]


@given(st.binary(max_size=120))
def test_arbitrary_bytes(data: bytes) -> None:
    for parse in (lambda: parse_proof(detached(data)), lambda: parse_headers(data)):
        try:
            parse()
        except FormatError as err:
            assert err.code in ("anchor.ots", "anchor.headers")
