"""Event logs: a genuine CCEL area, a genuine JSON log that replays to its quote, and mutations of both forms."""

import base64
import hashlib
import json
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import FormatError
from countermark.formats.eventlog import (
    DSTACK_RUNTIME_EVENT,
    EV_NO_ACTION,
    EVENT_TYPES,
    Event,
    EventLog,
    LogForm,
    SpecId,
    dstack_event_digest,
    encode_event_log,
    event_type_name,
    parse_event_log,
    parse_json_events,
    read_events,
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
        (56, 0, "eventlog.algorithms"),
        (56, 17, "eventlog.algorithms"),
        (56, 2, "eventlog.truncated"),
        (60, 11, "eventlog.algorithms"),
        (62, 32, "eventlog.algorithms"),
        (64, 1, "eventlog.truncated"),
        (65, 9, "eventlog.register"),
        (73, 2, "eventlog.digest_count"),
        (73, 0, "eventlog.digest_count"),
        (77, 4, "eventlog.digest_algorithm"),
        (129, 1, "eventlog.event_size"),
        (-1, 0, "eventlog.trailing"),
        (-1, 1, "eventlog.trailing"),
        (-40, 0, "eventlog.register"),
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


# --- several algorithms, padding -----------------------------------------------------------------------------------

SHA1, SHA256, SHA384, SHA512, SM3 = 0x04, 0x0B, 0x0C, 0x0D, 0x12
SIZES = {SHA1: 20, SHA256: 32, SHA384: 48, SHA512: 64, SM3: 32, 0x7777: 5}
DIGEST = {SHA1: hashlib.sha1, SHA256: hashlib.sha256, SHA384: hashlib.sha384, SHA512: hashlib.sha512}


def spec_id(algorithms: dict[int, int], *, count: int | None = None, vendor: bytes = b"") -> bytes:
    """The header, packed by hand after PFP 1.06 section 10.4.5.1."""
    body = b"Spec ID Event03\0" + struct.pack("<IBBBB", 0, 0, 2, 105, 2)
    body += struct.pack("<I", len(algorithms) if count is None else count)
    body += b"".join(struct.pack("<HH", *item) for item in algorithms.items())
    body += bytes((len(vendor),)) + vendor
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(body)) + body


def record(register: int, kind: int, data: bytes, algorithms: tuple[int, ...]) -> bytes:
    out = struct.pack("<III", register, kind, len(algorithms))
    for algorithm in algorithms:
        made = DIGEST[algorithm](data).digest() if algorithm in DIGEST else b"?" * SIZES[algorithm]
        out += struct.pack("<H", algorithm) + made
    return out + struct.pack("<I", len(data)) + data


MANY = (SHA1, SHA256, SHA384, SHA512, SM3, 0x7777)


def test_digests_of_several_algorithms_in_any_order():
    header = spec_id({algorithm: SIZES[algorithm] for algorithm in MANY}, vendor=b"maker")
    shuffled = random.Random(5).sample(MANY, len(MANY))
    data = header + record(1, 4, b"a", MANY) + record(2, 5, b"b", tuple(shuffled)) + record(3, 7, b"c", (SHA384,))
    log = parse_event_log(data)
    assert log.events == (event(1, 4, b"a"), event(2, 5, b"b"), event(3, 7, b"c"))
    assert log.spec == SpecId(
        register=0,
        version=b"\0\2i",
        algorithms=tuple((algorithm, SIZES[algorithm]) for algorithm in MANY),
        vendor_info=b"maker",
    )
    with pytest.raises(FormatError) as refused:
        encode_event_log(log)  # we write SHA-384 alone
    assert refused.value.code == "eventlog.algorithms"


