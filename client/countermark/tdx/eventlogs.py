"""What a TD's event log says, and how far it can be believed: replay, digests, differences, words for people.

Only an event's digest is measured, and only its order within its register. Type, data and name are the log's own
claim, believed as far as the digest is recomputed from them:

- TCG PC Client Platform Firmware Profile (PFP) 1.05 and 1.06, section 10.4, fixes the digest as the hash of the event's
  data for EV_SEPARATOR (after an error: of the number 1), EV_ACTION, EV_EFI_ACTION, EV_S_CRTM_VERSION,
  EV_EFI_VARIABLE_DRIVER_CONFIG, EV_EFI_VARIABLE_BOOT2, EV_EFI_VARIABLE_AUTHORITY, EV_EFI_GPT_EVENT and _EVENT2. For
  EV_EFI_VARIABLE_BOOT it is the hash of the variable's content alone, without GUID and name, as in every genuine log
  seen; the hash of the whole structure is taken too. Old shims (before their commit 8a27a4809a6a) logged one byte
  too many with EV_EFI_VARIABLE_AUTHORITY. dstack's runtime events and our own boot events have their own fixed rule.
  Where the rule is fixed, another digest is a refusal (`eventlog.digest`).
- For every other type the data names what was hashed (a firmware volume, ACPI tables, a PE image, a command line). Some
  writers hash the data, or a part of it, all the same: GRUB its command without the prefix (old ones with its NUL),
  systemd's stub the name of a section in ASCII, the attestation agent of Confidential Containers the tagged text.
  That is reported when it is so.
- A JSON list may come without the data: then there is nothing to recompute.

Sources: genuine CCEL logs of QEMU with OVMF, of GKE and of dstack; UEFI 2.10 sections 3.1.3, 10 and 38.4 (load options,
device paths, registers). Not checked here: which events a machine should have (`tdx.registers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from countermark.errors import FormatError, MeasurementError
from countermark.formats import boot_events, eventlog
from countermark.formats.eventlog import DSTACK_RUNTIME_EVENT, Event, LogForm, ReadEvents
from countermark.formats.manifest import Manifest, PredictedEvent, Shape
from countermark.formats.quote import TdReport, parse_quote
from countermark.formats.reader import Reader

MAX_WORDS = 160  # of one description
_FIXED: Final = frozenset(
    (
        eventlog.EV_SEPARATOR,
        eventlog.EV_ACTION,
        eventlog.EV_S_CRTM_VERSION,
        eventlog.EV_EFI_ACTION,
        eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG,
        eventlog.EV_EFI_VARIABLE_BOOT,
        eventlog.EV_EFI_VARIABLE_BOOT2,
        eventlog.EV_EFI_VARIABLE_AUTHORITY,
        eventlog.EV_EFI_GPT_EVENT,
        eventlog.EV_EFI_GPT_EVENT2,
        DSTACK_RUNTIME_EVENT,
        boot_events.EVENT_TYPE,
    )
)
_VARIABLES: Final = frozenset(
    (
        eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG,
        eventlog.EV_EFI_VARIABLE_BOOT,
        eventlog.EV_EFI_VARIABLE_BOOT2,
        eventlog.EV_EFI_VARIABLE_AUTHORITY,
    )
)
_IMAGES: Final = frozenset(
    (
        eventlog.EV_EFI_BOOT_SERVICES_APPLICATION,
        eventlog.EV_EFI_BOOT_SERVICES_DRIVER,
        eventlog.EV_EFI_RUNTIME_SERVICES_DRIVER,
    )
)
_ERROR_SEPARATOR: Final = (1).to_bytes(4, "little")
_GRUB: Final = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ", b"grub_kernel_cmdline ", b"grub_cmd ")
_MAX_NODES: Final = 32
_MAX_PARTITIONS: Final = 8


class DigestCheck(StrEnum):
    """What became of an event's digest when it was computed again."""

    RECOMPUTED = "recomputed"  # the digest is the hash of the data, so the data is what was measured
    NAMED = "names what was hashed"
    NO_DATA = "no data to hash"
    NOT_EXTENDED = "extends nothing"
    DIFFERS = "differs"  # although the rule is fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestSummary:
    """One `DigestCheck` for each event of a log, in order."""

    checks: tuple[DigestCheck, ...]

    def count(self, check: DigestCheck) -> int:
        """How many events came out so."""
        return self.checks.count(check)

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions in the log, from 0."""
        return tuple(at for at, check in enumerate(self.checks) if check is DigestCheck.DIFFERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterResult:
    """One RTMR. `quoted` and `matches` are None without a quote; `matches` also where the log is not about it."""

    name: str  # rtmr0 to rtmr3
    events: int  # that extend it
    replayed: bytes  # 48
    quoted: bytes | None
    matches: bool | None


class DifferenceKind(StrEnum):
    """How a log departs from the expected events of a register, at the first place where it does."""

    CHANGED = "changed"
    MISSING = "missing"
    EXTRA = "extra"
    REORDERED = "reordered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first event of a register that is not as the manifest has it. `position` counts extending events from 0."""

    register: int  # 1 to 4: RTMR0 to RTMR3
    position: int
    kind: DifferenceKind
    expected: PredictedEvent | None
    found: Event | None

    def __str__(self) -> str:
        """One line: register, position, kind, what was expected and what was found."""
        wanted, got = "no event", "no event"
        if self.expected is not None:
            what = _words(self.expected.note) or self.expected.source
            wanted = f"{what} ({eventlog.event_type_name(self.expected.event_type)}) {self.expected.digest.hex()}"
        if self.found is not None:
            what = describe(self.found)
            got = f"{what} ({eventlog.event_type_name(self.found.event_type)}) {self.found.digest.hex()}"
        place = f"rtmr{self.register - 1}, event {self.position}"
        return f"first difference at {place}: {self.kind.value}; expected {wanted}, got {got}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLine:
    """One event, ready to print: every text is printable ASCII and bounded."""

    register: int
    type_name: str
    description: str
    digest: bytes
    check: DigestCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAppraisal:
    """What a log says by itself, and against a quote where one was given."""

    read: ReadEvents
    registers: tuple[RegisterResult, ...]
    digests: DigestSummary
    events: tuple[EventLine, ...]

    def require(self) -> None:
        """Raises `MeasurementError` as `require_replay` and `require_digests` do, in this order."""
        require_replay(self.registers)
        require_digests(self.read.events, self.digests)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys; digests in hex."""
        return {
            "form": self.read.form.value,
            "registers": {
                result.name: {
                    "events": result.events,
                    "replayed": result.replayed.hex(),
                    "quoted": None if result.quoted is None else result.quoted.hex(),
                    "matches": result.matches,
                }
                for result in self.registers
            },
            "digests": {check.name.lower(): self.digests.count(check) for check in DigestCheck},
            "events": [
                {
                    "register": "mrtd" if line.register == 0 else f"rtmr{line.register - 1}",
                    "type": line.type_name,
                    "description": line.description,
                    "digest": line.digest.hex(),
                    "check": line.check.name.lower(),
                }
                for line in self.events
            ],
        }


def appraise_event_log(log: bytes, quote: bytes | None) -> LogAppraisal:
    """Scope genuine: read a log in any known form and replay it, against the quote's registers where one is given.

    Judges nothing, `LogAppraisal.require` does. Raises `FormatError`.
    """
    read = eventlog.read_events(log)
    report = None if quote is None else parse_quote(quote).body
    digests = verify_digests(read.events)
    lines = (
        EventLine(
            register=event.register,
            type_name=eventlog.event_type_name(event.event_type),
            description=describe(event),
            digest=event.digest,
            check=check,
        )
        for event, check in zip(read.events, digests.checks, strict=True)
    )
    return LogAppraisal(read=read, registers=_replay(read, report), digests=digests, events=tuple(lines))


def _replay(read: ReadEvents, report: TdReport | None) -> tuple[RegisterResult, ...]:
    if report is not None:
        return replay_against(report, read.events, firmware_only=read.form is not LogForm.DSTACK)
    return tuple(
        RegisterResult(name=f"rtmr{index}", events=count, replayed=replayed, quoted=None, matches=None)
        for index, (count, replayed) in enumerate(zip(_counts(read.events), eventlog.replay(read.events), strict=True))
    )


def replay_against(
    report: TdReport, events: Sequence[Event], *, firmware_only: bool = False
) -> tuple[RegisterResult, ...]:
    """Replay to RTMR0-3 and compare with the report's.

    `firmware_only`: the log is the firmware's (a CCEL), to which a kernel cannot append, so that it is not about RTMR3
    unless it has events of it; `matches` is None there when the register is in use.
    """
    results = []
    for index, (count, replayed, quoted) in enumerate(
        zip(_counts(events), eventlog.replay(events), report.rtmrs, strict=True)
    ):
        silent = firmware_only and index == 3 and count == 0 and replayed != quoted
        results.append(
            RegisterResult(
                name=f"rtmr{index}",
                events=count,
                replayed=replayed,
                quoted=quoted,
                matches=None if silent else replayed == quoted,
            )
        )
    return tuple(results)


def require_replay(results: Iterable[RegisterResult]) -> None:
    """Raises `MeasurementError` `eventlog.rtmr0` to `eventlog.rtmr3` for the first register that does not match."""
    for result in results:
        if result.matches is False and result.quoted is not None:
            message = (
                f"event log: expected to replay to {result.name} = {result.quoted.hex()}, got {result.replayed.hex()}"
                f" after {result.events} events"
            )
            raise MeasurementError(message, code=f"eventlog.{result.name}", step="6")


def require_digests(events: Sequence[Event], summary: DigestSummary) -> None:
    """Raises `MeasurementError` `eventlog.digest` for the first event whose digest contradicts its data."""
    for at in summary.differing:
        event = events[at]
        name = eventlog.event_type_name(event.event_type)
        message = (
            f"event log, event {at} ({name}, {describe(event)}): expected a digest of its data,"
            f" got {event.digest.hex()}"
        )
        raise MeasurementError(message, code="eventlog.digest", step="6")


def verify_digests(events: Iterable[Event]) -> DigestSummary:
    """Compute every digest again as far as the event's type and data allow; see the module docstring."""
    return DigestSummary(checks=tuple(_check(event) for event in events))


