"""An OpenTimestamps proof over a message, checked against block headers that the verifier brings along.

The headers are the verifier's word for which chain is Bitcoin's: they come from its own node. That they are no slip of
a pen is checked: every header does the work that its own bits ask for, which no bits may ask less of than the chain's
first block, and where heights follow one another each names the one before.

Not checked here: that the headers are the chain with the most work, and the difficulty's course. Block times are the
miners', right to within two hours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from countermark.errors import LogError
from countermark.formats.ots import Block, Header, Proof, parse_headers, parse_proof

LEAST_WORK_BITS: Final = 0x1D00FFFF  # of block 0, and the least that consensus allows


@dataclass(frozen=True, slots=True)
class Headers:
    """Checked block headers by height."""

    by_height: dict[int, Header]


def verify_headers(data: bytes) -> Headers:
    """Read and check a file of headers.

    Raises `FormatError` `anchor.headers`; `LogError`: `anchor.work`, `anchor.link`.
    """
    headers = parse_headers(data)
    for header in headers:
        target = _target(header.bits)
        if not 0 < target <= _target(LEAST_WORK_BITS) or int.from_bytes(header.hash, "little") > target:
            text = f"block {header.height}: expected a hash below the target of its bits {header.bits:#x}"
            raise LogError(f"{text}, got {header.hash[::-1].hex()}", code="anchor.work")
    for before, after in pairwise(headers):
        if after.height == before.height + 1 and after.previous != before.hash:
            text = f"block {after.height}: expected to follow {before.hash[::-1].hex()}"
            raise LogError(f"{text}, got {after.previous[::-1].hex()}", code="anchor.link")
    return Headers({header.height: header for header in headers})


def _target(bits: int) -> int:
    """The compact form of a 256-bit number: mantissa of 23 bits and sign, exponent in bytes. 0 where it is none."""
    exponent, mantissa = bits >> 24, bits & 0x7FFFFF
    if bits & 0x800000:
        return 0
    return mantissa << 8 * (exponent - 3) if exponent > 3 else mantissa >> 8 * (3 - exponent)


def verify_proof_of(data: bytes, message: bytes) -> Proof:
    """Parse a proof over `message`. Raises `FormatError` `anchor.ots`; `LogError` `anchor.imprint`."""
    proof = parse_proof(data)
    expected = hashlib.sha256(message).digest()
    if proof.digest != expected:
        text = f"OpenTimestamps proof: expected SHA-256 {expected.hex()} of the checkpoint, got {proof.digest.hex()}"
        raise LogError(text, code="anchor.imprint")
    return proof


def verify_blocks(blocks: Sequence[Block], headers: Headers) -> tuple[Header, ...]:
    """The headers that hold the proof's roots, of those heights that are known. Raises `LogError` `anchor.block`."""
    found = []
    for block in blocks:
        header = headers.by_height.get(block.height)
        if header is None:
            continue
        if header.merkle_root != block.message:
            text = f"block {block.height}: expected Merkle root {block.message[::-1].hex()}"
            raise LogError(f"{text}, got {header.merkle_root[::-1].hex()}", code="anchor.block")
        found.append(header)
    return tuple(found)
