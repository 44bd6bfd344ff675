"""A recorded answer, of any node, run again on this one, and what the log then says of it.

The engine generates the answer again among everybody's requests, in a place of its queue like any other, and stops at
the first difference; so a replay needs no memory of its own and waits its turn. Compared, in this order: what the
record says of the weights' files, the assembled prompt, output tokens and fingerprints, end, text. Nothing is taken
from a cache: the run has a scope of its own, which no client can name. What came of it is a REPLAY, durable before its
receipt is sent; a run that was cancelled or failed leaves nothing.

The parts of the request are checked to be one answer: every commitment opens. Not checked here: who signed it, and that
it was in a log; whoever asked has verified the bundle, and the REPLAY names the receipt by its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Final, Protocol, TypeVar

from countermark.errors import FormatError, Undecidable, WeightsError
from countermark.formats import records
from countermark.formats.receipt import Acceptance, Answer, parse_acceptance, parse_answer, parse_receipt
from countermark.formats.records import Divergence, Epoch, Intent, Outcome, Sampling, Stack
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.connections import Attested
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Handle, Place, Prepared, TokensEvent
from countermark_appliance.engine.sampling import MAX_LOGPROBS
from countermark_appliance.gate import code_of
from countermark_appliance.generation import Engine, ended, engine_request
from countermark_appliance.operations.observing import Watcher, Watchers
from countermark_appliance.operations.watching import nothing_done

MODE: Final = "regenerate"
_SCOPE_BYTES: Final = 32
_ARTEFACT: Final = ("model", "quantisation", "adapters", "manifest_digest", "tokenizer_digest", "chat_template_digest")
T = TypeVar("T")


class Recorder(Protocol):
    """What commits: the part of `records.Recorder` a replay needs."""

    @property
    def epoch(self) -> Epoch: ...

    def commit_replay(
        self,
        *,
        nonce: bytes,
        quote_digest: bytes,
        attested_size: int,
        receipt_digest: bytes,
        mode: str,
        positions: int,
        divergence: Divergence | None,
        started_us: int,
    ) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOrder:
    """What is to be run again, and the connection it came on."""

    request: pb.ReplayRequest
    attested: Attested
    deadline: float | None  # of time.monotonic()
    watcher: Watcher = field(default_factory=Watchers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One answer whose parts belong together."""

    request: pb.GenerateRequest
    intent: Intent
    outcome: Outcome
    prompt_tokens: tuple[int, ...]
    answer: Answer


