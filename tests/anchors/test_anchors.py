"""Anchors of a checkpoint and of later ones: which time they give, which are skipped, which are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from calendars import attestation, pending
from hypothesis import given
from hypothesis import strategies as st
from tsa import DAY, NOW, Authority

from countermark.anchors import Headers, verify_anchors
from countermark.errors import CountermarkError, FormatError
from countermark.formats import cbor, ots
from countermark.formats.anchors import MAX_TOKEN_BYTES, Anchor, AnchorKind, encode_anchors, parse_anchors
from countermark.formats.ots import Header
from countermark.tlog.checkpoint import Checkpoint, Note, Signature, checkpoint_text, encode_note
from countermark.tlog.merkle import Tree, consistency_proof, leaf_hash

TREE = Tree(leaf_hash(bytes([i])) for i in range(20))


def note(size: int, origin: str = "example.org/boot", root: bytes | None = None) -> bytes:
    text = checkpoint_text(Checkpoint(origin=origin, size=size, root=root or TREE.root(size)))
    return encode_note(Note(text=text, signatures=(Signature(name=origin, key_id=bytes(4), blob=b"signature"),)))


OURS = note(7)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def stamped(authority: Authority, size: int = 7, **options: Any) -> Anchor:
    proof = consistency_proof(7, size, TREE.node) if size >= 7 else ()
    token = authority.token(note(size), **options)
    return Anchor(kind=AnchorKind.RFC3161, checkpoint=note(size), proof=proof, token=token)


def by_block(tree: bytes = b"\x08" + attestation(ots.BITCOIN, b"\x05"), size: int = 7) -> Anchor:
    token = ots.MAGIC + b"\x01\x08" + hashlib.sha256(note(size)).digest() + tree
    proof = consistency_proof(7, size, TREE.node)
    return Anchor(kind=AnchorKind.OTS, checkpoint=note(size), proof=proof, token=token)


def headers(anchor: Anchor, time: int = NOW) -> Headers:
    root = ots.parse_proof(anchor.token).blocks[0].message
    return Headers({5: Header(height=5, data=bytes(36) + root + time.to_bytes(4, "little") + bytes(8))})


def verified(anchors: tuple[Anchor, ...], authority: Authority, **options: Any) -> Any:
    return verify_anchors(encode_anchors(anchors), OURS, **{"tsa_roots": [authority.root.digest], **options})


def test_the_earliest_stamp_gives_the_time(authority: Authority) -> None:
    first, second = stamped(authority, time=NOW + DAY), stamped(authority, 20, time=NOW)
    found = verified((first, second), authority)
    assert found.time == NOW
    assert (len(found.found), found.skipped) == (2, ())
    assert found.found[0] == "2027-01-16T08:00:00Z by test stamper, policy 1.2.3.4.1"


def test_without_roots_stamps_are_skipped(authority: Authority) -> None:
    found = verified((stamped(authority),), authority, tsa_roots=[])
    assert (found.time, found.found) == (None, ())
    assert "tsa_roots" in found.skipped[0]


def test_blocks_are_told_and_give_no_time(authority: Authority) -> None:
    anchor = by_block(size=20)
    found = verified((anchor,), authority, headers=headers(anchor))
    assert (found.time, found.found, found.skipped) == (None, ("block 5 of 2027-01-15T08:00:00Z",), ())


@pytest.mark.parametrize(
    ("tree", "given", "why"),
    [
        (pending("https://a.example"), True, "pending at 1 calendars"),
        (b"\x08" + attestation(ots.BITCOIN, b"\x05"), False, "no header given of block 5"),
        (b"\x08" + attestation(ots.BITCOIN, b"\x06"), True, "do not reach block 6"),
    ],
)
def test_proofs_that_cannot_be_judged_are_skipped(authority: Authority, tree: bytes, given: bool, why: str) -> None:
    found = verified((by_block(tree),), authority, headers=headers(by_block()) if given else None)
    assert (found.time, found.found) == (None, ())
    assert why in found.skipped[0]


Change = Callable[[Authority], tuple[Anchor, ...]]
REFUSED: dict[str, tuple[str, Change]] = {
    "another message": ("anchor.imprint", lambda a: (replace(stamped(a), token=a.token(note(20))),)),
    "only the note's text": (
        "anchor.imprint",
        lambda a: (replace(stamped(a), token=a.token(OURS.partition(b"\n\n")[0] + b"\n")),),
    ),
    "one of two is wrong": ("anchor.imprint", lambda a: (stamped(a), replace(stamped(a), token=a.token(b"")))),
    "another log's checkpoint": (
        "anchor.checkpoint",
        lambda a: (replace(stamped(a), checkpoint=note(7, "example.org/other")),),
    ),
    "an older checkpoint": ("anchor.older", lambda a: (stamped(a, 6),)),
    "no consistency": ("log.consistency", lambda a: (replace(stamped(a, 20), checkpoint=note(20, root=bytes(32))),)),
    "another tree of one size": (
        "log.consistency",
        lambda a: (replace(stamped(a), checkpoint=note(7, root=bytes(32))),),
    ),
    "no proof": ("log.proof", lambda a: (replace(stamped(a, 20), proof=()),)),
    "a proof too many": ("log.proof", lambda a: (replace(stamped(a), proof=(bytes(32),)),)),
    "a changed proof": (
        "log.consistency",
        lambda a: (replace(stamped(a, 20), proof=(bytes(32), *stamped(a, 20).proof[1:])),),
    ),
    "a checkpoint that is none": ("tlog.note", lambda a: (replace(stamped(a), checkpoint=b"Hello World!\n"),)),
    "a stamp called a block": ("anchor.ots", lambda a: (replace(stamped(a), kind=AnchorKind.OTS),)),
    "a block called a stamp": ("der.form", lambda _: (replace(by_block(), kind=AnchorKind.RFC3161),)),
    "another block": ("anchor.block", lambda _: (by_block(b"\x08\x08" + attestation(ots.BITCOIN, b"\x05")),)),
    "a proof of another message": ("anchor.imprint", lambda _: (replace(by_block(), token=by_block(size=20).token),)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(authority: Authority, name: str) -> None:
    code, change = REFUSED[name]
    with pytest.raises(CountermarkError) as caught:
        verified(change(authority), authority, headers=headers(by_block()))
    assert caught.value.code == code


def test_the_form_is_exact(authority: Authority) -> None:
    anchors = (stamped(authority), by_block(size=20))
    data = encode_anchors(anchors)
    assert parse_anchors(data) == anchors
    value = cbor.decode(data)
    one = value["anchors"][0]
    for code, changed in (
        ("anchors.version", {**value, "v": 2}),
        ("anchors.field", {**value, "more": 1}),
        ("anchors.field", {"v": 1}),
        ("anchors.count", {**value, "anchors": []}),
        ("anchors.count", {**value, "anchors": [one] * 9}),
        ("anchors.field", {**value, "anchors": [1]}),
        ("anchors.kind", {**value, "anchors": [{**one, "kind": "x509"}]}),
        ("anchors.proof", {**value, "anchors": [{**one, "proof": [bytes(31)]}]}),
        ("anchors.proof", {**value, "anchors": [{**one, "proof": [bytes(32)] * 64}]}),
        ("anchors.too_long", {**value, "anchors": [{**one, "token": bytes(MAX_TOKEN_BYTES + 1)}]}),
    ):
        with pytest.raises(FormatError) as caught:
            parse_anchors(cbor.encode(changed))
        assert caught.value.code == code
    with pytest.raises(FormatError):
        parse_anchors(data + b"\0")


@given(st.binary(max_size=100))
def test_arbitrary_bytes(data: bytes) -> None:
    for content in (data, cbor.encode({"v": 1, "anchors": [data]})):
        with pytest.raises(FormatError):
            parse_anchors(content)