def _check(event: Event) -> DigestCheck:
    if not event.extends:
        return DigestCheck.NOT_EXTENDED
    if event.event_type == DSTACK_RUNTIME_EVENT and any(
        eventlog.dstack_event_digest(event, version=version) == event.digest for version in (1, 2)
    ):
        return DigestCheck.RECOMPUTED
    if not event.data and (not event.name or event.event_type != DSTACK_RUNTIME_EVENT):
        return DigestCheck.NO_DATA
    if any(hashlib.sha384(hashed).digest() == event.digest for hashed in _hashed(event)):
        return DigestCheck.RECOMPUTED
    return DigestCheck.DIFFERS if event.event_type in _FIXED else DigestCheck.NAMED


def _hashed(event: Event) -> Iterable[bytes]:
    """What the digest may be the hash of."""
    data = event.data
    yield data
    match event.event_type:
        case eventlog.EV_SEPARATOR:
            yield _ERROR_SEPARATOR
        case eventlog.EV_EFI_VARIABLE_BOOT:
            if (variable := _variable(data)) is not None:
                yield variable.data
        case eventlog.EV_EFI_VARIABLE_AUTHORITY:
            yield data[:-1]
        case eventlog.EV_IPL:
            yield data.rstrip(b"\0")
            for prefix in _GRUB:
                if data.startswith(prefix):
                    yield data.removeprefix(prefix)
                    yield data.removeprefix(prefix).rstrip(b"\0")
            if data[1::2].strip(b"\0") == b"":  # UTF-16 of ASCII
                yield data[::2].rstrip(b"\0") + b"\0"
        case eventlog.EV_EVENT_TAG:
            yield data[8 : 8 + int.from_bytes(data[4:8], "little")]


