"""The connection rules of the service, and every way a request can end without an answer."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from net_appliance import Appliance, Wrapped, running
from net_helpers import Relay, wait_until

from countermark.channel import _OPTIONS as CHANNEL_OPTIONS
from countermark.channel import Channel
from countermark.errors import ChannelError, RequestError, Unavailable
from countermark.formats.records import Kind, parse_leaf
from countermark.session import connect
from countermark.tlog.merkle import leaf_hash, verify_consistency, verify_inclusion
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.engine.places import Places
from countermark_appliance.frontend import Limits
from countermark_appliance.generation import Generation
from countermark_appliance.service import ServiceLimits
from one_answer import NOW


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        yield appliance


@contextmanager
def open_channel(appliance: Appliance) -> Iterator[Channel]:
    channel = Channel.open(appliance.address)
    try:
        yield channel
    finally:
        channel.close()


def call(channel: grpc.Channel, method: str, request: Message | bytes) -> bytes:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    answer: bytes = channel.unary_unary(method, None, None)(data, timeout=10)
    return answer


def refusal(run: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        run()
    err: Any = caught.value
    return err.code(), dict(err.trailing_metadata()).get(codec.CODE_KEY, "")


def generate(channel: grpc.Channel, request: bytes | None = None, timeout: float = 10) -> Any:
    data = codec.encode_generate_request(prompt="some prompt") if request is None else request
    return channel.unary_stream(codec.GENERATE, None, None)(data, timeout=timeout)


def attest(channel: grpc.Channel, nonce: bytes | None = None) -> bytes:
    return call(channel, codec.ATTEST, pb.AttestRequest(nonce=os.urandom(32) if nonce is None else nonce))


def test_generate_needs_attest_and_attest_succeeds_once(appliance: Appliance) -> None:
    with open_channel(appliance) as channel:
        before = appliance.kinds()
        needed = (grpc.StatusCode.FAILED_PRECONDITION, "channel.not_attested")
        assert refusal(lambda: list(generate(channel.grpc_channel))) == needed
        assert refusal(lambda: attest(channel.grpc_channel, bytes(31)))[1] == "request.nonce"
        assert refusal(lambda: attest(channel.grpc_channel, b""))[1] == "request.nonce"
        attest(channel.grpc_channel)
        again = (grpc.StatusCode.FAILED_PRECONDITION, "channel.attested")
        assert refusal(lambda: attest(channel.grpc_channel)) == again
        assert appliance.kinds() == before
        assert len(list(generate(channel.grpc_channel))) >= 3  # Accepted, tokens, Finished


def test_an_attest_on_one_connection_does_not_serve_another(appliance: Appliance) -> None:
    with open_channel(appliance) as first, open_channel(appliance) as second:
        attest(first.grpc_channel)
        assert refusal(lambda: list(generate(second.grpc_channel)))[1] == "channel.not_attested"


def test_local_processes_that_did_not_come_through_tls_are_refused(appliance: Appliance) -> None:
    """Every method, health and reflection included, from a port the front end did not register."""
    refused = (grpc.StatusCode.PERMISSION_DENIED, "channel.unregistered")
    with grpc.insecure_channel(f"127.0.0.1:{appliance.service.port}") as channel:
        assert refusal(lambda: attest(channel)) == refused
        assert refusal(lambda: list(generate(channel))) == refused
        assert refusal(lambda: call(channel, codec.GET_EVIDENCE, b"")) == refused
        assert refusal(lambda: call(channel, "/countermark.v1.Log/GetCheckpoint", b"")) == refused
        health = health_pb2_grpc.HealthStub(channel)
        assert refusal(lambda: health.Check(health_pb2.HealthCheckRequest())) == refused
        assert refusal(lambda: list(health.Watch(health_pb2.HealthCheckRequest()))) == refused
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        assert refusal(lambda: list(reflection.ServerReflectionInfo(iter([listing])))) == refused


def test_health_reflection_and_passport(appliance: Appliance) -> None:
    with open_channel(appliance) as channel:
        health = health_pb2_grpc.HealthStub(channel.grpc_channel)
        for name in ("", codec.SERVICE, codec.LOG_SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        assert refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="x")))[0] is grpc.StatusCode.NOT_FOUND
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel.grpc_channel)
        (answer,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in answer.list_services_response.service}
        assert {codec.SERVICE, codec.LOG_SERVICE, "grpc.health.v1.Health"} <= names
        passport = pb.GetEvidenceResponse.FromString(call(channel.grpc_channel, codec.GET_EVIDENCE, b""))
        assert passport.evidence == b"passport evidence"
        assert refusal(lambda: call(channel.grpc_channel, f"/{codec.SERVICE}/Nothing", b""))[0] is (
            grpc.StatusCode.UNIMPLEMENTED
        )


def test_log_reads_verify(appliance: Appliance) -> None:
    with appliance.connect() as session:
        session.generate("for the log", max_tokens=1).result()
    size, root = appliance.machine.recorder.head()
    with open_channel(appliance) as channel:

        def read(method: str, request: Message, kind: type[Any]) -> Any:
            return kind.FromString(call(channel.grpc_channel, f"/{codec.LOG_SERVICE}/{method}", request))

        checkpoint = read("GetCheckpoint", pb.GetCheckpointRequest(), pb.GetCheckpointResponse)
        assert checkpoint.checkpoint == appliance.machine.recorder.checkpoint()
        leaves = read("GetLeaves", pb.GetLeavesRequest(start=0, count=size), pb.GetLeavesResponse).leaves
        assert parse_leaf(leaves[0]).kind is Kind.EPOCH
        request = pb.GetInclusionProofRequest(leaf_index=size - 1, tree_size=size)
        proof = read("GetInclusionProof", request, pb.GetInclusionProofResponse).proof
        verify_inclusion(size - 1, size, leaf_hash(leaves[-1]), tuple(proof), root)
        growth = pb.GetConsistencyProofRequest(old_size=1, new_size=size)
        proof = read("GetConsistencyProof", growth, pb.GetConsistencyProofResponse).proof
        verify_consistency(1, size, leaf_hash(leaves[0]), root, tuple(proof))
        for method, bad, code in (
            ("GetLeaves", pb.GetLeavesRequest(count=1025), "request.count"),
            ("GetLeaves", pb.GetLeavesRequest(start=10**9, count=1), "log.range"),
            ("GetInclusionProof", pb.GetInclusionProofRequest(leaf_index=5, tree_size=10**12), "log.range"),
            ("GetConsistencyProof", pb.GetConsistencyProofRequest(old_size=9, new_size=3), "log.range"),
        ):
            assert refusal(lambda method=method, bad=bad: read(method, bad, pb.GetLeavesResponse))[1] == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff", "request.malformed"),
        (b"", "request.nonce"),
        (codec.encode_generate_request(prompt="x") + b"\xa2\x06\x01y", "request.unknown_field"),
        (codec.encode_generate_request(prompt="x") + b"\x3a\x04\xa2\x06\x01y", "request.unknown_field"),
        (pb.GenerateRequest(nonce=bytes(32)).SerializeToString(), "request.input"),
        (pb.GenerateRequest(nonce=bytes(33), prompt="x").SerializeToString(), "request.nonce"),
        (pb.GenerateRequest(nonce=bytes(32), prompt="x", stop=["y"] * 65).SerializeToString(), "request.stop"),
    ],
    ids=("no message", "empty", "field 100", "field 100 in the chat", "no input", "long nonce", "many stops"),
)
def test_hostile_bytes_are_refused_before_the_log(appliance: Appliance, data: bytes, code: str) -> None:
    before = appliance.kinds()
    with open_channel(appliance) as channel:
        attest(channel.grpc_channel)
        expected = (grpc.StatusCode.INVALID_ARGUMENT, code)
        assert refusal(lambda: list(generate(channel.grpc_channel, data))) == expected
    assert appliance.kinds() == before


def test_oversize_requests_are_refused_and_the_connection_lives(appliance: Appliance) -> None:
    with open_channel(appliance) as channel:
        attest(channel.grpc_channel)
        big = pb.GenerateRequest(nonce=bytes(32), prompt="x" * (4 * 1024 * 1024)).SerializeToString()
        status, _ = refusal(lambda: list(generate(channel.grpc_channel, big)))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(list(generate(channel.grpc_channel))) >= 3


@contextmanager
def holding(appliance: Appliance) -> Iterator[None]:
    appliance.engine.hold.set()
    try:
        yield
    finally:
        appliance.engine.hold.clear()


def wait_for_abort(appliance: Appliance, before: list[Kind]) -> None:
    wait_until(lambda: appliance.kinds() == [*before, Kind.INTENT, Kind.ABORT])


def test_cancel_mid_stream_is_an_abort(appliance: Appliance) -> None:
    before = appliance.kinds()
    with appliance.connect() as session, holding(appliance):
        stream = session.generate("to be cancelled", max_tokens=50)
        stream.cancel()
        with pytest.raises(Unavailable):
            stream.result()
        wait_for_abort(appliance, before)
        assert appliance.engine.ended[-1] == "cancelled"
        appliance.engine.hold.clear()
        assert len(session.generate("goes on", max_tokens=1).result().tokens) == 1


def test_who_leaves_before_the_record_leaves_none(appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the prompt was being read; a storm of such requests writes nothing."""
    before, go_on, prepare = appliance.kinds(), threading.Event(), appliance.engine.prepare
    monkeypatch.setattr(appliance.engine, "prepare", lambda request: (go_on.wait(20), prepare(request))[1])
    with open_channel(appliance) as channel:
        attest(channel.grpc_channel)
        call = generate(channel.grpc_channel)
        wait_until(lambda: appliance.engine.places._taken == 1)
        call.cancel()
        time.sleep(0.3)  # until the server has heard
        go_on.set()
        wait_until(lambda: appliance.engine.places._taken == 0)
    assert appliance.kinds() == before


