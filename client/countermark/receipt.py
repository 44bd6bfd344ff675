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

Not checked here: that prompt and text are what their tokens spell, that the tokens are what the model gives, and that a
stop string was reached: replay does all of that, with the weights. Witness cosignatures: without them a log shown only
to us cannot be told from the one shown to others.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any, NoReturn

from countermark import numerics
from countermark.appraise import Verdict
from countermark.asked import Asked, check_settings, parse_request
from countermark.checks import Check, Status
from countermark.errors import CountermarkError, LogError, ReceiptError, VerificationError, WeightsError
from countermark.formats import records
from countermark.formats.receipt import SIGNERS, Acceptance, Answer, Payload, parse_receipt, thumbprint
from countermark.formats.records import Intent, Leaf, Outcome
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
class Accepted(Sealed):
    """A checked INTENT: the appliance has committed to our request, durably, before any token.

    `checks`: those of the verdict, then ours.
    """

    verdict: Verdict
    request: bytes
    acceptance: Acceptance
    intent: Intent
    leaf: bytes  # leaf hash
    checkpoint: Checkpoint
    checks: tuple[Check, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        _require_seal(seal)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedReceipt(Sealed):
    """A checked receipt with everything it vouches for. `receipt`: the COSE_Sign bytes."""

    accepted: Accepted
    outcome: Outcome
    answer: Answer
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
                "witnesses": "unwitnessed",
            },
        }


