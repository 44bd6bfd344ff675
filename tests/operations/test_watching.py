"""What watchers are told of real requests, as a scrape and a collector see it; and that no secret is in any of it."""

from __future__ import annotations

import io
import json
import logging
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from net_appliance import NOW, Appliance, running
from net_helpers import wait_until

from countermark.errors import ConfigError, CountermarkError, RequestError, Unavailable
from countermark.session import connect
from countermark_appliance.operations import logs
from countermark_appliance.operations.metrics import Metrics, MetricsPort
from countermark_appliance.operations.observing import Watcher, Watchers
from countermark_appliance.operations.quotas import Key, Quotas, new_key
from countermark_appliance.operations.traces import Traces
from countermark_appliance.operations.watching import Operations, nothing_done

SECRET = "correcthorsebatterystaple"  # a prompt's
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # w3.org/TR/trace-context, section 3.2.4


class Watched:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.exporter = InMemorySpanExporter()
        self.traces = Traces(self.exporter, {"model": "tiny"})
        self.key, digest = new_key()
        quotas = Quotas([Key(name="a", sha256=digest)])
        self.operations = Operations(quotas=quotas, metrics=self.metrics, traces=self.traces)
        self.port = MetricsPort.open(self.metrics, "127.0.0.1", 0)

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port.port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in text_string_to_metric_families(self.scrape())
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        return found[0] if found else 0.0


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched()
    yield one
    one.port.close()
    one.traces.close()


@pytest.fixture
def appliance(tmp_path: Path, watched: Watched) -> Iterator[Appliance]:
    with running(tmp_path, operations=watched.operations) as appliance:
        yield appliance


def test_requests_as_a_scrape_sees_them(watched: Watched, appliance: Appliance) -> None:
    watched.metrics.describe({"model": "tiny", "profile": "exact-v1"})
    watched.metrics.gauge("countermark_log_leaves", "Records", lambda: float(appliance.machine.recorder.head()[0]))
    with connect(appliance.address, appliance.machine.policy, now=NOW, key=watched.key) as session:
        answer = session.generate("one two three", max_tokens=5).result()
        session.replay(answer.receipt)
        with pytest.raises(RequestError):
            session.generate("a", model="other")
        appliance.engine.hold.set()
        stream = session.generate("hold on", max_tokens=5)
        assert watched.value("countermark_requests_running") == 1
        stream.cancel()
        wait_until(lambda: watched.value("countermark_requests_running") == 0)
        appliance.engine.hold.clear()
    with connect(appliance.address, appliance.machine.policy, now=NOW) as session, pytest.raises(RequestError):
        session.generate("a")
    assert watched.value("countermark_requests_total", outcome="length") == 1
    assert watched.value("countermark_requests_total", outcome="replay") == 1
    assert watched.value("countermark_requests_total", outcome="aborted") == 1
    assert watched.value("countermark_requests_total", outcome="refused") == 2
    assert watched.value("countermark_errors_total", code="request.model") == 1
    assert watched.value("countermark_errors_total", code="access.key") == 1
    assert watched.value("countermark_errors_total", code="generation.cancelled") == 1
    assert watched.value("countermark_tokens_total", kind="output") >= 10
    assert watched.value("countermark_tokens_total", kind="prompt") == 3 + 3 + 2
    assert watched.value("countermark_attests_total", outcome="given") == 2
    assert watched.value("countermark_first_token_seconds_count") >= 1
    assert watched.value("countermark_log_leaves") == appliance.machine.recorder.head()[0]
    assert watched.value("countermark_node_info", model="tiny", profile="exact-v1") == 1


