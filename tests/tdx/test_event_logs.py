"""Event logs against quotes and manifests: replay, digests computed again, the first difference, words for people.

Genuine logs come from `vectors`. Single digests that stand here as hex are those of genuine logs of GKE and of Ubuntu
with GRUB, published with confidential-containers/trustee; what they are the hash of is built by hand beside them.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import CountermarkError, FormatError, MeasurementError
from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import BootEvents, boot_event_data, encode_boot_log, event_data
from countermark.formats.eventlog import DSTACK_RUNTIME_EVENT, EV_NO_ACTION, Event, EventLog, SpecId
from countermark.formats.manifest import ImageKind, Manifest, PredictedEvent, Shape
from countermark.formats.quote import TdReport, parse_quote
from countermark.tdx import eventlogs, runtime_log
from countermark.tdx.eventlogs import (
    DifferenceKind,
    DigestCheck,
    appraise_event_log,
    describe,
    first_difference,
    replay_against,
    require_digests,
    require_replay,
    verify_digests,
)
from countermark.tdx.registers import verify_event_log, verify_registers

DSTACK = "dstack-90c06f"
GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
SHIM = UUID("605dab50-e046-4300-abb6-3dd810dd8b23")


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def event(kind: int, data: bytes, digest: bytes | None = None, register: int = 1, name: str = "") -> Event:
    digest = sha384(data) if digest is None else digest
    return Event(register=register, event_type=kind, digest=digest, data=data, name=name)


def report() -> TdReport:
    return parse_quote(vectors.tdx(DSTACK).quote).body


def dstack_events() -> tuple[Event, ...]:
    return eventlog.parse_json_events(vectors.read(f"tdx/{DSTACK}/quote-report.json"))


def firmware_events() -> tuple[Event, ...]:
    return tuple(item for item in dstack_events() if item.event_type != DSTACK_RUNTIME_EVENT)


def ccel(events: tuple[Event, ...]) -> bytes:
    return eventlog.encode_event_log(EventLog(spec=SpecId(), events=events, padding=512))


def variable(name: str, data: bytes, guid: UUID = GLOBAL) -> bytes:
    return guid.bytes_le + struct.pack("<QQ", len(name), len(data)) + name.encode("utf-16-le") + data


# --- genuine logs --------------------------------------------------------------------------------------------------


def test_the_genuine_quote_report_replays_and_every_fixed_digest_is_recomputed() -> None:
    data = vectors.read(f"tdx/{DSTACK}/quote-report.json")
    found = appraise_event_log(data, vectors.tdx(DSTACK).quote)
    assert [(r.name, r.events, r.matches) for r in found.registers] == [
        *(("rtmr0", 13, True), ("rtmr1", 5, True)),
        *(("rtmr2", 2, True), ("rtmr3", 8, True)),
    ]
    assert found.digests.count(DigestCheck.RECOMPUTED) == 20
    assert found.digests.count(DigestCheck.NAMED) == 8
    assert found.digests.differing == ()
    runtime = [line for line in found.events if line.register == 4]
    assert [line.check for line in runtime] == [DigestCheck.RECOMPUTED] * 8
    assert runtime[2].description.startswith("compose-hash 3763bc34")
    found.require()
    without = appraise_event_log(data, None)
    assert [(r.quoted, r.matches) for r in without.registers] == [(None, None)] * 4
    assert [r.replayed for r in without.registers] == [r.replayed for r in found.registers]
    without.require()


def test_each_rule_holds_on_the_genuine_ccel() -> None:
    log = eventlog.parse_event_log(vectors.read("ccel/dstack/ccel.bin"))
    by_type: dict[str, set[DigestCheck]] = {}
    for item, check in zip(log.events, verify_digests(log.events).checks, strict=True):
        by_type.setdefault(eventlog.event_type_name(item.event_type), set()).add(check)
    recomputed, named = {DigestCheck.RECOMPUTED}, {DigestCheck.NAMED}
    assert by_type == {
        "EV_EFI_HANDOFF_TABLES2": named,
        "EV_EFI_PLATFORM_FIRMWARE_BLOB2": named,
        "EV_EFI_VARIABLE_DRIVER_CONFIG": recomputed,
        "EV_SEPARATOR": recomputed,
        "EV_PLATFORM_CONFIG_FLAGS": named,
        "EV_EFI_BOOT_SERVICES_APPLICATION": named,
        "EV_EFI_VARIABLE_BOOT": recomputed,
        "EV_EFI_ACTION": recomputed,
    }
    boot = [item for item in log.events if item.event_type == eventlog.EV_EFI_VARIABLE_BOOT]
    assert [item.digest for item in boot] == [sha384(item.data[50:]) for item in boot[:1]] + [sha384(boot[1].data[48:])]


def test_the_lone_genuine_ccel_replays_to_no_genuine_quote() -> None:
    """It is of another machine than the quotes: neither RTMR0 nor RTMR1 is in any of them."""
    log = vectors.read("ccel/dstack/ccel.bin")
    for name in vectors.TDX_AT:
        quote = vectors.tdx(name).quote[:4935] if name == "no-sept-ve" else vectors.tdx(name).quote
        registers = appraise_event_log(log, quote).registers
        assert [result.matches for result in registers[:2]] == [False, False], name
    unused = appraise_event_log(log, vectors.tdx(DSTACK).quote).registers
    assert (unused[2].events, unused[2].matches, unused[3].matches) == (0, False, None)


def test_a_firmware_log_is_not_about_rtmr3_unless_it_has_events_of_it() -> None:
    quote = vectors.tdx(DSTACK).quote
    firmware = appraise_event_log(ccel(firmware_events()), quote)
    assert [result.matches for result in firmware.registers] == [True, True, True, None]
    firmware.require()
    # dstack's newer binary form: runtime events follow, their data is what was hashed
    hashed = tuple(
        replace(item, name="", data=b"\x01\0\0\x08:" + item.name.encode() + b":" + item.data)
        for item in dstack_events()
        if item.event_type == DSTACK_RUNTIME_EVENT
    )
    whole = appraise_event_log(ccel(firmware_events() + hashed), quote)
    assert [result.matches for result in whole.registers] == [True] * 4
    assert whole.digests.count(DigestCheck.RECOMPUTED) == 20
    cut = appraise_event_log(ccel(firmware_events() + hashed[:-1]), quote)
    assert [result.matches for result in cut.registers] == [True, True, True, False]
    listed = [item for item in json.loads(vectors.dstack_report()["event_log"]) if item["imr"] != 3]
    short = appraise_event_log(json.dumps(listed).encode(), quote)
    assert [result.matches for result in short.registers] == [True, True, True, False]


# --- digests -------------------------------------------------------------------------------------------------------

GPT_TYPES = {
    "esp": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
    "root-x86-64": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    "root-x86-64-verity": "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5",
}
GPT_ENTRIES = (  # unique GUID, first and last block, attributes
    ("cb96a8e9-addc-4be7-b68e-69b6d1ea59cb", 0x800, 0x1007FF, 0),
    ("1a03b092-5a42-7bf5-4e87-2d7aaddc8ef9", 0x100800, 0x171067, 1 << 60),
    ("f95ce2c2-9153-ed2c-81b3-464046732101", 0x171068, 0x191067, 1 << 60),
)


def gpt() -> bytes:
    out = b"EFI PART" + struct.pack("<IIII", 0x10000, 92, 0x6779B3E0, 0)
    out += struct.pack("<QQQQ", 1, 0x19108F, 0x800, 0x19106E)
    out += UUID("31918d1c-a93a-45d1-a195-a84a9db04099").bytes_le + struct.pack("<QIII", 2, 128, 128, 0x0455113D)
    out += struct.pack("<Q", 3)
    for (name, kind), (unique, *rest) in zip(GPT_TYPES.items(), GPT_ENTRIES, strict=True):
        out += UUID(kind).bytes_le + UUID(unique).bytes_le + struct.pack("<QQQ", *rest)
        out += name.encode("utf-16-le").ljust(72, b"\0")
    return out


@pytest.mark.parametrize(
    ("kind", "data", "digest"),
    [
        (
            eventlog.EV_EFI_GPT_EVENT,
            gpt(),
            "b6e099f656683dd378713b57d252155436f47a885460912773e039168da0c29e03a987a3f0a9bbcfa683849afd6e7a9e",
        ),
        (
            eventlog.EV_EFI_VARIABLE_BOOT,
            variable("BootOrder", b"\1\0\0\0"),
            "7210af19145ec2a8e250a7fe8e9eeeac1301e524daab82366c36be614dc35402a289101e48cad61c45337f2f32c14fdc",
        ),
        (
            eventlog.EV_EFI_VARIABLE_AUTHORITY,
            variable("SbatLevel", b"sbat,1,2023012900\nshim,2\ngrub,3\ngrub.debian,4\n", SHIM),
            "a3b0bbcacbc398e4302bcb5017a06ce2daf4229f790b4ad85e538f9c194180f1f271f45ec4ec4c3ad1de377268524285",
        ),
        (
            eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG,
            variable("SecureBoot", b"\1"),
            "2cded0c6f453d4c6f59c5e14ec61abc6b018314540a2367cba326a52aa2b315ccc08ce68a816ce09c6ef2ac7e514ae1f",
        ),
        (
            eventlog.EV_IPL,  # systemd's stub: the section's name in UTF-16, hashed in ASCII with its NUL
            ".linux\0".encode("utf-16-le"),
            "2fdc8531577607d99031d70fb3063e9e4aecf50a7eaa9c2b0bcda5c5a6e111302996c138465920cadea4416d36089651",
        ),
        (
            eventlog.EV_EFI_ACTION,
            b"Calling EFI Application from Boot Option",
            "77a0dab2312b4e1e57a84d865a21e5b2ee8d677a21012ada819d0a98988078d3d740f6346bfe0abaa938ca20439a8d71",
        ),
    ],
)
def test_digests_of_genuine_events_follow_from_data_built_by_hand(kind: int, data: bytes, digest: str) -> None:
    item = event(kind, data, bytes.fromhex(digest))
    assert verify_digests([item]).checks == (DigestCheck.RECOMPUTED,)
    changed = replace(item, data=data[:-4] + b"X" + data[-3:])
    expected = DigestCheck.NAMED if kind == eventlog.EV_IPL else DigestCheck.DIFFERS
    assert verify_digests([changed]).checks == (expected,)


TAGGED = struct.pack("<II", 0x4141454C, 7) + b"one two"
NAME_V2 = b'{"event":"app-id","event_type":134217729,"payload":"aabb","version":2}'


@pytest.mark.parametrize(
    ("item", "check"),
    [
        (event(EV_NO_ACTION, b"StartupLocality\0\3", bytes(48)), DigestCheck.NOT_EXTENDED),
        (event(8, b"version", bytes(48), 0), DigestCheck.NOT_EXTENDED),
        (event(0x80000001, b"", sha384(b"x"), 1, "a tag"), DigestCheck.NO_DATA),
        (event(4, b"\0\0\0\0"), DigestCheck.RECOMPUTED),
        (event(4, b"\xff\xff\xff\xff"), DigestCheck.RECOMPUTED),
        (event(4, b"memory test failed", sha384(b"\1\0\0\0")), DigestCheck.RECOMPUTED),
        (event(4, b"\0\0\0\0", sha384(b"\xff\xff\xff\xff")), DigestCheck.DIFFERS),
        (event(4, b"", sha384(bytes(4))), DigestCheck.NO_DATA),
        (event(5, b"action"), DigestCheck.RECOMPUTED),
        (event(5, b"action", sha384(b"action\0")), DigestCheck.DIFFERS),
        (event(8, b"v1\0"), DigestCheck.RECOMPUTED),
        (event(8, b"v1\0", sha384(b"v1")), DigestCheck.DIFFERS),
        (event(0x80000001, variable("PK", b"key")), DigestCheck.RECOMPUTED),
        (event(0x80000001, variable("PK", b"key"), sha384(b"key")), DigestCheck.DIFFERS),
        (event(0x80000002, variable("Boot0000", b"path"), sha384(b"path")), DigestCheck.RECOMPUTED),
        (event(0x80000002, variable("Boot0000", b"path")), DigestCheck.RECOMPUTED),
        (event(0x80000002, variable("Boot0000", b"path"), sha384(b"pat")), DigestCheck.DIFFERS),
        (event(0x80000002, variable("Boot0000", b"path")[:-1], sha384(b"path")), DigestCheck.DIFFERS),
        (event(0x80000002, variable("Boot0000", b"path") + b"?", sha384(b"path")), DigestCheck.DIFFERS),
        (event(0x8000000C, variable("Boot0000", b"path")), DigestCheck.RECOMPUTED),
        (event(0x8000000C, variable("Boot0000", b"path"), sha384(b"path")), DigestCheck.DIFFERS),
        (event(0x800000E0, variable("db", b"cert")), DigestCheck.RECOMPUTED),
        (event(0x800000E0, variable("db", b"cert") + b"?", sha384(variable("db", b"cert"))), DigestCheck.RECOMPUTED),
        (event(0x800000E0, variable("db", b"cert"), sha384(b"cert")), DigestCheck.DIFFERS),
        (event(0x80000006, gpt()[:-1], sha384(gpt())), DigestCheck.DIFFERS),
        (event(0x8000000D, gpt()), DigestCheck.RECOMPUTED),
        (event(0x8000000D, gpt()[:-1], sha384(gpt())), DigestCheck.DIFFERS),
        (event(0x80000007, b"Exit", sha384(b"exit")), DigestCheck.DIFFERS),
        (event(0xD, b"grub_cmd: linux /k\0", sha384(b"linux /k")), DigestCheck.RECOMPUTED),
        (event(0xD, b"kernel_cmdline: /k ro\0", sha384(b"/k ro")), DigestCheck.RECOMPUTED),
        (event(0xD, b"grub_cmd: linux /k\0", sha384(b"linux /k\0")), DigestCheck.RECOMPUTED),
        (event(0xD, b"a title\0", sha384(b"a title")), DigestCheck.RECOMPUTED),
        (event(0xD, b"grub_cmd: linux /k\0", sha384(b"linux /K")), DigestCheck.NAMED),
        (event(0xD, b"/boot/vmlinuz\0", sha384(b"the file")), DigestCheck.NAMED),
        (event(0xD, "ro quiet\0".encode("utf-16-le")), DigestCheck.RECOMPUTED),
        (event(6, TAGGED, sha384(b"one two")), DigestCheck.RECOMPUTED),
        (event(6, TAGGED, sha384(b"one")), DigestCheck.NAMED),
        (event(0xA, b"ACPI DATA", sha384(b"tables")), DigestCheck.NAMED),
        (event(0x8000000A, b"\2Fv", sha384(b"volume")), DigestCheck.NAMED),
        (event(0x80000003, b"", sha384(b"image")), DigestCheck.NO_DATA),
        (event(0x12345678, b"x", sha384(b"y")), DigestCheck.NAMED),
        (event(0x08000001, b"\xaa\xbb", sha384(b"\1\0\0\x08:app-id:\xaa\xbb"), 4, "app-id"), DigestCheck.RECOMPUTED),
        (event(0x08000001, b"\xaa\xbb", sha384(NAME_V2), 4, "app-id"), DigestCheck.RECOMPUTED),
        (event(0x08000001, b"\xaa\xbc", sha384(NAME_V2), 4, "app-id"), DigestCheck.DIFFERS),
        (event(0x08000001, b"\xaa\xbb", sha384(b"\1\0\0\x08:app-id:\xaa\xbb"), 4, "app-ID"), DigestCheck.DIFFERS),
        (event(0x08000001, b"", sha384(b"x"), 4, "app-id"), DigestCheck.DIFFERS),
        (event(0x08000001, NAME_V2, sha384(NAME_V2), 4), DigestCheck.RECOMPUTED),
        (event(0x08000001, NAME_V2, sha384(b"x"), 4), DigestCheck.DIFFERS),
        (event(boot_events.EVENT_TYPE, b"data", None, 4), DigestCheck.RECOMPUTED),
        (event(boot_events.EVENT_TYPE, b"data", sha384(b"x"), 4), DigestCheck.DIFFERS),
    ],
)
def test_rules_of_each_type(item: Event, check: DigestCheck) -> None:
    summary = verify_digests([item])
    assert summary.checks == (check,)
    if check is DigestCheck.DIFFERS:
        assert summary.differing == (0,)
        with pytest.raises(MeasurementError) as refused:
            require_digests([item], summary)
        assert (refused.value.code, refused.value.step) == ("eventlog.digest", "6")
    else:
        require_digests([item], summary)


def test_the_formats_page_names_every_type_whose_digest_is_fixed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rule = page[page.index("An event's type and data are not measured") : page.index("The firmware's log must replay")]
    for kind in eventlogs._FIXED - {DSTACK_RUNTIME_EVENT, boot_events.EVENT_TYPE}:
        assert (f"0x{kind:X}" if kind > 9 else f" {kind}") in rule, hex(kind)


# --- tampering with a genuine log ----------------------------------------------------------------------------------


def swap(events: list[Event], first: int, second: int) -> None:
    events[first], events[second] = events[second], events[first]


def tampered(how: str) -> list[Event]:
    events = list(dstack_events())
    match how:
        case "reordered in rtmr0":
            swap(events, 2, 3)
        case "reordered in rtmr2":
            swap(events, 16, 17)
        case "reordered in rtmr3":
            swap(events, 22, 23)
        case "last event cut off":
            events.pop()
        case "first event cut off":
            events.pop(0)
        case "event left out of rtmr1":
            events.pop(14)
        case "event twice":
            events.insert(16, events[16])
        case "extra event in rtmr1":
            events.insert(15, event(eventlog.EV_EFI_ACTION, b"Exit Boot Services Invocation", None, 2))
        case "extra event in rtmr3":
            events.append(event(6, b"late", None, 4))
        case "moved to another register":
            events[16] = replace(events[16], register=2)
        case "extended, shown as EV_NO_ACTION":
            events[17] = replace(events[17], event_type=EV_NO_ACTION)
        case "digest changed":
            events[8] = replace(events[8], digest=bytes(48))
        case "data changed":
            events[14] = replace(events[14], data=b"Calling EFI Application from Boot Menus ")
        case "variable changed":
            events[2] = replace(events[2], data=variable("SecureBoot", b"\1"))
        case "runtime payload changed":
            events[22] = replace(events[22], data=bytes(32))
        case "runtime name changed":
            events[22] = replace(events[22], name="compose-hush")
    return events


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("reordered in rtmr0", "eventlog.rtmr0"),
        ("reordered in rtmr2", "eventlog.rtmr2"),
        ("reordered in rtmr3", "eventlog.rtmr3"),
        ("last event cut off", "eventlog.rtmr3"),
        ("first event cut off", "eventlog.rtmr0"),
        ("event left out of rtmr1", "eventlog.rtmr1"),
        ("event twice", "eventlog.rtmr2"),
        ("extra event in rtmr1", "eventlog.rtmr1"),
        ("extra event in rtmr3", "eventlog.rtmr3"),
        ("moved to another register", "eventlog.rtmr1"),
        ("extended, shown as EV_NO_ACTION", "eventlog.rtmr2"),
        ("digest changed", "eventlog.rtmr0"),
        ("data changed", "eventlog.digest"),
        ("variable changed", "eventlog.digest"),
        ("runtime payload changed", "eventlog.digest"),
        ("runtime name changed", "eventlog.digest"),
    ],
)
def test_a_tampered_genuine_log_is_refused(how: str, code: str) -> None:
    events = tampered(how)
    assert events != list(dstack_events())
    with pytest.raises(MeasurementError) as refused:
        require_replay(replay_against(report(), events))
        require_digests(events, verify_digests(events))
    assert (refused.value.code, refused.value.step) == (code, "6")
    if code == "eventlog.digest":
        written = tuple(item for item in events if item.event_type != DSTACK_RUNTIME_EVENT)
    else:
        written = ()
    if written and written != firmware_events():  # the same in a session, over the firmware's log
        with pytest.raises(MeasurementError) as refused:
            verify_event_log(report(), EventLog(spec=SpecId(), events=written))
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("events", "code"),
    [
        (lambda e: (e[1], e[0], *e[2:]), "eventlog.rtmr0"),
        (lambda e: e[:-1], "eventlog.rtmr1"),
        (lambda e: (*e, e[-1]), "eventlog.rtmr1"),
        (lambda e: (*e, event(6, b"extra", None, 3)), "eventlog.rtmr2"),
        (lambda e: (*e, event(6, b"not the firmware's", None, 4)), "eventlog.rtmr3"),
        (lambda e: (), "eventlog.rtmr0"),
    ],
)
def test_the_firmware_log_of_a_session(events, code: str) -> None:
    genuine = firmware_events()
    log = eventlog.parse_event_log(ccel(genuine))
    assert verify_event_log(report(), log)
    with pytest.raises(MeasurementError) as refused:
        verify_event_log(report(), replace(log, events=tuple(events(genuine))))
    assert refused.value.code == code


def test_a_log_cut_anywhere_inside_its_events_is_refused_or_replays_to_something_else() -> None:
    data = ccel(firmware_events())
    used = len(data.rstrip(b"\xff"))
    for size in random.Random(1).sample(range(used), 200):
        try:
            events = eventlog.parse_event_log(data[:size]).events
        except FormatError as err:
            assert err.code == "eventlog.truncated"
        else:
            assert eventlog.replay(events)[:3] != report().rtmrs[:3]


# --- the first difference from a manifest --------------------------------------------------------------------------

NOTES = {16: "kernel command line", 17: "initrd"}


def manifest(events: tuple[Event, ...]) -> tuple[Manifest, Shape]:
    """A manifest that predicts these firmware events; the ACPI tables depend on the launch shape."""
    rtmr0, rtmr1, rtmr2, _ = eventlog.replay(events)
    body = report()
    shape = Shape(name="small", mrtd=body.mrtd, rtmr0=rtmr0)
    other = Shape(name="large", mrtd=body.mrtd, rtmr0=bytes(48))
    predicted = tuple(
        PredictedEvent(
            register=item.register,
            event_type=item.event_type,
            digest=item.digest,
            source="launch" if item.event_type == 0xA else "image",
            shape="small" if item.event_type == 0xA else "",
            note=NOTES.get(at, ""),
        )
        for at, item in enumerate(events)
    )
    elsewhere = replace(predicted[8], shape="large", digest=bytes(48))
    image = Manifest(
        subjects=(),
        kind=ImageKind.TEST,
        platform="tdx",
        version=1,
        not_before=0,
        not_after=10,
        image_id=bytes(32),
        shapes=(shape, other),
        rtmr1=rtmr1,
        rtmr2=rtmr2,
        td_attributes=body.td_attributes,
        xfam=body.xfam,
        mrseam=(body.mrseam,),
        mrconfigid=body.mrconfigid,
        mrowner=body.mrowner,
        mrownerconfig=body.mrownerconfig,
        events=(elsewhere, *predicted),
    )
    return image, shape


def changed(at: int, **fields: object) -> tuple[Event, ...]:
    events = list(firmware_events())
    events[at] = replace(events[at], **fields)  # type: ignore[arg-type]
    return tuple(events)


def test_no_difference() -> None:
    events = firmware_events()
    image, shape = manifest(events)
    assert first_difference(image, shape, events) is None
    ignored = (event(EV_NO_ACTION, b"StartupLocality\0\3", bytes(48)), event(6, b"x", None, 0))
    assert first_difference(image, shape, (*events[:3], *ignored, *events[3:])) is None
    other = first_difference(image, replace(shape, name="large"), events)
    assert other is not None
    assert (other.register, other.position, other.kind) == (1, 0, DifferenceKind.MISSING)


@pytest.mark.parametrize(
    ("events", "register", "position", "kind", "note"),
    [
        (lambda e: changed(16, digest=sha384(b"ro init=/bin/sh")), 3, 0, DifferenceKind.CHANGED, "kernel command line"),
        (lambda e: changed(17, digest=sha384(b"another initrd")), 3, 1, DifferenceKind.CHANGED, "initrd"),
        (lambda e: (*e[:17], *e[18:]), 3, 1, DifferenceKind.MISSING, "initrd"),
        (lambda e: (*e[:16], *e[17:]), 3, 0, DifferenceKind.MISSING, "kernel command line"),
        (lambda e: (*e, event(6, b"late", None, 3)), 3, 2, DifferenceKind.EXTRA, None),
        (lambda e: (*e[:16], event(6, b"early", None, 3), *e[16:]), 3, 0, DifferenceKind.EXTRA, "kernel command line"),
        (lambda e: (*e[:17], e[16], *e[17:]), 3, 1, DifferenceKind.EXTRA, "initrd"),
        (lambda e: (*e[:16], e[17], e[16], *e[18:]), 3, 0, DifferenceKind.REORDERED, "kernel command line"),
        (lambda e: (*e, event(6, b"runtime", None, 4)), 4, 0, DifferenceKind.EXTRA, None),
        (lambda e: (), 1, 0, DifferenceKind.MISSING, ""),
        (lambda e: changed(14, digest=bytes(48)), 2, 1, DifferenceKind.CHANGED, ""),
    ],
)
def test_the_first_difference(events, register: int, position: int, kind: DifferenceKind, note: str | None) -> None:
    image, shape = manifest(firmware_events())
    logged = tuple(events(firmware_events()))
    for chosen in (None, register):
        found = first_difference(image, shape, logged, register=chosen)
        assert found is not None
        assert (found.register, found.position, found.kind) == (register, position, kind)
        assert (found.expected.note if found.expected else None) == note
    in_register = [item for item in logged if item.register == register]
    assert found.found == (in_register[position] if position < len(in_register) else None)
    assert note is None or note in str(found)
    for untouched in {1, 2, 3} - {register} if logged else set():
        assert first_difference(image, shape, logged, register=untouched) is None


def test_a_digest_that_came_before_does_not_make_a_changed_event_an_extra_one() -> None:
    separator = event(eventlog.EV_SEPARATOR, bytes(4), None, 2)
    events = (*firmware_events(), separator)  # its digest stands in RTMR1 before
    image, shape = manifest(events)
    found = first_difference(image, shape, (*events[:-1], replace(separator, digest=bytes(48))))
    assert found is not None
    assert (found.register, found.position, found.kind) == (2, 5, DifferenceKind.CHANGED)


@pytest.mark.parametrize(("at", "note"), [(16, "kernel command line"), (17, "initrd")])
def test_a_changed_command_line_or_initrd_with_the_same_mrtd_is_named(at: int, note: str) -> None:
    image, shape = manifest(firmware_events())
    events = changed(at, digest=sha384(b"something else"))
    body = replace(report(), rtmr2=eventlog.replay(events)[2])
    assert body.mrtd == shape.mrtd
    log = EventLog(spec=SpecId(), events=events)
    arguments = {"platform": "tdx", "claimed": bytes(32), "now": 5}
    good = verify_registers(report(), [image], ccel=replace(log, events=firmware_events()), **arguments)  # type: ignore[arg-type]
    assert good == (image, shape)
    with pytest.raises(MeasurementError) as refused:
        verify_registers(body, [image], ccel=log, **arguments)  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.step) == ("measurement.rtmr2", "5")
    found = first_difference(image, shape, events, register=3)
    assert str(found) in str(refused.value)
    assert note in str(found)
    with pytest.raises(MeasurementError) as refused:  # a log that shows the expected events explains nothing
        verify_registers(body, [image], ccel=replace(log, events=firmware_events()), **arguments)  # type: ignore[arg-type]
    assert refused.value.code == "measurement.rtmr2"
    assert note not in str(refused.value)
    lying = replace(log, events=changed(at, digest=bytes(48)))  # nor does one that shows another change
    with pytest.raises(MeasurementError) as refused:
        verify_registers(body, [image], ccel=lying, **arguments)  # type: ignore[arg-type]
    assert refused.value.code == "measurement.rtmr2"
    assert note not in str(refused.value)


# --- RTMR3: our own log --------------------------------------------------------------------------------------------

BOOT = BootEvents(
    image_id=b"i" * 32,
    config=b"c" * 32,
    weights_root=b"w" * 32,
    profile="exact-v1",
    kernel_digest=b"n" * 32,
    gpus=(),
    keys=b"k" * 32,
)
DATA = boot_event_data(BOOT)


def extended(*data: bytes, start: bytes = bytes(48)) -> bytes:
    register = start
    for item in data:
        register = sha384(register + sha384(item))
    return register


def verify_runtime_log(data: bytes, register: bytes) -> BootEvents:
    """As an appraisal does it: parsed in step 1, judged in step 6."""
    return runtime_log.verify_runtime_log(eventlog.parse_event_log(data), register)


def test_the_runtime_log_that_is_the_register() -> None:
    assert verify_runtime_log(encode_boot_log(DATA), extended(*DATA)) == BOOT


OTHER_WEIGHTS = boot_event_data(replace(BOOT, weights_root=bytes(32)))


@pytest.mark.parametrize(
    ("log", "register", "code"),
    [
        # a claim that was never extended: the log has it, the register does not
        (DATA, extended(*DATA[:2], *DATA[3:]), "rtmr3.replay"),
        (OTHER_WEIGHTS, extended(*DATA), "rtmr3.replay"),
        (DATA, bytes(48), "rtmr3.replay"),
        (DATA, extended(*DATA[:-1]), "rtmr3.replay"),
        # extended after system-ready: shown, or not
        (
            (*DATA, event_data("config", b"x" * 32)),
            extended(*DATA, event_data("config", b"x" * 32)),
            "rtmr3.after_ready",
        ),
        ((*DATA, DATA[-1]), extended(*DATA, DATA[-1]), "rtmr3.after_ready"),
        (DATA, extended(*DATA, b"late"), "rtmr3.replay"),
        # not from zero
        (DATA, extended(*DATA, start=b"\1" + bytes(47)), "rtmr3.replay"),
        (DATA, extended(b"early", *DATA), "rtmr3.replay"),
        # reordered, truncated, duplicated, with an extra event; the register agrees with the log each time
        ((DATA[1], DATA[0], *DATA[2:]), extended(DATA[1], DATA[0], *DATA[2:]), "rtmr3.order"),
        (DATA[:-1], extended(*DATA[:-1]), "rtmr3.order"),
        (DATA[1:], extended(*DATA[1:]), "rtmr3.order"),
        ((), bytes(48), "rtmr3.order"),
        ((DATA[0], *DATA), extended(DATA[0], *DATA), "rtmr3.order"),
        ((*DATA[:3], event_data("debug-shell", None), *DATA[3:]), bytes(48), "rtmr3.order"),
        ((*DATA[:2], event_data("weights-root", b"short"), *DATA[3:]), bytes(48), "rtmr3.value"),
        ((*DATA[:2], b"\x82\x01", *DATA[3:]), bytes(48), "cbor.malformed"),
    ],
)
def test_the_runtime_log_is_refused(log: tuple[bytes, ...], register: bytes, code: str) -> None:
    with pytest.raises(MeasurementError) as refused:
        verify_runtime_log(encode_boot_log(log), register)
    assert (refused.value.code, refused.value.step) == (code, "6")


@pytest.mark.parametrize(
    ("log", "code"),
    [
        (encode_boot_log(DATA) + b"\0", "rtmr3.header"),
        (encode_boot_log(DATA) + b"\xff", "rtmr3.header"),
        (b"\1" + encode_boot_log(DATA)[1:], "rtmr3.header"),
        (encode_boot_log(DATA).replace(sha384(DATA[2]), sha384(OTHER_WEIGHTS[2])), "rtmr3.digest"),
        (encode_boot_log(DATA).replace(b"\4\0\0\0\1\0\x4d\x43", b"\3\0\0\0\1\0\x4d\x43", 1), "rtmr3.kind"),
    ],
)
def test_the_bytes_of_the_runtime_log(log: bytes, code: str) -> None:
    with pytest.raises(MeasurementError) as refused:
        verify_runtime_log(log, extended(*DATA))
    assert (refused.value.code, refused.value.step) == (code, "6")


def test_every_bit_of_the_runtime_log_counts() -> None:
    log, register = encode_boot_log(DATA), extended(*DATA)
    for at in range(len(log)):
        for bit in range(8):
            flipped = bytearray(log)
            flipped[at] ^= 1 << bit
            with pytest.raises((FormatError, MeasurementError)):
                verify_runtime_log(bytes(flipped), register)


def test_a_runtime_log_that_is_cut_is_no_log() -> None:
    with pytest.raises(FormatError) as refused:
        verify_runtime_log(encode_boot_log(DATA)[:-1], extended(*DATA))
    assert refused.value.code == "eventlog.truncated"


# --- words ---------------------------------------------------------------------------------------------------------


def image_event(path: bytes) -> bytes:
    return struct.pack("<QQQQ", 1, 2, 0, len(path)) + path


def node(kind: int, subtype: int, body: bytes) -> bytes:
    return struct.pack("<BBH", kind, subtype, len(body) + 4) + body


FILE = node(4, 4, "\\EFI\\BOOT\\BOOTX64.EFI\0".encode("utf-16-le"))
DISK = node(2, 1, bytes(8)) + node(1, 1, b"\0\4") + node(3, 23, bytes(12)) + node(4, 1, b"\x0f" + bytes(37))
END = node(0x7F, 0xFF, b"")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (event(0x80000001, variable("SecureBoot", b"\1")), "SecureBoot = 01"),
        (event(0x800000E0, variable("MokListRT", bytes(900), SHIM)), "MokListRT (900 bytes)"),
        (event(0x80000003, image_event(DISK + FILE + END)), "Acpi/Pci(4,0)/Path(3,23)/HD(15)/\\EFI\\BOOT\\BOOTX64.EFI"),
        (event(0x80000003, image_event(b"")), "no device path"),
        (event(0x80000003, image_event(struct.pack("<BBH", 1, 1, 3) * 9)), "no device path"),
        (event(0x80000006, gpt()), "3 partitions: esp, root-x86-64, root-x86-64-verity"),
        (event(0x8000000A, b"\5Fv(X)" + bytes(16)), "Fv(X)"),
        (event(0x8000000A, b"\xf0Fv"), "f04676"),
        (event(6, struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0"), "tag 0x8f3b22ec Linux initrd"),
        (event(4, bytes(4)), "00000000"),
        (event(0xD, "ro quiet\0".encode("utf-16-le")), "ro quiet"),
        (event(0xD, b"grub_cmd: boot\0"), "grub_cmd: boot"),
        (event(0xA, b"\x1b[2J\x07"), "1b5b324a07"),
        (event(0xA, b""), ""),
        (event(0x08000001, b"\1\2", None, 4, "app-id"), "app-id 0102"),
        (event(0x08000001, b"", None, 4, "a\x1b[2J\u202eb"), "a\\x1b[2J\\u202eb"),
    ],
)
def test_description(item: Event, words: str) -> None:
    assert describe(item) == words


KINDS = st.sampled_from(sorted(eventlog.EVENT_TYPES)) | st.integers(0, 2**32 - 1)


@settings(max_examples=400, deadline=1000)
@given(KINDS, st.binary(max_size=300) | st.builds(image_event, st.binary(max_size=99)), st.text(max_size=300))
def test_words_are_bounded_printable_ascii_whatever_comes(kind: int, data: bytes, name: str) -> None:
    for item in (event(kind, data), event(kind, data, name=name)):
        words = describe(item)
        assert len(words) <= eventlogs.MAX_WORDS
        assert words.isascii()
        assert words == "" or words.isprintable()
        assert verify_digests([item]).checks[0] in (
            DigestCheck.RECOMPUTED,
            DigestCheck.NOT_EXTENDED,
            DigestCheck.NO_DATA,
        ) or (kind == DSTACK_RUNTIME_EVENT)


@pytest.mark.parametrize(
    "item",
    [
        event(0x80000003, image_event(node(4, 4, b"") * 5000)),
        event(0x80000003, image_event(struct.pack("<BBH", 1, 1, 0) * 5000)),
        event(0x80000003, struct.pack("<QQQQ", 0, 0, 0, 2**64 - 1)),
        event(0x80000006, bytes(92) + struct.pack("<Q", 2**64 - 1) + bytes(60_000)),
        event(0x80000001, bytes(16) + struct.pack("<QQ", 2**63, 2**63)),
        event(6, struct.pack("<II", 0, 2**32 - 1) + bytes(9)),
        event(0xD, b"A\0" * 32_000),
        event(0xD, "\u202e".encode("utf-16-le") * 32_000),
    ],
)
def test_hostile_lengths(item: Event) -> None:
    assert len(describe(item)) <= eventlogs.MAX_WORDS
    verify_digests([item])


def test_long_lists_are_cut() -> None:
    assert eventlogs._image(image_event(node(2, 1, b"") * 5000)).count("Acpi") == 32
    assert eventlogs._partitions(bytes(92) + struct.pack("<Q", 400) + bytes(128 * 400)).count(",") == 7


def test_as_json() -> None:
    value = appraise_event_log(vectors.read(f"tdx/{DSTACK}/quote-report.json"), vectors.tdx(DSTACK).quote).as_json()
    assert json.loads(json.dumps(value)) == value
    assert value["form"] == "dstack"
    assert {name: item["matches"] for name, item in value["registers"].items()} == dict.fromkeys(
        ("rtmr0", "rtmr1", "rtmr2", "rtmr3"), True
    )
    assert value["registers"]["rtmr1"]["quoted"] == report().rtmr1.hex()
    assert value["digests"] == {"recomputed": 20, "named": 8, "no_data": 0, "not_extended": 0, "differs": 0}
    assert value["events"][14] == {
        "register": "rtmr1",
        "type": "EV_EFI_ACTION",
        "description": "Calling EFI Application from Boot Option",
        "digest": sha384(b"Calling EFI Application from Boot Option").hex(),
        "check": "recomputed",
    }


def test_mutated_genuine_logs_are_appraised_or_refused_as_malformed() -> None:
    chance, quote = random.Random(38), vectors.tdx(DSTACK).quote
    seeds = (ccel(firmware_events()), vectors.dstack_report()["event_log"].encode())
    refused = 0
    for turn in range(2000):
        data = bytearray(seeds[turn % 2])
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(2400)] = chance.randrange(256)
        try:
            found = appraise_event_log(bytes(data), quote if turn % 20 < 2 else None)
        except FormatError as err:
            assert err.code.startswith("eventlog.")
            refused += 1
        else:
            assert all(line.description.isascii() and len(line.description) <= 160 for line in found.events)
    assert 200 < refused < 1800


def test_malformed_input_is_a_format_error() -> None:
    for log, quote in ((b"", None), (b"{}", None), (vectors.read("ccel/dstack/ccel.bin"), b"not a quote")):
        with pytest.raises(FormatError):
            appraise_event_log(log, quote)
    assert issubclass(FormatError, CountermarkError)
