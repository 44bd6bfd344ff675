"""One NVIDIA GPU's attestation report: whose signature, over what, answering which nonce, made by which firmware.

SPDM 1.1 (DMTF DSP0274 1.1.0, section 10.11) MEASUREMENTS with signature: ECDSA P-384 over SHA-384 of the request and
the response without its signature, which in SPDM 1.1 carries no signing context. The leaf certificate's TCG DICE
extension (`formats.dice`: one form on Hopper, another on Blackwell) names the firmware (FWID) the leaf key was derived
for; the report repeats it. A report without it (such as driver 535 made) says nothing about the firmware that signed
it, and is refused. Each step is a function of its own, so that an audit can go on after one that fails.

Not checked here: the measurements against reference manifests (`gpu.rim`), revocation (`gpu.revocation`), developer
tools and what RTMR3 says (`gpu.appraise`), and the NVSwitches a report names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from countermark import x509chain
from countermark.errors import FormatError, GpuError
from countermark.formats import dice
from countermark.formats.boot_events import GpuMode
from countermark.formats.dice import DiceIdentity, parse_dice
from countermark.formats.spdm import (
    STATUS_DISABLED,
    STATUS_ENABLED,
    FeatureFlag,
    OpaqueType,
    Report,
    signed_part,
)

DICE_FWID: Final = x509.ObjectIdentifier(dice.COMPOSITE_DEVICE_ID)
DICE_TCB_INFO: Final = x509.ObjectIdentifier(dice.TCB_INFO)
_PROTECTED_PCIE: Final = {
    bytes((STATUS_ENABLED,)): GpuMode.CC_PROTECTED_PCIE,
    bytes((STATUS_DISABLED,)): GpuMode.CC_ON,
}
_FEATURES: Final = {
    FeatureFlag.SPT: GpuMode.CC_ON,
    FeatureFlag.MPT: GpuMode.CC_ON,
    FeatureFlag.PPCIE: GpuMode.CC_PROTECTED_PCIE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU whose report verified. Keys are SHA-256 of a SubjectPublicKeyInfo.

    `key`: the device (leaf) certificate's, which a firmware update changes. `chip`: its issuer's, the boot ROM, which
    stays the same for the life of the chip. `mode`: as the GPU itself states it.
    """

    key: bytes
    chip: bytes
    name: str
    driver_version: str
    vbios_version: str
    mode: GpuMode
    fwid: bytes
    measurements: int


def _refuse(message: str, code: str) -> GpuError:
    return GpuError(message, code=f"gpu.{code}", step="8")


