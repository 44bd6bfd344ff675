"""Verify a bundle offline: the appraisal's steps in scope `bundle`, then the receipt's, then what only a bundle has.

1-11 `appraise` · 12-18 `receipt` · 19 the measurement manifest that came along is signed by the policy's signers and
describes the appraised image (SKIP without one: the policy's own reference values were used) · 20 `witness`: the start
in the operator log, and who has seen it; `unwitnessed` where the policy asks nobody.

A redacted bundle is verified as far as it goes, and says so: `redacted`, and a SKIP for each step that could not look
at what was left out. What is left is proven as if nothing were missing; nothing is replayed of it.

No network and no clock: the time is an argument. Claims about the connection (nonce, exporter) are assertions of the
bundle's maker, so a bundle shows that the appliance answered this request, not who asked.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any, Final

from countermark.appraise import Scope, TimeBasis, Verdict, appraise
from countermark.bundle import Bundle
from countermark.checks import Check
from countermark.errors import MeasurementError, Undecidable
from countermark.formats.receipt import Acceptance, Answer, Redaction
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
) -> Verification:
    """Verify a bundle under a policy at time `at` (unix seconds), or raise.

    `time_basis`: `NOW` when `at` is this machine's clock, `ASSUMED` when somebody chose it. `endorsements`: Intel's, to
    be used instead of the bundle's. Raises what `appraise`, `verify_accepted`, `verify_receipt`, `verify_witnessed` and
    `verify_receipt_witness` raise, for step 19 `FormatError` (`manifest.*`) or `MeasurementError` (`manifest.*`), and
    after the last step `Undecidable` (`profile.retired`); the error carries all checks made so far.
    """
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
    refuse_retired(verdict.profile, checks)
    return Verification(receipt=receipt, redacted=bundle.redacted, checks=checks, witnesses=str(witnessed), seal=_SEAL)


def _verify_receipt(bundle: Bundle, verdict: Verdict) -> RedactedReceipt:
    """Steps 12 to 18."""
    request, acceptance, answer = bundle.request, bundle.acceptance, bundle.answer
    if request is not None and isinstance(acceptance, Acceptance) and isinstance(answer, Answer):
        accepted = verify_accepted(acceptance, verdict, request)
        return verify_receipt(bundle.receipt, verdict, request=request, accepted=accepted, answer=answer)
    return verify_redacted(bundle.receipt, verdict, request=request, acceptance=acceptance, answer=answer)
