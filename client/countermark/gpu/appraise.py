"""Step 8: all GPUs of a machine, against their quote, RTMR3, signed reference manifests and the policy.

The GPUs are attached to the TD transitively: the measured driver listed their device keys and modes into RTMR3 at boot,
and their reports now are signed by the same keys over a nonce that depends on ours. The nonce proves freshness, not
place. Their measurements must be those of a driver RIM and a VBIOS RIM of exactly their versions.
Not checked here: one report's own signature and chain (`gpu.report`), one RIM's (`gpu.rim`), and the hardware
allow-list (step 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509

from countermark import x509chain
from countermark.errors import GpuError, Undecidable
from countermark.formats import spdm
from countermark.formats.boot_events import GpuIdentity, GpuMode
from countermark.formats.evidence import Evidence, GpuEvidence, gpu_digest
from countermark.formats.report_data import Claims, GpuFreshness, gpu_nonce
from countermark.formats.spdm import Report
from countermark.gpu.report import Gpu, verify_report
from countermark.gpu.revocation import Revocation, parse_revocation, verify_revocation
from countermark.gpu.rim import (
    Comparison,
    Rim,
    RimDocument,
    RimKind,
    compare_all,
    parse_rim,
    rim_name,
    speaks_of,
    verify_rim,
)
from countermark.policy import GpuFreshnessRule, Policy


def _refuse(message: str, code: str) -> GpuError:
    return GpuError(message, code=f"gpu.{code}", step="8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedGpus:
    """GPU evidence and the endorsements that came with it, parsed, nothing verified."""

    evidence: tuple[GpuEvidence, ...]
    reports: tuple[Report, ...]
    chains: tuple[tuple[x509.Certificate, ...], ...]
    rims: tuple[RimDocument, ...]
    revocation: Revocation


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisedGpus:
    """What step 8 found: the GPUs, how each compares with the RIMs, and how much revocation input covered."""

    gpus: tuple[Gpu, ...]
    comparisons: tuple[tuple[Comparison, ...], ...]
    revocation: str


def parse_gpus(evidence: Evidence) -> ParsedGpus:
    """Step 1's part. Raises `FormatError` `spdm.*`, `gpu.chain`, `gpu.rim`, `gpu.crl` or `gpu.ocsp`."""
    endorsements = evidence.endorsements
    return ParsedGpus(
        evidence=evidence.gpu,
        reports=tuple(spdm.parse_report(gpu.report) for gpu in evidence.gpu),
        chains=tuple(x509chain.parse_der_chain(gpu.certs, "gpu") for gpu in evidence.gpu),
        rims=tuple(map(parse_rim, dict.fromkeys(endorsements.gpu_rims))),
        revocation=parse_revocation(endorsements.gpu_crls, endorsements.gpu_ocsp),
    )


def appraise_gpus(
    parsed: ParsedGpus, claims: Claims, measured: Sequence[GpuIdentity], policy: Policy, *, now: int
) -> AppraisedGpus:
    """Step 8: 1 count, 2 digest in the claims, 3 freshness, 4 each report, 5 keys as measured, 6 modes, 7 RIMs and
    measurements, 8 revocation.

    `claims` are those the verified quote covers, `measured` RTMR3's. A report made at boot must answer the nonce made
    of the boot id in place of the session's nonce. Raises `GpuError` `gpu.missing`, `gpu.count`, `gpu.digest`,
    `gpu.freshness`, `gpu.duplicate`, `gpu.device_key`, `gpu.mode`, `gpu.devtools`, or as `verify_report`, `verify_rim`,
    `match_rims` and `verify_revocation` do.
    """
    evidence = parsed.evidence
    if not evidence:
        raise _refuse(f"GPU evidence: expected {policy.gpu_count}, got none", "missing")
    if len(evidence) != policy.gpu_count:
        raise _refuse(f"GPU evidence: expected {policy.gpu_count}, got {len(evidence)}", "count")
    if gpu_digest(evidence) != claims.gpu_digest:
        message = f"GPU evidence: expected digest {claims.gpu_digest.hex()}, got {gpu_digest(evidence).hex()}"
        raise _refuse(message, "digest")
    if policy.gpu_freshness is GpuFreshnessRule.SESSION and claims.gpu_freshness is not GpuFreshness.SESSION:
        raise _refuse("GPU freshness: expected session, got boot", "freshness")
    challenge = claims.nonce if claims.gpu_freshness is GpuFreshness.SESSION else claims.boot_id
    nonce = gpu_nonce(challenge, claims.tls_spki)
    gpus = tuple(
        verify_report(item.report, report, chain, root=policy.gpu_root, nonce=nonce, now=now)
        for item, report, chain in zip(evidence, parsed.reports, parsed.chains, strict=True)
    )
    verify_distinct([(gpu.key, gpu.chip) for gpu in gpus])
    _verify_keys(gpus, measured)
    _verify_modes(gpus, measured, policy)
    rims = tuple(verify_rim(document, root=policy.rim_root, now=now) for document in parsed.rims)
    comparisons = match_rims(parsed.reports, rims, parsed.chains)
    for comparison in (item for each in comparisons for item in each):
        comparison.require_match()
    covered = verify_revocation(
        parsed.chains,
        parsed.revocation,
        rule=policy.gpu_revocation,
        now=now,
        rim_chains=[document.chain for document in parsed.rims],
    )
    return AppraisedGpus(gpus=gpus, comparisons=comparisons, revocation=covered)


