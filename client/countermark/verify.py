"""Verify a bundle offline: the appraisal's steps in scope `bundle`, then the receipt's, then what only a bundle has.

1-11 `appraise` · 12-18 `receipt` · 19 the measurement manifest that came along is signed by the policy's signers and
describes the appraised image (SKIP without one: the policy's own reference values were used) · 20 `witness`: the start
in the operator log, and who has seen it; `unwitnessed` where the policy asks nobody · 21 the bundle's anchors, if it
has any: what others signed over the receipt's checkpoint or a later one.

Anchors are judged first, since the earliest time stamp that holds is the time T of all other steps, unless somebody
chose another. That the checkpoint it is over is the receipt's, signed by the log, the later steps show.

A redacted bundle is verified as far as it goes, and says so: `redacted`, and a SKIP for each step that could not look
at what was left out. What is left is proven as if nothing were missing; nothing is replayed of it.

No network and no clock: the time is an argument. Claims about the connection (nonce, exporter) are assertions of the
bundle's maker, so a bundle shows that the appliance answered this request, not who asked.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any, Final

from countermark.anchors import Anchored, Headers, verify_anchors
from countermark.appraise import Scope, TimeBasis, Verdict, appraise, refuse_expired
from countermark.bundle import Bundle
from countermark.checks import Check, rfc3339
from countermark.errors import LogError, MeasurementError, Undecidable
from countermark.formats.receipt import Acceptance, Answer, Redaction, parse_receipt
from countermark.numerics import refuse_retired
from countermark.policy import Policy, verify_manifest
from countermark.receipt import (
    CheckedReceipt,
    RedactedReceipt,
    Sealed,
    Steps,
    verify_accepted,
    verify_receipt,
    verify_redacted,
)
from countermark.witness import verify_receipt_witness, verify_witnessed

MAX_CLOCK_SKEW_S: Final = 300
_ANCHORS: Final = "the log had this answer by a time others vouch for"
_SEAL: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification(Sealed):
    """A verified bundle: everything it says holds as far as its checks go. `redacted`: what it does not say."""

    receipt: RedactedReceipt
    redacted: tuple[Redaction, ...]
    checks: tuple[Check, ...]
    witnesses: str
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("made by verify_bundle() only")

    @property
    def verdict(self) -> Verdict:
        return self.receipt.verdict

    @property
    def whole(self) -> CheckedReceipt:
        """The receipt with all it vouches for. Raises `Undecidable` (`replay.redacted`) when some was left out."""
        if not isinstance(self.receipt, CheckedReceipt):
            message = f"bundle: expected prompt and output, to run them again, got {', '.join(self.redacted)} left out"
            raise Undecidable(message, code="replay.redacted")
        return self.receipt

    def __str__(self) -> str:
        """One line for people."""
        outcome, stack = self.receipt.outcome, self.receipt.intent.stack
        redacted = f", redacted: {', '.join(self.redacted)}" if self.redacted else ""
        return (
            f"verified{' (SIMULATED platform)' if self.verdict.simulated else ''}: {outcome.output_count} tokens by"
            f" {stack.model} under {stack.profile}{redacted}, {self.witnesses}, time {self.verdict.time_basis.value}"
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys."""
        return {
            "simulated": self.verdict.simulated,
            "verification": "accept",
            "redacted": [part.value for part in self.redacted],
            "witnesses": self.witnesses,
            "checks": [check.as_json() for check in self.checks],
            "verdict": self.verdict.as_json(),
            "receipt": self.receipt.as_json(),
        }


