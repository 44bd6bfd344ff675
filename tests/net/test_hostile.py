"""Servers that are not what they should be: relayed evidence, leaked keys, streams that were tampered with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from net_appliance import Appliance, Wrapped, running, start_front_end
from net_helpers import make_identity

from countermark.appraise import Verdict
from countermark.channel import Channel
from countermark.errors import CountermarkError, FormatError, Unavailable, VerificationError
from countermark.session import Session, connect
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.connections import Connections
from countermark_appliance.frontend import FrontEnd
from countermark_appliance.generation import Generation
from one_answer import NOW


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        yield appliance


class Diversion(grpc.GenericRpcHandler):
    """A server in the middle: passes Attest to a genuine appliance over a connection of its own, keeps prompts."""

    def __init__(self, genuine: str) -> None:
        self.channel = Channel.open(genuine)
        self.prompts: list[bytes] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == codec.ATTEST:
            return grpc.unary_unary_rpc_method_handler(self._attest)
        return grpc.unary_stream_rpc_method_handler(self._generate)

    def _attest(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        answer: bytes = self.channel.grpc_channel.unary_unary(codec.ATTEST, None, None)(request, timeout=10)
        return answer

    def _generate(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.prompts.append(request)
        yield b""


@contextmanager
def diverted(appliance: Appliance, start: Callable[[Connections, int], FrontEnd]) -> Iterator[tuple[str, Diversion]]:
    handler = Diversion(appliance.address)
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    front_end = start(Connections(), port)
    try:
        yield f"127.0.0.1:{front_end.port}", handler
    finally:
        front_end.close()
        server.stop(None)
        handler.channel.close()


def code_of(run: Callable[[], object]) -> str:
    with pytest.raises(CountermarkError) as caught:
        run()
    return caught.value.code


def test_relayed_evidence_is_refused_even_with_the_leaked_tls_key(appliance: Appliance) -> None:
    """The man in the middle holds the appliance's own TLS key; only the exporter gives him away."""

    def start(connections: Connections, port: int) -> FrontEnd:
        return start_front_end(appliance.machine, connections, port)

    with diverted(appliance, start) as (address, handler):
        assert code_of(lambda: appliance.connect(address)) == "claims.exporter"
        assert handler.prompts == []


def test_relayed_evidence_under_another_key_is_refused(appliance: Appliance) -> None:
    identity = make_identity()

    def start(connections: Connections, port: int) -> FrontEnd:
        return FrontEnd.start(
            host="127.0.0.1",
            port=0,
            private_key=identity.key,
            certificate=identity.certificate,
            upstream_port=port,
            connections=connections,
        )

    with diverted(appliance, start) as (address, handler):
        # The exporter differs as well; which of the two is named first is not the point here.
        assert code_of(lambda: appliance.connect(address)) in ("claims.tls_spki", "claims.exporter")
        assert handler.prompts == []


@pytest.mark.parametrize(
    ("replaced", "code"),
    [({"nonce": bytes(32)}, "claims.nonce"), ({"exporter": bytes(32)}, "claims.exporter")],
)
def test_evidence_for_another_challenge_or_connection(
    tmp_path_factory: pytest.TempPathFactory, replaced: dict[str, bytes], code: str
) -> None:
    def wrap(attester: Any) -> Any:
        return Wrapped(attester, attest=lambda **values: attester.attest(**{**values, **replaced}))

    with running(tmp_path_factory.mktemp("bent"), attester=wrap) as bent:
        assert code_of(bent.connect) == code


