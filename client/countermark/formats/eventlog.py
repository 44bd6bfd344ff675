"""Measurement event logs: the CCEL in TCG crypto-agile form, our RTMR3 log in the same form, and JSON event lists.

TCG PC Client Platform Firmware Profile (PFP) 1.05 and 1.06, section 10 (TCG_PCR_EVENT with the Spec ID event, then
TCG_PCR_EVENT2, event types); UEFI 2.10 section 38.4 and the ACPI 6.5 CCEL table for TDX: register index 0 is MRTD, 1 to
4 are RTMR0 to RTMR3. A log may carry digests of several algorithms; SHA-384, which RTMRs use, must be one of them and
is the one kept, the others are read over at the size the Spec ID event gives. The unused rest of the log's area is all
0xff or all zero.

JSON forms, told apart by their members (all facts from the public repositories of their makers):
- dstack (Dstack-TEE/dstack, cc-eventlog): `imr` counts RTMRs from 0; `event_payload` is hex. Alone, one object a line,
  or the `event_log` (list or text) of a quote report, of its `tcb_info` or of its `info.tcb_info`. Newer releases leave
  out the payload of firmware events and the digest of runtime events, which follows from name and payload. The oldest
  had no payload member: `event` was the data in hex.
- Trustee (confidential-containers/trustee): `uefi_event_logs`, whose `index` counts as the binary form does, `event` is
  base64, `type` hex text. Its evidence carries the binary log as base64 in `cc_eventlog`.
- Intel Trust Authority's client (intel/trustauthority-client-for-go): a list of banks, `rtmr` {`index`, `bank`} and
  `rtmr_events` {`type_id`, `tags`, `measurement`}; the index counts as the binary form does, the data is left out, and
  the order between registers is lost, which replay does not need.

`replay` folds event digests into RTMRs: register = SHA-384(register || digest), from zero; EV_NO_ACTION events and
index 0 extend nothing. Not checked here: that a digest is the hash of its event's data (`tdx.eventlogs`), which for
many firmware events it is not (the data names what was hashed).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from countermark.errors import FormatError
from countermark.formats import strict_json
from countermark.formats.reader import Reader

SHA384 = 0x000C
DIGEST_BYTES = 48
EV_NO_ACTION = 0x00000003
EV_SEPARATOR = 0x00000004
EV_ACTION = 0x00000005
EV_EVENT_TAG = 0x00000006
EV_S_CRTM_VERSION = 0x00000008
EV_IPL = 0x0000000D
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_VARIABLE_BOOT = 0x80000002
EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
EV_EFI_BOOT_SERVICES_DRIVER = 0x80000004
EV_EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
EV_EFI_GPT_EVENT = 0x80000006
EV_EFI_ACTION = 0x80000007
EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
EV_EFI_HANDOFF_TABLES2 = 0x8000000B
EV_EFI_VARIABLE_BOOT2 = 0x8000000C
EV_EFI_GPT_EVENT2 = 0x8000000D
EV_EFI_VARIABLE_AUTHORITY = 0x800000E0
DSTACK_RUNTIME_EVENT = 0x08000001
EVENT_TYPES: Final = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    0x00000002: "EV_UNUSED",
    EV_NO_ACTION: "EV_NO_ACTION",
    EV_SEPARATOR: "EV_SEPARATOR",
    EV_ACTION: "EV_ACTION",
    EV_EVENT_TAG: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    EV_S_CRTM_VERSION: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    EV_IPL: "EV_IPL",
    0x0000000E: "EV_IPL_PARTITION_DATA",
    0x0000000F: "EV_NONHOST_CODE",
    0x00000010: "EV_NONHOST_CONFIG",
    0x00000011: "EV_NONHOST_INFO",
    0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x00000013: "EV_POST_CODE2",
    EV_EFI_VARIABLE_DRIVER_CONFIG: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    EV_EFI_VARIABLE_BOOT: "EV_EFI_VARIABLE_BOOT",
    EV_EFI_BOOT_SERVICES_APPLICATION: "EV_EFI_BOOT_SERVICES_APPLICATION",
    EV_EFI_BOOT_SERVICES_DRIVER: "EV_EFI_BOOT_SERVICES_DRIVER",
    EV_EFI_RUNTIME_SERVICES_DRIVER: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    EV_EFI_GPT_EVENT: "EV_EFI_GPT_EVENT",
    EV_EFI_ACTION: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    EV_EFI_PLATFORM_FIRMWARE_BLOB2: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    EV_EFI_HANDOFF_TABLES2: "EV_EFI_HANDOFF_TABLES2",
    EV_EFI_VARIABLE_BOOT2: "EV_EFI_VARIABLE_BOOT2",
    EV_EFI_GPT_EVENT2: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    EV_EFI_VARIABLE_AUTHORITY: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
    0x800000E3: "EV_EFI_SPDM_DEVICE_POLICY",
    0x800000E4: "EV_EFI_SPDM_DEVICE_AUTHORITY",
    DSTACK_RUNTIME_EVENT: "DSTACK_RUNTIME_EVENT",
}
MAX_LOG_BYTES = 1024 * 1024
MAX_EVENTS = 4096
MAX_EVENT_BYTES = 64 * 1024
MAX_ALGORITHMS = 16
_MAX_DIGEST_BYTES = 128
_SIGNATURE = b"Spec ID Event03\0"
_SHA384_ALONE = ((SHA384, DIGEST_BYTES),)
_KNOWN_SIZES = {
    0x0004: 20,
    0x000B: 32,
    SHA384: DIGEST_BYTES,
    0x000D: 64,
    0x0012: 32,
    0x0027: 32,
    0x0028: 48,
    0x0029: 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event. `register`: 0 is MRTD, 1 to 4 are RTMR0 to RTMR3. `name` exists in JSON lists only."""

    register: int
    event_type: int
    digest: bytes  # 48: SHA-384
    data: bytes
    name: str = ""

    @property
    def extends(self) -> bool:
        """Whether the event changes an RTMR."""
        return self.register != 0 and self.event_type != EV_NO_ACTION


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecId:
    """The Spec ID event that opens a log. `algorithms`: (TCG algorithm id, digest size) of each, SHA-384 among them."""

    register: int = 1
    platform_class: int = 0
    version: bytes = b"\x00\x02\x00"  # minor, major, errata
    uintn_size: int = 2
    algorithms: tuple[tuple[int, int], ...] = _SHA384_ALONE
    vendor_info: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLog:
    """A parsed log. `padding`: how many bytes of `fill` (0xff or 0) follow the last event."""

    spec: SpecId
    events: tuple[Event, ...]
    padding: int = 0
    fill: int = 0xFF


