"""The gRPC service on loopback: wire type <-> call, the connection rules, errors to status codes. Nothing else.

Rules (design 20-evidence): a peer must be a registered connection of the front end; Attest succeeds once on each and is
rate-limited; Generate without it is FAILED_PRECONDITION; only the quote of *this* connection is named in its INTENTs.
Errors carry their stable code in the trailing metadata `countermark-code` (`gate`). Requests are handled as the bytes
that came, because those are what an INTENT commits to.

grpc.aio on one thread of our own: a stream nobody reads costs memory and no thread. No prompt, answer or salt is
logged, nor the message of an exception that is not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from countermark.errors import ChannelError, RequestError, Unavailable
from countermark.formats.evidence import parse_evidence
from countermark.formats.quote import quote_digest
from countermark.formats.report_data import Purpose
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance import generation, replaying
from countermark_appliance.connections import Attested, Connection, Connections
from countermark_appliance.engine.request import Finish
from countermark_appliance.gate import Context, Gate, code_of
from countermark_appliance.generation import Engine, Generation, Order
from countermark_appliance.operations.quotas import metadata_of
from countermark_appliance.operations.watching import Operations
from countermark_appliance.platform.attester import LogHead
from countermark_appliance.replaying import Replaying, ReplayOrder

_STOP_S: Final = 10.0
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", codec.MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", codec.MAX_RESPONSE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    # Clients ping every 30 s, also between requests; without both of these they are sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_SERVED: Final = (codec.SERVICE, codec.LOG_SERVICE)
M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Recorder(generation.Recorder, replaying.Recorder, Protocol):
    """What the service needs of `records.Recorder`."""

    def head(self) -> tuple[int, bytes]: ...

    def checkpoint(self) -> bytes: ...

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]: ...

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]: ...

    def leaves(self, start: int, count: int) -> tuple[bytes, ...]: ...

    def witnessed(self) -> bytes: ...


class Attester(Protocol):
    """What makes evidence: `platform.Attester`."""

    def attest(self, *, purpose: Purpose, nonce: bytes, exporter: bytes | None, log: LogHead) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """`generations`: requests alive at a time, from INTENT to receipt. `attests_per_s`: refill of a bucket of
    `attest_burst` shared by all clients. `streams`: calls at a time on one connection; grpcio holds what has come of
    each one's request (up to 4 MiB) before any rule is asked, so times the front end's connections (256) this is what
    strangers can make us hold: 8 GiB. More requests on a connection wait in the client.

    `stall_s`: a stream whose client takes no message for so long is reset, because what it has not taken is held, and
    a connection can be alive while one stream's window stays shut."""

    generations: int = 80
    attests_per_s: float = 50.0
    attest_burst: int = 100
    streams: int = 8
    stall_s: float = 60.0


