"""C2SP tlog-cosignature: what witnesses add to a checkpoint, and how many of them were asked for.

A cosignature is a line of the signed note: key name, then base64 of key id (4) || u64 timestamp || signature. Type 0x04
is Ed25519 over `cosignature/v1\\n`, `time <timestamp>\\n` and the note text; it does not cover the witness's name. Type
0x06 is ML-DSA-44 over `checkpoint.cosigned_message`, which does. A verifier key (signed-note, "vkey") is
`<name>+<key id in hex>+<base64 of type || public key>`; the log's own keys are written so too, Ed25519 with type 0x01.

A witness is a name with one or two keys. It counts when each of its keys has signed, once, at a time that is not zero.
Lines of keys nobody named are ignored, as signed-note demands; a line of a named key that does not hold refuses the
whole note, as it demands too.

Not checked here: the mathematics of a signature (`VerifySignature`); the time against any clock.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError, LogError
from countermark.tlog.checkpoint import (
    ED25519,
    ML_DSA_44,
    Checkpoint,
    LogKeys,
    Note,
    Signature,
    VerifySignature,
    checkpoint_text,
    cosigned_message,
    encode_note,
    is_name,
    key_id,
    parse_checkpoint_text,
    parse_note,
)

COSIGNATURE_ED25519: Final = 0x04
MAX_VKEY: Final = 4096
MAX_TIMESTAMP: Final = 2**63 - 1
_KEY_BYTES: Final = {ED25519: 32, COSIGNATURE_ED25519: 32, ML_DSA_44: 1312}
_SIGNATURE_BYTES: Final = {COSIGNATURE_ED25519: 64, ML_DSA_44: 2420}
WITNESS_TYPES: Final = tuple(_SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierKey:
    """A named public key. `kind`: 0x01 Ed25519 of a log, 0x04 Ed25519 of a witness, 0x06 ML-DSA-44 of either."""

    name: str
    kind: int
    public: bytes

    @property
    def key_id(self) -> bytes:
        return key_id(self.name, self.kind, self.public)

    def __str__(self) -> str:
        """The vkey."""
        encoded = base64.b64encode(bytes([self.kind]) + self.public).decode()
        return f"{self.name}+{self.key_id.hex()}+{encoded}"


def parse_vkey(text: str) -> VerifierKey:
    """Parse a verifier key. Raises `FormatError` (`tlog.vkey`)."""
    name, _, rest = text.partition("+")
    shown_id, _, encoded = rest.partition("+")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as err:
        raise _vkey_error(text) from err
    if len(text) > MAX_VKEY or not is_name(name) or not raw or len(raw) - 1 != _KEY_BYTES.get(raw[0]):
        raise _vkey_error(text)
    key = VerifierKey(name=name, kind=raw[0], public=raw[1:])
    if str(key) != text or shown_id != key.key_id.hex():
        raise _vkey_error(text)
    return key


def log_keys(keys: Iterable[VerifierKey]) -> tuple[str, LogKeys]:
    """Origin and keys of a log from its two verifier keys. Raises `FormatError` (`tlog.vkey`)."""
    by_kind = {key.kind: key for key in keys}
    names = {key.name for key in by_kind.values()}
    if by_kind.keys() != {ED25519, ML_DSA_44} or len(names) != 1:
        message = "verifier keys of a log: expected one of type 0x01 and one of type 0x06 with one name"
        raise FormatError(message, code="tlog.vkey")
    return names.pop(), LogKeys(ed25519=by_kind[ED25519].public, ml_dsa_44=by_kind[ML_DSA_44].public)


def cosignature_message(key: VerifierKey, timestamp: int, checkpoint: Checkpoint) -> bytes:
    """What a witness signs at a time (unix seconds)."""
    if key.kind == ML_DSA_44:
        return cosigned_message(key.name, timestamp, checkpoint)
    return f"cosignature/v1\ntime {timestamp}\n{checkpoint_text(checkpoint)}".encode()


def cosignature_line(key: VerifierKey, timestamp: int, signature: bytes) -> Signature:
    """The note's line for a raw signature."""
    return Signature(name=key.name, key_id=key.key_id, blob=struct.pack(">Q", timestamp) + signature)


def with_lines(data: bytes, lines: Iterable[Signature]) -> bytes:
    """The note with these lines; one of the same name and key id takes an earlier one's place.

    Raises `FormatError` (`tlog.note`).
    """
    note = parse_note(data)
    merged = {(line.name, line.key_id): line for line in (*note.signatures, *lines)}
    encoded = encode_note(Note(text=note.text, signatures=tuple(merged.values())))
    parse_note(encoded)
    return encoded


def names_of(witnesses: Iterable[VerifierKey]) -> tuple[str, ...]:
    """The witnesses, by name, in the order they were given."""
    return tuple(dict.fromkeys(key.name for key in witnesses))


def verify_cosignatures(data: bytes, witnesses: Sequence[VerifierKey], verify: VerifySignature) -> tuple[str, ...]:
    """The names of the witnesses that signed with every key of theirs in `witnesses`, in that order.

    Raises `FormatError` (`tlog.*`) or `LogError` (`log.cosignature`): a line of a named key that does not hold.
    """
    note = parse_note(data)
    checkpoint = parse_checkpoint_text(note.text)
    missing: set[str] = set()
    for key in witnesses:
        blobs = [line.blob for line in note.signatures if (line.name, line.key_id) == (key.name, key.key_id)]
        if not blobs:
            missing.add(key.name)
        elif len(blobs) > 1 or not _holds(key, blobs[0], checkpoint, verify):
            message = f"cosignature of {key.name}, type {key.kind:#04x}: expected one that holds, got {len(blobs)}"
            raise LogError(message, code="log.cosignature")
    return tuple(name for name in names_of(witnesses) if name not in missing)


def _holds(key: VerifierKey, blob: bytes, checkpoint: Checkpoint, verify: VerifySignature) -> bool:
    if key.kind not in _SIGNATURE_BYTES or len(blob) != 8 + _SIGNATURE_BYTES[key.kind]:
        return False
    timestamp = int.from_bytes(blob[:8], "big")
    message = cosignature_message(key, timestamp, checkpoint)
    return 0 < timestamp <= MAX_TIMESTAMP and verify(key.kind, key.public, blob[8:], message)


def _vkey_error(text: str) -> FormatError:
    message = f"verifier key: expected NAME+KEYID+BASE64 of type 0x01, 0x04 or 0x06, got {text!r:.80}"
    return FormatError(message, code="tlog.vkey")
