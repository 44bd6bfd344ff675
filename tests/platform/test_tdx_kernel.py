"""The `tdx` back end on a directory that behaves as Linux documents it: what it reads, and every refusal by code.

No TDX machine is anywhere: the quotes are the simulated vendor's.
"""

import errno
import hashlib
import threading
from dataclasses import replace

import pytest
from fake_kernel import FakeKernel, ccel_table

import sim_evidence
from countermark.errors import ConfigError, CountermarkError, MeasurementError, Unavailable
from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import EVENT_TYPE
from countermark.formats.quote import MAX_QUOTE_BYTES, encode_quote, parse_quote
from countermark_appliance.platform import image
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.tdx import ccel, registers, reports
from countermark_appliance.platform.tdx.machine import TdxPlatform
from countermark_appliance.platform.tdx.registers import Rtmr3
from countermark_appliance.platform.tdx.reports import Reports

REPORT_DATA = bytes(range(64))
RTMR3 = f"{registers.MEASUREMENTS}/rtmr3:sha384"


class Cached:
    """Endorsements that came from somewhere."""

    def current(self):
        return sim_evidence.machine().endorsements


@pytest.fixture
def kernel(tmp_path) -> FakeKernel:
    return FakeKernel(tmp_path, sim_evidence.machine())


def opened(kernel: FakeKernel) -> TdxPlatform:
    return TdxPlatform(kernel, endorsements=lambda _quote, _gpus: Cached(), gpus=None)


def test_a_good_machine_opens_and_leaves_nothing_behind(kernel):
    platform = opened(kernel)
    assert platform.name.value == "tdx"
    assert platform.image_id == kernel.cpu.image_id
    assert (platform.gpu_identities(), platform.gpu_evidence(bytes(32)), platform.vbios) == ((), (), None)
    platform.admit_gpus()
    platform.check_unchanged()
    assert platform.endorsements() == sim_evidence.machine().endorsements
    assert kernel.entries() == []
    assert kernel.register(3) == bytes(48)


def test_ccel_is_the_log_without_its_padding(kernel):
    area = kernel.cpu.ccel()
    log = opened(kernel).ccel()
    assert area.startswith(log)
    assert set(area[len(log) :]) == {0xFF}
    assert eventlog.parse_event_log(log).events == eventlog.parse_event_log(area).events


def test_extensions_reach_the_register_and_the_log(kernel):
    platform = opened(kernel)
    expected = bytes(48)
    for data in (b"one", b"two", b"three"):
        platform.extend_rtmr3(EVENT_TYPE, data)
        expected = hashlib.sha384(expected + hashlib.sha384(data).digest()).digest()
    assert kernel.register(3) == expected
    events = eventlog.parse_event_log(platform.rtmr3_log()).events
    assert [event.data for event in events] == [b"one", b"two", b"three"]
    assert eventlog.replay(events)[3] == expected
    quote = parse_quote(platform.quote(REPORT_DATA)).body
    assert (quote.rtmr3, quote.report_data) == (expected, REPORT_DATA)
    platform.check_unchanged()


def test_a_quote_is_a_request_of_its_own(kernel):
    platform = opened(kernel)
    kernel.calls.clear()
    for _ in range(2):
        platform.quote(REPORT_DATA)
    made = [call.removeprefix("mkdir ") for call in kernel.calls if call.startswith("mkdir")]
    assert len(set(made)) == 2
    assert kernel.calls == [f"{verb} {entry}" for entry in made for verb in ("mkdir", "rmdir")]


def test_an_entry_left_behind_is_passed_by(kernel):
    source = Reports(kernel)
    (kernel.root / reports.REPORTS / "countermark.x").mkdir()
    taken = next(source._numbers) + 1
    import os

    (kernel.root / reports.REPORTS / f"countermark.{os.getpid()}.{taken}").mkdir()
    assert parse_quote(source.quote(REPORT_DATA)[0]).body.report_data == REPORT_DATA
    assert kernel.entries() == sorted(["countermark.x", f"countermark.{os.getpid()}.{taken}"])


