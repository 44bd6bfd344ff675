"""One request's life on the server, from INTENT to its end, whether or not the client stays to listen.

Order: a place in the engine's queue · resolve the request · INTENT durable · Accepted · the engine computes · OUTCOME
and receipt, or ABORT. A busy engine refuses before anything is recorded. The life is a task of its own and the stream
only reads from it, so a client that stops reading delays nothing but itself, and one that leaves still gets its ABORT
recorded. Tokens not yet taken wait as one growing message: the first goes out at once, later ones at most every
`COALESCE_S`.

Runs on one event loop; what blocks (tokenising, fsync, signing) runs on the executor. Holds prompts: logs none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from countermark.errors import CountermarkError, RequestError, Unavailable
from countermark.formats.records import ABORT_REASONS, PlainGrammar, Sampling
from countermark.formats.retrieval import RetrievalSet
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.connections import Attested
from countermark_appliance.engine.grammar import GrammarLibrary
from countermark_appliance.engine.request import (
    DoneEvent,
    Event,
    Finish,
    Handle,
    Message,
    Place,
    Prepared,
    Request,
    Sink,
    TokenLogprob,
    TokensEvent,
)
from countermark_appliance.faults import describe
from countermark_appliance.operations.observing import Ended, Watcher, Watchers
from countermark_appliance.records.recorder import Committed, Completed

COALESCE_S: Final = 0.02
MESSAGE_IDS: Final = 8192
"""Of one Tokens message: what waits for a client that does not read may be more than a message can hold."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine(Protocol):
    """What computes: `engine.Engine`."""

    @property
    def grammar_library(self) -> GrammarLibrary: ...

    def reserve(self, client: bytes = b"") -> Place: ...

    def prepare(self, request: Request) -> Prepared: ...

    def submit(
        self, prepared: Prepared, sink: Sink, deadline_s: float | None = None, place: Place | None = None
    ) -> Handle: ...


