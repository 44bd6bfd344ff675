"""The four per-boot keys of the records, and what they sign: receipts and checkpoints.

ES256 signatures are normalised to the low s (receipt format). ML-DSA is pure FIPS 204 with the empty context, as RFC
9964 (COSE) and C2SP tlog-cosignature have it. Keys live in memory and die with the process. The TLS key is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.receipt import (
    P256_ORDER,
    SIGNERS,
    Payload,
    encode_payload,
    encode_receipt,
    thumbprint,
    to_be_signed,
)
from countermark.formats.report_data import RoleKey
from countermark.tlog.checkpoint import (
    Checkpoint,
    LogKeys,
    checkpoint_text,
    cosigned_message,
    encode_checkpoint,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKeys:
    """The private keys that sign receipts (ES256, ML-DSA-65) and checkpoints (Ed25519, ML-DSA-44)."""

    es256: ec.EllipticCurvePrivateKey
    ml_dsa_65: mldsa.MLDSA65PrivateKey
    ed25519: ed25519.Ed25519PrivateKey
    ml_dsa_44: mldsa.MLDSA44PrivateKey

    def __repr__(self) -> str:
        return "RecordKeys()"

    def log_keys(self) -> LogKeys:
        """The public keys of the log, raw."""
        return LogKeys(
            ed25519=self.ed25519.public_key().public_bytes_raw(),
            ml_dsa_44=self.ml_dsa_44.public_key().public_bytes_raw(),
        )

    def role_keys(self, tls: ec.EllipticCurvePublicKey) -> tuple[RoleKey, ...]:
        """All five public keys of a boot in the order the `keys` claim hashes them."""
        log = self.log_keys()
        ml_dsa_65 = self.ml_dsa_65.public_key().public_bytes_raw()
        return (
            RoleKey(role="tls", key=es256_key(tls)),
            RoleKey(role="receipt-es256", key=es256_key(self.es256.public_key())),
            RoleKey(role="receipt-ml-dsa-65", key=CoseKey(algorithm=Algorithm.ML_DSA_65, public=ml_dsa_65)),
            RoleKey(role="log-ed25519", key=CoseKey(algorithm=Algorithm.EDDSA, public=log.ed25519)),
            RoleKey(role="log-ml-dsa-44", key=CoseKey(algorithm=Algorithm.ML_DSA_44, public=log.ml_dsa_44)),
        )

    def sign_checkpoint(self, checkpoint: Checkpoint, timestamp: int) -> bytes:
        """The signed note. `timestamp`: seconds since 1970, in the ML-DSA-44 signature."""
        return encode_checkpoint(
            checkpoint,
            self.log_keys(),
            self.ed25519.sign(checkpoint_text(checkpoint).encode()),
            self.ml_dsa_44.sign(cosigned_message(checkpoint.origin, timestamp, checkpoint)),
            timestamp,
        )

    def sign_receipt(self, payload: Payload) -> bytes:
        """The COSE_Sign receipt."""
        data = encode_payload(payload)
        kids = self._kids()
        first, second = to_be_signed(data, kids)
        return encode_receipt(data, kids, (sign_es256(self.es256, first), self.ml_dsa_65.sign(second)))

    def _kids(self) -> tuple[bytes, bytes]:
        public = (es256_key(self.es256.public_key()).public, self.ml_dsa_65.public_key().public_bytes_raw())
        first, second = (
            thumbprint(CoseKey(algorithm=algorithm, public=key)) for algorithm, key in zip(SIGNERS, public, strict=True)
        )
        return first, second


def generate_keys() -> RecordKeys:
    """Fresh keys from the operating system's generator."""
    return RecordKeys(
        es256=ec.generate_private_key(ec.SECP256R1()),
        ml_dsa_65=mldsa.MLDSA65PrivateKey.generate(),
        ed25519=ed25519.Ed25519PrivateKey.generate(),
        ml_dsa_44=mldsa.MLDSA44PrivateKey.generate(),
    )


def es256_key(public: ec.EllipticCurvePublicKey) -> CoseKey:
    """The COSE form of a P-256 public key."""
    point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return CoseKey(algorithm=Algorithm.ES256, public=point[1:])


def sign_es256(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """r || s, 64 bytes, s at most n / 2."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + min(s, P256_ORDER - s).to_bytes(32, "big")
