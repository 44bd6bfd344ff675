"""What init extends into RTMR3, and the log of it: a second event log in the TCG form of `eventlog`.

One event for each of `NAMES`, in that order and no other, each once, nothing after the last. All have register 4
(RTMR3) and event type `EVENT_TYPE`; the data is deterministic CBOR of [name, value]; the digest is SHA-384 of the
data, checked here. The GPU list is sorted by device key, which may occur once only.

Not checked here: that the log replays to the register, or that the values are the expected ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

from countermark.errors import FormatError
from countermark.formats import cbor, eventlog
from countermark.formats.eventlog import Event, EventLog, SpecId

EVENT_TYPE = 0x434D0001  # outside every range TCG and UEFI assign
REGISTER = 4  # RTMR3
NAMES = ("image-id", "config", "weights-root", "numerics", "gpu", "keys", "system-ready")
MAX_GPUS = 64
_MAX_TEXT = 64


class GpuMode(Enum):
    """What the driver inside the guest says of a GPU. Protected PCIe is its mode for several GPUs in one guest."""

    CC_ON = "cc-on"
    CC_PROTECTED_PCIE = "protected-pcie"
    CC_OFF = "cc-off"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GpuIdentity:
    """One GPU: SHA-256 of its device key's SubjectPublicKeyInfo DER, and its modes."""

    device_key: bytes  # 32
    mode: str  # a `GpuMode` value
    devtools: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEvents:
    """The values of a complete RTMR3 log. Digests are 32 bytes."""

    image_id: bytes
    config: bytes
    weights_root: bytes
    profile: str
    kernel_digest: bytes
    gpus: tuple[GpuIdentity, ...]
    keys: bytes  # as the `keys` claim


def event_data(name: str, value: object) -> bytes:
    """The data of one event; its SHA-384 is what is extended."""
    return cbor.encode([name, value])


def boot_event_data(boot: BootEvents) -> tuple[bytes, ...]:
    """The data of every event, in the order of `NAMES`."""
    gpus = [[gpu.device_key, gpu.mode, gpu.devtools] for gpu in sorted(boot.gpus)]
    values = (
        boot.image_id,
        boot.config,
        boot.weights_root,
        [boot.profile, boot.kernel_digest],
        gpus,
        boot.keys,
        None,
    )
    return tuple(event_data(name, value) for name, value in zip(NAMES, values, strict=True))


def event(data: bytes) -> Event:
    """The log event for this data."""
    return Event(register=REGISTER, event_type=EVENT_TYPE, digest=hashlib.sha384(data).digest(), data=data)


def encode_boot_log(data: tuple[bytes, ...]) -> bytes:
    """The log over these events, complete or not yet."""
    return eventlog.encode_event_log(
        EventLog(spec=SpecId(register=REGISTER), events=tuple(event(item) for item in data))
    )


def parse_boot_log(data: bytes) -> BootEvents:
    """Parse a complete RTMR3 log; `encode_boot_log(boot_event_data(it))` gives the same bytes.

    Raises `FormatError`: `rtmr3.order` for a missing, repeated, unknown or misplaced event, `rtmr3.after_ready`,
    `rtmr3.digest` when an event's digest is not that of its data, `rtmr3.value`, or a code of `eventlog`.
    """
    return read_boot_log(eventlog.parse_event_log(data))


def read_boot_log(log: EventLog) -> BootEvents:
    """What a log parsed before says. Raises as `parse_boot_log`, less the codes of `eventlog`."""
    if log.padding or log.spec != SpecId(register=REGISTER):
        raise FormatError("rtmr3: expected our header and no padding", code="rtmr3.header")
    values: list[object] = []
    for position, item in enumerate(log.events):
        if position >= len(NAMES):
            raise FormatError(f"rtmr3: expected no event after {NAMES[-1]}", code="rtmr3.after_ready")
        if item.register != REGISTER or item.event_type != EVENT_TYPE:
            message = f"rtmr3: expected register {REGISTER} and type {EVENT_TYPE:#x} at event {position}"
            raise FormatError(message, code="rtmr3.kind")
        if hashlib.sha384(item.data).digest() != item.digest:
            raise FormatError(f"rtmr3: expected the digest of the data at event {position}", code="rtmr3.digest")
        pair = cbor.decode(item.data)
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] != NAMES[position]:
            raise FormatError(f"rtmr3: expected {NAMES[position]} at event {position}", code="rtmr3.order")
        values.append(pair[1])
    if len(values) != len(NAMES):
        raise FormatError(f"rtmr3: expected {NAMES[len(values)]}, got the end of the log", code="rtmr3.order")
    image_id, config, weights_root, numerics, gpus, keys, ready = values
    if not isinstance(numerics, list) or len(numerics) != 2 or ready is not None:
        raise FormatError("rtmr3: expected [profile, kernel digest] and null", code="rtmr3.value")
    return BootEvents(
        image_id=_digest(image_id),
        config=_digest(config),
        weights_root=_digest(weights_root),
        profile=_text(numerics[0]),
        kernel_digest=_digest(numerics[1]),
        gpus=_gpus(gpus),
        keys=_digest(keys),
    )


def _digest(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise FormatError("rtmr3: expected a 32-byte digest", code="rtmr3.value")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not (value.isascii() and value.isprintable()):
        raise FormatError(f"rtmr3: expected 1 to {_MAX_TEXT} printable ASCII characters", code="rtmr3.value")
    return value


def _gpus(value: object) -> tuple[GpuIdentity, ...]:
    if not isinstance(value, list) or len(value) > MAX_GPUS:
        raise FormatError(f"rtmr3.gpu: expected a list of at most {MAX_GPUS}", code="rtmr3.value")
    gpus = []
    for item in value:
        if not isinstance(item, list) or len(item) != 3 or not isinstance(item[2], bool):
            raise FormatError("rtmr3.gpu: expected [device key, mode, devtools]", code="rtmr3.value")
        if item[1] not in [mode.value for mode in GpuMode]:
            raise FormatError("rtmr3.gpu: expected a known mode", code="rtmr3.value")
        gpus.append(GpuIdentity(device_key=_digest(item[0]), mode=item[1], devtools=item[2]))
    if sorted({gpu.device_key for gpu in gpus}) != [gpu.device_key for gpu in gpus]:
        raise FormatError("rtmr3.gpu: expected distinct device keys in order", code="rtmr3.value")
    return tuple(gpus)
