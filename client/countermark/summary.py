"""What a node proved, in words that can be read aloud: one line for each thing, from a verdict."""

from __future__ import annotations

from collections.abc import Iterator

from countermark.appraise import Verdict
from countermark.checks import rfc3339
from countermark.witness import Witnessed


def summary(verdict: Verdict, witnessed: Witnessed) -> Iterator[tuple[str, str]]:
    """(what, what of it), the most important first. Digests are whole: they are for comparing."""
    if verdict.simulated:
        yield "platform", f"SIMULATED ({verdict.platform.value}): no confidential hardware vouches for any of this"
    else:
        advisories = ", ".join(verdict.advisory_ids) or "none"
        yield "platform", f"Intel TDX, TCB level {verdict.tcb_status}, open advisories: {advisories}"
    yield "image", f"{verdict.image_id.hex()}, manifest version {verdict.image_version}, machine {verdict.shape}"
    yield "weights", verdict.weights_root.hex()
    yield "numerics", f"{verdict.profile}, kernels {verdict.kernel_digest.hex()[:16]}"
    yield "config", verdict.boot.config.hex()
    for number, (gpu, identity) in enumerate(zip(verdict.gpu, verdict.boot.gpus, strict=True), 1):
        name = "GPU" if len(verdict.gpu) == 1 else f"GPU {number}"
        yield name, f"{gpu.name}, {identity.mode}, driver {gpu.driver_version}, VBIOS {gpu.vbios_version}"
    yield "connection", "TLS 1.3 to the key that this quote names; nobody in between"
    yield "log", f"{verdict.log_origin}, {verdict.claims.log_size} leaves, {witnessed}"
    passed = sum(check.status.value == "PASS" for check in witnessed.checks)
    skipped = len(witnessed.checks) - passed
    left_out = f", {skipped} left out by the policy or the scope" if skipped else ""
    yield "verdict", f"accepted at {rfc3339(verdict.time)}: {passed} checks passed{left_out}"
