"""The sampled token: from raw logits to an id, with integer weights and a counter-based generator.

For one sequence, logits l (true vocabulary only; |l| < 2^100 after step 3, else an error), ids ascending from 0:

1  l_i = l_i + bias_i                                for each biased id
2  l_i = div(l_i, r) if l_i > 0 else l_i * r         for each id in prompt or output, when r != 1
3  l_i = (l_i - presence) - float(count_i) * frequency     for each id in the output, when either is not 0
4  temperature 0: the largest l, ties to the lower id; done
5  t_i = div(l_i - max l, T);  w_i = rint(exp2(t_i * LOG2E) * 2^24), an integer
6  order: t descending, ties by id ascending. All "first" below are in this order
7  top-k (k > 0): keep the first k
8  top-p (20-bit integer P < 2^20): keep the first tokens up to and including the first at which
   cumulated w * 2^20 >= P * total w of what step 7 kept
9  min-p (20-bit integer M > 0): keep those of step 8 with w * 2^20 >= M * w_first   (w_first = 2^24)
10 r32 = Philox4x32-10(key = seed low, high; counter = position, 0, 0, 0), word 0
   u = floor(r32 * total / 2^32), total = sum w kept;  the token: the first whose cumulated w exceeds u

Steps 1 to 5 are binary32 with one rounding per operation, 5's w and everything after are integers (total < 2^42 for a
vocabulary up to 2^18). Nothing depends on the other sequences of the batch. Philox: Salmon, Moraes, Dror, Shaw, SC'11.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import CSampling, check, gpu, native

ONE_20BIT = 1 << 20
LOGIT_MAX = 2.0**100
VOCAB_MAX = 1 << 18
TEMPERATURE_MIN, TEMPERATURE_MAX = 2.0**-14, 2.0**14


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerParams:
    """Resolved sampling settings. Every float is a binary32 value (`ieee.f32`); ValueError otherwise."""

    temperature: float = 1.0
    top_k: int = 0
    top_p_20bit: int = ONE_20BIT
    min_p_20bit: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        floats = (self.temperature, self.repetition, self.presence, self.frequency, *self.logit_bias.values())
        if not all(abs(x) < 2.0**64 and ieee.f32(x) == x for x in floats):
            raise ValueError("sampling: expected binary32 values of magnitude under 2^64, got another")
        if self.temperature != 0.0 and not TEMPERATURE_MIN <= self.temperature <= TEMPERATURE_MAX:
            raise ValueError(f"temperature: expected 0 or 2^-14..2^14, got {self.temperature}")
        if not 2.0**-14 <= self.repetition <= 2.0**14:
            raise ValueError(f"repetition: expected 2^-14..2^14, got {self.repetition}")
        if self.top_k < 0 or not 0 < self.top_p_20bit <= ONE_20BIT or not 0 <= self.min_p_20bit <= ONE_20BIT:
            raise ValueError("top_k, top_p_20bit, min_p_20bit: expected values in range, got others")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError("seed: expected 64 bits, got more")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Token ids of one sequence so far. Read only where a penalty is set."""

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


