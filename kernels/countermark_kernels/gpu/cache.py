"""Writing keys and values into a pool of blocks on a GPU: cache.py's layout for Triton. Nothing is computed here."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.cache import BLOCK, Pool
from countermark_kernels.gpu.launching import prepared

__all__ = ["BLOCK", "Pool", "append", "value_order", "value_slot"]


@triton.jit
def value_slot(token):
    """Where in its block the value of a token lies: of its last four bits wttb, the order becomes ttwb.

    In this order the threads that compute the weights of sixteen tokens hold them.
    """
    return (token & -16) | ((token & 6) << 1) | ((token & 8) >> 2) | (token & 1)


def value_order() -> list[int]:
    """`value_slot` of each token of a block."""
    return [value_slot.fn(token) for token in range(BLOCK)]


@triton.jit
def _append(k, s_k, v, s_v, slots, to_k, to_s_k, to_v, to_s_v, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    page = (slot // BLOCK) * heads + head
    token = slot % BLOCK
    at = tl.arange(0, D)
    source = row * heads + head
    tl.store(to_k + (page * BLOCK + token) * D + at, tl.load(k + source * D + at))
    tl.store(to_v + (page * D + at) * BLOCK + value_slot(token), tl.load(v + source * D + at))
    tl.store(to_s_k + page * BLOCK + token, tl.load(s_k + source))
    tl.store(to_s_v + page * BLOCK + token, tl.load(s_v + source))


def append(rows: tuple[Tensor, ...], slots: Tensor, layer: tuple[Tensor, ...]) -> None:
    """k, s_k, v, s_v of some tokens into a pool's layer. slots: [tokens] int64, block * BLOCK + place."""
    tokens, heads, d = rows[0].shape
    if tokens:
        prepared(_append, D=d, BLOCK=BLOCK)((tokens, heads), *rows, slots, *layer, heads)