def spki_digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo (DER)."""
    return hashlib.sha256(x509chain.spki(certificate)).digest()


def verify_report(
    data: bytes, report: Report, chain: Sequence[x509.Certificate], *, root: bytes, nonce: bytes, now: int
) -> Gpu:
    """Step 8 for one GPU: 1 chain to the pinned root, 2 signature, 3 nonce, 4 FWID, 5 versions and mode are stated.

    `report` is `parse_report(data)`; `chain` is leaf first, root last. Raises `GpuError` with step 8: `gpu.field` for a
    report that does not state its mode, or as the step functions below.
    """
    verify_device_chain(chain, root=root, now=now)
    verify_signature(data, report, chain[0])
    verify_nonce(report, nonce)
    fwid = verify_fwid(report, chain)
    driver, vbios = read_versions(report)
    mode = read_mode(report)
    if mode is None:
        raise _refuse("GPU report: expected protected PCIe status or feature flag, got neither", "field")
    return Gpu(
        key=spki_digest(chain[0]),
        chip=spki_digest(chain[1]),
        name=x509chain.name(chain[0]),
        driver_version=driver,
        vbios_version=vbios,
        mode=mode,
        fwid=fwid,
        measurements=len(report.measurements),
    )


def verify_device_chain(chain: Sequence[x509.Certificate], *, root: bytes, now: int) -> None:
    """The certificates lead to the pinned root, which has the SHA-256 `root`.

    Raises `GpuError`: `gpu.root`, `gpu.short`, `gpu.ca`, `gpu.chain_signature`, `gpu.extension`,
    `gpu.not_yet_valid`, `gpu.expired`.
    """
    try:
        x509chain.verify_chain(chain, root=root, now=now)
    except x509chain.ChainError as err:
        code = "chain_signature" if err.reason == "signature" else err.reason
        raise _refuse(f"GPU certificate chain: {err}", code) from err


def verify_signature(data: bytes, report: Report, leaf: x509.Certificate) -> None:
    """The leaf key signed `data`, of which `report` is the parsed form. Raises `GpuError` `gpu.signature`."""
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _refuse(f"{x509chain.name(leaf)}: expected a P-384 key", "signature")
    r, s = report.signature[:48], report.signature[48:]
    try:
        key.verify(
            encode_dss_signature(int.from_bytes(r), int.from_bytes(s)), signed_part(data), ec.ECDSA(hashes.SHA384())
        )
    except InvalidSignature as err:
        raise _refuse("GPU report: its signature does not verify", "signature") from err


def verify_nonce(report: Report, nonce: bytes) -> None:
    """The report answers our 32-byte nonce. Raises `GpuError` `gpu.nonce`."""
    if report.nonce != nonce:
        raise _refuse(f"GPU nonce: expected {nonce.hex()}, got {report.nonce.hex()}", "nonce")


def verify_fwid(report: Report, chain: Sequence[x509.Certificate]) -> bytes:
    """The report's firmware identifier, which the leaf certificate must name too.

    Where the certificate states the key of the chip, that is its issuer's. Raises `GpuError` `gpu.fwid_missing` (no
    identifier, an empty one or zeros, or a certificate without the extension) or `gpu.fwid`.
    """
    fwid = report.fwid
    if fwid is None or not any(fwid):
        raise _refuse("GPU report: expected a firmware identifier, got none", "fwid_missing")
    identity = _dice_identity(chain[0])
    if identity.fwid != fwid:
        raise _refuse(f"GPU FWID: expected {identity.fwid.hex()} of the leaf certificate, got {fwid.hex()}", "fwid")
    if identity.device_id is not None and (len(chain) < 2 or identity.device_id != x509chain.spki(chain[1])):
        raise _refuse("GPU leaf certificate: expected the issuer's key as its device, got another", "fwid")
    return fwid


def _dice_identity(leaf: x509.Certificate) -> DiceIdentity:
    values = [
        item.value.value
        for item in leaf.extensions
        if item.oid in (DICE_FWID, DICE_TCB_INFO) and isinstance(item.value, x509.UnrecognizedExtension)
    ]
    if len(values) != 1:
        message = f"{x509chain.name(leaf)}: expected one DICE extension {DICE_FWID.dotted_string}, got {len(values)}"
        raise _refuse(message, "fwid_missing")
    try:
        return parse_dice(values[0])
    except FormatError as err:
        raise _refuse(f"{x509chain.name(leaf)}: {err}", "fwid") from err


def read_versions(report: Report) -> tuple[str, str]:
    """Driver and VBIOS version. Raises `GpuError` `gpu.field` when either is absent or not text."""
    try:
        driver, vbios = report.driver_version, report.vbios_version
    except FormatError as err:
        raise _refuse(f"GPU report: {err}", "field") from err
    if not driver or not vbios:
        raise _refuse("GPU report: expected driver and VBIOS versions, got none", "field")
    return driver, vbios


def read_mode(report: Report) -> GpuMode | None:
    """The mode the GPU states, by protected PCIe status or feature flag; None when it states neither.

    Raises `GpuError` `gpu.field` for an unknown value, or two that contradict each other.
    """
    modes: set[GpuMode] = set()
    status = report.find(OpaqueType.PROTECTED_PCIE_STATUS)
    if status is not None:
        if status not in _PROTECTED_PCIE:
            raise _refuse(f"GPU protected PCIe status: expected on or off, got {status.hex()}", "field")
        modes.add(_PROTECTED_PCIE[status])
    try:
        flag = report.feature_flag
    except FormatError as err:
        raise _refuse(f"GPU report: {err}", "field") from err
    if flag is not None:
        modes.add(_FEATURES[flag])
    if len(modes) > 1:
        raise _refuse("GPU mode: expected protected PCIe status and feature flag to agree, got both modes", "field")
    return modes.pop() if modes else None
