"""The measurement manifest: what an image measures to, published and signed before any machine boots it.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) with predicate type `PREDICATE_TYPE`, inside a DSSE v1
envelope (secure-systems-lab/dsse protocol 1.0.2) with exactly two signatures over the same pre-authentication
encoding: ES256 (r || s) first, then ML-DSA-65 (FIPS 204, empty context). Each signature entry carries its public key
as a COSE_Key, and its keyid is the hex SHA-256 of that encoding, so a policy can pin the two digests.

A launch shape is what the host chooses (memory, devices, VMM): it moves MRTD and RTMR0 only. The events of each shape
must replay to its registers, so a manifest cannot contradict itself. `encode_manifest(parse_manifest(b)) == b` and
the same for the envelope: one value has one byte string. Times are Unix seconds.

Not checked here: the signatures, the validity interval against a clock, whether the signers are the policy's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from countermark.errors import FormatError
from countermark.formats import cose_key, eventlog, strict_json
from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.eventlog import Event

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://countermark.dev/measurement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_SHAPES = 64
PLATFORMS = ("sim", "tdx", "vtpm")
SIGNERS = (Algorithm.ES256, Algorithm.ML_DSA_65)
_SIGNATURE_BYTES = {Algorithm.ES256: 64, Algorithm.ML_DSA_65: 3309}
_MAX_TEXT = 256
_MAX_ITEMS = 4096


class ImageKind(Enum):
    """Which of the images this is; a production policy accepts the first alone."""

    PRODUCTION = "production"
    TEST = "test"
    DEVELOPMENT = "development"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An artefact the statement is about."""

    name: str
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One launch shape and the registers it gives."""

    name: str
    mrtd: bytes  # 48
    rtmr0: bytes  # 48


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedEvent:
    """One expected event. `source`: image, firmware or launch. `shape`: the one it belongs to, or empty for all."""

    register: int  # 1 to 4, as in event logs
    event_type: int
    digest: bytes  # 48
    source: str
    shape: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The statement's content. `version` only ever grows; `mrseam` lists the TDX modules the image was tried with."""

    subjects: tuple[Subject, ...]
    kind: ImageKind
    platform: str  # sim, tdx or vtpm
    version: int
    not_before: int
    not_after: int
    image_id: bytes  # 32
    shapes: tuple[Shape, ...]
    rtmr1: bytes  # 48
    rtmr2: bytes  # 48
    td_attributes: bytes  # 8
    xfam: bytes  # 8
    mrseam: tuple[bytes, ...]  # 48 each
    mrconfigid: bytes  # 48
    mrowner: bytes  # 48
    mrownerconfig: bytes  # 48
    events: tuple[PredictedEvent, ...]
    revoked_images: tuple[bytes, ...] = ()  # 32 each

    @property
    def simulated(self) -> bool:
        """True unless the registers are a CPU's."""
        return self.platform != "tdx"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSignature:
    """One signature and the key it claims to be by."""

    key: CoseKey
    signature: bytes

    @property
    def keyid(self) -> str:
        """Hex SHA-256 of the encoded COSE_Key."""
        return signer_digest(self.key).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A DSSE envelope: the exact payload bytes, and the ES256 and ML-DSA-65 signatures in that order."""

    payload: bytes
    signatures: tuple[ManifestSignature, ManifestSignature]


def signer_digest(key: CoseKey) -> bytes:
    """How a policy names a manifest signer: SHA-256 of the encoded COSE_Key."""
    return hashlib.sha256(cose_key.encode_cose_key(key)).digest()


def pae(payload: bytes) -> bytes:
    """DSSE pre-authentication encoding of the payload: the bytes both signatures go over."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def encode_envelope(envelope: Envelope) -> bytes:
    """The envelope as compact JSON."""
    return strict_json.dump(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": _b64(envelope.payload),
            "signatures": [
                {
                    "keyid": item.keyid,
                    "publicKey": _b64(cose_key.encode_cose_key(item.key)),
                    "sig": _b64(item.signature),
                }
                for item in envelope.signatures
            ],
        }
    )