class LogForm(StrEnum):
    """Where a list of events was read from."""

    CCEL = "ccel"  # binary
    DSTACK = "dstack"  # JSON
    TRUSTEE = "trustee"  # JSON, a rendering of a CCEL
    TRUST_AUTHORITY = "trust-authority"  # JSON, a rendering of a CCEL without its data


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEvents:
    """The events of a log in any form that `read_events` knows."""

    form: LogForm
    events: tuple[Event, ...]


def event_type_name(event_type: int) -> str:
    """TCG's name of an event type, or the number in hex."""
    return EVENT_TYPES.get(event_type, f"0x{event_type:08x}")


def parse_event_log(data: bytes) -> EventLog:
    """Parse a whole log to its last byte. Raises `FormatError` with a code below `eventlog.`."""
    if len(data) > MAX_LOG_BYTES:
        raise FormatError(
            f"eventlog: expected at most {MAX_LOG_BYTES} bytes, got {len(data)}", code="eventlog.too_long"
        )
    if data[:4] == b"CCEL":
        message = "eventlog: expected the log, got the ACPI table that points to it (the log is in tables/data/CCEL)"
        raise FormatError(message, code="eventlog.acpi_table")
    reader = Reader(data, "eventlog")
    spec = _parse_spec_id(reader)
    sizes = dict(spec.algorithms)
    fill = data[-1] if data[-1] in (0x00, 0xFF) else 0xFF
    used = len(data.rstrip(bytes((fill,))))
    events: list[Event] = []
    while reader.offset < used:
        if not data[reader.offset : reader.offset + 4].strip(b"\xff") or not any(
            data[reader.offset : reader.offset + 12]
        ):
            message = f"eventlog: expected only 0xff or only zero bytes after the last event at {reader.offset}"
            raise FormatError(message, code="eventlog.trailing")
        if len(events) == MAX_EVENTS:
            raise FormatError(f"eventlog: expected at most {MAX_EVENTS} events", code="eventlog.too_many")
        events.append(_parse_event(reader, sizes))
    return EventLog(spec=spec, events=tuple(events), padding=reader.left, fill=fill if reader.left else 0xFF)