@pytest.mark.parametrize(
    ("header", "body", "code"),
    [
        (spec_id({SHA256: 32}), b"", "eventlog.algorithms"),
        (spec_id({SHA256: 20, SHA384: 48}), b"", "eventlog.algorithms"),
        (spec_id({0x7777: 0, SHA384: 48}), b"", "eventlog.algorithms"),
        (spec_id({0x7777: 129, SHA384: 48}), b"", "eventlog.algorithms"),
        (spec_id(dict.fromkeys(range(28672, 28688), 5) | {SHA384: 48}), b"", "eventlog.algorithms"),
        (spec_id({SHA384: 48}, count=2), b"", "eventlog.truncated"),
        (spec_id({SHA384: 48, SHA256: 32}, count=1), b"", "eventlog.truncated"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", (SHA1,)), "eventlog.digest_algorithm"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", (SHA384, SHA384)), "eventlog.digest_algorithm"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", (SHA384, SHA256)), "eventlog.digest_algorithm"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", (SHA1, SHA384, SHA256)), "eventlog.digest_count"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", ()), "eventlog.digest_count"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"data", (SHA1, SHA384))[:-1], "eventlog.truncated"),
        (spec_id({SHA1: 20, SHA384: 48}), record(1, 4, b"", (SHA1, SHA384))[:40], "eventlog.truncated"),
    ],
)
def test_refuses_other_algorithms(header, body, code):
    with pytest.raises(FormatError) as refused:
        parse_event_log(header + body)
    assert refused.value.code == code


def test_spec_id_names_an_algorithm_once():
    twice = spec_id({SHA384: 48, SHA256: 32}).replace(struct.pack("<HH", SHA256, 32), struct.pack("<HH", SHA384, 48))
    with pytest.raises(FormatError) as refused:
        parse_event_log(twice)
    assert refused.value.code == "eventlog.algorithms"


@pytest.mark.parametrize("fill", [0x00, 0xFF])
@pytest.mark.parametrize("last", [b"", b"\0\0\0\0", b"\xff" * 9, b"end"])
@pytest.mark.parametrize("padding", [0, 1, 3, 4, 11, 12, 65536])
def test_padding_is_all_ff_or_all_zero_whatever_the_last_event_ends_in(fill, last, padding):
    log = EventLog(
        spec=SpecId(), events=(event(1), event(2, data=last)), padding=padding, fill=fill if padding else 0xFF
    )
    assert parse_event_log(encode_event_log(log)) == log


@pytest.mark.parametrize(
    "rest", [b"\xff" * 8 + b"\0" * 8, b"\0" * 16 + b"\xff" * 8, b"\0" * 12 + b"x", b"\xff" * 12 + b"x"]
)
def test_mixed_padding_is_refused(rest):
    with pytest.raises(FormatError) as refused:
        parse_event_log(encode_event_log(EventLog(spec=SpecId(), events=(event(1),))) + rest)
    assert refused.value.code == "eventlog.trailing"


def test_the_last_event_may_be_mostly_zeros():
    """An EV_NO_ACTION event without data: everything behind its algorithm is zero, and it is an event all the same."""
    last = Event(register=1, event_type=EV_NO_ACTION, digest=bytes(48), data=b"")
    log = EventLog(spec=SpecId(), events=(event(1), last), padding=33, fill=0)
    assert parse_event_log(encode_event_log(log)) == log


def test_no_action_in_the_middle_extends_nothing():
    locality = Event(register=1, event_type=EV_NO_ACTION, digest=bytes(48), data=b"StartupLocality\0\3")
    events = (event(1), locality, event(1, data=b"next"))
    parsed = parse_event_log(encode_event_log(EventLog(spec=SpecId(), events=events))).events
    assert parsed == events
    assert replay(parsed) == replay((events[0], events[2]))
    assert not locality.extends


def test_the_acpi_table_is_not_the_log():
    with pytest.raises(FormatError) as refused:
        parse_event_log(b"CCEL" + struct.pack("<I", 56) + bytes(48))
    assert refused.value.code == "eventlog.acpi_table"


