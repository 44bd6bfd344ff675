"""Revocation of GPU and RIM signer certificates, by CRLs and OCSP responses that came as files.

RFC 5280 section 5 and RFC 6960. A CRL is signed by the certificates' issuer and is complete (no critical extension such
as a delta indicator or a distribution point). An OCSP response is signed by that issuer, or by a responder with the
extended key usage OCSPSigning that the issuer itself certified; it names a certificate by serial number and hashes of
the issuer's name and key, in any of the SHA family. Both must be current: thisUpdate <= T < nextUpdate, and one
without nextUpdate says nothing about T. `good` is required: `unknown` is refused, and so is every revocation, also
`certificateHold`, which NVIDIA's own tools can be told to overlook.

Everything that is given is judged. What `REQUIRED` demands: a CRL or an OCSP response for every certificate below the
roots, except a GPU's own (leaf) certificate: its issuer is a key in the chip's boot ROM, which revokes nothing, and
NVIDIA's responder and verifier leave it out, too. The boot ROM's certificate stands for the chip.

Not checked here: OCSP nonces (nobody here sent a request), revocation of a responder, and who issued what
(`x509chain.verify_chain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from countermark import x509chain
from countermark.checks import rfc3339
from countermark.errors import FormatError, GpuError, Undecidable
from countermark.formats.der import BIT_STRING, parse_sequence
from countermark.policy import GpuRevocationRule

MAX_OCSP_BYTES: Final = 16 * 1024
MAX_SINGLE_RESPONSES: Final = 64
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_Chain = Sequence[x509.Certificate]


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleResponse:
    """What an OCSP response says about one certificate. Times are unix seconds."""

    algorithm: hashes.HashAlgorithm
    issuer_name_hash: bytes
    issuer_key_hash: bytes
    serial: int
    status: ocsp.OCSPCertStatus
    this_update: int
    next_update: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OcspResponse:
    """A successful basic OCSP response, parsed, nothing verified."""

    signed: bytes
    signature: bytes
    algorithm: hashes.HashAlgorithm
    responder_name: x509.Name | None
    responder_key_hash: bytes | None
    certificates: tuple[x509.Certificate, ...]
    singles: tuple[SingleResponse, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The revocation input of one appraisal, parsed, nothing verified."""

    crls: tuple[x509.CertificateRevocationList, ...] = ()
    ocsp: tuple[OcspResponse, ...] = ()


def _refuse(message: str, code: str) -> GpuError:
    return GpuError(message, code=f"gpu.{code}", step="8")


def parse_revocation(crls: Sequence[bytes], responses: Sequence[bytes]) -> Revocation:
    """Parse DER CRLs and DER OCSP responses. Raises `FormatError` `gpu.crl` or `gpu.ocsp`."""
    return Revocation(
        crls=tuple(x509chain.parse_crl(data, "gpu") for data in crls), ocsp=tuple(map(parse_ocsp, responses))
    )


def parse_ocsp(data: bytes) -> OcspResponse:
    """Parse one DER OCSP response that was successful. Raises `FormatError` `gpu.ocsp`."""
    if len(data) > MAX_OCSP_BYTES:
        raise _malformed(f"expected at most {MAX_OCSP_BYTES} bytes, got {len(data)}")
    try:
        response = ocsp.load_der_ocsp_response(data)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise _malformed(f"expected a successful response, got {response.response_status.name}")
        singles = tuple(_single(item) for item in response.responses)
        algorithm = response.signature_hash_algorithm
        encoded = [item.public_bytes(Encoding.DER) for item in response.certificates]
        _ = response.extensions
        parsed = OcspResponse(
            signed=response.tbs_response_bytes,
            signature=response.signature,
            algorithm=algorithm or hashes.SHA384(),
            responder_name=response.responder_name,
            responder_key_hash=response.responder_key_hash,
            certificates=x509chain.parse_der_chain(encoded, "gpu") if encoded else (),
            singles=singles,
        )
    except (*_UNREADABLE, FormatError) as err:
        raise _malformed(f"expected a DER OCSP response: {err}") from err
    if algorithm is None or not 1 <= len(singles) <= MAX_SINGLE_RESPONSES:
        raise _malformed(f"expected a hashed signature and 1 to {MAX_SINGLE_RESPONSES} answers, got {len(singles)}")
    return parsed


