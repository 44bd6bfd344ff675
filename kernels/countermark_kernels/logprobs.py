"""Log probabilities of tokens under the raw logits, before bias, penalties and temperature.

    w_i = rint(exp2((l_i - max l) * LOG2E) * 2^24)       the sampler's weights at temperature 1
    log p_i = (l_i - max l) - ln(sum of w / 2^24)

Integer: the sum, so it is free of order and equal on every device; so are the likeliest tokens, by logit descending and
id ascending. The last line is binary64 on the host. A token of weight 0 has a log probability all the same. Not exact:
w is rounded to 2^-24, which moves log p by less than 2^-24 times the vocabulary over the largest probability's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import check, gpu

TOP_MAX = 32
_LOW = 0x7FFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """One row: the sum of its weights, its largest logit, and the likeliest ids with their logits."""

    total: int
    largest: float
    ids: tuple[int, ...]
    logits: tuple[float, ...]

    def log_probability(self, logit: float) -> float:
        """Of a token with this logit."""
        return (logit - self.largest) - math.log(self.total * 2.0**-24)

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """The likeliest ids with their log probabilities."""
        return tuple((i, self.log_probability(x)) for i, x in zip(self.ids, self.logits, strict=True))


def reference(logits: Tensor, count: int) -> Tensor:
    """logits: [S, V] f32 -> [S, 1 + count] int64: the sum of the weights, then the keys of the likeliest tokens.

    A key is the logit's pattern, made to order like a signed integer (both zeros alike), and 0x7fffffff - id below it.
    """
    check("logits", logits, torch.float32, (None, None), logits.device)
    t = logits - logits.amax(dim=-1, keepdim=True)
    w = ieee.rint(ieee.exp2(t * ieee.LOG2E) * 2.0**24).to(torch.int64)
    pattern = torch.where(logits == 0.0, torch.zeros_like(logits), logits).view(torch.int32)
    ordered = (pattern ^ ((pattern >> 31) & _LOW)).to(torch.int64)
    keys = (ordered << 32) + (_LOW - torch.arange(logits.shape[1]))
    return torch.cat((w.sum(dim=-1, keepdim=True, dtype=torch.int64), keys.topk(count, dim=-1).values), dim=-1)


def likely(logits: Tensor, count: int) -> list[Likely]:
    """logits: [S, V] f32, raw and finite -> the `count` likeliest tokens of each row, at most TOP_MAX and V."""
    if not 1 <= count <= min(TOP_MAX, logits.shape[1]):
        raise ValueError(f"count: expected 1..{min(TOP_MAX, logits.shape[1])}, got {count}")
    found = gpu("logprobs").likely(logits, count) if logits.is_cuda else reference(logits, count)
    return [decode(row) for row in found.tolist()]


def decode(row: list[int]) -> Likely:
    """A row of `reference`."""
    total, *keys = row
    patterns = [key >> 32 for key in keys]
    restored = torch.tensor([p ^ ((p >> 31) & _LOW) for p in patterns], dtype=torch.int32).view(torch.float32)
    values: tuple[float, ...] = tuple(restored.tolist())
    return Likely(total=total, largest=values[0], ids=tuple(_LOW - (key & 0xFFFFFFFF) for key in keys), logits=values)
