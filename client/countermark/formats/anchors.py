"""What a bundle carries to show that a log had grown so far by some time: tokens of others over its checkpoints.

Deterministic CBOR, format version 1, ours: {v, anchors: [{kind, checkpoint, proof, token}]}. `checkpoint` is the whole
signed note that was stamped, byte for byte: its hash is what the token covers. `proof` is the consistency proof from
the receipt's checkpoint to it, empty where both trees have one size. Beside a log a file of the same form holds one
anchor without a proof.

Not checked here: tokens (`formats.timestamp`, `formats.ots`), proofs, and who signed the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.tlog.checkpoint import MAX_NOTE_BYTES
from countermark.tlog.merkle import HASH_BYTES, MAX_PROOF

VERSION: Final = 1
FOLDER: Final = "anchors"  # beside a log's files: one anchor a file, named 0, 1, 2
MAX_ANCHORS: Final = 8
MAX_TOKEN_BYTES: Final = 64 * 1024
MAX_ANCHORS_BYTES: Final = MAX_ANCHORS * (MAX_NOTE_BYTES + MAX_TOKEN_BYTES + 4096)


class AnchorKind(StrEnum):
    """Who vouches: a time-stamping authority, or a block of Bitcoin's chain."""

    RFC3161 = "rfc3161"
    OTS = "ots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One token over a checkpoint. `token`: a TimeStampToken (RFC 3161) or a detached proof (OpenTimestamps)."""

    kind: AnchorKind
    checkpoint: bytes
    proof: tuple[bytes, ...]
    token: bytes


def encode_anchors(anchors: tuple[Anchor, ...]) -> bytes:
    """Deterministic CBOR. Raises `FormatError`."""
    items = [
        {"kind": item.kind.value, "checkpoint": item.checkpoint, "proof": item.proof, "token": item.token}
        for item in anchors
    ]
    data = cbor.encode({"v": VERSION, "anchors": items})
    parse_anchors(data)
    return data


def parse_anchors(data: bytes) -> tuple[Anchor, ...]:
    """Inverse of `encode_anchors`.

    Raises `FormatError`: `cbor.*`, `anchors.field`, `anchors.version`, `anchors.count` (none, or more than
    `MAX_ANCHORS`), `anchors.kind`, `anchors.proof`, `anchors.too_long`.
    """
    value = cbor.fields(cbor.decode(data, max_bytes=MAX_ANCHORS_BYTES), "anchors", v=int, anchors=list)
    if value["v"] != VERSION:
        raise FormatError(f"anchors: expected version {VERSION}, got {value['v']}", code="anchors.version")
    items = value["anchors"]
    if not 1 <= len(items) <= MAX_ANCHORS:
        raise FormatError(f"anchors: expected 1 to {MAX_ANCHORS}, got {len(items)}", code="anchors.count")
    return tuple(map(_anchor, items))


def _anchor(item: Any) -> Anchor:
    value = cbor.fields(item, "anchors", kind=str, checkpoint=bytes, proof=list, token=bytes)
    try:
        kind = AnchorKind(value["kind"])
    except ValueError as err:
        kinds = " or ".join(AnchorKind)
        raise FormatError(f"anchors.kind: expected {kinds}, got {value['kind']!r:.40}", code="anchors.kind") from err
    for name, most in (("checkpoint", MAX_NOTE_BYTES), ("token", MAX_TOKEN_BYTES)):
        if len(value[name]) > most:
            message = f"anchors.{name}: expected at most {most} bytes, got {len(value[name])}"
            raise FormatError(message, code="anchors.too_long")
    proof = value["proof"]
    if len(proof) > MAX_PROOF or any(not isinstance(node, bytes) or len(node) != HASH_BYTES for node in proof):
        message = f"anchors.proof: expected at most {MAX_PROOF} hashes of {HASH_BYTES} bytes"
        raise FormatError(message, code="anchors.proof")
    return Anchor(kind=kind, checkpoint=value["checkpoint"], proof=tuple(proof), token=value["token"])
