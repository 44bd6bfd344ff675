"""GPUs by raw files: one report with its chain, or NVIDIA's serialised evidence of several GPUs that one nonce was for.

The steps of `gpu.appraise`, each by itself: chain, signature, nonce, firmware identifier, stated versions and mode of
every GPU; that they are different ones; every RIM's signer and signature; measurements against the RIMs of the report's
versions; revocation input; and step 9 where the policy names machines. What needs RTMR3 or claims (device keys as
measured, developer tools) does not apply, and neither does the policy's count: the files may be of some of the GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from cryptography import x509

from countermark import x509chain
from countermark.appraise import STEPS, TimeBasis, verify_chip
from countermark.errors import FormatError, GpuError
from countermark.formats import spdm
from countermark.formats.boot_events import GpuMode
from countermark.formats.der import parse_elements
from countermark.formats.nvidia_evidence import GpuFile, parse_gpu_bundle
from countermark.formats.spdm import OpaqueType, Report
from countermark.genuine.result import Checks, FileAppraisal, hex_or_binary, verify_policy_time
from countermark.gpu.appraise import require_spoken_of, verify_distinct, verify_mode
from countermark.gpu.report import (
    read_mode,
    read_versions,
    spki_digest,
    verify_device_chain,
    verify_fwid,
    verify_nonce,
    verify_signature,
)
from countermark.gpu.revocation import Revocation, parse_revocation, verify_revocation
from countermark.gpu.rim import (
    Comparison,
    Rim,
    RimDocument,
    RimKind,
    compare_all,
    parse_rim,
    verify_rim_chain,
    verify_rim_signature,
)
from countermark.policy import Policy

MAX_CHAIN_BYTES: Final = 64 * 1024
_CHAIN: Final = "certificate chain to the device root"
_SIGNATURE: Final = "report signature"
_NONCE: Final = "nonce"
_FWID: Final = "firmware identifier"
_VERSIONS: Final = "driver and VBIOS versions"
_MODE: Final = "mode"
_NO_REPORT: Final = "the report does not parse"
_NO_CHAIN: Final = "the certificates do not parse"
_NO_CHIP: Final = "no certificate of the chip"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFiles:
    """What may come beside reports: signed RIMs (XML), CRLs and OCSP responses (DER)."""

    rims: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()
    ocsp: tuple[bytes, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Gpu:
    """One GPU on its way through the steps: what of it is known so far."""

    label: str
    data: bytes
    report: Report | None
    chain: tuple[x509.Certificate, ...]
    verified: bool = False
    mode: GpuMode | None = None
    comparisons: tuple[Comparison, ...] = ()


def appraise_gpu_files(
    report: bytes,
    chain: bytes,
    nonce: bytes,
    policy: Policy,
    *,
    now: int,
    basis: TimeBasis = TimeBasis.NOW,
    files: GpuFiles | None = None,
) -> FileAppraisal:
    """Step 8 for one report (binary or hex text) and its certificates (PEM, or DER one after the other; or hex of it).

    `nonce`: the 32 bytes the report must answer. Raises `PolicyError` `policy.expired`.
    """
    verify_policy_time(policy, now)
    checks = Checks(GpuError)
    gpu = _parse(checks, "", hex_or_binary(report), partial(_parse_chain, hex_or_binary(chain)))
    return _appraise(checks, [gpu], nonce, "", policy, files or GpuFiles(), now, basis)


def appraise_gpu_bundle(
    bundle: bytes,
    nonce: bytes | None,
    policy: Policy,
    *,
    now: int,
    basis: TimeBasis = TimeBasis.NOW,
    files: GpuFiles | None = None,
) -> FileAppraisal:
    """Step 8 for NVIDIA's serialised evidence: every GPU must answer the one nonce.

    Without a `nonce` it is the file's own, which shows that the reports belong together and not that they are fresh.
    Raises `PolicyError` `policy.expired`.
    """
    verify_policy_time(policy, now)
    checks = Checks(GpuError)
    found = checks.run("1", "the evidence file parses", partial(_read_bundle, bundle)) or ()
    gpus = [
        _parse(checks, f"{name}: ", hex_or_binary(item.report), partial(x509chain.parse_der_chain, item.chain, "gpu"))
        for name, item in _numbered("GPU", found)
    ]
    source = ""
    if nonce is None:
        nonces = [item.nonce for item in found] + [gpu.report.nonce for gpu in gpus if gpu.report is not None]
        nonce = next((value for value in nonces if value is not None), None)
        source = "the file's own, so freshness is not shown"
    return _appraise(checks, gpus, nonce, source, policy, files or GpuFiles(), now, basis)


def _read_bundle(data: bytes) -> tuple[tuple[GpuFile, ...], str]:
    found = parse_gpu_bundle(data)
    return found, f"{len(found)} GPU{'' if len(found) == 1 else 's'}"


def _parse_chain(data: bytes) -> tuple[x509.Certificate, ...]:
    text = data.strip()
    if text.startswith(b"-----"):
        return x509chain.parse_pem_chain(text + b"\n", "gpu")
    if len(data) > MAX_CHAIN_BYTES:
        raise FormatError(f"gpu: expected at most {MAX_CHAIN_BYTES} bytes, got {len(data)}", code="gpu.chain")
    return x509chain.parse_der_chain([item.encoded for item in parse_elements(data)], "gpu")


def _parse(checks: Checks, label: str, data: bytes, parse_chain: Callable[[], tuple[x509.Certificate, ...]]) -> _Gpu:
    def report() -> tuple[Report, str]:
        value = spdm.parse_report(data)
        return value, f"{len(data)} bytes; {len(value.measurements)} measurements"

    def chain() -> tuple[tuple[x509.Certificate, ...], str]:
        value = parse_chain()
        return value, f"{len(value)} certificates; {x509chain.name(value[0])}"

    parsed = checks.run("1", f"{label}the report parses", report)
    certificates = checks.run("1", f"{label}the certificates parse", chain)
    return _Gpu(label=label, data=data, report=parsed, chain=certificates or ())


def _appraise(
    checks: Checks,
    gpus: Sequence[_Gpu],
    nonce: bytes | None,
    source: str,
    policy: Policy,
    files: GpuFiles,
    now: int,
    basis: TimeBasis,
) -> FileAppraisal:
    documents = [
        (name, document)
        for name, data in _numbered("RIM", tuple(dict.fromkeys(files.rims)))
        if (document := checks.run("1", f"{name} parses", partial(_read_rim, data))) is not None
    ]
    revocation = _read_revocation(checks, files)
    for gpu in gpus:
        _verify(checks, gpu, nonce, source, policy, now)
    pairs = [(spki_digest(gpu.chain[0]), spki_digest(gpu.chain[1])) for gpu in gpus if len(gpu.chain) > 1]
    if len(gpus) > 1:
        checks.hold("8", "different GPUs", f"{len(pairs)} device keys and chips", lambda: verify_distinct(pairs))
    verified = [_verify_rim(checks, name, document, policy, now) for name, document in documents]
    _compare(checks, gpus, [rim for rim in verified if rim is not None], given=bool(files.rims))
    known = _verify_revocation(checks, gpus, [document for _, document in documents], revocation, policy, now)
    for gpu in gpus if not policy.any_hardware else ():
        _verify_chip(checks, gpu, policy)
    claims = {
        "gpu": [_claims(gpu, bool(files.rims)) for gpu in gpus],
        "nonce": source or "as given",
        "revocation": known,
    }
    return checks.done(claims, simulated=policy.simulated, now=now, basis=basis)


def _verify_chip(checks: Checks, gpu: _Gpu, policy: Policy) -> None:
    name = gpu.label + STEPS["9"]
    if len(gpu.chain) < 2:
        checks.skip("9", name, _NO_CHIP)
        return
    chip = spki_digest(gpu.chain[1])
    checks.hold("9", name, f"chip {chip.hex()}", lambda: verify_chip(chip, policy))


def _numbered(what: str, items: Sequence[_T]) -> list[tuple[str, _T]]:
    """Each with its name, numbered from 0 where there are several."""
    return [(what if len(items) == 1 else f"{what} {number}", item) for number, item in enumerate(items)]


def _read_rim(data: bytes) -> tuple[RimDocument, str]:
    document = parse_rim(data)
    return document, f"{len(data)} bytes; signer {x509chain.name(document.chain[0])}"


def _read_revocation(checks: Checks, files: GpuFiles) -> Revocation | None:
    if not (files.crls or files.ocsp):
        return None
    crls, responses = ([hex_or_binary(item) for item in group] for group in (files.crls, files.ocsp))
    detail = f"CRLs: {len(crls)}, OCSP responses: {len(responses)}"
    return checks.run("1", "revocation input parses", lambda: (parse_revocation(crls, responses), detail))


def _verify(checks: Checks, gpu: _Gpu, nonce: bytes | None, source: str, policy: Policy, now: int) -> None:
    """One GPU: chain, signature, nonce, firmware identifier, versions, mode."""
    report, chain = gpu.report, gpu.chain
    chained = False
    if chain:
        root = f"SHA-256 {policy.gpu_root.hex()}"
        chained = checks.hold(
            "8", gpu.label + _CHAIN, root, lambda: verify_device_chain(chain, root=policy.gpu_root, now=now)
        )
    else:
        checks.skip("8", gpu.label + _CHAIN, _NO_CHAIN)
    if report is None or not chain:
        for name in (_SIGNATURE, _NONCE, _FWID, _VERSIONS, _MODE):
            checks.skip("8", gpu.label + name, _NO_CHAIN if report else _NO_REPORT)
        return
    signed = checks.hold(
        "8", gpu.label + _SIGNATURE, "ECDSA P-384", lambda: verify_signature(gpu.data, report, chain[0])
    )
    gpu.verified = chained and signed
    if nonce is not None:
        detail = nonce.hex() + (f": {source}" if source else "")
        checks.hold("8", gpu.label + _NONCE, detail, lambda: verify_nonce(report, nonce))
    checks.run("8", gpu.label + _FWID, lambda: _in_hex(verify_fwid(report, chain)))
    checks.run("8", gpu.label + _VERSIONS, lambda: (None, "driver {}, VBIOS {}".format(*read_versions(report))))
    _verify_mode(checks, gpu, report, policy)


def _in_hex(value: bytes) -> tuple[bytes, str]:
    return value, value.hex()


def _verify_mode(checks: Checks, gpu: _Gpu, report: Report, policy: Policy) -> None:
    def judged() -> tuple[GpuMode, str]:
        mode = read_mode(report)
        assert mode is not None  # one of its two records is there
        verify_mode(mode, policy.gpu_mode)
        return mode, mode.value

    name = gpu.label + _MODE
    if report.find(OpaqueType.PROTECTED_PCIE_STATUS) is None and report.find(OpaqueType.FEATURE_FLAG) is None:
        checks.skip("8", name, "not stated in the report; the driver inside the guest knows it")
    else:
        gpu.mode = checks.run("8", name, judged)


def _verify_rim(checks: Checks, name: str, document: RimDocument, policy: Policy, now: int) -> Rim | None:
    """What the RIM's signer signed. An expired or foreign signer is a failure that does not keep it from comparing."""
    root = f"SHA-256 {policy.rim_root.hex()}"
    signer = f"{name}: signer's certificate chain to the RIM root"
    checks.hold("8", signer, root, lambda: verify_rim_chain(document, root=policy.rim_root, now=now))

    def signed() -> tuple[Rim, str]:
        rim = verify_rim_signature(document)
        return rim, f"{rim.kind} {rim.version}, {len(rim.references)} active measurements"

    return checks.run("8", f"{name}: signature", signed)


