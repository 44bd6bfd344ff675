"""A publisher at work: made predictions and image descriptions, its keys, and what it publishes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from countermark.formats import eventlog
from countermark.formats.manifest import ImageKind, Manifest, PredictedEvent, Shape, Subject, encode_manifest
from countermark_measurements import keys as key_files
from countermark_measurements import manifest as manifests
from countermark_measurements.keys import PublisherKeys
from countermark_measurements.prediction import Prediction, replay

NOW = 1_800_000_000
DAY_S = 86_400
LOG_NAME = "example.org/measurements"
SHAPES = ("q35-2cpu-3g/qemu-8.2", "q35-2cpu-3g/qemu-9", "q35-2cpu-6g/qemu-9")
_TYPES = {
    "firmware volume": eventlog.EV_EFI_PLATFORM_FIRMWARE_BLOB2,
    "SecureBoot": eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG,
    "ACPI tables": eventlog.EV_EFI_PLATFORM_FIRMWARE_BLOB2,
    "separator": eventlog.EV_SEPARATOR,
    "UKI": eventlog.EV_EFI_BOOT_SERVICES_APPLICATION,
    "ExitBootServices": eventlog.EV_EFI_ACTION,
    "command line": eventlog.EV_EVENT_TAG,
    "initrd": eventlog.EV_EVENT_TAG,
}


def sha384(text: str) -> bytes:
    return hashlib.sha384(text.encode()).digest()


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def event(register: int, what: str, source: str, *, shape: str = "", content: str = "") -> PredictedEvent:
    """Its digest is that of its words, the shape and the content."""
    return PredictedEvent(
        register=register,
        event_type=_TYPES[what],
        digest=sha384(f"{what} {shape} {content}"),
        source=source,
        shape=shape,
        note=what,
    )


def prediction(build: str = "one", *, platform: str = "tdx", shapes: Sequence[str] = SHAPES) -> Prediction:
    """Of the disk of a build. Each shape has its ACPI tables; MRTD follows QEMU's version, as in reality."""
    events = (
        event(1, "firmware volume", "firmware"),
        event(1, "SecureBoot", "firmware"),
        *(event(1, "ACPI tables", "launch", shape=name) for name in shapes),
        event(1, "separator", "firmware"),
        event(2, "UKI", "image", content=build),
        event(2, "ExitBootServices", "firmware"),
        event(3, "command line", "image", content=build),
        event(3, "initrd", "image", content=build),
    )
    made = Prediction(
        platform=platform,
        inputs=(Subject(name="disk.raw", sha256=sha256(build)), Subject(name="OVMF.fd", sha256=sha256("firmware"))),
        shapes=(),
        rtmr1=bytes(48),
        rtmr2=bytes(48),
        events=events,
    )
    registers = {name: replay(tuple(e for e in events if e.shape in ("", name))) for name in shapes}
    _, rtmr1, rtmr2, _ = registers[shapes[0]]
    return replace(
        made,
        rtmr1=rtmr1,
        rtmr2=rtmr2,
        shapes=tuple(
            Shape(name=name, mrtd=sha384(f"mrtd {name.rpartition('/')[2]}"), rtmr0=registers[name][0])
            for name in shapes
        ),
    )


def image_json(build: str = "one", kind: ImageKind = ImageKind.PRODUCTION) -> bytes:
    """What the image build would write, with members we do not read."""
    value = {
        "kind": kind.value,
        "variant": "cpu",
        "roothash": sha256(f"root {build}").hex(),
        "image_id": sha256(f"root {build}").hex(),
        "cmdline": "roothash=...",
        "subjects": {"disk.raw": sha256(build).hex(), "uki.efi": sha256(f"uki {build}").hex()},
        "sizes": {"disk.raw": 100_000_000},
        "lock_sha256": {"debian.lock": sha256("lock").hex()},
        "files_sha256": sha256(f"files {build}").hex(),
    }
    return json.dumps(value, indent=2).encode()


def image_id(build: str) -> bytes:
    return sha256(f"root {build}")


@cache
def publisher() -> PublisherKeys:
    """Keys that no test writes to."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return key_files.create(Path(folder) / "keys", LOG_NAME)


def statement(
    build: str = "one", version: int = 1, *, platform: str = "tdx", revoked: Sequence[bytes] = ()
) -> Manifest:
    kind = ImageKind.PRODUCTION if platform == "tdx" else ImageKind.TEST
    return manifests.build(
        prediction(build, platform=platform),
        manifests.parse_image(image_json(build, kind)),
        version=version,
        now=NOW,
        valid_days=30,
        revoked=revoked,
    )


def signed(build: str = "one", version: int = 1, *, platform: str = "tdx", revoked: Sequence[bytes] = ()) -> bytes:
    """The envelope, with the signatures of `publisher`."""
    return publisher().sign(encode_manifest(statement(build, version, platform=platform, revoked=revoked)))
