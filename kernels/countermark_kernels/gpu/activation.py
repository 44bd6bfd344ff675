"""SwiGLU, block Hadamard and quantisation, activation.py, one program a row: the row stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, hadamard, ieee
from countermark_kernels.gpu.quantise import factors

CHUNK = 4096


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return ieee.div(x, ieee.exp(-x) + 1.0)


@triton.jit
def _kernel(
    gate_up, q, s, flag, width, PARTS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr
):  # parts of CHUNK values, the last filled up with zeros; a Hadamard block never spans two
    row = tl.program_id(0).to(tl.int64)
    gate = gate_up + row * 2 * width
    at = tl.arange(0, CHUNK)
    parts = ()
    top = 0
    for i in tl.static_range(PARTS):
        inside = i * CHUNK + at < width
        g = tl.load(gate + i * CHUNK + at, mask=inside, other=0.0)
        u = tl.load(gate + width + i * CHUNK + at, mask=inside, other=0.0)
        h = hadamard.transform(silu(g) * u, CHUNK, STAGES)
        top = tl.maximum(top, tl.max(ieee.magnitude(h), axis=0))
        parts = parts + (ieee.round_bf16(h),)  # type: ignore[assignment] # noqa: RUF005  Triton's tuples know no unpacking
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)  # before the rounding, which can hide a NaN
    top = ieee.bits(ieee.round_bf16(ieee.value(top)))  # rounding is monotone: the largest stays the largest
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    t, scale = factors(top)
    for i in tl.static_range(PARTS):
        inside = i * CHUNK + at < width
        tl.store(q + row * width + i * CHUNK + at, ieee.rint_int32(parts[i] * t).to(tl.int8), mask=inside)
    tl.store(s + row, scale)


def swiglu_quantise(gate_up: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2I] f32 -> (q: [T, I] int8, s: [T] f32). `block`: the Hadamard block, a power of two dividing I."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q = torch.empty(rows, width, dtype=torch.int8, device=gate_up.device)
    s = torch.empty(rows, device=gate_up.device)
    chunk = min(triton.next_power_of_2(width), CHUNK)
    if rows:
        _kernel[(rows,)](
            gate_up,
            q,
            s,
            flags.word(gate_up.device),
            width,
            PARTS=triton.cdiv(width, chunk),
            CHUNK=chunk,
            STAGES=block.bit_length() - 1,
            num_warps=min(max(chunk // 256, 1), 16),
            **ieee.EXACT,
        )
    return q, s