@pytest.mark.parametrize("answer", [b"", b"\xff\xff", pb.AttestResponse(evidence=b"\x00").SerializeToString()])
def test_an_answer_that_is_not_evidence(appliance: Appliance, answer: bytes) -> None:
    class Nonsense(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Nonsense()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    front_end = start_front_end(appliance.machine, Connections(), port)
    with pytest.raises((FormatError, VerificationError)):
        connect(f"127.0.0.1:{front_end.port}", appliance.machine.policy, now=NOW)
    front_end.close()
    server.stop(None)


def test_a_server_of_something_else(appliance: Appliance) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    front_end = start_front_end(appliance.machine, Connections(), port)
    assert code_of(lambda: appliance.connect(f"127.0.0.1:{front_end.port}")) == "server.unimplemented"
    front_end.close()
    server.stop(None)


def test_a_refused_verdict_closes_the_connection(appliance: Appliance) -> None:
    late = NOW + 10**8
    assert code_of(lambda: connect(appliance.address, appliance.machine.policy, now=late)) == "policy.expired"


Change = Callable[[int, pb.GenerateResponse], list[pb.GenerateResponse]]


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Change the messages of every stream on their way out; the change sees each with its number."""
    genuine = Generation.messages

    def install(change: Change) -> None:
        async def messages(self: Generation) -> AsyncIterator[bytes]:
            number = 0
            async for data in genuine(self):
                for message in change(number, pb.GenerateResponse.FromString(data)):
                    yield message.SerializeToString()
                number += 1

        monkeypatch.setattr(Generation, "messages", messages)

    return install


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def accepted(**changes: Callable[[Any], Any]) -> Change:
    def change(number: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if number == 0:
            for name, edit in changes.items():
                value = edit(getattr(message.accepted, name))
                if isinstance(value, list):
                    field = getattr(message.accepted, name)
                    del field[:]
                    field.extend(value)
                else:
                    setattr(message.accepted, name, value)
        return [message]

    return change


@pytest.mark.parametrize(
    "change",
    [
        accepted(record=flip),
        accepted(leaf_salt=flip),
        accepted(leaf_salt=lambda _: b""),
        accepted(field_salts=flip),
        accepted(leaf_index=lambda index: index + 1),
        accepted(proof=lambda proof: [*proof, bytes(32)]),
        accepted(proof=lambda proof: [flip(one) for one in proof]),
        accepted(checkpoint=flip),
        accepted(checkpoint=lambda _: b""),
        accepted(prompt_tokens=lambda tokens: [*tokens, 5]),
        lambda number, message: [] if number == 0 else [message],
        lambda number, message: [pb.GenerateResponse()] if number == 0 else [message],
        lambda number, message: [pb.GenerateResponse(tokens=pb.Tokens(ids=[1], text="no"))] if number == 0 else [],
    ],
)
def test_no_token_without_an_accepted_that_verifies(
    appliance: Appliance, tamper: Callable[[Change], None], change: Change
) -> None:
    tamper(change)
    with appliance.connect() as session:
        with pytest.raises(CountermarkError) as caught:
            session.generate("trust nothing", max_tokens=3)  # no Stream comes back: there is nothing to read from
        assert not isinstance(caught.value, Unavailable)
        assert session.is_over  # and nothing more is said to this server
        assert code_of(lambda: session.generate("again")) == "session.closed"


def tokens(edit: Callable[[pb.Tokens], None]) -> Change:
    def change(number: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if message.WhichOneof("event") == "tokens":
            edit(message.tokens)
        return [message]

    return change


def finished(edit: Callable[[pb.Finished], None]) -> Change:
    def change(number: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if message.WhichOneof("event") == "finished":
            edit(message.finished)
        return [message]

    return change


def end(message: pb.GenerateResponse) -> bool:
    return message.WhichOneof("event") == "finished"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (tokens(lambda part: part.ids.__setitem__(0, 999)), "receipt.output_tokens"),
        (tokens(lambda part: setattr(part, "text", part.text.upper())), "receipt.output_text"),
        (finished(lambda last: last.fingerprints.__setitem__(0, bytes(16))), "receipt.fingerprints"),
        (finished(lambda last: setattr(last, "receipt", flip(last.receipt))), "receipt.ml_dsa_65"),
        (finished(lambda last: setattr(last, "receipt", b"")), "receipt.form"),
        (finished(lambda last: setattr(last, "field_salts", flip(last.field_salts))), None),
        (tokens(lambda part: part.ids.extend(range(1000))), "stream.size"),
        (lambda _, message: [message, pb.GenerateResponse(tokens=pb.Tokens())], "stream.size"),
        (lambda number, message: [message, message] if number == 0 else [message], "stream.order"),
        (lambda _, message: [] if end(message) else [message], "stream.order"),
        (lambda _, message: [message, message] if end(message) else [message], "stream.order"),
        (lambda number, message: [message] if number == 0 or end(message) else [], None),
    ],
)
def test_no_answer_without_a_receipt_that_verifies(
    appliance: Appliance, tamper: Callable[[Change], None], change: Change, code: str | None
) -> None:
    tamper(change)
    with appliance.connect() as session:
        stream = session.generate("trust nothing", max_tokens=3)
        with pytest.raises(CountermarkError) as caught:
            stream.result()
        assert code is None or caught.value.code == code
        with pytest.raises(type(caught.value)):
            stream.result()  # a failed stream stays failed
        assert session.is_over


def test_an_answer_of_another_request_is_refused(appliance: Appliance, tamper: Callable[[Change], None]) -> None:
    """The first stream's messages, sent again for a second request."""
    kept: list[pb.GenerateResponse] = []

    def change(number: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if replaying:
            return [kept[number]] if number < len(kept) else []
        kept.append(message)
        return [message]

    replaying = False
    tamper(change)
    with appliance.connect() as session:
        session.generate("the same words", max_tokens=2).result()
        replaying = True
        assert code_of(lambda: session.generate("the same words", max_tokens=2)) == "receipt.nonce"


def test_a_session_is_made_by_appraisal_only(appliance: Appliance) -> None:
    channel = Channel.open(appliance.address)
    with pytest.raises(TypeError):
        Session(channel, object(), b"")  # type: ignore[arg-type]
    assert Verdict
    channel.close()


def test_what_a_server_says_is_printable(appliance: Appliance) -> None:
    class Shouting(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return grpc.unary_unary_rpc_method_handler(self._shout)

        def _shout(self, request: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_trailing_metadata(((codec.CODE_KEY, "verified: all is well"), (codec.RETRY_KEY, "-1")))
            context.abort(grpc.StatusCode.INTERNAL, "\x1b[2J\x1b[32mPASS\n" + "x" * 5000)
            return b""

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Shouting()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    front_end = start_front_end(appliance.machine, Connections(), port)
    with pytest.raises(Unavailable) as caught:
        appliance.connect(f"127.0.0.1:{front_end.port}")
    assert caught.value.code == "server.internal"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    front_end.close()
    server.stop(None)