def test_event_types_have_their_tcg_names():
    assert event_type_name(0x80000001) == "EV_EFI_VARIABLE_DRIVER_CONFIG"
    assert event_type_name(0x800000E0) == "EV_EFI_VARIABLE_AUTHORITY"
    assert event_type_name(0xD) == "EV_IPL"
    assert event_type_name(0x434D0001) == "0x434d0001"
    assert len(set(EVENT_TYPES.values())) == len(EVENT_TYPES)


# --- JSON ----------------------------------------------------------------------------------------------------------

JSON_EVENT = {"imr": 3, "event_type": 1, "digest": "00" * 48, "event": "x", "event_payload": "ff", "other": None}


def test_json_tolerates_unknown_members():
    assert parse_json_events(json.dumps([JSON_EVENT]).encode())[0].register == 4


@pytest.mark.parametrize(
    "report",
    [
        {"event_log": [JSON_EVENT]},
        {"event_log": json.dumps([JSON_EVENT])},
        {"tcb_info": {"mrtd": "", "event_log": [JSON_EVENT]}},
        {"tcb_info": json.dumps({"event_log": [JSON_EVENT]})},
        {"info": {"tcb_info": json.dumps({"event_log": [JSON_EVENT]})}},
        {"event_log": [JSON_EVENT], "info": {"tcb_info": {"event_log": []}}},  # the outermost counts
    ],
)
def test_a_dstack_list_inside_a_report(report):
    data = json.dumps(report).encode()
    assert parse_json_events(data) == parse_json_events(json.dumps([JSON_EVENT]).encode())
    assert read_events(b" \n" + data).form is LogForm.DSTACK


def test_one_dstack_event_a_line():
    one = json.dumps(JSON_EVENT).encode()
    assert len(parse_json_events(one)) == 1
    assert parse_json_events(one + b"\n\n" + one + b"\n") == parse_json_events(one) * 2
    with pytest.raises(FormatError) as refused:
        parse_json_events(one + b"\n{")
    assert refused.value.code == "eventlog.json"


def test_dstack_without_the_payload_of_firmware_events_and_the_digest_of_runtime_events():
    """The newer releases' short form of the genuine list replays to the same registers."""
    full = json.loads(vectors.dstack_report()["event_log"])
    short = [
        item | ({"digest": ""} if item["event_type"] == DSTACK_RUNTIME_EVENT else {"event_payload": ""})
        for item in full
    ]
    events = parse_json_events(json.dumps(short).encode())
    assert replay(events) == parse_quote(vectors.tdx("dstack-90c06f").quote).body.rtmrs
    assert [e.data for e in events[:20]] == [b""] * 20


def test_dstack_digest_version_2_is_of_canonical_json():
    item = JSON_EVENT | {"event_type": DSTACK_RUNTIME_EVENT, "event": 'compose-"hash"\n\u00e9', "event_payload": "abcd"}
    text = '{"event":"compose-\\"hash\\"\\n\u00e9","event_type":134217729,"payload":"abcd","version":2}'
    (made,) = parse_json_events(json.dumps([item | {"digest": "", "version": 2}]).encode())
    assert made.digest == hashlib.sha384(text.encode()).digest() == dstack_event_digest(made, version=2)
    (made,) = parse_json_events(json.dumps([item | {"digest": ""}]).encode())
    prefix = b"\x01\x00\x00\x08:"
    assert made.digest == hashlib.sha384(prefix + made.name.encode() + b":\xab\xcd").digest()


def test_the_oldest_dstack_form_has_the_data_in_event():
    item = {"imr": 0, "event_type": 4, "digest": "11" * 48, "event": "00000000"}
    assert parse_json_events(json.dumps([item]).encode()) == (
        Event(register=1, event_type=4, digest=b"\x11" * 48, data=bytes(4)),
    )


TRUSTEE_EVENT = {
    "details": {},
    "digests": [{"alg": "SHA-256", "digest": "00"}, {"alg": "SHA-384", "digest": "22" * 48}],
    "event": "AAAAAA==",
    "index": 2,
    "type": "0x80000007",
    "type_name": "whatever",
}