def test_concurrent_quotes_do_not_mix(kernel):
    platform = opened(kernel)
    wanted = [bytes([n]) * 64 for n in range(8)]
    found: dict[bytes, bytes] = {}

    def ask(report_data: bytes) -> None:
        found[report_data] = parse_quote(platform.quote(report_data)).body.report_data

    threads = [threading.Thread(target=ask, args=(one,)) for one in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {one: one for one in wanted}
    assert kernel.entries() == []


def of_another(kernel: FakeKernel) -> bytes:
    return kernel.cpu.quote(b"x" * 64)


def padded(kernel: FakeKernel) -> bytes:
    quote = kernel.cpu.quote(REPORT_DATA)
    return quote + bytes(MAX_QUOTE_BYTES + 1 - len(quote))


def with_junk(kernel: FakeKernel) -> bytes:
    return encode_quote(replace(parse_quote(kernel.cpu.quote(REPORT_DATA)), trailing=b"")) + b"junk"


QUOTES = [
    ("platform.quote_busy", lambda kernel: {"quote_error": errno.EBUSY}),
    ("platform.quote_busy", lambda kernel: {"quote_error": errno.EAGAIN}),
    ("platform.quote_interrupted", lambda kernel: {"quote_error": errno.EINTR}),
    ("platform.quote_timeout", lambda kernel: {"quote_error": errno.ETIMEDOUT}),
    ("platform.quote_too_long", lambda kernel: {"quote_error": errno.EFBIG}),
    ("platform.quote_too_long", lambda kernel: {"answer": padded(kernel)}),
    ("platform.quote_failed", lambda kernel: {"quote_error": errno.EIO}),
    ("platform.quote_failed", lambda kernel: {"provider": ""}),
    ("platform.quote_failed", lambda kernel: {"lost_write": True}),  # reading an empty request is EINVAL
    ("platform.quote_conflict", lambda kernel: {"second_writer": True}),
    ("platform.quote_conflict", lambda kernel: {"answer": of_another(kernel)}),
    ("platform.quote_malformed", lambda kernel: {"answer": b""}),
    ("platform.quote_malformed", lambda kernel: {"answer": b"TDREPORT"}),
    ("platform.quote_malformed", lambda kernel: {"answer": with_junk(kernel)}),
]


@pytest.mark.parametrize(("code", "bend"), QUOTES, ids=[f"{code}-{n}" for n, (code, _) in enumerate(QUOTES)])
def test_a_quote_that_does_not_come(kernel, code, bend):
    platform = opened(kernel)
    changes = bend(kernel)
    vars(kernel).update(changes)
    with pytest.raises(Unavailable) as refused:
        platform.quote(REPORT_DATA)
    assert (refused.value.code, refused.value.exit_code) == (code, 50)
    assert refused.value.retry_after_s
    assert kernel.entries() == []
    vars(kernel).update(dict.fromkeys(changes, None) | {"quote_error": 0, "provider": "tdx_guest\n"})
    assert parse_quote(platform.quote(REPORT_DATA)).body.report_data == REPORT_DATA  # the same call works later


def test_generation_that_is_no_number(kernel):
    platform = opened(kernel)

    def scribble(path: str) -> None:
        kernel.put(path.replace("inblob", "generation"), b"many")

    kernel._written = scribble  # type: ignore[method-assign]
    with pytest.raises(Unavailable) as refused:
        platform.quote(REPORT_DATA)
    assert refused.value.code == "platform.quote_failed"


def test_a_write_that_was_lost_is_seen_by_the_count(kernel):
    """The request has an earlier inblob, and the new one did not arrive: the quote is good, and not ours."""
    platform = opened(kernel)
    make = kernel.make

    def made(path: str) -> None:
        make(path)
        kernel.put(f"{path}/inblob", REPORT_DATA)

    kernel.make, kernel.lost_write = made, True  # type: ignore[method-assign]
    with pytest.raises(Unavailable) as refused:
        platform.quote(REPORT_DATA)
    assert refused.value.code == "platform.quote_conflict"


START = [
    ("platform.tsm_missing", lambda kernel: vars(kernel).update(provider="")),
    ("platform.tsm_missing", lambda kernel: (kernel.root / reports.REPORTS).rmdir()),
    ("platform.provider", lambda kernel: vars(kernel).update(provider="sev_guest\n")),
    ("platform.provider", lambda kernel: vars(kernel).update(provider="\n")),
    ("platform.rtmr_missing", lambda kernel: kernel.drop(RTMR3)),
    ("platform.rtmr_missing", lambda kernel: kernel.drop(RTMR3.replace("rtmr3", "rtmr0"))),
    ("platform.rtmr_size", lambda kernel: kernel.put(RTMR3, bytes(47))),
    ("platform.rtmr_size", lambda kernel: kernel.put(RTMR3, bytes(49))),
    ("platform.rtmr_size", lambda kernel: kernel.put(RTMR3, bytes(4096))),
    ("platform.rtmr_missing", lambda kernel: kernel.put(RTMR3, bytes(4097))),
    ("platform.ccel_missing", lambda kernel: kernel.drop(ccel.TABLE)),
    ("platform.ccel_missing", lambda kernel: kernel.drop(ccel.LOG)),
    ("platform.ccel_missing", lambda kernel: kernel.put(ccel.LOG, bytes(eventlog.MAX_LOG_BYTES + 1))),
    ("platform.ccel_log", lambda kernel: kernel.put(ccel.LOG, kernel.cpu.ccel()[:-1])),
    ("platform.ccel_log", lambda kernel: kernel.put(ccel.LOG, b"\x07" * len(kernel.cpu.ccel()))),
    ("platform.image_id", lambda kernel: kernel.drop(image.CMDLINE)),
]
START += [
    ("platform.ccel_table", lambda kernel, change=change: kernel.put(ccel.TABLE, ccel_table(16 * 1024, **change)))
    for change in (
        {"signature": b"TDEL"},
        {"length": 57},
        {"cc_type": 1},
        {"subtype": 1},
        {"reserved": 1},
        {"address": 0},
        {"checksum": 1},
    )
]
START += [
    ("platform.ccel_table", lambda kernel: kernel.put(ccel.TABLE, ccel_table(0))),
    ("platform.ccel_table", lambda kernel: kernel.put(ccel.TABLE, ccel_table(eventlog.MAX_LOG_BYTES + 1))),
    ("platform.ccel_table", lambda kernel: kernel.put(ccel.TABLE, ccel_table(16 * 1024)[:-1])),
    ("platform.ccel_table", lambda kernel: kernel.put(ccel.TABLE, ccel_table(16 * 1024) + b"\0")),
]
START += [
    ("platform.image_id", lambda kernel, line=line: kernel.put(image.CMDLINE, line))
    for line in (
        b"quiet\n",
        b"roothash=\n",
        b"roothash=" + b"A" * 64,
        b"roothash=" + b"a" * 63,
        b"roothash=" + b"a" * 65,
        b"roothash=" + b"a" * 64 + b" roothash=" + b"a" * 64,
        b'"roothash=' + b"a" * 64 + b'"',
        b'init="x roothash=' + b"a" * 64 + b' y"',
        b"xroothash=" + b"a" * 64,
        b"\xff roothash=" + b"a" * 64,
        b"roothash=" + b"a" * 64 + b" " * 20_000,
    )
]


@pytest.mark.parametrize(("code", "bend"), START, ids=[f"{code}-{n}" for n, (code, _) in enumerate(START)])
def test_refused_at_start(kernel, code, bend):
    bend(kernel)
    with pytest.raises(ConfigError) as refused:
        opened(kernel)
    assert (refused.value.code, refused.value.exit_code) == (code, 1)


@pytest.mark.parametrize("index", range(3))
def test_a_log_that_is_not_the_registers(kernel, index):
    kernel.put(f"{registers.MEASUREMENTS}/rtmr{index}:sha384", b"x" * 48)
    with pytest.raises(MeasurementError) as refused:
        opened(kernel)
    assert refused.value.code == "platform.ccel_replay"


def test_a_register_that_is_not_zero_at_start(kernel):
    kernel.extend(b"x" * 48)
    with pytest.raises(MeasurementError) as refused:
        opened(kernel)
    assert (refused.value.code, refused.value.exit_code) == ("platform.rtmr3_not_zero", 12)


def test_a_second_start_without_a_reboot(kernel):
    opened(kernel).extend_rtmr3(EVENT_TYPE, b"one")
    with pytest.raises(MeasurementError) as refused:
        opened(kernel)
    assert refused.value.code == "platform.rtmr3_not_zero"


@pytest.mark.parametrize("use", ["extend", "quote", "check"])
def test_somebody_else_extends(kernel, use):
    platform = opened(kernel)
    platform.extend_rtmr3(EVENT_TYPE, b"one")
    kernel.extend(b"x" * 48)
    with pytest.raises(MeasurementError) as refused:
        match use:
            case "extend":
                platform.extend_rtmr3(EVENT_TYPE, b"two")
            case "quote":
                platform.quote(REPORT_DATA)
            case "check":
                platform.check_unchanged()
    assert refused.value.code == "platform.rtmr3_foreign"
    events = eventlog.parse_event_log(platform.rtmr3_log()).events
    assert [event.data for event in events] == [b"one"]  # no event that is not in the register


@pytest.mark.parametrize("bend", [{"write_error": errno.EIO}, {"write_does_nothing": True}])
def test_an_extension_that_does_not_happen(kernel, bend):
    platform = opened(kernel)
    vars(kernel).update(bend)
    with pytest.raises(MeasurementError) as refused:
        platform.extend_rtmr3(EVENT_TYPE, b"one")
    assert refused.value.code == "platform.rtmr3_extend"
    assert not eventlog.parse_event_log(platform.rtmr3_log()).events


def test_a_quote_that_takes_long_keeps_nobody_waiting(kernel):
    """Neither the watch nor an extension; and an event that comes in between is no stranger's."""
    platform = opened(kernel)
    asked, answer = threading.Event(), threading.Event()
    make = kernel._make_quote

    def slowly(path: str) -> None:
        asked.set()
        assert answer.wait(10)
        make(path)

    kernel._make_quote = slowly  # type: ignore[method-assign]
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(platform.quote(REPORT_DATA)))
    thread.start()
    assert asked.wait(10)
    platform.check_unchanged()
    platform.extend_rtmr3(EVENT_TYPE, b"one")
    answer.set()
    thread.join(10)
    assert parse_quote(found[0]).body.rtmr3 == kernel.register(3)


