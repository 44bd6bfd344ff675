"""The bundle: one file (`.cmk`) with everything it takes to verify an answer offline.

A ZIP (APPNOTE 6.3) of stored entries in one fixed order, without times, comments or extra fields, mode 0600, so that
equal content is an equal file and any ZIP tool opens it. `manifest.cbor` comes first: [name, size, SHA-256] of every
other entry. A reader takes the names and contents from the local headers, encodes them again and compares: every byte
of the file is accounted for. The digests find damage, not forgery: nothing in a bundle is believed before
`countermark.verify` has checked it.

`redact` leaves out the prompt or the output with every salt that would make a guess at it checkable: the signed records
keep their commitments, so what is left proves as much as before. A bundle redacted by half is refused.

Not here: what the entries mean (`formats`), and how proofs that were made later get into one (`later`).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from countermark.errors import BundleError, FormatError
from countermark.files import read_file, write_file
from countermark.formats import cbor, records
from countermark.formats.anchors import MAX_ANCHORS_BYTES, parse_anchors
from countermark.formats.evidence import MAX_EVIDENCE_BYTES
from countermark.formats.manifest import MAX_MANIFEST_BYTES
from countermark.formats.receipt import (
    MAX_RECEIPT_BYTES,
    Acceptance,
    Answer,
    Placed,
    Redaction,
    Reply,
    encode_acceptance,
    encode_answer,
    parse_acceptance,
    parse_answer,
)
from countermark.formats.witnessed import (
    MAX_RECEIPT_WITNESS_BYTES,
    MAX_WITNESSED_BYTES,
    parse_receipt_witness,
    parse_witnessed,
)

VERSION: Final = 1
SUFFIX: Final = ".cmk"
MANIFEST: Final = "manifest.cbor"
_MIB: Final = 1024 * 1024
ENTRIES: Final = {  # in this order; the most bytes of each
    "request.bin": 16 * _MIB,
    "accepted.cbor": 8 * _MIB,
    "answer.cbor": 32 * _MIB,
    "receipt.cose": MAX_RECEIPT_BYTES,
    "evidence.cbor": MAX_EVIDENCE_BYTES,
    "measurements.json": MAX_MANIFEST_BYTES,
    "epoch.cbor": MAX_WITNESSED_BYTES,
    "witness.cbor": MAX_RECEIPT_WITNESS_BYTES,
    "anchors.cbor": MAX_ANCHORS_BYTES,
}
_LATER: Final[Mapping[str, Callable[[bytes], object]]] = {
    "epoch.cbor": parse_witnessed,
    "witness.cbor": parse_receipt_witness,
    "anchors.cbor": parse_anchors,
}
_ALWAYS: Final = ("accepted.cbor", "answer.cbor", "receipt.cose", "evidence.cbor")
MAX_BUNDLE_BYTES: Final = 64 * _MIB
REPLY_FIELDS: Final = tuple(name for name in records.OUTCOME_FIELDS if name != "fingerprints")
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_VERSION, _DATE_1980 = 20, 0x21
_MADE_BY_UNIX, _MODE_0600 = 3 << 8 | _VERSION, 0o600 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The parsed, unverified content of a bundle; its class and None say what was left out (`redacted`).

    `manifest`: the signed measurement manifest. `epoch`: the node's EPOCH in the operator's log. `witness`: a cosigned
    checkpoint that extends the receipt's. `anchors`: timestamps. Each if it came along.
    """

    request: bytes | None
    acceptance: Acceptance | Placed
    answer: Answer | Reply | None
    receipt: bytes
    evidence: bytes
    manifest: bytes | None = None
    epoch: bytes | None = None
    witness: bytes | None = None
    anchors: bytes | None = None

    def __post_init__(self) -> None:
        self._refuse_half_redacted()

    @property
    def redacted(self) -> tuple[Redaction, ...]:
        """What was left out; empty for a whole bundle."""
        left_out = {Redaction.PROMPT: self.request is None, Redaction.OUTPUT: self.answer is None}
        return tuple(part for part, absent in left_out.items() if absent)

    def _refuse_half_redacted(self) -> None:
        """Raises `BundleError` (`bundle.redaction`) where a value or a salt is left of what was left out."""
        whole = self.request is not None
        held = {"accepted.cbor": isinstance(self.acceptance, Acceptance)}
        if self.answer is not None:
            held["answer.cbor"] = isinstance(self.answer, Answer)
        for name, there in held.items():
            if there != whole:
                left = ("whole, as request.bin is", "without its prompt, as request.bin is left out")[not whole]
                raise BundleError(f"{name}: expected {left}", code="bundle.redaction")
        if whole or self.answer is None:
            return
        try:
            records.parse_salts(self.answer.field_salts, REPLY_FIELDS)
        except FormatError as err:
            message = f"answer.cbor: expected the salts of {', '.join(REPLY_FIELDS)} alone"
            raise BundleError(message, code="bundle.redaction") from err


def redact(bundle: Bundle, *, prompt: bool = False, output: bool = False) -> Bundle:
    """Leave out prompt or output with their salts. What is left out already stays so.

    The prompt takes the fingerprints along: they follow from it, so whoever has the weights could try guesses on them.
    Raises `FormatError` where the salts of the answer do not parse.
    """
    request, acceptance, answer = bundle.request, bundle.acceptance, bundle.answer
    if prompt and request is not None:
        request = None
        acceptance = Placed(**{item.name: getattr(acceptance, item.name) for item in fields(Placed)})
        if answer is not None:
            salts = records.parse_salts(answer.field_salts, records.OUTCOME_FIELDS)
            kept = records.encode_salts({name: salts[name] for name in REPLY_FIELDS})
            answer = Reply(tokens=answer.tokens, text=answer.text, field_salts=kept)
    return replace(bundle, request=request, acceptance=acceptance, answer=None if output else answer)


