"""What surrounds the model, done again by a replay: prompt to ids, ids to text, and where an answer ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
from driver import run, some_request
from tinymodel import TinyArtefact

from countermark.errors import FormatError, RequestError
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.replay import ExactRunner
from countermark_appliance.engine.request import Finish, Message, Request
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(TinyArtefact("llama"), threads=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def runner() -> ExactRunner:
    return ExactRunner(TinyArtefact("llama"))


def tokens_of(text: str) -> tuple[int, ...]:
    """One id a byte, so that a test can cut anywhere."""
    artefact = TinyArtefact("llama")
    tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
    return tuple(
        next(i for i in range(artefact.config.vocab) if tokenizer.token_bytes(i) == bytes([b])) for b in text.encode()
    )


def test_the_runner_spells_what_the_engine_served(engine: Engine, runner: ExactRunner) -> None:
    rng = random.Random(5)
    reasons = set()
    for i in range(12):
        stop = tuple(rng.sample(["a", "e", "th", "\ufffd", " "], i % 3))
        request = Request(
            **{name: getattr(some_request(rng, tokens=24), name) for name in ("prompt", "max_tokens", "seed")},
            temperature=1.5,
            stop=stop,
            ignore_eos=i % 2 == 0,
        )
        prepared = engine.prepare(request)
        (done,) = run(engine, [request])
        assert runner.assemble(request.prompt, None, {}) == prepared.prompt_tokens
        found = runner.spell(done.output_tokens, prepared.max_tokens, stop, prepared.ignore_eos)
        assert found == (done.text, done.reason, len(done.output_tokens))
        assert not any(text in done.text for text in stop)
        reasons.add(done.reason)
    assert {Finish.STOP, Finish.LENGTH} <= reasons


def test_messages_are_assembled_with_the_artefacts_template(engine: Engine, runner: ExactRunner) -> None:
    turns = (("system", "be brief"), ("user", "the <|im_end|> dog"))
    messages = tuple(Message(role=role, content=text) for role, text in turns)
    assert runner.assemble(None, turns, {}) == engine.prepare(Request(messages=messages)).prompt_tokens
    with pytest.raises(RequestError) as err:
        runner.assemble(None, (("user", ""),), {})
    assert err.value.code == "request.prompt_empty"


def test_an_output_cut_short_is_not_over(runner: ExactRunner) -> None:
    tokens = tokens_of("the dog.STOP")
    assert runner.spell(tokens, 99, ("STOP",), False) == ("the dog.", "stop", 12)
    assert runner.spell(tokens[:-1], 99, ("STOP",), False) == ("the dog.STO", None, 11)
    assert runner.spell(tokens[:-1], 11, ("STOP",), False) == ("the dog.STO", "length", 11)
    assert runner.spell(tokens, 12, ("STOP",), False) == ("the dog.", "stop", 12)
    assert runner.spell((*tokens[:3], 2, *tokens[3:]), 99, (), False) == ("the", "eos", 4)
    assert runner.spell((*tokens[:3], 2, *tokens[3:]), 99, (), True)[1] is None
    with pytest.raises(FormatError) as err:
        runner.spell((1 << 40,), 1, (), False)
    assert err.value.code == "replay.tokens"


def test_a_stop_string_that_only_the_end_completes() -> None:
    """An unfinished UTF-8 sequence becomes U+FFFD at the end; no text holds a stop string, however it came about."""
    artefact = TinyArtefact("llama")
    tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
    output = Output(tokenizer, stop=("\ufffd",), stop_tokens=(), max_tokens=3)
    text = "".join(map(output.push, tokens_of("ab\u00e9")[:3]))
    assert (text, output.end) == ("ab", Finish.STOP)


def test_an_engine_that_fails_says_so_once_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner must end the process: an engine that refuses everything is not serving."""
    told = threading.Event()
    engine = Engine(TinyArtefact("llama"), threads=1, on_failure=told.set)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("countermark_appliance.engine.scheduler.Scheduler.plan", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert not engine.failed
    (done,) = run(engine, [Request(prompt="dog", max_tokens=3)])
    assert done.reason is Finish.ERROR
    assert told.wait(10)
    assert engine.failed
    engine.close()


def test_an_engine_that_is_closed_has_not_failed() -> None:
    told = threading.Event()
    engine = Engine(TinyArtefact("llama"), threads=1, on_failure=told.set)
    engine.close()
    assert (engine.failed, told.is_set()) == (False, False)


def test_the_runner_says_what_its_weights_say(engine: Engine, runner: ExactRunner) -> None:
    info = engine.info
    assert runner.artefact == {
        "model": info.model,
        "quantisation": info.quantisation,
        "manifest_digest": info.manifest_digest,
        "tokenizer_digest": info.tokenizer_digest,
        "chat_template_digest": info.template_digest,
        "stop_tokens": engine.prepare(Request(prompt="dog")).stop_tokens,
    }