def test_disconnect_mid_stream_is_an_abort(appliance: Appliance) -> None:
    before = appliance.kinds()
    with holding(appliance):
        session = appliance.connect()
        session.generate("to be left", max_tokens=50)
        session.close()
        wait_for_abort(appliance, before)


def test_deadline_is_an_abort(appliance: Appliance) -> None:
    before = appliance.kinds()
    with appliance.connect() as session, holding(appliance):
        stream = session.generate("too slow", max_tokens=50, timeout_s=0.3)
        with pytest.raises(Unavailable):
            stream.result()
        wait_for_abort(appliance, before)


def test_a_client_that_never_reads_its_answer_costs_no_one_else(appliance: Appliance) -> None:
    before = len(appliance.kinds())
    with open_channel(appliance) as hog, appliance.connect() as other:
        attest(hog.grpc_channel)
        request = codec.encode_generate_request(prompt="long", max_tokens=30_000)
        stuck = [generate(hog.grpc_channel, request, timeout=60) for _ in range(4)]
        # All four end on the server although nobody reads: the record does not wait for the client.
        wait_until(lambda: appliance.kinds()[before:].count(Kind.OUTCOME) == 4, 20)
        started = time.perf_counter()
        assert len(other.generate("me too", max_tokens=3).result().tokens) == 3
        assert time.perf_counter() - started < 2
        assert sum(len(pb.GenerateResponse.FromString(m).tokens.ids) for m in stuck[0]) == 30_000
        for one in stuck[1:]:
            one.cancel()