class Recorder(Protocol):
    """What commits: the part of `records.Recorder` a request needs."""

    def commit_intent(
        self,
        *,
        nonce: bytes,
        quote_digest: bytes,
        attested_size: int,
        raw_request: bytes,
        prompt: bytes,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        stop_tokens: Sequence[int],
        ignore_eos: bool,
        logprobs: bool = False,
        retrieval: RetrievalSet | None = None,
        grammar: PlainGrammar | None = None,
    ) -> Committed: ...

    def commit_outcome(
        self,
        committed: Committed,
        *,
        output_tokens: Sequence[int],
        output_text: str,
        fingerprints: Sequence[bytes],
        finish_reason: str,
        cached_tokens: int,
        first_token_time: float | None,
        end_time: float,
    ) -> Completed: ...

    def commit_abort(self, committed: Committed, *, reason: str, tokens_sent: int, end_time: float) -> None: ...

    def receipt(self, completed: Completed) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be generated: the request as received and as parsed, and the connection it came on."""

    raw: bytes
    request: pb.GenerateRequest
    attested: Attested
    deadline: float | None  # of time.monotonic()
    watcher: Watcher = field(default_factory=Watchers)


class Generation:
    """Make one, run `run` as a task, read `messages`. `abandon` when nobody reads any more."""

    def __init__(self, order: Order, *, engine: Engine, recorder: Recorder, executor: Executor) -> None:
        self._order = order
        self._engine = engine
        self._recorder = recorder
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[bytes] = self._loop.create_future()
        self._last: asyncio.Future[bytes] = self._loop.create_future()
        self._done: asyncio.Future[DoneEvent] = self._loop.create_future()
        for future in (self._accepted, self._last):
            future.add_done_callback(_retrieve)  # nobody may be left to read it
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()  # over what the engine's thread adds and the stream takes:
        self._ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._woken = False
        self._tokens_sent = 0
        self._handle: Handle | None = None
        self._abandoned: Finish | None = None
        self._began, self._began_at = time.monotonic(), time.time()
        self._accepted_s: float | None = None
        self._prompt_tokens = 0
        self._failure: CountermarkError | None = None

    def abandon(self, reason: Finish = Finish.CANCELLED) -> None:
        """The client is gone, or out of time: stop computing. No effect on a request that has ended."""
        if self._abandoned is None:
            self._abandoned = reason
            if self._handle is not None:
                self._handle.cancel()

    async def run(self) -> None:
        """The life; never raises for what went wrong with the request: `messages` does."""
        try:
            await self._placed()
        finally:
            self._order.watcher.ended(self._ended())

    async def _placed(self) -> None:
        try:
            place = self._engine.reserve(self._scope)
        except CountermarkError as err:
            self._fail(err)
            return
        try:
            await self._live(place)
        finally:
            place.release()  # the engine has done so where it got it

    @property
    def _scope(self) -> bytes:
        """One for each connection: nobody's prompt is told by another's latency or count of cached tokens."""
        return self._order.attested.quote_digest

    async def _live(self, place: Place) -> None:
        try:
            request = engine_request(self._order.request, self._scope)
            prepared = await self._blocking(lambda: self._engine.prepare(request))
            if self._abandoned is not None:
                raise ended(self._abandoned)
            committed = await self._blocking(lambda: self._commit_intent(prepared))
            self._prompt_tokens, self._accepted_s = len(prepared.prompt_tokens), time.monotonic() - self._began
            self._order.watcher.accepted()
        except Exception as err:  # noqa: BLE001  the stream must get its end, whatever happened
            self._fail(err)
            return
        reason = Finish.ERROR
        try:
            done = await self._compute(prepared, committed, place)
            reason = done.reason
            if done.detail and not done.by_grammar:
                _log.error("generation: %s", done.detail)
            if done.by_grammar:
                raise RequestError(f"generation: {done.detail}", code="generation.grammar")
            if reason.value in ABORT_REASONS:
                raise ended(self._abandoned if reason is Finish.CANCELLED and self._abandoned else reason)
            self._last.set_result(await self._blocking(lambda: self._finish(committed, done)))
        except Exception as err:  # noqa: BLE001
            # The answer is lost, whatever the cause; the log must say that it ended. An OUTCOME that could not be
            # written (`log.full`) leaves its INTENT open, and ABORT is tried for it in turn.
            with contextlib.suppress(CountermarkError):
                await self._blocking(lambda: self._abort(committed, self._reason(reason)))
            self._fail(err)

    async def messages(self) -> AsyncIterator[bytes]:
        """The stream: Accepted, tokens, Finished. Raises what ended the request, if not that."""
        yield await asyncio.shield(self._accepted)
        sent = -COALESCE_S
        while True:
            await self._arrived.wait()
            wait_s = sent + COALESCE_S - self._loop.time()
            if wait_s > 0 and not self._done.done():
                await asyncio.wait({self._done}, timeout=wait_s)
            self._arrived.clear()
            if self._ids or self._text:
                sent = self._loop.time()
                yield self._take()
                if self._ids:  # more than one message holds, or come meanwhile
                    self._arrived.set()
            ended = self._done.done() or self._last.done()
            if ended and not self._ids and not self._text:
                yield await asyncio.shield(self._last)
                return

    async def _compute(self, prepared: Prepared, committed: Committed, place: Place) -> DoneEvent:
        if self._abandoned is not None:
            raise ended(self._abandoned)
        deadline = self._order.deadline
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._handle = self._engine.submit(prepared, self._sink, left_s, place)
        self._accepted.set_result(codec.encode_accepted(committed.acceptance))
        return await self._done

    def _sink(self, event: Event) -> None:
        """Called on the engine's thread, for every token: no more than one wake-up for each message that is sent."""
        match event:
            case TokensEvent():
                with self._lock:
                    self._ids.extend(event.ids)
                    self._text.append(event.text)
                    self._logprobs.extend(event.logprobs)
                    woken, self._woken = self._woken, True
                if not woken:
                    self._call_soon(self._arrived.set)
            case DoneEvent():
                self._call_soon(self._on_done, event)

    def _call_soon(self, call: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has closed has nobody left to tell
            self._loop.call_soon_threadsafe(call, *args)

    def _on_done(self, event: DoneEvent) -> None:
        self._done.set_result(event)
        self._arrived.set()

    def _take(self) -> bytes:
        with self._lock:
            ids, self._ids = self._ids[:MESSAGE_IDS], self._ids[MESSAGE_IDS:]
            logprobs, self._logprobs = self._logprobs[:MESSAGE_IDS], self._logprobs[MESSAGE_IDS:]
            text, self._text = self._text, []
            self._woken = False
        self._tokens_sent += len(ids)
        tokens = pb.Tokens(ids=ids, text="".join(text), logprobs=map(_logprob, logprobs))
        return pb.GenerateResponse(tokens=tokens).SerializeToString()

    def _commit_intent(self, prepared: Prepared) -> Committed:
        sampling = prepared.sampling
        return self._recorder.commit_intent(
            nonce=self._order.request.nonce,
            quote_digest=self._order.attested.quote_digest,
            attested_size=self._order.attested.log_size,
            raw_request=self._order.raw,
            prompt=codec.input_value(self._order.request),
            prompt_tokens=prepared.prompt_tokens,
            sampling=Sampling(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p_20bit=sampling.top_p_20bit,
                min_p_20bit=sampling.min_p_20bit,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=sampling.logit_bias,
                seed=sampling.seed,
                seed_origin=sampling.seed_origin,
            ),
            max_tokens=prepared.max_tokens,
            stop=prepared.stop,
            stop_tokens=prepared.stop_tokens,
            ignore_eos=prepared.ignore_eos,
            logprobs=prepared.logprobs > 0,
            retrieval=codec.retrieval(self._order.request),
            grammar=self._grammar(),
        )

    def _grammar(self) -> PlainGrammar | None:
        asked = codec.grammar(self._order.request)
        if asked is None:
            return None
        kind, text = asked
        by = self._engine.grammar_library
        return PlainGrammar(kind=kind, text=text, library=by.library, version=by.version, rules=by.rules)

    def _finish(self, committed: Committed, done: DoneEvent) -> bytes:
        completed = self._recorder.commit_outcome(
            committed,
            output_tokens=done.output_tokens,
            output_text=done.text,
            fingerprints=done.fingerprints,
            finish_reason=done.reason.value,
            cached_tokens=done.cached_tokens,
            first_token_time=done.first_token_time,
            end_time=done.end_time,
        )
        finished = pb.Finished(
            receipt=self._recorder.receipt(completed),
            field_salts=completed.field_salts,
            fingerprints=done.fingerprints,
        )
        return pb.GenerateResponse(finished=finished).SerializeToString()

    def _abort(self, committed: Committed, reason: str) -> None:
        self._recorder.commit_abort(committed, reason=reason, tokens_sent=self._tokens_sent, end_time=time.time())

    def _reason(self, reason: Finish) -> str:
        if self._abandoned is not None and reason in (Finish.CANCELLED, Finish.ERROR):
            reason = self._abandoned
        return reason.value if reason.value in ABORT_REASONS else Finish.ERROR.value

    def _fail(self, err: Exception) -> None:
        if not isinstance(err, CountermarkError):
            # Type and place only: the message of a stray exception may quote what it choked on.
            _log.error("generation: unexpected %s", describe(err))
            err = Unavailable("server: internal error", code="server.internal")
        self._failure = err
        for future in (self._accepted, self._last):
            if not future.done():
                future.set_exception(err)
        self._arrived.set()

    def _ended(self) -> Ended:
        done = self._done.result() if self._done.done() and not self._done.cancelled() else None
        first = None if done is None else done.first_token_time
        return Ended(
            code="" if self._failure is None else self._failure.code,
            finish="" if done is None else done.reason.value,
            prompt_tokens=self._prompt_tokens,
            output_tokens=0 if done is None else len(done.output_tokens),
            cached_tokens=0 if done is None else done.cached_tokens,
            accepted_s=self._accepted_s,
            first_token_s=None if first is None else max(0.0, first - self._began_at),
            total_s=time.monotonic() - self._began,
        )

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._executor, call)