def _malformed(message: str) -> FormatError:
    return FormatError(f"GPU OCSP response: {message}", code="gpu.ocsp")


def _single(item: ocsp.OCSPSingleResponse) -> SingleResponse:
    return SingleResponse(
        algorithm=item.hash_algorithm,
        issuer_name_hash=item.issuer_name_hash,
        issuer_key_hash=item.issuer_key_hash,
        serial=item.serial_number,
        status=item.certificate_status,
        this_update=_unix(item.this_update_utc),
        next_update=None if item.next_update_utc is None else _unix(item.next_update_utc),
    )


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def verify_revocation(
    chains: Sequence[_Chain],
    revocation: Revocation,
    *,
    rule: GpuRevocationRule,
    now: int,
    rim_chains: Sequence[_Chain] = (),
) -> str:
    """1 judge every CRL, 2 judge every OCSP response, 3 demand what the rule demands; returns what was covered.

    `chains`: of GPUs, `rim_chains`: of RIM signers, both leaf first, root last, and already verified. Raises `GpuError`
    `gpu.crl_stranger`, `gpu.crl_issuer`, `gpu.crl_signature`, `gpu.crl_extension`, `gpu.not_yet_valid`, `gpu.expired`
    (the CRL's dates), `gpu.revoked`, `gpu.ocsp_stranger`, `gpu.ocsp_responder`, `gpu.ocsp_signature`,
    `gpu.ocsp_not_yet_valid`, `gpu.ocsp_expired`, `gpu.ocsp_unknown`, or `Undecidable` `gpu.revocation_missing`.
    """
    issued = {
        x509chain.digest(below): (below, issuer)
        for chain in (*chains, *rim_chains)
        for below, issuer in pairwise(chain)
    }
    issuers = tuple({x509chain.digest(issuer): issuer for _, issuer in issued.values()}.values())
    covered: set[bytes] = set()
    for crl in revocation.crls:
        covered |= _judge_crl(crl, issued, issuers, now)
    for response in revocation.ocsp:
        covered |= _judge_ocsp(response, issued, now)
    required = [*(item for chain in chains for item in chain[1:-1]), *(item for c in rim_chains for item in c[:-1])]
    wanted = {x509chain.digest(item): item for item in required}
    missing = {key: item for key, item in wanted.items() if key not in covered}
    if missing and rule is GpuRevocationRule.REQUIRED:
        names = ", ".join(sorted({x509chain.name(item) for item in missing.values()}))
        message = f"GPU revocation: expected a CRL or OCSP response for every certificate, got none for {names}"
        raise Undecidable(message, code="gpu.revocation_missing", step="8")
    return f"{len(wanted) - len(missing)} of {len(wanted)} certificates known not to be revoked"


_Issued = dict[bytes, tuple[x509.Certificate, x509.Certificate]]


def _judge_crl(crl: x509.CertificateRevocationList, issued: _Issued, issuers: _Chain, now: int) -> set[bytes]:
    """The digests of the certificates the CRL covers; raises when one is revoked, or the CRL is not to be relied on."""
    wanted = crl.issuer
    named = [issuer for issuer in issuers if issuer.subject == wanted]
    if not named:
        raise _refuse(f"GPU CRL: expected an issuer in the chains, got {wanted.rfc4514_string()}", "crl_stranger")
    issuer = _signer(crl, named)
    try:
        x509chain.verify_crl(crl, issuer, now=now)
    except x509chain.ChainError as err:
        raise _refuse(f"GPU {err}", err.reason) from err
    covered = {key: below for key, (below, above) in issued.items() if above == issuer}
    for below in covered.values():
        if x509chain.is_revoked(below, crl):
            raise _refuse(f"{x509chain.name(below)}: revoked by {x509chain.name(issuer)}", "revoked")
    return set(covered)


def _signer(crl: x509.CertificateRevocationList, issuers: list[x509.Certificate]) -> x509.Certificate:
    """Of several authorities with one name the one whose key signed; else the first, which `verify_crl` refuses."""
    for issuer in issuers[1:]:
        key = issuer.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey) and crl.is_signature_valid(key):
            return issuer
    return issuers[0]


