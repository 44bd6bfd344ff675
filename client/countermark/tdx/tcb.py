"""The TCB level of a TDX platform: Intel's rules of quote verification, step by step.

Intel's "SGX TDX DCAP Quote Verification Library" (QVL), design sections 4.1.2.4.9 to 4.1.2.4.17 and 4.1.2.9, as its
sources apply them (QuoteVerifier, EnclaveReportVerifier and Checks, 2024): the quoting enclave against its identity,
the TDX module against its own, the platform's levels, then how the three ratings combine, and for a TD 1.5 report
whether a relaunch would do. Another implementation, dcap-qvl, rates the same values (`tdx.quote`); this one gives each
refusal its code and names the component that is behind.
Not checked here: signatures and times, which ratings pass (the policy), and a module that is not Intel's (`tdx.td`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from countermark.errors import TcbError
from countermark.formats.quote import EnclaveReport, TdReport
from countermark.tdx.tcbinfo import ModuleIdentity, QeIdentity, SvnLevel, TcbInfo, TcbLevel

UP_TO_DATE: Final = "UpToDate"
OUT_OF_DATE: Final = "OutOfDate"
REVOKED: Final = "Revoked"
_CONFIGURATION: Final = ("ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDateConfigurationNeeded")
_PLATFORM: Final = (UP_TO_DATE, "SWHardeningNeeded", *_CONFIGURATION, OUT_OF_DATE, REVOKED)
_MODULE: Final = (UP_TO_DATE, OUT_OF_DATE, REVOKED)
_SGX_DEBUG: Final = 0x02  # of the first attributes byte


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformTcb:
    """The SVNs a machine's PCK certificate states."""

    cpu_svn: bytes  # 16 SGX component SVNs
    pce_svn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """Intel's word for a platform, and every advisory of the levels that led to it, sorted."""

    status: str
    advisories: tuple[str, ...]


def rate(report: TdReport, qe: EnclaveReport, pck: PlatformTcb, tcb_info: TcbInfo, qe_identity: QeIdentity) -> Rating:
    """Rate a platform: 1 statuses, 2 quoting enclave, 3 TDX module, 4 platform levels, 5 how they combine.

    Of a TD 1.5 report both the module at launch and the one now running need an identity and a level.
    Raises `TcbError` with step 3: `tcb.unknown_status`, `tcb.qe_identity` (the enclave is not the one of the identity,
    or older than all its levels), `tcb.module` (no identity or no level for the module, or Intel states another
    signer), `tcb.no_level` (below every level of the platform).
    """
    _verify_statuses(tcb_info, qe_identity)
    _verify_qe(qe, qe_identity)
    enclave = _svn_level(qe_identity.levels, qe.isv_svn)
    if enclave is None:
        raise _refuse("qe isvsvn", f"at least {qe_identity.levels[-1].isv_svn}", qe.isv_svn, "qe_identity")
    module = _module_level(_module_identity(report, tcb_info, report.tee_tcb_svn), report.tee_tcb_svn)
    sgx, tdx = _platform_levels(report.tee_tcb_svn, pck, tcb_info.levels)
    status = tdx.status
    if module is not None:
        status = _converge(status, module.status)
    if report.tee_tcb_svn2 is not None:
        running = _module_identity(report, tcb_info, report.tee_tcb_svn2)
        _module_level(running, report.tee_tcb_svn2)
        _platform_levels(report.tee_tcb_svn2, pck, tcb_info.levels)
        if enclave.status == UP_TO_DATE and module is not None and module.status == OUT_OF_DATE:
            status = _relaunch(status, report.tee_tcb_svn2, running, sgx, tcb_info.levels[0])
    status = _converge(status, enclave.status)
    used = (tdx, enclave) if module is None else (tdx, enclave, module)
    return Rating(status=status, advisories=tuple(sorted({item for level in used for item in level.advisories})))


def _refuse(name: str, wanted: object, got: object, code: str) -> TcbError:
    return TcbError(f"{name}: expected {wanted}, got {got}", code=f"tcb.{code}", step="3")


def _verify_statuses(tcb_info: TcbInfo, qe_identity: QeIdentity) -> None:
    # A word nobody knows could mean anything, so a document with one in it is not used at all.
    modules = (level.status for module in tcb_info.modules for level in module.levels)
    kinds: tuple[tuple[str, Iterable[str], tuple[str, ...]], ...] = (
        ("tcb info", (level.status for level in tcb_info.levels), _PLATFORM),
        ("tdx module", modules, _MODULE),
        ("qe identity", (level.status for level in qe_identity.levels), _MODULE),
    )
    for what, statuses, known in kinds:
        for status in statuses:
            if status not in known:
                raise _refuse(f"{what} tcbStatus", f"one of {', '.join(known)}", repr(status), "unknown_status")