def test_stray_exceptions_say_nothing(appliance: Appliance, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), appliance.connect() as session:
        with pytest.raises(Unavailable) as caught:
            session.generate("stumble")
        assert caught.value.code == "server.internal"
        assert "SECRET" not in str(caught.value)
        session.generate("a prompt nobody logs", max_tokens=1).result()
    assert "ValueError" in caplog.text
    assert "SECRET" not in caplog.text
    assert "stumble" not in caplog.text
    assert "a prompt nobody logs" not in caplog.text


def test_a_stray_exception_anywhere_before_the_record_is_an_answer(
    appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    with appliance.connect() as session:
        for at in ("engine_request", "Request", "Message"):
            with monkeypatch.context() as patch:
                patch.setattr(f"countermark_appliance.generation.{at}", broken)
                with pytest.raises(Unavailable) as caught:
                    session.generate(messages=[("user", "anything")], timeout_s=5)
                assert caught.value.code == "server.internal"
        assert appliance.engine.places._taken == 0


def test_attest_is_rate_limited_and_says_when_to_come_back(tmp_path: Path) -> None:
    with running(tmp_path, limits=ServiceLimits(attests_per_s=0.01, attest_burst=1)) as appliance:
        with open_channel(appliance) as channel:
            attest(channel.grpc_channel)
        with pytest.raises(Unavailable) as caught:
            appliance.connect()
        assert caught.value.code == "attest.rate"
        with open_channel(appliance) as channel:
            refused = refusal(lambda: attest(channel.grpc_channel))
            assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "attest.rate")
            # a refused Attest does not use the connection up
            assert refusal(lambda: attest(channel.grpc_channel))[1] == "attest.rate"


