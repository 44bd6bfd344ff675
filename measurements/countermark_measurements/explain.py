"""Why a machine's registers are not the predicted ones: register, event, origin, expected and found.

Input: a quote with a firmware event log in any form that `formats.eventlog` reads, or our evidence, or a bundle, which
hold both; and a manifest. 1 the launch shape with the fewest differences is taken, unless one is named · 2 each
register is compared · 3 where one differs and the log replays to it, the first event that is not as predicted is the
reason; a log that does not replay explains nothing, and that is said.

Not checked here: the quote's signature, nor that the manifest is the publisher's. Explaining accepts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from countermark.bundle import parse_bundle
from countermark.errors import FormatError, UsageError
from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import BootEvents
from countermark.formats.eventlog import Event
from countermark.formats.evidence import parse_evidence
from countermark.formats.manifest import Manifest, PredictedEvent, Shape
from countermark.formats.quote import TdReport, parse_quote
from countermark.genuine.result import hex_or_binary
from countermark.tdx.eventlogs import Difference, DifferenceKind, describe, first_difference

LAUNCH: Final = ("td_attributes", "xfam", "mrconfigid", "mrowner", "mrownerconfig")
_ZIP: Final = b"PK\x03\x04"
_ORIGIN: Final = {
    "image": "the disk image",
    "firmware": "the firmware",
    "launch": "how the machine was launched",
}
_CHANGED: Final = {
    "image": "another image was booted than the one predicted, or this one was changed",
    "firmware": "another firmware ran than the one predicted from, or with other variables",
    "launch": "the machine was launched in another way than this shape: memory, processors, devices or VMM",
}
_LATE: Final = "what the machine extended after the firmware; no image determines it"
_KINDS: Final = {
    DifferenceKind.MISSING: "what was predicted here was not measured",
    DifferenceKind.EXTRA: "something was measured that nobody predicted: an add-on, a credential, another boot entry",
    DifferenceKind.REORDERED: "the same things were measured in another order",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a machine says of itself. `boot`: the values of its RTMR3, where a log came along that replays to it.

    `rtmr3`: what there is to say of that register.
    """

    report: TdReport
    events: tuple[Event, ...]
    boot: BootEvents | None
    rtmr3: str = _LATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """One register. `expected` is None for what no manifest predicts. `reason`: why it differs, or what it is."""

    name: str
    expected: bytes | None
    found: bytes
    events: int
    difference: Difference | None
    reason: str

    @property
    def matches(self) -> bool:
        """Whether it is as predicted; true where nothing is."""
        return self.expected in (None, self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The comparison of one machine with one shape of a manifest."""

    image: Manifest
    shape: Shape
    registers: tuple[Register, ...]
    boot: BootEvents | None

    @property
    def differing(self) -> tuple[str, ...]:
        """The names of the registers that are not as predicted."""
        return tuple(register.name for register in self.registers if not register.matches)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys; digests in hex."""
        return {
            "image_id": self.image.image_id.hex(),
            "version": self.image.version,
            "launch_shape": self.shape.name,
            "matches": not self.differing,
            "registers": {
                item.name: {
                    "expected": None if item.expected is None else item.expected.hex(),
                    "found": item.found.hex(),
                    "matches": item.matches,
                    "events": item.events,
                    "reason": item.reason,
                    "difference": None if item.difference is None else _as_json(item.difference),
                }
                for item in self.registers
            },
        }

    def lines(self) -> list[str]:
        """For people."""
        image = self.image
        head = f"image {image.image_id.hex()}, version {image.version}, {image.kind.value}; machine {self.shape.name}"
        made = [head]
        for item in self.registers:
            made += _register_lines(item)
        if self.boot is not None:
            made += _boot_lines(self.boot, image)
        return made


def read_measured(quote: bytes, log: bytes | None) -> Measured:
    """A quote (binary or hex) with its event log, or evidence or a bundle of ours alone.

    Raises `FormatError`, `BundleError`, or `UsageError` (`usage.log`): a log is missing, or one too many.
    """
    evidence = parse_bundle(quote).evidence if quote.startswith(_ZIP) else quote
    try:
        ours = parse_evidence(evidence)
    except FormatError:
        if evidence is not quote:
            raise
        if log is None:
            message = "LOG: expected the event log beside a quote (only evidence and bundles hold their own)"
            raise UsageError(message, code="usage.log") from None
        report = parse_quote(hex_or_binary(quote), any_trailing=True).body
        return Measured(report=report, events=eventlog.read_events(log).events, boot=None)
    if log is not None:
        message = "LOG: expected none beside evidence or a bundle, which hold their own"
        raise UsageError(message, code="usage.log")
    report = parse_quote(ours.quote).body
    boot, said = None, f"{_LATE}; its log replays to it"
    try:
        boot = boot_events.parse_boot_log(ours.rtmr3_log)
        if eventlog.replay(eventlog.parse_event_log(ours.rtmr3_log).events)[3] != report.rtmr3:
            boot, said = None, f"{_LATE}; the log that came along does NOT replay to it"
    except FormatError as err:
        said = f"{_LATE}; the log that came along is not ours: {err}"
    events = eventlog.parse_event_log(ours.ccel).events
    return Measured(report=report, events=events, boot=boot, rtmr3=said)


def explain(measured: Measured, image: Manifest, shape: str | None = None) -> Explanation:
    """Compare a machine with a manifest. `shape`: a launch shape's name; else the nearest.

    Raises `UsageError` (`usage.shape`).
    """
    shapes = [item for item in image.shapes if shape in (None, item.name)]
    if not shapes:
        known = ", ".join(item.name for item in image.shapes)
        raise UsageError(f"--shape: expected one of {known}, got {shape!r:.80}", code="usage.shape")
    nearest = min(shapes, key=lambda item: _distance(measured, image, item))
    report = measured.report
    replayed = eventlog.replay(measured.events)
    registers = [_mrtd(nearest, image.shapes, report)]
    for index, (name, expected) in enumerate(
        (("rtmr0", nearest.rtmr0), ("rtmr1", image.rtmr1), ("rtmr2", image.rtmr2))
    ):
        registers.append(_rtmr(name, expected, index, measured, replayed[index], image, nearest))
    count = sum(event.extends and event.register == boot_events.REGISTER for event in measured.events)
    registers.append(
        Register(name="rtmr3", expected=None, found=report.rtmr3, events=count, difference=None, reason=measured.rtmr3)
    )
    registers += [
        Register(
            name=name,
            expected=getattr(image, name),
            found=getattr(report, name),
            events=0,
            difference=None,
            reason="" if getattr(image, name) == getattr(report, name) else _CHANGED["launch"],
        )
        for name in LAUNCH
    ]
    return Explanation(image=image, shape=nearest, registers=tuple(registers), boot=measured.boot)


def _distance(measured: Measured, image: Manifest, shape: Shape) -> tuple[int, int]:
    """How many registers differ; then how late the first event of RTMR0 that does."""
    report = measured.report
    differing = (report.mrtd != shape.mrtd) + (report.rtmrs[0] != shape.rtmr0)
    found = first_difference(image, shape, measured.events, register=1)
    return differing, -len(image.events) - 1 if found is None else -found.position


def _mrtd(shape: Shape, shapes: Sequence[Shape], report: TdReport) -> Register:
    reason = ""
    if report.mrtd != shape.mrtd:
        reason = "another firmware was loaded than the one predicted from, or by a VMM that adds it in another order"
        other = [item.name for item in shapes if item.mrtd == report.mrtd]
        if other:
            reason = f"the machine was built as in shape {other[0]}, which another register does not fit"
    return Register(name="mrtd", expected=shape.mrtd, found=report.mrtd, events=0, difference=None, reason=reason)


def _rtmr(
    name: str, expected: bytes, index: int, measured: Measured, replayed: bytes, image: Manifest, shape: Shape
) -> Register:
    found = measured.report.rtmrs[index]
    count = sum(event.extends and event.register == index + 1 for event in measured.events)
    difference, reason = None, ""
    if found != expected:
        if replayed != found:
            reason = "the event log does not replay to this register, so it cannot say which event differs"
        else:
            difference = first_difference(image, shape, measured.events, register=index + 1)
            reason = _why(difference)
    return Register(name=name, expected=expected, found=found, events=count, difference=difference, reason=reason)


def _why(difference: Difference | None) -> str:
    if difference is None:
        return "the log has the events of the manifest, yet replays to another value"
    if difference.kind is DifferenceKind.CHANGED and difference.expected is not None:
        return _CHANGED[difference.expected.source]
    return _KINDS[difference.kind]


def origin(event: PredictedEvent) -> str:
    """Where a predicted event comes from, for people."""
    return _ORIGIN[event.source]


def _as_json(difference: Difference) -> dict[str, Any]:
    wanted, got = difference.expected, difference.found
    return {
        "event": difference.position,
        "kind": difference.kind.value,
        "expected": None
        if wanted is None
        else {
            "type": eventlog.event_type_name(wanted.event_type),
            "what": wanted.note,
            "source": wanted.source,
            "digest": wanted.digest.hex(),
        },
        "found": None
        if got is None
        else {
            "type": eventlog.event_type_name(got.event_type),
            "what": describe(got),
            "digest": got.digest.hex(),
        },
    }


def _register_lines(item: Register) -> list[str]:
    if item.matches:
        if item.name in LAUNCH:
            return []
        events = f" ({item.events} events)" if item.name.startswith("rtmr") else ""
        return [f"{item.name:<8}{'as predicted' + events if item.expected is not None else item.reason}"]
    assert item.expected is not None
    made = [
        f"{item.name:<8}DIFFERS: {item.reason}",
        f"        expected  {item.expected.hex()}",
        f"        found     {item.found.hex()}",
    ]
    if item.difference is not None:
        made += _difference_lines(item.difference)
    return made


def _difference_lines(difference: Difference) -> list[str]:
    wanted, got = difference.expected, difference.found
    made = [f"        first difference: event {difference.position}, {difference.kind.value}"]
    if wanted is None:
        made.append("          expected  no further event")
    else:
        kind = eventlog.event_type_name(wanted.event_type)
        made.append(f"          expected  {wanted.note or kind} ({kind}), from {origin(wanted)}")
        made.append(f"                    {wanted.digest.hex()}")
    if got is None:
        made.append("          found     no further event")
    else:
        kind = eventlog.event_type_name(got.event_type)
        made.append(f"          found     {describe(got) or 'an event without data'} ({kind})")
        made.append(f"                    {got.digest.hex()}")
    return made


def _boot_lines(boot: BootEvents, image: Manifest) -> list[str]:
    same = "as in the manifest" if boot.image_id == image.image_id else f"NOT the manifest's {image.image_id.hex()}"
    return [
        "in rtmr3, by the machine's own log:",
        f"        image     {boot.image_id.hex()}, {same}",
        f"        config    {boot.config.hex()}",
        f"        weights   {boot.weights_root.hex()}",
        f"        numerics  {boot.profile}, kernels {boot.kernel_digest.hex()}",
        f"        GPUs      {len(boot.gpus)}",
    ]
