"""Public keys as values of `cryptography`, and one `verify` for the four signature algorithms we use.

COSE_Key in and out is `formats.cose_key`; here the numbers become keys: ES256 (ECDSA P-256, SHA-256, raw r || s of 64
bytes, low s only, because (r, n - s) verifies too and a signature of ours has one form), Ed25519 (RFC 8032), ML-DSA-44
and ML-DSA-65 (FIPS 204, pure, with its context string).
Not checked here: what a key is for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from countermark.errors import FormatError
from countermark.formats.cose_key import Algorithm, CoseKey

P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

AnyPublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A public key that parsed: its COSE form and the key object."""

    cose: CoseKey
    public: AnyPublicKey

    @property
    def spki_digest(self) -> bytes:
        """SHA-256 of the DER SubjectPublicKeyInfo."""
        return hashlib.sha256(self.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()

    def verify(self, signature: bytes, message: bytes, *, context: bytes = b"") -> bool:
        """Whether `signature` over `message` is this key's. `context` is ML-DSA's and must be empty for the others."""
        try:
            match self.public:
                case ec.EllipticCurvePublicKey():
                    return not context and _verify_es256(self.public, signature, message)
                case ed25519.Ed25519PublicKey():
                    if context:
                        return False
                    self.public.verify(signature, message)
                case _:
                    self.public.verify(signature, message, context)
        except InvalidSignature:
            return False
        return True


def load(key: CoseKey) -> PublicKey:
    """Turn a COSE_Key into a usable key. Raises `FormatError` `cose_key.public` for a point off its curve."""
    try:
        return PublicKey(cose=key, public=_load(key))
    except ValueError as err:
        message = f"cose_key.public: expected an {key.algorithm.name} public key"
        raise FormatError(message, code="cose_key.public") from err


def _load(key: CoseKey) -> AnyPublicKey:
    match key.algorithm:
        case Algorithm.ES256:
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key.public)
        case Algorithm.EDDSA:
            return ed25519.Ed25519PublicKey.from_public_bytes(key.public)
        case Algorithm.ML_DSA_44:
            return mldsa.MLDSA44PublicKey.from_public_bytes(key.public)
        case Algorithm.ML_DSA_65:
            return mldsa.MLDSA65PublicKey.from_public_bytes(key.public)


def _verify_es256(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    if len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    if s > P256_ORDER // 2:
        return False
    key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    return True
