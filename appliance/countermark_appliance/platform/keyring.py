"""The keys of one start: made in memory, never written anywhere, gone with the process.

Five keys in the fixed order of `report_data.ROLES`: TLS (P-256), receipt ES256 and ML-DSA-65, log Ed25519 and
ML-DSA-44. ES256 signatures are raw r || s with low s, so that a signature of ours has one form; ML-DSA is FIPS 204,
pure, with its context string. The TLS certificate is self-signed; its key is what attestation vouches for, its name
and dates are not. Not done here: use of the keys by records and TLS.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.evidence import PASSPORT_OID, Passport, encode_passport
from countermark.formats.report_data import ROLES, RoleKey, keys_digest

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_CLOCK_SKEW_S = 300

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey


class Keyring:
    """The private keys of one start and the boot id that names it. Has no serialised form; `repr` shows the boot id."""

    __slots__ = ("boot_id", "log_ed25519", "log_ml_dsa_44", "receipt_es256", "receipt_ml_dsa_65", "tls")

    def __init__(self) -> None:
        self.boot_id = secrets.token_bytes(32)
        self.tls = ec.generate_private_key(ec.SECP256R1())
        self.receipt_es256 = ec.generate_private_key(ec.SECP256R1())
        self.receipt_ml_dsa_65 = mldsa.MLDSA65PrivateKey.generate()
        self.log_ed25519 = ed25519.Ed25519PrivateKey.generate()
        self.log_ml_dsa_44 = mldsa.MLDSA44PrivateKey.generate()

    def __repr__(self) -> str:
        return f"Keyring(boot_id={self.boot_id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keyring is neither pickled nor copied")

    def role_keys(self) -> tuple[RoleKey, ...]:
        """The public keys with their roles, in the order that is measured."""
        privates: tuple[PrivateKey, ...] = (
            self.tls,
            self.receipt_es256,
            self.receipt_ml_dsa_65,
            self.log_ed25519,
            self.log_ml_dsa_44,
        )
        return tuple(
            RoleKey(role=role, key=cose_public_key(private.public_key()))
            for role, private in zip(ROLES, privates, strict=True)
        )

    def digest(self) -> bytes:
        """The `keys` claim, 32 bytes."""
        return keys_digest(self.role_keys())

    def tls_spki(self) -> bytes:
        """SHA-256 of the TLS key's SubjectPublicKeyInfo, DER."""
        return spki_digest(self.tls.public_key())

    def tls_certificate(self, passport: Passport, *, now: int, valid_s: int, simulated: bool) -> bytes:
        """The self-signed TLS certificate (DER) with the passport in its extension. `now`: Unix seconds."""
        common_name = "countermark appliance (SIMULATED)" if simulated else "countermark appliance"
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(PASSPORT_OID), encode_passport(passport))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.tls.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(now - _CLOCK_SKEW_S))
            .not_valid_after(_time(now + valid_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(extension, critical=False)
            .sign(self.tls, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.DER)


def cose_public_key(public: PublicKey) -> CoseKey:
    """The COSE_Key of a public key."""
    match public:
        case ec.EllipticCurvePublicKey():
            point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            return CoseKey(algorithm=Algorithm.ES256, public=point[1:])
        case ed25519.Ed25519PublicKey():
            return CoseKey(algorithm=Algorithm.EDDSA, public=public.public_bytes_raw())
        case mldsa.MLDSA44PublicKey():
            return CoseKey(algorithm=Algorithm.ML_DSA_44, public=public.public_bytes_raw())
        case mldsa.MLDSA65PublicKey():
            return CoseKey(algorithm=Algorithm.ML_DSA_65, public=public.public_bytes_raw())


def spki_digest(public: PublicKey) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo."""
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def sign_es256(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA P-256 with SHA-256 as raw r || s (64 bytes), low s."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + min(s, _P256_ORDER - s).to_bytes(32, "big")


def _time(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
