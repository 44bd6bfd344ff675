"""Which event made a register differ: simulated machines, genuine quotes and logs; and two manifests in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from publisher import SHAPES, event, image_id, prediction, sha384, statement

from countermark.errors import BundleError, FormatError, UsageError
from countermark.formats import eventlog, tpm_log
from countermark.formats.eventlog import Event, EventLog, SpecId, encode_event_log
from countermark.formats.manifest import Manifest, PredictedEvent, parse_envelope, parse_manifest
from countermark.formats.quote import TdReport, parse_quote
from countermark.tdx.eventlogs import DifferenceKind
from countermark_measurements.diff import diff
from countermark_measurements.explain import LAUNCH, Explanation, Measured, explain, read_measured
from sim_evidence import Scene, machine
from vectors import TDX_AT, read, tdx

IMAGE = statement()
MADE = parse_quote(Scene().make().quote).body  # of a simulated machine; every measured field is replaced below


def log_of(image: Manifest, shape: str) -> list[Event]:
    """The log of a machine that measures what is predicted."""
    return [
        Event(register=e.register, event_type=e.event_type, digest=e.digest, data=e.note.encode())
        for e in image.events
        if e.shape in ("", shape)
    ]


def report_of(events: Sequence[Event], image: Manifest, shape: str) -> TdReport:
    """What a TD with this log reports, launched as the manifest wants it."""
    rtmr0, rtmr1, rtmr2, _ = eventlog.replay(events)
    mrtd = next(item.mrtd for item in image.shapes if item.name == shape)
    launch = {name: getattr(image, name) for name in LAUNCH}
    return replace(MADE, mrtd=mrtd, rtmr0=rtmr0, rtmr1=rtmr1, rtmr2=rtmr2, rtmr3=sha384("boot"), **launch)


def explained(change: Callable[[list[Event]], object] = lambda _: None, shape: str = SHAPES[1]) -> Explanation:
    events = log_of(IMAGE, shape)
    change(events)
    return explain(Measured(report=report_of(events, IMAGE, shape), events=tuple(events), boot=None), IMAGE)


def other(item: Event) -> Event:
    return replace(item, digest=sha384("other"), data=b"something else")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_machine_as_predicted_is_found_in_its_shape(shape: str) -> None:
    found = explained(shape=shape)
    assert (found.shape.name, found.differing) == (shape, ())
    assert found.as_json()["matches"] is True
    assert "rtmr3" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("change", "register", "position", "kind", "source"),
    [
        (lambda log: log.__setitem__(4, other(log[4])), "rtmr1", 0, DifferenceKind.CHANGED, "image"),
        (lambda log: log.__setitem__(6, other(log[6])), "rtmr2", 0, DifferenceKind.CHANGED, "image"),
        (lambda log: log.__setitem__(7, other(log[7])), "rtmr2", 1, DifferenceKind.CHANGED, "image"),
        (lambda log: log.__setitem__(0, other(log[0])), "rtmr0", 0, DifferenceKind.CHANGED, "firmware"),
        (lambda log: log.__setitem__(2, other(log[2])), "rtmr0", 2, DifferenceKind.CHANGED, "launch"),
        (lambda log: log.append(replace(other(log[7]), register=3)), "rtmr2", 2, DifferenceKind.EXTRA, None),
        (lambda log: log.insert(7, replace(other(log[7]), register=3)), "rtmr2", 1, DifferenceKind.EXTRA, "image"),
        (lambda log: log.pop(6), "rtmr2", 0, DifferenceKind.MISSING, "image"),
        (lambda log: log.insert(6, log.pop(7)), "rtmr2", 0, DifferenceKind.REORDERED, "image"),
    ],
)
def test_the_first_event_that_differs_is_named(
    change: Callable[[list[Event]], object], register: str, position: int, kind: DifferenceKind, source: str | None
) -> None:
    found = explained(change)
    assert found.differing == (register,)
    item = next(item for item in found.registers if item.name == register)
    assert item.difference is not None
    assert (item.difference.position, item.difference.kind) == (position, kind)
    assert (None if item.difference.expected is None else item.difference.expected.source) == source
    assert item.reason
    shown = found.as_json()["registers"][register]
    assert (shown["matches"], shown["difference"]["event"]) == (False, position)
    text = "\n".join(found.lines())
    for value in (item.expected, item.found):
        assert value is not None
        assert value.hex() in text


def test_a_log_that_does_not_replay_explains_nothing() -> None:
    events = log_of(IMAGE, SHAPES[0])
    report = report_of([*events[:-1], other(events[-1])], IMAGE, SHAPES[0])
    found = explain(Measured(report=report, events=tuple(events), boot=None), IMAGE)
    item = next(item for item in found.registers if item.name == "rtmr2")
    assert (found.differing, item.difference) == (("rtmr2",), None)
    assert item.reason


def test_mrtd_of_one_shape_with_rtmr0_of_another_is_said() -> None:
    events = log_of(IMAGE, SHAPES[2])
    report = replace(report_of(events, IMAGE, SHAPES[2]), mrtd=IMAGE.shapes[0].mrtd)
    found = explain(Measured(report=report, events=tuple(events), boot=None), IMAGE)
    assert found.differing == ("mrtd",)
    assert SHAPES[0] in found.registers[0].reason


@pytest.mark.parametrize("name", LAUNCH)
def test_launch_constants_are_compared(name: str) -> None:
    events = log_of(IMAGE, SHAPES[0])
    value = getattr(IMAGE, name)
    report = replace(report_of(events, IMAGE, SHAPES[0]), **{name: bytes([value[0] ^ 1]) + value[1:]})
    assert explain(Measured(report=report, events=tuple(events), boot=None), IMAGE).differing == (name,)


def test_a_shape_can_be_named() -> None:
    events = log_of(IMAGE, SHAPES[1])
    measured = Measured(report=report_of(events, IMAGE, SHAPES[1]), events=tuple(events), boot=None)
    assert explain(measured, IMAGE, SHAPES[2]).differing == ("rtmr0",)
    with pytest.raises(UsageError) as err:
        explain(measured, IMAGE, "q35")
    assert err.value.code == "usage.shape"


def sim_image() -> Manifest:
    return parse_manifest(parse_envelope(machine().manifest).payload)


def test_our_evidence_needs_no_other_log() -> None:
    evidence = Scene().encoded()
    measured = read_measured(evidence, None)
    assert measured.boot is not None
    found = explain(measured, sim_image())
    assert found.differing == ()
    assert measured.boot.weights_root.hex() in "\n".join(found.lines())
    lying = Scene(evidence=lambda made: replace(made, rtmr3_log=Scene().make().rtmr3_log)).encoded()
    foreign = Scene(evidence=lambda made: replace(made, rtmr3_log=made.ccel)).encoded()
    for data in (lying, foreign):  # another start's log, another kind of log: nothing in it is shown
        other_log = read_measured(data, None)
        assert (other_log.boot, other_log.rtmr3 == measured.rtmr3) == (None, False)
    with pytest.raises(UsageError) as err:
        read_measured(evidence, b"log")
    assert err.value.code == "usage.log"


@pytest.mark.parametrize("name", TDX_AT)
def test_genuine_quotes_and_logs_are_read(name: str) -> None:
    """Machines of others: nothing is as predicted, and what is said of it is about their own log."""
    quote, log = tdx(name).quote, read("ccel/dstack/ccel.bin")
    for data in (quote, quote.hex().encode()):
        found = explain(read_measured(data, log), IMAGE)
        assert {"mrtd", "rtmr0", "rtmr1", "rtmr2"} <= set(found.differing)
        assert all(item.reason for item in found.registers if not item.matches)
        text = "\n".join(found.lines())
        assert parse_quote(quote, any_trailing=True).body.mrtd.hex() in text
    with pytest.raises(UsageError) as err:
        read_measured(quote, None)
    assert err.value.code == "usage.log"


def tpm_events() -> tuple[Event, ...]:
    """The log of a booted image in QEMU, as the vtpm platform hands it out."""
    data = (Path(__file__).parents[2] / "data" / "tpmlog" / "binary_bios_measurements.bin").read_bytes()
    return tpm_log.ccel_events(tpm_log.parse_tpm_log(data))


@pytest.mark.parametrize("boot", ["dstack", "vtpm"])
def test_a_genuine_log_against_a_manifest_made_from_it(boot: str) -> None:
    """With one event of ours in place of its fourth of RTMR0: exactly that one is named."""
    events = tpm_events() if boot == "vtpm" else eventlog.read_events(read("ccel/dstack/ccel.bin")).events
    rtmr0, rtmr1, rtmr2, _ = eventlog.replay(events)
    wanted = [
        PredictedEvent(
            register=e.register,
            event_type=e.event_type,
            digest=e.digest,
            source="firmware",
            shape="",
            note=f"event {at}",
        )
        for at, e in enumerate(events)
        if e.extends and e.register < 4
    ]
    fourth = [at for at, e in enumerate(wanted) if e.register == 1][3]
    changed = [replace(e, digest=sha384("ours")) if at == fourth else e for at, e in enumerate(wanted)]
    image = replace(IMAGE, rtmr1=rtmr1, rtmr2=rtmr2, events=tuple(changed))
    report = replace(report_of(events, IMAGE, SHAPES[0]), rtmr0=rtmr0, rtmr1=rtmr1, rtmr2=rtmr2)
    found = explain(Measured(report=report, events=events, boot=None), image)
    assert found.differing == ("rtmr0",)
    difference = found.registers[1].difference
    assert difference is not None
    assert (difference.position, difference.kind) == (3, DifferenceKind.CHANGED)
    assert difference.found is not None
    assert difference.found.digest == wanted[fourth].digest


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\xa0", b"zz", b"00"])
def test_what_is_neither_quote_nor_evidence_is_refused(data: bytes) -> None:
    log = encode_event_log(EventLog(spec=SpecId(), events=()))
    with pytest.raises((FormatError, BundleError)):
        read_measured(data, log)


def test_two_equal_manifests_have_no_differences() -> None:
    assert diff(IMAGE, IMAGE) == []


def test_a_new_build_is_described() -> None:
    new = statement("two", 2, revoked=[image_id("one")])
    text = "\n".join(diff(IMAGE, new))
    for what in ("version: 1 -> 2", "disk.raw", "UKI", "command line", "initrd", image_id("one").hex()):
        assert what in text, what
    assert "separator" not in text  # what is the same is left out
    assert "ACPI" not in text


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((event(3, "initrd", "image", content="another"),), "rtmr2: initrd"),
        ((), "no longer measured"),
    ],
)
def test_one_inserted_or_missing_event_is_one_line(events: tuple[PredictedEvent, ...], words: str) -> None:
    """Not every event after it, too."""
    old = prediction().events
    at = next(at for at, item in enumerate(old) if item.note == "command line")
    new = replace(IMAGE, events=(*old[:at], *events, *old[at + (0 if events else 1) :]))
    lines = [line for line in diff(IMAGE, new) if line.startswith("rtmr2")]
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (statement("two", 2), statement("one", 1), "older release"),
        (IMAGE, statement("two", 1), "equivocation"),
        (IMAGE, statement("two", 2), "not revoked"),
        (statement("two", 2, revoked=[image_id("one")]), statement("three", 3), "revocation was dropped"),
        (IMAGE, replace(IMAGE, shapes=IMAGE.shapes[:2]), "no longer accepted"),
        (replace(IMAGE, shapes=IMAGE.shapes[:2]), IMAGE, "launch shape q35-2cpu-6g/qemu-9: new"),
        (IMAGE, replace(IMAGE, xfam=bytes(8)), "xfam"),
        (IMAGE, replace(IMAGE, mrseam=(sha384("module"),)), "TDX module"),
        (IMAGE, replace(IMAGE, not_after=IMAGE.not_after + 1), "valid"),
    ],
)
def test_what_matters_is_said(old: Manifest, new: Manifest, words: str) -> None:
    assert words in "\n".join(diff(old, new))
