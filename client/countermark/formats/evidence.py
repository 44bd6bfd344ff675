"""Evidence: everything the appliance hands over, in one deterministic CBOR map.

    {v, platform, quote, ccel, rtmr3_log, gpu: [{report, certs}], claims, keys: [[role, COSE_Key]],
     endorsements: {tdx, gpu: {rims, crls, ocsp}}}

RFC 9334 words: quote, logs, GPU reports and claims are evidence; the endorsements are vendor-signed and travel along
so that a verifier can work offline. `endorsements.tdx` is the JSON of dcap-qvl's QuoteCollateralV3. The passport
inside the TLS certificate is smaller: CBOR tag 60000 over [quote, claims], in extension 2.23.133.5.4.9 (the tag and
extension of the interoperable RA-TLS format of the Confidential Computing Consortium; the claims buffer is ours, and
so is its hash).

Framing only: quote, logs, reports, claims and JSON are parsed by their own modules. Nothing is verified here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cbor2 import CBORTag

from countermark.errors import FormatError
from countermark.formats import cbor, report_data
from countermark.formats.report_data import RoleKey

VERSION = 1
PASSPORT_OID = "2.23.133.5.4.9"
PASSPORT_TAG = 60000
MAX_EVIDENCE_BYTES = 8 * 1024 * 1024
MAX_PASSPORT_BYTES = 72 * 1024
MAX_GPUS = 16
MAX_CERTS = 8
MAX_RIMS = 2 * MAX_GPUS
MAX_CRLS = 16
MAX_OCSP = 8 * MAX_GPUS
_MAX_BYTES = {
    "quote": 64 * 1024,
    "ccel": 1024 * 1024,
    "rtmr3_log": 64 * 1024,
    "claims": report_data.MAX_CLAIMS_BYTES,
    "report": 64 * 1024,
    "cert": 8 * 1024,
    "tdx": 1024 * 1024,
    "rim": 256 * 1024,
    "crl": 256 * 1024,
    "ocsp": 16 * 1024,
}


class PlatformName(Enum):
    """Where the quote comes from. Only TDX is not simulated."""

    SIM = "sim"
    TDX = "tdx"
    VTPM = "vtpm"

    @property
    def simulated(self) -> bool:
        """True unless a CPU signed the quote."""
        return self is not PlatformName.TDX


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEvidence:
    """One GPU: its SPDM report and its certificate chain, DER, device first, root last."""

    report: bytes
    certs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsements:
    """Vendor-signed: `tdx` is QuoteCollateralV3 as JSON, RIMs are signed SWID tags (XML), the rest DER."""

    tdx: bytes
    gpu_rims: tuple[bytes, ...] = ()
    gpu_crls: tuple[bytes, ...] = ()
    gpu_ocsp: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All of it. `claims` stay bytes: report_data is a digest over exactly these."""

    platform: PlatformName
    quote: bytes
    ccel: bytes
    rtmr3_log: bytes
    gpu: tuple[GpuEvidence, ...]
    claims: bytes
    keys: tuple[RoleKey, ...]
    endorsements: Endorsements


@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """What the TLS certificate carries: bound to the key, not fresh."""

    quote: bytes
    claims: bytes


def encode_evidence(evidence: Evidence) -> bytes:
    """Deterministic CBOR of the evidence."""
    return cbor.encode(
        {
            "v": VERSION,
            "platform": evidence.platform.value,
            "quote": evidence.quote,
            "ccel": evidence.ccel,
            "rtmr3_log": evidence.rtmr3_log,
            "gpu": [{"report": gpu.report, "certs": list(gpu.certs)} for gpu in evidence.gpu],
            "claims": evidence.claims,
            "keys": report_data.keys_value(evidence.keys),
            "endorsements": {
                "tdx": evidence.endorsements.tdx,
                "gpu": {
                    "rims": list(evidence.endorsements.gpu_rims),
                    "crls": list(evidence.endorsements.gpu_crls),
                    "ocsp": list(evidence.endorsements.gpu_ocsp),
                },
            },
        }
    )


