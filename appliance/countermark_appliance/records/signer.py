"""What the receipt and log keys of one start sign: receipts and checkpoints.

ES256 signatures have the low s (receipt format). ML-DSA is pure FIPS 204 with the empty context, as RFC 9964 (COSE) and
C2SP tlog-cosignature have it. The keys themselves live in `platform.keyring`.
"""

from __future__ import annotations

from typing import Final

from countermark.formats.receipt import (
    ANSWER,
    REPLAY,
    Form,
    Payload,
    ReplayPayload,
    encode_payload,
    encode_receipt,
    encode_replay_payload,
    thumbprint,
    to_be_signed,
)
from countermark.logkeys import sign_checkpoint
from countermark.tlog.checkpoint import Checkpoint
from countermark_appliance.platform.keyring import Keyring, cose_public_key, sign_es256


class Signer:
    """Signs with a keyring. Thread-safe."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring: Final = keyring
        self._kids: Final = (
            thumbprint(cose_public_key(keyring.receipt_es256.public_key())),
            thumbprint(cose_public_key(keyring.receipt_ml_dsa_65.public_key())),
        )

    def sign_checkpoint(self, checkpoint: Checkpoint, timestamp: int) -> bytes:
        """The signed note. `timestamp`: seconds since 1970, part of what ML-DSA-44 signs."""
        return sign_checkpoint(self._keyring.log_ed25519, self._keyring.log_ml_dsa_44, checkpoint, timestamp)

    def sign_receipt(self, payload: Payload) -> bytes:
        """The COSE_Sign receipt."""
        return self._sign(encode_payload(payload), ANSWER)

    def sign_replay(self, payload: ReplayPayload) -> bytes:
        """The COSE_Sign receipt of a replay."""
        return self._sign(encode_replay_payload(payload), REPLAY)

    def _sign(self, data: bytes, form: Form) -> bytes:
        first, second = to_be_signed(data, self._kids, form)
        signatures = (sign_es256(self._keyring.receipt_es256, first), self._keyring.receipt_ml_dsa_65.sign(second))
        return encode_receipt(data, self._kids, signatures, form)
