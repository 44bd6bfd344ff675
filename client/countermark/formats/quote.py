"""Intel TDX DCAP quotes, version 4 and version 5 with TD 1.0 and TD 1.5 bodies.

Intel, "Intel TDX DCAP Quoting Library API" (rev 0.9), appendix A.3 (version 4) and A.4 (version 5); the TD report
fields after Intel TDX Module 1.5 ABI (348551), TDREPORT_STRUCT and ATTRIBUTES; the enclave report after Intel SDM
vol. 3D (REPORT). Integers are little-endian. Only ECDSA-256 quotes of Intel's quoting enclave with certification data
type 6 around a type 5 PEM chain are read, which is what DCAP produces on a TDX platform. The other types name the PCK
certificate without holding its chain: they are refused as such (`quote.chain_type`), as are bodies of SGX and of TD 1.5
with a service TD's history (types 1 and 4). Reserved fields must be zero.

Quoting services hand out quotes in a fixed-size buffer, so zero bytes may follow the signature data: they are kept as
`trailing`; any other byte there is refused. They are outside every signature, as is the certification data's framing:
name a quote by `quote_digest` (header and body), never by a digest of all its bytes.

Not checked here: any signature or certificate, attribute values, and whether the measurements are the expected ones.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from enum import IntFlag

from countermark.errors import FormatError
from countermark.formats.reader import Reader

HEADER_BYTES = 48
BODY_10_BYTES = 584
BODY_15_BYTES = 648
ENCLAVE_REPORT_BYTES = 384
MAX_QUOTE_BYTES = 64 * 1024
MAX_CERTIFICATES = 8

INTEL_QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_ECDSA_P256 = 2
_TEE_TDX = 0x81
_QE_REPORT_CERTIFICATION = 6
_PEM_CHAIN = 5
_CHAIN_TYPES = {
    1: "the platform's id in plain text",
    2: "the platform's id encrypted with RSA-2048",
    3: "the platform's id encrypted with RSA-3072",
    4: "a PCK certificate without its chain",
    7: "a platform manifest",
}
_BODY_TYPES = {2: BODY_10_BYTES, 3: BODY_15_BYTES}


class TdAttributes(IntFlag):
    """TD ATTRIBUTES bits (Intel TDX Module 1.5 ABI, ATTRIBUTES, and `td_param_attributes_t` in the module's sources).

    Bits 0 to 7 make a TD untrusted (debug, profiling by the host), 8 to 31 may affect its security, 32 to 63 do not.
    A bit without a name here is reserved.
    """

    DEBUG = 1 << 0
    HGS_PLUS_PROF = 1 << 4
    PERF_PROF = 1 << 5
    PMT_PROF = 1 << 6
    ICSSD = 1 << 16
    SERVTD_EXT = 1 << 17
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    TPA = 1 << 62
    PERFMON = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The 48-byte quote header, less what can have one value only.

    `user_data`: the quoting enclave writes the platform's 16-byte QE id and four zero bytes; it is signed, not judged.
    """

    version: int
    user_data: bytes  # 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """The TD report in the quote body: what the CPU says about the TD. `tee_tcb_svn2`, `mrservicetd`: TD 1.5 only."""

    tee_tcb_svn: bytes  # 16
    mrseam: bytes  # 48
    mrsignerseam: bytes  # 48
    seam_attributes: bytes  # 8
    td_attributes: bytes  # 8, little-endian bit field
    xfam: bytes  # 8, little-endian bit field
    mrtd: bytes  # 48
    mrconfigid: bytes  # 48
    mrowner: bytes  # 48
    mrownerconfig: bytes  # 48
    rtmr0: bytes  # 48
    rtmr1: bytes  # 48
    rtmr2: bytes  # 48
    rtmr3: bytes  # 48
    report_data: bytes  # 64
    tee_tcb_svn2: bytes | None = None  # 16
    mrservicetd: bytes | None = None  # 48

    @property
    def attributes(self) -> TdAttributes:
        """`td_attributes` as named bits; unnamed bits stay set in the value."""
        return TdAttributes(int.from_bytes(self.td_attributes, "little"))

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3."""
        return self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveReport:
    """SGX REPORT body of the quoting enclave; `report_data` binds the attestation key."""

    cpu_svn: bytes  # 16
    misc_select: int
    isv_ext_prod_id: bytes  # 16
    attributes: bytes  # 16
    mrenclave: bytes  # 32
    mrsigner: bytes  # 32
    config_id: bytes  # 64
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes  # 16
    report_data: bytes  # 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A whole quote. `signature` is r || s over header and body; `attestation_key` is x || y on P-256."""

    header: Header
    body: TdReport
    signature: bytes  # 64
    attestation_key: bytes  # 64
    qe_report: EnclaveReport
    qe_report_signature: bytes  # 64
    qe_auth_data: bytes
    pck_chain_pem: bytes  # leaf first, exactly as in the quote
    trailing: bytes = b""  # zero bytes after the signature data


_TD_FIELDS = (
    ("tee_tcb_svn", 16),
    ("mrseam", 48),
    ("mrsignerseam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mrtd", 48),
    ("mrconfigid", 48),
    ("mrowner", 48),
    ("mrownerconfig", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("report_data", 64),
)
_TD_15_FIELDS = (("tee_tcb_svn2", 16), ("mrservicetd", 48))


def parse_quote(data: bytes, *, any_trailing: bool = False) -> Quote:
    """Parse a quote, accounting for every byte. Raises `FormatError` with a code below `quote.`.

    `any_trailing`: keep whatever follows the signature data instead of refusing it (`quote.trailing`), for a caller who
    has been told so and wants to know what else is wrong.
    """
    if len(data) > MAX_QUOTE_BYTES:
        raise FormatError(f"quote: expected at most {MAX_QUOTE_BYTES} bytes, got {len(data)}", code="quote.too_long")
    reader = Reader(data, "quote")
    header = _parse_header(reader)
    body = _parse_body(reader, header.version)
    signed = Reader(reader.take(reader.uint(4, "signature_size"), "signature_data"), "quote")
    signature = signed.take(64, "signature")
    attestation_key = signed.take(64, "attestation_key")
    signed.expect(_QE_REPORT_CERTIFICATION, 2, "certification_type")
    certification = Reader(signed.take(signed.uint(4, "certification_size"), "certification"), "quote")
    signed.end()
    qe_report = parse_enclave_report(certification.take(ENCLAVE_REPORT_BYTES, "qe_report"))
    qe_report_signature = certification.take(64, "qe_report_signature")
    qe_auth_data = certification.take(certification.uint(2, "qe_auth_size"), "qe_auth_data")
    _expect_pem_chain(certification.uint(2, "chain_type"))
    pck_chain_pem = certification.take(certification.uint(4, "chain_size"), "chain")
    certification.end()
    trailing = reader.take(reader.left, "trailing")
    if any(trailing) and not any_trailing:
        message = f"quote: expected only zero bytes after offset {len(data) - len(trailing)}"
        raise FormatError(message, code="quote.trailing")
    return Quote(
        header=header,
        body=body,
        signature=signature,
        attestation_key=attestation_key,
        qe_report=qe_report,
        qe_report_signature=qe_report_signature,
        qe_auth_data=qe_auth_data,
        pck_chain_pem=pck_chain_pem,
        trailing=trailing,
    )


def _expect_pem_chain(kind: int) -> None:
    if kind != _PEM_CHAIN:
        got = f"{kind} ({_CHAIN_TYPES[kind]})" if kind in _CHAIN_TYPES else str(kind)
        message = f"quote.chain_type: expected {_PEM_CHAIN} (the PCK certificate chain in PEM), got {got}"
        raise FormatError(message, code="quote.chain_type")


def encode_quote(quote: Quote) -> bytes:
    """The inverse of `parse_quote`."""
    certification = (
        encode_enclave_report(quote.qe_report)
        + quote.qe_report_signature
        + len(quote.qe_auth_data).to_bytes(2, "little")
        + quote.qe_auth_data
        + _PEM_CHAIN.to_bytes(2, "little")
        + len(quote.pck_chain_pem).to_bytes(4, "little")
        + quote.pck_chain_pem
    )
    signature_data = (
        quote.signature
        + quote.attestation_key
        + _QE_REPORT_CERTIFICATION.to_bytes(2, "little")
        + len(certification).to_bytes(4, "little")
        + certification
    )
    signed = encode_signed_part(quote.header, quote.body)
    return signed + len(signature_data).to_bytes(4, "little") + signature_data + quote.trailing


def encode_signed_part(header: Header, body: TdReport) -> bytes:
    """Header and body: the bytes the attestation key signs."""
    fields = b"".join(getattr(body, name) for name, _ in _TD_FIELDS)
    is_15 = body.tee_tcb_svn2 is not None and body.mrservicetd is not None
    if body.tee_tcb_svn2 is not None and body.mrservicetd is not None:
        fields += body.tee_tcb_svn2 + body.mrservicetd
    out = header.version.to_bytes(2, "little") + _ECDSA_P256.to_bytes(2, "little") + _TEE_TDX.to_bytes(4, "little")
    out += bytes(4) + INTEL_QE_VENDOR_ID + header.user_data
    if header.version == 5:
        out += (3 if is_15 else 2).to_bytes(2, "little") + len(fields).to_bytes(4, "little")
    return out + fields


def signed_part(data: bytes) -> bytes:
    """The exact received bytes of header and body, over which the attestation key's signature goes.

    Raises `FormatError` as `parse_quote` does for the parts it reads.
    """
    reader = Reader(data, "quote")
    _parse_body(reader, _parse_header(reader).version)
    return data[: reader.offset]


def quote_digest(data: bytes) -> bytes:
    """SHA-256 over the quote's header and body: the name of a quote in records and receipts."""
    return hashlib.sha256(signed_part(data)).digest()


def _parse_header(reader: Reader) -> Header:
    version = reader.uint(2, "version")
    if version not in (4, 5):
        raise FormatError(f"quote.version: expected 4 or 5, got {version}", code="quote.version")
    reader.expect(_ECDSA_P256, 2, "key_type")
    reader.expect(_TEE_TDX, 4, "tee_type")
    reader.expect(0, 4, "reserved")
    reader.expect(INTEL_QE_VENDOR_ID, 16, "qe_vendor_id")
    return Header(version=version, user_data=reader.take(20, "user_data"))


def _parse_body(reader: Reader, version: int) -> TdReport:
    size = BODY_10_BYTES
    if version == 5:
        kind = reader.uint(2, "body_type")
        if kind not in _BODY_TYPES:
            message = f"quote.body_type: expected 2 (TD 1.0) or 3 (TD 1.5), got {kind}"
            raise FormatError(message, code="quote.body_type")
        size = _BODY_TYPES[kind]
        reader.expect(size, 4, "body_size")
    layout = _TD_FIELDS + (_TD_15_FIELDS if size == BODY_15_BYTES else ())
    return TdReport(**{name: reader.take(width, name) for name, width in layout})


def parse_enclave_report(data: bytes) -> EnclaveReport:
    """Parse the 384-byte SGX report body. Raises `FormatError`."""
    reader = Reader(data, "quote")
    cpu_svn = reader.take(16, "qe_cpu_svn")
    misc_select = reader.uint(4, "qe_misc_select")
    reader.expect(bytes(12), 12, "qe_reserved")
    isv_ext_prod_id = reader.take(16, "qe_isv_ext_prod_id")
    attributes = reader.take(16, "qe_attributes")
    mrenclave = reader.take(32, "qe_mrenclave")
    reader.expect(bytes(32), 32, "qe_reserved")
    mrsigner = reader.take(32, "qe_mrsigner")
    reader.expect(bytes(32), 32, "qe_reserved")
    config_id = reader.take(64, "qe_config_id")
    isv_prod_id = reader.uint(2, "qe_isv_prod_id")
    isv_svn = reader.uint(2, "qe_isv_svn")
    config_svn = reader.uint(2, "qe_config_svn")
    reader.expect(bytes(42), 42, "qe_reserved")
    isv_family_id = reader.take(16, "qe_isv_family_id")
    report_data = reader.take(64, "qe_report_data")
    reader.end()
    return EnclaveReport(
        cpu_svn=cpu_svn,
        misc_select=misc_select,
        isv_ext_prod_id=isv_ext_prod_id,
        attributes=attributes,
        mrenclave=mrenclave,
        mrsigner=mrsigner,
        config_id=config_id,
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        config_svn=config_svn,
        isv_family_id=isv_family_id,
        report_data=report_data,
    )


def encode_enclave_report(report: EnclaveReport) -> bytes:
    """The inverse of `parse_enclave_report`: the bytes the PCK key signs."""
    return b"".join(
        (
            report.cpu_svn,
            report.misc_select.to_bytes(4, "little"),
            bytes(12),
            report.isv_ext_prod_id,
            report.attributes,
            report.mrenclave,
            bytes(32),
            report.mrsigner,
            bytes(32),
            report.config_id,
            report.isv_prod_id.to_bytes(2, "little"),
            report.isv_svn.to_bytes(2, "little"),
            report.config_svn.to_bytes(2, "little"),
            bytes(42),
            report.isv_family_id,
            report.report_data,
        )
    )


_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]{1,16384})-----END CERTIFICATE-----[\r\n]*")


def parse_pem_chain(data: bytes, what: str = "chain") -> tuple[bytes, ...]:
    """The DER certificates of a PEM chain in order, with nothing between them; one trailing NUL is tolerated.

    Raises `FormatError` `<what>.pem` for text outside the certificates, bad base64, none or too many of them.
    """
    text = data.removesuffix(b"\0")
    certificates: list[bytes] = []
    offset = 0
    while offset < len(text):
        found = _PEM.match(text, offset)
        if found is None or len(certificates) == MAX_CERTIFICATES:
            message = (
                f"{what}: expected at most {MAX_CERTIFICATES} PEM certificates and nothing else at offset {offset}"
            )
            raise FormatError(message, code=f"{what}.pem")
        try:
            der = base64.b64decode(found[1].replace(b"\r", b"").replace(b"\n", b""), validate=True)
        except (binascii.Error, ValueError) as err:
            raise FormatError(f"{what}: expected base64 at offset {offset}", code=f"{what}.pem") from err
        certificates.append(der)
        offset = found.end()
    if not certificates:
        raise FormatError(f"{what}: expected at least one PEM certificate", code=f"{what}.pem")
    return tuple(certificates)
