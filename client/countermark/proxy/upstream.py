"""The nodes behind the proxy: connections that were appraised, in good time again, and no others.

`connect` is the only way to a connection, and it appraises before anything else, so a node that changes its key, its
image or its place changes its connection and is appraised anew; nothing is remembered of an earlier verdict. Beyond
that: a connection takes new prompts only while its verdict is younger than `reattest_s`; a node that was refused, or
whose answer had to be withheld, gets none until it has been appraised again after a pause that grows. Whatever runs on
a connection that takes no more prompts may end there: its receipt is checked against the verdict it was asked under.

All of it runs on one event loop; what blocks runs on the executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from countermark.appraise import Verdict
from countermark.checks import Check
from countermark.errors import CountermarkError, PolicyError, Unavailable, UsageError, VerificationError
from countermark.formats.records import parse_epoch
from countermark.formats.witnessed import parse_witnessed
from countermark.proxy.journal import Journal
from countermark.proxy.settings import NodeLimits
from countermark.session import Session

_EARLY: Final = 0.8
"""When the next verdict is made, in lives of one: before the last has to be given up."""
_LOOK_S: Final = 1.0
_IDLE_S: Final = 60.0
"""A connection that was made for a crowd is closed after it; the newest stays."""


class State(Enum):
    """What the status page says of a node."""

    NEW = "not appraised yet"
    VERIFIED = "verified"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


@dataclass(slots=True, kw_only=True, eq=False)
class Link:
    """One appraised connection in use. `active`: answers that run on it."""

    session: Session
    made: float  # time.monotonic()
    used: float  # the same clock: when an answer last began or ended on it
    active: int = 0
    retired: bool = False

    @property
    def verdict(self) -> Verdict:
        return self.session.verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the last appraisal of a node came to. `checks`: numbered; of a refusal those that were made."""

    state: State
    at: float  # time.time()
    verdict: Verdict | None = None
    checks: tuple[Check, ...] = ()
    error: CountermarkError | None = None


@dataclass(slots=True, kw_only=True)
class Counts:
    """Since the proxy was started."""

    appraisals: int = 0
    refusals: int = 0
    key_changes: int = 0
    answers: int = 0
    withheld: int = 0


