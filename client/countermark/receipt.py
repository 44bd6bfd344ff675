"""Check what an appliance committed to before it answered, and the receipt of the answer, against a Verdict.

Formats: `formats.records`, `formats.receipt` (COSE_Sign, RFC 9052; ML-DSA as RFC 9964), `tlog` (RFC 9162, C2SP). The
steps continue the appraisal's numbers:

12 the INTENT is of this boot and this connection's evidence, and of our request: nonce, bytes, input, token ids
13 it runs on the appraised stack, and every setting we gave is recorded as given
14 it stands in the log: inclusion proof, checkpoint under both log keys, after the attested head
15 the receipt carries exactly our two signatures, both hold under the attested keys
16 it is about the accepted INTENT, and the OUTCOME is that INTENT's
17 the OUTCOME commits to exactly the tokens, text and fingerprints that were streamed; counts and end fit
18 INTENT and OUTCOME stand in one log that grew from the attested head and the accepted checkpoint

Of a redacted bundle, steps 12, 13 and 17 check what is there and end as SKIP, saying what they could not open.

Not checked here: that prompt and text are what their tokens spell, that the tokens are what the model gives, and that a
stop string was reached: replay does all of that, with the weights. Witness cosignatures: without them a log shown only
to us cannot be told from the one shown to others.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any, NoReturn

from countermark import numerics
from countermark.appraise import Verdict
from countermark.asked import Asked, check_settings, parse_request
from countermark.checks import Check, Status
from countermark.errors import CountermarkError, LogError, ReceiptError, VerificationError, WeightsError
from countermark.formats import records
from countermark.formats.receipt import (
    SIGNERS,
    Acceptance,
    Answer,
    Payload,
    Placed,
    Reply,
    Signed,
    parse_receipt,
    thumbprint,
)
from countermark.formats.records import Intent, Leaf, Outcome, Stack
from countermark.tlog import merkle
from countermark.tlog.checkpoint import ED25519, Checkpoint, LogKeys, verify_checkpoint

_SEAL = object()
_SIGNER_ROLES = ("receipt-es256", "receipt-ml-dsa-65")


class Sealed:
    """A result only its verifier makes: no pickle, no copy, no `dataclasses.replace`."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: verify again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Sealed):
    """A checked INTENT: the appliance had committed to a request, durably, before any token.

    `checks`: those of the verdict, then ours.
    """

    verdict: Verdict
    acceptance: Acceptance | Placed
    intent: Intent
    leaf: bytes  # leaf hash
    checkpoint: Checkpoint
    checks: tuple[Check, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        _require_seal(seal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(Committed):
    """A checked INTENT that is our request's."""

    acceptance: Acceptance
    request: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactedReceipt(Sealed):
    """A checked receipt with what it vouches for, as far as that was not left out. `receipt`: the COSE_Sign bytes."""

    accepted: Committed
    outcome: Outcome
    answer: Answer | Reply | None
    receipt: bytes
    checkpoint: Checkpoint
    checks: tuple[Check, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        _require_seal(seal)

    @property
    def verdict(self) -> Verdict:
        return self.accepted.verdict

    @property
    def intent(self) -> Intent:
        return self.accepted.intent

    def as_json(self) -> dict[str, Any]:
        """What the receipt says, JSON-ready: no prompt, no output."""
        intent, outcome, sampling = self.intent, self.outcome, self.intent.sampling
        return {
            "simulated": self.verdict.simulated,
            "request_id": intent.request_id.hex(),
            "model": intent.stack.model,
            "weights_root": intent.stack.weights_root.hex(),
            "profile": intent.stack.profile,
            "seed": sampling.seed,
            "seed_origin": sampling.seed_origin,
            "temperature": sampling.temperature,
            "tokens": {
                "prompt": outcome.prompt_count,
                "cached": outcome.cached_count,
                "output": outcome.output_count,
            },
            "finish_reason": outcome.finish_reason,
            "log": {
                "origin": self.checkpoint.origin,
                "size": self.checkpoint.size,
                "intent": self.accepted.acceptance.leaf_index,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedReceipt(RedactedReceipt):
    """A checked receipt with everything it vouches for."""

    accepted: Accepted
    answer: Answer


def verify_accepted(acceptance: Acceptance, verdict: Verdict, request: bytes) -> Accepted:
    """Steps 12 to 14: check the first message of a stream before any token is used.

    `request`: the exact bytes sent. Raises `FormatError`, `ReceiptError` (`receipt.*`), `WeightsError`
    (`receipt.weights_root`) or `LogError` (`log.*`); the error carries the checks made so far.
    """
    steps = begin(verdict)
    intent, leaf, checkpoint = _verify_intent(steps, acceptance, verdict, request)
    return Accepted(
        verdict=verdict,
        request=request,
        acceptance=acceptance,
        intent=intent,
        leaf=leaf,
        checkpoint=checkpoint,
        checks=steps.done,
        seal=_SEAL,
    )


def verify_receipt(
    receipt: bytes, verdict: Verdict, *, request: bytes, accepted: Accepted, answer: Answer
) -> CheckedReceipt:
    """Steps 15 to 18: check the receipt of the answer that was streamed.

    `request` and `verdict` must be those `accepted` was checked against. Raises `FormatError`, `ReceiptError`
    (`receipt.*`) or `LogError` (`log.*`); the error carries the checks made so far.
    """
    _require_verdict(verdict)
    if accepted.verdict is not verdict or accepted.request != request:
        raise ReceiptError("accepted: expected the one of this verdict and request", code="receipt.session", step="15")
    steps = Steps(accepted.checks)
    outcome, checkpoint = _verify_outcome(steps, receipt, accepted, answer)
    return CheckedReceipt(
        accepted=accepted,
        outcome=outcome,
        answer=answer,
        receipt=receipt,
        checkpoint=checkpoint,
        checks=steps.done,
        seal=_SEAL,
    )


def verify_redacted(
    receipt: bytes,
    verdict: Verdict,
    *,
    request: bytes | None,
    acceptance: Acceptance | Placed,
    answer: Answer | Reply | None,
) -> RedactedReceipt:
    """Steps 12 to 18 of what is left of an answer; `request` is None exactly when `acceptance` is `Placed`.

    Raises as `verify_accepted` and `verify_receipt`.
    """
    if isinstance(acceptance, Acceptance) is (request is None):
        raise TypeError("request: expected it exactly with the acceptance that opens it")
    steps = begin(verdict)
    intent, leaf, accepted_checkpoint = _verify_intent(steps, acceptance, verdict, request)
    committed = Committed(
        verdict=verdict,
        acceptance=acceptance,
        intent=intent,
        leaf=leaf,
        checkpoint=accepted_checkpoint,
        checks=steps.done,
        seal=_SEAL,
    )
    outcome, checkpoint = _verify_outcome(steps, receipt, committed, answer)
    return RedactedReceipt(
        accepted=committed,
        outcome=outcome,
        answer=answer,
        receipt=receipt,
        checkpoint=checkpoint,
        checks=steps.done,
        seal=_SEAL,
    )


class Steps:
    """Collects one `Check` a step after those `before`; an error that ends a step takes them all with it."""

    def __init__(self, before: tuple[Check, ...]) -> None:
        self._checks: list[Check] = list(before)

    @property
    def done(self) -> tuple[Check, ...]:
        return tuple(self._checks)

    def skip(self, number: str, name: str, detail: str) -> None:
        """Record a step that was not made; it never counts as a pass."""
        self._checks.append(Check(step=number, name=name, status=Status.SKIP, detail=detail))

    @contextmanager
    def step(self, number: str, name: str, *, without: str = "") -> Iterator[list[str]]:
        """Run one step; what it appends to the yielded list becomes the check's detail.

        `without`: what the step could not look at. It then ends as SKIP or FAIL, never as PASS.
        """
        details: list[str] = []
        try:
            yield details
        except CountermarkError as err:
            failed = Check(step=number, name=name, status=Status.FAIL, detail=str(err), code=err.code)
            err.step, err.checks = number, (*self._checks, failed)
            raise
        status = Status.SKIP if without else Status.PASS
        detail = "; ".join([f"not looked at, since left out: {without}", *details] if without else details)
        self._checks.append(Check(step=number, name=name, status=status, detail=detail))


def begin(verdict: Verdict) -> Steps:
    """Steps that follow those of the verdict."""
    _require_verdict(verdict)
    return Steps(verdict.checks)


def _verify_intent(
    steps: Steps, acceptance: Acceptance | Placed, verdict: Verdict, request: bytes | None
) -> tuple[Intent, bytes, Checkpoint]:
    """Steps 12 to 14: the INTENT, its leaf hash, its checkpoint."""
    without = "" if request is not None else "request and prompt tokens"
    with steps.step("12", "the request was committed to, on this connection's evidence", without=without) as detail:
        intent = records.parse_intent(acceptance.record)
        asked = None if request is None else parse_request(request)
        same("boot id", verdict.boot_id, intent.boot_id, "receipt.boot")
        same("quote digest", verdict.quote_digest, intent.quote_digest, "receipt.quote")
        detail.append(f"request {intent.request_id.hex()}")
        if request is not None and asked is not None and isinstance(acceptance, Acceptance):
            _check_request(intent, asked, acceptance, request)
            detail.append(f"{len(acceptance.prompt_tokens)} prompt tokens")
    without = "" if request is not None else "the settings as asked"
    with steps.step("13", "appraised stack, settings as asked", without=without) as detail:
        check_stack(intent.stack, verdict)
        sampling = intent.sampling
        detail.append(f"{intent.stack.model}, {intent.stack.profile}; temperature {sampling.temperature:g}")
        detail.append(f"seed {sampling.seed} ({sampling.seed_origin})")
        if asked is not None:
            check_settings(asked, intent)
            detail.append(f"{len(asked.settings)} settings as given or by default")
    with steps.step("14", "INTENT in the log before the first token") as detail:
        checkpoint = open_checkpoint(acceptance.checkpoint, verdict)
        leaf = records.leaf_for(intent, acceptance.record, acceptance.leaf_salt, acceptance.leaf_index)
        hashed = verify_leaf(leaf, acceptance.proof, checkpoint)
        if acceptance.leaf_index < verdict.claims.log_size:
            message = f"leaf index: expected at least the attested log size {verdict.claims.log_size}"
            raise LogError(f"{message}, got {acceptance.leaf_index}", code="log.stale")
        detail.append(f"leaf {acceptance.leaf_index} of {checkpoint.size}; {checkpoint.origin}")
    return intent, hashed, checkpoint


def _verify_outcome(
    steps: Steps, receipt: bytes, accepted: Committed, answer: Answer | Reply | None
) -> tuple[Outcome, Checkpoint]:
    """Steps 15 to 18: the OUTCOME and the receipt's checkpoint."""
    verdict = accepted.verdict
    with steps.step("15", "receipt signed by both attested keys") as detail:
        parsed = parse_receipt(receipt)
        detail.extend(verify_signatures(parsed, verdict))
    payload = parsed.payload
    with steps.step("16", "the accepted INTENT and its OUTCOME"):
        outcome = _check_link(payload, accepted)
    there = {"tokens and text": answer is not None, "fingerprints": isinstance(answer, Answer)}
    without = ", ".join(name for name, held in there.items() if not held)
    with steps.step("17", "the answer that was streamed", without=without) as detail:
        _check_answer(outcome, answer, accepted)
        held = ", ".join(name for name, held in there.items() if held) or "counts and end alone"
        detail.append(f"{outcome.output_count} tokens: {held}; finish reason {outcome.finish_reason}")
    with steps.step("18", "one log, grown from the attested head") as detail:
        checkpoint = _check_log(payload, outcome, accepted)
        detail.append(f"sizes {verdict.claims.log_size}, {accepted.checkpoint.size}, {checkpoint.size}")
    return outcome, checkpoint


def _check_request(intent: Intent, asked: Asked, acceptance: Acceptance, request: bytes) -> None:
    same("nonce", asked.nonce, intent.nonce, "receipt.nonce")
    if (asked.retrieval is None) != (intent.retrieval is None):
        message = "retrieval: expected in the record exactly what the request has of it"
        raise ReceiptError(message, code="receipt.retrieval")
    kinds = (None if asked.grammar is None else asked.grammar[0], intent.grammar and intent.grammar.kind)
    if kinds[0] != kinds[1]:
        message = f"grammar: expected {kinds[0]}, as asked, got {kinds[1]} recorded"
        raise ReceiptError(message, code="receipt.grammar")
    salts = records.parse_salts(acceptance.field_salts, intent.salted)
    tokens = records.encode_tokens(acceptance.prompt_tokens)
    for name, value, code in (
        ("raw_request", request, "receipt.request"),
        ("prompt", asked.prompt, "receipt.input"),
        ("prompt_tokens", tokens, "receipt.prompt_tokens"),
    ):
        same(name, records.field_commitment(name, salts[name], value), getattr(intent, name), code)
    for part, value in (asked.retrieval.values() if asked.retrieval is not None else {}).items():
        name = f"retrieval.{part}"
        same(
            name,
            records.field_commitment(name, salts[name], value),
            getattr(intent.retrieval, part),
            "receipt.retrieval",
        )
    if asked.grammar is not None and intent.grammar is not None:
        (name,), text = records.GRAMMAR_FIELDS, asked.grammar[1].encode()
        same(name, records.field_commitment(name, salts[name], text), intent.grammar.text, "receipt.grammar")


def check_stack(stack: Stack, verdict: Verdict) -> None:
    """A record's stack is the appraised one. Raises `ReceiptError` (`receipt.*`), `WeightsError`."""
    if stack.platform != verdict.platform.value:
        raise ReceiptError(
            f"platform: expected {verdict.platform.value}, got {stack.platform}", code="receipt.platform"
        )
    same("weights root", verdict.weights_root, stack.weights_root, "receipt.weights_root", WeightsError)
    same("image id", verdict.image_id, stack.image_id, "receipt.image_id")
    same("config digest", verdict.claims.config, stack.config_digest, "receipt.config")
    if stack.profile != verdict.profile:
        raise ReceiptError(f"profile: expected {verdict.profile}, got {stack.profile}", code="receipt.profile")
    promised = numerics.PROFILES.get(stack.profile)
    if promised is not None and (stack.determinism, stack.claims) != (promised.determinism, promised.claims):
        wanted = f"{', '.join(promised.claims)}, as {stack.profile} promises"
        message = f"claims: expected {wanted}, got {stack.claims!r:.100}"
        raise ReceiptError(message, code="receipt.profile")
    same("kernel digest", verdict.kernel_digest, stack.kernel_digest, "receipt.kernel_digest")


def _check_link(payload: Payload, accepted: Committed) -> Outcome:
    acceptance, intent = accepted.acceptance, payload.intent
    if (intent.record, intent.salt, intent.index) != (
        acceptance.record,
        acceptance.leaf_salt,
        acceptance.leaf_index,
    ):
        raise ReceiptError("intent: expected the one accepted before the first token", code="receipt.intent")
    outcome = records.parse_outcome(payload.outcome.record)
    same("boot id of the OUTCOME", accepted.intent.boot_id, outcome.boot_id, "receipt.boot")
    same("INTENT leaf", accepted.leaf, outcome.intent_leaf, "receipt.outcome")
    if payload.outcome.index <= intent.index:
        raise ReceiptError("outcome: expected after its INTENT in the log", code="receipt.order")
    return outcome


def _check_answer(outcome: Outcome, answer: Answer | Reply | None, accepted: Committed) -> None:
    values: dict[str, bytes] = {}
    if answer is not None:
        values = {"output_tokens": records.encode_tokens(answer.tokens), "output_text": answer.text.encode()}
    if isinstance(answer, Answer):
        values["fingerprints"] = b"".join(answer.fingerprints)
    salts = {} if answer is None else records.parse_salts(answer.field_salts, tuple(values))
    for name, value in values.items():
        commitment = records.field_commitment(name, salts[name], value)
        same(name, commitment, getattr(outcome, name), f"receipt.{name}")
    intent, acceptance = accepted.intent, accepted.acceptance
    counts = [(len(acceptance.prompt_tokens), outcome.prompt_count)] if isinstance(acceptance, Acceptance) else []
    if answer is not None:
        counts.append((len(answer.tokens), outcome.output_count))
    if isinstance(answer, Answer):
        counts.append((len(answer.fingerprints), outcome.output_count))
    if any(count != recorded for count, recorded in counts):
        raise ReceiptError("token counts: expected those of the answer", code="receipt.counts")
    if isinstance(answer, Answer) and any(len(item) != records.FINGERPRINT_BYTES for item in answer.fingerprints):
        message = f"fingerprints: expected {records.FINGERPRINT_BYTES} bytes for each token"
        raise ReceiptError(message, code="receipt.fingerprints")
    if outcome.cached_count > outcome.prompt_count or outcome.output_count > intent.max_tokens:
        raise ReceiptError("token counts: expected within prompt and max_tokens", code="receipt.counts")
    _check_end(outcome, intent, answer)


def _check_end(outcome: Outcome, intent: Intent, answer: Reply | None) -> None:
    """As far as token ids and text show it: the answer ends where the INTENT makes it end, and not later.

    Whether a stop string was reached only the tokenizer knows (`replayer`). Without the output: whether there
    can be such an end at all.
    """
    reason, stop_tokens = outcome.finish_reason, () if intent.ignore_eos else intent.stop_tokens
    ends = [] if answer is None else [token in stop_tokens for token in answer.tokens]
    last = ends[-1] if ends else None  # None: not known
    fits = {
        "eos": bool(stop_tokens) if last is None else last,
        "stop": not last and bool(intent.stop),
        "length": not last and outcome.output_count == intent.max_tokens,
    }
    if not fits[reason] or not outcome.output_count or any(ends[:-1]):
        raise ReceiptError(f"finish reason: {reason} does not fit the answer", code="receipt.finish_reason")
    if answer is not None and any(text in answer.text for text in intent.stop):
        raise ReceiptError("text: expected to end before any stop string", code="receipt.finish_reason")


def _check_log(payload: Payload, outcome: Outcome, accepted: Committed) -> Checkpoint:
    verdict = accepted.verdict
    checkpoint = open_checkpoint(payload.checkpoint, verdict)
    for record, proven in ((accepted.intent, payload.intent), (outcome, payload.outcome)):
        leaf = records.leaf_for(record, proven.record, proven.salt, proven.index)
        verify_leaf(leaf, proven.proof, checkpoint)
    before = accepted.checkpoint
    verify_growth(before.size, before.root, checkpoint, payload.from_accepted)
    verify_growth(verdict.claims.log_size, verdict.claims.log_root, checkpoint, payload.from_attested)
    return checkpoint


def verify_growth(size: int, root: bytes, checkpoint: Checkpoint, proof: tuple[bytes, ...]) -> None:
    """The log grew from a head to the checkpoint. Raises `LogError` (`log.*`)."""
    if size == 0:  # every log grows from the empty one
        if root != merkle.EMPTY_ROOT or proof:
            raise LogError("log head: expected the empty tree's root and no proof", code="log.consistency")
        return
    merkle.verify_consistency(size, checkpoint.size, root, checkpoint.root, proof)


def open_checkpoint(data: bytes, verdict: Verdict) -> Checkpoint:
    """A checkpoint under both attested log keys. Raises `FormatError`, `LogError` (`log.*`)."""
    roles = {kind: verdict.keys[role] for kind, role in ((ED25519, "log-ed25519"), (6, "log-ml-dsa-44"))}
    keys = LogKeys(ed25519=roles[ED25519].cose.public, ml_dsa_44=roles[6].cose.public)

    def verify(kind: int, _key: bytes, signature: bytes, message: bytes) -> bool:
        return roles[kind].verify(signature, message)

    return verify_checkpoint(data, verdict.log_origin, keys, verify)


def verify_leaf(leaf: Leaf, proof: tuple[bytes, ...], checkpoint: Checkpoint) -> bytes:
    """The hash of a leaf that stands in the log. Raises `LogError` (`log.*`)."""
    hashed = records.leaf_digest(leaf)
    merkle.verify_inclusion(leaf.sequence, checkpoint.size, hashed, proof, checkpoint.root)
    return hashed


def verify_signatures(parsed: Signed, verdict: Verdict) -> Iterator[str]:
    """Both signatures, each under its attested key; a few words about each. Raises `ReceiptError` (`receipt.*`)."""
    for i, (role, algorithm) in enumerate(zip(_SIGNER_ROLES, SIGNERS, strict=True)):
        if parsed.kids[i] != thumbprint(verdict.keys[role].cose):
            raise ReceiptError(f"kid of {algorithm.name}: expected the attested key's", code="receipt.kid")
        if not verdict.keys[role].verify(parsed.signatures[i], parsed.signed[i]):
            name = algorithm.name.lower()
            raise ReceiptError(f"the {algorithm.name} signature does not verify", code=f"receipt.{name}")
        yield f"{algorithm.name} {parsed.kids[i].hex()[:16]}"


def same(what: str, expected: bytes, got: bytes, code: str, error: type[VerificationError] = ReceiptError) -> None:
    """Raises `error` with the code unless both are equal."""
    if not hmac.compare_digest(expected, got):
        raise error(f"{what}: expected {expected.hex()}, got {got.hex()}", code=code)


def _require_verdict(verdict: Verdict) -> None:
    if type(verdict) is not Verdict:
        raise TypeError("verdict: expected a Verdict made by appraise()")


def _require_seal(seal: object) -> None:
    if seal is not _SEAL:
        raise TypeError("made by verification only")
