"""COSE_Key for the public keys countermark uses, one strict form for each algorithm.

RFC 9052 section 7 and RFC 9053 sections 7.1 and 7.2 (EC2 P-256 for ES256, OKP Ed25519 for EdDSA); RFC 9964 for ML-DSA
(key type AKP = 7, public key in label -1). Encoded as deterministic CBOR. Not checked here: that a point is on its
curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from countermark.errors import FormatError
from countermark.formats import cbor

_KTY, _ALG = 1, 3
_OKP, _EC2, _AKP = 1, 2, 7
_P256, _ED25519 = 1, 6


class Algorithm(IntEnum):
    """COSE algorithm numbers."""

    ES256 = -7
    EDDSA = -8
    ML_DSA_44 = -48
    ML_DSA_65 = -49


_PUBLIC_BYTES = {
    Algorithm.ES256: 64,
    Algorithm.EDDSA: 32,
    Algorithm.ML_DSA_44: 1312,
    Algorithm.ML_DSA_65: 1952,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoseKey:
    """A public key. `public`: x || y (64) for ES256, 32 bytes for EdDSA, the FIPS 204 encoding for ML-DSA."""

    algorithm: Algorithm
    public: bytes

    def __post_init__(self) -> None:
        """Raises `FormatError` `cose_key.public` when the length does not fit the algorithm."""
        wanted = _PUBLIC_BYTES[self.algorithm]
        if len(self.public) != wanted:
            message = f"cose_key.public: expected {wanted} bytes, got {len(self.public)}"
            raise FormatError(message, code="cose_key.public")

    def as_map(self) -> dict[int, int | bytes]:
        """The COSE_Key map."""
        match self.algorithm:
            case Algorithm.ES256:
                return {_KTY: _EC2, _ALG: self.algorithm.value, -1: _P256, -2: self.public[:32], -3: self.public[32:]}
            case Algorithm.EDDSA:
                return {_KTY: _OKP, _ALG: self.algorithm.value, -1: _ED25519, -2: self.public}
            case _:
                return {_KTY: _AKP, _ALG: self.algorithm.value, -1: self.public}


def from_map(value: object) -> CoseKey:
    """Read a decoded COSE_Key map; exactly the form `as_map` gives. Raises `FormatError` with code `cose_key.*`."""
    if not isinstance(value, dict):
        raise FormatError(f"cose_key: expected a map, got {type(value).__name__}", code="cose_key.form")
    kind = value.get(_ALG)
    if type(kind) is not int or kind not in Algorithm.__members__.values():
        raise FormatError("cose_key.alg: expected a known algorithm", code="cose_key.alg")
    algorithm = Algorithm(kind)
    labels = {Algorithm.ES256: (-2, -3), Algorithm.EDDSA: (-2,)}.get(algorithm, (-1,))
    parts = [value.get(label) for label in labels]
    public = b"".join(part for part in parts if isinstance(part, bytes))
    key = CoseKey(algorithm=algorithm, public=public)
    if cbor.encode(value) != encode_cose_key(key):
        raise FormatError("cose_key: expected exactly the members of its key type", code="cose_key.form")
    return key


def encode_cose_key(key: CoseKey) -> bytes:
    """Deterministic CBOR of the COSE_Key map."""
    return cbor.encode(key.as_map())


def parse_cose_key(data: bytes) -> CoseKey:
    """The inverse of `encode_cose_key`. Raises `FormatError`."""
    return from_map(cbor.decode(data, max_bytes=4096))
