"""The publisher's keys: the two that sign manifests, and the two of its measurement log.

A directory of mode 0700: `manifest-es256.pem` and `manifest-ml-dsa-65.pem` (PKCS#8, RFC 7468 and RFC 9881), `log` (as
`countermark.logkeys` has it), all of mode 0600, and what may be given to everybody: `signers` (SHA-256 of both
COSE_Keys, a line each, as a policy names them) and `vkeys` (the log's verifier keys). One passphrase may cover all
private keys.

Not done here: keeping keys anywhere better than in files.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from countermark.errors import UsageError
from countermark.files import read_file, write_file, write_new_file
from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.manifest import Envelope, ManifestSignature, encode_envelope, pae, signer_digest
from countermark.keys import P256_ORDER
from countermark.logkeys import SigningKeys, load_keys, new_keys, save_keys

ES256_NAME: Final = "manifest-es256.pem"
ML_DSA_NAME: Final = "manifest-ml-dsa-65.pem"
LOG_NAME: Final = "log"
SIGNERS_NAME: Final = "signers"
VKEYS_NAME: Final = "vkeys"
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PublisherKeys:
    """Everything a publisher signs with."""

    es256: ec.EllipticCurvePrivateKey
    ml_dsa_65: mldsa.MLDSA65PrivateKey
    log: SigningKeys

    @property
    def cose(self) -> tuple[CoseKey, CoseKey]:
        """The public keys of the manifest's two signatures, in their order."""
        point = self.es256.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return (
            CoseKey(algorithm=Algorithm.ES256, public=point[1:]),
            CoseKey(algorithm=Algorithm.ML_DSA_65, public=self.ml_dsa_65.public_key().public_bytes_raw()),
        )

    @property
    def signers(self) -> tuple[bytes, bytes]:
        """How a policy names them: SHA-256 of the encoded COSE_Keys."""
        first, second = self.cose
        return signer_digest(first), signer_digest(second)

    def sign(self, statement: bytes) -> bytes:
        """The DSSE envelope over an encoded statement, with both signatures. ES256 has the low s."""
        message = pae(statement)
        r, s = decode_dss_signature(self.es256.sign(message, ec.ECDSA(hashes.SHA256())))
        classic = r.to_bytes(32, "big") + min(s, P256_ORDER - s).to_bytes(32, "big")
        first, second = self.cose
        return encode_envelope(
            Envelope(
                payload=statement,
                signatures=(
                    ManifestSignature(key=first, signature=classic),
                    ManifestSignature(key=second, signature=self.ml_dsa_65.sign(message)),
                ),
            )
        )


def create(directory: Path, log_name: str, *, passphrase: bytes | None = None) -> PublisherKeys:
    """Make keys and write them to a directory that does not exist yet.

    `log_name`: the measurement log's origin, such as example.org/measurements. Raises `UsageError`: `usage.key_name`,
    `usage.file`.
    """
    keys = PublisherKeys(
        es256=ec.generate_private_key(ec.SECP256R1()),
        ml_dsa_65=mldsa.MLDSA65PrivateKey.generate(),
        log=new_keys(log_name),
    )
    try:
        directory.mkdir(mode=0o700, parents=False)
    except OSError as err:
        raise UsageError(f"{directory}: {err.strerror}", code="usage.file") from err
    cover: KeySerializationEncryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    for name, key in ((ES256_NAME, keys.es256), (ML_DSA_NAME, keys.ml_dsa_65)):
        write_new_file(directory / name, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, cover))
    save_keys(keys.log, directory / LOG_NAME, passphrase=passphrase)
    write_public(keys, directory)
    return keys


def write_public(keys: PublisherKeys, directory: Path) -> None:
    """Write `signers` and `vkeys`: what verifiers are given. Raises `UsageError` (`usage.file`)."""
    write_file(directory / SIGNERS_NAME, "".join(f"{item.hex()}\n" for item in keys.signers).encode(), mode=0o644)
    write_file(directory / VKEYS_NAME, "".join(f"{item}\n" for item in keys.log.as_log).encode(), mode=0o644)


def load(directory: Path, *, passphrase: bytes | None = None) -> PublisherKeys:
    """Read what `create` wrote. Raises `UsageError`: `usage.file`, `usage.key_mode`, `usage.key`."""
    first = _load(directory / ES256_NAME, passphrase)
    second = _load(directory / ML_DSA_NAME, passphrase)
    if not isinstance(first, ec.EllipticCurvePrivateKey) or not isinstance(first.curve, ec.SECP256R1):
        raise UsageError(f"{directory / ES256_NAME}: expected a private key on P-256", code="usage.key")
    if not isinstance(second, mldsa.MLDSA65PrivateKey):
        raise UsageError(f"{directory / ML_DSA_NAME}: expected an ML-DSA-65 private key", code="usage.key")
    return PublisherKeys(es256=first, ml_dsa_65=second, log=load_keys(directory / LOG_NAME, passphrase=passphrase))


def _load(path: Path, passphrase: bytes | None) -> object:
    data = read_file(path, max_bytes=_MAX_BYTES)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UsageError(f"{path}: expected mode 0600, because it holds a private key", code="usage.key_mode")
    try:
        return load_pem_private_key(data, passphrase)
    except TypeError as err:  # encrypted without a passphrase, or the reverse
        raise UsageError(f"{path}: {err}", code="usage.key") from err
    except (ValueError, UnsupportedAlgorithm) as err:
        message = f"{path}: expected a key file as `countermark-measure keys new` writes it, and its passphrase"
        raise UsageError(message, code="usage.key") from err
