"""The 64 bytes of report_data, and the claims they stand for.

    report_data = SHA-512("countermark/attest/v1" || deterministic CBOR of the claims)
    keys        = SHA-256 of the deterministic CBOR of [[role, COSE_Key], ...] in the fixed order of `ROLES`
    GPU nonce   = SHA-256("countermark/gpu/v1" || nonce || tls_spki)
    gpu.digest  = SHA-256("countermark/gpu-evidence/v1" || deterministic CBOR of [[report, [certificate, ...]], ...])

`tls_spki` is SHA-256 of the DER SubjectPublicKeyInfo of the TLS key. Nothing else builds report_data. Not checked
here: whether a claim is true; that is appraisal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from countermark.errors import FormatError
from countermark.formats import cbor, cose_key
from countermark.formats.cose_key import Algorithm, CoseKey

VERSION = 1
MAX_CLAIMS_BYTES = 4096
MAX_ORIGIN_BYTES = 256
_CONTEXT = b"countermark/attest/v1"
_GPU_NONCE_CONTEXT = b"countermark/gpu/v1"
_GPU_EVIDENCE_CONTEXT = b"countermark/gpu-evidence/v1"

ROLES: dict[str, Algorithm] = {
    "tls": Algorithm.ES256,
    "receipt-es256": Algorithm.ES256,
    "receipt-ml-dsa-65": Algorithm.ML_DSA_65,
    "log-ed25519": Algorithm.EDDSA,
    "log-ml-dsa-44": Algorithm.ML_DSA_44,
}


class Purpose(Enum):
    """What a quote was made for; must match the caller's."""

    SESSION = "session"
    PASSPORT = "passport"
    REPLAY = "replay"


class GpuFreshness(Enum):
    """Whether the GPU reports carry this quote's nonce (session) or one from boot."""

    SESSION = "session"
    BOOT = "boot"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleKey:
    """One per-boot public key and what it is for."""

    role: str
    key: CoseKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What the appliance says about itself and binds into the quote. Digests are 32 bytes."""

    purpose: Purpose
    nonce: bytes  # 32
    exporter: bytes | None  # 32; present exactly when purpose is SESSION
    boot_id: bytes  # 32
    tls_spki: bytes
    keys: bytes
    log_origin: str
    log_size: int
    log_root: bytes
    weights_root: bytes
    image_id: bytes
    config: bytes
    gpu_digest: bytes
    gpu_freshness: GpuFreshness


_DIGESTS = ("nonce", "boot_id", "tls_spki", "keys", "log_root", "weights_root", "image_id", "config")


def encode_claims(claims: Claims) -> bytes:
    """Deterministic CBOR of the claims."""
    value: dict[str, object] = {name: getattr(claims, name) for name in _DIGESTS}
    value |= {
        "v": VERSION,
        "purpose": claims.purpose.value,
        "log_origin": claims.log_origin,
        "log_size": claims.log_size,
        "gpu": {"digest": claims.gpu_digest, "freshness": claims.gpu_freshness.value},
    }
    if claims.exporter is not None:
        value["exporter"] = claims.exporter
    return cbor.encode(value)


def parse_claims(data: bytes) -> Claims:
    """The inverse of `encode_claims`. Raises `FormatError` with a code below `claims.` or `cbor.`."""
    value = cbor.decode(data, max_bytes=MAX_CLAIMS_BYTES)
    session = isinstance(value, dict) and value.get("purpose") == Purpose.SESSION.value
    types: dict[str, type | tuple[type, ...]] = dict.fromkeys((*_DIGESTS, *(("exporter",) if session else ())), bytes)
    types |= {"v": int, "purpose": str, "log_origin": str, "log_size": int, "gpu": dict}
    fields = cbor.fields(value, "claims", **types)
    gpu = cbor.fields(fields["gpu"], "claims", digest=bytes, freshness=str)
    if fields["v"] != VERSION:
        raise FormatError(f"claims.v: expected {VERSION}, got {fields['v']}", code="claims.version")
    if not 0 <= fields["log_size"] < 1 << 63:
        raise FormatError("claims.log_size: expected 0 to 2^63 - 1", code="claims.log_size")
    origin = fields["log_origin"]
    if not 0 < len(origin.encode()) <= MAX_ORIGIN_BYTES or not origin.isprintable():
        raise FormatError(
            f"claims.log_origin: expected 1 to {MAX_ORIGIN_BYTES} printable bytes", code="claims.log_origin"
        )
    digests = {name: fields[name] for name in _DIGESTS} | {"gpu_digest": gpu["digest"]}
    if session:
        digests["exporter"] = fields["exporter"]
    for name, digest in digests.items():
        if len(digest) != 32:
            raise FormatError(f"claims.{name}: expected 32 bytes, got {len(digest)}", code="claims.length")
    try:
        purpose, freshness = Purpose(fields["purpose"]), GpuFreshness(gpu["freshness"])
    except ValueError as err:
        raise FormatError(f"claims: {err}", code="claims.enum") from err
    return Claims(
        **{"exporter": None, **digests},
        purpose=purpose,
        log_origin=origin,
        log_size=fields["log_size"],
        gpu_freshness=freshness,
    )


def report_data(claims: Claims | bytes) -> bytes:
    """The 64 bytes to put in, or to expect from, a quote. `claims`: the value, or its exact encoded bytes."""
    encoded = claims if isinstance(claims, bytes) else encode_claims(claims)
    return hashlib.sha512(_CONTEXT + encoded).digest()


def keys_value(keys: Sequence[RoleKey]) -> list[list[object]]:
    """The CBOR array that `keys_digest` hashes and evidence carries."""
    return [[item.role, item.key.as_map()] for item in keys]


def keys_from_value(value: object) -> tuple[RoleKey, ...]:
    """Read the array: every role of `ROLES` once, in order, with its algorithm. Raises `FormatError` `keys.*`."""
    if not isinstance(value, list) or len(value) != len(ROLES):
        raise FormatError(f"keys: expected an array of {len(ROLES)} keys", code="keys.roles")
    keys = []
    for item, (role, algorithm) in zip(value, ROLES.items(), strict=True):
        if not isinstance(item, list) or len(item) != 2 or item[0] != role:
            raise FormatError(f"keys: expected [{role!r}, COSE_Key]", code="keys.roles")
        key = cose_key.from_map(item[1])
        if key.algorithm is not algorithm:
            raise FormatError(
                f"keys.{role}: expected {algorithm.name}, got {key.algorithm.name}", code="keys.algorithm"
            )
        keys.append(RoleKey(role=role, key=key))
    return tuple(keys)


def keys_digest(keys: Sequence[RoleKey]) -> bytes:
    """The `keys` claim."""
    return hashlib.sha256(cbor.encode(keys_value(keys))).digest()


def gpu_nonce(nonce: bytes, tls_spki: bytes) -> bytes:
    """The nonce the GPUs must sign, from our 32-byte nonce and the 32-byte TLS key digest."""
    return hashlib.sha256(_GPU_NONCE_CONTEXT + nonce + tls_spki).digest()


def gpu_digest(gpus: Sequence[tuple[bytes, Sequence[bytes]]]) -> bytes:
    """The `gpu.digest` claim over (report, certificates) pairs in order; a machine without GPUs has an empty list."""
    return hashlib.sha256(_GPU_EVIDENCE_CONTEXT + cbor.encode([[r, list(certs)] for r, certs in gpus])).digest()
