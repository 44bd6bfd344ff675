"""A time-stamping authority for tests: certificates as a test wants them, and tokens at any time, built by hand.

`openssl ts` will not sign with a certificate that is no good, nor at another time than now, so the tokens are put
together here from RFC 3161 and RFC 5652; that `openssl ts -verify` accepts them is a test of its own.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = 1_800_000_000
DAY = 86_400
OIDS = {
    "signed-data": "2a864886f70d010702",
    "tst-info": "2a864886f70d0109100104",
    "content-type": "2a864886f70d010903",
    "message-digest": "2a864886f70d010904",
    "signing-certificate": "2a864886f70d010910020c",
    "signing-certificate-v2": "2a864886f70d010910022f",
    "sha1": "2b0e03021a",
    "sha256": "608648016503040201",
    "sha384": "608648016503040202",
    "sha512": "608648016503040203",
    "rsa": "2a864886f70d010101",
    "sha512-rsa": "2a864886f70d01010d",
    "pss": "2a864886f70d01010a",
    "ecdsa-sha256": "2a8648ce3d040302",
    "ecdsa-sha512": "2a8648ce3d040304",
    "ed25519": "2b6570",
    "policy": "2a030401",  # 1.2.3.4.1
}


def tlv(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    size = len(body)
    length = (
        bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")
    )
    return bytes([tag]) + length + body


def seq(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def oid(name: str) -> bytes:
    return tlv(0x06, bytes.fromhex(OIDS[name]))


def integer(value: int) -> bytes:
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


@dataclass(frozen=True)
class Issued:
    key: Any
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.der).digest()


def issue(
    name: str,
    issuer: Issued | None = None,
    *,
    key: Any = None,
    ca: bool = True,
    usage: Sequence[x509.ObjectIdentifier] = (),
    critical: bool = True,
    signs: bool = True,
    start: int = NOW - 100 * DAY,
    end: int = NOW + 100 * DAY,
) -> Issued:
    """`usage`: the extended one. `signs`: whether the key usage of an end entity allows signatures."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    others = dict.fromkeys(("data_encipherment", "key_agreement", "content_commitment"), False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime.fromtimestamp(start, datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(end, datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=signs and not ca,
                key_encipherment=not signs and not ca,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
                **others,
            ),
            critical=True,
        )
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=critical)
    signer = issuer.key if issuer else key
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(key=key, certificate=builder.sign(signer, algorithm))


@dataclass
class Authority:
    """A root, one authority below it, and what stamps. `token` makes one for a message."""

    root: Issued = field(default_factory=lambda: issue("test root"))
    between: Issued | None = None
    signer: Issued | None = None

    def __post_init__(self) -> None:
        if self.between is None:
            self.between = issue("test authority", self.root)
        if self.signer is None:
            self.signer = self.stamper()

    def stamper(self, **options: Any) -> Issued:
        """An end entity of this authority; by default one that may stamp."""
        options = {"ca": False, "usage": [ExtendedKeyUsageOID.TIME_STAMPING], **options}
        return issue("test stamper", self.between, **options)

    @property
    def chain(self) -> tuple[Issued, ...]:
        assert self.signer is not None
        assert self.between is not None
        return self.signer, self.between, self.root

    def token(self, message: bytes, *, time: int = NOW, **options: Any) -> bytes:
        return token(message, self.chain, time=time, **options)


def token(
    message: bytes,
    chain: Sequence[Issued],
    *,
    time: int = NOW,
    nonce: int | None = None,
    hash_name: str = "sha256",
    scheme: str = "ecdsa-sha256",
    legacy: bool = False,
    certificate: bytes | None = None,
    content_type: str = "tst-info",
    unsigned: bytes = b"",
    extensions: bytes = b"",
    embedded: Sequence[bytes] | None = None,
) -> bytes:
    """A TimeStampToken by `chain[0]`. `legacy`: name the signer by SHA-1. `certificate`: name another one."""
    signer = chain[0]
    moment = datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y%m%d%H%M%SZ").encode()
    imprint = seq(seq(oid(hash_name), b"\x05\x00"), tlv(0x04, hashlib.new(hash_name, message).digest()))
    info = seq(
        integer(1),
        oid("policy"),
        imprint,
        integer(7),
        tlv(0x18, moment),
        seq(integer(1)),
        tlv(0x01, b"\xff"),
        b"" if nonce is None else integer(nonce),
        extensions,
    )
    named = certificate or signer.der
    if legacy:
        digest = hashlib.sha1(named, usedforsecurity=False).digest()
        essence = seq(oid("signing-certificate"), tlv(0x31, seq(seq(seq(tlv(0x04, digest))))))
    else:
        digest = hashlib.sha256(named).digest()
        essence = seq(oid("signing-certificate-v2"), tlv(0x31, seq(seq(seq(tlv(0x04, digest))))))
    attributes = [
        seq(oid("content-type"), tlv(0x31, oid(content_type))),
        seq(oid("message-digest"), tlv(0x31, tlv(0x04, hashlib.new(hash_name, info).digest()))),
        essence,
    ]
    attributes.sort()
    signature = _sign(signer.key, tlv(0x31, *attributes), scheme, hash_name)
    identifier = seq(signer.certificate.issuer.public_bytes(), integer(signer.certificate.serial_number))
    signer_info = seq(
        integer(1),
        identifier,
        seq(oid(hash_name)),
        tlv(0xA0, *attributes),
        _algorithm(scheme, hash_name),
        tlv(0x04, signature),
        unsigned,
    )
    certificates = [item.der for item in chain] if embedded is None else embedded
    signed_data = seq(
        integer(3),
        tlv(0x31, seq(oid(hash_name))),
        seq(oid("tst-info"), tlv(0xA0, tlv(0x04, info))),
        tlv(0xA0, *certificates) if certificates else b"",
        tlv(0x31, signer_info),
    )
    return seq(oid("signed-data"), tlv(0xA0, signed_data))


def response(stamp: bytes | None, status: int = 0) -> bytes:
    """A TimeStampResp."""
    return seq(seq(integer(status)), stamp or b"")


def _algorithm(scheme: str, hash_name: str) -> bytes:
    if scheme != "pss":
        return seq(oid(scheme))
    digest = seq(oid(hash_name))
    mask = seq(tlv(0x06, bytes.fromhex("2a864886f70d010108")), digest)
    salt = integer(hashlib.new(hash_name).digest_size)
    return seq(oid("pss"), seq(tlv(0xA0, digest), tlv(0xA1, mask), tlv(0xA2, salt)))


def _sign(key: Any, data: bytes, scheme: str, hash_name: str) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    name = scheme.rpartition("-")[2] if "-" in scheme and not scheme.startswith("sha") else hash_name
    algorithm = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}[name]
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=algorithm.digest_size)
        return key.sign(data, pss if scheme == "pss" else padding.PKCS1v15(), algorithm)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(data, ec.ECDSA(algorithm))
