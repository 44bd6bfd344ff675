"""X.509 chains and CRLs as endorsements use them: pinned root, explicit time, one exact path.

RFC 5280 sections 6.1 and 6.3 cut down to what vendor device chains are: the given order is leaf first, the last
certificate is the pinned root itself, every other is issued by the next. Time never comes from the clock. A critical
extension that nobody here reads is refused, in CRLs any: those that list part of what was revoked (deltas, partitions,
other authorities' certificates) say so in one.
Not checked here: policies, name constraints, key usage beyond issuing, and path building (there is one path or none).
For TDX the same chains are checked again by dcap-qvl; this module exists so that a refusal carries a stable code
and so that GPU chains have a path check that works offline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from countermark.checks import rfc3339
from countermark.errors import FormatError
from countermark.formats import dice
from countermark.formats.quote import parse_pem_chain as pem_to_der

MAX_CERTIFICATES: Final = 8
MAX_CHAIN_BYTES: Final = 64 * 1024
MAX_CRL_BYTES: Final = 4 * 1024 * 1024
_READ: Final = (  # critical extensions that are judged, by `verify_chain` or by its callers
    x509.BasicConstraints.oid,
    x509.KeyUsage.oid,
    x509.ObjectIdentifier(dice.COMPOSITE_DEVICE_ID),  # the firmware of a GPU's device certificate, Hopper's form
    x509.ObjectIdentifier(dice.TCB_INFO),  # the same, Blackwell's
)
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class ChainError(Exception):
    """Why a chain or CRL was refused; `reason` is a short stable word that the caller turns into its own code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@lru_cache(maxsize=256)  # the parser encodes the whole certificate again to answer, each time
def digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER bytes: how policies name a root."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def spki(certificate: x509.Certificate) -> bytes:
    """The subject's public key as SubjectPublicKeyInfo, DER."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def name(certificate: x509.Certificate) -> str:
    """The subject as printed in messages."""
    return certificate.subject.rfc4514_string()


def common_name(certificate: x509.Certificate) -> str:
    """The subject's common name, empty unless there is exactly one: what vendors' rules name certificates by."""
    values = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(values[0].value) if len(values) == 1 else ""


def parse_pem_chain(data: bytes, what: str) -> tuple[x509.Certificate, ...]:
    """Parse PEM certificates, leaf first. Raises `FormatError` `<what>.pem` or `<what>.chain`."""
    if len(data) > MAX_CHAIN_BYTES:
        message = f"{what}: expected at most {MAX_CHAIN_BYTES} bytes of PEM, got {len(data)}"
        raise FormatError(message, code=f"{what}.chain")
    return parse_der_chain(pem_to_der(data, what), what)


def parse_der_chain(items: Sequence[bytes], what: str) -> tuple[x509.Certificate, ...]:
    """Parse DER certificates, leaf first. Raises `FormatError` with code `<what>.chain`."""
    code = f"{what}.chain"
    if not 1 <= len(items) <= MAX_CERTIFICATES or sum(map(len, items)) > MAX_CHAIN_BYTES:
        raise FormatError(f"{what}: expected 1 to {MAX_CERTIFICATES} certificates", code=code)
    try:
        return tuple(_load_certificate(item) for item in items)
    except _UNREADABLE as err:
        raise FormatError(f"{what}: expected X.509 certificates: {err}", code=code) from err


@lru_cache(maxsize=256)  # the same certificates come with every connection, and several times in one
def _load_certificate(der: bytes) -> x509.Certificate:
    # cryptography reads most fields only when asked, and raises then: ask for all that is used later.
    found = x509.load_der_x509_certificate(der)
    _ = found.subject, found.issuer, found.extensions, found.not_valid_before_utc, found.not_valid_after_utc
    _ = found.public_key(), found.signature_hash_algorithm
    _no_unused_bits(der, found.signature)
    return found


def _no_unused_bits(der: bytes, signature: bytes) -> None:
    # Outside the signed part, and ignored by readers: the count before the signature's bytes, which end the structure.
    if der[-len(signature) - 1] != 0:
        raise ValueError("signature: expected no unused bits")


def parse_crl(data: bytes, what: str) -> x509.CertificateRevocationList:
    """Parse a DER CRL. Raises `FormatError` with code `<what>.crl`."""
    if len(data) > MAX_CRL_BYTES:
        raise FormatError(f"{what}: expected at most {MAX_CRL_BYTES} bytes", code=f"{what}.crl")
    try:
        crl = x509.load_der_x509_crl(data)
        _no_unused_bits(data, crl.signature)
        _ = crl.issuer, crl.last_update_utc, crl.next_update_utc, crl.extensions, crl.signature_hash_algorithm
    except _UNREADABLE as err:
        raise FormatError(f"{what}: expected a DER certificate revocation list: {err}", code=f"{what}.crl") from err
    return crl


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether basicConstraints says CA (absent means no)."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def verify_chain(
    chain: Sequence[x509.Certificate], *, root: bytes, now: int, read: Sequence[x509.ObjectIdentifier] = ()
) -> None:
    """Verify `chain` (leaf first, root last) up to the root whose SHA-256 is `root`, at time `now`.

    `read`: critical extensions that the caller judges. Raises `ChainError`: `root` (another root), `short`, `ca` (an
    issuer that may not issue, or a leaf that may), `signature`, `extension` (a critical one that is not read),
    `not_yet_valid`, `expired`.
    """
    if digest(chain[-1]) != root:
        message = f"root: expected SHA-256 {root.hex()}, got {digest(chain[-1]).hex()} ({name(chain[-1])})"
        raise ChainError("root", message)
    if len(chain) < 2:
        raise ChainError("short", f"chain: expected a certificate below the root, got {name(chain[0])} alone")
    if is_ca(chain[0]):
        raise ChainError("ca", f"{name(chain[0])}: expected an end entity, got a CA")
    verify_time(chain[-1], now)  # pinned by its digest, so its signature over itself adds nothing
    for below, (certificate, issuer) in enumerate(pairwise(chain)):
        _verify_issuer(issuer, below)
        verify_issued(certificate, issuer)
        _verify_critical(certificate, read)
        verify_time(certificate, now)


def _verify_critical(certificate: x509.Certificate, read: Sequence[x509.ObjectIdentifier]) -> None:
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in (*_READ, *read):
            text = f"{name(certificate)}: expected no critical extension {extension.oid.dotted_string}"
            raise ChainError("extension", text)


def _verify_issuer(issuer: x509.Certificate, below: int) -> None:
    # RFC 5280 6.1.4 (k) to (n): a CA, with room in its path length for the CAs below it, and a key that may certify.
    found = {type(extension.value): extension.value for extension in issuer.extensions}
    constraints, usage = found.get(x509.BasicConstraints), found.get(x509.KeyUsage)
    if not isinstance(constraints, x509.BasicConstraints) or not constraints.ca:
        raise ChainError("ca", f"{name(issuer)}: expected a CA certificate")
    if constraints.path_length is not None and below > constraints.path_length:
        text = f"expected at most {constraints.path_length} CA below it, got {below}"
        raise ChainError("ca", f"{name(issuer)}: {text}")
    if isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
        raise ChainError("ca", f"{name(issuer)}: expected a key that may sign certificates")


def verify_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Raises `ChainError` `signature` unless `issuer` is the certificate's issuer by name and signature."""
    try:
        _verify_issued(certificate, issuer)
    except (*_UNREADABLE, InvalidSignature) as err:
        raise ChainError("signature", f"{name(certificate)}: expected to be issued by {name(issuer)}") from err


