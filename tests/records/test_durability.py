"""Nothing acknowledged is lost: killed at any instant, power cut at any sync, disk full."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from record_values import intent, open_recorder, outcome

from countermark.errors import ConfigError, CountermarkError
from countermark.formats.witnessed import boot_log_keys
from countermark.logcheck import Rules, verify_log
from countermark.logsource import directory as log_directory
from countermark.tlog.merkle import leaf_hash
from countermark_appliance.records import journal
from countermark_appliance.records.journal import Frame
from countermark_appliance.records.previous import read_sidecar

WORKER = Path(__file__).with_name("log_worker.py")


def worker(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen[bytes]]:
    with worker("nursery") as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=20)


def log_hashes(path: Path) -> list[bytes]:
    frames = [item for item in journal.read_journal(path) if isinstance(item, Frame)]
    return [leaf_hash(leaf) for frame in frames for leaf in frame.leaves]


def kill_and_check(nursery: subprocess.Popen[bytes], directory: Path, draw: random.Random) -> int:
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{directory}\n".encode())
    nursery.stdin.flush()
    ready = nursery.stdout.readline().split()
    assert ready[0] == b"ready"
    time.sleep(draw.uniform(0.0, 0.12))
    nursery.stdin.write(b"kill\n")
    nursery.stdin.flush()
    lines = [line.decode().split() for line in iter(nursery.stdout.readline, b"killed\n")]
    boot = ready[1].decode()

    recorder = open_recorder(directory)  # verifies what the killed process left, and ends its open INTENTs
    previous = recorder.epoch.previous
    assert previous is not None
    assert previous.boot_id.hex() == boot
    hashes = log_hashes(directory / boot / "journal")
    assert previous.size == len(hashes)
    intents = {line[3] for line in lines if line[0] == "ack"}
    ended = {line[3] for line in lines if line[0] == "end"}
    for line in lines:
        if line[0] == "ack":
            assert hashes[int(line[2])].hex() == line[3]
        else:
            assert int(line[2]) < len(hashes)
    crashed = {leaf.hex() for leaf in crashed_leaves(recorder)}
    assert not crashed & ended
    assert len(crashed) == previous.crashed
    assert intents - ended - crashed == set() or len(intents - ended - crashed) <= 3  # ended, but not yet told
    recorder.close()
    return len(lines)


def crashed_leaves(recorder: object) -> list[bytes]:
    from countermark.formats.records import Kind, parse_leaf
    from countermark_appliance.records.recorder import Recorder

    assert isinstance(recorder, Recorder)
    leaves = map(parse_leaf, recorder.leaves(0, recorder.head()[0]))
    return [leaf.intent_leaf or b"" for leaf in leaves if leaf.kind is Kind.CRASHED]


def test_kill_at_any_instant_loses_nothing(nursery: subprocess.Popen[bytes], tmp_path: Path) -> None:
    draw = random.Random(20260)
    assert sum(kill_and_check(nursery, tmp_path, draw) for _ in range(10)) > 50


@pytest.mark.slow
def test_two_hundred_kills(nursery: subprocess.Popen[bytes], tmp_path: Path) -> None:
    draw = random.Random(20261)
    for i in range(200):
        kill_and_check(nursery, tmp_path / str(i // 20), draw)  # a chain of 40 boots in each directory


def test_what_is_acknowledged_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as of the last sync is all a power cut leaves; it must hold every acknowledged leaf."""
    recorder = open_recorder(tmp_path)
    boot = recorder.epoch.boot_id.hex()
    path, durable = tmp_path / boot / "journal", tmp_path / "durable"
    shutil.copy(path, durable)
    real = os.fdatasync

    def sync(fd: int) -> None:
        real(fd)
        shutil.copy(path, durable)

    monkeypatch.setattr(os, "fdatasync", sync)
    for _ in range(5):
        committed = intent(recorder)
        assert log_hashes(durable)[committed.acceptance.leaf_index] == committed.leaf
        completed = outcome(recorder, committed)
        assert len(log_hashes(durable)) == completed.index + 1
    recorder.close()


def test_the_start_syncs_names_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def sync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    recorder = open_recorder(tmp_path / "log")
    boot = recorder.epoch.boot_id.hex()
    assert synced[-2:] == [boot, "log"]
    assert "epoch.new" in synced
    recorder.close()


def test_a_full_disk_refuses_what_is_new_and_ends_what_was_begun(tmp_path: Path) -> None:
    output, errors = worker("full", str(tmp_path)).communicate(timeout=60)
    lines = [line.split() for line in output.decode().splitlines()]
    assert not errors, errors
    acknowledged = [line for line in lines if line[0] == "ack"]
    assert [line for line in lines if line[0] == "refused"] == [["refused", "log.full"]] * 2
    assert sum(line[0] == "end" for line in lines) == 5
    hashes = log_hashes(tmp_path / acknowledged[0][1] / "journal")
    for line in acknowledged:
        assert hashes[int(line[2])].hex() == line[3]
    recorder = open_recorder(tmp_path)
    assert recorder.epoch.previous is not None
    assert recorder.epoch.previous.crashed == len(acknowledged)
    recorder.close()


def test_a_read_only_directory_is_said_and_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it: tests run as root, whom no mode stops."""
    open_recorder(tmp_path).close()
    before = sorted(path.name for path in tmp_path.iterdir())
    real_open, real_mkdir = os.open, os.mkdir

    def read_only(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *args, **options)  # type: ignore[arg-type]

    def no_mkdir(path: object, *args: object, **options: object) -> None:
        if str(tmp_path) in str(path) and not Path(str(path)).is_dir():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real_mkdir(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "mkdir", no_mkdir)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(ConfigError) as caught:
            open_recorder(directory)
        assert caught.value.code == "log.directory"
        assert os.strerror(errno.EROFS) in str(caught.value)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_directory_that_becomes_read_only_ends_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is open, so records stay durable; only the derived files stop, which is said."""
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)

    def read_only(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("countermark_appliance.records.publish._write", read_only)
    recorder.receipt(outcome(recorder, committed))
    recorder.close()
    assert any("could not publish" in message and "EROFS" in message for message in caplog.messages)
    monkeypatch.undo()
    again = open_recorder(tmp_path)
    assert again.epoch.previous is not None
    assert (again.epoch.previous.size, again.epoch.previous.crashed) == (3, 0)
    assert (tmp_path / recorder.epoch.boot_id.hex() / "checkpoint").exists()  # completed by the next start
    again.close()


@pytest.mark.parametrize("file", ["tile/0/000", "tile/entries/000", "tile/1/000.p/1", "checkpoint"])
def test_a_flipped_bit_in_an_old_tile(tmp_path: Path, file: str) -> None:
    """Found by whoever verifies the published log, and mended by the next start, which has the journal."""
    recorder = open_recorder(tmp_path)
    for _ in range(150):
        outcome(recorder, intent(recorder))
    recorder.close()
    boot = tmp_path / recorder.epoch.boot_id.hex()
    sidecar = read_sidecar(boot)

    def verify() -> int:
        keys = boot_log_keys(sidecar.keys)
        return verify_log(log_directory(boot), sidecar.epoch.origin, keys, rules=Rules.BOOT).checkpoint.size

    assert verify() == 301
    path = boot / file
    data = path.read_bytes()
    for at in (len(data) - 33, len(data) // 2, len(data) - 1) if file != "checkpoint" else (100, 200, len(data) - 10):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CountermarkError) as caught:
            verify()
        assert caught.value.exit_code in (20, 21)
    open_recorder(tmp_path).close()
    assert path.read_bytes() == data
    assert verify() == 301
