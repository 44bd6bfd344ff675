"""C2SP tlog-proof v1: an inclusion proof that can be checked offline, in one text file.

Lines (C2SP/C2SP, tlog-proof.md): `c2sp.org/tlog-proof@v1`; `extra <base64>`, which we never write and refuse, because
nothing authenticates it; `index <decimal>`; the inclusion proof, one base64 hash a line, from the leaf's sibling up; an
empty line; the log's checkpoint as it was signed, cosignatures and all.

Not checked here: the mathematics of a signature (`VerifySignature`); what the leaf says.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark.tlog.checkpoint import MAX_NOTE_BYTES, Checkpoint, LogKeys, VerifySignature, parse_note
from countermark.tlog.checkpoint import verify_checkpoint as open_checkpoint
from countermark.tlog.merkle import HASH_BYTES, MAX_PROOF, MAX_SIZE, leaf_hash, verify_inclusion

HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_PROOF_BYTES: Final = MAX_NOTE_BYTES + 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProof:
    """A leaf's place in a log. `checkpoint`: the signed note."""

    index: int
    hashes: tuple[bytes, ...]  # 32 each
    checkpoint: bytes


def encode_proof(proof: LogProof) -> bytes:
    """The file's bytes."""
    lines = [HEADER, f"index {proof.index}", *(base64.b64encode(item).decode() for item in proof.hashes), "", ""]
    return "\n".join(lines).encode() + proof.checkpoint


def parse_proof(data: bytes) -> LogProof:
    """The inverse of `encode_proof`. Raises `FormatError`: `tlog.proof`, or `tlog.note` for the checkpoint."""
    if len(data) > MAX_PROOF_BYTES:
        raise _error(f"at most {MAX_PROOF_BYTES} bytes, got {len(data)}")
    head, separator, note = data.partition(b"\n\n")
    try:
        header, index, *hashes = head.decode("ascii").split("\n")
        proof = LogProof(
            index=int(index.removeprefix("index ")),
            hashes=tuple(base64.b64decode(item, validate=True) for item in hashes),
            checkpoint=note,
        )
    except (ValueError, binascii.Error) as err:
        raise _error(f"{HEADER!r}, an index and base64 hashes") from err
    if header != HEADER or not separator or not 0 <= proof.index < MAX_SIZE or len(hashes) > MAX_PROOF:
        raise _error(f"{HEADER!r}, an index, at most {MAX_PROOF} hashes, an empty line and a checkpoint")
    if any(len(item) != HASH_BYTES for item in proof.hashes) or encode_proof(proof) != data:
        raise _error("canonical numbers and base64 of 32 bytes, and no extra data")
    parse_note(note)
    return proof


def verify_proof(proof: LogProof, leaf: bytes, origin: str, keys: LogKeys, verify: VerifySignature) -> Checkpoint:
    """Both signatures of the log `origin` hold, and `leaf` stands under that head at the proof's index.

    Raises `FormatError` (`tlog.*`) or `LogError`: as `checkpoint.verify_checkpoint` and `merkle.verify_inclusion`.
    """
    head = open_checkpoint(proof.checkpoint, origin, keys, verify)
    verify_inclusion(proof.index, head.size, leaf_hash(leaf), proof.hashes, head.root)
    return head


def _error(expected: str) -> FormatError:
    return FormatError(f"tlog proof: expected {expected}", code="tlog.proof")
