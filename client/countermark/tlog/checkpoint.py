"""C2SP signed-note and tlog-checkpoint: the signed head of a log, under two keys.

signed-note: text, blank line, lines `— <name> base64(key id (4) || signature)`; key id is the first 4 bytes of
SHA-256(name || 0x0A || type || public key). Type 0x01 is Ed25519 over the text. Type 0x06 is ML-DSA-44 as in
tlog-cosignature (which tlog-checkpoint recommends for the log's own signature too): the signature is u64 timestamp ||
2420 bytes over `cosigned_message` {"subtree/v1\\n\\0", name<1..255>, timestamp, origin<1..255>, start = 0, end = size,
root}, FIPS 204 with the empty context. Our logs sign with the origin as the key name and have no extension lines,
because 0x06 does not cover them: a checkpoint with any is refused. Lines of unknown keys (witnesses) are ignored, as
the specification demands.

Not checked here: the mathematics of a signature; the caller supplies `VerifySignature`. Cosignatures of witnesses
(`tlog.cosignature`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from countermark.errors import FormatError, LogError
from countermark.tlog.merkle import HASH_BYTES, MAX_SIZE

ED25519 = 0x01
ML_DSA_44 = 0x06
MAX_NOTE_BYTES = 128 * 1024
MAX_SIGNATURES = 32
MAX_NAME_BYTES = 255
ED25519_SIGNATURE_BYTES = 64
ML_DSA_44_SIGNATURE_BYTES = 2420
_DASH = "\u2014 "
_LABEL = b"subtree/v1\n\x00"

VerifySignature = Callable[[int, bytes, bytes, bytes], bool]
"""`(signature type, raw public key, signature, message)` -> whether it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One signature line. `blob` is what follows the key id."""

    name: str
    key_id: bytes
    blob: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A signed note. `text` ends in a newline and is what type 0x01 signs."""

    text: str
    signatures: tuple[Signature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The head of a log: what its two signatures say together."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogKeys:
    """The raw public keys of one log: Ed25519 (32 bytes) and ML-DSA-44 (1312 bytes)."""

    ed25519: bytes
    ml_dsa_44: bytes


def key_id(name: str, kind: int, public_key: bytes) -> bytes:
    """First 4 bytes of SHA-256(name || 0x0A || type || public key)."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def encode_note(note: Note) -> bytes:
    """Text, blank line, signature lines."""
    lines = "".join(
        f"{_DASH}{line.name} {base64.b64encode(line.key_id + line.blob).decode()}\n" for line in note.signatures
    )
    return f"{note.text}\n{lines}".encode()


def parse_note(data: bytes) -> Note:
    """Parse a signed note. Raises `FormatError` (`tlog.note`); re-encoding the result gives `data` again."""
    if len(data) > MAX_NOTE_BYTES:
        raise _note_error(f"at most {MAX_NOTE_BYTES} bytes, got {len(data)}")
    try:
        document = data.decode()
    except UnicodeDecodeError as err:
        raise _note_error("UTF-8") from err
    if any(char < " " and char != "\n" for char in document):
        raise _note_error("no control characters")
    head, separator, tail = document.rpartition("\n\n")
    lines = tail.split("\n")
    if not separator or not head or lines[-1] != "" or not 2 <= len(lines) <= MAX_SIGNATURES + 1:
        raise _note_error(f"text, a blank line and 1 to {MAX_SIGNATURES} signature lines")
    note = Note(text=head + "\n", signatures=tuple(_signature(line) for line in lines[:-1]))
    if encode_note(note) != data:
        raise _note_error("canonical base64")
    return note


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """The note text: origin, size, root, each on its line."""
    return f"{checkpoint.origin}\n{checkpoint.size}\n{base64.b64encode(checkpoint.root).decode()}\n"


def parse_checkpoint_text(text: str) -> Checkpoint:
    """Parse the note text of one of our checkpoints. Raises `FormatError`: `tlog.checkpoint`, `tlog.extension`."""
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] != "" or not all(lines[:-1]):
        raise FormatError("checkpoint: expected origin, size and root", code="tlog.checkpoint")
    if len(lines) > 4:
        raise FormatError("checkpoint: expected no extension lines", code="tlog.extension")
    origin, size, root = lines[:3]
    try:
        value = Checkpoint(origin=origin, size=_decimal(size), root=base64.b64decode(root, validate=True))
    except (binascii.Error, ValueError) as err:
        raise FormatError("checkpoint: expected a decimal size and a base64 root", code="tlog.checkpoint") from err
    if len(value.root) != HASH_BYTES or value.size > MAX_SIZE or checkpoint_text(value) != text or not is_name(origin):
        raise FormatError("checkpoint: expected canonical origin, size and root", code="tlog.checkpoint")
    return value


def cosigned_message(name: str, timestamp: int, checkpoint: Checkpoint) -> bytes:
    """What type 0x06 signs: the TLS-encoded `cosigned_message` of tlog-cosignature for a whole checkpoint."""
    names = [item.encode() for item in (name, checkpoint.origin)]
    return b"".join(
        (
            _LABEL,
            struct.pack(">B", len(names[0])) + names[0],
            struct.pack(">Q", timestamp),
            struct.pack(">B", len(names[1])) + names[1],
            struct.pack(">QQ", 0, checkpoint.size),
            checkpoint.root,
        )
    )


def encode_checkpoint(checkpoint: Checkpoint, keys: LogKeys, ed25519: bytes, ml_dsa_44: bytes, timestamp: int) -> bytes:
    """The signed note from the two raw signatures."""
    name = checkpoint.origin
    return encode_note(
        Note(
            text=checkpoint_text(checkpoint),
            signatures=(
                Signature(name=name, key_id=key_id(name, ED25519, keys.ed25519), blob=ed25519),
                Signature(
                    name=name,
                    key_id=key_id(name, ML_DSA_44, keys.ml_dsa_44),
                    blob=struct.pack(">Q", timestamp) + ml_dsa_44,
                ),
            ),
        )
    )


def verify_checkpoint(data: bytes, origin: str, keys: LogKeys, verify: VerifySignature) -> Checkpoint:
    """Open a checkpoint of the log `origin`: both of the log's signatures must be there once and hold.

    Raises `FormatError` (`tlog.note`, `tlog.checkpoint`, `tlog.extension`) or `LogError`: `log.origin`,
    `log.signature_missing`, `log.signature_duplicate`, `log.signature`.
    """
    note = parse_note(data)
    checkpoint = parse_checkpoint_text(note.text)
    if checkpoint.origin != origin:
        raise LogError(f"origin: expected {origin}, got {checkpoint.origin}", code="log.origin")
    ed25519 = _our_line(note, origin, ED25519, keys.ed25519, ED25519_SIGNATURE_BYTES)
    ml_dsa_44 = _our_line(note, origin, ML_DSA_44, keys.ml_dsa_44, 8 + ML_DSA_44_SIGNATURE_BYTES)
    timestamp = int.from_bytes(ml_dsa_44[:8], "big")
    if not verify(ED25519, keys.ed25519, ed25519, note.text.encode()):
        raise LogError("checkpoint: the Ed25519 signature does not verify", code="log.signature")
    message = cosigned_message(origin, timestamp, checkpoint)
    if timestamp >= 2**63 or not verify(ML_DSA_44, keys.ml_dsa_44, ml_dsa_44[8:], message):
        raise LogError("checkpoint: the ML-DSA-44 signature does not verify", code="log.signature")
    return checkpoint


def _our_line(note: Note, name: str, kind: int, public_key: bytes, length: int) -> bytes:
    wanted = key_id(name, kind, public_key)
    blobs = [line.blob for line in note.signatures if line.name == name and line.key_id == wanted]
    if not blobs:
        raise LogError(f"checkpoint: no signature of type {kind:#04x} by this log", code="log.signature_missing")
    if len(blobs) > 1:
        raise LogError(f"checkpoint: {len(blobs)} signatures of type {kind:#04x}", code="log.signature_duplicate")
    if len(blobs[0]) != length:
        raise LogError(f"signature: expected {length} bytes, got {len(blobs[0])}", code="log.signature")
    return blobs[0]


def _signature(line: str) -> Signature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space or not is_name(name):
        raise _note_error("lines `— <key name> <base64>`")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as err:
        raise _note_error("base64 signatures") from err
    if len(blob) < 5:
        raise _note_error("a key id and a signature")
    return Signature(name=name, key_id=blob[:4], blob=blob[4:])


def is_name(name: str) -> bool:
    """What may name a key or a log: not empty, at most 255 bytes, neither plus nor any Unicode space."""
    return 0 < len(name.encode()) <= MAX_NAME_BYTES and "+" not in name and not any(map(str.isspace, name))


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19) or (text[0] == "0" and text != "0"):
        raise ValueError(text)
    return int(text)


def _note_error(expected: str) -> FormatError:
    return FormatError(f"signed note: expected {expected}", code="tlog.note")
