"""What the sampler of a GPU keeps from step to step: counts of penalised sequences and biases, a row each.

Kernels read and update the rows (gpu/sampler.py); here is who has which, and when one must be made anew: a sequence is
new, or the device has counted another number of tokens than its next draw follows. A row with a mask has its biases
made anew for every draw: `grammar.BARRED` for each id that is barred. Not here: what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from countermark_appliance.engine.draw import allowed_bias
from countermark_appliance.engine.grammar import BARRED, Mask
from countermark_appliance.engine.step import Part, Row
from countermark_kernels.gpu import batch, sampler
from countermark_kernels.sampler import SamplerParams


@dataclass(slots=True, eq=False)
class _Kept:
    """The state of one sequence's sampler on the device. `length`: tokens counted, or -1 where that is not known."""

    counts: int = -1
    bias: int = -1
    prompt: int = -1
    length: int = -1
    params: SamplerParams | None = None


class _Places:
    """Rows of a tensor [places, vocab] that doubles when none is free."""

    def __init__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor: Tensor | None = None
        self._dtype, self._device = dtype, device
        self._vocab = vocab
        self._free: list[int] = []

    def take(self) -> int:
        if not self._free:
            before = 0 if self.tensor is None else self.tensor.shape[0]
            grown = torch.zeros(max(1, 2 * before), self._vocab, dtype=self._dtype, device=self._device)
            if self.tensor is not None:
                grown[:before] = self.tensor
            self.tensor = grown
            self._free = list(range(grown.shape[0] - 1, before - 1, -1))
        return self._free.pop()

    def give(self, place: int) -> None:
        if place >= 0:
            self._free.append(place)


class States:
    """What penalties have counted and biases add, on the device, for the sequences that have any."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._kept: dict[object, _Kept] = {}
        self._counts = _Places(vocab, torch.int32, device)
        self._bias = _Places(vocab, torch.float32, device)
        self._masked: list[tuple[int, Row, Mask]] = []
        self._bits = torch.arange(8, dtype=torch.uint8, device=device)

    @property
    def counts(self) -> Tensor | None:
        return self._counts.tensor

    @property
    def bias(self) -> Tensor | None:
        return self._bias.tensor

    def places(self, key: object, part: Part, row: Row, drawn: Tensor) -> tuple[int, int]:
        """Where the counts and the bias of a row lie, brought up to it; -1 for none. `drawn`: the step before's."""
        kept = self._kept.setdefault(key, _Kept())
        if row.penalised:
            if kept.counts < 0:
                kept.counts = self._counts.take()
            if (kept.prompt, kept.length) != (row.prompt, row.length):
                self._count(kept.counts, part, row, drawn)
            kept.prompt, kept.length = row.prompt, row.length + 1  # the draw of this step counts itself
        if row.mask is not None or (row.params.logit_bias and kept.params is not row.params):
            if kept.bias < 0:
                kept.bias = self._bias.take()
            if row.mask is not None:
                self._masked.append((kept.bias, row, row.mask))
            else:
                self._add(kept.bias, row.params)
            kept.params = None if row.mask is not None else row.params
        biased = row.mask is not None or row.params.logit_bias
        return kept.counts if row.penalised else -1, kept.bias if biased else -1

    def bar(self) -> bool:
        """Make the biases of the rows with a mask whose places were asked for since the last time. -> if there are."""
        if not self._masked:
            return False
        masked, self._masked = self._masked, []
        biases = [allowed_bias(row.params, mask) if row.params.logit_bias else {} for _, row, mask in masked]
        at = [place * self._vocab + i for (place, _, _), found in zip(masked, biases, strict=True) for i in found]
        values = np.array([value for found in biases for value in found.values()], dtype=np.float32)
        there = batch.send(
            [
                np.array([place for place, _, _ in masked], dtype=np.int32),
                np.stack([mask for _, _, mask in masked]),
                np.array(at, dtype=np.int64).view(np.int32),
                values.view(np.int32),
            ],
            self._device,
        )
        assert self._bias.tensor is not None
        octets = there[1].view(torch.uint8).unsqueeze(-1)
        allowed = ((octets >> self._bits) & 1).view(len(masked), -1)[:, : self._vocab] != 0
        rows = torch.full(allowed.shape, BARRED, dtype=torch.float32, device=self._device).masked_fill_(allowed, -0.0)
        self._bias.tensor.index_copy_(0, there[0].long(), rows)
        if at:
            self._bias.tensor.view(-1).index_copy_(0, there[2].view(torch.int64), there[3].view(torch.float32))
        return True

    def forget(self, key: object) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._counts.give(kept.counts)
            self._bias.give(kept.bias)

    def doubt(self) -> None:
        """A step failed: what it drew was no token. Count anew."""
        for kept in self._kept.values():
            kept.length = -1

    def _count(self, place: int, part: Part, row: Row, drawn: Tensor) -> None:
        assert self._counts.tensor is not None
        known = row.length - (part.carried is not None)
        tokens = np.array(row.tokens[:known], dtype=np.int32)
        if len(tokens) < known or not 0 <= tokens.min(initial=0) <= tokens.max(initial=0) < self._vocab:
            raise ValueError(f"tokens: expected {known} ids under {self._vocab}, got others")
        counts = self._counts.tensor[place]
        (there,) = batch.send([tokens], self._device)
        sampler.remember(counts, there, row.prompt)
        if part.carried is not None:
            last = drawn[part.carried, :1].clamp(0, self._vocab - 1)
            counts.index_add_(0, last, torch.ones(1, dtype=torch.int32, device=self._device))

    def _add(self, place: int, params: SamplerParams) -> None:
        assert self._bias.tensor is not None
        ids = np.array(list(params.logit_bias), dtype=np.int32)
        values = np.array(list(params.logit_bias.values()), dtype=np.float32)
        if not 0 <= ids.min() <= ids.max() < self._vocab:
            raise ValueError(f"ids: expected 0..{self._vocab - 1}, got others")
        to, what = batch.send([ids, values.view(np.int32)], self._device)
        self._bias.tensor[place].fill_(-0.0).index_copy_(0, to.long(), what.view(torch.float32))
