"""Requests through the engine's scheduler and loop, and when their tokens came: what bench/gpu_engine.py measures with.

Any executor can stand behind it. Prompts are drawn anew for each request and each has a scope of its own, so that no
request finds another's prefix in the cache.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.engine import STEP_TOKENS
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Request
from countermark_appliance.engine.sampling import ResolvedSampling
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.sequence import Sequence as Served
from countermark_appliance.engine.step import Drawn, Executor, Part, Row, Ticket
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels.cache import KvCache

WINDOW_STEPS = 16
PATIENCE_S = 60.0  # without a single token


@dataclass(slots=True)
class Heard:
    """What came of one request: when each token came, and the end."""

    times: list[float] = field(default_factory=list)
    done: DoneEvent | None = None


def windows(heard: Sequence[Heard], steps: int = WINDOW_STEPS) -> list[float]:
    """Tokens a second in each stretch of `steps` steps in which every answer grew."""
    begun, ended = max(h.times[0] for h in heard), min(h.times[-1] for h in heard)
    latest = max(heard, key=lambda h: h.times[0])
    ticks = [at for at in latest.times if begun <= at <= ended]
    every = sorted(at for h in heard for at in h.times)
    rates = []
    for first, last in zip(ticks[::steps], ticks[steps::steps], strict=False):
        rates.append((bisect_right(every, last) - bisect_right(every, first)) / (last - first))
    if not rates:
        raise RuntimeError(
            f"no steady state: all {len(heard)} answers grew together for {1e3 * (ended - begun):.0f} ms, "
            f"{len(ticks)} steps, where {steps} are needed"
        )
    return rates


def rates_of(found: Sequence[float]) -> dict[str, Any]:
    """The median, and what it hides: the mean over all windows, which are of about as many tokens each."""
    return {
        "tokens_per_second": statistics.median(found),
        "mean": statistics.harmonic_mean(found),
        "least": min(found),
        "most": max(found),
        "of": len(found),
    }


class Watched:
    """An executor that remembers where it failed; the engine's thread says only what with."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.pipelined = executor.pipelined
        self.trouble = ""

    def start(self, parts: Sequence[Part]) -> Ticket:
        with self.remembering():
            ticket = self._executor.start(parts)
        return _Awaited(ticket, self.remembering)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.trouble = self.trouble or traceback.format_exc()
            raise

    def forget(self, key: object) -> None:
        self._executor.forget(key)

    def close(self) -> None:
        self._executor.close()