def test_trustee_form():
    wanted = (Event(register=2, event_type=0x80000007, digest=b"\x22" * 48, data=bytes(4)),)
    for value in ([TRUSTEE_EVENT], {"uefi_event_logs": [TRUSTEE_EVENT], "quote": {}}):
        read = read_events(json.dumps(value).encode())
        assert (read.form, read.events) == (LogForm.TRUSTEE, wanted)


def trust_authority(events: tuple[Event, ...]) -> list[dict[str, object]]:
    """The banks Intel's client makes of a log: one for each register and algorithm, in order of appearance."""
    banks: dict[int, list[dict[str, object]]] = {}
    for item in events:
        made = {"type_id": f"{item.event_type:#x}", "type_name": "x", "measurement": item.digest.hex()}
        banks.setdefault(item.register, []).append(made | ({"tags": ["some", "words"]} if item.data else {}))
    listed: list[dict[str, object]] = []
    for register, made_events in banks.items():
        other = [{"type_id": "0x1", "measurement": "00" * 32}] * 3
        listed += (
            {"rtmr": {"index": register, "bank": "SHA256"}, "rtmr_events": other},
            {"rtmr": {"index": register, "bank": "SHA384"}, "rtmr_events": made_events},
        )
    return listed


def test_trust_authority_form():
    events = parse_json_events(vectors.read("tdx/dstack-90c06f/quote-report.json"))
    read = read_events(json.dumps(trust_authority(events)).encode())
    assert read.form is LogForm.TRUST_AUTHORITY
    assert replay(read.events) == parse_quote(vectors.tdx("dstack-90c06f").quote).body.rtmrs
    assert len(read.events) == len(events)
    assert {(e.data, e.name) for e in read.events} == {(b"", "some"), (b"", "")}


BANK = {"rtmr": {"index": 1, "bank": "SHA384"}, "rtmr_events": [{"type_id": "0x4", "measurement": "00" * 48}]}


@pytest.mark.parametrize(
    "change",
    [
        {"rtmr": 1},
        {"rtmr": {"index": 1}},
        {"rtmr": {"index": 5, "bank": "SHA384"}},
        {"rtmr": {"index": "1", "bank": "SHA384"}},
        {"rtmr_events": {}},
        {"rtmr_events": [1]},
        {"rtmr_events": [{"type_id": "4", "measurement": "00" * 48}]},
        {"rtmr_events": [{"type_id": "0x123456789", "measurement": "00" * 48}]},
        {"rtmr_events": [{"type_id": "0x4", "measurement": "00" * 32}]},
        {"rtmr_events": [{"type_id": "0x4", "measurement": "00" * 48, "tags": "x"}]},
        {"rtmr_events": [{"type_id": "0x4", "measurement": "00" * 48, "tags": [1]}]},
        {"rtmr_events": [{"type_id": "0x4", "measurement": "00" * 48}] * 4097},
    ],
)
def test_trust_authority_refuses(change):
    assert parse_json_events(json.dumps([BANK]).encode())
    with pytest.raises(FormatError) as refused:
        parse_json_events(json.dumps([BANK | change]).encode())
    assert refused.value.code == "eventlog.json"


def test_trustee_evidence_carries_the_binary_log():
    data = vectors.read("ccel/dstack/ccel.bin")
    read = read_events(json.dumps({"cc_eventlog": base64.b64encode(data).decode(), "quote": ""}).encode())
    assert (read.form, read.events) == (LogForm.CCEL, parse_event_log(data).events)
    assert read_events(data) == read