def _compare(checks: Checks, gpus: Sequence[_Gpu], rims: Sequence[Rim], *, given: bool) -> None:
    reports = [gpu.report for gpu in gpus if gpu.report is not None]
    if reports and rims:
        checks.hold("8", "RIMs are for these reports", "", lambda: require_spoken_of(rims, reports))
    for gpu in gpus:
        name = f"{gpu.label}measurements"
        if gpu.report is None or not rims:
            why = "no RIM whose signature verifies" if given else "no RIM given"
            checks.skip("8", name, why if gpu.report else _NO_REPORT)
            continue
        chosen = checks.run("8", f"{name}: one RIM an index", partial(_choose, gpu.report, rims))
        gpu.comparisons = chosen or ()
        found = {item.kind: item for item in gpu.comparisons}
        for kind in RimKind:
            if kind in found:
                checks.run("8", f"{name}: {kind}", partial(_matches, found[kind]))
            else:
                checks.skip("8", f"{name}: {kind}", "no RIM of its version given")


def _choose(report: Report, rims: Sequence[Rim]) -> tuple[tuple[Comparison, ...], str]:
    return compare_all(report, rims), ""


def _matches(comparison: Comparison) -> tuple[None, str]:
    comparison.require_match()
    return None, str(comparison)


def _verify_revocation(
    checks: Checks,
    gpus: Sequence[_Gpu],
    documents: Sequence[RimDocument],
    revocation: Revocation | None,
    policy: Policy,
    now: int,
) -> str:
    if revocation is None:
        checks.skip("8", "revocation", "no CRL or OCSP response to judge by")
        return "not judged: no CRL or OCSP response to judge by"
    chains = [gpu.chain for gpu in gpus if gpu.chain]
    signers = [document.chain for document in documents]

    def covered() -> tuple[str, str]:
        text = verify_revocation(chains, revocation, rule=policy.gpu_revocation, now=now, rim_chains=signers)
        return text, text

    return checks.run("8", "revocation", covered) or "not shown"


