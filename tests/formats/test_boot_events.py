"""The RTMR3 log: one good log, one row for each way to break its grammar."""

import hashlib
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import cbor, eventlog
from countermark.formats.boot_events import (
    NAMES,
    BootEvents,
    GpuIdentity,
    GpuMode,
    boot_event_data,
    encode_boot_log,
    event_data,
    parse_boot_log,
)
from countermark.formats.eventlog import Event, EventLog, SpecId

ON = GpuMode.CC_ON.value
BOOT = BootEvents(
    image_id=b"i" * 32,
    config=b"c" * 32,
    weights_root=b"w" * 32,
    profile="exact-v1",
    kernel_digest=b"n" * 32,
    gpus=(
        GpuIdentity(device_key=b"1" * 32, mode=ON, devtools=False),
        GpuIdentity(device_key=b"2" * 32, mode=ON, devtools=False),
    ),
    keys=b"k" * 32,
)
DATA = boot_event_data(BOOT)
LOG = encode_boot_log(DATA)


def test_round_trip_and_register():
    assert parse_boot_log(LOG) == BOOT
    assert encode_boot_log(boot_event_data(parse_boot_log(LOG))) == LOG
    register = bytes(48)
    for data, name in zip(DATA, NAMES, strict=True):
        assert cbor2.loads(data)[0] == name
        register = hashlib.sha384(register + hashlib.sha384(data).digest()).digest()
    assert eventlog.replay(eventlog.parse_event_log(LOG).events) == (bytes(48), bytes(48), bytes(48), register)


def test_gpus_are_sorted_whatever_the_order():
    assert boot_event_data(replace(BOOT, gpus=BOOT.gpus[::-1])) == DATA
    assert parse_boot_log(encode_boot_log(boot_event_data(replace(BOOT, gpus=())))).gpus == ()


def with_value(name: str, value: object) -> bytes:
    return encode_boot_log(tuple(event_data(n, value) if n == name else d for n, d in zip(NAMES, DATA, strict=True)))


GPU = [b"1" * 32, ON, False]


@pytest.mark.parametrize(
    ("log", "code"),
    [
        (encode_boot_log(DATA[:-1]), "rtmr3.order"),
        (encode_boot_log(()), "rtmr3.order"),
        (encode_boot_log((*DATA, DATA[0])), "rtmr3.after_ready"),
        (encode_boot_log((DATA[1], DATA[0], *DATA[2:])), "rtmr3.order"),
        (encode_boot_log((DATA[0], *DATA)), "rtmr3.order"),
        (encode_boot_log((event_data("other", 1), *DATA[1:])), "rtmr3.order"),
        (encode_boot_log((cbor.encode("image-id"), *DATA[1:])), "rtmr3.order"),
        (encode_boot_log((b"\xff", *DATA[1:])), "cbor.malformed"),
        (LOG + b"\xff", "rtmr3.header"),
        (encode_boot_log(DATA).replace(b"\4\0\0\0\3\0\0\0", b"\1\0\0\0\3\0\0\0", 1), "rtmr3.header"),
        (with_value("image-id", b"short"), "rtmr3.value"),
        (with_value("config", "text"), "rtmr3.value"),
        (with_value("numerics", b"n" * 32), "rtmr3.value"),
        (with_value("numerics", ["", b"n" * 32]), "rtmr3.value"),
        (with_value("numerics", ["exact\n", b"n" * 32]), "rtmr3.value"),
        (with_value("gpu", None), "rtmr3.value"),
        (with_value("gpu", [GPU, GPU]), "rtmr3.value"),
        (with_value("gpu", [[b"2" * 32, ON, False], GPU]), "rtmr3.value"),
        (with_value("gpu", [[b"1" * 32, "on", False]]), "rtmr3.value"),
        (with_value("gpu", [[b"1" * 32, ON, 0]]), "rtmr3.value"),
        (with_value("gpu", [[b"1" * 31, ON, False]]), "rtmr3.value"),
        (with_value("system-ready", 1), "rtmr3.value"),
    ],
)
def test_refuses(log, code):
    with pytest.raises(FormatError) as refused:
        parse_boot_log(log)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [({"register": 3}, "rtmr3.kind"), ({"event_type": 6}, "rtmr3.kind"), ({"digest": bytes(48)}, "rtmr3.digest")],
)
def test_refuses_other_events(change, code):
    log = eventlog.parse_event_log(LOG)
    events: tuple[Event, ...] = (replace(log.events[0], **change), *log.events[1:])
    with pytest.raises(FormatError) as refused:
        parse_boot_log(eventlog.encode_event_log(EventLog(spec=SpecId(register=4), events=events)))
    assert refused.value.code == code


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(LOG) - 1), st.integers(0, 255), st.binary(max_size=200))
def test_arbitrary_bytes(offset, value, data):
    changed = bytearray(LOG)
    changed[offset] = value
    for attempt in (bytes(changed), LOG[:65] + data, data):
        try:
            parsed = parse_boot_log(attempt)
        except FormatError:
            continue
        assert encode_boot_log(boot_event_data(parsed)) == attempt
