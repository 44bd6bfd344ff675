"""What a measurement log is made of: one leaf for each published manifest.

Deterministic CBOR, format version 1, ours: {v, type "measurement", envelope, version, kind, platform, image_id,
revoked}. `envelope` is the SHA-256 of the signed manifest (`formats.manifest`), which is published beside the log under
its version; the rest repeats what the manifest says, so that whoever follows the log sees what was published, and what
was withdrawn, without fetching anything.

The **rule of growth** (`Releases`): versions only grow, whatever the kind of the image, and a revoked image is not
published again. So two manifests of one version cannot both be shown to be in one log.

Not checked here: that the manifest is there and says the same (`leaf_of` makes the leaf it must have), and signatures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError, LogError
from countermark.formats import cbor
from countermark.formats.manifest import PLATFORMS, ImageKind, Manifest
from countermark.tlog.tiles import MAX_ENTRY_BYTES

VERSION: Final = 1
MEASUREMENT: Final = "measurement"
MAX_REVOKED: Final = 1024
_MAX_VERSION: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLeaf:
    """One published manifest. `envelope`: SHA-256 of its file. `revoked`: the images it withdraws."""

    envelope: bytes  # 32
    version: int
    kind: ImageKind
    platform: str
    image_id: bytes  # 32
    revoked: tuple[bytes, ...]  # 32 each


class Releases:
    """The rule of growth over the leaves of one measurement log, fed in order."""

    def __init__(self) -> None:
        self.version = 0
        self.revoked: set[bytes] = set()

    def add(self, leaf: MeasuredLeaf) -> None:
        """Take the next leaf. Raises `LogError`: `log.version`, `log.revoked`."""
        if leaf.version <= self.version:
            message = (
                f"manifest version: expected more than {self.version}, which stands in the log, got {leaf.version}"
            )
            raise LogError(message, code="log.version")
        if leaf.image_id in self.revoked | set(leaf.revoked):
            message = f"image {leaf.image_id.hex()}: expected one that was never revoked"
            raise LogError(message, code="log.revoked")
        self.version = leaf.version
        self.revoked |= set(leaf.revoked)


def leaf_of(envelope: bytes, manifest: Manifest) -> MeasuredLeaf:
    """The leaf that stands for a signed manifest; `manifest` is what the envelope holds."""
    return MeasuredLeaf(
        envelope=hashlib.sha256(envelope).digest(),
        version=manifest.version,
        kind=manifest.kind,
        platform=manifest.platform,
        image_id=manifest.image_id,
        revoked=manifest.revoked_images,
    )


def encode_measured(leaf: MeasuredLeaf) -> bytes:
    """Deterministic CBOR. Raises `FormatError` (`measured.*`)."""
    data = cbor.encode(
        {
            "v": VERSION,
            "type": MEASUREMENT,
            "envelope": leaf.envelope,
            "version": leaf.version,
            "kind": leaf.kind.value,
            "platform": leaf.platform,
            "image_id": leaf.image_id,
            "revoked": list(leaf.revoked),
        }
    )
    parse_measured(data)
    return data


def parse_measured(data: bytes) -> MeasuredLeaf:
    """The inverse of `encode_measured`. Raises `FormatError`: `cbor.*`, `measured.field`, `measured.type`."""
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_ENTRY_BYTES),
        "measured",
        v=int,
        type=str,
        envelope=bytes,
        version=int,
        kind=str,
        platform=str,
        image_id=bytes,
        revoked=list,
    )
    if (value["v"], value["type"]) != (VERSION, MEASUREMENT):
        raise FormatError(f"measured: expected version {VERSION} and type {MEASUREMENT}", code="measured.type")
    digests = (value["envelope"], value["image_id"], *value["revoked"])
    if len(digests) > MAX_REVOKED + 2 or any(not isinstance(item, bytes) or len(item) != 32 for item in digests):
        raise FormatError(
            f"measured: expected digests of 32 bytes, at most {MAX_REVOKED} revoked", code="measured.field"
        )
    kinds = [kind.value for kind in ImageKind]
    if value["kind"] not in kinds or value["platform"] not in PLATFORMS or not 0 < value["version"] <= _MAX_VERSION:
        raise FormatError("measured: expected a known kind, platform and a version from 1", code="measured.field")
    return MeasuredLeaf(
        envelope=value["envelope"],
        version=value["version"],
        kind=ImageKind(value["kind"]),
        platform=value["platform"],
        image_id=value["image_id"],
        revoked=tuple(value["revoked"]),
    )
