"""Run a verified answer again and say whether it came out the same.

The client has no engine: whoever can execute a numerics profile registers a loader under the entry-point group
`countermark.runners` (name: the profile id; value: `load_runner(weights_dir: Path) -> Runner`). `Runner` uses plain
types only, so an engine satisfies it without importing this module.

Only a checked receipt is replayed. What is compared: token ids, and a fingerprint of all logits at each position. Not
checked here: that the runner is what it says; a replay shows the result to whoever runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from importlib.metadata import entry_points
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

from countermark.errors import ReplayDiverged, Undecidable, WeightsError
from countermark.formats.records import Stack
from countermark.receipt import CheckedReceipt
from countermark.verify import Verification


class Runner(Protocol):
    """Something that executes one profile with one set of weights.

    `sampling` has exactly the fields of `formats.records.Sampling`: temperature, repetition_penalty, presence_penalty,
    frequency_penalty: float; top_k, top_p_20bit, min_p_20bit, seed: int; logit_bias: tuple of (token id, float) by
    ascending id; seed_origin: str. `stop` holds the stop strings.
    """

    @property
    def profile(self) -> str:
        """The numerics profile id, such as `exact-v0`."""

    @property
    def weights_root(self) -> bytes:
        """The 32-byte dm-verity root of the weights loaded."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What this machine is: `kernel_digest` (hex), `engine`, `torch`, `cpu`, `backend`, `gpus`; `image_id` (hex)
        only where the code runs inside a measured image."""

    def audit(
        self,
        prompt_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
        fingerprints: tuple[bytes, ...],
        sampling: Mapping[str, object],
    ) -> Mapping[str, Any] | None:
        """One teacher-forced pass. None when every sampled token and every fingerprint is as recorded.

        Else the first difference: `position` (index into the output), `recorded_token`, `local_token`: int,
        `fingerprint_equal`: bool, `logit_gap`: float (local logit of the local token minus that of the recorded one).
        """

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Generate again from the prompt: token ids and one 16-byte fingerprint for each."""


KNOWN_PROFILES: Final = ("exact-v0",)
_RECORDED: Final = ("kernel_digest", "engine", "torch", "cpu", "backend", "gpus", "image_id")


class Mode(StrEnum):
    """`AUDIT`: one teacher-forced pass over what was recorded. `REGENERATE`: generate it again."""

    AUDIT = "audit"
    REGENERATE = "regenerate"


