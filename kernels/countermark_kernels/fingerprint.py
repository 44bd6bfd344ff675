"""Fingerprint of the raw logits of one generated token.

    F_lane = sum over i < vocabulary of bits(l_i) * h(i, lane)  mod 2^64,   lane = 0, 1
    h(i, lane) = SplitMix64(2 i + lane) | 1

bits(l) is the binary32 pattern as an unsigned integer; SplitMix64(x) is the first output of that generator (Steele,
Lea, Flood 2014) seeded with x. All integer, modulo 2^64, so free of order. The factors are odd, hence any single
changed logit changes both lanes with certainty. It detects errors; it is not collision-resistant against someone who
chooses the logits. The host chains it with the token id through a cryptographic hash.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from countermark_kernels.binding import check, gpu, native

_MASK = (1 << 64) - 1


def splitmix64(seed: int) -> int:
    """The first output of SplitMix64 for a 64-bit seed."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=4)
def factors(vocab: int) -> Tensor:
    """h as int64 (two's complement) of shape [2, vocab]."""

    def signed(value: int) -> int:
        return value - (1 << 64) if value >> 63 else value

    return torch.tensor([[signed(splitmix64(2 * i + lane) | 1) for i in range(vocab)] for lane in (0, 1)])


def reference(logits: Tensor, vocab: int) -> Tensor:
    """logits: [S, >= vocab] f32 -> [S, 2] int64, the two lanes as two's complement."""
    bits = logits[:, :vocab].contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.stack([(bits * lane).sum(dim=-1, dtype=torch.int64) for lane in factors(vocab)], dim=-1)


def fingerprint(logits: Tensor, vocab: int) -> Tensor:
    """logits: [S, V] f32 before bias and penalties, `vocab`: the true vocabulary, at most V -> [S, 2] int64."""
    check("logits", logits, torch.float32, (None, None), logits.device)
    if not 1 <= vocab <= logits.shape[1]:
        raise ValueError(f"vocab: expected 1..{logits.shape[1]}, got {vocab}")
    if logits.is_cuda:
        on_cuda: Tensor = gpu("fingerprint").fingerprint(logits, vocab)
        return on_cuda
    library = native()
    if library is None:
        return reference(logits, vocab)
    rows, stride = logits.shape
    lanes = torch.empty(rows, 2, dtype=torch.int64)
    library.call("cm_fingerprint", logits.data_ptr(), rows, stride, vocab, factors(vocab).data_ptr(), lanes.data_ptr())
    return lanes


def encode(lanes: Tensor) -> list[bytes]:
    """[S, 2] int64 -> S strings of 16 bytes: lane 0, then lane 1, little endian."""
    words = lanes.flatten().tolist()
    data = struct.pack(f"<{len(words)}q", *words)
    return [data[at : at + 16] for at in range(0, len(data), 16)]