def verify_distinct(gpus: Sequence[tuple[bytes, bytes]]) -> None:
    """Every (device key, chip) is another one in both. Raises `GpuError` `gpu.duplicate`."""
    # By chip too: other firmware gives the same chip another device key.
    if len({key for key, _ in gpus}) != len(gpus) or len({chip for _, chip in gpus}) != len(gpus):
        raise _refuse("GPU device keys and chips: expected each once, got a repeated one", "duplicate")


def _verify_keys(gpus: Sequence[Gpu], measured: Sequence[GpuIdentity]) -> None:
    found, wanted = sorted(gpu.key for gpu in gpus), sorted(gpu.device_key for gpu in measured)
    if found != wanted:
        text = f"expected {[key.hex() for key in wanted]} as in RTMR3, got {[key.hex() for key in found]}"
        raise _refuse(f"GPU device keys: {text}", "device_key")


def _verify_modes(gpus: Sequence[Gpu], measured: Sequence[GpuIdentity], policy: Policy) -> None:
    for gpu in measured:
        if gpu.mode != policy.gpu_mode:
            raise _refuse(f"GPU mode: expected {policy.gpu_mode}, got {gpu.mode}", "mode")
        if gpu.devtools:
            raise _refuse("GPU developer tools: expected off, got on", "devtools")
    for reported in gpus:  # RTMR3 has what the driver said at boot; this is what the GPU itself signed
        verify_mode(reported.mode, policy.gpu_mode)


def verify_mode(mode: GpuMode, wanted: str) -> None:
    """The mode the GPU itself states is the wanted one. Raises `GpuError` `gpu.mode`."""
    if mode.value != wanted:
        raise _refuse(f"GPU mode: expected {wanted}, got {mode.value} in the GPU's own report", "mode")


def match_rims(
    reports: Sequence[Report], rims: Sequence[Rim], chains: Sequence[Sequence[x509.Certificate]]
) -> tuple[tuple[Comparison, ...], ...]:
    """Each report against the driver RIM and the VBIOS RIM of its versions; what they differ in is not judged yet.

    Raises `GpuError` `gpu.rim_version` for a RIM of which no report has the version, `gpu.rim_conflict`, or
    `Undecidable` `gpu.rim_missing`.
    """
    require_spoken_of(rims, reports)
    comparisons = tuple(compare_all(report, rims) for report in reports)
    for report, chain, found in zip(reports, chains, comparisons, strict=True):
        for kind in RimKind:
            if kind not in {comparison.kind for comparison in found}:
                name = rim_name(report, kind, chain[0])
                message = f"GPU measurements: expected the signed {kind} RIM {name}, got none of its version"
                raise Undecidable(message, code="gpu.rim_missing", step="8")
    return comparisons


def require_spoken_of(rims: Sequence[Rim], reports: Sequence[Report]) -> None:
    """Every RIM is for the driver or the VBIOS of some report. Raises `GpuError` `gpu.rim_version`."""
    for rim in rims:
        if not any(speaks_of(rim, report) for report in reports):
            versions = {
                report.driver_version if rim.kind is RimKind.DRIVER else report.vbios_version for report in reports
            }
            wanted = " or ".join(sorted(str(version) for version in versions))
            raise _refuse(f"{rim.kind} RIM: expected version {wanted}, got {rim.version}", "rim_version")