class Node:
    """One upstream address. `keep` is its task; `acquire` and `release` bracket each use of a connection."""

    def __init__(
        self,
        address: str,
        *,
        connect: Callable[[str], Session],
        limits: NodeLimits,
        executor: Executor,
        journal: Journal,
    ) -> None:
        self.address = address
        self.seen = Seen(state=State.NEW, at=time.time())
        self.counts = Counts()
        self.model: str | None = None
        """As an EPOCH or INTENT that was checked names it; None before there was one."""
        self._connect = connect
        self._limits = limits
        self._executor = executor
        self._journal = journal
        self._links: list[Link] = []
        self._lock = asyncio.Lock()
        self._not_before = 0.0
        self._pause_s = 0.0
        self._key: bytes | None = None

    @property
    def links(self) -> Sequence[Link]:
        return tuple(self._links)

    @property
    def is_ready(self) -> bool:
        """There is a connection under a fresh verdict, with room or without."""
        return any(map(self._usable, self._links))

    async def acquire(self) -> Link:
        """A connection under a fresh verdict, with room; made if need be.

        Raises why there is none: what `connect` raises, or did not long ago; `Unavailable` (`proxy.busy`).
        """
        link = self._free()
        if link is None:
            await self._attest()
            link = self._free()  # nobody came between
        if link is None:  # not once more: a node that ends every connection would keep us at it
            raise Unavailable(f"{self.address}: its connection ended as soon as it was made", code="channel.lost")
        link.active += 1
        link.used = time.monotonic()
        return link

    def release(self, link: Link) -> None:
        link.active -= 1
        link.used = time.monotonic()
        self._prune()

    def condemn(self, err: CountermarkError) -> None:
        """An answer of this node did not verify: no prompt goes there until it has been appraised again, later.

        What is said of that to others is the code alone: the error's text can quote the request.
        """
        self.counts.withheld += 1
        text = f"an answer of this node did not verify ({err.code}); it is left alone until it is appraised again"
        self._refuse(type(err)(text, code=err.code, step=err.step))

    async def keep(self) -> None:
        """Appraise in good time, for ever: the task of this node."""
        while True:
            with contextlib.suppress(CountermarkError):
                if self._due():
                    await self._attest(renew=True)
            await asyncio.sleep(_LOOK_S)
            self._prune()

    async def attest(self) -> None:
        """Appraise now. Raises what `connect` raises."""
        await self._attest()

    async def close(self) -> None:
        links, self._links = self._links, []
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, link.session.close) for link in links))

    def _usable(self, link: Link) -> bool:
        young = time.monotonic() - link.made < self._limits.reattest_s
        return young and not link.retired and not link.session.is_over

    def _free(self) -> Link | None:
        """The first with room, so that what a connection has cached is found again."""
        return next((link for link in self._links if self._usable(link) and link.active < self._limits.streams), None)

    def _due(self) -> bool:
        if time.monotonic() < self._not_before:
            return False
        made = max((link.made for link in self._links if self._usable(link)), default=None)
        return made is None or time.monotonic() - made > _EARLY * self._limits.reattest_s

    async def _attest(self, *, renew: bool = False) -> None:
        """One more connection, one at a time. `renew`: also where there is room on an older one."""
        async with self._lock:
            if not renew and self._free() is not None:
                return
            if time.monotonic() < self._not_before and self.seen.error is not None:
                raise self.seen.error.with_traceback(None)
            if not renew and sum(map(self._usable, self._links)) >= self._limits.sessions:
                message = f"{self.address}: {self._limits.sessions} connections are full"
                raise Unavailable(message, code="proxy.busy", retry_after_s=1.0)
            opening = self._executor.submit(self._connect, self.address)
            try:
                session = await asyncio.wrap_future(opening)
            except CountermarkError as err:
                self._refuse(err)
                raise
            except asyncio.CancelledError:
                opening.add_done_callback(_discard)  # who waited for it has left: nobody would ever close it
                raise
            self._admit(session)

    def _admit(self, session: Session) -> None:
        verdict = session.verdict
        self.seen = Seen(state=State.VERIFIED, at=time.time(), verdict=verdict, checks=tuple(session.witnessed.checks))
        self.counts.appraisals += 1
        self._pause_s = self._not_before = 0.0
        self.model = _model(session) or self.model
        key = verdict.claims.tls_spki
        if self._key is not None and key != self._key:
            self.counts.key_changes += 1
            self._journal.note("node_key_changed", node=self.address, tls_key=key.hex(), boot=verdict.boot_id.hex())
        self._key = key
        self._links.insert(0, Link(session=session, made=time.monotonic(), used=time.monotonic()))
        self._journal.note("node_verified", node=self.address, boot=verdict.boot_id.hex(), simulated=verdict.simulated)

    def _refuse(self, err: CountermarkError) -> None:
        """No new prompts where anything but the network failed; old connections serve on where it did."""
        away = isinstance(err, Unavailable)
        least, most = self._limits.retry_s if away else self._limits.refused_s
        self._pause_s = min(most, max(least, 2 * self._pause_s))
        if away and any(map(self._usable, self._links)):
            self._not_before = time.monotonic() + self._pause_s
            return
        self._not_before = time.monotonic() + self._pause_s
        if not away:
            self.counts.refusals += 1
            for link in self._links:
                link.retired = True
        self.seen = Seen(
            state=State.UNAVAILABLE if away else State.REFUSED, at=time.time(), checks=err.checks, error=err
        )
        self._journal.note("node_refused", node=self.address, code=err.code, step=err.step)
        self._prune()

    def _prune(self) -> None:
        """Close what nobody will use again. Closing waits for a thread, so it does so elsewhere."""
        idle = time.monotonic() - _IDLE_S
        kept = [
            link
            for place, link in enumerate(self._links)
            if link.active or (self._usable(link) and (place == 0 or link.used > idle))
        ]
        for link in self._links:
            if link not in kept:
                with contextlib.suppress(RuntimeError):  # the proxy is ending, and closes them all
                    self._executor.submit(link.session.close)
        self._links = kept


def _discard(opening: Future[Session]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _model(session: Session) -> str | None:
    """The model's name from the node's EPOCH, where an operator's log has shown it; verified with the session."""
    data = session.witnessed.data
    if not data:
        return None
    return parse_epoch(parse_witnessed(data).record).stack.model


@dataclass(slots=True, kw_only=True)
class Upstream:
    """All nodes, in the order in which they are tried."""

    nodes: tuple[Node, ...]
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> list[CountermarkError]:
        """Appraise each once; what was refused. The nodes are kept appraised from then on."""
        found = await asyncio.gather(*(node.attest() for node in self.nodes), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, CountermarkError):
                raise one
        self._tasks = [asyncio.create_task(node.keep()) for node in self.nodes]
        return [one for one in found if isinstance(one, CountermarkError)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self.nodes))

    def order(self, model: str) -> list[Node]:
        """As given; those known to serve the model first, those known to serve another last."""
        return sorted(self.nodes, key=lambda node: 1 if node.model is None or not model else 2 * (node.model != model))


def worst(errors: Sequence[CountermarkError], busy: Sequence[str]) -> CountermarkError:
    """The one to report: a node that is only busy, else what did not verify, else what could not be reached."""

    def rank(err: CountermarkError) -> int:
        if err.code in busy:
            return 0
        if isinstance(err, VerificationError):
            return 1
        if isinstance(err, Unavailable):
            return 4
        return 3 if isinstance(err, UsageError) and not isinstance(err, PolicyError) else 2

    return min(errors, key=rank)