@pytest.mark.parametrize(
    "change",
    [
        {"index": 5},
        {"index": -1},
        {"index": True},
        {"index": "1"},
        {"type": 4},
        {"type": "0x"},
        {"type": "0x800000070"},
        {"type": "0x8000000g"},
        {"type": "80000007"},
        {"digests": []},
        {"digests": {}},
        {"digests": [1]},
        {"digests": [{"alg": "SHA-256", "digest": "22" * 48}]},
        {"digests": [{"alg": "SHA-384", "digest": "22" * 32}]},
        {"digests": [{"alg": "SHA-384", "digest": 5}]},
        {"digests": [{"alg": "SHA-384", "digest": "22" * 48}] * 2},
        {"digests": [{"alg": [], "digest": "22" * 48}]},
        {"digests": [{"alg": "SHA-384", "digest": "22" * 48}] + [{"alg": str(i), "digest": ""} for i in range(16)]},
        {"event": None},
        {"event": "AAAA\n"},
        {"event": "A"},
        {"event": base64.b64encode(bytes(65537)).decode()},
    ],
)
def test_trustee_refuses(change):
    with pytest.raises(FormatError) as refused:
        parse_json_events(json.dumps([TRUSTEE_EVENT | change]).encode())
    assert refused.value.code == "eventlog.json"


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
        {"event_payload": "00 00"},
        {"event_payload": "00" * 65537},
        {"event_payload": None, "event": "not hex"},
        {"version": 3},
        {"version": True},
        {"digest": "", "event_type": 0x08000002},
    ],
)
def test_json_refuses(change):
    with pytest.raises(FormatError) as refused:
        parse_json_events(json.dumps([JSON_EVENT | change]).encode())
    assert refused.value.code == "eventlog.json"


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{}", b"1", b"[1]", b"[[]]", b'{"event_log": 3}', b'{"event_log": "x"}', b'{"tcb_info": 7}'),
        *(b'{"info": {"info": {"info": {"event_log": []}}}}', b'{"cc_eventlog": "*"}', b'{"cc_eventlog": ""}'),
        *(b'{"uefi_event_logs": {}}', b'[{"imr":1,"imr":2}]', b"\xff", b"NaN", b"[" * 100_000, b"9" * 100_000),
        json.dumps([JSON_EVENT, TRUSTEE_EVENT]).encode(),
        json.dumps([TRUSTEE_EVENT, JSON_EVENT]).encode(),
        json.dumps([BANK, JSON_EVENT]).encode(),
        b"[" + b",".join([json.dumps(JSON_EVENT).encode()] * 4097) + b"]",
    ],
)
def test_json_refuses_other_texts(text):
    with pytest.raises(FormatError):
        parse_json_events(text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    for parse in (parse_event_log, parse_json_events, read_events):
        try:
            parse(data)
        except FormatError as err:
            assert err.code.startswith("eventlog.")


def seeds() -> list[bytes]:
    many = spec_id({algorithm: SIZES[algorithm] for algorithm in MANY}) + record(1, 4, b"a", MANY) + bytes(64)
    report = vectors.read("tdx/dstack-90c06f/quote-report.json")
    genuine = vectors.read("ccel/dstack/ccel.bin")[:2048]
    listed = vectors.dstack_report()["event_log"].encode()
    trustee = json.dumps({"uefi_event_logs": [TRUSTEE_EVENT] * 3}).encode()
    return [many, genuine, report, listed, trustee, json.dumps([BANK] * 3).encode()]


def test_mutated_genuine_logs_are_read_or_refused_in_bounded_time():
    """4,000 mutations: bytes flipped, cut out, repeated, replaced by lengths at their limits."""
    seeds_cache = seeds()
    chance, seen = random.Random(20), {"read": 0, "refused": 0}
    slowest = 0.0
    for round_ in range(4000):
        data = bytearray(seeds_cache[round_ % len(seeds_cache)])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    del data[at : at + chance.randint(1, 64)]
                case 2:
                    data[at:at] = data[at : at + chance.randint(1, 64)]
                case _:
                    data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\0\0\1\0", b"9999"))
            data = data or bytearray(1)
        start = time.process_time()
        try:
            read = read_events(bytes(data))
        except FormatError as err:
            assert err.code.startswith("eventlog.")
            seen["refused"] += 1
        else:
            assert all(len(e.digest) == 48 for e in read.events)
            seen["read"] += 1
        slowest = max(slowest, time.process_time() - start)
    assert min(seen.values()) > 100, seen
    assert slowest < 1, slowest
