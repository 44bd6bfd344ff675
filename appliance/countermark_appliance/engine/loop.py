"""The engine's own thread: plan, forward, sample, emit; until closed.

The queue is bounded: `submit` refuses (`engine.busy`) rather than let a request wait without end. A step that fails is
repeated one sequence at a time, so that only the sequence whose own numbers fail (the profile knows no NaN and no
infinity) or that finds no memory ends with `error`; repeating is exact, because a step writes the same bits to the same
cache positions. Sinks run on this thread and must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from countermark.errors import Unavailable
from countermark_appliance.engine.draw import draw
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.scheduler import Scheduler, Work
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.faults import describe
from countermark_kernels.ieee import NumericsError

_log = logging.getLogger(__name__)


class Loop:
    """Runs a scheduler on a thread of its own."""

    def __init__(
        self, model: Model, scheduler: Scheduler, *, capacity: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """`capacity`: sequences admitted at a time, running and waiting together. `on_failure`: called once, on the
        engine's thread, when it ends otherwise than by `close`; every request has its `DoneEvent` then."""
        self._model = model
        self._scheduler = scheduler
        self._capacity = capacity
        self._wake = threading.Condition()
        self._arrived: list[Sequence] = []
        self._size = 0
        self._closing = False
        self._on_failure = on_failure
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="countermark-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `Unavailable`: `engine.busy` when full, `engine.stopping` after `close`."""
        with self._wake:
            if self._closing:
                raise Unavailable("engine: stopping", code="engine.stopping")
            if self._size >= self._capacity:
                raise Unavailable(f"engine: all {self._capacity} places are taken; retry later", code="engine.busy")
            self._size += 1
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
                works = self._scheduler.plan()
                if works:
                    self._step(works)
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
            if self.failed:
                self._on_failure()

    def _collect(self) -> bool:
        """Take what has arrived; sleep while there is nothing to do. False: time to stop."""
        with self._wake:
            self._size = len(self._scheduler) + len(self._arrived)
            while not self._closing and not self._size:
                self._wake.wait()
            for sequence in self._arrived:
                self._scheduler.add(sequence)
            self._arrived.clear()
            return not self._closing

    def _step(self, works: Seq[Work]) -> None:
        try:
            self._forward(works)
        except (NumericsError, MemoryError) as err:
            if len(works) > 1:
                for work in works:
                    if not work.sequence.done:
                        self._step([work])
                return
            works[0].sequence.finish(Finish.ERROR, describe(err))

    def _forward(self, works: Seq[Work]) -> None:
        chunks = []
        for work in works:
            s = work.sequence
            if s.cache is None:
                s.cache = self._model.new_cache(len(s.prepared.prompt_tokens) + s.prepared.max_tokens)
            tokens = s.tokens[s.computed : s.computed + work.count]
            chunks.append(Chunk(cache=s.cache, start=s.computed, tokens=tokens, logits=1 if work.samples else 0))
        logits = self._model.forward(chunks)
        drawing = [work.sequence for work in works if work.samples]
        ids, marks = draw(logits, [s.row() for s in drawing])
        for work in works:  # nothing above changed a sequence, so a failed step can be repeated
            work.sequence.computed += work.count
        for sequence, token, mark in zip(drawing, ids, marks, strict=True):
            sequence.accept(token, mark)