def verify_bundle(
    bundle: Bundle,
    policy: Policy,
    at: int,
    *,
    time_basis: TimeBasis = TimeBasis.ASSUMED,
    endorsements: bytes | None = None,
    headers: Headers | None = None,
) -> Verification:
    """Verify a bundle under a policy at time `at` (unix seconds), or raise.

    `time_basis`: `NOW` when `at` is this machine's clock, `ASSUMED` when somebody chose it. With `NOW`, a time stamp in
    the bundle that holds gives the time in its place; the policy must not have expired all the same. `endorsements`:
    Intel's, to be used instead of the bundle's. `headers`: of Bitcoin's blocks. Raises `verify_anchors`'s errors and
    `LogError` (`anchor.future`), then what `appraise`, `verify_accepted`, `verify_receipt`, `verify_witnessed` and
    `verify_receipt_witness` raise, for step 19 `FormatError` (`manifest.*`) or `MeasurementError` (`manifest.*`), and
    after the last step `Undecidable` (`profile.retired`); the error carries all checks made so far.
    """
    anchored = _verify_anchors(bundle, policy, headers, now=at if time_basis is TimeBasis.NOW else None)
    if anchored is not None and anchored.time is not None and time_basis is TimeBasis.NOW:
        refuse_expired(policy, at)
        at, time_basis = anchored.time, TimeBasis.ANCHOR
    verdict = appraise(
        bundle.evidence, policy, now=at, scope=Scope.BUNDLE, time_basis=time_basis, endorsements=endorsements
    )
    receipt = _verify_receipt(bundle, verdict)
    steps = Steps(receipt.checks)
    if bundle.manifest is None:
        steps.skip("19", "measurement manifest", "none in the bundle; the policy's own reference values were used")
    else:
        with steps.step("19", "measurement manifest signed by the policy's signers") as detail:
            image = verify_manifest(bundle.manifest, signers=policy.manifest_signers, now=at)
            if image.image_id != verdict.image_id:
                message = f"image id: expected {verdict.image_id.hex()}, got {image.image_id.hex()}"
                raise MeasurementError(message, code="manifest.image")
            detail.append(f"image {image.image_id.hex()}, version {image.version}")
    witnessed = verify_witnessed(bundle.epoch, verdict, policy, checks=steps.done)
    checks = verify_receipt_witness(bundle.witness, receipt, policy, checks=witnessed.checks)
    if anchored is not None:
        checks = _told(anchored, checks)
    refuse_retired(verdict.profile, checks)
    return Verification(receipt=receipt, redacted=bundle.redacted, checks=checks, witnesses=str(witnessed), seal=_SEAL)


def _verify_anchors(bundle: Bundle, policy: Policy, headers: Headers | None, *, now: int | None) -> Anchored | None:
    """`now`: where a time stamp may take its place, and so must not lie behind it."""
    if bundle.anchors is None:
        return None
    with Steps(()).step("21", _ANCHORS):
        anchored = verify_anchors(
            bundle.anchors,
            parse_receipt(bundle.receipt).payload.checkpoint,
            tsa_roots=policy.tsa_roots,
            tsa_policies=policy.tsa_policies,
            headers=headers,
        )
        if now is not None and anchored.time is not None and anchored.time > now + MAX_CLOCK_SKEW_S:
            text = f"time stamp: expected a time until {rfc3339(now)}, which it is here, got {rfc3339(anchored.time)}"
            raise LogError(text, code="anchor.future")
    return anchored


def _told(anchored: Anchored, checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """Step 21 in its place."""
    steps = Steps(checks)
    if not anchored.found:
        steps.skip("21", _ANCHORS, "; ".join(anchored.skipped))
        return steps.done
    with steps.step("21", _ANCHORS) as detail:
        detail += [*anchored.found, *(f"not looked at: {reason}" for reason in anchored.skipped)]
    return steps.done


def _verify_receipt(bundle: Bundle, verdict: Verdict) -> RedactedReceipt:
    """Steps 12 to 18."""
    request, acceptance, answer = bundle.request, bundle.acceptance, bundle.answer
    if request is not None and isinstance(acceptance, Acceptance) and isinstance(answer, Answer):
        accepted = verify_accepted(acceptance, verdict, request)
        return verify_receipt(bundle.receipt, verdict, request=request, accepted=accepted, answer=answer)
    return verify_redacted(bundle.receipt, verdict, request=request, acceptance=acceptance, answer=answer)