def parse_envelope(data: bytes) -> Envelope:
    """The inverse of `encode_envelope`. Raises `FormatError` with a code below `manifest.`."""
    value = _members(
        strict_json.load(data, "manifest", max_bytes=MAX_MANIFEST_BYTES), "payloadType", "payload", "signatures"
    )
    if value["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(f"manifest.payloadType: expected {PAYLOAD_TYPE}", code="manifest.payload_type")
    entries = _items(value["signatures"], "signatures", 2)
    if len(entries) != 2:
        raise FormatError(f"manifest.signatures: expected 2, got {len(entries)}", code="manifest.signatures")
    first, second = (_signature(entry, kind) for entry, kind in zip(entries, SIGNERS, strict=True))
    envelope = Envelope(payload=_unb64(value["payload"], "payload"), signatures=(first, second))
    if encode_envelope(envelope) != data:
        raise FormatError("manifest: expected the one compact encoding", code="manifest.not_canonical")
    return envelope


def encode_manifest(manifest: Manifest) -> bytes:
    """The statement: the envelope's payload, as compact JSON."""
    predicate = {
        "kind": manifest.kind.value,
        "platform": manifest.platform,
        "simulated": manifest.simulated,
        "version": manifest.version,
        "not_before": manifest.not_before,
        "not_after": manifest.not_after,
        "image_id": manifest.image_id.hex(),
        "shapes": shapes_json(manifest.shapes),
        "rtmr1": manifest.rtmr1.hex(),
        "rtmr2": manifest.rtmr2.hex(),
        "td_attributes": manifest.td_attributes.hex(),
        "xfam": manifest.xfam.hex(),
        "mrseam": [value.hex() for value in manifest.mrseam],
        "mrconfigid": manifest.mrconfigid.hex(),
        "mrowner": manifest.mrowner.hex(),
        "mrownerconfig": manifest.mrownerconfig.hex(),
        "events": events_json(manifest.events),
        "revoked_images": [value.hex() for value in manifest.revoked_images],
    }
    return strict_json.dump(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": s.name, "digest": {"sha256": s.sha256.hex()}} for s in manifest.subjects],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
    )


def parse_manifest(data: bytes) -> Manifest:
    """The inverse of `encode_manifest`. Raises `FormatError` with a code below `manifest.`."""
    value = _members(
        strict_json.load(data, "manifest", max_bytes=MAX_MANIFEST_BYTES),
        "_type",
        "subject",
        "predicateType",
        "predicate",
    )
    if value["_type"] != STATEMENT_TYPE or value["predicateType"] != PREDICATE_TYPE:
        raise FormatError(f"manifest: expected an in-toto statement with {PREDICATE_TYPE}", code="manifest.type")
    body = _members(
        value["predicate"],
        *(
            "kind",
            "platform",
            "simulated",
            "version",
            "not_before",
            "not_after",
            "image_id",
            "shapes",
            "rtmr1",
            "rtmr2",
        ),
        *("td_attributes", "xfam", "mrseam", "mrconfigid", "mrowner", "mrownerconfig", "events", "revoked_images"),
    )
    if body["platform"] not in PLATFORMS:
        raise FormatError("manifest.platform: expected sim, tdx or vtpm", code="manifest.platform")
    try:
        kind = ImageKind(body["kind"])
    except ValueError as err:
        raise FormatError("manifest.kind: expected a known image kind", code="manifest.kind") from err
    manifest = Manifest(
        subjects=tuple(_subject(item) for item in _items(value["subject"], "subject", _MAX_ITEMS)),
        kind=kind,
        platform=body["platform"],
        version=_uint(body["version"], "version"),
        not_before=_uint(body["not_before"], "not_before"),
        not_after=_uint(body["not_after"], "not_after"),
        image_id=_hex(body["image_id"], 32, "image_id"),
        shapes=parse_shapes(body["shapes"]),
        rtmr1=_hex(body["rtmr1"], 48, "rtmr1"),
        rtmr2=_hex(body["rtmr2"], 48, "rtmr2"),
        td_attributes=_hex(body["td_attributes"], 8, "td_attributes"),
        xfam=_hex(body["xfam"], 8, "xfam"),
        mrseam=tuple(_hex(item, 48, "mrseam") for item in _items(body["mrseam"], "mrseam", MAX_SHAPES)),
        mrconfigid=_hex(body["mrconfigid"], 48, "mrconfigid"),
        mrowner=_hex(body["mrowner"], 48, "mrowner"),
        mrownerconfig=_hex(body["mrownerconfig"], 48, "mrownerconfig"),
        events=parse_events(body["events"]),
        revoked_images=tuple(
            _hex(item, 32, "revoked_images") for item in _items(body["revoked_images"], "revoked_images", _MAX_ITEMS)
        ),
    )
    check_manifest(manifest)
    if encode_manifest(manifest) != data:
        raise FormatError("manifest: expected the one compact encoding", code="manifest.not_canonical")
    return manifest


def shapes_json(shapes: Iterable[Shape]) -> list[dict[str, str]]:
    """The member `shapes`, JSON-ready."""
    return [{"name": s.name, "mrtd": s.mrtd.hex(), "rtmr0": s.rtmr0.hex()} for s in shapes]


def parse_shapes(value: object) -> tuple[Shape, ...]:
    """The inverse of `shapes_json` for decoded JSON. Raises `FormatError` with a code below `manifest.`."""
    return tuple(_shape(item) for item in _items(value, "shapes", MAX_SHAPES))


def events_json(events: Iterable[PredictedEvent]) -> list[dict[str, str | int]]:
    """The member `events`, JSON-ready."""
    return [
        {
            "register": e.register,
            "event_type": e.event_type,
            "digest": e.digest.hex(),
            "source": e.source,
            "shape": e.shape,
            "note": e.note,
        }
        for e in events
    ]


def parse_events(value: object) -> tuple[PredictedEvent, ...]:
    """The inverse of `events_json` for decoded JSON. Raises `FormatError` with a code below `manifest.`."""
    return tuple(_event(item) for item in _items(value, "events", _MAX_ITEMS))


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises `FormatError`: `manifest.validity`, `manifest.kind`, `manifest.shapes` or `manifest.events`.
    """
    if manifest.not_after <= manifest.not_before:
        raise FormatError("manifest.not_after: expected later than not_before", code="manifest.validity")
    if manifest.kind is ImageKind.PRODUCTION and manifest.simulated:
        raise FormatError("manifest.kind: expected no production image on a simulated platform", code="manifest.kind")
    names = [shape.name for shape in manifest.shapes]
    if not names or len(set(names)) != len(names):
        raise FormatError("manifest.shapes: expected at least one, with distinct names", code="manifest.shapes")
    for event in manifest.events:
        if event.shape and (event.shape not in names or event.register != 1):
            raise FormatError(
                "manifest.events: expected shape events of a named shape in RTMR0", code="manifest.events"
            )
    for shape in manifest.shapes:
        rtmr0, rtmr1, rtmr2, rtmr3 = eventlog.replay(
            Event(register=e.register, event_type=e.event_type, digest=e.digest, data=b"")
            for e in manifest.events
            if e.shape in ("", shape.name)
        )
        if (rtmr0, rtmr1, rtmr2, rtmr3) != (shape.rtmr0, manifest.rtmr1, manifest.rtmr2, bytes(48)):
            message = f"manifest.events: expected to replay to the registers of {shape.name}"
            raise FormatError(message, code="manifest.events")


def _members(value: object, *names: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise FormatError(f"manifest: expected an object with exactly {sorted(names)}", code="manifest.members")
    return value


def _items(value: object, name: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise FormatError(f"manifest.{name}: expected a list of at most {most}", code="manifest.members")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise FormatError(f"manifest.{name}: expected at most {_MAX_TEXT} printable characters", code="manifest.text")
    return value


def _uint(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise FormatError(f"manifest.{name}: expected an integer from 0 to 2^53 - 1", code="manifest.integer")
    return value


def _hex(value: object, size: int, name: str) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != size:
        raise FormatError(f"manifest.{name}: expected {size} bytes of hex", code="manifest.digest")
    return data


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(value: object, name: str) -> bytes:
    try:
        return base64.b64decode(value if isinstance(value, str) else "*", validate=True)
    except (binascii.Error, ValueError) as err:
        raise FormatError(f"manifest.{name}: expected base64", code="manifest.base64") from err


def _signature(entry: object, kind: Algorithm) -> ManifestSignature:
    fields = _members(entry, "keyid", "publicKey", "sig")
    key = cose_key.parse_cose_key(_unb64(fields["publicKey"], "publicKey"))
    signature = _unb64(fields["sig"], "sig")
    if key.algorithm is not kind or len(signature) != _SIGNATURE_BYTES[kind]:
        raise FormatError(f"manifest.signatures: expected {kind.name} here", code="manifest.signatures")
    found = ManifestSignature(key=key, signature=signature)
    if fields["keyid"] != found.keyid:
        raise FormatError("manifest.keyid: expected the digest of the public key", code="manifest.keyid")
    return found


def _subject(item: object) -> Subject:
    fields = _members(item, "name", "digest")
    digest = _members(fields["digest"], "sha256")
    return Subject(name=_text(fields["name"], "subject"), sha256=_hex(digest["sha256"], 32, "subject"))


def _shape(item: object) -> Shape:
    fields = _members(item, "name", "mrtd", "rtmr0")
    name = _text(fields["name"], "shapes")
    if not name:
        raise FormatError("manifest.shapes: expected a name", code="manifest.shapes")
    return Shape(name=name, mrtd=_hex(fields["mrtd"], 48, "mrtd"), rtmr0=_hex(fields["rtmr0"], 48, "rtmr0"))


def _event(item: object) -> PredictedEvent:
    fields = _members(item, "register", "event_type", "digest", "source", "shape", "note")
    register, event_type = _uint(fields["register"], "register"), _uint(fields["event_type"], "event_type")
    if not 1 <= register <= 4 or event_type >> 32:
        raise FormatError("manifest.events: expected register 1 to 4 and a 32-bit type", code="manifest.events")
    if fields["source"] not in ("image", "firmware", "launch"):
        raise FormatError("manifest.events: expected source image, firmware or launch", code="manifest.events")
    return PredictedEvent(
        register=register,
        event_type=event_type,
        digest=_hex(fields["digest"], 48, "digest"),
        source=fields["source"],
        shape=_text(fields["shape"], "shape"),
        note=_text(fields["note"], "note"),
    )