def test_a_span_for_each_request_below_its_caller_s(watched: Watched, appliance: Appliance) -> None:
    with connect(appliance.address, appliance.machine.policy, now=NOW, key=watched.key) as session:
        session._metadata = (*session._metadata, ("traceparent", PARENT), ("baggage", f"x={SECRET}"))
        session.generate("one two three", max_tokens=5).result()
        with pytest.raises(RequestError):
            session.generate("a", model="other")
    watched.traces.close()
    good, bad = sorted(watched.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert good.context is not None
    assert f"{good.context.trace_id:032x}" == PARENT.split("-")[1]
    assert good.parent is not None
    assert f"{good.parent.span_id:016x}" == PARENT.split("-")[2]
    assert good.attributes is not None
    assert good.attributes["gen_ai.usage.input_tokens"] == 3
    assert good.attributes["gen_ai.usage.output_tokens"] == 5
    assert good.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert [event.name for event in good.events] == ["countermark.intent"]
    assert bad.attributes is not None
    assert bad.attributes["error.type"] == "request.model"
    assert dict(good.resource.attributes) == {"service.name": "countermark", "countermark.model": "tiny"}


@pytest.mark.parametrize("form", logs.FORMS)
def test_planted_secrets_are_nowhere(
    watched: Watched, appliance: Appliance, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prompts, system messages, stop strings, values, models, keys and metadata; through answers and every kind of
    failure, our own exceptions and others'."""
    written = io.StringIO()
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    before = root.level
    logs.configure(form, verbose=True, stream=written)
    try:
        with connect(appliance.address, appliance.machine.policy, now=NOW, key=watched.key) as session:
            session._metadata = (*session._metadata, ("x-secret", SECRET), ("traceparent", SECRET))
            messages = [("system", SECRET), ("user", SECRET)]
            answer = session.generate(messages=messages, stop=[SECRET], values={"x": SECRET}, max_tokens=3).result()
            session.replay(answer.receipt)
            for options in (
                {"prompt": SECRET, "model": SECRET},
                {"prompt": "stumble"},
            ):
                with pytest.raises(CountermarkError):
                    session.generate(**options)  # type: ignore[arg-type]
            monkeypatch.setattr(appliance.engine, "prepare", lambda request: [][len(SECRET)] or request)
            with pytest.raises(Unavailable):
                session.generate(SECRET)
        with (
            pytest.raises(RequestError),
            connect(appliance.address, appliance.machine.policy, now=NOW, key=SECRET) as session,
        ):
            session.generate(SECRET)
        logging.getLogger("countermark.test").error("own words", exc_info=ValueError(SECRET))
        logging.getLogger("somebody.else").error("quotes %s", SECRET)
    finally:
        root.setLevel(before)
    watched.traces.close()
    said = written.getvalue()
    spans = "".join(span.to_json() for span in watched.exporter.get_finished_spans())
    for text in (said, spans, watched.scrape()):
        assert SECRET not in text
        assert watched.key not in text
    assert "own words" in said
    assert "ValueError" in said
    assert "(text withheld)" in said
    assert "somebody.else" in said
    if form == "json":
        lines = [json.loads(line) for line in said.splitlines()]
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_a_line_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    for form in logs.FORMS:
        written = io.StringIO()
        logs.configure(form, stream=written)
        logging.getLogger("countermark.test").warning("one\ntwo\x1b[31m three %s", "x" * 10_000)
        assert written.getvalue().count("\n") == 1
        assert "\x1b" not in written.getvalue()
        assert len(written.getvalue()) < logs.MAX_CHARACTERS + 300


def test_codes_make_no_endless_series() -> None:
    metrics = Metrics()
    for number in range(5000):
        metrics.ended(nothing_done(f"made.up_{number}"))
    metrics.ended(nothing_done("Not A Code"))
    port = MetricsPort.open(metrics, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        with pytest.raises(ConfigError) as caught:
            MetricsPort.open(metrics, "127.0.0.1", port.port)
        assert caught.value.code == "telemetry.metrics"
    finally:
        port.close()
    assert text.count("countermark_errors_total{") == 257
    assert 'code="other"' in text
    assert "Not A Code" not in text


def test_a_watcher_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told = []

    class Bad:
        def accepted(self) -> None:
            raise ValueError(SECRET)

        def ended(self, end: object) -> None:
            raise ValueError(SECRET)

    class Good:
        def accepted(self) -> None:
            told.append("accepted")

        def ended(self, end: object) -> None:
            told.append("ended")

    both = Watchers([Bad(), Good()])
    both.accepted()
    both.ended(nothing_done(""))
    assert told == ["accepted", "ended"]
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_a_watcher_that_cannot_begin_keeps_no_place(caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        def watch(self, name: str, metadata: object) -> Watcher:
            raise ValueError(SECRET)

    key, digest = new_key()
    operations = Operations(quotas=Quotas([Key(name="a", sha256=digest, concurrent=1)]), traces=Bad())
    for _ in range(3):
        operations.admit("generate", {"authorization": f"Bearer {key}"}).ended(nothing_done(""))
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text
