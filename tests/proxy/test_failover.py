"""Several nodes: what is tried elsewhere, what never is, and what the answer says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from net_appliance import Appliance, Wrapped, running
from net_helpers import Relay
from proxy_helpers import QUICK, Proxy, text_of, wait_until

import one_answer
from countermark import session
from countermark.errors import Unavailable
from countermark.formats.records import Kind
from countermark.proxy.settings import NodeLimits
from countermark.session import Stream

BODY = {"messages": [{"role": "user", "content": "three words"}], "max_tokens": 3}


@pytest.fixture
def second(appliance: Appliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Appliance]:
    """Another node that the first one's policy accepts."""
    monkeypatch.setattr(one_answer, "make", lambda **_: appliance.machine.state)
    with running(tmp_path) as one:
        yield one


def intents(appliance: Appliance) -> int:
    return appliance.kinds().count(Kind.INTENT)


def test_a_node_that_is_not_there(appliance: Appliance) -> None:
    with Proxy(("127.0.0.1:9", appliance.address), appliance.connect) as proxy:
        assert text_of(proxy.stream()) == "one two three "
        assert [node["state"] for node in proxy.status()["nodes"]] == ["unavailable", "verified"]


def test_a_node_that_is_refused_is_passed_by_and_the_next_is_appraised_by_the_same_policy(
    appliance: Appliance, tmp_path: Path
) -> None:
    with running(tmp_path) as stranger:  # another vendor's root, which this policy does not accept
        with Proxy((stranger.address, appliance.address), appliance.connect) as proxy:
            assert proxy.chat()[0] == 200
            refused, verified = proxy.status()["nodes"]
            assert (refused["state"], refused["refusal"]["code"]) == ("refused", "quote.root")
            assert (verified["state"], verified["answers"]) == ("verified", 1)
        assert intents(stranger) == 0


def test_no_node_at_all(appliance: Appliance) -> None:
    with Proxy(("127.0.0.1:9",), appliance.connect) as proxy:
        status, headers, data = proxy.request("POST", "/v1/chat/completions", BODY)
        assert (status, headers["x-should-retry"]) == (503, "true")
        assert b"channel.connect" in data