def test_what_strangers_can_make_us_hold_is_bounded() -> None:
    """Unfinished requests of every stream of every connection: measured, grpcio holds each to its last byte."""
    assert Limits().connections * ServiceLimits().streams * codec.MAX_REQUEST_BYTES <= 8 << 30


def test_more_requests_than_streams_wait_and_are_served(tmp_path: Path) -> None:
    with running(tmp_path, limits=ServiceLimits(streams=2)) as appliance, appliance.connect() as session:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda n: session.generate("wait for it", max_tokens=n).result(), range(1, 7)))
        assert [len(answer.tokens) for answer in answers] == [1, 2, 3, 4, 5, 6]


def test_reading_the_log_holds_up_no_request(tmp_path: Path) -> None:
    """Anybody may read it, without Attest and as often as they like; here every read takes for ever."""
    go_on = threading.Event()

    def slow(recorder: Any) -> Any:
        return Wrapped(recorder, consistency=lambda *_: go_on.wait(60) and ())

    with running(tmp_path, recorder=slow) as appliance, ExitStack() as stack, ThreadPoolExecutor(48) as pool:
        channels = [stack.enter_context(open_channel(appliance)) for _ in range(6)]
        method, request = f"/{codec.LOG_SERVICE}/GetConsistencyProof", pb.GetConsistencyProofRequest()
        reads = [pool.submit(call, c.grpc_channel, method, request) for c in channels for _ in range(8)]
        try:
            with appliance.connect() as session:
                time.sleep(0.5)
                assert len(session.generate("me first", max_tokens=3, timeout_s=5).result().tokens) == 3
            assert not any(read.done() for read in reads)
        finally:
            go_on.set()


def test_too_many_requests_are_refused_before_the_log(tmp_path: Path) -> None:
    with running(tmp_path, limits=ServiceLimits(generations=2)) as appliance, appliance.connect() as session:
        with holding(appliance):
            streams = [session.generate("x", max_tokens=2) for _ in range(2)]
            with pytest.raises(Unavailable) as caught:
                session.generate("one more")
            assert caught.value.code == "service.busy"
        for stream in streams:
            stream.result()
        assert appliance.kinds().count(Kind.INTENT) == 2
        assert len(session.generate("now", max_tokens=1).result().tokens) == 1


def test_a_busy_engine_refuses_before_the_log_and_says_when_to_come_back(tmp_path: Path) -> None:
    """The place is taken first, whatever then goes wrong it is given back, and one connection has at most half."""
    with running(tmp_path) as appliance, appliance.connect() as one, appliance.connect() as other:
        for wait_s, advised_s in ((2.5, 2.5), (0.0, 0.1), (1e9, 30.0)):
            appliance.engine.places = Places(4, lambda wait_s=wait_s: wait_s)
            before = appliance.kinds()
            with holding(appliance):
                streams = [one.generate("x", max_tokens=1) for _ in range(2)]
                with pytest.raises(Unavailable) as caught:
                    one.generate("a third of one connection")
                assert (caught.value.code, caught.value.retry_after_s) == ("engine.busy", advised_s)
                streams += [other.generate("x", max_tokens=1) for _ in range(2)]
                with pytest.raises(Unavailable) as caught:
                    other.generate("a fifth")
                assert caught.value.code == "engine.busy"
                assert f"retry after {advised_s:g} s" in str(caught.value)
                assert appliance.kinds() == [*before, *[Kind.INTENT] * 4]
            for stream in streams:
                stream.result()
        with open_channel(appliance) as channel:
            attest(channel.grpc_channel)
            for _ in range(4):  # refused by `prepare`
                bad = codec.encode_generate_request(prompt="x", model="another")
                assert refusal(lambda bad=bad: list(generate(channel.grpc_channel, bad)))[1] == "request.model"
        assert appliance.engine.places._taken == 0
        assert len(one.generate("now", max_tokens=1).result().tokens) == 1