def _claims(gpu: _Gpu, given: bool) -> dict[str, Any]:
    report, chain = gpu.report, gpu.chain
    claims: dict[str, Any] = {
        "report": "verified" if gpu.verified else "not verified: chain or signature failed",
        "name": x509chain.name(chain[0]) if chain else None,
        "key": spki_digest(chain[0]).hex() if chain else None,
        "chip": spki_digest(chain[1]).hex() if len(chain) > 1 else None,
    }
    if report is None:
        return claims
    missing = "not compared: " + ("no RIM of its version given" if given else "no RIM given")
    found = {item.kind: item for item in gpu.comparisons}
    return claims | {
        "nonce": report.nonce.hex(),
        "driver": _text(lambda: report.driver_version),
        "vbios": _text(lambda: report.vbios_version),
        "fwid": report.fwid.hex() if report.fwid else None,
        "mode": gpu.mode.value if gpu.mode else None,
        "measurements": {
            kind.value.lower(): _comparison(found[kind]) if kind in found else missing for kind in RimKind
        },
    }


def _text(read: Callable[[], str | None]) -> str | None:
    try:
        return read()
    except FormatError:  # step 8 has said so
        return None


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "version": comparison.version,
        "active": len(comparison.active),
        "matched": len(comparison.matched),
        "failed": list(comparison.failed),
        "not_compared": list(comparison.skipped),
    }
