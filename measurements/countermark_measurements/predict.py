"""From a disk image, a firmware image and launch shapes to a prediction: files in, `Prediction` out.

1. The disk: its partition table, the EFI system partition, and the one file in it, /EFI/BOOT/BOOTX64.EFI. Any other
   file there is refused: systemd-stub would take credentials, extensions or addons from it.
2. The firmware: its TDX metadata, and for vtpm the volumes it unpacks.
3. The events of each shape, then one list: an event that is the launch's names its shape, all others are common.
4. The registers. For tdx every shape is listed for both orders of building a TD (`tdvf.Order`): the one-pass order
   under the shape's own name, the other with "-" and the QEMU that has it. For vtpm what stands for MRTD is PCR 0.

The registers RTMR1 and RTMR2 do not depend on the shape. Nothing is taken from an event log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from countermark.errors import FormatError
from countermark.formats import eventlog
from countermark.formats.eventlog import Event
from countermark.formats.manifest import PredictedEvent, Shape, Subject
from countermark_measurements import pcr, rtmr
from countermark_measurements.fat import MAX_VOLUME_BYTES, read_files
from countermark_measurements.gpt import Gpt, read_gpt
from countermark_measurements.pcr import Measured
from countermark_measurements.prediction import Prediction, check
from countermark_measurements.shape import LaunchShape
from countermark_measurements.tdvf import MAX_FIRMWARE_BYTES, Order, mrtd, parse_tdvf
from countermark_measurements.tdvf_volumes import parse_volumes
from countermark_measurements.uki import Uki, parse_uki

BOOT_FILE: Final = "EFI/BOOT/BOOTX64.EFI"
_PIECE_BYTES: Final = 1 << 20


def predict(disk: Path, firmware: Path, shapes: Sequence[LaunchShape], platform: str) -> Prediction:
    """What this image measures to when it is started in these shapes.

    Raises `FormatError`: `predict.shapes`, `predict.firmware`, `predict.system_partition`, or a code of the part that
    could not be read (`gpt`, `fat`, `pe`, `uki`, `tdvf`, `volumes`, `shape`).
    """
    names = [shape.name for shape in shapes]
    if not names or len(set(names)) != len(names) or any(shape.platform != platform for shape in shapes):
        message = f"shapes: expected at least one, with distinct names, all for {platform}"
        raise FormatError(message, code="predict.shapes")
    gpt, uki = read_image(disk)
    code = _firmware(firmware)
    for shape in shapes:
        if shape.firmware_sha256 != hashlib.sha256(code).digest():
            message = f"{shape.name}: expected the firmware its tables were captured with, got {firmware.name}"
            raise FormatError(message, code="predict.firmware")
    registers: list[Shape] = []
    logs: dict[str, tuple[Measured, ...]] = {}
    if platform == "tdx":
        tdvf = parse_tdvf(code)
        for shape in shapes:
            for order in Order:
                name = shape.name if order is Order.ONE_PASS else f"{shape.name}-{order.value}"
                logs[name] = rtmr.td_events(tdvf, shape, gpt, uki)
                registers.append(_shape(name, mrtd(tdvf, order), logs[name]))
    else:
        volumes = parse_volumes(code)
        for shape in shapes:
            logs[shape.name] = pcr.tpm_events(volumes, shape, gpt, uki)
            registers.append(_shape(shape.name, _replay(logs[shape.name])[0], logs[shape.name]))
    events = _merge(logs)
    _, _, rtmr1, rtmr2 = _replay(next(iter(logs.values())))
    files = {name: digest for shape in shapes for name, digest in shape.files}
    prediction = Prediction(
        platform=platform,
        inputs=(
            Subject(name=disk.name, sha256=_sha256(disk)),
            Subject(name=firmware.name, sha256=hashlib.sha256(code).digest()),
            *(Subject(name=name, sha256=digest) for name, digest in files.items()),
        ),
        shapes=tuple(registers),
        rtmr1=rtmr1,
        rtmr2=rtmr2,
        events=events,
    )
    check(prediction)
    return prediction


def read_image(disk: Path) -> tuple[Gpt, Uki]:
    """Partition table and unified kernel image of a disk. Raises as `predict` does."""
    gpt = read_gpt(disk)
    system = gpt.system
    if system.size > MAX_VOLUME_BYTES:
        raise FormatError("disk: expected a smaller EFI system partition", code="predict.system_partition")
    with disk.open("rb") as file:
        file.seek(system.start)
        files = read_files(file.read(system.size))
    if files.keys() != {BOOT_FILE}:
        others = sorted(files.keys() - {BOOT_FILE})
        message = f"EFI system partition: expected {BOOT_FILE} and nothing else, got {', '.join(others) or 'no file'}"
        raise FormatError(message, code="predict.system_partition")
    return gpt, parse_uki(files[BOOT_FILE])


def _replay(events: Sequence[Measured]) -> tuple[bytes, bytes, bytes, bytes]:
    """What stands for MRTD, then RTMR0 to RTMR2."""
    first = bytes(48)
    for event in events:
        if event.register == 0:
            first = hashlib.sha384(first + event.digest).digest()
    logged = (Event(register=e.register, event_type=e.event_type, digest=e.digest, data=b"") for e in events)
    return (first, *eventlog.replay(logged)[:3])


def _shape(name: str, mrtd_value: bytes, events: Sequence[Measured]) -> Shape:
    return Shape(name=name, mrtd=mrtd_value, rtmr0=_replay(events)[1])


def _merge(logs: dict[str, tuple[Measured, ...]]) -> tuple[PredictedEvent, ...]:
    """One list of all shapes' events, in which each shape's own are in their order: those of MRTD left out."""
    waiting = {name: [event for event in events if event.register] for name, events in logs.items()}
    merged: list[PredictedEvent] = []
    while any(waiting.values()):
        for name, events in waiting.items():
            while events and events[0].source == "launch":
                merged.append(_predicted(events.pop(0), name))
        heads = {events[0] for events in waiting.values() if events}
        if len(heads) > 1 or (heads and not all(waiting.values())):
            raise FormatError("shapes: expected the same events of image and firmware in all", code="predict.shapes")
        for event in heads:
            merged.append(_predicted(event, ""))
            for events in waiting.values():
                events.pop(0)
    return tuple(merged)


def _predicted(event: Measured, shape: str) -> PredictedEvent:
    return PredictedEvent(
        register=event.register,
        event_type=event.event_type,
        digest=event.digest,
        source=event.source,
        shape=shape,
        note=f"PCR {event.pcr}: {event.note}",
    )


def _firmware(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FIRMWARE_BYTES + 1)
    if len(data) > MAX_FIRMWARE_BYTES:
        raise FormatError(f"firmware: expected at most {MAX_FIRMWARE_BYTES} bytes", code="predict.firmware")
    return data


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.digest()