class Replaying:
    """Make one and run `run` as a task; `abandon` when nobody waits any more."""

    def __init__(self, order: ReplayOrder, *, engine: Engine, recorder: Recorder, executor: Executor) -> None:
        self._order = order
        self._engine = engine
        self._recorder = recorder
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[DoneEvent] = self._loop.create_future()
        self._handle: Handle | None = None
        self._abandoned: Finish | None = None
        self._expected: tuple[int, ...] = ()
        self._seen = 0
        self._tokens = 0, 0  # of prompt and answer, once they are known to be ours
        self._over = False  # the first difference was seen: nothing behind it is wanted
        self._gap: float | None = None

    def abandon(self, reason: Finish = Finish.CANCELLED) -> None:
        """Stop computing; `run` then raises. No effect on a replay that has ended."""
        if self._abandoned is None:
            self._abandoned = reason
            if self._handle is not None:
                self._handle.cancel()

    async def run(self) -> bytes:
        """The receipt of the REPLAY.

        Raises `FormatError` (`replay.parts`, `replay.sampling`, and of every format), `Undecidable` (`replay.redacted`,
        `replay.profile`, `replay.weights_root`, `replay.grammar`), `WeightsError` (`replay.artefact`), `RequestError`
        (the recorded request cannot be served here), `Unavailable` (`engine.busy`, `generation.*`, `log.*`).
        """
        code, began = "generation.cancelled", time.monotonic()
        try:
            receipt = await self._placed()
            code = ""
            return receipt
        except Exception as err:
            code = code_of(err)
            raise
        finally:
            self._order.watcher.ended(
                replace(
                    nothing_done(code),
                    finish="" if code else "replay",
                    prompt_tokens=self._tokens[0],
                    output_tokens=self._tokens[1],
                    total_s=time.monotonic() - began,
                )
            )

    async def _placed(self) -> bytes:
        place = self._engine.reserve(self._order.attested.quote_digest)
        try:
            recorded = await self._blocking(lambda: parse_recorded(self._order.request))
            _require_same_weights(recorded.intent.stack, self._recorder.epoch.stack)
            prepared = await self._blocking(lambda: self._prepare(recorded))
            self._tokens = len(prepared.prompt_tokens), len(recorded.answer.tokens)
            started_us = time.time_ns() // 1000
            divergence = _prompt(recorded, prepared)
            if divergence is None:
                divergence = _output(recorded, await self._compute(recorded, prepared, place), self._gap)
            return await self._blocking(lambda: self._commit(recorded, divergence, started_us))
        finally:
            place.release()

    def _prepare(self, recorded: Recorded) -> Prepared:
        """The recorded request as this engine resolves it, with the node's choices as they were made."""
        intent = recorded.intent
        _require_same_grammar(recorded, self._engine)
        request = replace(
            engine_request(recorded.request, secrets.token_bytes(_SCOPE_BYTES)),
            max_tokens=intent.max_tokens,
            seed=intent.sampling.seed,
            logprobs=MAX_LOGPROBS,  # for the gap; no bit depends on it
        )
        prepared = self._engine.prepare(request)
        resolved = {item.name: getattr(prepared.sampling, item.name) for item in fields(Sampling)}
        applied = {item.name: getattr(intent.sampling, item.name) for item in fields(Sampling)}
        resolved["seed_origin"] = applied["seed_origin"]
        if resolved != applied or (prepared.stop, prepared.ignore_eos) != (intent.stop, intent.ignore_eos):
            message = "sampling: expected the settings that the request resolves to, got others in the record"
            raise FormatError(message, code="replay.sampling")
        if prepared.stop_tokens != intent.stop_tokens:
            message = f"stop_tokens: expected {prepared.stop_tokens!r:.100} of these weights"
            raise WeightsError(f"{message}, got {intent.stop_tokens!r:.100} in the record", code="replay.artefact")
        return prepared

    async def _compute(self, recorded: Recorded, prepared: Prepared, place: Place) -> DoneEvent:
        if self._abandoned is not None:
            raise ended(self._abandoned)
        deadline = self._order.deadline
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._expected = recorded.answer.tokens
        self._handle = self._engine.submit(prepared, self._sink, left_s, place)
        if self._over:  # seen before there was a handle to cancel it by
            self._handle.cancel()
        done = await self._done
        stopped_by_us = self._over and done.reason is Finish.CANCELLED and self._abandoned is None
        if done.reason.value in records.ABORT_REASONS and not stopped_by_us:
            raise ended(self._abandoned if done.reason is Finish.CANCELLED and self._abandoned else done.reason)
        return done

    def _sink(self, event: Event) -> None:
        """Called on the engine's thread."""
        match event:
            case TokensEvent() if not self._over:
                for at, token in enumerate(event.ids):
                    expected = self._expected[self._seen] if self._seen < len(self._expected) else None
                    self._seen += 1
                    if token == expected:
                        continue
                    self._over = True
                    if event.logprobs and expected is not None:
                        found = dict(event.logprobs[at].top).get(expected)
                        self._gap = None if found is None else event.logprobs[at].logprob - found
                    if self._handle is not None:
                        self._handle.cancel()
                    return
            case DoneEvent():
                self._loop.call_soon_threadsafe(self._done.set_result, event)

    def _commit(self, recorded: Recorded, divergence: Divergence | None, started_us: int) -> bytes:
        return self._recorder.commit_replay(
            nonce=self._order.request.nonce,
            quote_digest=self._order.attested.quote_digest,
            attested_size=self._order.attested.log_size,
            receipt_digest=hashlib.sha256(self._order.request.receipt).digest(),
            mode=MODE,
            positions=len(recorded.answer.tokens),
            divergence=divergence,
            started_us=started_us,
        )

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._executor, call)


def parse_recorded(request: pb.ReplayRequest) -> Recorded:
    """The answer in a request. Raises `FormatError` (`replay.parts`: the parts are not of one answer; and of every
    format), `RequestError`, `Undecidable` (`replay.redacted`)."""
    asked = codec.parse_generate_request(request.request)
    acceptance, answer = parse_acceptance(request.accepted), parse_answer(request.answer)
    payload = parse_receipt(request.receipt).payload
    if not isinstance(acceptance, Acceptance) or not isinstance(answer, Answer):
        raise Undecidable("answer: expected prompt and output, got some left out", code="replay.redacted")
    intent, outcome = records.parse_intent(acceptance.record), records.parse_outcome(payload.outcome.record)
    leaf = records.leaf_for(intent, acceptance.record, acceptance.leaf_salt, acceptance.leaf_index)
    if payload.intent.record != acceptance.record or outcome.intent_leaf != records.leaf_digest(leaf):
        raise _not_one("INTENT and OUTCOME")
    committed: tuple[tuple[Intent | Outcome, bytes, dict[str, bytes]], ...] = (
        (
            intent,
            acceptance.field_salts,
            {
                "prompt": codec.input_value(asked),
                "prompt_tokens": records.encode_tokens(acceptance.prompt_tokens),
                "raw_request": request.request,
                **_retrieved(asked),
                **_constrained(asked),
            },
        ),
        (
            outcome,
            answer.field_salts,
            {
                "fingerprints": b"".join(answer.fingerprints),
                "output_text": answer.text.encode(),
                "output_tokens": records.encode_tokens(answer.tokens),
            },
        ),
    )
    for record, encoded, values in committed:
        salts = records.parse_salts(encoded, tuple(values))
        for name, value in values.items():
            if records.field_commitment(name, salts[name], value) != _committed(record, name):
                raise _not_one(name)
    return Recorded(
        request=asked, intent=intent, outcome=outcome, prompt_tokens=acceptance.prompt_tokens, answer=answer
    )


