"""The sums of sweep.py in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from countermark_kernels.gpu import ieee
from countermark_kernels.gpu.activation import silu

BLOCK = 1 << 24
TILE = 4096
OPS = {"exp2": ieee.exp2, "silu": silu}


@triton.jit
def _sums(sums, first, OP: tl.constexpr, TILE: tl.constexpr):
    block, tile = tl.program_id(1), tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    x = ieee.value(((first + block) << 24) + place)
    x = tl.where(ieee.magnitude(x) < ieee.INFINITY_BITS, x, 0.0)
    part = ieee.total(ieee.bits(OP(x)).to(tl.int64) * (2 * place + 1).to(tl.int64), 0)
    ieee.add(sums + block, part, None)


def block_sums(name: str, first: int, blocks: int, *, tiles: int = BLOCK // TILE) -> list[int]:
    """The sums of blocks first, first + 1, ..., over the first `tiles` tiles of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.zeros(blocks, dtype=torch.int64, device=device)
    start = first - (1 << 8 if first >= 1 << 7 else 0)  # an int32 pattern
    _sums[(tiles, blocks)](sums, start, OP=OPS[name], TILE=TILE, **ieee.EXACT)
    return [s % (1 << 64) for s in sums.tolist()]
