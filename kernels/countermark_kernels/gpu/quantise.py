"""Row quantisation, quantise.py, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, ieee, overlap
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import next_power_of_2


@triton.jit
def factors(top):
    """div(127, amax) and div(amax, 127) from amax's pattern `top`; both 0 where amax < 2^-100."""
    tiny = top < ieee.TINY_BITS
    amax = ieee.value(tl.where(tiny, ieee.ONE_BITS, top))
    hundred27 = tl.zeros_like(amax) + 127.0
    return tl.where(tiny, 0.0, ieee.div(hundred27, amax)), tl.where(tiny, 0.0, ieee.div(amax, hundred27))


@triton.jit
def _kernel(x, q, s, flag, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    overlap.begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * width + at, mask=at < width, other=0.0)
    top = tl.max(ieee.magnitude(v), axis=0)
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    t, scale = factors(top)
    tl.store(q + row * width + at, ieee.rint_int32(v * t).to(tl.int8), mask=at < width)
    tl.store(s + row, scale)


def row_launch(width: int) -> dict[str, int]:
    """A block that holds a row of `width`, and its warps: 16 values a thread where there are as many."""
    block = next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K] f32 -> (q: [T, K] int8, s: [T] f32)."""
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    s = torch.empty(rows, device=x.device)
    if rows:
        options = {**row_launch(width), **overlap.launch(x.device, rows)}
        prepared(_kernel, **options)((rows,), x, q, s, flags.word(x.device), width)
    return q, s