@lru_cache(maxsize=256)  # a fact about the bytes of both, whatever the time; a refusal is not remembered
def _verify_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    certificate.verify_directly_issued_by(issuer)


def verify_time(certificate: x509.Certificate, now: int) -> None:
    """Raises `ChainError` `not_yet_valid` or `expired` when `now` is outside the certificate's validity."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start.timestamp():
        raise ChainError("not_yet_valid", f"{name(certificate)}: valid from {_date(start)}, time is {rfc3339(now)}")
    if now > end.timestamp():
        raise ChainError("expired", f"{name(certificate)}: valid until {_date(end)}, time is {rfc3339(now)}")


def verify_crl(crl: x509.CertificateRevocationList, issuer: x509.Certificate, *, now: int) -> None:
    """Verify that `issuer` signed `crl` and that it is current at `now`.

    Raises `ChainError`: `crl_issuer` (another's, or the issuer may not sign CRLs), `crl_signature`, `crl_extension` (a
    critical one), `not_yet_valid`, `expired` (also when nextUpdate is absent).
    """
    if crl.issuer != issuer.subject:
        raise ChainError("crl_issuer", f"CRL: expected issuer {name(issuer)}, got {crl.issuer.rfc4514_string()}")
    usage = [item.value for item in issuer.extensions if isinstance(item.value, x509.KeyUsage)]
    if usage and not usage[0].crl_sign:
        raise ChainError("crl_issuer", f"{name(issuer)}: expected a key that may sign CRLs")
    try:
        valid = crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # other key types raise
    except _UNREADABLE as err:
        raise ChainError("crl_signature", f"CRL of {_short(issuer)}: {err}") from err
    if not valid:
        raise ChainError("crl_signature", f"CRL of {_short(issuer)}: signature does not verify")
    for extension in crl.extensions:
        if extension.critical:
            text = f"CRL of {_short(issuer)}: expected no critical extension, got {extension.oid.dotted_string}"
            raise ChainError("crl_extension", text)
    if now < crl.last_update_utc.timestamp():
        start = _date(crl.last_update_utc)
        raise ChainError(
            "not_yet_valid", f"CRL of {_short(issuer)}: expected a time from thisUpdate {start}, got {rfc3339(now)}"
        )
    # As OpenSSL and webpki read it: the second of nextUpdate is the first in which the list is old.
    if crl.next_update_utc is None or now >= crl.next_update_utc.timestamp():
        until = "absent" if crl.next_update_utc is None else _date(crl.next_update_utc)
        raise ChainError(
            "expired", f"CRL of {_short(issuer)}: expected a time before nextUpdate {until}, got {rfc3339(now)}"
        )


def _short(certificate: x509.Certificate) -> str:
    return common_name(certificate) or name(certificate)


def _date(moment: datetime) -> str:
    return rfc3339(int(moment.timestamp()))


def is_revoked(certificate: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    """Whether the CRL (already verified, same issuer as the certificate) lists the certificate's serial number."""
    return crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
