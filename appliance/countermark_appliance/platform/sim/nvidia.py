"""The simulated GPU vendor and its H100s: P-384 chain, SPDM reports, CRLs, OCSP responses.

The chain has the five levels of a genuine H100 (device, boot ROM, provisioner, family, root); the device certificate
carries the firmware identifier in the TCG DICE extension 2.23.133.5.4.1, in the form genuine ones have: SEQUENCE {1,
SubjectPublicKeyInfo of the boot ROM, SEQUENCE {sha384, digest}}. Revocation: CRLs for the device chain, OCSP by a
delegated responder for the RIM signer. Reports are those of `formats.spdm`; reference values are in `rim`. Serial,
board and version strings spell SIMULATED.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp

from countermark.formats import spdm
from countermark.formats.spdm import Measurement, Opaque, OpaqueType, Report
from countermark_appliance.platform.sim import der
from countermark_appliance.platform.sim.intel import sign_raw
from countermark_appliance.platform.sim.issue import YEAR_S, Issued, issue, issue_crl

DRIVER_VERSION = "0.0.0-SIMULATED"
VBIOS_VERSION = "00.00.00.00.00"
FWID = hashlib.sha384(b"SIMULATED H100 firmware").digest()
MEASUREMENTS = 64
DRIVER_INDEXES = (8, 22, 23, 26)  # report indexes the driver RIM speaks of; the VBIOS RIM has the other active ones
VBIOS_INDEXES = (1, 2, 3, 4, 5, 6, 7, 10, 12)
_FWID_OID = "2.23.133.5.4.1"
_EXTENDED_KEY_USAGE_OID = "2.5.29.37"
_OCSP_SIGNING_OID = "1.3.6.1.5.5.7.3.9"
_SHA384_OID = "2.16.840.1.101.3.4.2.2"
_DMTF_SAN_OID = "1.3.6.1.4.1.412.274.1"
_CRL_URL = "http://simulated.invalid/gpu.crl"
_LIFETIME_S = 30 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuVendor:
    """The certificate authorities above every simulated GPU, and the RIM signer."""

    root: Issued
    family: Issued
    provisioner: Issued
    rim_root: Issued
    rim_signer: Issued
    rim_responder: Issued  # answers OCSP requests about RIM signers


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One simulated H100."""

    boot_rom: Issued
    device: Issued

    @property
    def uuid(self) -> str:
        """A name for people; says SIMULATED."""
        return f"GPU-SIMULATED-{self.device_key_digest().hex()[:16]}"

    def chain(self, vendor: GpuVendor) -> tuple[bytes, ...]:
        """DER certificates, device first, root last."""
        issued = (self.device, self.boot_rom, vendor.provisioner, vendor.family, vendor.root)
        return tuple(item.der for item in issued)

    def device_key_digest(self) -> bytes:
        """SHA-256 of the device key's SubjectPublicKeyInfo, DER."""
        return hashlib.sha256(_spki(self.device)).digest()


def make_gpu_vendor(*, now: int) -> GpuVendor:
    """A new GPU vendor; certificates are valid from an hour ago for ten years."""
    root = _issue("Device Identity CA", None, now)
    family = _issue("GH100 Identity", root, now)
    rim_root = _issue("RIM Root CA", None, now)
    return GpuVendor(
        root=root,
        family=family,
        provisioner=_issue("GH100 Provisioner ICA 1", family, now),
        rim_root=rim_root,
        rim_signer=_issue("RIM GH100 Signing", rim_root, now, ca=False),
        rim_responder=make_responder(rim_root, now=now),
    )


def make_responder(issuer: Issued, *, now: int, purpose: str = _OCSP_SIGNING_OID) -> Issued:
    """A key and certificate with which others answer OCSP requests for `issuer`; another `purpose` is for refusals."""
    usage = x509.UnrecognizedExtension(x509.ObjectIdentifier(_EXTENDED_KEY_USAGE_OID), der.sequence(der.oid(purpose)))
    return _issue("OCSP Responder", issuer, now, ca=False, extensions=(usage,))


def make_gpu(vendor: GpuVendor, *, now: int) -> Gpu:
    """A new GPU with its boot ROM and device keys."""
    serial = secrets.token_hex(8).upper()
    boot_rom = _issue("GH100 A01 GSP BROM", vendor.provisioner, now)
    algorithm = der.sequence(der.oid(_SHA384_OID), der.octets(FWID))
    fwid = x509.UnrecognizedExtension(
        x509.ObjectIdentifier(_FWID_OID), der.sequence(der.integer(1), _spki(boot_rom), algorithm)
    )
    name = x509.OtherName(x509.ObjectIdentifier(_DMTF_SAN_OID), der.utf8(f"SIMULATED:GH100:{serial}"))
    device = _issue("GH100 A01 GSP FMC LF", boot_rom, now, ca=False, extensions=(fwid,), alternative_name=name)
    return Gpu(boot_rom=boot_rom, device=device)