def verify_accepted(acceptance: Acceptance, verdict: Verdict, request: bytes) -> Accepted:
    """Steps 12 to 14: check the first message of a stream before any token is used.

    `request`: the exact bytes sent. Raises `FormatError`, `ReceiptError` (`receipt.*`), `WeightsError`
    (`receipt.weights_root`) or `LogError` (`log.*`); the error carries the checks made so far.
    """
    _require_verdict(verdict)
    steps = Steps(verdict.checks)
    with steps.step("12", "the request was committed to, on this connection's evidence") as detail:
        intent, asked = records.parse_intent(acceptance.record), parse_request(request)
        _check_intent(intent, asked, acceptance, verdict, request)
        detail.append(f"request {intent.request_id.hex()}; {len(acceptance.prompt_tokens)} prompt tokens")
    with steps.step("13", "appraised stack, settings as asked") as detail:
        _check_stack(intent, verdict)
        check_settings(asked, intent)
        sampling = intent.sampling
        detail.append(f"{intent.stack.model}, {intent.stack.profile}; temperature {sampling.temperature:g}")
        detail.append(
            f"seed {sampling.seed} ({sampling.seed_origin}); {len(asked.settings)} settings as given or by default"
        )
    with steps.step("14", "INTENT in the log before the first token") as detail:
        checkpoint = _open_checkpoint(acceptance.checkpoint, verdict)
        leaf = records.leaf_for(intent, acceptance.record, acceptance.leaf_salt, acceptance.leaf_index)
        hashed = _verify_leaf(leaf, acceptance.proof, checkpoint)
        if acceptance.leaf_index < verdict.claims.log_size:
            message = f"leaf index: expected at least the attested log size {verdict.claims.log_size}"
            raise LogError(f"{message}, got {acceptance.leaf_index}", code="log.stale")
        detail.append(f"leaf {acceptance.leaf_index} of {checkpoint.size}; {checkpoint.origin}")
    return Accepted(
        verdict=verdict,
        request=request,
        acceptance=acceptance,
        intent=intent,
        leaf=hashed,
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
    with steps.step("15", "receipt signed by both attested keys") as detail:
        parsed = parse_receipt(receipt)
        for i, (role, algorithm) in enumerate(zip(_SIGNER_ROLES, SIGNERS, strict=True)):
            name = algorithm.name.lower()
            if parsed.kids[i] != thumbprint(verdict.keys[role].cose):
                raise ReceiptError(f"kid of {algorithm.name}: expected the attested key's", code="receipt.kid")
            if not verdict.keys[role].verify(parsed.signatures[i], parsed.signed[i]):
                raise ReceiptError(f"the {algorithm.name} signature does not verify", code=f"receipt.{name}")
            detail.append(f"{algorithm.name} {parsed.kids[i].hex()[:16]}")
    payload = parsed.payload
    with steps.step("16", "the accepted INTENT and its OUTCOME"):
        outcome = _check_link(payload, accepted)
    with steps.step("17", "the answer that was streamed") as detail:
        _check_answer(outcome, answer, accepted)
        detail.append(f"{outcome.output_count} tokens with fingerprints; finish reason {outcome.finish_reason}")
    with steps.step("18", "one log, grown from the attested head") as detail:
        checkpoint = _check_log(payload, outcome, accepted)
        detail.append(f"sizes {verdict.claims.log_size}, {accepted.checkpoint.size}, {checkpoint.size}")
    return CheckedReceipt(
        accepted=accepted,
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
    def step(self, number: str, name: str) -> Iterator[list[str]]:
        """Run one step; what it appends to the yielded list becomes the check's detail."""
        details: list[str] = []
        try:
            yield details
        except CountermarkError as err:
            failed = Check(step=number, name=name, status=Status.FAIL, detail=str(err), code=err.code)
            err.step, err.checks = number, (*self._checks, failed)
            raise
        self._checks.append(Check(step=number, name=name, status=Status.PASS, detail="; ".join(details)))


def _check_intent(intent: Intent, asked: Asked, acceptance: Acceptance, verdict: Verdict, request: bytes) -> None:
    _same("boot id", verdict.boot_id, intent.boot_id, "receipt.boot")
    _same("quote digest", verdict.quote_digest, intent.quote_digest, "receipt.quote")
    _same("nonce", asked.nonce, intent.nonce, "receipt.nonce")
    salts = records.parse_salts(acceptance.field_salts, records.INTENT_FIELDS)
    tokens = records.encode_tokens(acceptance.prompt_tokens)
    for name, value, code in (
        ("raw_request", request, "receipt.request"),
        ("prompt", asked.prompt, "receipt.input"),
        ("prompt_tokens", tokens, "receipt.prompt_tokens"),
    ):
        _same(name, records.field_commitment(name, salts[name], value), getattr(intent, name), code)


def _check_stack(intent: Intent, verdict: Verdict) -> None:
    stack = intent.stack
    if stack.platform != verdict.platform.value:
        raise ReceiptError(
            f"platform: expected {verdict.platform.value}, got {stack.platform}", code="receipt.platform"
        )
    _same("weights root", verdict.weights_root, stack.weights_root, "receipt.weights_root", WeightsError)
    _same("image id", verdict.image_id, stack.image_id, "receipt.image_id")
    _same("config digest", verdict.claims.config, stack.config_digest, "receipt.config")
    if stack.profile != verdict.profile:
        raise ReceiptError(f"profile: expected {verdict.profile}, got {stack.profile}", code="receipt.profile")
    promised = numerics.PROFILES.get(stack.profile)
    if promised is not None and (stack.determinism, stack.claims) != (promised.determinism, promised.claims):
        wanted = f"{', '.join(promised.claims)}, as {stack.profile} promises"
        message = f"claims: expected {wanted}, got {stack.claims!r:.100}"
        raise ReceiptError(message, code="receipt.profile")
    _same("kernel digest", verdict.kernel_digest, stack.kernel_digest, "receipt.kernel_digest")


def _check_link(payload: Payload, accepted: Accepted) -> Outcome:
    acceptance, intent = accepted.acceptance, payload.intent
    if (intent.record, intent.salt, intent.index) != (
        acceptance.record,
        acceptance.leaf_salt,
        acceptance.leaf_index,
    ):
        raise ReceiptError("intent: expected the one accepted before the first token", code="receipt.intent")
    outcome = records.parse_outcome(payload.outcome.record)
    _same("boot id of the OUTCOME", accepted.intent.boot_id, outcome.boot_id, "receipt.boot")
    _same("INTENT leaf", accepted.leaf, outcome.intent_leaf, "receipt.outcome")
    if payload.outcome.index <= intent.index:
        raise ReceiptError("outcome: expected after its INTENT in the log", code="receipt.order")
    return outcome


def _check_answer(outcome: Outcome, answer: Answer, accepted: Accepted) -> None:
    salts = records.parse_salts(answer.field_salts, records.OUTCOME_FIELDS)
    values: Mapping[str, bytes] = {
        "output_tokens": records.encode_tokens(answer.tokens),
        "output_text": answer.text.encode(),
        "fingerprints": b"".join(answer.fingerprints),
    }
    for name, value in values.items():
        commitment = records.field_commitment(name, salts[name], value)
        _same(name, commitment, getattr(outcome, name), f"receipt.{name}")
    counts = (len(accepted.acceptance.prompt_tokens), len(answer.tokens), len(answer.fingerprints))
    if counts != (outcome.prompt_count, outcome.output_count, outcome.output_count):
        raise ReceiptError("token counts: expected those of the answer", code="receipt.counts")
    if any(len(item) != records.FINGERPRINT_BYTES for item in answer.fingerprints):
        message = f"fingerprints: expected {records.FINGERPRINT_BYTES} bytes for each token"
        raise ReceiptError(message, code="receipt.fingerprints")
    intent = accepted.intent
    if outcome.cached_count > outcome.prompt_count or outcome.output_count > intent.max_tokens:
        raise ReceiptError("token counts: expected within prompt and max_tokens", code="receipt.counts")
    _check_end(outcome.finish_reason, intent, answer)


def _check_end(reason: str, intent: Intent, answer: Answer) -> None:
    """As far as token ids and text show it: the answer ends where the INTENT makes it end, and not later.

    Whether a stop string was reached only the tokenizer knows (`countermark.replay`).
    """
    stop_tokens = () if intent.ignore_eos else intent.stop_tokens
    ends = [token in stop_tokens for token in answer.tokens]
    fits = {
        "eos": bool(ends) and ends[-1],
        "stop": bool(ends) and not ends[-1] and bool(intent.stop),
        "length": bool(ends) and not ends[-1] and len(ends) == intent.max_tokens,
    }
    if not fits[reason] or any(ends[:-1]):
        raise ReceiptError(f"finish reason: {reason} does not fit the answer", code="receipt.finish_reason")
    if any(text in answer.text for text in intent.stop):
        raise ReceiptError("text: expected to end before any stop string", code="receipt.finish_reason")


def _check_log(payload: Payload, outcome: Outcome, accepted: Accepted) -> Checkpoint:
    verdict = accepted.verdict
    checkpoint = _open_checkpoint(payload.checkpoint, verdict)
    for record, proven in ((accepted.intent, payload.intent), (outcome, payload.outcome)):
        leaf = records.leaf_for(record, proven.record, proven.salt, proven.index)
        _verify_leaf(leaf, proven.proof, checkpoint)
    before = accepted.checkpoint
    _verify_growth(before.size, before.root, checkpoint, payload.from_accepted)
    _verify_growth(verdict.claims.log_size, verdict.claims.log_root, checkpoint, payload.from_attested)
    return checkpoint


def _verify_growth(size: int, root: bytes, checkpoint: Checkpoint, proof: tuple[bytes, ...]) -> None:
    if size == 0:  # every log grows from the empty one
        if root != merkle.EMPTY_ROOT or proof:
            raise LogError("log head: expected the empty tree's root and no proof", code="log.consistency")
        return
    merkle.verify_consistency(size, checkpoint.size, root, checkpoint.root, proof)


def _open_checkpoint(data: bytes, verdict: Verdict) -> Checkpoint:
    roles = {kind: verdict.keys[role] for kind, role in ((ED25519, "log-ed25519"), (6, "log-ml-dsa-44"))}
    keys = LogKeys(ed25519=roles[ED25519].cose.public, ml_dsa_44=roles[6].cose.public)

    def verify(kind: int, _key: bytes, signature: bytes, message: bytes) -> bool:
        return roles[kind].verify(signature, message)

    return verify_checkpoint(data, verdict.log_origin, keys, verify)


def _verify_leaf(leaf: Leaf, proof: tuple[bytes, ...], checkpoint: Checkpoint) -> bytes:
    hashed = records.leaf_digest(leaf)
    merkle.verify_inclusion(leaf.sequence, checkpoint.size, hashed, proof, checkpoint.root)
    return hashed


def _same(what: str, expected: bytes, got: bytes, code: str, error: type[VerificationError] = ReceiptError) -> None:
    if not hmac.compare_digest(expected, got):
        raise error(f"{what}: expected {expected.hex()}, got {got.hex()}", code=code)


def _require_verdict(verdict: Verdict) -> None:
    if type(verdict) is not Verdict:
        raise TypeError("verdict: expected a Verdict made by appraise()")


def _require_seal(seal: object) -> None:
    if seal is not _SEAL:
        raise TypeError("made by verification only")