def test_a_refusal_speaks_grpcs_own_words(tmp_path: Path) -> None:
    with running(tmp_path) as appliance, open_channel(appliance) as channel:
        attest(channel.grpc_channel)
        appliance.engine.places = Places(0, lambda: 1.25)
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(channel.grpc_channel))
        err: Any = caught.value
        assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(err.trailing_metadata())["grpc-retry-pushback-ms"] == "1250"


def test_every_connection_is_a_scope_of_its_own(appliance: Appliance) -> None:
    with appliance.connect() as one, appliance.connect() as other:
        for session in (one, other, one):
            session.generate("the same", max_tokens=1).result()
    scopes = [prepared.request.scope for prepared in appliance.engine.submitted[-3:]]
    assert scopes[0] == scopes[2] != scopes[1]
    assert all(len(scope) == 32 for scope in scopes)


def test_log_probabilities_travel_beside_the_tokens_and_are_recorded_as_asked_for(appliance: Appliance) -> None:
    with appliance.connect() as session:
        stream = session.generate("x", max_tokens=5, logprobs=2)
        answer = stream.result()
        assert [one.token for one in stream.logprobs] == list(answer.tokens)
        assert [one.logprob for one in stream.logprobs] == [-0.25 * token for token in answer.tokens]
        assert {one.top for one in stream.logprobs} == {((1000, 0.0), (1001, -0.5))}
        assert answer.receipt.accepted.intent.logprobs
        for none in (None, 0):
            stream = session.generate("x", max_tokens=5, logprobs=none)
            assert not stream.result().receipt.accepted.intent.logprobs
            assert stream.logprobs == ()
        for bad, code in ((21, "request.logprobs"), (-1, "request.logprobs"), (2**32, "request.logprobs")):
            with pytest.raises(RequestError) as caught:
                session.generate("x", logprobs=bad)
            assert caught.value.code == code


def test_what_waited_for_a_slow_reader_fits_messages(appliance: Appliance) -> None:
    with open_channel(appliance) as channel:
        attest(channel.grpc_channel)
        request = codec.encode_generate_request(prompt="long", max_tokens=30_000, logprobs=20)
        before = appliance.kinds().count(Kind.OUTCOME)
        stream = generate(channel.grpc_channel, request, timeout=60)
        wait_until(lambda: appliance.kinds().count(Kind.OUTCOME) == before + 1, 30)
        found = [pb.GenerateResponse.FromString(message).tokens for message in stream]
        assert sum(len(tokens.ids) for tokens in found) == 30_000
        assert all(len(tokens.logprobs) == len(tokens.ids) <= 8192 for tokens in found)