def parse_evidence(data: bytes) -> Evidence:
    """The inverse of `encode_evidence`. Raises `FormatError` with a code below `evidence.`, `keys.` or `cbor.`."""
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_EVIDENCE_BYTES),
        "evidence",
        v=int,
        platform=str,
        quote=bytes,
        ccel=bytes,
        rtmr3_log=bytes,
        gpu=list,
        claims=bytes,
        keys=list,
        endorsements=dict,
    )
    if value["v"] != VERSION:
        raise FormatError(f"evidence.v: expected {VERSION}, got {value['v']}", code="evidence.version")
    try:
        platform = PlatformName(value["platform"])
    except ValueError as err:
        raise FormatError("evidence.platform: expected sim, tdx or vtpm", code="evidence.platform") from err
    endorsements = cbor.fields(value["endorsements"], "evidence", tdx=bytes, gpu=dict)
    gpu_endorsements = cbor.fields(endorsements["gpu"], "evidence", rims=list, crls=list, ocsp=list)
    return Evidence(
        platform=platform,
        quote=_blob(value["quote"], "quote"),
        ccel=_blob(value["ccel"], "ccel"),
        rtmr3_log=_blob(value["rtmr3_log"], "rtmr3_log"),
        gpu=tuple(_gpu(item) for item in _list(value["gpu"], "gpu", MAX_GPUS)),
        claims=_blob(value["claims"], "claims"),
        keys=report_data.keys_from_value(value["keys"]),
        endorsements=Endorsements(
            tdx=_blob(endorsements["tdx"], "tdx"),
            gpu_rims=tuple(_blob(item, "rim") for item in _list(gpu_endorsements["rims"], "rims", MAX_RIMS)),
            gpu_crls=tuple(_blob(item, "crl") for item in _list(gpu_endorsements["crls"], "crls", MAX_CRLS)),
            gpu_ocsp=tuple(_blob(item, "ocsp") for item in _list(gpu_endorsements["ocsp"], "ocsp", MAX_OCSP)),
        ),
    )


def gpu_digest(gpus: Sequence[GpuEvidence]) -> bytes:
    """The `gpu.digest` claim for this GPU evidence."""
    return report_data.gpu_digest([(gpu.report, gpu.certs) for gpu in gpus])


def encode_passport(passport: Passport) -> bytes:
    """The value of the certificate extension."""
    return cbor.encode(CBORTag(PASSPORT_TAG, [passport.quote, passport.claims]))


def parse_passport(data: bytes) -> Passport:
    """The inverse of `encode_passport`. Raises `FormatError` with code `passport.*` or `cbor.*`."""
    value = cbor.decode(data, max_bytes=MAX_PASSPORT_BYTES)
    if not isinstance(value, CBORTag) or value.tag != PASSPORT_TAG:
        raise FormatError(f"passport: expected CBOR tag {PASSPORT_TAG}", code="passport.tag")
    parts = value.value
    if not isinstance(parts, list) or len(parts) != 2:
        raise FormatError("passport: expected [quote, claims]", code="passport.form")
    return Passport(quote=_blob(parts[0], "quote"), claims=_blob(parts[1], "claims"))


def _blob(value: object, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError(f"evidence.{name}: expected bytes, got {type(value).__name__}", code="evidence.field")
    if len(value) > _MAX_BYTES[name]:
        message = f"evidence.{name}: expected at most {_MAX_BYTES[name]} bytes, got {len(value)}"
        raise FormatError(message, code="evidence.too_long")
    return value


def _list(value: list[Any], name: str, most: int) -> list[Any]:
    if len(value) > most:
        raise FormatError(f"evidence.{name}: expected at most {most} items, got {len(value)}", code="evidence.too_many")
    return value


def _gpu(item: object) -> GpuEvidence:
    fields = cbor.fields(item, "evidence", report=bytes, certs=list)
    certs = tuple(_blob(cert, "cert") for cert in _list(fields["certs"], "certs", MAX_CERTS))
    return GpuEvidence(report=_blob(fields["report"], "report"), certs=certs)
