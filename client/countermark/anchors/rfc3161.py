"""A time stamp of RFC 3161 over a message, checked offline: who signed it, for what, and when.

1 the imprint is the message's SHA-256, SHA-384 or SHA-512 · 2 the signing certificate is the one that the signed
attributes name by digest and the signer by serial number · 3 the signature, over attributes that hold the digest of the
content (RFC 5652 5.4) · 4 extended key usage: critical, time stamping alone (RFC 3161 2.3) · 5 a path from that
certificate to a pinned one, among those in the token, valid at genTime · 6 the authority's policy, where the verifier
names some.

The pinned certificate must have come with the token. One below a root can be pinned as well, for authorities that leave
their root out. Whoever asked compares the nonce, which nobody else knows.

Not checked here: revocation, for which a token brings nothing; a stamp under a key that was stolen while its
certificate was valid would pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from countermark.errors import FormatError, LogError
from countermark.formats.timestamp import TimeInfo, Token, parse_token
from countermark.x509chain import (
    MAX_CERTIFICATES,
    ChainError,
    common_name,
    digest,
    name,
    parse_der_chain,
    verify_chain,
    verify_issued,
)

_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_RSA_PSS: Final = "1.2.840.113549.1.1.10"
_ED25519: Final = "1.3.101.112"
_SIGNATURES: Final = {  # algorithm -> key, and the hash it names; None: that of the digest
    "1.2.840.113549.1.1.1": (rsa.RSAPublicKey, None),
    _RSA_PSS: (rsa.RSAPublicKey, None),
    "1.2.840.113549.1.1.11": (rsa.RSAPublicKey, "sha256"),
    "1.2.840.113549.1.1.12": (rsa.RSAPublicKey, "sha384"),
    "1.2.840.113549.1.1.13": (rsa.RSAPublicKey, "sha512"),
    "1.2.840.10045.4.3.2": (ec.EllipticCurvePublicKey, "sha256"),
    "1.2.840.10045.4.3.3": (ec.EllipticCurvePublicKey, "sha384"),
    "1.2.840.10045.4.3.4": (ec.EllipticCurvePublicKey, "sha512"),
    _ED25519: (ed25519.Ed25519PublicKey, None),
}
_MIN_RSA_BITS: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """A stamp that holds. `authority`: the signing certificate's name. `root`: SHA-256 of the pinned certificate."""

    info: TimeInfo
    authority: str
    root: bytes


def verify_stamp(data: bytes, message: bytes, *, roots: Sequence[bytes], policies: Sequence[str] = ()) -> Stamp:
    """Verify a TimeStampToken over `message`. `roots`: SHA-256 of certificates. `policies`: none named, any will do.

    Raises `FormatError`: `der.form`, `anchor.token`, `anchor.chain`; `LogError`: `anchor.imprint`,
    `anchor.certificate`, `anchor.signature`, `anchor.usage`, `anchor.root`, `anchor.policy`, and for the path
    `anchor.short`, `anchor.ca`, `anchor.chain_signature`, `anchor.extension`, `anchor.not_yet_valid`,
    `anchor.expired`.
    """
    token = parse_token(data)
    _verify_imprint(token.info, message)
    return _verify_token(token, roots, policies)


def _verify_token(token: Token, roots: Sequence[bytes], policies: Sequence[str]) -> Stamp:
    """All but what was stamped."""
    info, certificates = token.info, _certificates(token)
    signer = _signer(token, certificates)
    _verify_signature(token, signer)
    _verify_usage(signer)
    path = _path(signer, certificates, roots)
    try:
        verify_chain(path, root=digest(path[-1]), now=info.time, read=(ExtensionOID.EXTENDED_KEY_USAGE,))
    except ChainError as err:
        reason = "chain_signature" if err.reason == "signature" else err.reason
        raise LogError(f"time stamp: {err}", code=f"anchor.{reason}") from err
    if policies and info.policy not in policies:
        text = f"time stamp: expected a policy of {', '.join(policies)}, got {info.policy}"
        raise LogError(text, code="anchor.policy")
    return Stamp(info=info, authority=common_name(signer) or name(signer), root=digest(path[-1]))