def first_difference(
    image: Manifest, shape: Shape, events: Iterable[Event], *, register: int | None = None
) -> Difference | None:
    """The first event that is not as the manifest predicts for this shape, in `register` (1 to 4) or in any; or None.

    Events are compared by digest, which is all that is measured of them.
    """
    logged = [event for event in events if event.extends]
    wanted = [event for event in image.events if event.shape in ("", shape.name)]
    for index in range(1, 5) if register is None else (register,):
        found = _first_difference(
            index,
            [event for event in wanted if event.register == index and event.event_type != eventlog.EV_NO_ACTION],
            [event for event in logged if event.register == index],
        )
        if found is not None:
            return found
    return None


def _first_difference(register: int, wanted: list[PredictedEvent], logged: list[Event]) -> Difference | None:
    shared = min(len(wanted), len(logged))
    at = next((i for i in range(shared) if wanted[i].digest != logged[i].digest), shared)
    expected = wanted[at] if at < len(wanted) else None
    found = logged[at] if at < len(logged) else None
    if expected is None and found is None:
        return None
    if expected is None or found is None:
        kind = DifferenceKind.EXTRA if expected is None else DifferenceKind.MISSING
    else:
        due = found.digest in {event.digest for event in wanted[at:]}  # what came would have come later
        follows = expected.digest in {event.digest for event in logged[at:]}  # what should have come, comes later
        kind = {
            (True, True): DifferenceKind.REORDERED,
            (True, False): DifferenceKind.MISSING,
            (False, True): DifferenceKind.EXTRA,
            (False, False): DifferenceKind.CHANGED,
        }[due, follows]
    return Difference(register=register, position=at, kind=kind, expected=expected, found=found)


def _counts(events: Iterable[Event]) -> tuple[int, int, int, int]:
    registers = [event.register for event in events if event.extends]
    return registers.count(1), registers.count(2), registers.count(3), registers.count(4)


@dataclass(frozen=True, slots=True)
class _Variable:
    """UEFI_VARIABLE_DATA (PFP 10.2.6): GUID, name, content."""

    guid: UUID
    name: str
    data: bytes


