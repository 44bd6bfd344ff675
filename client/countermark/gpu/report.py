"""One NVIDIA GPU's attestation report: whose signature, over what, answering which nonce.

SPDM 1.1 (DMTF DSP0274 1.1.0, section 10.11) MEASUREMENTS with signature: ECDSA P-384 over SHA-384 of the request and
the response without its signature, which in SPDM 1.1 carries no signing context. The leaf certificate's TCG DICE
extension (2.23.133.5.4.1) names the firmware (FWID) the leaf key was derived for; the report repeats it. A report
without it (such as driver 535 made) says nothing about the firmware that signed it, and is refused.
Not checked here: the measurements against reference manifests (RIM; none exist for a simulated GPU), certificate
revocation (NVIDIA publishes it by OCSP only), and the CC mode, which the driver knows and RTMR3 carries
(`tdx.runtime_log`).
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
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from countermark import x509chain
from countermark.errors import GpuError
from countermark.formats.spdm import STATUS_DISABLED, STATUS_ENABLED, OpaqueType, Report, signed_part

DICE_FWID: Final = x509.ObjectIdentifier("2.23.133.5.4.1")
# SEQUENCE { OID sha384, OCTET STRING (48) }: how the extension's value ends, before the 48 bytes of the FWID.
_FWID_HEAD: Final = bytes.fromhex("303d06096086480165030402020430")
_FWID_BYTES: Final = 48
_PROTECTED_PCIE: Final = {bytes((STATUS_ENABLED,)): True, bytes((STATUS_DISABLED,)): False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU whose report verified. Keys are SHA-256 of a SubjectPublicKeyInfo.

    `key`: the device (leaf) certificate's, which a firmware update changes. `chip`: its issuer's, the boot ROM, which
    stays the same for the life of the chip.
    """

    key: bytes
    chip: bytes
    name: str
    driver_version: str
    vbios_version: str
    protected_pcie: bool
    fwid: bytes
    measurements: int


def spki_digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo (DER)."""
    return hashlib.sha256(
        certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def verify_report(
    data: bytes, report: Report, chain: Sequence[x509.Certificate], *, root: bytes, nonce: bytes, now: int
) -> Gpu:
    """Step 8 for one GPU: 1 chain to the pinned root, 2 signature, 3 nonce, 4 FWID, 5 driver, VBIOS, PCIe mode stated.

    `report` is `parse_report(data)`; `chain` is leaf first, root last. Raises `GpuError` with step 8: `gpu.root`,
    `gpu.short`, `gpu.ca`, `gpu.chain_signature`, `gpu.not_yet_valid`, `gpu.expired`, `gpu.signature`, `gpu.nonce`,
    `gpu.fwid_missing`, `gpu.fwid`, `gpu.field`.
    """
    try:
        x509chain.verify_chain(chain, root=root, now=now)
    except x509chain.ChainError as err:
        code = "chain_signature" if err.reason == "signature" else err.reason
        raise GpuError(f"GPU certificate chain: {err}", code=f"gpu.{code}", step="8") from err
    leaf = chain[0]
    _verify_signature(leaf, report.signature, signed_part(data))
    if report.nonce != nonce:
        message = f"GPU nonce: expected {nonce.hex()}, got {report.nonce.hex()}"
        raise GpuError(message, code="gpu.nonce", step="8")
    fwid = _verify_fwid(leaf, report)
    driver, vbios = report.driver_version, report.vbios_version
    if driver is None or vbios is None:
        raise GpuError("GPU report: expected driver and VBIOS versions, got none", code="gpu.field", step="8")
    status = report.find(OpaqueType.PROTECTED_PCIE_STATUS)
    if status not in _PROTECTED_PCIE:
        message = f"GPU protected PCIe status: expected on or off, got {status.hex() if status else 'none'}"
        raise GpuError(message, code="gpu.field", step="8")
    return Gpu(
        key=spki_digest(leaf),
        chip=spki_digest(chain[1]),
        name=x509chain.name(leaf),
        driver_version=driver,
        vbios_version=vbios,
        protected_pcie=_PROTECTED_PCIE[status],
        fwid=fwid,
        measurements=len(report.measurements),
    )


def _verify_signature(leaf: x509.Certificate, signature: bytes, message: bytes) -> None:
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise GpuError(f"{x509chain.name(leaf)}: expected a P-384 key", code="gpu.signature", step="8")
    der = encode_dss_signature(int.from_bytes(signature[:48]), int.from_bytes(signature[48:]))
    try:
        key.verify(der, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as err:
        raise GpuError("GPU report: its signature does not verify", code="gpu.signature", step="8") from err


def _verify_fwid(leaf: x509.Certificate, report: Report) -> bytes:
    if report.fwid is None:
        raise GpuError("GPU report: expected a firmware identifier, got none", code="gpu.fwid_missing", step="8")
    try:
        extension = leaf.extensions.get_extension_for_oid(DICE_FWID).value
    except x509.ExtensionNotFound as err:
        message = f"{x509chain.name(leaf)}: expected the DICE extension {DICE_FWID.dotted_string}"
        raise GpuError(message, code="gpu.fwid_missing", step="8") from err
    value = extension.value if isinstance(extension, x509.UnrecognizedExtension) else b""
    if len(report.fwid) != _FWID_BYTES or not value.endswith(_FWID_HEAD + report.fwid):
        message = f"GPU FWID: expected that of the leaf certificate, got {report.fwid.hex()}"
        raise GpuError(message, code="gpu.fwid", step="8")
    return report.fwid