class Equivalence(StrEnum):
    """What a replay is evidence for."""

    SAME_STACK = "same measured stack"
    SAME_PROFILE = "same profile on other hardware"


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first difference. A token is None where one side had ended; the gap is None where it is not known."""

    position: int
    recorded_token: int | None
    local_token: int | None
    fingerprint_equal: bool
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What came out. `equivalence` says between which two the comparison was; it holds if `divergence` is None."""

    mode: Mode
    profile: str
    positions: int
    equivalence: Equivalence
    divergence: Divergence | None
    recorded: Mapping[str, str]
    local: Mapping[str, str]

    @property
    def identical(self) -> bool:
        """Every token and every fingerprint is as recorded."""
        return self.divergence is None

    def require_identical(self) -> None:
        """Raises `ReplayDiverged` (`replay.diverged`), saying where."""
        if (at := self.divergence) is not None:
            message = f"token {at.position}: expected {at.recorded_token}, as recorded, got {at.local_token}"
            if at.recorded_token == at.local_token:
                message = f"token {at.position}: same token, other logits (fingerprints differ)"
            raise ReplayDiverged(message, code="replay.diverged")

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys."""
        return {
            "replay": "identical" if self.identical else "diverged",
            "mode": self.mode.value,
            "profile": self.profile,
            "positions": self.positions,
            "equivalence": self.equivalence.value,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "recorded": dict(self.recorded),
            "local": dict(self.local),
        }


def load_runner(profile: str, weights_dir: Path) -> Runner:
    """Find what can execute a profile on this machine and load the weights into it.

    Raises `Undecidable`: `replay.profile_retired` (this version does not know the profile) or `replay.no_runner` (no
    engine is installed); and what the engine raises on bad weights.
    """
    if profile not in KNOWN_PROFILES:
        message = f"profile {profile!r:.60}: retired, or newer than this version (known: {', '.join(KNOWN_PROFILES)})"
        raise Undecidable(message, code="replay.profile_retired")
    found = tuple(entry_points(group="countermark.runners", name=profile))
    if not found:
        message = f"profile {profile}: no engine is installed; pip install 'countermark[appliance]'"
        raise Undecidable(message, code="replay.no_runner")
    runner: Runner = found[0].load()(weights_dir)
    return runner


def replay(verified: Verification | CheckedReceipt, runner: Runner, mode: Mode | str = Mode.AUDIT) -> ReplayResult:
    """Run a verified answer again and compare token ids and fingerprints, up to the first difference.

    Raises `WeightsError` (`replay.weights_root`: the runner has other weights), `Undecidable`: `replay.profile` (the
    runner executes another profile), `replay.hardware` (the profile promises nothing across machines).
    """
    mode = Mode(mode)
    receipt = verified.receipt if isinstance(verified, Verification) else verified
    intent, answer = receipt.intent, receipt.answer
    stack = intent.stack
    if runner.profile != stack.profile:
        message = f"profile: expected {stack.profile}, got a runner of {runner.profile}"
        raise Undecidable(message, code="replay.profile")
    if runner.weights_root != stack.weights_root:
        message = f"weights root: expected {stack.weights_root.hex()}, got {runner.weights_root.hex()}"
        raise WeightsError(message, code="replay.weights_root")
    recorded, local = _recorded(stack), dict(runner.environment)
    same = all(local.get(name) == recorded[name] for name in _RECORDED)
    if not same and "hardware" not in stack.claims:
        message = f"profile {stack.profile}: promises the same bits on the same stack only, and this is another"
        raise Undecidable(message, code="replay.hardware")
    run = _audit if mode is Mode.AUDIT else _regenerate
    return ReplayResult(
        mode=mode,
        profile=stack.profile,
        positions=len(answer.tokens),
        equivalence=Equivalence.SAME_STACK if same else Equivalence.SAME_PROFILE,
        divergence=run(receipt, runner),
        recorded=recorded,
        local=local,
    )


def _recorded(stack: Stack) -> dict[str, str]:
    return {
        "kernel_digest": stack.kernel_digest.hex(),
        "engine": stack.engine,
        "torch": stack.torch,
        "cpu": stack.cpu,
        "backend": stack.backend,
        "gpus": ", ".join(stack.gpus),
        "image_id": stack.image_id.hex(),
    }


def _sampling(receipt: CheckedReceipt) -> Mapping[str, object]:
    sampling = receipt.intent.sampling
    return {item.name: getattr(sampling, item.name) for item in fields(sampling)}


def _audit(receipt: CheckedReceipt, runner: Runner) -> Divergence | None:
    answer, prompt = receipt.answer, receipt.accepted.acceptance.prompt_tokens
    if not answer.tokens:
        return None
    found = runner.audit(prompt, answer.tokens, answer.fingerprints, _sampling(receipt))
    if found is None:
        return None
    return Divergence(
        position=int(found["position"]),
        recorded_token=int(found["recorded_token"]),
        local_token=int(found["local_token"]),
        fingerprint_equal=bool(found["fingerprint_equal"]),
        logit_gap=float(found["logit_gap"]),
    )


def _regenerate(receipt: CheckedReceipt, runner: Runner) -> Divergence | None:
    intent, answer = receipt.intent, receipt.answer
    prompt = receipt.accepted.acceptance.prompt_tokens
    tokens, fingerprints = runner.regenerate(
        prompt, intent.max_tokens, intent.stop, intent.ignore_eos, _sampling(receipt)
    )
    recorded = zip_longest(answer.tokens, answer.fingerprints)
    local = zip_longest(tokens, fingerprints)
    for position, (theirs, ours) in enumerate(zip_longest(recorded, local, fillvalue=(None, None))):
        if theirs != ours:
            return Divergence(
                position=position,
                recorded_token=theirs[0],
                local_token=ours[0],
                fingerprint_equal=theirs[1] == ours[1],
                logit_gap=None,
            )
    return None
