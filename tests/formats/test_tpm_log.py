"""TPM event logs: a genuine one against the TPM's own PCRs and against tpm2_eventlog, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import tpm_log
from countermark.formats.eventlog import EV_NO_ACTION, EV_SEPARATOR, event_type_name, replay
from countermark.formats.tpm_log import TpmEvent, TpmLog, parse_tpm_log, register_of, replay_pcrs

DATA = Path(__file__).parents[1] / "data" / "tpmlog"
GENUINE = (DATA / "binary_bios_measurements.bin").read_bytes()
EXPECTED = json.loads((DATA / "expected.json").read_text())
SHA256, SHA384 = 0x000B, 0x000C
SIZES = {SHA256: 32, SHA384: 48}


def spec(algorithms=((SHA256, 32), (SHA384, 48)), *, count=None, tail=b"\0", pcr=0, signature=b"Spec ID Event03\0"):
    body = (
        signature + bytes(4) + b"\x00\x02\x69\x02" + (len(algorithms) if count is None else count).to_bytes(4, "little")
    )
    body += b"".join(kind.to_bytes(2, "little") + size.to_bytes(2, "little") for kind, size in algorithms) + tail
    head = pcr.to_bytes(4, "little") + EV_NO_ACTION.to_bytes(4, "little") + bytes(20)
    return head + len(body).to_bytes(4, "little") + body


def event(pcr=4, kind=EV_SEPARATOR, data=b"\0\0\0\0", algorithms=(SHA256, SHA384), size=None):
    out = pcr.to_bytes(4, "little") + kind.to_bytes(4, "little") + len(algorithms).to_bytes(4, "little")
    for name in algorithms:
        out += name.to_bytes(2, "little") + hashlib.new("sha256" if name == SHA256 else "sha384", data).digest()
    return out + (len(data) if size is None else size).to_bytes(4, "little") + data


def refused(data: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        parse_tpm_log(data)
    return caught.value.code


def test_genuine_log_has_the_events_that_tpm2_eventlog_prints():
    log = parse_tpm_log(GENUINE)
    assert log.algorithms == ("sha256", "sha384")
    assert log.padding == 0
    found = [
        [e.pcr, event_type_name(e.event_type), e.digests["sha256"].hex(), e.digests["sha384"].hex(), len(e.data)]
        for e in log.events
    ]
    assert len(found) == 44
    assert found == EXPECTED["events"]


def test_genuine_log_replays_to_the_tpm_itself():
    log = parse_tpm_log(GENUINE)
    for algorithm, wanted in EXPECTED["tpm2_eventlog"].items():
        assert wanted.items() <= {str(pcr): value.hex() for pcr, value in replay_pcrs(log, algorithm).items()}.items()
    tpm = {int(pcr): value for pcr, value in EXPECTED["tpm_sha384"].items()}
    replayed = {pcr: value.hex() for pcr, value in replay_pcrs(log).items()}
    assert {pcr for pcr, value in replayed.items() if value != tpm[pcr]} == {tpm_log.IMA_PCR}
    assert all(event.pcr != tpm_log.IMA_PCR for event in log.events)


def test_registers_stand_for_pcrs_in_log_order():
    log = parse_tpm_log(GENUINE)
    events = tpm_log.ccel_events(log)
    assert len(events) == 44 - sum(event.pcr == 0 for event in log.events)
    assert {event.register for event in events} == {1, 2, 3}
    registers = [bytes(48)] * 4
    for item in log.events:
        index = {0: 0, 1: 1, 7: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 9: 3, 11: 3}[item.pcr]
        registers[index] = hashlib.sha384(registers[index] + item.digests["sha384"]).digest()
    assert (tpm_log.mrtd(log), *replay(events)) == (*registers, bytes(48))
    assert tpm_log.mrtd(log).hex() == EXPECTED["tpm_sha384"]["0"]


def test_every_pcr_has_one_register_or_none():
    assert [register_of(pcr) for pcr in range(16)] == [0, 1, 2, 2, 2, 2, 2, 1] + [3] * 8
    for pcr in (-1, 16, 17, 23, 24):
        with pytest.raises(FormatError) as caught:
            register_of(pcr)
        assert caught.value.code == "tpmlog.pcr"


@pytest.mark.parametrize("fill", [b"\x00", b"\xff"])
def test_unused_area_is_allowed_at_the_end_only(fill):
    assert parse_tpm_log(GENUINE + fill * 100).padding == 100
    assert parse_tpm_log(GENUINE + fill * 100).events == parse_tpm_log(GENUINE).events
    assert refused(GENUINE + fill * 100 + b"\x01") == "tpmlog.trailing"
    assert refused(GENUINE + fill * 100 + event()) == "tpmlog.trailing"


def test_every_truncation_of_a_log_is_another_log_or_refused():
    starts = {len(spec())}
    data = spec() + event() + event(pcr=11, kind=13, data=b".osrel") + event(pcr=5, data=b"x")
    ends = set()
    for end in range(len(data) + 1):
        try:
            ends.add((end, len(parse_tpm_log(data[:end]).events)))
        except FormatError as err:
            assert err.code in ("tpmlog.truncated", "tpmlog.trailing")
    one, two = len(spec() + event()), len(spec() + event() + event(pcr=11, kind=13, data=b".osrel"))
    zeros_of_the_next = {(end, count) for end, count in ends if end not in (*starts, one, two, len(data))}
    assert {(min(starts), 0), (one, 1), (two, 2), (len(data), 3)} <= ends
    assert not zeros_of_the_next  # no PCR 0 event here whose first zero bytes could be taken for unused area


def test_refusals():
    assert refused(b"") == "tpmlog.truncated"
    assert refused(b"\xff" * 64) == "tpmlog.spec_id"
    assert refused(bytes(tpm_log.MAX_LOG_BYTES + 1)) == "tpmlog.too_long"
    assert refused(spec(pcr=1)) == "tpmlog.spec_id"
    assert refused(spec(signature=b"Spec ID Event02\0")) == "tpmlog.spec_id"
    assert refused(spec(tail=b"\0\0")) == "tpmlog.trailing"
    assert refused(spec(tail=b"\1")) == "tpmlog.truncated"
    assert refused(spec(count=0)) == "tpmlog.algorithms"
    assert refused(spec(count=6)) == "tpmlog.algorithms"
    assert refused(spec(((SHA256, 32), (SHA256, 32)))) == "tpmlog.algorithms"
    assert refused(spec(((SHA256, 48),))) == "tpmlog.algorithms"
    assert refused(spec(((0x0027, 32),))) == "tpmlog.algorithms"
    assert refused(spec() + event(pcr=24)) == "tpmlog.pcr"
    assert refused(spec() + event(algorithms=(SHA384,))) == "tpmlog.digest_count"
    assert refused(spec() + event(algorithms=(SHA384, SHA384))) == "tpmlog.digest_algorithm"
    assert refused(spec(((SHA384, 48),)) + event(algorithms=(SHA256,))) == "tpmlog.digest_algorithm"
    assert refused(spec() + event(size=tpm_log.MAX_EVENT_BYTES + 1)) == "tpmlog.event_size"
    assert refused(spec() + event() * (tpm_log.MAX_EVENTS + 1)) == "tpmlog.too_many"
    assert len(parse_tpm_log(spec() + event() * tpm_log.MAX_EVENTS).events) == tpm_log.MAX_EVENTS


def test_digests_may_stand_in_any_order():
    log = parse_tpm_log(spec() + event(algorithms=(SHA384, SHA256)))
    assert log.events == parse_tpm_log(spec() + event()).events


def test_a_bank_that_is_not_there_cannot_be_replayed():
    log = parse_tpm_log(spec(((SHA256, 32),)) + event(algorithms=(SHA256,)))
    assert len(replay_pcrs(log, "sha256")[4]) == 32
    for call in (lambda: replay_pcrs(log), lambda: tpm_log.ccel_events(log), lambda: replay_pcrs(log, "md5")):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.code == "tpmlog.bank"


def test_startup_locality_sets_where_pcr_0_starts():
    def log(*events: TpmEvent) -> TpmLog:
        return TpmLog(algorithms=("sha384",), events=events)

    def locality(value: int, pcr: int = 0) -> TpmEvent:
        digests = {"sha384": bytes(48)}
        return TpmEvent(pcr=pcr, event_type=EV_NO_ACTION, digests=digests, data=b"StartupLocality\0" + bytes((value,)))

    assert replay_pcrs(log(locality(3)))[0] == bytes(47) + b"\x03"
    assert replay_pcrs(log(locality(0)))[0] == replay_pcrs(log())[0] == bytes(48)
    for bad in ((locality(1),), (locality(3), locality(3)), (locality(3, pcr=1),)):
        with pytest.raises(FormatError) as caught:
            replay_pcrs(log(*bad))
        assert caught.value.code == "tpmlog.locality"


def test_dynamic_launch_pcrs_start_from_ones():
    log = parse_tpm_log(spec() + event(pcr=17))
    digest = hashlib.sha384(bytes(4)).digest()
    assert replay_pcrs(log)[17] == hashlib.sha384(b"\xff" * 48 + digest).digest()
    assert 18 not in replay_pcrs(log)


@given(st.binary(max_size=400), st.integers(0, 400))
def test_arbitrary_bytes_give_a_log_or_a_refusal(noise, at):
    for data in (noise, spec() + noise, GENUINE[:at] + noise + GENUINE[at:]):
        try:
            log = parse_tpm_log(data)
        except FormatError as err:
            assert err.code.startswith("tpmlog.")
        else:
            assert len(replay_pcrs(log, log.algorithms[0])) >= 18
