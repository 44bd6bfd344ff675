"""The engine's scheduling over a real model: no schedule, pool or pipeline changes a bit, and nothing is left behind.

test_loop.py asks the same of a model made of hashes, in far more cases; here the keys and values are real.
"""

from __future__ import annotations

import gc
import math
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from driver import Answer, run, some_prompt, some_request, start
from tinymodel import TinyArtefact

from countermark.errors import RequestError, Unavailable
from countermark_appliance.engine import engine as engine_module
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.executor import HostExecutor
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.request import DoneEvent, Request, TokensEvent
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.step import Drawn, Part
from countermark_kernels.cache import BLOCK, KvCache


class Late:
    """A `HostExecutor` that computes a step when it is waited for, or when the one after the next is started."""

    pipelined = True

    def __init__(self, model: Model, *, rows: int) -> None:
        self._host = HostExecutor(model)
        self._pending: list[LateTicket] = []
        self.carried = 0

    def start(self, parts: Sequence[Part]) -> LateTicket:
        while len(self._pending) > 1:
            self.compute()
        copies = [
            Part(
                cache=KvCache(part.cache.pool, part.cache.blocks),
                start=part.start,
                tokens=list(part.tokens),
                carried=part.carried,
                row=part.row,
            )
            for part in parts
        ]
        self.carried += sum(part.carried is not None for part in parts)
        self._pending.append(LateTicket(self, copies))
        return self._pending[-1]

    def compute(self) -> None:
        ticket = self._pending.pop(0)
        ticket.done = self._host.start(ticket.parts)

    def forget(self, key: object) -> None:
        self._host.forget(key)

    def close(self) -> None:
        self._host.close()


class LateTicket:
    def __init__(self, executor: Late, parts: list[Part]) -> None:
        self._executor, self.parts = executor, parts
        self.done: object = None

    def wait(self) -> list[Drawn]:
        while self.done is None:
            self._executor.compute()
        found: list[Drawn] = self.done.wait()  # type: ignore[attr-defined]
        return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(TinyArtefact("qwen3"), threads=2)
    yield engine
    engine.close()


def same(found: list[DoneEvent], expected: list[DoneEvent]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.output_tokens, one.fingerprints) == (other.output_tokens, other.fingerprints)
        assert (one.text, one.reason) == (other.text, other.reason)


def mixed(seed: int, count: int, *, tokens: int = 40) -> list[Request]:
    rng = random.Random(seed)
    return [some_request(rng, longest=90, tokens=tokens) for _ in range(count)]


@pytest.mark.parametrize("blocks", [6, 9, 16])
@pytest.mark.parametrize("late", [False, True])
def test_any_pool_and_a_pipeline_give_the_same_bits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, blocks: int, late: bool
) -> None:
    requests = [replace(request, max_tokens=200, ignore_eos=True) for request in mixed(blocks, 6)]
    expected = run(engine, requests)
    preempted: list[object] = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, s: (preempted.append(s), preempt(self, s)))
    if late:
        monkeypatch.setattr(engine_module, "make_executor", Late)
    small = Engine(TinyArtefact("qwen3"), threads=2, blocks=blocks, step_tokens=100, mixed_step_tokens=37)
    try:
        same(run(small, requests), expected)
        assert preempted
        if late:
            assert small._executor.carried > 100  # type: ignore[attr-defined]
        assert small._model.blocks.available == blocks - 1
    finally:
        small.close()


@pytest.mark.parametrize(("step", "mixed_step"), [(1, 1), (63, 64), (65, 2), (8192, 8192)])
def test_any_step_gives_the_same_bits(engine: Engine, step: int, mixed_step: int) -> None:
    requests = mixed(step, 8, tokens=12)
    other = Engine(TinyArtefact("qwen3"), threads=2, step_tokens=step, mixed_step_tokens=mixed_step)
    try:
        same(run(other, requests), run(engine, requests))
    finally:
        other.close()


def test_cancelling_in_a_pipeline_changes_nobody_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_executor", Late)
    late = Engine(TinyArtefact("qwen3"), threads=2, blocks=9)
    requests = mixed(5, 6)
    try:
        answers = []
        for i, request in enumerate(requests):
            answers.append(start(late, request))
            other = start(late, Request(prompt="the quick brown fox", max_tokens=60 + i, ignore_eos=True))
            other.next()
            assert other.handle is not None
            other.handle.cancel()
        same([answer.done() for answer in answers], run(engine, requests))
    finally:
        late.close()


def test_a_hot_prefix_gives_the_same_bits_as_a_cold_one(engine: Engine) -> None:
    rng = random.Random(8)
    text = some_prompt(rng, 150)
    length = len(engine.prepare(Request(prompt=text)).prompt_tokens)
    assert length > 2 * BLOCK
    request = Request(prompt=text, max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, scope=b"one")
    cold, hot = run(engine, [request]), run(engine, [request])
    other = run(engine, [replace(request, scope=b"two")])
    found = (length - 1) // BLOCK * BLOCK
    assert [done[0].cached_tokens for done in (cold, hot, other)] == [0, found, 0]
    same(hot, cold)
    same(other, cold)