def encode_bundle(bundle: Bundle) -> bytes:
    """The file's bytes. Raises `BundleError` (`bundle.size`)."""
    entries = entries_of(bundle)
    for name, data in entries.items():
        if len(data) > ENTRIES[name]:
            raise BundleError(f"{name}: expected at most {ENTRIES[name]} bytes, got {len(data)}", code="bundle.size")
    return _encode_zip({MANIFEST: _manifest(entries), **entries})


def entries_of(bundle: Bundle) -> dict[str, bytes]:
    """The entries below the manifest, by name and in order."""
    parts = (
        bundle.request,
        encode_acceptance(bundle.acceptance),
        encode_answer(bundle.answer),
        *(bundle.receipt, bundle.evidence, bundle.manifest, bundle.epoch, bundle.witness, bundle.anchors),
    )
    return {name: data for name, data in zip(ENTRIES, parts, strict=True) if data is not None}


def parse_bundle(data: bytes) -> Bundle:
    """Parse a bundle, accounting for every byte.

    Raises `BundleError`: `bundle.size`, `bundle.container` (not exactly our ZIP), `bundle.digest` (an entry differs
    from the manifest), `bundle.redaction` (redacted by half); `FormatError` of an entry that does not parse.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError(f"bundle: expected at most {MAX_BUNDLE_BYTES} bytes, got {len(data)}", code="bundle.size")
    entries = _read_entries(data)
    names = tuple(entries)
    if not names:
        raise BundleError("bundle: expected a file as `chat --bundle` writes it, got another", code="bundle.container")
    if names != (MANIFEST, *(name for name in ENTRIES if name in entries or name in _ALWAYS)):
        raise BundleError(
            f"bundle: expected its fixed entries in order, got {', '.join(names)!r:.200}", code="bundle.container"
        )
    if _encode_zip(entries) != data:
        where = _changed(entries, data)
        message = f"bundle: expected the bytes as they were written; changed, cut or added {where}"
        raise BundleError(message, code="bundle.container")
    manifest = entries.pop(MANIFEST)
    for name, content in entries.items():
        if len(content) > ENTRIES[name]:
            raise BundleError(f"{name}: expected at most {ENTRIES[name]} bytes", code="bundle.size")
    if manifest != _manifest(entries):
        raise BundleError("bundle: the entries are not the ones its manifest lists", code="bundle.digest")
    bundle = Bundle(
        request=entries.get("request.bin"),
        acceptance=parse_acceptance(entries["accepted.cbor"]),
        answer=parse_answer(entries["answer.cbor"]),
        receipt=entries["receipt.cose"],
        evidence=entries["evidence.cbor"],
        manifest=entries.get("measurements.json"),
        epoch=entries.get("epoch.cbor"),
        witness=entries.get("witness.cbor"),
        anchors=entries.get("anchors.cbor"),
    )
    for name, parse in _LATER.items():  # judged or not, no byte of them is unaccounted for
        if name in entries:
            parse(entries[name])
    return bundle


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write the file whole and durably, readable by its owner only: it holds the prompt.

    Raises `BundleError` (`bundle.size`), `UsageError` (`usage.file`).
    """
    write_file(path, encode_bundle(bundle))


def read_bundle(path: Path) -> Bundle:
    """Read and parse the file. Raises `UsageError` (`usage.file`, `usage.too_long`) and as `parse_bundle`."""
    return parse_bundle(read_file(path, max_bytes=MAX_BUNDLE_BYTES))


def _manifest(entries: Mapping[str, bytes]) -> bytes:
    files = [[name, len(data), hashlib.sha256(data).digest()] for name, data in entries.items()]
    return cbor.encode({"v": VERSION, "type": "countermark/bundle/v1", "files": files})


def _encode_zip(entries: Mapping[str, bytes]) -> bytes:
    body, directory = bytearray(), bytearray()
    for name, data in entries.items():
        encoded, offset = name.encode(), len(body)
        about = (zlib.crc32(data), len(data), len(data), len(encoded), 0)
        head = (_VERSION, 0, 0, 0, _DATE_1980)
        body += _LOCAL.pack(b"PK\3\4", *head, *about) + encoded + data
        directory += _CENTRAL.pack(b"PK\1\2", _MADE_BY_UNIX, *head, *about, 0, 0, 0, _MODE_0600, offset) + encoded
    end = _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return bytes(body + directory + end)


def _changed(entries: Mapping[str, bytes], data: bytes) -> str:
    """For people: the first entry whose content has not the CRC-32 of its local header, else what is left."""
    at = 0
    for name, content in entries.items():
        crc = int.from_bytes(data[at + 14 : at + 18], "little")
        if zlib.crc32(content) != crc:
            return f"in {name!r:.60}"
        at += _LOCAL.size + len(name) + len(content)
    return "outside its entries"


def _read_entries(data: bytes) -> dict[str, bytes]:
    """Names and contents by the local headers, up to the central directory; everything else is compared later."""
    entries: dict[str, bytes] = {}
    at = 0
    while data[at : at + 4] == b"PK\3\4" and len(entries) <= len(ENTRIES):
        if len(data) - at < _LOCAL.size:
            raise BundleError("bundle: ends inside a header", code="bundle.container")
        *_, size, name_size, _ = _LOCAL.unpack_from(data, at)
        start = at + _LOCAL.size + name_size
        at = start + size
        name = data[start - name_size : start].decode("ascii", errors="replace")
        if at > len(data) or name in entries:
            raise BundleError(
                "bundle: expected whole entries, got one that is cut short or named twice", code="bundle.container"
            )
        entries[name] = data[start:at]
    return entries
