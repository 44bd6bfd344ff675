"""The client for asyncio: the same session, in coroutines.

What blocks runs on threads, so that the event loop never waits for a network, a signature or a slow node: every call
that is under way has one, from a pool that its session owns. No check is written twice: `AsyncSession` asks `Session`,
and text is given out under the same rules. A task that is cancelled cancels its request; the node then records an
ABORT, as it does for one that disconnects.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from countermark import session as blocking
from countermark.appraise import Verdict
from countermark.errors import Unavailable
from countermark.options import GenerateOptions
from countermark.policy import Policy
from countermark.receipt import Accepted, CheckedReceipt
from countermark.replayed import NodeReplay
from countermark.retrying import ONCE, Retry
from countermark.session import Answer, TokenLogprob
from countermark.witness import Witnessed

MAX_CALLS: Final = 1024
"""Under way in one session; more wait for their turn. A node has fewer places."""
T = TypeVar("T")


class _Connecting:
    """What `connect` returns: to be awaited, or entered with `async with`."""

    def __init__(self, make: Callable[[], blocking.Session]) -> None:
        self._make = make
        self._session: AsyncSession | None = None

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        return self._connect().__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._connect()
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def _connect(self) -> AsyncSession:
        pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="countermark-aio")
        opening = pool.submit(self._make)
        try:
            return AsyncSession(await asyncio.wrap_future(opening), pool)
        except BaseException:
            opening.add_done_callback(_discard)  # a task that was cancelled leaves no connection behind
            pool.shutdown(wait=False)
            raise


def connect(address: str, policy: Policy, **options: Any) -> _Connecting:
    """As `countermark.connect`, with its options: `async with connect(...) as session`, or `await connect(...)`."""
    return _Connecting(functools.partial(blocking.connect, address, policy, **options))


class AsyncSession:
    """An appraised connection. Make it with `connect`. For one event loop, and for any number of its tasks."""

    def __init__(self, session: blocking.Session, pool: ThreadPoolExecutor) -> None:
        self._session = session
        self._pool = pool

    @property
    def verdict(self) -> Verdict:
        return self._session.verdict

    @property
    def witnessed(self) -> Witnessed:
        return self._session.witnessed

    @property
    def is_over(self) -> bool:
        """The connection has ended; connect again."""
        return self._session.is_over

    async def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """As `Session.generate`: returns once the appliance's commitment has been verified. Raises as it does."""
        for attempt in itertools.count(1):
            stream = self._session.start(prompt, timeout_s=timeout_s, **options)
            try:
                await self._run(stream.accept)
                return AsyncStream(stream, self._run)
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Unavailable as err:
                wait_s = (retry or ONCE).wait_s(attempt, err)
                if wait_s is None or self.is_over:
                    raise
                await asyncio.sleep(wait_s)
        raise AssertionError("counting has no end")

    async def replay(self, answer: CheckedReceipt, *, timeout_s: float | None = None) -> NodeReplay:
        """As `Session.replay`."""
        return await self._run(functools.partial(self._session.replay, answer, timeout_s=timeout_s))

    async def close(self) -> None:
        """End the connection, and with it what runs on it. Idempotent."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._session.close)
        finally:
            self._pool.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            future = self._pool.submit(call)
        except RuntimeError as err:  # the pool's word for a session that was closed
            raise Unavailable("session: closed", code="session.closed") from err
        return await asyncio.wrap_future(future)


class AsyncStream:
    """One answer as it arrives: `async for` its text, then (or at once) `result`. For one task, `cancel` for any."""

    def __init__(self, stream: blocking.Stream, run: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._stream = stream
        self._run = run

    @property
    def accepted(self) -> Accepted:
        """The appliance's commitment, verified."""
        return self._stream.accepted

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids so far."""
        return self._stream.tokens

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each of `tokens`, if asked for. The appliance says so; no signature covers them."""
        return self._stream.logprobs

    async def __aiter__(self) -> AsyncIterator[str]:
        """The text that has not been given out yet, piece by piece, until the receipt has been verified."""
        pieces = iter(self._stream)
        while (text := await self._cancelling(lambda: next(pieces, None))) is not None:
            yield text

    async def result(self) -> Answer:
        """The whole answer with its verified receipt; waits for what is still to come. Raises as `Stream.result`."""
        answer: Answer = await self._cancelling(self._stream.result)
        return answer

    def cancel(self) -> None:
        """Ask the appliance to stop; it records an ABORT."""
        self._stream.cancel()

    async def _cancelling(self, call: Callable[[], Any]) -> Any:
        try:
            return await self._run(call)
        except asyncio.CancelledError:
            self._stream.cancel()
            raise


def _discard(opening: Future[blocking.Session]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