class Tally:
    """The ids of a history, each once, and how often it is in the output: what steps 2 and 3 read.

    Kept up token by token, so that a draw need not count a long answer again. `prompt`, `length`: tokens of the prompt
    and of all.
    """

    __slots__ = ("_ids", "_places", "_times", "length", "prompt")

    def __init__(self, history: History) -> None:
        self.prompt, self.length = len(history.prompt), len(history.prompt)
        self._places = {token: place for place, token in enumerate(dict.fromkeys(history.prompt))}
        self._ids, self._times = array("q", self._places), array("q", bytes(8 * len(self._places)))
        for token in history.output:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the output."""
        self.length += 1
        place = self._places.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token)
            self._times.append(0)
        self._times[place] += 1

    def seen(self) -> tuple[Tensor, Tensor]:
        """The ids and how often each is in the output: int64."""
        if not self._ids:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        ids, times = (torch.frombuffer(x, dtype=torch.int64).clone() for x in (self._ids, self._times))
        return ids, times


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def adjust(logits: Tensor, params: SamplerParams, history: History | Tally) -> Tensor:
    """Steps 1 to 3 for logits: [V] f32; the input is left as it is when nothing applies, never changed."""
    penal = params.repetition != 1.0
    counted = params.presence != 0.0 or params.frequency != 0.0
    if not (params.logit_bias or penal or counted):
        return logits
    out = logits.clone()
    if params.logit_bias:
        biased = torch.tensor(sorted(params.logit_bias))
        _check_ids(biased, logits.shape[0])
        out[biased] = out[biased] + torch.tensor([params.logit_bias[i] for i in biased.tolist()], dtype=torch.float32)
    if penal or counted:
        seen, times = (history if isinstance(history, Tally) else Tally(history)).seen()
        _check_ids(seen, logits.shape[0])
        if penal:
            l = out[seen]  # noqa: E741 - the specification's name
            r = torch.full_like(l, params.repetition)
            out[seen] = torch.where(l > 0.0, ieee.div(l, r), l * r)
        if counted:
            made = seen[times > 0]
            out[made] = (out[made] - params.presence) - ieee.to_f32(times[times > 0]) * params.frequency
    return out


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(f"ids: expected 0..{vocab - 1}, got others")


def reference(logits: Tensor, params: SamplerParams, position: int) -> int:
    """Steps 4 to 10 for adjusted logits: [V] f32."""
    if float(ieee.amax(logits)) >= LOGIT_MAX:
        raise ieee.NumericsError("logits: expected magnitudes under 2^100, got more", code="numerics.range")
    top = logits.max()
    if params.temperature == 0.0:
        return int((logits == top).nonzero()[0])
    t = ieee.div(logits - top, torch.full_like(logits, params.temperature))
    order = torch.sort(t, descending=True, stable=True).indices
    w = ieee.rint(ieee.exp2(t * ieee.LOG2E) * 2.0**24).to(torch.int64)[order]
    if params.top_k:
        w = w[: params.top_k]
    if params.top_p_20bit != ONE_20BIT:
        reached = torch.cumsum(w, dim=0, dtype=torch.int64) * ONE_20BIT >= w.sum(dtype=torch.int64) * params.top_p_20bit
        w = w[: int(reached.nonzero()[0]) + 1]
    w = torch.where(w * ONE_20BIT >= w[0] * params.min_p_20bit, w, torch.zeros_like(w))
    cumulated = torch.cumsum(w, dim=0, dtype=torch.int64)
    r32 = philox4x32((position, 0, 0, 0), (params.seed & 0xFFFFFFFF, params.seed >> 32))[0]
    u = (r32 * int(cumulated[-1])) >> 32
    return int(order[int((cumulated > u).nonzero()[0])])


def sample(
    logits: Tensor, params: Sequence[SamplerParams], positions: Sequence[int], histories: Sequence[History | Tally]
) -> list[int]:
    """logits: [S, V] f32 of the true vocabulary; one entry of each list per row -> S token ids.

    `positions`: the absolute position (prompt length + n) of the token to be generated, under 2^32.
    Raises NumericsError `numerics.not_finite` or `numerics.range`, on CUDA also for what led to the logits.
    """
    check("logits", logits, torch.float32, (None, None), logits.device)
    rows, vocab = logits.shape
    if not 1 <= vocab <= VOCAB_MAX:
        raise ValueError(f"vocabulary: expected 1..{VOCAB_MAX}, got {vocab}")
    if not len(params) == len(positions) == len(histories) == rows:
        raise ValueError(f"params, positions, histories: expected {rows} each, got others")
    if any(not 0 <= position < 1 << 32 for position in positions):
        raise ValueError("positions: expected 32 bits, got more")
    if logits.is_cuda:
        return _sample_on_cuda(logits, params, positions, histories)
    adjusted = [adjust(row, p, history) for row, p, history in zip(logits, params, histories, strict=True)]
    library = native()
    if library is None:
        return [reference(row, p, position) for row, p, position in zip(adjusted, params, positions, strict=True)]
    untouched = all(row.data_ptr() == mine.data_ptr() for row, mine in zip(logits, adjusted, strict=True))
    rows_in = logits if untouched else torch.stack(adjusted)
    calls = (CSampling * rows)(
        *(
            CSampling(p.seed, position, p.top_p_20bit, p.min_p_20bit, min(p.top_k, vocab), p.temperature)
            for p, position in zip(params, positions, strict=True)
        )
    )
    ids = torch.empty(rows, dtype=torch.int64)
    library.call("cm_sample", rows_in.data_ptr(), rows, vocab, calls, ids.data_ptr())
    chosen: list[int] = ids.tolist()
    return chosen


def cuda_record(params: SamplerParams, vocab: int) -> bytes:
    """A row of gpu/sampler.py's fields: 11 int64, of which position and the places of its state are left open."""
    p = params
    filters = (min(p.top_k, vocab), p.top_p_20bit, p.min_p_20bit)
    penalties = map(_bits, (p.repetition, p.presence, p.frequency))
    return struct.pack("<11q", _signed(p.seed), 0, *filters, _bits(p.temperature), *penalties, -1, -1)


