"""The keys of a log or a witness outside any appliance: an Ed25519 and an ML-DSA-44 key in a file, and what they sign.

The file is text: `name: NAME`, then two PKCS#8 private keys in PEM (RFC 7468; ML-DSA as RFC 9881), both encrypted when
a passphrase is given. It is written with mode 0600 and refused when others may read it. Key names and verifier keys are
those of C2SP signed-note; signatures those of `tlog.checkpoint` and `tlog.cosignature`.

Not done here: keeping the key anywhere better than a file.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from countermark.errors import UsageError
from countermark.files import read_file, write_new_file
from countermark.tlog.checkpoint import (
    ED25519,
    ML_DSA_44,
    Checkpoint,
    LogKeys,
    Signature,
    checkpoint_text,
    cosigned_message,
    encode_checkpoint,
    is_name,
)
from countermark.tlog.cosignature import COSIGNATURE_ED25519, VerifierKey, cosignature_line, cosignature_message

_MAX_BYTES: Final = 64 * 1024
_BLOCK: Final = re.compile(r"-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]+-----\n")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SigningKeys:
    """Both private keys under one name."""

    name: str
    ed25519: ed25519.Ed25519PrivateKey
    ml_dsa_44: mldsa.MLDSA44PrivateKey

    @property
    def log_keys(self) -> LogKeys:
        return LogKeys(
            ed25519=self.ed25519.public_key().public_bytes_raw(),
            ml_dsa_44=self.ml_dsa_44.public_key().public_bytes_raw(),
        )

    @property
    def as_log(self) -> tuple[VerifierKey, ...]:
        """What verifies a log under these keys."""
        return self._verifiers(ED25519)

    @property
    def as_witness(self) -> tuple[VerifierKey, ...]:
        """What verifies a witness under these keys."""
        return self._verifiers(COSIGNATURE_ED25519)

    def sign_checkpoint(self, checkpoint: Checkpoint, timestamp: int) -> bytes:
        """The signed note of a log whose origin is our name."""
        return sign_checkpoint(self.ed25519, self.ml_dsa_44, checkpoint, timestamp)

    def cosign(self, checkpoint: Checkpoint, timestamp: int) -> tuple[Signature, ...]:
        """A witness's lines for a checkpoint, one of each key."""
        first, second = self.as_witness
        ed_signature = self.ed25519.sign(cosignature_message(first, timestamp, checkpoint))
        ml_signature = self.ml_dsa_44.sign(cosignature_message(second, timestamp, checkpoint))
        return cosignature_line(first, timestamp, ed_signature), cosignature_line(second, timestamp, ml_signature)

    def _verifiers(self, ed25519_kind: int) -> tuple[VerifierKey, ...]:
        keys = self.log_keys
        return (
            VerifierKey(name=self.name, kind=ed25519_kind, public=keys.ed25519),
            VerifierKey(name=self.name, kind=ML_DSA_44, public=keys.ml_dsa_44),
        )


def new_keys(name: str) -> SigningKeys:
    """Fresh keys. Raises `UsageError` (`usage.key_name`)."""
    if not is_name(name) or not name.isprintable():
        message = (
            f"name: expected at most 255 bytes without '+' and spaces, such as log.example/boots, got {name!r:.80}"
        )
        raise UsageError(message, code="usage.key_name")
    return SigningKeys(
        name=name,
        ed25519=ed25519.Ed25519PrivateKey.generate(),
        ml_dsa_44=mldsa.MLDSA44PrivateKey.generate(),
    )


def save_keys(keys: SigningKeys, path: Path, *, passphrase: bytes | None = None) -> None:
    """Write the file, which must not exist, with mode 0600. Raises `UsageError` (`usage.file`)."""
    cover: KeySerializationEncryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    blocks = (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, cover).decode() for key in (keys.ed25519, keys.ml_dsa_44)
    )
    write_new_file(path, f"name: {keys.name}\n{''.join(blocks)}".encode())


def load_keys(path: Path, *, passphrase: bytes | None = None) -> SigningKeys:
    """Read the file of `save_keys`. Raises `UsageError` (`usage.file`, `usage.key_mode`, `usage.key`)."""
    data = read_file(path, max_bytes=_MAX_BYTES)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UsageError(f"{path}: expected mode 0600, because it holds private keys", code="usage.key_mode")
    wanted = "expected a key file as `countermark log keygen` writes it"
    try:
        head, _, rest = data.decode("ascii").partition("\n")
        blocks = _BLOCK.findall(rest)
        first, second = (load_pem_private_key(block.encode(), passphrase) for block in blocks)
    except TypeError as err:  # encrypted without a passphrase, or the reverse
        raise UsageError(f"{path}: {err}", code="usage.key") from err
    except (ValueError, UnsupportedAlgorithm) as err:
        raise UsageError(f"{path}: {wanted}, and its passphrase", code="usage.key") from err
    name = head.removeprefix("name: ")
    kinds = isinstance(first, ed25519.Ed25519PrivateKey), isinstance(second, mldsa.MLDSA44PrivateKey)
    if not all(kinds) or not is_name(name) or head == name or "".join(blocks) != rest:
        raise UsageError(f"{path}: {wanted}", code="usage.key")
    assert isinstance(first, ed25519.Ed25519PrivateKey)
    assert isinstance(second, mldsa.MLDSA44PrivateKey)
    return SigningKeys(name=name, ed25519=first, ml_dsa_44=second)


def read_passphrase(path: Path | None) -> bytes | None:
    """The first line of a file; None for no file. Raises `UsageError` (`usage.file`, `usage.key`)."""
    if path is None:
        return None
    line = read_file(path, max_bytes=4096).partition(b"\n")[0]
    if not line:
        raise UsageError(f"{path}: expected a passphrase in its first line, got none", code="usage.key")
    return line


def sign_checkpoint(
    first: ed25519.Ed25519PrivateKey, second: mldsa.MLDSA44PrivateKey, checkpoint: Checkpoint, timestamp: int
) -> bytes:
    """A log's signed note under its two keys. `timestamp`: seconds since 1970, part of what ML-DSA-44 signs."""
    keys = LogKeys(ed25519=first.public_key().public_bytes_raw(), ml_dsa_44=second.public_key().public_bytes_raw())
    signature = first.sign(checkpoint_text(checkpoint).encode())
    message = cosigned_message(checkpoint.origin, timestamp, checkpoint)
    return encode_checkpoint(checkpoint, keys, signature, second.sign(message), timestamp)


def verify_signature(kind: int, public_key: bytes, signature: bytes, message: bytes) -> bool:
    """`tlog.checkpoint.VerifySignature` for every type our logs and witnesses use."""
    try:
        if kind in (ED25519, COSIGNATURE_ED25519):
            ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        else:
            mldsa.MLDSA44PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