def _judge_ocsp(response: OcspResponse, issued: _Issued, now: int) -> set[bytes]:
    """The digests of the certificates the response calls good; raises when it calls one anything else."""
    covered: set[bytes] = set()
    for single in response.singles:
        found = [(key, pair) for key, pair in issued.items() if _speaks_of(single, *pair)]
        if not found:
            message = f"GPU OCSP response: expected a certificate in the chains, got serial {single.serial:x}"
            raise _refuse(message, "ocsp_stranger")
        for key, (below, issuer) in found:
            _verify_signature(response, issuer, now)
            _verify_current(single, below, now)
            if single.status is ocsp.OCSPCertStatus.REVOKED:
                raise _refuse(f"{x509chain.name(below)}: revoked, says its OCSP response", "revoked")
            if single.status is not ocsp.OCSPCertStatus.GOOD:
                message = f"{x509chain.name(below)}: expected OCSP status good, got {single.status.name.lower()}"
                raise _refuse(message, "ocsp_unknown")
            covered.add(key)
    return covered


def _speaks_of(single: SingleResponse, below: x509.Certificate, issuer: x509.Certificate) -> bool:
    if single.serial != below.serial_number:
        return False
    name_hash = _digest(single.algorithm, issuer.subject.public_bytes())
    key_hash = _digest(single.algorithm, _key_bits(issuer))
    return (single.issuer_name_hash, single.issuer_key_hash) == (name_hash, key_hash)


def _digest(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    state = hashes.Hash(algorithm)
    state.update(data)
    return state.finalize()


def _key_bits(certificate: x509.Certificate) -> bytes:
    """The BIT STRING of the public key without its count of unused bits: what RFC 6960 section 4.1.1 hashes."""
    bits = parse_sequence(x509chain.spki(certificate))[1]
    assert bits.tag == BIT_STRING
    return bits.value[1:]


def _verify_current(single: SingleResponse, below: x509.Certificate, now: int) -> None:
    name = x509chain.name(below)
    if now < single.this_update:
        message = f"OCSP response for {name}: valid from {rfc3339(single.this_update)}, time is {rfc3339(now)}"
        raise _refuse(message, "ocsp_not_yet_valid")
    if single.next_update is None or now >= single.next_update:
        until = "absent" if single.next_update is None else rfc3339(single.next_update)
        message = f"OCSP response for {name}: nextUpdate {until}, time is {rfc3339(now)}"
        raise _refuse(message, "ocsp_expired")


def _verify_signature(response: OcspResponse, issuer: x509.Certificate, now: int) -> None:
    signer = issuer if _is_responder(response, issuer) else _delegate(response, issuer, now)
    key = signer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _refuse(f"{x509chain.name(signer)}: expected an elliptic-curve key", "ocsp_signature")
    try:
        key.verify(response.signature, response.signed, ec.ECDSA(response.algorithm))
    except (InvalidSignature, *_UNREADABLE) as err:
        raise _refuse(
            f"OCSP response of {x509chain.name(signer)}: signature does not verify", "ocsp_signature"
        ) from err


def _is_responder(response: OcspResponse, certificate: x509.Certificate) -> bool:
    if response.responder_key_hash is not None:
        return response.responder_key_hash == _digest(hashes.SHA1(), _key_bits(certificate))  # noqa: S303
    return response.responder_name == certificate.subject


def _delegate(response: OcspResponse, issuer: x509.Certificate, now: int) -> x509.Certificate:
    """The responder's certificate in the response, which `issuer` must have made for answering OCSP requests."""
    found = next((item for item in response.certificates if _is_responder(response, item)), None)
    if found is None:
        who = x509chain.name(issuer)
        raise _refuse(
            f"OCSP response: expected the signature of {who} or its delegate, got another's", "ocsp_responder"
        )
    try:
        x509chain.verify_issued(found, issuer)
        x509chain.verify_time(found, now)
    except x509chain.ChainError as err:
        raise _refuse(f"OCSP responder: {err}", "ocsp_responder") from err
    extensions = {type(item.value): item.value for item in found.extensions}
    purposes, usage = extensions.get(x509.ExtendedKeyUsage), extensions.get(x509.KeyUsage)
    if not isinstance(purposes, x509.ExtendedKeyUsage) or ExtendedKeyUsageOID.OCSP_SIGNING not in purposes:
        message = f"{x509chain.name(found)}: expected the extended key usage OCSPSigning"
        raise _refuse(message, "ocsp_responder")
    if isinstance(usage, x509.KeyUsage) and not usage.digital_signature:
        raise _refuse(f"{x509chain.name(found)}: expected a key that may sign", "ocsp_responder")
    return found
