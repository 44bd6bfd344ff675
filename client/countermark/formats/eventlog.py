"""Measurement event logs: CCEL in TCG2 crypto-agile form (SHA-384 only), our RTMR3 log in the same form, JSON lists.

TCG PC Client Platform Firmware Profile 1.06, section 10 (TCG_PCR_EVENT with the Spec ID event, then
TCG_PCR_EVENT2); UEFI 2.10 section 38.4.1 and the ACPI CCEL table for TDX: register index 0 is MRTD, 1 to 4 are RTMR0
to RTMR3. The unused rest of a CCEL area is 0xff. The JSON form is the event list of dstack (its `imr` counts RTMRs
from 0).

`replay` folds event digests into RTMRs: register = SHA-384(register || digest), from zero; EV_NO_ACTION events and
index 0 extend nothing. Not checked here: that a digest is the hash of its event's data, which for firmware events it
often is not (the data names what was hashed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from countermark.errors import FormatError
from countermark.formats import strict_json
from countermark.formats.reader import Reader

SHA384 = 0x000C
DIGEST_BYTES = 48
EV_NO_ACTION = 0x00000003
EV_SEPARATOR = 0x00000004
EV_EVENT_TAG = 0x00000006
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
EV_EFI_ACTION = 0x80000007
EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
DSTACK_RUNTIME_EVENT = 0x08000001
MAX_LOG_BYTES = 1024 * 1024
MAX_EVENTS = 4096
MAX_EVENT_BYTES = 64 * 1024
_SIGNATURE = b"Spec ID Event03\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event. `register`: 0 is MRTD, 1 to 4 are RTMR0 to RTMR3. `name` exists in JSON lists only."""

    register: int
    event_type: int
    digest: bytes  # 48
    data: bytes
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecId:
    """The Spec ID event that opens a log; the algorithm list is always SHA-384 alone."""

    register: int = 1
    platform_class: int = 0
    version: bytes = b"\x00\x02\x00"  # minor, major, errata
    uintn_size: int = 2
    vendor_info: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLog:
    """A parsed log. `padding`: how many 0xff bytes follow the last event."""

    spec: SpecId
    events: tuple[Event, ...]
    padding: int = 0


def parse_event_log(data: bytes) -> EventLog:
    """Parse a whole log to its last byte. Raises `FormatError` with a code below `eventlog.`."""
    if len(data) > MAX_LOG_BYTES:
        raise FormatError(
            f"eventlog: expected at most {MAX_LOG_BYTES} bytes, got {len(data)}", code="eventlog.too_long"
        )
    reader = Reader(data, "eventlog")
    spec = _parse_spec_id(reader)
    events: list[Event] = []
    while reader.left:
        if reader.data[reader.offset : reader.offset + 4] == b"\xff" * min(4, reader.left):
            break
        if len(events) == MAX_EVENTS:
            raise FormatError(f"eventlog: expected at most {MAX_EVENTS} events", code="eventlog.too_many")
        events.append(_parse_event(reader))
    padding = reader.take(reader.left, "padding")
    if padding.strip(b"\xff"):
        raise FormatError("eventlog: expected only 0xff after the last event", code="eventlog.trailing")
    return EventLog(spec=spec, events=tuple(events), padding=len(padding))


def encode_event_log(log: EventLog) -> bytes:
    """The inverse of `parse_event_log`. Event names do not exist in this form and must be empty."""
    spec = log.spec
    payload = b"".join(
        (
            _SIGNATURE,
            spec.platform_class.to_bytes(4, "little"),
            spec.version,
            bytes((spec.uintn_size,)),
            (1).to_bytes(4, "little"),
            SHA384.to_bytes(2, "little"),
            DIGEST_BYTES.to_bytes(2, "little"),
            bytes((len(spec.vendor_info),)),
            spec.vendor_info,
        )
    )
    header = spec.register.to_bytes(4, "little") + EV_NO_ACTION.to_bytes(4, "little") + bytes(20)
    out = [header, len(payload).to_bytes(4, "little"), payload]
    for event in log.events:
        if event.name:
            raise FormatError("eventlog.name: expected no name in the TCG form", code="eventlog.name")
        out += (
            event.register.to_bytes(4, "little"),
            event.event_type.to_bytes(4, "little"),
            (1).to_bytes(4, "little"),
            SHA384.to_bytes(2, "little"),
            event.digest,
            len(event.data).to_bytes(4, "little"),
            event.data,
        )
    return b"".join(out) + b"\xff" * log.padding


