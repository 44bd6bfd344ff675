"""One answer on one session: a thread reads and verifies, the event loop takes what it has verified.

What a session gives out is all there is: `accepted` once steps 12 to 14 hold, text after that, the answer once steps 15
to 18 hold. The thread stops when so many pieces wait that nobody takes, and with it the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Final

from countermark.receipt import Accepted
from countermark.session import Answer, Session, Stream, TokenLogprob

_WAITING: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text, and the log probabilities of the tokens that it ends. Not covered by a receipt yet."""

    text: str = field(repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The verified answer, and the log probabilities of tokens that have no text."""

    answer: Answer
    logprobs: tuple[TokenLogprob, ...] = field(repr=False)


class Relay:
    """Make one, `begin` it, then `take` until an `End`. `cancel` in any case."""

    def __init__(self, session: Session, settings: Mapping[str, Any], timeout_s: float) -> None:
        self._session = session
        self._settings = settings
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Accepted | Piece | End | BaseException] = asyncio.Queue()
        self._room = threading.Semaphore(_WAITING)
        self._cancelled = False
        self._stream: Stream | None = None
        self.ended = asyncio.Event()
        """The thread has let go of the session."""

    async def begin(self, executor: Executor) -> Accepted:
        """Send the request. Raises as `Session.generate`."""
        executor.submit(self._work)
        accepted = await self._next()
        assert isinstance(accepted, Accepted)
        return accepted

    async def take(self) -> Piece | End:
        """The next piece, at last the answer. Raises as `Stream.result`."""
        item = await self._next()
        assert not isinstance(item, Accepted)
        self._room.release()
        return item

    def cancel(self) -> None:
        """Nobody reads any more: the node stops and records it. No effect after the end."""
        self._cancelled = True
        self._room.release()
        if self._stream is not None:
            self._stream.cancel()

    async def _next(self) -> Accepted | Piece | End:
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            if self._cancelled:  # before anything was sent
                return
            stream = self._session.start(**self._settings, timeout_s=self._timeout_s)
            self._stream = stream
            if self._cancelled:
                stream.cancel()
            stream.accept()
            self._post(stream.accepted)
            seen = 0
            for text in stream:
                found = stream.logprobs[seen:] if self._settings["logprobs"] else ()
                seen += len(found)
                self._room.acquire()
                if self._cancelled:
                    break
                self._post(Piece(text=text, logprobs=found))
            else:
                self._post(End(answer=stream.result(), logprobs=stream.logprobs[seen:]))
        except BaseException as err:  # noqa: BLE001  whatever it was, somebody waits for it
            self._post(err)
        finally:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.ended.set)

    def _post(self, item: Accepted | Piece | End | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
