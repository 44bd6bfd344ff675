"""Certificates and CRLs of the simulated vendors (RFC 5280): one function each, and the pair they give.

Every subject says SIMULATED. `Issued` keeps key and certificate together and writes them as one PEM text. Development
keys only: nothing here protects them but file permissions.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from countermark.errors import ConfigError

YEAR_S = 365 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate with its private key."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        """The certificate, DER."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> str:
        """The certificate, PEM."""
        return self.certificate.public_bytes(Encoding.PEM).decode("ascii")

    def to_pem(self) -> bytes:
        """Certificate and private key, PEM."""
        private = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self.certificate.public_bytes(Encoding.PEM) + private


def issued_from_pem(data: bytes) -> Issued:
    """The inverse of `Issued.to_pem`. Raises `ConfigError` `platform.state`."""
    try:
        key, certificate = load_pem_private_key(data, None), x509.load_pem_x509_certificate(data)
    except ValueError as err:
        raise ConfigError("platform.state: expected a PEM certificate and key", code="platform.state") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("platform.state: expected an elliptic-curve key", code="platform.state")
    return Issued(key=key, certificate=certificate)


def issue(
    common_name: str,
    issuer: Issued | None,
    *,
    not_before: int,
    not_after: int,
    curve: ec.EllipticCurve,
    ca: bool,
    path_length: int | None = None,
    crl_url: str | None = None,
    extensions: Sequence[x509.UnrecognizedExtension] = (),
    critical: bool = False,
    alternative_name: x509.GeneralName | None = None,
) -> Issued:
    """Make a key and its certificate, signed by `issuer` (None: by itself). Times are Unix seconds.

    `critical`: whether `extensions` are, which no vendor's is.
    """
    key = ec.generate_private_key(curve)
    name = simulated_name(common_name)
    issuer_key = issuer.key if issuer else key
    usage = {
        "digital_signature": not ca,
        "content_commitment": not ca,
        "key_cert_sign": ca,
        "crl_sign": ca,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(not_before))
        .not_valid_after(_time(not_after))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
    )
    if crl_url is not None:
        point = x509.DistributionPoint(
            full_name=[x509.UniformResourceIdentifier(crl_url)], relative_name=None, reasons=None, crl_issuer=None
        )
        builder = builder.add_extension(x509.CRLDistributionPoints([point]), critical=False)
    if alternative_name is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([alternative_name]), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return Issued(key=key, certificate=builder.sign(issuer_key, _hash(issuer_key.curve)))


def issue_crl(issuer: Issued, *, this_update: int, next_update: int, revoked: Sequence[x509.Certificate] = ()) -> bytes:
    """A version 2 CRL, DER, with CRL number and authority key identifier. Times are Unix seconds."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(_time(this_update))
        .next_update(_time(next_update))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
        builder = builder.add_revoked_certificate(entry.revocation_date(_time(this_update)).build())
    return builder.sign(issuer.key, _hash(issuer.key.curve)).public_bytes(Encoding.DER)


def simulated_name(common_name: str) -> x509.Name:
    """The distinguished name of everything simulated."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"SIMULATED {common_name}"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "countermark simulated platform"),
        ]
    )


def _hash(curve: ec.EllipticCurve) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA256() if curve.key_size == 256 else hashes.SHA384()


def _time(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
