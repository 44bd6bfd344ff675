"""One request's way: a verified node, its answer as it is verified, and what is said when there is none.

A request goes to the first node that is verified and has room. Whether another is tried afterwards depends on what may
have been recorded: after a refusal before any INTENT, yes; once a node may have begun, no, unless the user said so
(`resend`), and then the answer says it too (`x-countermark-resent`). What did not verify is never sent again.

What is released when: no text before steps 1 to 14 hold; an answer that is not streamed only after all 18; a stream's
text as it comes, its finish reason and receipt only after all 18. A stream whose receipt does not verify ends with an
error event and a connection cut short, without finish reason, usage or [DONE]. With `hold`, streams wait for all 18.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Final

from countermark.errors import CountermarkError, Recorded, RequestError, Unavailable
from countermark.proxy import spoken
from countermark.proxy.http import ClientGone, Reply
from countermark.proxy.journal import Journal
from countermark.proxy.ledger import Entry, Keeper, Ledger, counted, outline
from countermark.proxy.relay import End, Piece, Relay
from countermark.proxy.settings import Settings
from countermark.proxy.spoken import BUSY, Speech
from countermark.proxy.upstream import Link, Node, Upstream, worst
from countermark.proxy.wanted import ANY_MODEL, Wanted
from countermark.receipt import Accepted
from countermark.session import Answer, TokenLogprob

_THIS_NODE: Final = ("request.model", "access.key")
"""Refusals of a request, before any INTENT, that another node may not share."""
_STREAM: Final = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
_MOMENT_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be answered: `save` the bundle, `hold` a stream back until all of it is verified."""

    wanted: Wanted
    route: str
    save: bool
    hold: bool


@dataclass(slots=True, kw_only=True)
class _Running:
    """One request that a node has committed to."""

    order: Order
    node: Node
    link: Link
    relay: Relay
    accepted: Accepted
    began: float
    resent: str
    first: float | None = None
    over: bool = False

    @property
    def receipt(self) -> str:
        return spoken.receipt_id(self.accepted)

    def headers(self) -> dict[str, str]:
        found = {"x-countermark-receipt": self.receipt, "x-countermark-node": self.node.address}
        if self.accepted.verdict.simulated:
            found["x-countermark-simulated"] = "true"
        if self.resent:
            found["x-countermark-resent"] = self.resent
        return found


