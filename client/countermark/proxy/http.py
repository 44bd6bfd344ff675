"""A small HTTP/1.1 server on asyncio: h11 reads and frames, this module keeps the clock and the caps.

What one client may cost is bounded: connections, header bytes, body bytes, the time to send either, the time between
requests, the time to take what was written. A request is admitted by its head alone, before a byte of its body is read.
A client that goes away cancels what was done for it. An answer that fails half-way is cut off without the last chunk
(RFC 9112, 7.1), so that nobody who counts bytes takes it for a whole one; HTTP/1.0, where an end is an end, is refused.

Not here: what a request means, who may ask (`app`, `guard`). No line of a request is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import h11

from countermark.errors import CountermarkError, RequestError, Unavailable
from countermark.formats import strict_json

_READ_BYTES: Final = 64 * 1024
_WRITE_BYTES: Final = 64 * 1024
_LINGER_S: Final = 1.0
_ALWAYS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost. `head_s`, `body_s`: to send all of either; `write_s`: to take what waits for it."""

    connections: int = 1024
    head_bytes: int = 32 * 1024
    body_bytes: int = 8 * 1024 * 1024
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 75.0
    write_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`headers`: names in lower case; one that stands twice has its values joined as RFC 9110, 5.3 does."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(default=b"", repr=False)