def ended(reason: Finish) -> Unavailable:
    text = {Finish.CANCELLED: "cancelled", Finish.DEADLINE: "out of time", Finish.SHUTDOWN: "server stopping"}
    return Unavailable(f"generation: {text.get(reason, 'engine error')}", code=f"generation.{reason.value}")


def _retrieve(future: asyncio.Future[bytes]) -> None:
    if not future.cancelled():
        future.exception()


def _logprob(value: TokenLogprob) -> pb.Logprob:
    return pb.Logprob(logprob=value.logprob, top=[pb.Likely(id=i, logprob=number) for i, number in value.top])


def engine_request(request: pb.GenerateRequest, scope: bytes) -> Request:
    sampling, chat = request.sampling, request.WhichOneof("input") == "chat"
    turns = tuple(Message(role=turn.role, content=turn.content) for turn in request.chat.messages)
    return Request(
        model=request.model,
        prompt=None if chat else request.prompt,
        messages=turns if chat else None,
        max_tokens=_given(request, "max_tokens"),
        stop=tuple(request.stop),
        temperature=_given(sampling, "temperature"),
        top_k=_given(sampling, "top_k"),
        top_p=_given(sampling, "top_p"),
        min_p=_given(sampling, "min_p"),
        repetition_penalty=_given(sampling, "repetition_penalty"),
        presence_penalty=_given(sampling, "presence_penalty"),
        frequency_penalty=_given(sampling, "frequency_penalty"),
        logit_bias=dict(sampling.logit_bias),
        seed=_given(sampling, "seed"),
        ignore_eos=_given(request, "ignore_eos"),
        logprobs=_given(request, "logprobs"),
        values=dict(request.chat.values),
        grammar=codec.grammar(request),
        scope=scope,
    )


def _given(message: pb.GenerateRequest | pb.Sampling, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