def _verify_imprint(info: TimeInfo, message: bytes) -> None:
    expected = hashlib.new(info.hash, message).digest()
    if info.imprint != expected:
        text = f"time stamp: expected the {info.hash} {expected.hex()} of the checkpoint, got {info.imprint.hex()}"
        raise LogError(text, code="anchor.imprint")


def _certificates(token: Token) -> tuple[x509.Certificate, ...]:
    if not token.certificates:
        raise FormatError("time stamp: expected the authority's certificates in it, got none", code="anchor.chain")
    return parse_der_chain(token.certificates, "anchor")


def _signer(token: Token, certificates: Sequence[x509.Certificate]) -> x509.Certificate:
    algorithm, expected = token.signer
    for der, certificate in zip(token.certificates, certificates, strict=True):
        # Which certificate, RFC 2634 says by SHA-1 alone. Another with that digest would still need a pinned issuer.
        found = hashlib.new(algorithm, der, usedforsecurity=False).digest()
        if found == expected and certificate.serial_number == token.signer_serial:
            return certificate
    text = f"time stamp: expected the signing certificate with {algorithm} {expected.hex()} in it, got none"
    raise LogError(text, code="anchor.certificate")


def _verify_signature(token: Token, signer: x509.Certificate) -> None:
    if hashlib.new(token.digest_hash, token.content).digest() != token.digest:
        raise LogError("time stamp: expected the digest of its content to be signed", code="anchor.signature")
    kind, named = _SIGNATURES.get(token.signature_algorithm, (None, None))
    key = signer.public_key()
    if kind is None or not isinstance(key, kind):
        text = f"time stamp: expected RSA, ECDSA or Ed25519 as its key is, got {token.signature_algorithm}"
        raise LogError(text, code="anchor.signature")
    algorithm = _HASHES[named or token.digest_hash]
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if key.key_size < _MIN_RSA_BITS:
                raise LogError(f"time stamp: expected RSA of {_MIN_RSA_BITS} bits", code="anchor.signature")
            pss = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=padding.PSS.AUTO)
            scheme = pss if token.signature_algorithm == _RSA_PSS else padding.PKCS1v15()
            key.verify(token.signature, token.signed, scheme, algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(token.signature, token.signed, ec.ECDSA(algorithm))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(token.signature, token.signed)
    except (InvalidSignature, UnsupportedAlgorithm) as err:
        raise LogError("time stamp: its signature does not verify", code="anchor.signature") from err


def _verify_usage(signer: x509.Certificate) -> None:
    stamps, signs = False, True
    for extension in signer.extensions:
        usage = extension.value
        if isinstance(usage, x509.ExtendedKeyUsage):
            stamps = extension.critical and list(usage) == [ExtendedKeyUsageOID.TIME_STAMPING]
        if isinstance(usage, x509.KeyUsage):
            signs = usage.digital_signature or usage.content_commitment
    if not (stamps and signs):
        wanted = "expected a signing key with the critical extended key usage of time stamping alone"
        raise LogError(f"time stamp: {name(signer)}: {wanted}", code="anchor.usage")


def _path(
    signer: x509.Certificate, certificates: Sequence[x509.Certificate], roots: Sequence[bytes]
) -> tuple[x509.Certificate, ...]:
    """The shortest path from the signer to a pinned certificate."""
    paths: list[tuple[x509.Certificate, ...]] = [(signer,)]
    tried = {digest(signer)}
    for path in paths:  # grows while it is read, by each certificate once at most
        if len(path) > 1 and digest(path[-1]) in roots:
            return path
        for issuer in certificates:
            if digest(issuer) not in tried and len(path) < MAX_CERTIFICATES and _issued(path[-1], issuer):
                tried.add(digest(issuer))
                paths.append((*path, issuer))
    ends = ", ".join(sorted({digest(path[-1]).hex() for path in paths}))
    text = f"time stamp: expected a certificate of anchors.tsa_roots above {name(signer)}, got {ends}"
    raise LogError(text, code="anchor.root")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        verify_issued(certificate, issuer)
    except ChainError:
        return False
    return True