def test_another_event_type(kernel):
    with pytest.raises(MeasurementError) as refused:
        opened(kernel).extend_rtmr3(EVENT_TYPE + 1, b"one")
    assert refused.value.code == "platform.rtmr3_event"
    assert kernel.register(3) == bytes(48)


def test_the_register_takes_48_bytes_only(kernel):
    register = Rtmr3(kernel)
    for size in (0, 32, 47, 49):
        with pytest.raises(MeasurementError):
            register.extend(bytes(size))
    register.extend(boot_events.event(b"data").digest)
    assert register.value == kernel.register(3) != bytes(48)


def test_sysfs_reads_whole_and_capped(tmp_path):
    sysfs = Sysfs(tmp_path)
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert sysfs.read("file", max_bytes=100_000) == b"x" * 100_000
    with pytest.raises(OSError, match="more than") as failed:
        sysfs.read("file", max_bytes=99_999)
    assert failed.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        sysfs.read("none", max_bytes=1)
    with pytest.raises(FileNotFoundError):
        sysfs.write("none", b"data")  # an attribute is never made by writing it
    assert not (tmp_path / "none").exists()


def test_a_kernel_that_takes_a_part(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("os.write", lambda _handle, data: len(data) - 1)
    with pytest.raises(OSError, match="47 of 48") as failed:
        Sysfs(tmp_path).write("file", bytes(48))
    assert failed.value.errno == errno.EIO


def look_at(sysfs: Sysfs) -> None:
    """What a TDX guest must give, without changing anything: a quote over our bytes, and registers that agree."""
    quote, body = Reports(sysfs).quote(REPORT_DATA)
    assert parse_quote(quote).body == body
    assert body.report_data == REPORT_DATA
    assert body.rtmrs == tuple(registers.read_register(sysfs, index) for index in range(4))
    assert body.mrtd == sysfs.read(f"{registers.MEASUREMENTS}/mrtd:sha384", max_bytes=48)
    log = eventlog.parse_event_log(ccel.read_ccel(sysfs))
    assert eventlog.replay(log.events)[:3] == body.rtmrs[:3]


def test_what_a_guest_must_give(kernel):
    look_at(kernel)


@pytest.mark.tdx
def test_this_guest():
    """On a TDX guest, as root. Not run yet."""
    look_at(Sysfs())


def test_every_code_has_a_row():
    """The codes that the modules name are the codes refused above, here and nowhere silently."""
    import ast
    from pathlib import Path

    import countermark_appliance.platform.tdx as package

    named = {
        node.value
        for path in Path(package.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("platform.")
        and " " not in node.value
        and "\n" not in node.value
    }
    tested = Path(__file__).read_text()
    assert len(named) > 15
    assert [code for code in sorted(named) if f'"{code}"' not in tested] == []


def test_errors_are_ours(kernel):
    """Whatever a file holds: a refusal with a code, or a platform."""
    for path in (ccel.TABLE, ccel.LOG, image.CMDLINE, RTMR3):
        original = (kernel.root / path).read_bytes()
        for data in (b"", b"\0", b"\xff" * 100, original[:-1], original + b"\0", original[::-1]):
            kernel.put(path, data)
            try:
                opened(kernel)
            except CountermarkError as err:
                assert err.code.startswith("platform.")
        kernel.put(path, original)
    opened(kernel)