def _retrieved(asked: pb.GenerateRequest) -> dict[str, bytes]:
    found = codec.retrieval(asked)
    return {} if found is None else {f"retrieval.{part}": value for part, value in found.values().items()}


def _constrained(asked: pb.GenerateRequest) -> dict[str, bytes]:
    found = codec.grammar(asked)
    return {} if found is None else dict.fromkeys(records.GRAMMAR_FIELDS, found[1].encode())


def _committed(record: Intent | Outcome, name: str) -> bytes | None:
    """A commitment by its name; None where the record has none of that name."""
    outer, _, inner = name.partition(".")
    value = getattr(record, outer)
    return getattr(value, inner, None) if inner else value


def _not_one(what: str) -> FormatError:
    return FormatError(f"{what}: expected what the records of this answer commit to, got other", code="replay.parts")


def _require_same_weights(recorded: Stack, local: Stack) -> None:
    if recorded.profile != local.profile:
        message = f"profile: expected {recorded.profile}, this node executes {local.profile}"
        raise Undecidable(message, code="replay.profile")
    if recorded.weights_root != local.weights_root:
        message = f"weights root: expected {recorded.weights_root.hex()}, this node has {local.weights_root.hex()}"
        raise Undecidable(message, code="replay.weights_root")
    for name in _ARTEFACT:
        if getattr(recorded, name) != getattr(local, name):
            message = f"{name}: expected {getattr(local, name)!r:.100} of these weights"
            raise WeightsError(f"{message}, got {getattr(recorded, name)!r:.100} in the record", code="replay.artefact")


def _require_same_grammar(recorded: Recorded, engine: Engine) -> None:
    grammar, asked = recorded.intent.grammar, codec.grammar(recorded.request)
    if (None if grammar is None else grammar.kind) != (None if asked is None else asked[0]):
        raise _not_one("grammar")
    if grammar is not None and (grammar.library, grammar.version, grammar.rules) != astuple(engine.grammar_library):
        local = engine.grammar_library
        named = f"{grammar.library} {grammar.version} (rules {grammar.rules})"
        message = f"grammar: expected {named}, as recorded, got {local.library} {local.version} (rules {local.rules})"
        raise Undecidable(message, code="replay.grammar")


def _prompt(recorded: Recorded, prepared: Prepared) -> Divergence | None:
    for position, (theirs, ours) in enumerate(zip_longest(recorded.prompt_tokens, prepared.prompt_tokens)):
        if theirs != ours:
            return _differs("prompt_tokens", position, theirs, ours)
    return None


def _output(recorded: Recorded, done: DoneEvent, gap: float | None) -> Divergence | None:
    answer = recorded.answer
    theirs = zip(answer.tokens, answer.fingerprints, strict=True)
    ours = zip(done.output_tokens, done.fingerprints, strict=True)
    for position, (a, b) in enumerate(zip_longest(theirs, ours, fillvalue=(None, None))):
        if a != b:
            same = a[0] == b[0]
            found = _differs("diverged", position, a[0], b[0], gap=0.0 if same else gap)
            return replace(found, fingerprint_equal=a[1] == b[1])
    if done.reason.value != recorded.outcome.finish_reason:
        return _differs("finish_reason", max(0, len(answer.tokens) - 1))
    for position, (one, other) in enumerate(zip_longest(done.text, answer.text)):
        if one != other:
            return _differs("text", position)
    return None


def _differs(
    part: str, position: int, recorded: int | None = None, local: int | None = None, *, gap: float | None = None
) -> Divergence:
    return Divergence(
        part=part,
        position=position,
        recorded_token=recorded,
        local_token=local,
        fingerprint_equal=True,
        logit_gap=gap,
    )