def test_what_cannot_fit_the_pool_is_refused_and_told_what_does() -> None:
    engine = Engine(TinyArtefact(), threads=1, blocks=3)
    try:
        prompt = "x" * 100
        tokens = len(engine.prepare(Request(prompt=prompt, max_tokens=1)).prompt_tokens)
        room = 2 * BLOCK + 1 - tokens  # the last token is never computed
        assert engine.prepare(Request(prompt=prompt)).max_tokens == room
        (done,) = run(engine, [Request(prompt=prompt, max_tokens=room, ignore_eos=True)])
        assert (done.reason, len(done.output_tokens)) == ("length", room)
        for request, code, fits in (
            (Request(prompt=prompt, max_tokens=room + 1), "request.max_tokens", room),
            (Request(prompt="x" * 200), "request.prompt", 2 * BLOCK),
        ):
            with pytest.raises(RequestError) as caught:
                engine.prepare(request)
            assert caught.value.code == code
            assert str(fits) in str(caught.value)
    finally:
        engine.close()


def test_log_probabilities_are_those_of_the_raw_logits(engine: Engine) -> None:
    """Against torch in float64; the profile's own weights carry 24 bits."""
    request = Request(
        prompt="the quick", max_tokens=6, temperature=0.7, seed=5, repetition_penalty=1.7, logprobs=4, ignore_eos=True
    )
    prepared = engine.prepare(request)
    answer = Answer()
    engine.submit(prepared, answer.sink)
    events: list[TokensEvent] = []
    while isinstance(event := answer.next(), TokensEvent):
        events.append(event)
    assert isinstance(event, DoneEvent)
    model = Model(TinyArtefact("qwen3"))
    tokens = [*prepared.prompt_tokens, *event.output_tokens][:-1]
    logits = model.forward([Chunk(cache=model.new_cache(len(tokens)), start=0, tokens=tokens, logits=6)])
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, token in zip(expected, [e for e in events if e.ids], strict=True):
        ((found,), (drawn,)) = token.logprobs, token.ids
        assert math.isclose(found.logprob, float(row[drawn]), abs_tol=1e-4)
        best = torch.sort(row, descending=True, stable=True)
        assert [i for i, _ in found.top] == best.indices[:4].tolist()
        assert all(math.isclose(p, float(q), abs_tol=1e-4) for (_, p), q in zip(found.top, best.values, strict=False))
    (plain,) = run(engine, [replace(request, logprobs=None)])
    assert (plain.output_tokens, plain.fingerprints) == (event.output_tokens, event.fingerprints)


@pytest.mark.parametrize("logprobs", [-1, 21, True, 1.0])
def test_log_probabilities_out_of_range_are_refused(engine: Engine, logprobs: int) -> None:
    with pytest.raises(RequestError) as caught:
        engine.prepare(Request(prompt="x", logprobs=logprobs))
    assert caught.value.code == "request.logprobs"


def test_one_client_cannot_take_all_places() -> None:
    engine = Engine(TinyArtefact(), threads=1, max_sequences=2, max_waiting=4)
    try:
        mine = [engine.reserve(b"me") for _ in range(3)]
        with pytest.raises(Unavailable) as caught:
            engine.reserve(b"me")
        assert caught.value.code == "engine.busy"
        assert caught.value.retry_after_s is not None
        assert 0.1 <= caught.value.retry_after_s <= 30
        others = [engine.reserve(b"you") for _ in range(3)]
        for place in (*mine, *others):
            for _ in range(2):
                place.release()
        assert len([engine.reserve() for _ in range(6)]) == 6
    finally:
        engine.close()


def test_a_place_comes_back_however_submitting_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = engine.prepare(Request(prompt="x"))

    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine_module, "Sequence", broken)
    for place in (engine.reserve(b"me"), None):
        with pytest.raises(MemoryError):
            engine.submit(prepared, lambda _: None, place=place)
        assert engine._places._taken == 0


def test_the_advised_wait_follows_what_is_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the clock: what is advised while the first answers are computed is about how far apart answers end."""
    monkeypatch.setattr("countermark_appliance.engine.loop.RATE_S", 0.01)
    engine = Engine(TinyArtefact(), threads=1, max_sequences=2, max_waiting=4)
    try:
        answers = [start(engine, Request(prompt="x", max_tokens=400, ignore_eos=True)) for _ in range(6)]
        for _ in range(100):
            assert isinstance(answers[0].next(), TokensEvent)
        advised = engine._loop.wait_s
        for answer in answers:
            answer.skipped = True  # type: ignore[attr-defined]
        ends = [answer.done().end_time for answer in answers]
        apart = (max(ends) - min(ends)) / 4  # two at a time
        assert 0.05 * apart < advised < 20 * apart
    finally:
        engine.close()


def flat(requests: int, warm: int) -> None:
    """Memory after `requests` short requests of many scopes against that after `warm` of them."""
    engine = Engine(TinyArtefact(layers=1), threads=1, blocks=40, max_waiting=200)
    rng = random.Random(1)

    def serve(count: int) -> None:
        for _ in range(count // 50):
            many = [
                Request(
                    prompt=some_prompt(rng, rng.randint(1, 60)),
                    max_tokens=2,
                    repetition_penalty=rng.choice([1.0, 1.2]),
                    logprobs=rng.choice([None, 2]),
                    scope=rng.randbytes(32),
                )
                for _ in range(50)
            ]
            run(engine, many)

    try:
        serve(warm)
        gc.collect()
        tracemalloc.start()
        serve(warm)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        serve(requests)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        engine.close()
    assert grown < 64 * 1024, f"{grown} bytes more after {requests} requests"
    assert engine._places._taken == 0
    assert not engine._executor._tallies  # type: ignore[attr-defined]


def test_short_requests_leave_memory_flat() -> None:
    flat(500, 200)


@pytest.mark.slow
def test_ten_thousand_short_requests_leave_memory_flat() -> None:
    flat(10_000, 500)
