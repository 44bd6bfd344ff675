"""Event logs: a genuine CCEL area, a genuine JSON log that replays to its quote, and mutations of both forms."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import FormatError
from countermark.formats.eventlog import (
    DSTACK_RUNTIME_EVENT,
    EV_NO_ACTION,
    Event,
    EventLog,
    SpecId,
    dstack_event_digest,
    encode_event_log,
    parse_event_log,
    parse_json_events,
    replay,
)
from countermark.formats.quote import parse_quote


def event(register: int = 4, kind: int = 6, data: bytes = b"data") -> Event:
    return Event(register=register, event_type=kind, digest=hashlib.sha384(data).digest(), data=data)


LOG = encode_event_log(EventLog(spec=SpecId(), events=(event(1), event(2), event(4, data=b"")), padding=40))


def test_genuine_ccel_parses_to_its_last_byte():
    data = vectors.read("ccel/dstack/ccel.bin")
    log = parse_event_log(data)
    assert encode_event_log(log) == data
    assert (len(log.events), len(data) - log.padding) == (18, 1933)
    separator = [e for e in log.events if e.event_type == 4]
    assert [e.digest for e in separator] == [hashlib.sha384(bytes(4)).digest()] * 2


def test_genuine_json_log_replays_to_all_four_registers():
    events = parse_json_events(vectors.read("tdx/dstack-90c06f/quote-report.json"))
    assert parse_json_events(vectors.dstack_report()["event_log"].encode()) == events
    assert replay(events) == parse_quote(vectors.tdx("dstack-90c06f").quote).body.rtmrs
    runtime = [e for e in events if e.event_type == DSTACK_RUNTIME_EVENT]
    assert len(runtime) == 8
    assert all(dstack_event_digest(e) == e.digest for e in runtime)
    assert replay(reversed(events)) != replay(events)


def test_replay_is_the_hash_chain_of_each_register():
    first, second = event(2, data=b"a"), event(2, data=b"b")
    chain = hashlib.sha384(hashlib.sha384(bytes(48) + first.digest).digest() + second.digest).digest()
    ignored = (event(0), event(2, EV_NO_ACTION))
    assert replay((first, *ignored, second)) == (bytes(48), chain, bytes(48), bytes(48))


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0, 5, "eventlog.register"),
        (4, 4, "eventlog.spec_id"),
        (8, 1, "eventlog.spec_id"),
        (32, 0, "eventlog.spec_id"),
        (56, 2, "eventlog.algorithms"),
        (60, 11, "eventlog.algorithms"),
        (65, 9, "eventlog.register"),
        (73, 2, "eventlog.digest_count"),
        (77, 4, "eventlog.digest_algorithm"),
        (129, 1, "eventlog.event_size"),
        (-1, 0, "eventlog.trailing"),
    ],
)
def test_refuses(offset, value, code):
    data = bytearray(LOG)
    data[offset] = value
    with pytest.raises(FormatError) as refused:
        parse_event_log(bytes(data))
    assert refused.value.code == code


def test_refuses_sizes():
    for data, code in (
        (LOG[:-41], "eventlog.truncated"),
        (b"", "eventlog.truncated"),
        (LOG + bytes(2_000_000), "eventlog.too_long"),
        (encode_event_log(EventLog(spec=SpecId(), events=(event(data=b""),) * 4097)), "eventlog.too_many"),
    ):
        with pytest.raises(FormatError) as refused:
            parse_event_log(data)
        assert refused.value.code == code
    with pytest.raises(FormatError):
        named = Event(register=1, event_type=1, digest=bytes(48), data=b"", name="x")
        encode_event_log(EventLog(spec=SpecId(), events=(named,)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(LOG) - 1), st.integers(0, 255), st.integers(-60, 9))
def test_every_byte_is_accounted_for(offset, value, resize):
    changed = bytearray(LOG)
    changed[offset] = value
    mutated = bytes(changed[:resize] if resize < 0 else changed + b"\xff" * resize)
    try:
        log = parse_event_log(mutated)
    except FormatError as err:
        assert err.code.startswith("eventlog.")
    else:
        assert encode_event_log(log) == mutated


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(event, st.integers(0, 4), st.integers(0, 2**32 - 1), st.binary(max_size=99)), max_size=9))
def test_round_trip(events):
    log = EventLog(spec=SpecId(vendor_info=b"v"), events=tuple(events))
    assert parse_event_log(encode_event_log(log)) == log


JSON_EVENT = {"imr": 3, "event_type": 1, "digest": "00" * 48, "event": "x", "event_payload": "ff", "other": None}


def test_json_tolerates_unknown_members():
    assert parse_json_events(json.dumps([JSON_EVENT]).encode())[0].register == 4


@pytest.mark.parametrize(
    "change",
    [
        {"imr": 4},
        {"imr": -1},
        {"imr": True},
        {"imr": None},
        {"event_type": 2**32},
        {"event_type": -1},
        {"digest": "00"},
        {"digest": "zz" * 48},
        {"digest": None},
        {"event": 1},
        {"event": "\ud800"},
        {"event_payload": "0"},
    ],
)
def test_json_refuses(change):
    with pytest.raises(FormatError) as refused:
        parse_json_events(json.dumps([JSON_EVENT | change]).encode())
    assert refused.value.code == "eventlog.json"


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"1", b"[1]", b'{"event_log": 3}', b'[{"imr":1,"imr":2}]', b"\xff", b"NaN"]
)
def test_json_refuses_other_texts(text):
    with pytest.raises(FormatError):
        parse_json_events(text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    for parse in (parse_event_log, parse_json_events):
        try:
            parse(data)
        except FormatError as err:
            assert err.code.startswith("eventlog.")
