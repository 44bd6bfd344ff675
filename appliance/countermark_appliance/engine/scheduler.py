"""What runs in the next step: continuous batching under a token budget.

Every running sequence with one token to compute (decoding) is in every step. Prompts share a budget of tokens, oldest
first, cut into chunks where necessary. While somebody decodes the budget is smaller, so that a long prompt delays
the others' next token by little. In the exact profile none of this changes a bit of anybody's result. Not thread-safe:
the loop calls it from one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from countermark_appliance.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The next `count` tokens of a sequence; `samples` if they complete what is known of it."""

    sequence: Sequence
    count: int
    samples: bool


class Scheduler:
    """Waiting and running sequences."""

    def __init__(self, *, max_sequences: int, step_tokens: int, mixed_step_tokens: int) -> None:
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._mixed_step_tokens = mixed_step_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from tuple(self._running)
        yield from tuple(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def sweep(self, now: float) -> None:
        """End what was cancelled or is past its deadline, and forget what is done."""
        for sequence in self:
            reason = sequence.overdue(now)
            if reason is not None:
                sequence.finish(reason)
        self._running = [s for s in self._running if not s.done]
        self._waiting = deque(s for s in self._waiting if not s.done)

    def plan(self) -> list[Work]:
        """Admit from the waiting, then take every decoding sequence and as much of the prompts as the budget allows."""
        while self._waiting and len(self._running) < self._max_sequences:
            self._running.append(self._waiting.popleft())
        decoding = [s for s in self._running if s.pending == 1]
        works = [Work(sequence=s, count=1, samples=True) for s in decoding]
        budget = self._mixed_step_tokens if decoding else self._step_tokens
        for sequence in self._running:
            if sequence.pending == 1 or budget <= 0:
                continue
            count = min(sequence.pending, budget)
            works.append(Work(sequence=sequence, count=count, samples=count == sequence.pending))
            budget -= count
        return works
