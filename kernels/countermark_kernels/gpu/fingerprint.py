"""The fingerprint of raw logits, fingerprint.py: one program a slice of a row, added up by atomics modulo 2^64.

The factors are computed, not read: SplitMix64 of 2i + lane costs less than its eight bytes of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import ieee
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import cdiv

SLICE = 2048


@triton.jit
def _factor(x):
    """SplitMix64(x) | 1 for a block of uint64."""
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) | 1


@triton.jit
def add(lanes, logits, at):
    """Add the shares of a block of logits, zero where there is none, of the ids `at` to the two lanes of their row."""
    pattern = ieee.bits(logits).to(tl.uint32, bitcast=True).to(tl.uint64)
    index = at.to(tl.uint64) * 2
    for lane in tl.static_range(2):
        part = ieee.total((pattern * _factor(index + lane)).to(tl.int64, bitcast=True), 0)
        ieee.add(lanes + lane, part, None)


@triton.jit
def _kernel(logits, lanes, stride, vocab, SLICE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    l = tl.load(logits + row * stride + at, mask=at < vocab, other=0.0)  # noqa: E741  the specification's name
    add(lanes + row * 2, l, at)


def fingerprint(logits: Tensor, vocab: int) -> Tensor:
    """logits: [S, >= vocab] f32 -> [S, 2] int64, the two lanes as two's complement."""
    rows, stride = logits.shape
    lanes = torch.zeros(rows, 2, dtype=torch.int64, device=logits.device)
    if rows:
        prepared(_kernel, SLICE=SLICE)((rows, cdiv(vocab, SLICE)), logits, lanes, stride, vocab)
    return lanes