class Handler(Protocol):
    """What is served."""

    def admit(self, head: Request) -> None:
        """Raises `CountermarkError` for a request that may not go on; its body has not been read."""

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer. Cancelled when the client goes away."""

    async def refuse(self, err: BaseException, request: Request | None, reply: Reply) -> None:
        """Say why there is no answer, or that there will be no end to one that has begun."""


class ClientGone(Exception):
    """The client ended the connection, or takes nothing any more."""


class Reply:
    """One response: `send` it whole, or `start`, `write`, `finish`; `cut` where it must not look whole."""

    def __init__(self, wire: _Wire, method: str) -> None:
        self._wire = wire
        self._method = method
        self._extra: dict[str, str] = {}
        self.status = 0
        """What was sent; 0 before."""

    def add(self, headers: Mapping[str, str]) -> None:
        """Headers of whatever comes: those of `send` and `start` go before them."""
        self._extra |= headers

    async def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        await self._head(status, {**headers, "content-length": str(len(body))})
        if body and self._method != "HEAD":
            self._wire.put(h11.Data(data=body))
        self._wire.put(h11.EndOfMessage())
        await self._wire.flush()

    async def send_json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        await self.send(status, {"content-type": "application/json", **(headers or {})}, strict_json.dump(value))

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        await self._head(status, {**headers, "transfer-encoding": "chunked"})
        await self._wire.flush()

    async def write(self, data: bytes) -> None:
        self._wire.put(h11.Data(data=data))
        await self._wire.flush()

    async def finish(self) -> None:
        self._wire.put(h11.EndOfMessage())
        await self._wire.flush()

    async def cut(self, data: bytes = b"") -> None:
        """Send `data`, then end the connection without the chunk that ends a body."""
        if data:
            await self.write(data)
        self._wire.over = True

    async def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        merged = {**_ALWAYS, **self._extra, **headers}
        if self._wire.over:
            merged["connection"] = "close"
        self._wire.put(h11.Response(status_code=status, headers=list(merged.items())))


class _Wire:
    """One connection's bytes and h11's state."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self.over = False
        self._reader, self._writer, self._limits = reader, writer, limits
        writer.transport.set_write_buffer_limits(high=_WRITE_BYTES)

    def put(self, event: h11.Event) -> None:
        try:
            data = self.h11.send(event)
        except h11.LocalProtocolError as err:  # only after an end of the other side
            raise ClientGone from err
        if data:
            self._writer.write(data)

    async def flush(self) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            raise ClientGone
        if transport.get_write_buffer_size() <= _WRITE_BYTES:
            return
        try:
            async with asyncio.timeout(self._limits.write_s):
                await self._writer.drain()
        except (TimeoutError, OSError) as err:
            transport.abort()
            raise ClientGone from err

    async def head(self) -> Request | None:
        """The next request's head; None where the connection ends before one."""
        end = time.monotonic() + self._limits.idle_s
        begun = self.h11.trailing_data[0] != b""
        if begun:
            end = time.monotonic() + self._limits.head_s
        while (event := self.h11.next_event()) is h11.NEED_DATA:
            data = await self._read(end, "head")
            if not data and not begun:
                return None
            if not begun:
                begun, end = True, time.monotonic() + self._limits.head_s
            self.h11.receive_data(data)
        if not isinstance(event, h11.Request):
            return None
        headers: dict[str, str] = {}
        for name, value in event.headers:
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        if event.http_version != b"1.1":
            self.over = True
            raise RequestError("request: expected HTTP/1.1", code="proxy.http")
        return Request(method=event.method.decode("ascii"), path=event.target.decode("ascii"), headers=headers)

    async def body(self) -> bytes:
        """The rest of the request. Raises `RequestError` (`proxy.body`, `proxy.slow`)."""
        if self.h11.they_are_waiting_for_100_continue:
            self.put(h11.InformationalResponse(status_code=100, headers=[]))
            await self.flush()
        end, found, size = time.monotonic() + self._limits.body_s, [], 0
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                self.h11.receive_data(await self._read(end, "body"))
            elif isinstance(event, h11.Data):
                found.append(bytes(event.data))
                size += len(event.data)
                if size > self._limits.body_bytes:
                    self.over = True
                    message = f"body: expected at most {self._limits.body_bytes} bytes"
                    raise RequestError(message, code="proxy.body")
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(found)
            else:
                raise ClientGone

    async def gone(self) -> None:
        """Returns when the client has ended its side; what it sends ahead is kept, up to one read."""
        with contextlib.suppress(OSError):
            while not self._ahead():
                data = await self._reader.read(_READ_BYTES)
                self.h11.receive_data(data)
                if not data:
                    return
            await asyncio.Event().wait()

    def _ahead(self) -> bool:
        return self.h11.trailing_data[0] != b""

    async def _read(self, end: float, what: str) -> bytes:
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                return await self._reader.read(_READ_BYTES)
        except OSError as err:  # TimeoutError is one
            self.over = True
            if isinstance(err, TimeoutError) and (what == "body" or self._ahead()):
                raise RequestError(f"{what}: expected all of it in time", code="proxy.slow") from err
            raise ClientGone from err

    async def linger(self) -> None:
        """Close so that what was said last arrives: a reset for bytes that nobody has read would overtake it."""
        with contextlib.suppress(OSError, TimeoutError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(_LINGER_S):
                while await self._reader.read(_READ_BYTES):
                    pass

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self._writer.wait_closed()
        self._writer.transport.abort()


class Server:
    """Serves `handler` on one address. `start`, then `close`."""

    def __init__(self, handler: Handler, limits: Limits | None = None) -> None:
        self._handler = handler
        self._limits = limits or Limits()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closing = False

    @property
    def connections(self) -> int:
        return len(self._tasks)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `OSError`."""
        self._server = await asyncio.start_server(self._accept, host, port, limit=_READ_BYTES, backlog=512)
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    async def close(self, *, grace_s: float = 10.0) -> None:
        """Accept nobody any more, let what runs go on for `grace_s`, then cancel it."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        for task in tuple(self._idle):
            task.cancel()
        for wait_s in (grace_s, 2.0):
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=wait_s)
            for task in tuple(self._tasks):
                task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = _Wire(reader, writer, self._limits)
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._tasks) > self._limits.connections:
                wire.over = True
                err = Unavailable(f"proxy: {self._limits.connections} connections are open", code="proxy.busy")
                await self._handler.refuse(err, None, Reply(wire, "GET"))
            while not wire.over:
                self._idle.add(task)
                try:
                    head = await self._head(wire)
                finally:
                    self._idle.discard(task)
                if head is None or not await self._exchange(wire, head):
                    break
            if wire.over:
                await wire.linger()
        except (ClientGone, asyncio.CancelledError):
            pass
        finally:
            await wire.close()

    async def _head(self, wire: _Wire) -> Request | None:
        try:
            return await wire.head()
        except h11.RemoteProtocolError as err:
            wire.over = True
            refused: CountermarkError = RequestError(f"request: {err}", code="proxy.http")
            if err.error_status_hint == 431:
                message = f"headers: expected at most {self._limits.head_bytes} bytes"
                refused = RequestError(message, code="proxy.headers")
        except RequestError as err:
            refused = err
        await self._handler.refuse(refused, None, Reply(wire, "GET"))
        return None

    async def _exchange(self, wire: _Wire, head: Request) -> bool:
        """One request and its answer; whether another may follow on this connection."""
        reply = Reply(wire, head.method)
        wire.over = wire.over or self._closing
        try:
            self._handler.admit(head)
            request = Request(method=head.method, path=head.path, headers=head.headers, body=await wire.body())
        except (CountermarkError, h11.RemoteProtocolError) as err:
            wire.over = True  # its body stays unread
            if isinstance(err, h11.RemoteProtocolError):
                err = RequestError("request: expected HTTP/1.1", code="proxy.http")
            await self._handler.refuse(err, head, reply)
            return False
        work = asyncio.get_running_loop().create_task(self._work(request, reply))
        gone = asyncio.get_running_loop().create_task(wire.gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if wire.over or wire.h11.our_state is not h11.DONE or wire.h11.their_state is not h11.DONE:
            wire.over = True
            return False
        wire.h11.start_next_cycle()
        return True

    async def _work(self, request: Request, reply: Reply) -> None:
        try:
            await self._handler.handle(request, reply)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as err:  # noqa: BLE001  whatever went wrong, the client is told that there is no answer
            await self._handler.refuse(err, request, reply)
