"""Sums of weights and the likeliest tokens, logprobs.py: slices of a row, then what the slices found.

A token's key orders by logit, then by id, and is unique: the next likeliest is the largest key below the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import ieee
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sampler import LEAST, ordered, token_key, weight
from countermark_kernels.gpu.sizes import cdiv, next_power_of_2

SLICE = 2048


@triton.jit
def _likeliest(keys, to, COUNT: tl.constexpr):
    """Store the COUNT largest of the unique `keys` in their order."""
    below = tl.max(keys, axis=0)
    tl.store(to, below)
    for i in tl.static_range(1, COUNT):
        below = tl.max(tl.where(keys < below, keys, LEAST), axis=0)
        tl.store(to + i, below)


@triton.jit
def _slices(logits, largest, found, vocab, stride, SLICE: tl.constexpr, COUNT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = at < vocab
    l = tl.load(logits + row * vocab + at, mask=inside, other=0.0)  # noqa: E741  the specification's name
    w = weight(tl.where(inside, l - tl.load(largest + row), -126.0) * ieee.LOG2E)
    ieee.add(found + row * stride, ieee.total(tl.where(inside, w, 0), 0), None)
    keys = tl.where(inside, token_key(ordered(l), at), LEAST)
    _likeliest(keys, found + row * stride + 1 + COUNT + tl.program_id(1) * COUNT, COUNT)


@triton.jit
def _rows(found, stride, parts, SIZE: tl.constexpr, COUNT: tl.constexpr):
    row = found + tl.program_id(0).to(tl.int64) * stride
    at = tl.arange(0, SIZE)
    keys = tl.load(row + 1 + COUNT + at, mask=at < parts * COUNT, other=LEAST)
    _likeliest(keys, row + 1, COUNT)


def likely(logits: Tensor, count: int) -> Tensor:
    """logits: [S, V] f32 -> [S, 1 + count] int64 as logprobs.reference, for count <= V."""
    rows, vocab = logits.shape
    padded, parts = next_power_of_2(count), cdiv(vocab, SLICE)
    stride = 1 + padded + parts * padded
    found = torch.zeros(rows, stride, dtype=torch.int64, device=logits.device)
    largest = logits.amax(dim=-1)
    prepared(_slices, SLICE=SLICE, COUNT=padded)((rows, parts), logits, largest, found, vocab, stride)
    prepared(_rows, SIZE=next_power_of_2(parts * padded), COUNT=padded)((rows,), found, stride, parts)
    return found[:, : 1 + count]