def replay(events: Iterable[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 after these events, each from zero."""
    registers = [bytes(DIGEST_BYTES)] * 4
    for event in events:
        if event.register == 0 or event.event_type == EV_NO_ACTION:
            continue
        index = event.register - 1
        registers[index] = hashlib.sha384(registers[index] + event.digest).digest()
    return registers[0], registers[1], registers[2], registers[3]


def parse_json_events(data: bytes) -> tuple[Event, ...]:
    """Parse dstack's JSON event list, alone or as the `event_log` member (list or text) of its quote report.

    Unknown members are tolerated, as the form is not ours. Raises `FormatError` with a code below `eventlog.`.
    """
    value = strict_json.load(data, "eventlog", max_bytes=MAX_LOG_BYTES)
    if isinstance(value, dict):
        value = value.get("event_log")
        if isinstance(value, str):
            value = strict_json.load(value.encode("utf-8", "replace"), "eventlog", max_bytes=MAX_LOG_BYTES)
    if not isinstance(value, list) or len(value) > MAX_EVENTS:
        raise FormatError(f"eventlog: expected a JSON list of at most {MAX_EVENTS} events", code="eventlog.json")
    return tuple(_json_event(item) for item in value)


def dstack_event_digest(event: Event) -> bytes:
    """The digest dstack extends for a runtime event: SHA-384(type u32 little-endian || ":" || name || ":" || data)."""
    kind = event.event_type.to_bytes(4, "little")
    return hashlib.sha384(b":".join((kind, event.name.encode(), event.data))).digest()


def _parse_spec_id(reader: Reader) -> SpecId:
    register = _register(reader.uint(4, "register"))
    reader.expect(EV_NO_ACTION, 4, "spec_id")
    reader.expect(bytes(20), 20, "spec_id")
    payload = Reader(reader.take(_size(reader.uint(4, "spec_id_size")), "spec_id"), "eventlog")
    payload.expect(_SIGNATURE, len(_SIGNATURE), "spec_id")
    platform_class = payload.uint(4, "platform_class")
    version = payload.take(3, "spec_version")
    uintn_size = payload.uint(1, "uintn_size")
    payload.expect(1, 4, "algorithms")
    payload.expect(SHA384, 2, "algorithms")
    payload.expect(DIGEST_BYTES, 2, "algorithms")
    vendor_info = payload.take(payload.uint(1, "vendor_info_size"), "vendor_info")
    payload.end()
    return SpecId(
        register=register,
        platform_class=platform_class,
        version=version,
        uintn_size=uintn_size,
        vendor_info=vendor_info,
    )


def _parse_event(reader: Reader) -> Event:
    register = _register(reader.uint(4, "register"))
    event_type = reader.uint(4, "event_type")
    reader.expect(1, 4, "digest_count")
    reader.expect(SHA384, 2, "digest_algorithm")
    digest = reader.take(DIGEST_BYTES, "digest")
    data = reader.take(_size(reader.uint(4, "event_size")), "event")
    return Event(register=register, event_type=event_type, digest=digest, data=data)


def _register(value: int) -> int:
    if value > 4:
        raise FormatError(f"eventlog.register: expected 0 to 4, got {value}", code="eventlog.register")
    return value


def _size(value: int) -> int:
    if value > MAX_EVENT_BYTES:
        message = f"eventlog.event_size: expected at most {MAX_EVENT_BYTES}, got {value}"
        raise FormatError(message, code="eventlog.event_size")
    return value


def _json_event(item: object) -> Event:
    if not isinstance(item, dict):
        raise FormatError("eventlog: expected a JSON object for each event", code="eventlog.json")
    register, event_type = item.get("imr"), item.get("event_type")
    name, digest, payload = item.get("event", ""), item.get("digest"), item.get("event_payload", "")
    if type(register) is not int or not 0 <= register <= 3 or type(event_type) is not int or event_type >> 32:
        raise FormatError("eventlog: expected imr 0 to 3 and a 32-bit event_type", code="eventlog.json")
    if not (isinstance(name, str) and isinstance(digest, str) and isinstance(payload, str)):
        raise FormatError("eventlog: expected text in event, digest and event_payload", code="eventlog.json")
    try:
        name.encode()
        event = Event(
            register=register + 1,
            event_type=event_type,
            digest=bytes.fromhex(digest),
            data=bytes.fromhex(payload),
            name=name,
        )
    except ValueError as err:
        raise FormatError("eventlog: expected hex in digest and event_payload", code="eventlog.json") from err
    if len(event.digest) != DIGEST_BYTES or len(event.data) > MAX_EVENT_BYTES:
        raise FormatError("eventlog: expected 48-byte digests and bounded payloads", code="eventlog.json")
    return event