class _Awaited:
    def __init__(self, ticket: Ticket, remembering: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._ticket, self._remembering = ticket, remembering

    def wait(self) -> list[Drawn]:
        with self._remembering():
            return self._ticket.wait()


class Stuck(Exception):
    """The engine's thread brings nothing any more: nothing can be measured after that in this process."""


class Serving:
    """An executor behind the engine's scheduler and loop."""

    def __init__(
        self,
        executor: Executor,
        blocks: Blocks,
        table: Callable[[Sequence[int]], KvCache],
        tokenizer: Tokenizer,
        *,
        sequences: int,
        device: str,
    ) -> None:
        """With the engine's own budgets for a `device` of that type."""
        self.executor = Watched(executor)
        self._tokenizer = tokenizer
        self._random = torch.Generator().manual_seed(7)
        self._seed = 0
        self.step_tokens, mixed = STEP_TOKENS[device]
        scheduler = Scheduler(
            blocks,
            table,
            max_sequences=sequences,
            step_tokens=self.step_tokens,
            mixed_step_tokens=mixed,
            forget=executor.forget,
        )
        self._loop = Loop(self.executor, scheduler)

    def prompts(self, count: int, tokens: int, vocab: int) -> list[list[int]]:
        drawn: list[list[int]] = torch.randint(vocab, (count, tokens), generator=self._random).tolist()
        return drawn

    def run(
        self, prompts: Sequence[Sequence[int]], tokens: int, sampling: ResolvedSampling
    ) -> tuple[float, list[Heard]]:
        """When the first request was submitted, and what came of each. Every answer has `tokens` tokens."""
        heard = [Heard() for _ in prompts]
        left = threading.Semaphore(0)
        sequences = [
            Served(self._prepared(prompt, tokens, sampling), self._sink(one, left), self._tokenizer, deadline=None)
            for prompt, one in zip(prompts, heard, strict=True)
        ]
        begun = time.perf_counter()
        for sequence in sequences:
            self._loop.submit(sequence)
        for _ in sequences:
            seen = -1
            while not left.acquire(timeout=PATIENCE_S):
                seen, before = sum(len(h.times) for h in heard), seen
                if seen == before:
                    raise Stuck(f"no token in {PATIENCE_S:.0f} s; {self.executor.trouble or 'nothing was raised'}")
        for one in heard:
            assert one.done is not None
            if one.done.reason is not Finish.LENGTH or len(one.times) != tokens:
                raise RuntimeError(
                    f"expected {tokens} tokens, got {len(one.times)}, {one.done.reason}: {one.done.detail}\n"
                    f"{self.executor.trouble}"
                )
            if one.done.cached_tokens:
                raise RuntimeError(f"expected a prompt nobody had computed, got {one.done.cached_tokens} cached tokens")
        return begun, heard

    def close(self) -> None:
        self._loop.close()
        self.executor.close()

    def _prepared(self, prompt: Sequence[int], tokens: int, sampling: ResolvedSampling) -> Prepared:
        self._seed += 1
        return Prepared(
            request=Request(scope=self._seed.to_bytes(8, "big")),
            model="",
            prompt_tokens=tuple(prompt),
            max_tokens=tokens,
            stop=(),
            stop_tokens=(),
            sampling=sampling,
            ignore_eos=True,
        )

    @staticmethod
    def _sink(heard: Heard, left: threading.Semaphore) -> Callable[[Event], None]:
        def sink(event: Event) -> None:
            if isinstance(event, DoneEvent):
                heard.done = event
                left.release()
            elif event.ids:
                heard.times.append(time.perf_counter())

        return sink


class Decoding:
    """Answers that grow one token a step straight through an executor, with one step in flight as in the engine."""

    def __init__(
        self, serving: Serving, caches: Sequence[KvCache], prompts: Sequence[list[int]], sampling: ResolvedSampling
    ) -> None:
        """Computes the prompts, in as few steps as the engine would."""
        self._executor, self._caches = serving.executor, caches
        self._params = sampling.kernel_params()
        self._tokens = [list(prompt) for prompt in prompts]
        self._prompt = self._length = len(prompts[0])
        self._fresh = True
        each = max(1, serving.step_tokens // self._prompt)
        for first in range(0, len(prompts), each):
            parts = [
                Part(cache=cache, start=0, tokens=tokens, row=self._row(tokens))
                for cache, tokens in zip(caches[first : first + each], self._tokens[first : first + each], strict=True)
            ]
            self._take(self._executor.start(parts).wait(), first)
        self._flying: Ticket | None = None

    def step(self) -> None:
        parts = [
            Part(
                cache=cache,
                start=self._length,
                tokens=tokens[-1:] if self._flying is None else (),
                carried=None if self._flying is None else index,
                row=self._row(tokens, self._length + 1),
            )
            for index, (cache, tokens) in enumerate(zip(self._caches, self._tokens, strict=True))
        ]
        ticket = self._executor.start(parts)
        self._length += 1
        self.settle()
        self._flying = ticket

    def settle(self) -> None:
        if self._flying is not None:
            self._take(self._flying.wait(), 0)
            self._flying = None

    def _take(self, drawn: Sequence[Drawn], first: int) -> None:
        for tokens, one in zip(self._tokens[first:], drawn, strict=False):
            tokens.append(one.token)

    def _row(self, tokens: list[int], length: int | None = None) -> Row:
        return Row(params=self._params, tokens=tokens, prompt=self._prompt, length=length or len(tokens))