def _verify_qe(qe: EnclaveReport, identity: QeIdentity) -> None:
    attributes = bytes(a & b for a, b in zip(qe.attributes, identity.attributes_mask, strict=True))
    pairs = (
        ("qe mrsigner", identity.mrsigner.hex(), qe.mrsigner.hex()),
        ("qe isvprodid", identity.isv_prod_id, qe.isv_prod_id),
        ("qe miscselect", f"{identity.misc_select:#x}", f"{qe.misc_select & identity.misc_select_mask:#x}"),
        ("qe attributes", identity.attributes.hex(), attributes.hex()),
        ("qe attributes.DEBUG", 0, int(bool(qe.attributes[0] & _SGX_DEBUG))),
    )
    for name, wanted, got in pairs:
        if wanted != got:
            raise _refuse(name, wanted, got, "qe_identity")


def _module_identity(report: TdReport, tcb_info: TcbInfo, svn: bytes) -> ModuleIdentity:
    # The second byte of TEE_TCB_SVN is the module's version: 0 is the unversioned module of TDX 1.0.
    identity = tcb_info.module
    if svn[1]:
        wanted = f"TDX_{svn[1]:02X}"
        found = [item for item in tcb_info.modules if item.name == wanted]
        if not found:
            known = ", ".join(item.name for item in tcb_info.modules) or "none"
            raise _refuse("tdx module identity", wanted, f"{known} in the TCB info", "module")
        identity = found[0]
    # A report that is not zero here is not of a module of Intel's: that is step 4's to say.
    signer, attributes = report.mrsignerseam, report.seam_attributes
    if not any(signer) and identity.mrsigner != signer:
        raise _refuse("tdx module mrsigner", identity.mrsigner.hex(), signer.hex(), "module")
    if not any(attributes) and identity.attributes != attributes:
        raise _refuse("tdx module attributes", identity.attributes.hex(), attributes.hex(), "module")
    return identity


def _module_level(identity: ModuleIdentity, svn: bytes) -> SvnLevel | None:
    if not identity.name:
        return None  # rated by the platform's levels alone
    level = _svn_level(identity.levels, svn[0])
    if level is None:
        raise _refuse(f"{identity.name} isvsvn", f"at least {identity.levels[-1].isv_svn}", svn[0], "module")
    return level


def _svn_level(levels: Sequence[SvnLevel], svn: int) -> SvnLevel | None:
    return next((level for level in levels if svn >= level.isv_svn), None)


def _platform_levels(svn: bytes, pck: PlatformTcb, levels: Sequence[TcbLevel]) -> tuple[TcbLevel, TcbLevel]:
    """The first level the SGX part meets, and the first one the TDX part meets as well."""
    sgx = [level for level in levels if _reaches(pck.cpu_svn, level.sgx) and pck.pce_svn >= level.pce_svn]
    # Of a versioned module, the first two bytes are its SVN and version: its identity's levels rate those.
    start = 2 if svn[1] else 0
    tdx = [level for level in sgx if _reaches(svn[start:], level.tdx[start:])]
    if not tdx:
        lowest = levels[-1]
        wanted = f"SGX {bytes(lowest.sgx).hex()}, PCE {lowest.pce_svn}, TDX {bytes(lowest.tdx).hex()}"
        got = f"SGX {pck.cpu_svn.hex()}, PCE {pck.pce_svn}, TDX {svn.hex()}"
        raise _refuse("platform SVNs", f"at least those of the lowest level ({wanted})", got, "no_level")
    return sgx[0], tdx[0]


def _reaches(svns: bytes, wanted: Sequence[int]) -> bool:
    return all(has >= least for has, least in zip(svns, wanted, strict=True))


def _converge(status: str, part: str) -> str:
    # QVL 4.1.2.4.17.4: a module or enclave that is revoked or out of date is the platform's flaw too.
    if part == REVOKED:
        return REVOKED
    if part == OUT_OF_DATE and status in (UP_TO_DATE, "SWHardeningNeeded"):
        return OUT_OF_DATE
    if part == OUT_OF_DATE and status in _CONFIGURATION:
        return "OutOfDateConfigurationNeeded"
    return status


def _relaunch(status: str, svn2: bytes, running: ModuleIdentity, sgx: TcbLevel, latest: TcbLevel) -> str:
    # QVL 4.1.2.4.17.4.3: all that is wrong is that the TD was launched under an older module than now runs.
    outdated = (OUT_OF_DATE, "OutOfDateConfigurationNeeded")
    if status not in outdated or sgx.status in (*outdated, REVOKED):
        return status
    newest = running.levels[0].isv_svn if running.levels else latest.tdx[0]
    current = not running.levels or running.levels[0].status == UP_TO_DATE
    if not current or svn2[0] < newest or svn2[2] < latest.tdx[2]:
        return status
    configuration = status in _CONFIGURATION or sgx.status in _CONFIGURATION
    return "TDRelaunchAdvisedConfigurationNeeded" if configuration else "TDRelaunchAdvised"