def cuda_settings(params: Sequence[SamplerParams], positions: Sequence[int], vocab: int) -> Tensor:
    """The parameters of all rows as gpu/sampler.py reads them: [S, 11] int64."""
    fields = torch.frombuffer(bytearray().join(cuda_record(p, vocab) for p in params), dtype=torch.int64).view(-1, 11)
    fields[:, 1] = torch.tensor(positions, dtype=torch.int64)
    return fields


def cuda_adjustments(params: Sequence[SamplerParams], histories: Sequence[History | Tally], vocab: int) -> Tensor:
    """Steps 1 to 3 as gpu/sampler.py's `adjust` reads them: entries [6, N] int32."""
    found: list[Tensor] = []
    for row, (p, history) in enumerate(zip(params, histories, strict=True)):
        penal, counted = p.repetition != 1.0, p.presence != 0.0 or p.frequency != 0.0
        if not (p.logit_bias or penal or counted):
            continue
        seen, times = (history if isinstance(history, Tally) else Tally(history)).seen()
        if not (penal or counted):
            seen, times = seen[:0], times[:0]
        biased = torch.tensor(sorted(p.logit_bias), dtype=torch.int64)
        bias = torch.tensor([p.logit_bias[i] for i in biased.tolist()], dtype=torch.float32)
        ids = torch.unique(torch.cat((biased, seen)))
        _check_ids(ids, vocab)
        entries = torch.zeros(6, len(ids), dtype=torch.int32)
        entries[0], entries[1] = row, ids
        at = torch.searchsorted(ids, biased)
        entries[2, at], entries[3, at] = 1, bias.view(torch.int32)
        at = torch.searchsorted(ids, seen)
        entries[4, at], entries[5, at] = int(penal), times.to(torch.int32) * int(counted)
        found.append(entries)
    return torch.cat(found, dim=1) if found else torch.zeros(6, 0, dtype=torch.int32)


def _sample_on_cuda(
    logits: Tensor, params: Sequence[SamplerParams], positions: Sequence[int], histories: Sequence[History | Tally]
) -> list[int]:
    kernels, vocab, device = gpu("sampler"), logits.shape[1], logits.device
    with torch.cuda.device(device):
        fields = cuda_settings(params, positions, vocab).to(device)
        ids = kernels.sample(
            kernels.adjust(logits, cuda_adjustments(params, histories, vocab).to(device), fields), fields
        )
        gpu("flags").raise_pending(device)
    chosen: list[int] = ids.tolist()
    return chosen


def _bits(value: float) -> int:
    """The binary32 pattern of `value` as a signed integer."""
    pattern: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return pattern


def _signed(value: int) -> int:
    """64 bits as two's complement."""
    return value - (1 << 64) if value >> 63 else value
