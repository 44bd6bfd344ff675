"""What every call passes: the peer must be a connection of the front end, its client takes what it is sent, and errors
become statuses with codes.

Status details are our own messages, which hold neither secrets nor prompts. An exception that is not ours becomes
INTERNAL without its message, and is logged by type and place only, because its text may quote what it choked on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

from countermark.errors import (
    ChannelError,
    CountermarkError,
    FormatError,
    LogError,
    Unavailable,
    Undecidable,
    UsageError,
    WeightsError,
)
from countermark.wire import codec
from countermark_appliance.connections import Connections
from countermark_appliance.faults import describe

_log = logging.getLogger(__name__)
_BY_CODE: Final = {
    "channel.unregistered": grpc.StatusCode.PERMISSION_DENIED,
    "engine.busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "service.busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "attest.rate": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "quota.rate": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "quota.tokens": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "quota.concurrent": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "access.key": grpc.StatusCode.UNAUTHENTICATED,
    "log.full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "log.range": grpc.StatusCode.OUT_OF_RANGE,
    "generation.cancelled": grpc.StatusCode.CANCELLED,
    "stream.stalled": grpc.StatusCode.CANCELLED,
    "generation.deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "generation.error": grpc.StatusCode.INTERNAL,
    "server.internal": grpc.StatusCode.INTERNAL,
}
_BY_CLASS: Final = (
    (ChannelError, grpc.StatusCode.FAILED_PRECONDITION),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (FormatError, grpc.StatusCode.INVALID_ARGUMENT),
    (LogError, grpc.StatusCode.FAILED_PRECONDITION),
    (WeightsError, grpc.StatusCode.FAILED_PRECONDITION),
    (Undecidable, grpc.StatusCode.FAILED_PRECONDITION),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
)
# Where the error itself does not say when to come back.
_RETRY_MS: Final = {"attest.rate": 200, "engine.busy": 1000, "service.busy": 1000, "log.full": 60_000}

Context = grpc.aio.ServicerContext[Any, Any]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps the handlers of every service on the server, health and reflection included."""

    def __init__(self, connections: Connections, stall_s: float) -> None:
        """`stall_s`: how long a message of a stream may wait for its client to take it; then the stream is reset."""
        self._connections = connections
        self._stall_s = stall_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # type: ignore[return-value]  # grpcio's own form of UNIMPLEMENTED
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        made: grpc.RpcMethodHandler[Any, Any] = make(
            self._guard(getattr(handler, kind)), handler.request_deserializer, handler.response_serializer
        )
        return made

    def _guard(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> None:
                try:
                    self._connections.of(context.peer())
                    async with contextlib.aclosing(behaviour(request, context)) as messages:
                        async for message in messages:
                            await self._send(message, context)
                except Exception as err:  # noqa: BLE001  the boundary: see the module docstring
                    with contextlib.suppress(TimeoutError):  # the status waits in grpcio for who takes nothing
                        await asyncio.wait_for(_abort(context, err), self._stall_s)

            return stream

        async def call(request: Any, context: Context) -> Any:
            try:
                self._connections.of(context.peer())
                return await behaviour(request, context)
            except Exception as err:  # noqa: BLE001
                await _abort(context, err)

        return call

    async def _send(self, message: Any, context: Context) -> None:
        try:
            await asyncio.wait_for(context.write(message), self._stall_s)
        except TimeoutError:
            text = f"stream: expected its client to take a message within {self._stall_s:g} s"
            raise Unavailable(text, code="stream.stalled") from None


def status_of(err: CountermarkError) -> grpc.StatusCode:
    """The gRPC status of one of our errors."""
    by_class = next((status for kind, status in _BY_CLASS if isinstance(err, kind)), grpc.StatusCode.INTERNAL)
    return _BY_CODE.get(err.code, by_class)


def code_of(err: Exception) -> str:
    """The code that a client is told."""
    return err.code if isinstance(err, CountermarkError) else "server.internal"


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


async def _abort(context: Context, err: Exception) -> NoReturn:
    if isinstance(err, grpc.aio.AbortError):
        raise err  # a handler's own, such as NOT_FOUND of the health service
    if not isinstance(err, CountermarkError):
        _log.error("call: unexpected %s", describe(err))
        err = Unavailable("server: internal error", code=code_of(err))
    trailing = [(codec.CODE_KEY, err.code)]
    advised_s = err.retry_after_s if isinstance(err, Unavailable) else None
    wait_ms = _RETRY_MS.get(err.code) if advised_s is None else round(1000 * advised_s)
    if wait_ms is not None:
        trailing.append((codec.RETRY_KEY, str(wait_ms)))
    await context.abort(status_of(err), str(err), tuple(trailing))