def encode_event_log(log: EventLog) -> bytes:
    """The inverse of `parse_event_log` for logs of SHA-384 alone, which is what we write.

    Raises `FormatError`: `eventlog.algorithms` for other algorithms, `eventlog.name` for a named event, which this form
    cannot hold.
    """
    spec = log.spec
    if spec.algorithms != _SHA384_ALONE:
        raise FormatError("eventlog.algorithms: expected SHA-384 alone to write", code="eventlog.algorithms")
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
    return b"".join(out) + bytes((log.fill,)) * log.padding


def replay(events: Iterable[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 after these events, each from zero."""
    registers = [bytes(DIGEST_BYTES)] * 4
    for event in events:
        if event.extends:
            index = event.register - 1
            registers[index] = hashlib.sha384(registers[index] + event.digest).digest()
    return registers[0], registers[1], registers[2], registers[3]


def read_events(data: bytes) -> ReadEvents:
    """The events of a log in any known form, binary or JSON, told apart by content.

    Raises `FormatError` with a code below `eventlog.`.
    """
    if data[:1] not in (b"[", b"{", b" ", b"\t", b"\r", b"\n"):  # a binary log starts with a register, 0 to 4
        return ReadEvents(form=LogForm.CCEL, events=parse_event_log(data).events)
    return _read_json(data)


def parse_json_events(data: bytes) -> tuple[Event, ...]:
    """Parse a JSON event list in one of the forms of the module docstring.

    Unknown members are tolerated, as the forms are not ours. Raises `FormatError` with a code below `eventlog.`.
    """
    return _read_json(data).events


def dstack_event_digest(event: Event, *, version: int = 1) -> bytes:
    """The digest dstack extends for a runtime event.

    Version 1: SHA-384(type u32 little-endian || ":" || name || ":" || data), in which a byte may move between name and
    data around a colon. Version 2: SHA-384 of the canonical JSON (RFC 8785) of event, event_type, payload and version.
    """
    if version == 1:
        kind = event.event_type.to_bytes(4, "little")
        return hashlib.sha384(b":".join((kind, event.name.encode(), event.data))).digest()
    text = json.dumps(
        {"event": event.name, "event_type": event.event_type, "payload": event.data.hex(), "version": version},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return hashlib.sha384(text.encode()).digest()


def _parse_spec_id(reader: Reader) -> SpecId:
    register = _register(reader.uint(4, "register"))
    reader.expect(EV_NO_ACTION, 4, "spec_id")
    reader.expect(bytes(20), 20, "spec_id")
    payload = Reader(reader.take(_size(reader.uint(4, "spec_id_size")), "spec_id"), "eventlog")
    payload.expect(_SIGNATURE, len(_SIGNATURE), "spec_id")
    platform_class = payload.uint(4, "platform_class")
    version = payload.take(3, "spec_version")
    uintn_size = payload.uint(1, "uintn_size")
    count = payload.uint(4, "algorithm_count")
    if not 0 < count <= MAX_ALGORITHMS:
        message = f"eventlog.algorithms: expected 1 to {MAX_ALGORITHMS}, got {count}"
        raise FormatError(message, code="eventlog.algorithms")
    algorithms = tuple((payload.uint(2, "algorithm"), payload.uint(2, "digest_size")) for _ in range(count))
    sizes = dict(algorithms)
    if len(sizes) != count or SHA384 not in sizes:
        message = (
            f"eventlog.algorithms: expected SHA-384 and no repetition, got {[hex(kind) for kind, _ in algorithms]}"
        )
        raise FormatError(message, code="eventlog.algorithms")
    for kind, size in algorithms:
        if not 0 < size <= _MAX_DIGEST_BYTES or size != _KNOWN_SIZES.get(kind, size):
            message = f"eventlog.algorithms: expected the digest size of {kind:#06x}, got {size}"
            raise FormatError(message, code="eventlog.algorithms")
    vendor_info = payload.take(payload.uint(1, "vendor_info_size"), "vendor_info")
    payload.end()
    return SpecId(
        register=register,
        platform_class=platform_class,
        version=version,
        uintn_size=uintn_size,
        algorithms=algorithms,
        vendor_info=vendor_info,
    )


def _parse_event(reader: Reader, sizes: dict[int, int]) -> Event:
    register = _register(reader.uint(4, "register"))
    event_type = reader.uint(4, "event_type")
    count = reader.uint(4, "digest_count")
    if not 0 < count <= len(sizes):
        message = f"eventlog.digest_count: expected 1 to {len(sizes)}, got {count}"
        raise FormatError(message, code="eventlog.digest_count")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        kind = reader.uint(2, "digest_algorithm")
        if kind not in sizes or kind in digests:
            message = f"eventlog.digest_algorithm: expected one of the Spec ID event's, each once, got {kind:#06x}"
            raise FormatError(message, code="eventlog.digest_algorithm")
        digests[kind] = reader.take(sizes[kind], "digest")
    if SHA384 not in digests:
        raise FormatError("eventlog.digest_algorithm: expected a SHA-384 digest", code="eventlog.digest_algorithm")
    data = reader.take(_size(reader.uint(4, "event_size")), "event")
    return Event(register=register, event_type=event_type, digest=digests[SHA384], data=data)


def _register(value: int) -> int:
    if value > 4:
        raise FormatError(f"eventlog.register: expected 0 to 4, got {value}", code="eventlog.register")
    return value


def _size(value: int) -> int:
    if value > MAX_EVENT_BYTES:
        message = f"eventlog.event_size: expected at most {MAX_EVENT_BYTES}, got {value}"
        raise FormatError(message, code="eventlog.event_size")
    return value


def _refused(expected: str) -> FormatError:
    return FormatError(f"eventlog: expected {expected}", code="eventlog.json")


def _load(data: bytes) -> Any:
    return strict_json.load(data, "eventlog", max_bytes=MAX_LOG_BYTES)


def _read_json(data: bytes) -> ReadEvents:
    try:
        value = _load(data)
    except FormatError as err:
        lines = [] if err.code == "eventlog.too_long" else [line for line in data.splitlines() if line.strip()]
        if not 1 < len(lines) <= MAX_EVENTS:
            raise
        value = [_load(line) for line in lines]
    if isinstance(value, dict) and isinstance(value.get("cc_eventlog"), str):
        return ReadEvents(form=LogForm.CCEL, events=parse_event_log(_base64(value["cc_eventlog"])).events)
    if isinstance(value, dict) and "imr" not in value:
        value = value["uefi_event_logs"] if "uefi_event_logs" in value else _dstack_list(value)
    items = [value] if isinstance(value, dict) else value  # a file of one line
    if not isinstance(items, list) or len(items) > MAX_EVENTS or not all(isinstance(item, dict) for item in items):
        raise _refused(f"a JSON list of at most {MAX_EVENTS} events")
    first: dict[str, Any] = items[0] if items else {}
    form, parse = LogForm.DSTACK, _dstack_event
    if "imr" not in first and "digests" in first:
        form, parse = LogForm.TRUSTEE, _trustee_event
    elif "imr" not in first and "rtmr_events" in first:
        form, parse = LogForm.TRUST_AUTHORITY, _trust_authority_bank
    events = tuple(event for item in items for event in parse(item))
    if len(events) > MAX_EVENTS:
        raise _refused(f"at most {MAX_EVENTS} events")
    return ReadEvents(form=form, events=events)


def _dstack_list(report: dict[str, Any]) -> Any:
    """The event list of a dstack quote report: outermost place first, each an object or its JSON text."""
    value: Any = report
    for _ in range(3):
        if not isinstance(value, dict):
            break
        found = next((value[name] for name in ("event_log", "tcb_info", "info") if name in value), None)
        value = _load(found.encode("utf-8", "replace")) if isinstance(found, str) else found
        if isinstance(value, list):
            return value
    raise _refused("an object with an event_log, uefi_event_logs or cc_eventlog")


def _dstack_event(item: dict[str, Any]) -> tuple[Event, ...]:
    register, event_type = item.get("imr"), item.get("event_type")
    name, digest, version = item.get("event", ""), item.get("digest", ""), item.get("version", 1)
    if type(register) is not int or not 0 <= register <= 3 or type(event_type) is not int or event_type >> 32:
        raise _refused("imr 0 to 3 and a 32-bit event_type")
    if type(version) is not int or version not in (1, 2):
        raise _refused("version 1 or 2")
    payload = item.get("event_payload")
    if payload is None:  # the oldest form
        name, payload = "", name
    if not isinstance(name, str):
        raise _refused("text in event")
    try:
        name.encode()
    except ValueError as err:
        raise _refused("UTF-8 in event") from err
    event = Event(register=register + 1, event_type=event_type, digest=b"", data=_hex(payload), name=name)
    found = _hex(digest)
    if not found and event_type == DSTACK_RUNTIME_EVENT and name:
        found = dstack_event_digest(event, version=version)
    return (_json_event(event, found),)


def _trustee_event(item: dict[str, Any]) -> tuple[Event, ...]:
    digests, data = item.get("digests"), item.get("event")
    if not isinstance(digests, list) or not 0 < len(digests) <= MAX_ALGORITHMS or not isinstance(data, str):
        raise _refused("digests and an event in base64")
    by_name = {str(entry.get("alg")): entry.get("digest") for entry in digests if isinstance(entry, dict)}
    if len(by_name) != len(digests) or "SHA-384" not in by_name:
        raise _refused("a SHA-384 digest and no algorithm twice")
    register, event_type = _index(item.get("index")), _type(item.get("type"))
    event = Event(register=register, event_type=event_type, digest=b"", data=_base64(data))
    return (_json_event(event, _hex(by_name["SHA-384"])),)


def _trust_authority_bank(item: dict[str, Any]) -> tuple[Event, ...]:
    rtmr, events = item.get("rtmr"), item.get("rtmr_events")
    if not isinstance(rtmr, dict) or not isinstance(events, list) or not isinstance(rtmr.get("bank"), str):
        raise _refused("rtmr with index and bank, and rtmr_events")
    register = _index(rtmr.get("index"))
    return tuple(_trust_authority_event(register, event) for event in events if rtmr["bank"] == "SHA384")


def _trust_authority_event(register: int, item: object) -> Event:
    if not isinstance(item, dict):
        raise _refused("a JSON object for each event")
    tags = item.get("tags") or [""]
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise _refused("text in tags")
    event = Event(register=register, event_type=_type(item.get("type_id")), digest=b"", data=b"", name=tags[0])
    return _json_event(event, _hex(item.get("measurement")))


def _index(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 4:
        raise _refused("index 0 to 4")
    return value


def _type(value: object) -> int:
    if not isinstance(value, str) or re.fullmatch(r"0x[0-9A-Fa-f]{1,8}", value) is None:
        raise _refused("an event type of the form 0x0")
    return int(value, 16)


def _json_event(event: Event, digest: bytes) -> Event:
    if len(digest) != DIGEST_BYTES or len(event.data) > MAX_EVENT_BYTES:
        raise _refused("48-byte digests and bounded payloads")
    return Event(register=event.register, event_type=event.event_type, digest=digest, data=event.data, name=event.name)


def _hex(value: object) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or not isinstance(value, str) or len(value) != 2 * len(data):
        raise _refused("hex in digest and payload")
    return data


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise _refused("base64") from err
