"""What runs in the next step: continuous batching under a budget of tokens and a pool of blocks.

Every running sequence with one token to compute (decoding) is in every step, unless what it may draw depends on a draw
that is still in flight (a grammar's): then it is in the step behind that. Prompts share a budget of tokens, oldest
first, cut into chunks where necessary. While somebody decodes the budget is smaller, so that a long prompt delays
the others' next token by little.

A sequence is admitted, in order of arrival, when the pool has room for what is known of it and one token more beside
one block for each that runs; it begins behind the longest prefix that is computed already in its scope. When a
decoding sequence needs a block and there is none, the youngest that runs gives up its blocks and waits again, before
all others, to compute its tokens anew. So whoever runs is older than whoever waits, and the oldest always goes on. In
the exact profile none of this changes a bit of anybody's result. Not thread-safe: the loop calls it from one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.sequence import Sequence
from countermark_kernels.cache import BLOCK, KvCache


@dataclass(slots=True, eq=False)  # not frozen: one is made for every token, and that would double what it costs
class Work:
    """The tokens of a sequence at `start`..`end`; `samples` if they complete what is known of it."""

    sequence: Sequence
    start: int
    end: int
    samples: bool

    @property
    def count(self) -> int:
        return self.end - self.start


class Scheduler:
    """Waiting and running sequences, and the blocks of those that run."""

    def __init__(
        self,
        blocks: Blocks,
        table: Callable[[Seq[int]], KvCache],
        *,
        max_sequences: int,
        step_tokens: int,
        mixed_step_tokens: int,
        forget: Callable[[Sequence], None] = lambda _: None,
    ) -> None:
        """`table`: makes a cache of block numbers. `forget`: called with whoever ended and has nothing in flight."""
        self._blocks = blocks
        self._table = table
        self._forget = forget
        self._configured = (max_sequences, step_tokens, mixed_step_tokens)
        self._max_sequences, self._step_tokens, self._mixed_step_tokens = self._configured
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._leaving: list[Sequence] = []  # ended, with a step in flight that still writes to their blocks

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._leaving)

    def __iter__(self) -> Iterator[Sequence]:
        yield from tuple(self._running)
        yield from tuple(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def sweep(self, now: float) -> None:
        """End what was cancelled or is past its deadline, and let go of what is done."""
        for sequence in self:
            reason = sequence.overdue(now)
            if reason is not None:
                sequence.finish(reason)
        if any(s.done for s in self._waiting):
            for sequence in [s for s in self._waiting if s.done]:
                self._forget(sequence)  # it may have run before it was preempted
            self._waiting = deque(s for s in self._waiting if not s.done)
        if any(s.done for s in self._running):
            self._leaving += [s for s in self._running if s.done]
            self._running = [s for s in self._running if not s.done]
        if self._leaving:
            for sequence in [s for s in self._leaving if not s.in_flight]:
                self._blocks.give(sequence.displace())
                self._forget(sequence)
            self._leaving = [s for s in self._leaving if s.in_flight]

    def plan(self) -> list[Work]:
        """Admit from the waiting, then take every decoding sequence and as much of the prompts as the budget allows.

        Blocks are taken, nothing else changes until `started`. Empty although somebody runs: there is no room before
        what is in flight has been settled.
        """
        self._admit()
        works: list[Work] = []
        prompts = False
        for sequence in tuple(self._running):
            pending, start = sequence.pending, sequence.computed
            if pending == 1 and sequence.cache is not None and not sequence.done and not sequence.held:
                if start >= sequence.cache.capacity and not self._make_room(sequence):
                    return []
                if sequence.cache is not None and not sequence.done:
                    works.append(Work(sequence, start, start + 1, samples=True))
            prompts |= pending > 1
        if not prompts:
            return works
        budget = self._mixed_step_tokens if works else self._step_tokens
        for sequence in self._running:
            pending, start = sequence.pending, sequence.computed
            if pending > 1 and budget > 0 and not sequence.done:
                end = start + min(pending, budget)
                works.append(Work(sequence, start, end, samples=end == start + pending))
                budget -= end - start
        return works

    def started(self, works: Seq[Work]) -> None:
        """A step is in flight. The caches' last positions and the places of the draws follow it."""
        slot = 0
        for work in works:
            sequence = work.sequence
            sequence.computed = work.end
            sequence.in_flight += 1
            if work.samples:
                sequence.undelivered += 1
                sequence.slot = slot
                slot += 1

    def undone(self, works: Seq[Work]) -> None:
        """A step in flight has failed, or was built on one that has, and is over: as if it had not been started."""
        for work in works:
            sequence = work.sequence
            sequence.in_flight -= 1
            sequence.undelivered -= work.samples
            sequence.computed = min(sequence.computed, work.start)

    def settled(self, work: Work) -> None:
        """This part of a step in flight is computed: others may share its full blocks."""
        sequence = work.sequence
        sequence.in_flight -= 1
        sequence.undelivered -= work.samples
        if sequence.cache is not None and not sequence.done and work.end // BLOCK > sequence.published:
            sequence.published = self._blocks.publish(
                sequence.scope, sequence.tokens, sequence.cache.blocks, sequence.published, work.end
            )

    def narrow(self, works: Seq[Work]) -> None:
        """A step of these works found no memory, and nothing is in flight: the next ones shall need less.

        The youngest waits again, no more run than now, and prompts come in smaller pieces, until `widen`.
        """
        sequences = [work.sequence for work in works]
        for sequence in reversed(self._running):
            if sequence in sequences:
                self._preempt(sequence)
                break
        self._max_sequences = max(1, len(self._running))
        self._step_tokens = min(self._step_tokens, max(BLOCK, self._step_tokens // 2))
        self._mixed_step_tokens = min(self._mixed_step_tokens, max(BLOCK, self._mixed_step_tokens // 2))

    def widen(self) -> None:
        """Back to the configured sizes."""
        self._max_sequences, self._step_tokens, self._mixed_step_tokens = self._configured

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence, spare = self._waiting[0], len(self._running)
            if self._blocks.available <= spare:
                return
            found = self._blocks.match(sequence.scope, sequence.tokens[:-1])
            need = _blocks_for(min(len(sequence.tokens) + 1, sequence.limit)) - len(found)
            if self._blocks.available < need + spare:
                self._blocks.give(found)
                if not spare and not self._leaving:  # not for want of others' blocks: somebody else has the pool's
                    sequence.finish(Finish.ERROR, "scheduler: no room in the pool")
                return
            sequence.place(self._table(found + self._blocks.take(need)), BLOCK * len(found))
            self._running.append(self._waiting.popleft())

    def _make_room(self, sequence: Sequence) -> bool:
        """One block more if its next token needs it, from the youngest if need be. False: not before settling."""
        assert sequence.cache is not None
        while sequence.computed >= sequence.cache.capacity:
            if self._blocks.available:
                sequence.cache.blocks += self._blocks.take(1)
            elif self._leaving or any(s.in_flight for s in self._running):
                return False
            elif len(self._running) == 1:  # `prepare` refuses what cannot fit alone
                sequence.finish(Finish.ERROR, "scheduler: no room in the pool")
                return True
            else:
                youngest = self._running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return True
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.in_flight
        self._running.remove(sequence)
        self._blocks.give(sequence.displace())
        self._waiting.appendleft(sequence)


def _blocks_for(tokens: int) -> int:
    return (tokens + BLOCK - 1) // BLOCK