def report(gpu: Gpu, nonce: bytes, *, protected_pcie: bool = False, fwid: bytes = FWID) -> bytes:
    """A signed measurement report over the 32-byte nonce. `fwid` empty leaves the record out, as old firmware does."""
    unsigned = Report(
        nonce=nonce,
        slot=0,
        response_params=bytes(2),
        measurements=tuple(Measurement(index=i, value_type=1, value=measured(i)) for i in range(1, MEASUREMENTS + 1)),
        responder_nonce=secrets.token_bytes(32),
        opaque=_opaque(protected_pcie, fwid),
        signature=bytes(spdm.SIGNATURE_BYTES),
    )
    part = spdm.encode_signed_part(unsigned)
    return part + sign_raw(gpu.device.key, part)


def measured(index: int) -> bytes:
    """The measurement at this report index, the same for every simulated GPU; inactive ones are zero."""
    if index in DRIVER_INDEXES or index in VBIOS_INDEXES:
        return hashlib.sha384(b"SIMULATED H100 measurement %d" % index).digest()
    return bytes(48)


def crls(vendor: GpuVendor, *, now: int, revoked: Sequence[x509.Certificate] = ()) -> tuple[bytes, ...]:
    """CRLs of root, family and provisioner, DER; `revoked` stand in every one of them."""
    issuers = (vendor.root, vendor.family, vendor.provisioner)
    return tuple(
        issue_crl(item, this_update=now - 3600, next_update=now + _LIFETIME_S, revoked=revoked) for item in issuers
    )


def ocsp_response(
    subject: x509.Certificate,
    issuer: Issued,
    responder: Issued,
    *,
    now: int,
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD,
    reason: x509.ReasonFlags | None = None,
    algorithm: hashes.HashAlgorithm | None = None,
) -> bytes:
    """A DER OCSP response about `subject`, signed by `responder`, current from an hour ago for 30 days."""
    start = datetime.datetime.fromtimestamp(now - 3600, datetime.UTC)
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=subject,
            issuer=issuer.certificate,
            algorithm=algorithm or hashes.SHA384(),
            cert_status=status,
            this_update=start,
            next_update=start + datetime.timedelta(seconds=_LIFETIME_S),
            revocation_time=start if status is ocsp.OCSPCertStatus.REVOKED else None,
            revocation_reason=reason,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, responder.certificate)
    )
    if responder is not issuer:
        builder = builder.certificates([responder.certificate])
    return builder.sign(responder.key, hashes.SHA384()).public_bytes(Encoding.DER)


def ocsp_responses(vendor: GpuVendor, *, now: int) -> tuple[bytes, ...]:
    """What the responder says about the RIM signer."""
    return (ocsp_response(vendor.rim_signer.certificate, vendor.rim_root, vendor.rim_responder, now=now),)


def _opaque(protected_pcie: bool, fwid: bytes) -> tuple[Opaque, ...]:
    active = (*DRIVER_INDEXES, *VBIOS_INDEXES)
    counts = b"".join((1 if i + 1 in active else 0).to_bytes(4, "little") for i in range(MEASUREMENTS))
    status = spdm.STATUS_ENABLED if protected_pcie else spdm.STATUS_DISABLED
    records = [
        (OpaqueType.VBIOS_VERSION, bytes(8)),
        (OpaqueType.BOARD_ID, b"SIM\0"),
        (OpaqueType.CHIP_SKU, b"SIMULATED\0"),
        (OpaqueType.CHIP_SKU_MOD, b"0\0"),
        (OpaqueType.PROJECT, b"SIMULATED\0"),
        (OpaqueType.PROJECT_SKU, b"0000\0"),
        (OpaqueType.PROJECT_SKU_MOD, b"\0\0"),
        (OpaqueType.DRIVER_VERSION, DRIVER_VERSION.encode() + b"\0"),
        (OpaqueType.GPU_INFO, bytes(8)),
        (OpaqueType.MEASUREMENT_COUNTS, counts),
        (OpaqueType.CPR_INFO, bytes(4)),
        (OpaqueType.NVDEC0_STATUS, bytes((spdm.STATUS_DISABLED,))),
    ]
    if fwid:
        records.append((OpaqueType.FWID, fwid))
    records.append((OpaqueType.PROTECTED_PCIE_STATUS, bytes((status,))))
    return tuple(Opaque(kind=kind.value, value=value) for kind, value in records)


def _issue(
    common_name: str,
    issuer: Issued | None,
    now: int,
    *,
    ca: bool = True,
    extensions: Sequence[x509.UnrecognizedExtension] = (),
    alternative_name: x509.GeneralName | None = None,
) -> Issued:
    return issue(
        common_name,
        issuer,
        not_before=now - 3600,
        not_after=now + 10 * YEAR_S,
        curve=ec.SECP384R1(),
        ca=ca,
        crl_url=_CRL_URL,
        extensions=extensions,
        alternative_name=alternative_name,
    )


def _spki(issued: Issued) -> bytes:
    return issued.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