def test_an_answer_that_nobody_takes_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection answers pings and takes every byte it is sent; only this stream's window stays shut: it must not
    grow with the round trips that grpcio measures, which a busy machine makes long, or it takes megabytes."""
    monkeypatch.setattr("countermark.channel._OPTIONS", (*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0)))
    made: list[weakref.ref[Generation]] = []
    run = Generation.run
    monkeypatch.setattr(Generation, "run", lambda self: (made.append(weakref.ref(self)), run(self))[1])
    with running(tmp_path, limits=ServiceLimits(stall_s=0.5)) as appliance, open_channel(appliance) as hog:
        attest(hog.grpc_channel)
        request = codec.encode_generate_request(prompt="long", max_tokens=50_000, logprobs=20)
        streams = [generate(hog.grpc_channel, request, timeout=60) for _ in range(2)]
        wait_until(lambda: len(appliance.kinds()) == 5, 30)  # each INTENT and what ended it

        wait_until(lambda: gc.collect() >= 0 and not any(one() for one in made), 10)
        appliance.engine.delay_s = 1e-9
        request = codec.encode_generate_request(prompt="longer", max_tokens=500_000, logprobs=20)
        streams.append(generate(hog.grpc_channel, request, timeout=60))
        wait_until(lambda: len(appliance.kinds()) == 7, 30)
        assert appliance.kinds()[-1] is Kind.ABORT  # one that still computes is cancelled
        for stream in streams:  # whoever reads again is told
            assert refusal(lambda: list(stream)) == (grpc.StatusCode.CANCELLED, "stream.stalled")  # noqa: B023
        assert health(hog.grpc_channel)  # the connection lives


def health(channel: grpc.Channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_an_engine_that_refuses_after_the_intent_gets_an_abort(appliance: Appliance) -> None:
    def refuse() -> None:
        raise Unavailable("engine: all places are taken", code="engine.busy")

    before = appliance.kinds()
    appliance.engine.before_submit = refuse
    with appliance.connect() as session, pytest.raises(Unavailable) as caught:
        session.generate("refused")
    appliance.engine.before_submit = lambda: None
    assert caught.value.code == "engine.busy"
    wait_for_abort(appliance, before)


def test_a_full_disk_refuses_new_requests_and_keeps_what_is_there(tmp_path: Path) -> None:
    full: list[bool] = []

    def wrap(recorder: Any) -> Any:
        def commit_intent(**values: Any) -> Any:
            if full:
                raise Unavailable("log: no space", code="log.full")
            return recorder.commit_intent(**values)

        return Wrapped(recorder, commit_intent=commit_intent)

    with running(tmp_path, recorder=wrap) as appliance, appliance.connect() as session:
        kept = session.generate("kept", max_tokens=1).result()
        full.append(True)
        with pytest.raises(Unavailable) as caught:
            session.generate("refused")
        assert caught.value.code == "log.full"
        assert appliance.engine.submitted[-1].request.prompt == "kept"
        full.clear()
        assert session.generate("again", max_tokens=1).result().tokens == kept.tokens


def test_stopping_ends_requests_with_shutdown(tmp_path: Path) -> None:
    with running(tmp_path) as appliance:
        session = appliance.connect()
        appliance.engine.hold.set()
        stream = session.generate("interrupted", max_tokens=50)
        appliance.engine.closing.set()
        appliance.service.stop(grace_s=2)
        with pytest.raises((Unavailable, ChannelError)) as caught:
            stream.result()
        assert caught.value.code == "generation.shutdown"
        assert appliance.kinds()[-2:] == [Kind.INTENT, Kind.ABORT]
        session.close()


def test_stop_ends_requests_of_an_engine_that_still_runs(tmp_path: Path) -> None:
    with running(tmp_path) as appliance:
        session = appliance.connect()
        appliance.engine.hold.set()
        session.generate("interrupted", max_tokens=50)
        appliance.service.stop(grace_s=0.1)
        assert appliance.kinds()[-2:] == [Kind.INTENT, Kind.ABORT]
        session.close()


def test_killed_connection_sends_no_prompt_byte_elsewhere(appliance: Appliance) -> None:
    relay = Relay(("127.0.0.1", appliance.front_end.port))
    session = connect(relay.address, appliance.machine.policy, now=NOW)
    session.generate("first", max_tokens=1).result()
    before = appliance.kinds()
    with holding(appliance):
        stream = session.generate("second", max_tokens=50)
        relay.cut()
        with pytest.raises(Unavailable) as caught:
            stream.result()
        assert caught.value.code == "channel.lost"
        wait_for_abort(appliance, before)
        for _ in range(3):
            with pytest.raises(Unavailable):
                session.generate("a prompt that must not travel", timeout_s=1)
        assert session.is_over
        time.sleep(0.2)
        assert relay.connections == 1
        assert len(appliance.kinds()) == len(before) + 2
    session.close()
    relay.close()
