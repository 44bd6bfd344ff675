"""What a TD report says about the TD itself: attributes, XFAM and the TDX module, without any reference value.

Intel TDX Module 1.5 ABI (348551): ATTRIBUTES, XFAM (fixed bits in table "XFAM definition"), SEAMINFO. dcap-qvl ignores
XFAM, MRSEAM and the PKS, KL, PERFMON, LASS, ICSSD and TPA attributes, so they are judged here. One value is accepted
for the attributes: SEPT_VE_DISABLE alone; the TD cannot then be debugged, migrated or profiled, nor be fed #VE on its
private memory.
Not checked here: that the report is authentic (`tdx.quote`), and the measurements (`tdx.registers`).
"""

from __future__ import annotations

from typing import Final

from countermark.errors import MeasurementError
from countermark.formats.quote import TdAttributes, TdReport
from countermark.policy import Policy

# XFAM: x87 and SSE always set; every feature bit a TD of module 1.5 can have (AVX, AVX-512, PT, PKRU, CET, UINTR, LBR,
# AMX). Bit 19 (APX) is for newer processors than those the GPUs are attached to, and is refused until it is wanted.
XFAM_FIXED_1: Final = 0x3
XFAM_ALLOWED: Final = 0x0006DBE7

_FORBIDDEN: Final = (
    (TdAttributes.HGS_PLUS_PROF, "tdx.profiling", "the host can profile it"),
    (TdAttributes.PERF_PROF, "tdx.profiling", "the host can profile it"),
    (TdAttributes.PMT_PROF, "tdx.profiling", "the host can profile it"),
    (TdAttributes.MIGRATABLE, "tdx.migratable", "the TD can be moved to another machine"),
    (TdAttributes.PKS, "tdx.pks", "supervisor protection keys"),
    (TdAttributes.KL, "tdx.key_locker", "key locker"),
    (TdAttributes.PERFMON, "tdx.perfmon", "performance monitoring"),
    (TdAttributes.SERVTD_EXT, "tdx.attribute", "service TDs may be bound to it later"),
    (TdAttributes.ICSSD, "tdx.attribute", "not one this image is launched with"),
    (TdAttributes.LASS, "tdx.attribute", "not one this image is launched with"),
    (TdAttributes.TPA, "tdx.attribute", "not one this image is launched with"),
)


def _refuse(message: str, code: str) -> MeasurementError:
    return MeasurementError(message, code=code, step="4")


def verify_td(report: TdReport, policy: Policy) -> str:
    """Step 4. Returns one line for the check's detail.

    Raises `MeasurementError` with step 4: `tdx.debug`, `tdx.sept_ve_disable`, `tdx.profiling`, `tdx.migratable`,
    `tdx.pks`, `tdx.key_locker`, `tdx.perfmon`, `tdx.attribute` (another that has a name), `tdx.reserved` (one that has
    none), `tdx.xfam`, `tdx.mrseam`, `tdx.mrsignerseam`, `tdx.seam_attributes`, `tdx.tee_tcb_svn2`, `tdx.mrservicetd`.
    """
    attributes = report.attributes
    if attributes & TdAttributes.DEBUG:
        raise _refuse("td_attributes.DEBUG: expected 0, got 1 (the host can read and change its memory)", "tdx.debug")
    if not attributes & TdAttributes.SEPT_VE_DISABLE:
        raise _refuse("td_attributes.SEPT_VE_DISABLE: expected 1, got 0", "tdx.sept_ve_disable")
    for bit, code, why in _FORBIDDEN:
        if attributes & bit:
            raise _refuse(f"td_attributes.{bit.name}: expected 0, got 1 ({why})", code)
    reserved = int(attributes) & ~int(TdAttributes.SEPT_VE_DISABLE)
    if reserved:
        raise _refuse(f"td_attributes: expected no other bit set, got {reserved:#018x}", "tdx.reserved")
    xfam = int.from_bytes(report.xfam, "little")
    if xfam & XFAM_FIXED_1 != XFAM_FIXED_1 or xfam & ~XFAM_ALLOWED:
        raise _refuse(f"xfam: expected {XFAM_FIXED_1:#x} set within {XFAM_ALLOWED:#x}, got {xfam:#x}", "tdx.xfam")
    if report.mrsignerseam != bytes(48):
        raise _refuse(f"mrsignerseam: expected zero (Intel), got {report.mrsignerseam.hex()}", "tdx.mrsignerseam")
    if report.seam_attributes != bytes(8):
        raise _refuse(f"seam_attributes: expected zero, got {report.seam_attributes.hex()}", "tdx.seam_attributes")
    if report.mrseam not in policy.mrseam:
        known = f"one of the {len(policy.mrseam)} modules of the policy's key mrseam in [tdx]"
        message = f"mrseam: expected {known}, got {report.mrseam.hex()}"
        raise _refuse(message, "tdx.mrseam")
    # TD 1.5 only: the module may be updated under a running TD, never to an older one; bytes 1 and 0 are its major
    # version and its SVN.
    if report.tee_tcb_svn2 is not None and report.tee_tcb_svn2[1::-1] < report.tee_tcb_svn[1::-1]:
        message = f"tee_tcb_svn2: expected at least {report.tee_tcb_svn.hex()}, got {report.tee_tcb_svn2.hex()}"
        raise _refuse(message, "tdx.tee_tcb_svn2")
    if report.mrservicetd is not None and report.mrservicetd != bytes(48):
        raise _refuse(f"mrservicetd: expected zero, got {report.mrservicetd.hex()}", "tdx.mrservicetd")
    return f"SEPT_VE_DISABLE alone; xfam {xfam:#x}; TDX module {report.mrseam.hex()[:16]}"