def _variable(data: bytes) -> _Variable | None:
    reader = Reader(data, "eventlog")
    try:
        guid = UUID(bytes_le=reader.take(16, "variable"))
        name_chars, size = reader.uint(8, "variable"), reader.uint(8, "variable")
        name = reader.take(2 * name_chars, "variable").decode("utf-16-le", "replace")
        content = reader.take(size, "variable")
    except FormatError:
        return None
    return None if reader.left else _Variable(guid=guid, name=name, data=content)


def describe(event: Event) -> str:
    """A few words on an event's data, such as the name of a variable or the path of an image.

    Printable ASCII, at most `MAX_WORDS` characters, whatever the data is.
    """
    return _words(_describe(event))


def _describe(event: Event) -> str:
    kind, data = event.event_type, event.data
    if event.name:
        return f"{event.name} {_text(data)}".rstrip()
    if not data:
        return ""
    try:
        if kind in _VARIABLES and (variable := _variable(data)) is not None:
            shown = f"= {variable.data.hex()}" if 0 < len(variable.data) <= 8 else f"({len(variable.data)} bytes)"
            return f"{variable.name} {shown}"
        if kind in _IMAGES:
            return _image(data)
        if kind in (eventlog.EV_EFI_GPT_EVENT, eventlog.EV_EFI_GPT_EVENT2):
            return _partitions(data)
        if kind in (eventlog.EV_EFI_PLATFORM_FIRMWARE_BLOB2, eventlog.EV_EFI_HANDOFF_TABLES2):
            reader = Reader(data, "eventlog")
            return _text(reader.take(reader.uint(1, "blob"), "blob"))
        if kind == eventlog.EV_EVENT_TAG:
            reader = Reader(data, "eventlog")
            tag = reader.uint(4, "tag")
            return f"tag 0x{tag:08x} {_text(reader.take(reader.uint(4, 'tag'), 'tag'))}"
    except FormatError:
        pass  # not of the form its type calls for: shown as it is
    return data.hex() if kind == eventlog.EV_SEPARATOR else _text(data)


def _image(data: bytes) -> str:
    """UEFI_IMAGE_LOAD_EVENT (PFP 10.2.3): location, length, link time address, device path."""
    reader = Reader(data, "eventlog")
    reader.take(24, "image")
    path = Reader(reader.take(reader.uint(8, "image"), "image"), "eventlog")
    nodes: list[str] = []
    while path.left and len(nodes) < _MAX_NODES:  # UEFI 2.10 section 10.3
        kind, subtype, size = path.uint(1, "path"), path.uint(1, "path"), path.uint(2, "path")
        if size < 4 or kind == 0x7F:
            break
        nodes.append(_node(kind, subtype, path.take(size - 4, "path")))
    return "/".join(nodes) or "no device path"


def _node(kind: int, subtype: int, body: bytes) -> str:
    match (kind, subtype):
        case (4, 4):
            return body.decode("utf-16-le", "replace").rstrip("\0")
        case (4, 3) if len(body) >= 16:
            tail = body[16:].decode("utf-16-le", "replace").rstrip("\0")
            return f"Vendor({UUID(bytes_le=body[:16])}){tail}"
        case (4, 6) | (4, 7) if len(body) == 16:
            return f"{'FvFile' if subtype == 6 else 'Fv'}({UUID(bytes_le=body)})"
        case (4, 1) if len(body) >= 4:
            return f"HD({int.from_bytes(body[:4], 'little')})"
        case (1, 1) if len(body) == 2:
            return f"Pci({body[1]:x},{body[0]:x})"
        case (2, 1):
            return "Acpi"
        case _:
            return f"Path({kind},{subtype})"


def _partitions(data: bytes) -> str:
    """UEFI_GPT_DATA (PFP 10.2.5): the GPT header, the number of used entries, the entries of 128 bytes."""
    reader = Reader(data, "eventlog")
    reader.take(92, "gpt")
    count = reader.uint(8, "gpt")
    names = []
    for _ in range(min(count, _MAX_PARTITIONS)):
        entry = reader.take(128, "gpt")
        names.append(entry[56:].decode("utf-16-le", "replace").rstrip("\0"))
    return f"{count} partitions: {', '.join(names)}"


def _text(data: bytes) -> str:
    """The data as text where that is what it is (UTF-8 or UTF-16, NUL-terminated or not), else hex."""
    body = data[: 8 * MAX_WORDS]
    if len(body) >= 4 and len(body) % 2 == 0 and not body[1::2].strip(b"\0"):
        body = body[::2]
    body = body.rstrip(b"\0")
    return body.decode() if body and body.isascii() and body.decode().isprintable() else data[:MAX_WORDS].hex()


def _words(text: str) -> str:
    """Printable ASCII for a terminal, cut to `MAX_WORDS`."""
    plain = text[:MAX_WORDS].encode("ascii", "backslashreplace").decode()
    plain = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in plain)
    return plain if len(plain) <= MAX_WORDS and len(text) <= MAX_WORDS else plain[: MAX_WORDS - 3] + "..."
