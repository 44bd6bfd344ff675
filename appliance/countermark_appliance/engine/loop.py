"""The engine's own thread: plan, start a step, settle the one before it; until closed.

With a pipelined executor one step is always in flight: while it computes, the draws of the step before are turned into
text and sent, and the next step is planned. A sequence whose draw is not home yet goes on with it unseen; if that draw
then turns out to end its answer, what was computed behind it is dropped.

A step that fails is repeated one sequence at a time, so that only the sequence whose own numbers fail (the profile
knows no NaN and no infinity) or that finds no memory ends with `error`; repeating is exact, because a step writes the
same bits to the same cache positions. Sinks run on this thread and must not block.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from countermark.errors import Unavailable
from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.scheduler import Scheduler, Work
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.engine.step import Drawn, Executor, Part, Ticket
from countermark_appliance.faults import describe
from countermark_kernels.cache import BLOCK
from countermark_kernels.ieee import NumericsError

RATE_S = 0.25
"""How often the rate is measured that refusals are told."""
NARROW_STEPS = 1000
"""So many steps after one that found no memory the configured sizes are tried again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step that was started."""

    works: Seq[Work]
    ticket: Ticket


class _NotStarted:
    """The ticket of a step that the executor refused."""

    def __init__(self, err: Exception) -> None:
        self._err = err

    def wait(self) -> list[Drawn]:
        raise self._err


class Loop:
    """Runs a scheduler's plans through an executor, on a thread of its own."""

    def __init__(
        self, executor: Executor, scheduler: Scheduler, *, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """`on_failure`: called once, on the engine's thread, when it ends otherwise than by `close`; every request has
        its `DoneEvent` then."""
        self._executor = executor
        self._scheduler = scheduler
        self._wake = threading.Condition()
        self._arrived: list[Sequence] = []
        self._flying: _Step | None = None
        self._narrow = 0  # steps until the scheduler may be given its sizes again
        self._closing = False
        self._on_failure = on_failure
        self._delivered = 0
        self._measured = (time.monotonic(), 0)
        self.wait_s = 1.0  # estimate, read by other threads: until the next answer ends
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="countermark-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `Unavailable` (`engine.stopping`) after `close`."""
        with self._wake:
            if self._closing:
                raise Unavailable("engine: stopping", code="engine.stopping")
            self._arrived.append(sequence)
            self._wake.notify()

    def close(self) -> None:
        """End everything with `shutdown` and wait for the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        reason, detail = Finish.SHUTDOWN, ""
        try:
            while self._collect():
                self._scheduler.sweep(time.monotonic())
                self._advance()
        except Exception as err:  # noqa: BLE001  the thread's end: not re-raised, because a traceback prints the message
            reason, detail = Finish.ERROR, f"engine: {describe(err)}"
            self.failed = True
            _log.error("engine: thread ended by %s", describe(err))
        finally:
            with self._wake:
                self._closing = True
                orphans, self._arrived = self._arrived, []
            for sequence in (*self._scheduler, *orphans):
                sequence.finish(reason, detail)
            if self._flying is not None:
                with contextlib.suppress(Exception):  # nobody is left whom its end concerns
                    self._flying.ticket.wait()
            if self.failed:
                self._on_failure()
            else:
                self._scheduler.undone(self._flying.works if self._flying is not None else ())
                self._scheduler.sweep(time.monotonic())  # what the pool and the executor hold for them

    def _collect(self) -> bool:
        """Take what has arrived; sleep while there is nothing to do. False: time to stop."""
        with self._wake:
            while not (self._closing or self._arrived or len(self._scheduler) or self._flying):
                self._wake.wait()
                self._measured = time.monotonic(), self._delivered
            for sequence in self._arrived:
                self._scheduler.add(sequence)
            self._arrived.clear()
        self._measure(time.monotonic())
        return not self._closing

    def _measure(self, now: float) -> None:
        """How far apart answers end: all tokens still to come at the recent rate, over all answers that run."""
        since, delivered = self._measured
        if now - since < RATE_S or not self._scheduler.running:
            return
        left = sum(s.left for s in self._scheduler)
        rate = (self._delivered - delivered) / (now - since)
        self.wait_s = left / max(rate, 1.0) / len(self._scheduler)
        self._measured = now, self._delivered

    def _advance(self) -> None:
        """Start a step, if there is one, and settle the one before it."""
        works = self._scheduler.plan()
        step = self._start(works) if works else None
        before, self._flying = self._flying, step
        if before is not None:
            self._settle(before)
        step = self._flying  # none if it was built on one that failed
        if step is not None and (not self._executor.pipelined or isinstance(step.ticket, _NotStarted)):
            self._flying = None
            self._settle(step)

    def _start(self, works: Seq[Work]) -> _Step:
        parts = [_part(work) for work in works]
        self._scheduler.started(works)
        try:
            ticket = self._executor.start(parts)
        except (NumericsError, MemoryError) as err:
            ticket = _NotStarted(err)
        return _Step(works=works, ticket=ticket)

    def _settle(self, step: _Step) -> None:
        try:
            drawn = step.ticket.wait()
        except (NumericsError, MemoryError) as err:
            self._undo(step)
            self._repeat(step.works, err)
            return
        self._deliver(step.works, drawn)
        if self._narrow:
            self._narrow -= 1
            if not self._narrow:
                self._scheduler.widen()

    def _undo(self, failed: _Step) -> None:
        """Roll a failed step back, and before it the one in flight, which may have gone on with its draws."""
        later, self._flying = self._flying, None
        if later is not None:
            with contextlib.suppress(NumericsError, MemoryError):
                later.ticket.wait()
            self._scheduler.undone(later.works)
        self._scheduler.undone(failed.works)

    def _deliver(self, works: Seq[Work], drawn: Seq[Drawn]) -> None:
        draws = iter(drawn)
        for work in works:
            self._scheduler.settled(work)
            if work.samples:
                token = next(draws)
                if not work.sequence.done:  # else nobody wants it any more
                    work.sequence.accept(token)
                    self._delivered += 1

    def _repeat(self, works: Seq[Work], err: Exception) -> None:
        """A failed step again, one sequence at a time, nothing else in flight."""
        if len(works) == 1:
            self._failed_alone(works[0], err)
            return
        if isinstance(err, MemoryError):
            _log.warning("engine: no memory for a step of %d sequences (%s)", len(works), describe(err))
            self._scheduler.narrow(works)
            self._narrow = NARROW_STEPS
        for work in works:
            self._alone(work)

    def _alone(self, work: Work) -> None:
        if work.sequence.done or work.sequence.cache is None:  # ended, or preempted
            return
        step = self._start([work])
        try:
            drawn = step.ticket.wait()
        except (NumericsError, MemoryError) as err:
            self._scheduler.undone(step.works)
            self._failed_alone(work, err)
            return
        self._deliver(step.works, drawn)

    def _failed_alone(self, work: Work, err: Exception) -> None:
        """The end of a sequence, unless it is only that its piece of prompt is too large for the memory."""
        if isinstance(err, MemoryError) and work.count > BLOCK:
            middle, sequence = (work.start + work.end) // 2, work.sequence
            self._alone(Work(sequence, work.start, middle, samples=False))
            self._alone(Work(sequence, middle, work.end, samples=work.samples))
        else:
            work.sequence.finish(Finish.ERROR, describe(err))


def _part(work: Work) -> Part:
    sequence, end = work.sequence, work.end
    assert sequence.cache is not None
    known = sequence.tokens[work.start : end]
    carried = sequence.slot if len(known) < work.count else None
    row = sequence.row(end) if work.samples else None
    return Part(cache=sequence.cache, start=work.start, tokens=known, carried=carried, row=row)
