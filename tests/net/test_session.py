"""The whole conversation: real TLS, gRPC, simulated evidence, records and receipts; only the model is scripted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_appliance import WORDS, Appliance, running

from countermark import channel
from countermark.appraise import TimeBasis
from countermark.bundle import read_bundle
from countermark.errors import RequestError, UsageError
from countermark.formats.records import Kind
from countermark.session import Stream
from countermark.verify import verify_bundle
from countermark_appliance import service


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        yield appliance


def test_a_whole_conversation(appliance: Appliance, tmp_path: Path) -> None:
    with appliance.connect() as session:
        assert session.verdict.simulated
        assert session.verdict.time_basis is TimeBasis.ASSUMED  # `now` was given
        assert session.verdict.log_origin == appliance.machine.recorder.epoch.origin
        stream = session.generate("count for me", max_tokens=5, seed=7, temperature=0.5)
        pieces = list(stream)
        assert "".join(pieces) == "".join(WORDS[:5])
        answer = stream.result()
        assert (answer.text, len(answer.tokens)) == ("".join(WORDS[:5]), 5)
        assert answer.tokens == stream.tokens
        assert answer.receipt.intent.sampling.seed == 7
        assert answer.receipt.intent.quote_digest == session.verdict.quote_digest
        assert [check.step for check in answer.receipt.checks][-7:] == [str(step) for step in range(12, 19)]
        path = answer.save(tmp_path / "answer.cmk", manifest=appliance.machine.manifest)
    bundle = read_bundle(path)
    assert bundle.answer.text == answer.text
    assert verify_bundle(bundle, appliance.machine.policy, int(session.verdict.time)).receipt is not None
    assert session.is_over


def test_several_answers_in_one_session_and_messages(appliance: Appliance) -> None:
    with appliance.connect() as session:
        for size in (1, 3):
            answer = session.generate(messages=[("user", "hello there")], max_tokens=size).result()
            assert len(answer.tokens) == size
            assert answer.receipt.intent.sampling.seed_origin == "server"


def test_streams_side_by_side(appliance: Appliance) -> None:
    appliance.engine.delay_s = 0.005
    with appliance.connect() as session:
        streams: list[Stream] = [session.generate("side by side", max_tokens=10 + i) for i in range(8)]
        assert [len(stream.result().tokens) for stream in reversed(streams)] == list(range(17, 9, -1))
    appliance.engine.delay_s = 0.0


def test_tokens_are_coalesced_but_the_first_is_not_held_back(appliance: Appliance) -> None:
    appliance.engine.delay_s = 0.002
    with appliance.connect() as session:
        pieces = list(session.generate("quickly now", max_tokens=100))
    appliance.engine.delay_s = 0.0
    assert pieces[0] in (WORDS[0], "".join(WORDS[:2]))
    assert len(pieces) < 40  # 100 tokens in 0.2 s or more: at most one message each 20 ms
    assert "".join(pieces) == "".join(WORDS[i % 8] for i in range(100))


def test_intent_is_in_the_log_before_anything_is_computed(appliance: Appliance) -> None:
    seen: list[Kind] = []
    appliance.engine.before_submit = lambda: seen.append(appliance.kinds()[-1])
    with appliance.connect() as session:
        session.generate("in order", max_tokens=1).result()
    appliance.engine.before_submit = lambda: None
    assert seen == [Kind.INTENT]
    assert appliance.kinds()[-2:] == [Kind.INTENT, Kind.OUTCOME]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({}, "request.input"),
        ({"prompt": "a", "messages": [("user", "b")]}, "request.input"),
        ({"prompt": "a", "seed": -1}, "request.seed"),
        ({"prompt": "a", "seed": 1 << 64}, "request.seed"),
        ({"prompt": "a", "max_tokens": "many"}, "request.max_tokens"),
        ({"prompt": "a", "stop": "x"}, "request.stop"),
        ({"prompt": "a", "stop": ["x"] * 65}, "request.stop"),
        ({"prompt": "a", "stop": ["\udcff"]}, "request.stop"),
        ({"prompt": "a", "stop": 5}, "request.stop"),
        ({"prompt": "a", "logit_bias": [1]}, "request.logit_bias"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "request.logit_bias"),
        ({"messages": [("robot", "b")]}, "request.role"),
        ({"messages": [("user", "b")] * 1025}, "request.messages"),
        ({"prompt": "a" * (4 * 1024 * 1024 + 1)}, "request.too_long"),
        ({"prompt": ""}, "request.prompt_empty"),
        ({"prompt": "a", "model": "other"}, "request.model"),
        ({"prompt": "a", "temperature": -1.0}, "request.temperature"),
    ],
)
def test_bad_requests_cost_nothing(appliance: Appliance, arguments: dict[str, object], code: str) -> None:
    before = appliance.kinds()
    with appliance.connect() as session:
        with pytest.raises(RequestError) as caught:
            session.generate(**arguments)  # type: ignore[arg-type]
        assert caught.value.code == code
        assert len(session.generate("goes on", max_tokens=1).result().tokens) == 1
    assert appliance.kinds() == [*before, Kind.INTENT, Kind.OUTCOME]


def test_a_closed_session_sends_nothing(appliance: Appliance) -> None:
    session = appliance.connect()
    session.close()
    with pytest.raises(Exception) as caught:
        session.generate("too late")
    assert getattr(caught.value, "code", None) == "session.closed"


def test_an_unwritable_bundle_is_said(appliance: Appliance, tmp_path: Path) -> None:
    with appliance.connect() as session:
        answer = session.generate("x", max_tokens=1).result()
    with pytest.raises(UsageError) as caught:
        answer.save(tmp_path / "absent" / "x.cmk")
    assert caught.value.code == "usage.file"


def test_an_idle_session_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalive pings between requests, a hundred times as fast as in earnest, are not taken for abuse."""

    def quicker(options: tuple[tuple[str, int], ...], name: str) -> tuple[tuple[str, int], ...]:
        assert name in dict(options)
        return tuple((key, value // 100 if key == name else value) for key, value in options)

    monkeypatch.setattr(channel, "_OPTIONS", quicker(channel._OPTIONS, "grpc.keepalive_time_ms"))
    name = "grpc.http2.min_ping_interval_without_data_ms"
    monkeypatch.setattr(service, "_OPTIONS", quicker(service._OPTIONS, name))
    with running(tmp_path) as appliance, appliance.connect() as session:
        time.sleep(2.5)
        assert session.generate("still there", max_tokens=1).result().tokens
