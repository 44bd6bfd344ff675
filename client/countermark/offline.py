"""Verify and replay from a program: files in, results out, this machine's clock unless another time is named.

`verify.verify_bundle` and `replayer.replay` are the same without reading anything.
"""

from __future__ import annotations

import time
from pathlib import Path

from countermark import replayer, verify
from countermark.anchors import Headers
from countermark.appraise import TimeBasis
from countermark.bundle import Bundle, read_bundle
from countermark.policy import Policy, load_policy
from countermark.replayer import Mode, ReplayResult, Runner, load_runner
from countermark.session import Answer
from countermark.verify import Verification


def verify_bundle(
    bundle: Bundle | str | Path,
    policy: Policy | str | Path,
    at: int | None = None,
    *,
    endorsements: bytes | None = None,
    headers: Headers | None = None,
) -> Verification:
    """Verify a bundle, or the file of one, under a policy or its file.

    `at`: unix seconds; without it now, or the time of a time stamp in the bundle. Raises `UsageError` and `PolicyError`
    for the files, `BundleError`, and what `verify.verify_bundle` raises: an error carries all checks made so far.
    """
    return verify.verify_bundle(
        bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle)),
        policy if isinstance(policy, Policy) else load_policy(Path(policy)),
        int(time.time()) if at is None else at,
        time_basis=TimeBasis.NOW if at is None else TimeBasis.ASSUMED,
        endorsements=endorsements,
        headers=headers,
    )


def replay(
    verified: Verification | Answer, weights: str | Path | Runner, *, mode: Mode | str = Mode.AUDIT, device: str = "cpu"
) -> ReplayResult:
    """Run a verified answer again on this machine and compare every token and fingerprint.

    `weights`: the artefact's directory, or what `load_runner` made of it, for several answers. `device`: `cpu` or
    `cuda`, of a directory. What differs is in the result; `ReplayResult.require_identical` raises on it. Raises
    `Undecidable` when it cannot be run here, with the code that says why, and `WeightsError`.
    """
    receipt = verified if isinstance(verified, Verification) else verified.receipt
    whole = receipt.whole if isinstance(receipt, Verification) else receipt
    runner = weights
    if isinstance(runner, str | Path):
        runner = load_runner(whole.intent.stack.profile, Path(runner), device)
    return replayer.replay(receipt, runner, mode)