@dataclass(slots=True, kw_only=True)
class Serving:
    """What answers need. `answers`: a thread for each; `chores`: what blocks for a moment."""

    settings: Settings
    upstream: Upstream
    ledger: Ledger
    keeper: Keeper | None
    journal: Journal
    answers: Executor
    chores: Executor
    active: int = 0
    _began: float = field(default_factory=time.monotonic)

    async def answer(self, order: Order, reply: Reply) -> None:
        """Answer one request, or raise why there is no answer, if nothing was released of one."""
        if self.active >= self.settings.streams:
            message = f"proxy: {self.settings.streams} answers are under way"
            raise Unavailable(message, code="proxy.busy", retry_after_s=1.0)
        self.active += 1
        try:
            running = await self._begin(order)
            try:
                reply.add(running.headers())
                await (self._stream if order.wanted.stream else self._whole)(running, reply)
            except (asyncio.CancelledError, ClientGone):
                self._note(running, "left")
                raise
            finally:
                running.relay.cancel()
                running.node.release(running.link)
        finally:
            self.active -= 1

    async def _begin(self, order: Order) -> _Running:
        """Find a node that commits to the request. Raises why none did."""
        began, resent, lost = time.monotonic(), "", set[str]()
        model = "" if order.wanted.model == ANY_MODEL else order.wanted.model
        while True:
            refusals: list[CountermarkError] = []
            for node in self.upstream.order(model):
                if node.address in lost:
                    continue
                try:
                    link = await node.acquire()
                except CountermarkError as err:
                    refusals.append(_said(err, f"{node.address}: {err}"))
                    continue
                relay = Relay(link.session, order.wanted.settings, self.settings.timeout_s)
                try:
                    accepted = await relay.begin(self.answers)
                except BaseException as err:
                    relay.cancel()
                    node.release(link)
                    if not isinstance(err, CountermarkError):
                        raise
                    self._judge(node, err)
                    if isinstance(err, Unavailable) and err.recorded is not Recorded.NO:
                        if not self.settings.resend:
                            raise _said(err, f"{err}; this node may have begun, so no other was asked") from err
                        lost.add(node.address)
                        resent = f"{node.address} {err.code}"
                    refusals.append(err)
                    continue
                node.model = accepted.intent.stack.model
                return _Running(
                    order=order,
                    node=node,
                    link=link,
                    relay=relay,
                    accepted=accepted,
                    began=began,
                    resent=resent,
                )
            refused = worst(refusals, BUSY)
            left_s = began + self.settings.wait_s - time.monotonic()
            wait_s = max(_MOMENT_S, getattr(refused, "retry_after_s", None) or 0.0)
            if refused.code not in BUSY or wait_s > left_s:
                raise refused
            await asyncio.sleep(wait_s)

    def _judge(self, node: Node, err: CountermarkError) -> None:
        """Raises what is not to be tried elsewhere; a node that broke a rule is given no more prompts."""
        if isinstance(err, RequestError) and err.code not in _THIS_NODE:
            raise err
        if not isinstance(err, RequestError | Unavailable):
            node.condemn(err)
            raise err

    async def _stream(self, running: _Running, reply: Reply) -> None:
        speech = Speech(running.order.wanted, running.accepted)
        held, hold = bytearray(speech.first()), running.order.hold
        if not hold:
            await reply.start(200, _STREAM)
        try:
            while isinstance(item := await running.relay.take(), Piece):
                if running.first is None:
                    running.first = time.monotonic()
                held += speech.piece(item.text, item.logprobs)
                if not hold:
                    await reply.write(bytes(held))
                    held.clear()
        except CountermarkError as err:
            self._withhold(running, err)
            if not reply.status:
                await self._refuse(err, running, reply)
                return
            await reply.cut(spoken.error_event(err, receipt=running.receipt))
            return
        said = await self._settle(running, item)
        if hold:
            await reply.start(200, _STREAM)
        await reply.write(bytes(held) + speech.last(item.answer.receipt, said, item.logprobs))
        await reply.finish()

    async def _whole(self, running: _Running, reply: Reply) -> None:
        logprobs: list[TokenLogprob] = []
        try:
            while isinstance(item := await running.relay.take(), Piece):
                if running.first is None:
                    running.first = time.monotonic()
                logprobs += item.logprobs
        except CountermarkError as err:
            self._withhold(running, err)
            await self._refuse(err, running, reply)
            return
        said = await self._settle(running, item)
        speech, answer = Speech(running.order.wanted, running.accepted), item.answer
        await reply.send_json(200, speech.whole(answer.text, answer.receipt, said, [*logprobs, *item.logprobs]))

    async def _settle(self, running: _Running, end: End) -> dict[str, Any]:
        """A verified answer: keep it if asked to, note it; what the answer says of itself."""
        answer, receipt = end.answer, end.answer.receipt
        said = receipt.as_json() | {
            "receipt": running.receipt,
            "verified": True,
            "checks": counted(receipt.checks),
            "node": running.node.address,
        }
        bundle = None
        if running.order.save:
            try:
                bundle = await self._save(answer, running.receipt)
                said["bundle"] = bundle
            except CountermarkError as err:  # the answer is verified all the same
                said |= {"bundle": None, "bundle_error": err.code}
                self.journal.note("bundle_failed", code=err.code, receipt=running.receipt)
        running.node.counts.answers += 1
        outcome = receipt.outcome
        self._note(
            running,
            "verified",
            checks=outline(receipt.checks),
            prompt_tokens=outcome.prompt_count,
            output_tokens=outcome.output_count,
            finish_reason=outcome.finish_reason,
            bundle=bundle,
        )
        return said

    async def _save(self, answer: Answer, receipt: str) -> str:
        assert self.keeper is not None
        return await asyncio.get_running_loop().run_in_executor(self.chores, self.keeper.save, answer, receipt)

    def _withhold(self, running: _Running, err: CountermarkError) -> None:
        """There is no answer: it did not verify, or it did not come to its end.

        A request that the node gave up on (a grammar that leads nowhere) says nothing of the node: else whoever may ask
        could have it left alone.
        """
        if isinstance(err, Unavailable | RequestError):
            self._note(running, "ended", code=err.code)
            return
        running.node.condemn(err)
        self._note(running, "withheld", code=err.code, step=err.step or "", checks=outline(err.checks))

    async def _refuse(self, err: CountermarkError, running: _Running, reply: Reply) -> None:
        status = 503 if isinstance(err, Unavailable) else 400 if isinstance(err, RequestError) else 502
        headers = {"x-should-retry": "false"}  # the node has begun: asking again is another request
        await reply.send_json(status, spoken.error_body(err, receipt=running.receipt), headers)

    def _note(self, running: _Running, state: str, **facts: Any) -> None:
        """One entry for each request that a node has committed to, whatever comes after."""
        if running.over:
            return
        running.over = True
        now, first = time.monotonic(), running.first
        entry = Entry(
            receipt=running.receipt,
            at=time.time(),
            route=running.order.route,
            node=running.node.address,
            model=running.accepted.intent.stack.model,
            simulated=running.accepted.verdict.simulated,
            state=state,
            seconds=round(now - running.began, 4),
            first_s=None if first is None else round(first - running.began, 4),
            **facts,
        )
        self.ledger.add(entry)
        self.journal.note(
            f"answer_{state}",
            route=entry.route,
            node=entry.node,
            receipt=entry.receipt,
            simulated=entry.simulated,
            code=entry.code or None,
            step=entry.step or None,
            ms=entry.seconds * 1000,
            first_ms=None if entry.first_s is None else entry.first_s * 1000,
            prompt_tokens=entry.prompt_tokens,
            output_tokens=entry.output_tokens,
        )


def _said(err: CountermarkError, message: str) -> CountermarkError:
    """The same error in other words."""
    if isinstance(err, Unavailable):
        said = Unavailable(message, code=err.code, retry_after_s=err.retry_after_s)
        said.recorded = err.recorded
        return said
    return type(err)(message, code=err.code, step=err.step, checks=err.checks)
