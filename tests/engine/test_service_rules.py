"""The engine's behaviour as a service: ends, limits, refusals, and one client's trouble staying its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from driver import Answer, run, start
from tinymodel import TinyArtefact

from countermark.errors import RequestError, Unavailable, Undecidable
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.executor import HostExecutor
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.request import DoneEvent, Event, Message, Request
from countermark_kernels import PROFILE
from countermark_kernels.ieee import NumericsError

LONG = Request(prompt="the other", max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(TinyArtefact(), threads=1, max_sequences=4, max_waiting=2)
    yield engine
    engine.close()


def test_length_and_counts(engine: Engine) -> None:
    prepared = engine.prepare(Request(prompt="the quick", max_tokens=5, ignore_eos=True))
    answer = Answer()
    before = time.time()
    engine.submit(prepared, answer.sink)
    done = answer.done()
    assert (done.reason, len(done.output_tokens)) == ("length", 5)
    assert (done.prompt_tokens, done.cached_tokens) == (len(prepared.prompt_tokens), 0)
    assert done.first_token_time is not None
    assert before <= done.first_token_time <= done.end_time <= time.time()


def test_a_bias_can_force_the_end_token_and_ignore_eos_ignores_it(engine: Engine) -> None:
    eos = 2
    request = Request(prompt="the quick", max_tokens=5, logit_bias={eos: 100.0})
    (done,) = run(engine, [request])
    assert (done.reason, done.output_tokens, done.text) == ("eos", (eos,), "")
    (done,) = run(engine, [Request(prompt="the quick", max_tokens=3, logit_bias={eos: 100.0}, ignore_eos=True)])
    assert (done.reason, done.output_tokens, done.text) == ("length", (eos,) * 3, "")


def test_a_stop_string_ends_the_answer_before_it(engine: Engine) -> None:
    (free,) = run(engine, [Request(prompt="dog", max_tokens=40, seed=4, temperature=1.0, ignore_eos=True)])
    stop = free.text[6:9]
    (done,) = run(
        engine, [Request(prompt="dog", max_tokens=40, seed=4, temperature=1.0, ignore_eos=True, stop=("~~~~", stop))]
    )
    assert done.reason == "stop"
    assert done.text == free.text[: free.text.index(stop)]
    assert done.output_tokens == free.output_tokens[: len(done.output_tokens)]
    assert done.fingerprints == free.fingerprints[: len(done.output_tokens)]


def test_cancel_deadline_and_twice(engine: Engine) -> None:
    cancelled, late = start(engine, LONG), start(engine, LONG, deadline_s=0.05)
    assert cancelled.handle is not None
    cancelled.handle.cancel()
    cancelled.handle.cancel()
    assert cancelled.done().reason == "cancelled"
    done = late.done()
    assert done.reason == "deadline"
    assert len(done.output_tokens) < 400


def test_a_deadline_in_the_past_computes_nothing(engine: Engine) -> None:
    done = start(engine, LONG, deadline_s=0.0).done()
    assert (done.reason, done.output_tokens, done.text, done.first_token_time) == ("deadline", (), "", None)


def test_full_is_refused_and_recovers(engine: Engine) -> None:
    running = [start(engine, LONG) for _ in range(6)]
    with pytest.raises(Unavailable) as err:
        start(engine, LONG)
    assert err.value.code == "engine.busy"
    for answer in running:
        assert answer.handle is not None
        answer.handle.cancel()
    assert {answer.done().reason for answer in running} == {"cancelled"}
    assert run(engine, [Request(prompt="the", max_tokens=1)])[0].reason in ("length", "eos")


def test_a_waiting_request_can_be_cancelled(engine: Engine) -> None:
    running = [start(engine, LONG) for _ in range(4)]
    waiting = start(engine, LONG)
    assert waiting.handle is not None
    waiting.handle.cancel()
    done = waiting.done()
    assert (done.reason, done.output_tokens) == ("cancelled", ())
    for answer in running:
        assert answer.handle is not None
        answer.handle.cancel()
        answer.done()


@pytest.mark.parametrize("fails_at", [1, 3, 10])
def test_a_sink_that_raises_hurts_nobody_else(engine: Engine, fails_at: int) -> None:
    seen: list[Event] = []
    ended = threading.Event()

    def sink(event: Event) -> None:
        seen.append(event)
        if isinstance(event, DoneEvent):
            ended.set()
        if len(seen) >= fails_at:
            raise OSError("gone")

    request = Request(prompt="the quick brown", max_tokens=9, seed=1, temperature=1.0, ignore_eos=True)
    (alone,) = run(engine, [request])
    engine.submit(engine.prepare(request), sink)
    (done,) = run(engine, [request])
    assert (done.output_tokens, done.fingerprints) == (alone.output_tokens, alone.fingerprints)
    assert ended.wait(20)
    assert len(seen) == min(fails_at + 1, 10)


def test_numbers_out_of_range_end_their_own_sequence_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="the quick brown", max_tokens=6, ignore_eos=True)
    (alone,) = run(engine, [request])
    poisoned = engine.prepare(Request(prompt="lazy dog", max_tokens=6)).prompt_tokens
    real = Model.forward

    def forward(self: Model, chunks: list[Chunk]) -> torch.Tensor:
        if any(tuple(c.tokens) == poisoned for c in chunks):
            raise NumericsError("activation: infinity", code="numerics.not_finite")
        return real(self, chunks)

    monkeypatch.setattr(Model, "forward", forward)
    bad, good = start(engine, Request(prompt="lazy dog", max_tokens=6)), start(engine, request)
    done = bad.done()
    assert (done.reason, done.output_tokens) == ("error", ())
    assert "lazy" not in done.detail
    assert good.done().fingerprints == alone.fingerprints


def test_close_ends_everything_and_refuses_more() -> None:
    engine = Engine(TinyArtefact(), threads=1, max_sequences=2)
    answers = [start(engine, LONG) for _ in range(5)]
    answers[0].skipped = True  # type: ignore[attr-defined]
    answers[0].next()
    engine.close()
    engine.close()
    assert [a.done().reason for a in answers] == ["shutdown"] * 5
    with pytest.raises(Unavailable) as err:
        start(engine, LONG)
    assert err.value.code == "engine.stopping"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_loop_leaves_nobody_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("bug")

    engine = Engine(TinyArtefact(), threads=1)
    monkeypatch.setattr(HostExecutor, "start", broken)
    assert start(engine, LONG).done().reason == "error"
    with pytest.raises(Unavailable):
        start(engine, LONG)
    engine.close()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request(prompt=""), "request.prompt_empty"),
        (Request(messages=()), "request.prompt_empty"),
        (Request(messages=(Message(role="user", content=""),)), "request.prompt_empty"),
        (Request(), "request.input"),
        (Request(prompt="x", messages=(Message(role="user", content="x"),)), "request.input"),
        (Request(prompt="x", model="gpt"), "request.model"),
        (Request(prompt="x" * 512), "request.prompt_too_long"),
        (Request(prompt="x" * 1_000_000), "request.prompt_too_long"),
        (Request(messages=(Message(role="user", content="x" * 500),)), "request.prompt_too_long"),
        (Request(prompt="\ud800"), "request.text"),
        (Request(prompt="x", max_tokens=0), "request.max_tokens"),
        (Request(prompt="x", max_tokens=512), "request.max_tokens"),
        (Request(prompt="x", stop=("",)), "request.stop"),
        (Request(prompt="x", stop=("x" * 257,)), "request.stop"),
        (Request(prompt="x", stop=("x",) * 17), "request.stop"),
        (Request(prompt="x", seed=1 << 64), "request.seed"),
        (Request(prompt="x", temperature=float("nan")), "request.temperature"),
        (Request(messages=(Message(role="root", content="x"),)), "request.role"),
    ],
)
def test_refusals(engine: Engine, request_: Request, code: str) -> None:
    with pytest.raises(RequestError) as err:
        engine.prepare(request_)
    assert err.value.code == code


def test_defaults_are_resolved(engine: Engine) -> None:
    prepared = engine.prepare(Request(messages=(Message(role="user", content="the dog"),)))
    assert prepared.model == "tiny-llama"
    assert prepared.max_tokens == engine.info.context - len(prepared.prompt_tokens)
    assert (prepared.stop, prepared.stop_tokens, prepared.ignore_eos) == ((), (2,), False)
    assert prepared.sampling.seed_origin == "server"
    assert prepared.prompt_tokens[0] == 1


def test_info_comes_from_the_artefact(engine: Engine) -> None:
    artefact, info = TinyArtefact(), engine.info
    assert info.weights_root == artefact.weights_root
    assert info.tokenizer_digest == artefact.tokenizer_digest
    assert info.template_digest == artefact.template_digest
    assert (info.profile, info.model, info.context) == (PROFILE, "tiny-llama", 512)
    assert len(info.kernel_digest) == 32
    assert info.cpu_model
    assert info.backend in ("native", "torch")
    assert (info.triton_version, info.cuda_version, info.driver_version, info.gpus) == (None, None, None, ())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(Undecidable) as err:
        Engine(TinyArtefact(), threads=1, device="cuda")
    assert err.value.code == "engine.device"