class Service:
    """The server. `start`, then `set_serving` once the machine is ready; `stop` last."""

    def __init__(
        self,
        *,
        attester: Attester,
        recorder: Recorder,
        engine: Engine,
        connections: Connections,
        passport: bytes,
        limits: ServiceLimits | None = None,
        operations: Operations | None = None,
    ) -> None:
        """`passport`: encoded evidence for purpose passport, what GetEvidence answers."""
        self._operations = operations or Operations()
        self._attester = attester
        self._recorder = recorder
        self._engine = engine
        self._connections = connections
        self._passport = passport
        self._limits = limits or ServiceLimits()
        self._bucket = _Bucket(self._limits.attests_per_s, self._limits.attest_burst)
        # Commits wait for a group fsync, so that many must be able to wait together.
        self._blocking = ThreadPoolExecutor(32, "countermark-service")
        self._quoting = ThreadPoolExecutor(2, "countermark-attest")
        self._reading = ThreadPoolExecutor(4, "countermark-log")  # anybody may, so nothing else waits behind it
        self._generations: dict[asyncio.Task[Any], Generation | Replaying] = {}
        self._stopping = False
        self._started = threading.Event()
        self._stopped = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="countermark-grpc", daemon=True)
        self.port = 0

    def start(self) -> int:
        """Listen on 127.0.0.1 and return the port; health says NOT_SERVING. Raises `Unavailable` (`service.start`)."""
        self._thread.start()
        self._started.wait()
        if not self.port:
            raise Unavailable("service: gRPC server did not start", code="service.start")
        return self.port

    def set_serving(self) -> None:
        """Health says SERVING from now on."""
        self._call(self._set_health(health_pb2.HealthCheckResponse.SERVING))

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Refuse new requests, let those that run finish for `grace_s`, end the rest with `shutdown`. Idempotent.

        Returns when every request has its OUTCOME or ABORT, so close the engine afterwards (or before, to end at once).
        """
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._call(self._drain(grace_s))
            self._thread.join()
        elif not self._loop.is_closed():
            self._loop.close()
        self._blocking.shutdown()
        self._quoting.shutdown()
        self._reading.shutdown(cancel_futures=True)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = grpc.aio.server(
            interceptors=(Gate(self._connections, self._limits.stall_s),),
            options=(*_OPTIONS, ("grpc.max_concurrent_streams", self._limits.streams)),
        )
        server.add_generic_rpc_handlers((self._countermark(), self._log()))
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVED, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.port = port
        self._started.set()
        await self._stopped.wait()
        await server.stop(1.0)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *_SERVED):
            await self._health.set(name, status)

    async def _drain(self, grace_s: float) -> None:
        self._stopping = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        for wait_s in (grace_s, _STOP_S):
            if self._generations:
                await asyncio.wait(self._generations, timeout=wait_s)
            for one in self._generations.values():
                one.abandon(Finish.SHUTDOWN)
        self._stopped.set()

    def _countermark(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return grpc.method_handlers_generic_handler(
            codec.SERVICE,
            {
                "Attest": grpc.unary_unary_rpc_method_handler(self._attest),
                "GetEvidence": grpc.unary_unary_rpc_method_handler(self._get_evidence),
                "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
                "Replay": grpc.unary_unary_rpc_method_handler(self._replay),
            },
        )

    async def _attest(self, data: bytes, context: Context) -> bytes:
        try:
            given = await self._given(data, context)
        except Exception as err:
            self._operations.attested(code_of(err))
            raise
        self._operations.attested("")
        return given

    async def _given(self, data: bytes, context: Context) -> bytes:
        nonce = codec.check_nonce(codec.parse_message(pb.AttestRequest, data).nonce)
        connection = self._connections.of(context.peer())
        self._refuse_if_stopping()
        connection.begin_attest()
        attested: Attested | None = None
        try:
            self._bucket.take()
            make = functools.partial(self._evidence, nonce, connection)
            response, attested = await self._loop.run_in_executor(self._quoting, make)
        finally:
            connection.end_attest(attested)
        return response.SerializeToString()

    def _evidence(self, nonce: bytes, connection: Connection) -> tuple[Message, Attested]:
        size, root = self._recorder.head()
        evidence = self._attester.attest(
            purpose=Purpose.SESSION,
            nonce=nonce,
            exporter=connection.exporter,
            log=LogHead(origin=self._recorder.epoch.origin, size=size, root=root),
        )
        response = pb.AttestResponse(evidence=evidence, witnessed=self._recorder.witnessed())
        return response, Attested(quote_digest=quote_digest(parse_evidence(evidence).quote), log_size=size)

    async def _get_evidence(self, data: bytes, context: Context) -> bytes:
        codec.parse_message(pb.GetEvidenceRequest, data)
        return pb.GetEvidenceResponse(evidence=self._passport).SerializeToString()

    async def _generate(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            attested = self._attested(context)
            request = codec.parse_generate_request(data)
            self._refuse_if_busy()
            watcher = self._operations.admit("generate", metadata_of(context.invocation_metadata() or ()))
        except Exception as err:
            self._operations.refused(code_of(err))
            raise
        deadline = _deadline(context)
        one = Generation(
            Order(raw=data, request=request, attested=attested, deadline=deadline, watcher=watcher),
            engine=self._engine,
            recorder=self._recorder,
            executor=self._blocking,
        )
        task = self._loop.create_task(one.run())
        self._generations[task] = one
        task.add_done_callback(self._generations.pop)
        try:
            async for message in one.messages():
                yield message
        finally:
            one.abandon(_reason(deadline))

    async def _replay(self, data: bytes, context: Context) -> bytes:
        try:
            attested = self._attested(context)
            request = codec.parse_replay_request(data)
            self._refuse_if_busy()
            watcher = self._operations.admit("replay", metadata_of(context.invocation_metadata() or ()))
        except Exception as err:
            self._operations.refused(code_of(err))
            raise
        deadline = _deadline(context)
        one = Replaying(
            ReplayOrder(request=request, attested=attested, deadline=deadline, watcher=watcher),
            engine=self._engine,
            recorder=self._recorder,
            executor=self._blocking,
        )
        task = self._loop.create_task(one.run())
        self._generations[task] = one
        task.add_done_callback(self._generations.pop)
        task.add_done_callback(_retrieve)  # nobody may be left to read it
        try:
            return pb.ReplayResponse(receipt=await asyncio.shield(task)).SerializeToString()
        finally:
            one.abandon(_reason(deadline))

    def _attested(self, context: Context) -> Attested:
        attested = self._connections.of(context.peer()).attested
        if attested is None:
            raise ChannelError("call: expected Attest first on this connection", code="channel.not_attested")
        return attested

    def _refuse_if_busy(self) -> None:
        self._refuse_if_stopping()
        if len(self._generations) >= self._limits.generations:
            raise Unavailable(f"service: {self._limits.generations} requests are running", code="service.busy")

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise Unavailable("service: stopping", code="service.stopping")

    def _log(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        def checkpoint(_: pb.GetCheckpointRequest) -> Message:
            return pb.GetCheckpointResponse(checkpoint=self._recorder.checkpoint())

        def inclusion(request: pb.GetInclusionProofRequest) -> Message:
            return pb.GetInclusionProofResponse(proof=self._recorder.inclusion(request.leaf_index, request.tree_size))

        def consistency(request: pb.GetConsistencyProofRequest) -> Message:
            return pb.GetConsistencyProofResponse(proof=self._recorder.consistency(request.old_size, request.new_size))

        def leaves(request: pb.GetLeavesRequest) -> Message:
            if request.count > codec.MAX_LEAVES:
                raise RequestError(
                    f"count: expected at most {codec.MAX_LEAVES}, got {request.count}", code="request.count"
                )
            return pb.GetLeavesResponse(leaves=self._recorder.leaves(request.start, request.count))

        return grpc.method_handlers_generic_handler(
            codec.LOG_SERVICE,
            {
                "GetCheckpoint": self._read(pb.GetCheckpointRequest, checkpoint),
                "GetInclusionProof": self._read(pb.GetInclusionProofRequest, inclusion),
                "GetConsistencyProof": self._read(pb.GetConsistencyProofRequest, consistency),
                "GetLeaves": self._read(pb.GetLeavesRequest, leaves),
            },
        )

    def _read(self, kind: type[M], answer: Callable[[M], Message]) -> grpc.RpcMethodHandler[bytes, bytes]:
        """A read of the log: parsed here, answered off the loop because it may read files."""

        async def handle(data: bytes, context: Context) -> bytes:
            request = codec.parse_message(kind, data)
            response = await self._loop.run_in_executor(self._reading, answer, request)
            return response.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)


def _deadline(context: Context) -> float | None:
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s


def _reason(deadline: float | None) -> Finish:
    """Why nobody waits any more."""
    late = deadline is not None and time.monotonic() >= deadline
    return Finish.DEADLINE if late else Finish.CANCELLED


def _retrieve(task: asyncio.Task[bytes]) -> None:
    if not task.cancelled():
        task.exception()


class _Bucket:
    """A token bucket, used on one thread."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._at = float(burst), time.monotonic()

    def take(self) -> None:
        """Raises `Unavailable` (`attest.rate`) when empty."""
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            raise Unavailable("attest: too many at the moment; retry later", code="attest.rate")
        self._level -= 1
