"""SwiGLU, block Hadamard and quantisation, activation.py.

With many rows a program does one, which stays in its registers. With few, several programs share a row: each stores its
part and raises the row's maximum, and the last to arrive quantises the row. One stream at a time per device: they share
the words for maxima and arrivals, which are zero before and after every launch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, hadamard, ieee, overlap
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.quantise import factors
from countermark_kernels.gpu.sizes import cdiv, next_power_of_2

CHUNK = 4096
PART = 1024
FEW = 64  # rows, at most WORDS
WORDS = 64


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return ieee.div(x, ieee.exp(-x) + 1.0)


@triton.jit
def _mixed(gate, width, at, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """SwiGLU and Hadamard transform of SIZE successive elements of a row, zeros past its end."""
    g = tl.load(gate + at, mask=at < width, other=0.0)
    u = tl.load(gate + width + at, mask=at < width, other=0.0)
    return hadamard.transform(silu(g) * u, SIZE, STAGES)


@triton.jit
def _factors(top, flag):
    """quantise.factors for the pattern `top` of a row's largest magnitude before it is rounded to bfloat16."""
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)  # the rounding can hide a NaN
    top = ieee.bits(ieee.round_bf16(ieee.value(top)))  # and is monotone: the largest stays the largest
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    return factors(top)


@triton.jit
def _kernel(
    gate_up, q, s, flag, width,
    PARTS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row in parts of CHUNK values, the last filled up with zeros; a Hadamard block never spans two."""
    overlap.begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    parts = ()
    top = 0
    for i in tl.static_range(PARTS):
        h = _mixed(gate_up + row * 2 * width, width, i * CHUNK + tl.arange(0, CHUNK), CHUNK, STAGES)
        top = tl.maximum(top, tl.max(ieee.magnitude(h), axis=0))
        parts = parts + (ieee.round_bf16(h),)  # type: ignore[assignment] # noqa: RUF005  no unpacking in Triton
    t, scale = _factors(top, flag)
    for i in tl.static_range(PARTS):
        at = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(q + row * width + at, ieee.rint_int32(parts[i] * t).to(tl.int8), mask=at < width)
    tl.store(s + row, scale)


@triton.jit
def _shared_kernel(
    gate_up, q, s, flag, mixed, tops, arrivals, width,
    PART: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    overlap.begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    h = _mixed(gate_up + row * 2 * width, width, at, PART, STAGES)
    mixed += row * width
    rounded = ieee.bits(ieee.round_bf16(h))
    tl.store(mixed + at, (rounded >> 16).to(tl.int16), mask=at < width, cache_modifier=".cg")
    tl.atomic_max(tops + row, tl.max(ieee.magnitude(h), axis=0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.debug_barrier()
        t, scale = _factors(tl.atomic_xchg(tops + row, 0, sem="relaxed"), flag)
        tl.store(arrivals + row, 0)
        tl.store(s + row, scale)
        for start in range(0, width, CHUNK):
            to = start + tl.arange(0, CHUNK)
            upper = tl.load(mixed + to, mask=to < width, other=0, cache_modifier=".cg").to(tl.int32)
            z = ieee.rint_int32(ieee.value(upper << 16) * t)
            tl.store(q + row * width + to, z.to(tl.int8), mask=to < width)


@cache
def _words(device: torch.device) -> Tensor:
    return torch.zeros(2, WORDS, dtype=torch.int32, device=device)


def swiglu_quantise(gate_up: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2I] f32 -> (q: [T, I] int8, s: [T] f32). `block`: the Hadamard block, a power of two dividing I."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q = torch.empty(rows, width, dtype=torch.int8, device=gate_up.device)
    s = torch.empty(rows, device=gate_up.device)
    given = (gate_up, q, s, flags.word(gate_up.device))
    size = next_power_of_2(width)
    stages = {"STAGES": block.bit_length() - 1, **overlap.launch(gate_up.device, rows)}
    if rows > FEW:
        chunk = min(size, CHUNK)
        parts = {"PARTS": cdiv(width, chunk), "CHUNK": chunk, "num_warps": max(chunk // 512, 1)}
        prepared(_kernel, **parts, **stages)((rows,), *given, width)
    elif rows:
        mixed = torch.empty(rows, width, dtype=torch.int16, device=gate_up.device)
        part = min(size, PART)
        grid = (rows, cdiv(width, part))
        shared = prepared(_shared_kernel, PART=part, CHUNK=min(size, CHUNK), num_warps=4, **stages)
        shared(grid, *given, mixed, *_words(gate_up.device), width)
    return q, s