def test_a_busy_node_passes_the_request_on(
    appliance: Appliance, second: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(_: bytes = b"") -> Any:
        raise Unavailable("engine: all places are taken", code="engine.busy", retry_after_s=0.1)

    with Proxy.of(appliance, second, wait_s=0.5) as proxy:
        before = intents(appliance)
        monkeypatch.setattr(appliance.engine, "reserve", busy)
        assert proxy.chat()[0] == 200
        assert (intents(appliance), intents(second)) == (before, 1)
        monkeypatch.setattr(second.engine, "reserve", busy)
        began = time.monotonic()
        status, headers, data = proxy.request("POST", "/v1/chat/completions", BODY)
        assert (status, headers["x-should-retry"], headers["retry-after"]) == (429, "true", "1")
        assert b"engine.busy" in data
        assert 0.4 < time.monotonic() - began < 5
        monkeypatch.undo()


def test_a_place_that_comes_free_is_waited_for(appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, refused = appliance.engine.reserve, []

    def busy_at_first(client: bytes = b"") -> Any:
        if len(refused) < 3:
            refused.append(1)
            raise Unavailable("engine: all places are taken", code="engine.busy", retry_after_s=0.1)
        return genuine(client)

    with Proxy.of(appliance) as proxy:
        monkeypatch.setattr(appliance.engine, "reserve", busy_at_first)
        assert proxy.chat()[0] == 200
        assert len(refused) == 3


@pytest.fixture
def losing(appliance: Appliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Appliance, Relay]]:
    """A node that records its INTENT and is then cut off, before it can say so."""
    cut: list[Callable[[], None]] = []

    def recording(recorder: Any) -> Any:
        def commit(**values: Any) -> Any:
            committed = recorder.commit_intent(**values)
            cut[0]()
            return committed

        return Wrapped(recorder, commit_intent=commit)

    monkeypatch.setattr(one_answer, "make", lambda **_: appliance.machine.state)
    directory = tmp_path / "losing"
    directory.mkdir()
    with running(directory, recorder=recording) as one:
        host, _, port = one.address.rpartition(":")
        relay = Relay((host, int(port)))
        cut.append(relay.cut)
        yield one, relay
        relay.close()


def test_what_may_have_been_recorded_is_not_sent_again(losing: tuple[Appliance, Relay], appliance: Appliance) -> None:
    node, relay = losing
    before = intents(appliance)
    with Proxy((relay.address, appliance.address), appliance.connect) as proxy:
        status, headers, data = proxy.request("POST", "/v1/chat/completions", BODY)
        assert (status, headers["x-should-retry"]) == (503, "false")
        assert b"may have begun" in data
        assert (intents(node), intents(appliance)) == (1, before)


def test_unless_the_user_said_so_and_then_the_answer_says_it(
    losing: tuple[Appliance, Relay], appliance: Appliance
) -> None:
    node, relay = losing
    before = intents(appliance)
    with Proxy((relay.address, appliance.address), appliance.connect, resend=True) as proxy:
        status, headers, _ = proxy.request("POST", "/v1/chat/completions", BODY)
        assert status == 200
        address, code = headers["x-countermark-resent"].split()
        assert address == relay.address
        assert code in ("channel.lost", "channel.closed")
        assert (intents(node), intents(appliance)) == (1, before + 1)


def test_re_attested_on_a_timer(appliance: Appliance) -> None:
    limits = NodeLimits(reattest_s=2.0, retry_s=QUICK.retry_s, refused_s=QUICK.refused_s)
    with Proxy.of(appliance, node_limits=limits) as proxy:
        assert proxy.chat()[0] == 200
        wait_until(lambda: proxy.status()["nodes"][0]["appraisals"] >= 3, timeout_s=15)
        assert proxy.chat()[0] == 200
        assert proxy.status()["nodes"][0]["key_changes"] == 0
        wait_until(lambda: proxy.status()["nodes"][0]["connections"] <= 2)


def test_no_prompt_under_a_verdict_that_is_too_old(appliance: Appliance) -> None:
    """The node cannot be appraised again, so that its open connection is of no use any more."""
    allowed = [True]

    def connected(address: str) -> Any:
        if not allowed[0]:
            raise Unavailable(f"{address}: no answer", code="channel.timeout")
        return appliance.connect(address)

    with Proxy((appliance.address,), connected, node_limits=NodeLimits(reattest_s=1.5, retry_s=(0.1, 0.2))) as proxy:
        assert proxy.chat()[0] == 200
        allowed[0] = False
        wait_until(lambda: not proxy.app.upstream.nodes[0].is_ready)
        before = intents(appliance)
        status, found = proxy.chat()
        assert (status, found["error"]["code"]) == (503, "channel.timeout")
        assert intents(appliance) == before
        allowed[0] = True
        wait_until(lambda: proxy.app.upstream.nodes[0].is_ready)
        assert proxy.chat()[0] == 200


def test_a_stream_refused_below_the_protocol_was_not_recorded(
    appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP/2's own refusal (REFUSED_STREAM) says that nothing was processed: the request may be sent again."""

    class Refused(grpc.RpcError, grpc.Call):
        code = staticmethod(lambda: grpc.StatusCode.UNAVAILABLE)
        details = staticmethod(lambda: "Stream removed (Received RST_STREAM with error code 7)")
        trailing_metadata = initial_metadata = staticmethod(lambda: ())
        is_active = cancel = staticmethod(lambda: False)
        time_remaining = add_callback = staticmethod(lambda *_: None)

    genuine, refused = Stream._read, []

    def once(self: Stream) -> Any:
        if not refused:
            self.cancel()
            refused.append(1)
            raise session._translated(Refused(), self._channel)
        return genuine(self)

    with Proxy.of(appliance) as proxy:
        monkeypatch.setattr(Stream, "_read", once)
        status, headers, data = proxy.request("POST", "/v1/chat/completions", BODY)
        assert (status, refused) == (200, [1])
        assert b'"verified":true' in data
        assert "x-countermark-resent" not in headers
