"""RMSNorm and quantisation, norm.py, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, ieee, overlap
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.quantise import factors, row_launch


@triton.jit
def exponent(top):
    """e of rows from the patterns `top` of their amax; 0 where amax < 2^-100."""
    return ieee.exponent(ieee.value(tl.where(top < ieee.TINY_BITS, ieee.ONE_BITS, top)))


@triton.jit
def squares(x, power):
    """z^2 for power = 2^(14 - e), as uint32: at most 2^30."""
    z = ieee.rint_int32(x * power)
    return (z * z).to(tl.uint32)


@triton.jit
def inverse_rms(total, e, width, eps, flag):
    """r of rows of `width` elements from their S as int64 and their e."""
    total = ieee.to_f32(total)
    n = tl.zeros_like(total) + width
    power = ieee.pow2(tl.minimum(tl.maximum(2 * e - 28, -126), 127))
    mean_square = ieee.div(total, n) * power
    flags.report(flag, ieee.magnitude(mean_square) >= ieee.INFINITY_BITS, flags.RANGE)
    return ieee.div(tl.zeros_like(total) + 1.0, ieee.sqrt(mean_square + eps))


@triton.jit
def _kernel(x, q, s, flag, width, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    overlap.begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * width + at, mask=at < width, other=0.0)
    top = tl.max(ieee.magnitude(v), axis=0)
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    t, scale = factors(top)
    tl.store(q + row * width + at, ieee.rint_int32(v * t).to(tl.int8), mask=at < width)
    e = exponent(top)
    total = ieee.total(squares(v, ieee.pow2(14 - e)).to(tl.int64), 0)
    tl.store(s + row, scale * inverse_rms(total, e, width, eps, flag))


def norm_quantise(x: Tensor, eps: float, *, first: bool = False) -> tuple[Tensor, Tensor]:
    """x: [T, H] f32 -> (q: [T, H] int8, s: [T] f32). `first`: of a pass, see overlap.py."""
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    s = torch.empty(rows, device=x.device)
    if rows:
        options = {**row_launch(width), **overlap.launch(x.device, rows)}
        if first:
            options["launch_pdl"] = False
        prepared(_kernel, **options)((rows,), x, q, s, flags.word(x.device), width, eps)
    return q, s
