"""Step 8 of a session, bent one thing at a time, and NVIDIA's own evidence as far as it goes.

Rows that concern claims, RTMR3 and the policy's counts stand in tests/appraise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp

import vectors
from countermark import x509chain
from countermark.appraise import Verdict
from countermark.checks import Status
from countermark.errors import CountermarkError, GpuError, Undecidable
from countermark.formats import spdm
from countermark.formats.boot_events import GpuMode
from countermark.formats.evidence import GpuEvidence
from countermark.formats.spdm import FeatureFlag, Opaque, OpaqueType, Report
from countermark.gpu.appraise import match_rims
from countermark.gpu.report import DICE_FWID, DICE_TCB_INFO, read_mode, verify_fwid
from countermark.gpu.rim import parse_rim, verify_rim, verify_rim_signature
from countermark.policy import NVIDIA_RIM_ROOT, GpuRevocationRule
from countermark_appliance.platform.sim import der, nvidia, rim
from countermark_appliance.platform.sim.intel import sign_raw
from countermark_appliance.platform.sim.issue import Issued, issue
from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch
from made_certificates import make_certificate
from sim_evidence import NOW, Scene, machine, policy_for

DAY = 86_400
OTHER = bytes([7]) * 32
VENDOR = machine().gpu_vendor
DRIVER_RIM, VBIOS_RIM = machine().endorsements.gpu_rims


def endorsed(policy: dict[str, Any] | None = None, **changes: Any) -> Verdict:
    """A session whose machine hands out other GPU endorsements; `changes` without the prefix `gpu_`."""
    state = machine()
    named = {f"gpu_{name}": value for name, value in changes.items()}
    return Scene(state=replace(state, endorsements=replace(state.endorsements, **named))).appraise(
        policy_for(state, **(policy or {}))
    )


def rims(*data: bytes) -> Verdict:
    return endorsed(rims=data)


def evidence(bend: Callable[[GpuEvidence], GpuEvidence]) -> Verdict:
    def gpus(platform: SimPlatform, nonce: bytes) -> tuple[GpuEvidence, ...]:
        return tuple(bend(item) for item in SimPlatform.gpu_evidence(platform, nonce))

    return Scene(gpus=gpus).appraise()


def report(change: Callable[[Report], Report]) -> Verdict:
    """The report with other content, signed by the same GPU."""

    def bend(item: GpuEvidence) -> GpuEvidence:
        part = spdm.encode_signed_part(change(spdm.parse_report(item.report)))
        return replace(item, report=part + sign_raw(machine().gpus[0].device.key, part))

    return evidence(bend)


def measuring(index: int, value: bytes) -> Callable[[Report], Report]:
    def change(good: Report) -> Report:
        blocks = (replace(block, value=value) if block.index == index else block for block in good.measurements)
        return replace(good, measurements=tuple(blocks))

    return change


def stating(kind: OpaqueType, value: bytes | None) -> Callable[[Report], Report]:
    def change(good: Report) -> Report:
        kept = tuple(record for record in good.opaque if record.kind != kind)
        return replace(good, opaque=kept if value is None else (*kept, Opaque(kind=kind, value=value)))

    return change


def another_gpu(platform: SimPlatform, nonce: bytes) -> tuple[GpuEvidence, ...]:
    """Genuine, of the same vendor, answering our nonce, and not the one that was measured at boot."""
    gpu = nvidia.make_gpu(VENDOR, now=NOW)
    return (GpuEvidence(report=nvidia.report(gpu, nonce), certs=gpu.chain(VENDOR)),)


def shown_twice() -> Verdict:
    state = machine(2)
    scene = Scene(state=state, gpus=lambda platform, nonce: (SimPlatform.gpu_evidence(platform, nonce)[0],) * 2)
    return scene.appraise(policy_for(state))


def other_leaf(*extensions: x509.UnrecognizedExtension) -> Verdict:
    """The same chip with another device certificate, as other firmware would have it, measured as such."""
    gpu = machine().gpus[0]
    span = {"not_before": NOW - DAY, "not_after": NOW + DAY}
    return other_device(issue("firmware", gpu.boot_rom, **span, curve=ec.SECP384R1(), ca=False, extensions=extensions))


def other_device(device: Issued) -> Verdict:
    gpu = machine().gpus[0]
    return Scene(state=replace(machine(), gpus=(replace(gpu, device=device),))).appraise()


def extension(oid: x509.ObjectIdentifier, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(oid, value)


def fwid(digest: bytes, oid: str = "2.16.840.1.101.3.4.2.2") -> bytes:
    return der.sequence(der.oid(oid), der.octets(digest))


def tcb_info(*fwids: bytes, flags: bytes = bytes.fromhex("87050080000001")) -> bytes:
    """DiceTcbInfo with the members a genuine GB100 certificate has."""
    names = der.tlv(0x80, b"NVIDIA") + der.tlv(0x81, b"GB100 A01 GSP ") + der.tlv(0x82, b"01")
    numbers = der.tlv(0x83, b"\1") + der.tlv(0x84, b"\0") + der.tlv(0x85, b"\0")
    return der.sequence(
        names, numbers, der.tlv(0xA6, b"".join(fwids)), flags, der.tlv(0x88, b"\xc0"), der.tlv(0x89, b"\0")
    )


def composite(device: Issued, digest: bytes = nvidia.FWID) -> bytes:
    return der.sequence(der.integer(1), nvidia._spki(device), fwid(digest))


def good_blackwell() -> Verdict:
    return other_leaf(extension(DICE_TCB_INFO, tcb_info(fwid(nvidia.FWID), fwid(bytes(48)))))


def expired_signer() -> bytes:
    span = {"not_before": NOW - 10 * DAY, "not_after": NOW - 1}
    signer = issue("RIM signer", VENDOR.rim_root, **span, curve=ec.SECP384R1(), ca=False)
    return rim.make_rim(replace(VENDOR, rim_signer=signer), nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES)


def responses(status: ocsp.OCSPCertStatus, *, at: int = NOW, responder: Issued = VENDOR.rim_responder) -> Verdict:
    signer = VENDOR.rim_signer.certificate
    return endorsed(ocsp=(nvidia.ocsp_response(signer, VENDOR.rim_root, responder, now=at, status=status),))


BAD_SIGNATURE = DRIVER_RIM.replace(nvidia.measured(8).hex().encode(), nvidia.measured(22).hex().encode())
FOREIGN = nvidia.make_gpu_vendor(now=NOW)
UNKNOWN = (("1.2.3.4", b"\5\0"),)
ROWS: dict[str, tuple[str, str, Callable[[], Verdict]]] = {
    "GPU swapped for another genuine one": ("8", "gpu.device_key", lambda: Scene(gpus=another_gpu).appraise()),
    "GPU nonce of another VM": (
        "8",
        "gpu.nonce",
        lambda: Scene(gpus=lambda platform, _: SimPlatform.gpu_evidence(platform, OTHER)).appraise(),
    ),
    "several GPUs with the same certificate": ("8", "gpu.duplicate", shown_twice),
    "mode off": ("8", "gpu.mode", lambda: Scene(launch=TdLaunch(gpu_mode=GpuMode.CC_OFF)).appraise()),
    "protected PCIe in the GPU's status alone": (
        "8",
        "gpu.mode",
        lambda: report(stating(OpaqueType.PROTECTED_PCIE_STATUS, b"\xaa")),
    ),
    "protected PCIe in a feature flag alone": (
        "8",
        "gpu.mode",
        lambda: report(
            lambda good: stating(OpaqueType.FEATURE_FLAG, b"\2\0")(
                stating(OpaqueType.PROTECTED_PCIE_STATUS, None)(good)
            )
        ),
    ),
    "two modes": ("8", "gpu.field", lambda: report(stating(OpaqueType.FEATURE_FLAG, b"\2\0"))),
    "no mode": ("8", "gpu.field", lambda: report(stating(OpaqueType.PROTECTED_PCIE_STATUS, None))),
    "an unknown status": ("8", "gpu.field", lambda: report(stating(OpaqueType.PROTECTED_PCIE_STATUS, b"\0"))),
    "an unknown feature": ("8", "gpu.field", lambda: report(stating(OpaqueType.FEATURE_FLAG, b"\3"))),
    "developer tools": ("8", "gpu.devtools", lambda: Scene(launch=TdLaunch(gpu_devtools=True)).appraise()),
    "driver version that is no text": (
        "8",
        "gpu.field",
        lambda: report(stating(OpaqueType.DRIVER_VERSION, b"\xff\0")),
    ),
    "firmware identifier empty": ("8", "gpu.fwid_missing", lambda: report(stating(OpaqueType.FWID, b""))),
    "firmware identifier of zeros": ("8", "gpu.fwid_missing", lambda: report(stating(OpaqueType.FWID, bytes(48)))),
    "firmware identifier absent": ("8", "gpu.fwid_missing", lambda: report(stating(OpaqueType.FWID, None))),
    "firmware identifier of other firmware": ("8", "gpu.fwid", lambda: report(stating(OpaqueType.FWID, OTHER + OTHER))),
    "a certificate that names no firmware": ("8", "gpu.fwid_missing", other_leaf),
    "a certificate that names firmware twice": (
        "8",
        "gpu.fwid_missing",
        lambda: other_leaf(
            extension(DICE_FWID, composite(machine().gpus[0].boot_rom)),
            extension(DICE_TCB_INFO, tcb_info(fwid(nvidia.FWID))),
        ),
    ),
    "a certificate with a critical extension nobody reads": (
        "8",
        "gpu.extension",
        lambda: other_device(
            make_certificate(machine().gpus[0].boot_rom, ca=False, crl_sign=False, extensions=UNKNOWN)
        ),
    ),
    "a certificate for another chip": (
        "8",
        "gpu.fwid",
        lambda: other_leaf(extension(DICE_FWID, composite(VENDOR.provisioner))),
    ),
    "a certificate that ends in our firmware, of another form": (
        "8",
        "gpu.fwid",
        lambda: other_leaf(extension(DICE_FWID, der.octets(b"x" + fwid(nvidia.FWID)))),
    ),
    "Blackwell: other firmware": (
        "8",
        "gpu.fwid",
        lambda: other_leaf(extension(DICE_TCB_INFO, tcb_info(fwid(bytes(48)), fwid(nvidia.FWID)))),
    ),
    "Blackwell: another hash": (
        "8",
        "gpu.fwid",
        lambda: other_leaf(extension(DICE_TCB_INFO, tcb_info(fwid(nvidia.FWID, "2.16.840.1.101.3.4.2.1")))),
    ),
    "trailing report byte": (
        "1",
        "spdm.trailing",
        lambda: evidence(lambda item: replace(item, report=item.report + b"\0")),
    ),
    "no RIM": ("8", "gpu.rim_missing", rims),
    "no driver RIM": ("8", "gpu.rim_missing", lambda: rims(VBIOS_RIM)),
    "no VBIOS RIM": ("8", "gpu.rim_missing", lambda: rims(DRIVER_RIM)),
    "RIM of another driver": (
        "8",
        "gpu.rim_version",
        lambda: rims(DRIVER_RIM, VBIOS_RIM, rim.make_rim(VENDOR, "0.0.1-SIMULATED", nvidia.DRIVER_INDEXES)),
    ),
    "one index in both RIMs": (
        "8",
        "gpu.rim_conflict",
        lambda: rims(rim.make_rim(VENDOR, nvidia.DRIVER_VERSION, (8, 12)), VBIOS_RIM),
    ),
    "RIM mismatch, driver": ("8", "gpu.measurement", lambda: report(measuring(22, OTHER + OTHER[:16]))),
    "RIM mismatch, VBIOS": ("8", "gpu.measurement", lambda: report(measuring(3, bytes(48)))),
    "RIM mismatch, shorter": ("8", "gpu.measurement", lambda: report(measuring(3, nvidia.measured(3)[:47]))),
    "a measurement left out": (
        "8",
        "gpu.measurement",
        lambda: report(lambda good: replace(good, measurements=good.measurements[1:])),
    ),
    "RIM signer expired": ("8", "gpu.rim_expired", lambda: rims(expired_signer(), VBIOS_RIM)),
    "RIM from the future": (
        "8",
        "gpu.rim_not_yet_valid",
        lambda: rims(*rim.make_rims(replace(VENDOR, rim_signer=future_signer()))),
    ),
    "RIM signer that is an authority": (
        "8",
        "gpu.rim_chain",
        lambda: rims(*rim.make_rims(replace(VENDOR, rim_signer=VENDOR.rim_root))),
    ),
    "RIM bad signature": ("8", "gpu.rim_signature", lambda: rims(BAD_SIGNATURE, VBIOS_RIM)),
    "RIM of another root": ("8", "gpu.rim_root", lambda: rims(*rim.make_rims(FOREIGN))),
    "RIM root of the policy another": ("8", "gpu.rim_root", lambda: endorsed({"rim_root": OTHER})),
    "RIM wrapped": ("1", "gpu.rim", lambda: rims(b"<a>" + DRIVER_RIM + b"</a>", VBIOS_RIM)),
    "RIM with entities": ("1", "gpu.rim", lambda: rims(b'<!DOCTYPE a [<!ENTITY b "c">]>' + DRIVER_RIM, VBIOS_RIM)),
    "RIM with an external entity": (
        "1",
        "gpu.rim",
        lambda: rims(b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + DRIVER_RIM, VBIOS_RIM),
    ),
    "OCSP response that is none": ("1", "gpu.ocsp", lambda: endorsed(ocsp=(b"0",))),
    "OCSP revoked": ("8", "gpu.revoked", lambda: responses(ocsp.OCSPCertStatus.REVOKED)),
    "OCSP unknown": ("8", "gpu.ocsp_unknown", lambda: responses(ocsp.OCSPCertStatus.UNKNOWN)),
    "OCSP expired": ("8", "gpu.ocsp_expired", lambda: responses(ocsp.OCSPCertStatus.GOOD, at=NOW - 60 * DAY)),
    "OCSP by a stranger": (
        "8",
        "gpu.ocsp_responder",
        lambda: responses(ocsp.OCSPCertStatus.GOOD, responder=FOREIGN.rim_responder),
    ),
    "no OCSP and no CRL for the RIM signer": ("8", "gpu.revocation_missing", lambda: endorsed(ocsp=())),
    "no CRL for the device chain": ("8", "gpu.revocation_missing", lambda: endorsed(crls=())),
    "CRL expired": (
        "8",
        "gpu.expired",
        lambda: endorsed({"gpu_revocation": GpuRevocationRule.OPTIONAL}, crls=nvidia.crls(VENDOR, now=NOW - 60 * DAY)),
    ),
    "CRL names the boot ROM": (
        "8",
        "gpu.revoked",
        lambda: endorsed(crls=nvidia.crls(VENDOR, now=NOW, revoked=(machine().gpus[0].boot_rom.certificate,))),
    ),
    "CRL of a stranger": ("8", "gpu.crl_signature", lambda: endorsed(crls=nvidia.crls(FOREIGN, now=NOW))),
}
UNDECIDABLE = ("gpu.rim_missing", "gpu.revocation_missing")


def future_signer() -> Issued:
    span = {"not_before": NOW + DAY, "not_after": NOW + 2 * DAY}
    return issue("RIM signer", VENDOR.rim_root, **span, curve=ec.SECP384R1(), ca=False)


@pytest.mark.parametrize(("step", "code", "refused"), ROWS.values(), ids=ROWS)
def test_refused(step: str, code: str, refused: Callable[[], Verdict]) -> None:
    with pytest.raises(CountermarkError) as err:
        refused()
    assert (err.value.code, err.value.step) == (code, step)
    assert (err.value.checks[-1].code, err.value.checks[-1].status) == (code, Status.FAIL)
    assert isinstance(err.value, Undecidable) == (code in UNDECIDABLE)


def step8(verdict: Verdict) -> str:
    return next(check.detail for check in verdict.checks if check.step == "8")


def test_a_good_machine_is_accepted_with_everything_compared() -> None:
    detail = step8(Scene().appraise())
    assert "driver 0.0.0-SIMULATED: 4 of 4 measurements match" in detail
    assert "VBIOS 00.00.00.00.00: 9 of 9 measurements match" in detail
    assert "4 of 4 certificates known not to be revoked" in detail
    state = machine(2)
    verdict = Scene(state=state).appraise(policy_for(state))
    assert step8(verdict).count("9 of 9") == 2
    assert len(verdict.gpu) == 2


def test_the_named_weakening_is_one_field() -> None:
    verdict = endorsed({"gpu_revocation": GpuRevocationRule.OPTIONAL}, crls=(), ocsp=())
    assert "0 of 4 certificates known not to be revoked" in step8(verdict)


def test_protected_pcie_is_accepted_where_the_policy_wants_it() -> None:
    scene = Scene(launch=TdLaunch(gpu_mode=GpuMode.CC_PROTECTED_PCIE))
    verdict = scene.appraise(policy_for(machine(), gpu_mode="protected-pcie"))
    assert verdict.gpu[0].mode is GpuMode.CC_PROTECTED_PCIE


@pytest.mark.parametrize("flag", [FeatureFlag.SPT, FeatureFlag.MPT])
def test_a_feature_flag_alone_states_the_mode(flag: FeatureFlag) -> None:
    def change(good: Report) -> Report:
        stated = stating(OpaqueType.FEATURE_FLAG, flag.to_bytes(2, "little"))
        return stating(OpaqueType.PROTECTED_PCIE_STATUS, None)(stated(good))

    assert report(change).gpu[0].mode is GpuMode.CC_ON


def test_a_newer_opaque_form_says_the_same() -> None:
    def change(good: Report) -> Report:
        header = b"NVDAOD" + bytes((0, 0, 0, 2, 0, 0))
        return replace(good, opaque_header=header, opaque=tuple(replace(item, value_type=1) for item in good.opaque))

    assert report(change).gpu == Scene().appraise().gpu


def test_blackwell_certificates_name_their_firmware_in_dice_tcb_info() -> None:
    assert good_blackwell().gpu[0].fwid == nvidia.FWID
    under_the_other_name = other_leaf(extension(DICE_FWID, tcb_info(fwid(nvidia.FWID))))
    assert under_the_other_name.gpu[0].fwid == nvidia.FWID


# NVIDIA's own evidence. No driver RIM among the vectors is for a report among them, so that a genuine GPU cannot be
# accepted to the end here; everything else can.


def genuine(name: str) -> tuple[Report, tuple[x509.Certificate, ...]]:
    report = spdm.parse_report(vectors.gpu_report(name))
    return report, x509chain.parse_pem_chain(vectors.gpu_chain_pem(name), "gpu")


def test_genuine_reports_state_mode_and_chip() -> None:
    new, chain = genuine("h100-550")
    assert read_mode(new) is GpuMode.CC_ON
    assert verify_fwid(new, chain).hex().startswith("f5c384ae")
    old, chain = genuine("h100-535")
    assert read_mode(old) is None
    with pytest.raises(GpuError) as err:
        verify_fwid(old, chain)
    assert err.value.code == "gpu.fwid_missing"


def test_genuine_evidence_goes_as_far_as_its_driver_rim() -> None:
    report, chain = genuine("h100-535")
    vbios = vectors.read("nvidia/rim/1010_0200_882_96005E0001_PROD.swidtag")
    found = verify_rim(parse_rim(vbios), root=NVIDIA_RIM_ROOT, now=1_717_200_000)  # 2024-06-01
    with pytest.raises(Undecidable) as err:
        match_rims([report], [found], [chain])
    assert err.value.code == "gpu.rim_missing"
    assert "NV_GPU_DRIVER_GH100_535.86.09" in str(err.value)
    driver = vectors.read("nvidia/rim/NV_GPU_DRIVER_GH100_550.144.03.xml")
    other = verify_rim(parse_rim(driver), root=NVIDIA_RIM_ROOT, now=1_750_000_000)
    with pytest.raises(GpuError) as refused:
        match_rims([report], [found, other], [chain])
    assert refused.value.code == "gpu.rim_version"
    assert "expected version 535.86.09, got 550.144.03" in str(refused.value)


def test_with_a_driver_rim_of_its_version_a_genuine_report_would_match() -> None:
    """The missing file stood in for: what the 535 report measures, signed by our vendor for exactly that version."""
    report, chain = genuine("h100-535")
    vbios = vectors.read("nvidia/rim/1010_0200_882_96005E0001_PROD.swidtag")
    values = {block.index: block.value for block in report.measurements}
    stand_in = rim.make_rim(VENDOR, "535.86.09", (8, 22, 23), values=values)
    driver = verify_rim_signature(parse_rim(stand_in))
    found = verify_rim_signature(parse_rim(vbios))
    ((of_driver, of_vbios),) = match_rims([report], [found, driver], [chain])
    assert (len(of_driver.matched), of_driver.failed) == (3, ())
    assert (len(of_vbios.matched), of_vbios.failed) == (12, ())


def test_the_simulated_roots_digests_are_what_a_policy_names() -> None:
    policy = policy_for(machine())
    assert policy.rim_root == hashlib.sha256(machine().rim_root_der).digest()
    assert policy.simulated
