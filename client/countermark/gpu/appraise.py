"""Step 8: all GPUs of a machine, against their quote, RTMR3 and the policy.

The GPUs are attached to the TD transitively: the measured driver listed their device keys and modes into RTMR3 at boot,
and their reports now are signed by the same keys over a nonce that depends on ours. The nonce proves freshness, not
place. Judging measurements against signed reference manifests (RIMs) is a step this module does not have: under
NVIDIA's root it therefore cannot accept, and says so (`gpu.rim_missing`). RIMs that come along are carried, not judged.
Not checked here: one report's own signature and chain (`gpu.report`), and the hardware allow-list (step 9).
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
from countermark.policy import NVIDIA_DEVICE_ROOT, GpuFreshnessRule, Policy


def _refuse(message: str, code: str) -> GpuError:
    return GpuError(message, code=f"gpu.{code}", step="8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedGpus:
    """GPU evidence and the CRLs that came with it, parsed, nothing verified."""

    evidence: tuple[GpuEvidence, ...]
    reports: tuple[Report, ...]
    chains: tuple[tuple[x509.Certificate, ...], ...]
    crls: tuple[x509.CertificateRevocationList, ...]


def parse_gpus(evidence: Evidence) -> ParsedGpus:
    """Step 1's part. Raises `FormatError` `spdm.*`, `gpu.chain` or `gpu.crl`."""
    return ParsedGpus(
        evidence=evidence.gpu,
        reports=tuple(spdm.parse_report(gpu.report) for gpu in evidence.gpu),
        chains=tuple(x509chain.parse_der_chain(gpu.certs, "gpu") for gpu in evidence.gpu),
        crls=tuple(x509chain.parse_crl(data, "gpu") for data in evidence.endorsements.gpu_crls),
    )


def appraise_gpus(
    parsed: ParsedGpus, claims: Claims, measured: Sequence[GpuIdentity], policy: Policy, *, now: int
) -> tuple[Gpu, ...]:
    """Step 8: 1 count, 2 digest in the claims, 3 freshness, 4 each report, 5 revocation, 6 keys as measured, 7 modes, 8
    RIMs.

    `claims` are those the verified quote covers, `measured` RTMR3's. A report made at boot must answer the nonce made
    of the boot id in place of the session's nonce. Raises `Undecidable` `gpu.rim_missing` or `GpuError` `gpu.missing`,
    `gpu.count`, `gpu.digest`, `gpu.freshness`, `gpu.crl_stranger`, `gpu.revoked`, `gpu.duplicate`, `gpu.device_key`,
    `gpu.mode`, `gpu.devtools`, or a code of `verify_report`.
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
    _verify_revocation(parsed, now)
    found = sorted(gpu.key for gpu in gpus)
    # By chip too: other firmware gives the same chip another device key.
    if len(set(found)) != len(found) or len({gpu.chip for gpu in gpus}) != len(gpus):
        raise _refuse("GPU device keys and chips: expected each once, got a repeated one", "duplicate")
    wanted = sorted(gpu.device_key for gpu in measured)
    if found != wanted:
        text = f"expected {[key.hex() for key in wanted]} as in RTMR3, got {[key.hex() for key in found]}"
        raise _refuse(f"GPU device keys: {text}", "device_key")
    for gpu in measured:
        if gpu.mode != policy.gpu_mode:
            raise _refuse(f"GPU mode: expected {policy.gpu_mode}, got {gpu.mode}", "mode")
        if gpu.devtools:
            raise _refuse("GPU developer tools: expected off, got on", "devtools")
    protected = policy.gpu_mode == GpuMode.CC_PROTECTED_PCIE.value
    for reported in gpus:  # RTMR3 has what the driver said at boot; this is what the GPU itself signed
        if reported.protected_pcie is not protected:
            raise _refuse(f"GPU mode: expected {policy.gpu_mode}, as in RTMR3; its own report differs", "mode")
    if policy.gpu_root == NVIDIA_DEVICE_ROOT:
        message = "GPU measurements: expected NVIDIA's reference manifests (RIM) to compare with, got none"
        raise Undecidable(message, code="gpu.rim_missing", step="8")
    return gpus


def _verify_revocation(parsed: ParsedGpus, now: int) -> None:
    # A CRL that came along must be good and current; who must bring one is not decided here (NVIDIA answers by OCSP).
    certificates = {x509chain.digest(item): item for chain in parsed.chains for item in chain}.values()
    for crl in parsed.crls:
        issuer = next((item for item in certificates if item.subject == crl.issuer and x509chain.is_ca(item)), None)
        if issuer is None:
            raise _refuse(
                f"GPU CRL: expected an issuer in the chains, got {crl.issuer.rfc4514_string()}", "crl_stranger"
            )
        try:
            x509chain.verify_crl(crl, issuer, now=now)
        except x509chain.ChainError as err:
            raise _refuse(f"GPU {err}", err.reason) from err
        for item in certificates:
            if item.issuer == crl.issuer and x509chain.is_revoked(item, crl):
                raise _refuse(f"{x509chain.name(item)}: revoked by {x509chain.name(issuer)}", "revoked")
