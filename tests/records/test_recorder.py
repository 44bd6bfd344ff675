"""The recorder over a real directory: what is durable, what the next start finds, what a host's hand changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from record_values import intent, open_recorder, outcome

from countermark.errors import ConfigError, CountermarkError, LogError, Unavailable
from countermark.formats import records
from countermark.formats.records import Kind, parse_leaf
from countermark.formats.witnessed import boot_log_keys
from countermark.logkeys import verify_signature
from countermark.tlog import merkle, tiles
from countermark.tlog.checkpoint import verify_checkpoint
from countermark_appliance.records import journal
from countermark_appliance.records.previous import read_sidecar
from countermark_appliance.records.recorder import Committed, Recorder


def boot_directory(root: Path, recorder: Recorder) -> Path:
    return root / recorder.epoch.boot_id.hex()


def kinds(recorder: Recorder) -> list[Kind]:
    return [parse_leaf(leaf).kind for leaf in recorder.leaves(0, recorder.head()[0])]


def verify_published(directory: Path) -> tuple[bytes, ...]:
    """What a monitor does with the published files alone: read the tiles, check every hash, return the entries."""
    sidecar = read_sidecar(directory)
    origin, keys = sidecar.epoch.origin, boot_log_keys(sidecar.keys)
    head = verify_checkpoint((directory / "checkpoint").read_bytes(), origin, keys, verify_signature)
    entries: list[bytes] = []
    hashes: list[bytes] = []
    for tile in tiles.tiles_for(head.size):
        data = tiles.parse_tile((directory / tiles.tile_path(tile)).read_bytes(), tile.width)
        if tile.level == 0:
            bundle = (directory / tiles.entries_path(tile.index, tile.width)).read_bytes()
            entries += tiles.parse_entries(bundle, tile.width)
            hashes += data
        elif tile.level == 1:
            for i, item in enumerate(data):
                assert item == merkle.Tree(hashes[i * 256 : (i + 1) * 256]).root()
    assert [merkle.leaf_hash(entry) for entry in entries] == hashes
    assert merkle.Tree(hashes).root() == head.root
    assert len(entries) == head.size
    return tuple(entries)


def test_an_intent_is_proven_when_it_is_given_out(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)
    acceptance = committed.acceptance
    leaf = records.leaf_for(committed.intent, acceptance.record, acceptance.leaf_salt, acceptance.leaf_index)
    assert recorder.leaves(acceptance.leaf_index, 1) == (records.encode_leaf(leaf),)
    keys = boot_log_keys(read_sidecar(boot_directory(tmp_path, recorder)).keys)
    head = verify_checkpoint(acceptance.checkpoint, recorder.epoch.origin, keys, verify_signature)
    merkle.verify_inclusion(1, head.size, committed.leaf, acceptance.proof, head.root)
    assert recorder.head() == (head.size, head.root)
    assert recorder.checkpoint() == acceptance.checkpoint
    recorder.close()


def test_the_log_holds_no_prompt_and_no_output(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)
    recorder.receipt(outcome(recorder, committed))
    recorder.close()
    secrets = [committed.acceptance.record, committed.acceptance.leaf_salt, committed.intent.prompt, b"hello"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not any(secret in path.read_bytes() for secret in secrets)


def test_an_intent_ends_once(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    first, second = intent(recorder), intent(recorder)
    outcome(recorder, first)
    recorder.commit_abort(second, reason="cancelled", tokens_sent=1, end_time=1.0)
    for committed in (first, second):
        with pytest.raises(LogError) as caught:
            recorder.commit_abort(committed, reason="error", tokens_sent=0, end_time=1.0)
        assert caught.value.code == "log.ended"
        with pytest.raises(LogError):
            outcome(recorder, committed)
    assert kinds(recorder) == [Kind.EPOCH, Kind.INTENT, Kind.INTENT, Kind.OUTCOME, Kind.ABORT]
    recorder.close()


def test_published_files_are_the_log(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for _ in range(300):
        outcome(recorder, intent(recorder))
    leaves = tuple(leaf for start in range(0, 601, 100) for leaf in recorder.leaves(start, 100))
    directory = boot_directory(tmp_path, recorder)
    recorder.close()
    assert verify_published(directory) == leaves
    assert len(leaves) == 601
    assert not (directory / "tile/0/000.p").exists()


def test_many_threads_share_commits(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    done: list[Committed] = []

    def work() -> None:
        for _ in range(10):
            committed = intent(recorder)
            outcome(recorder, committed)
            done.append(committed)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    size, root = recorder.head()
    assert size == 1 + 2 * len(done) == 161
    assert len({committed.acceptance.leaf_index for committed in done}) == 80
    for committed in done:
        index = committed.acceptance.leaf_index
        merkle.verify_inclusion(index, size, committed.leaf, recorder.inclusion(index, size), root)
    frames = list(journal.read_journal(boot_directory(tmp_path, recorder) / "journal"))
    assert len(frames) <= size
    recorder.close()


def test_the_next_start_carries_on(tmp_path: Path) -> None:
    first = open_recorder(tmp_path)
    left = [intent(first), intent(first)]
    outcome(first, intent(first))
    size, root = first.head()
    first.close()

    second = open_recorder(tmp_path)
    previous = second.epoch.previous
    assert previous is not None
    assert second.epoch.epoch == 2
    assert (previous.boot_id, previous.size, previous.root) == (first.epoch.boot_id, size, root)
    assert (previous.crashed, previous.torn_bytes) == (2, 0)
    assert kinds(second) == [Kind.EPOCH, Kind.CRASHED, Kind.CRASHED]
    crashed = [parse_leaf(leaf).intent_leaf for leaf in second.leaves(1, 2)]
    assert crashed == [committed.leaf for committed in left]
    second.close()

    third = open_recorder(tmp_path)
    assert third.epoch.previous is not None
    assert third.epoch.previous.boot_id == second.epoch.boot_id
    assert kinds(third) == [Kind.EPOCH]
    third.close()


def test_a_torn_tail_is_cut_and_said(tmp_path: Path) -> None:
    first = open_recorder(tmp_path)
    intent(first)
    first.close()
    path = boot_directory(tmp_path, first) / "journal"
    path.write_bytes(path.read_bytes() + b"cmJ1\0\0\1\0torn")
    second = open_recorder(tmp_path)
    assert second.epoch.previous is not None
    assert second.epoch.previous.torn_bytes == 12
    assert second.epoch.previous.size == 2
    verify_published(boot_directory(tmp_path, first))
    second.close()


def test_starts_that_never_began_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_recorder(tmp_path)
    first.close()
    (tmp_path / ("0" * 64)).mkdir()
    for step in ("Journal.__init__", "Journal.append"):  # it gets as far as the sidecar, then to an empty journal

        def full(*_args: object) -> None:
            raise Unavailable("log: the disk is full", code="log.full")

        monkeypatch.setattr(f"countermark_appliance.records.journal.{step}", full)
        with pytest.raises(Unavailable):
            open_recorder(tmp_path)
        monkeypatch.undo()
    assert sum((path / "epoch").exists() for path in tmp_path.iterdir() if path.is_dir()) == 3
    second = open_recorder(tmp_path)
    assert second.epoch.previous is not None
    assert second.epoch.previous.boot_id == first.epoch.boot_id
    second.close()


def changed_log(root: Path) -> tuple[Recorder, Path]:
    first = open_recorder(root)
    outcome(first, intent(first))
    intent(first)
    first.close()
    return first, boot_directory(root, first)


def start_refused(root: Path, code: str) -> None:
    with pytest.raises(CountermarkError) as caught:
        open_recorder(root)
    assert caught.value.code == code
    with pytest.raises(CountermarkError):  # the lock was given back, so the second try fails alike
        open_recorder(root)


def test_a_flipped_byte_in_the_previous_log_is_refused(tmp_path: Path) -> None:
    _, directory = changed_log(tmp_path)
    path = directory / "journal"
    data = path.read_bytes()
    for at in range(10, len(data) - 4000, 997):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        start_refused(tmp_path, "log.damaged")


def test_a_flipped_byte_in_the_last_frame_is_a_lost_record(tmp_path: Path) -> None:
    _, directory = changed_log(tmp_path)
    path = directory / "journal"
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    start_refused(tmp_path, "log.lost")


def rewritten(directory: Path, change: str) -> None:
    """A host who can compute checksums, but not sign."""
    path = directory / "journal"
    frames = [item for item in journal.read_journal(path) if isinstance(item, journal.Frame)]
    out = b""
    for i, frame in enumerate(frames):
        leaves, checkpoint = list(frame.leaves), frame.checkpoint
        if change == "leaf" and i == 1:
            leaf = parse_leaf(leaves[0])
            leaves[0] = records.encode_leaf(
                records.Leaf(
                    kind=leaf.kind,
                    boot_id=leaf.boot_id,
                    sequence=leaf.sequence,
                    intent_leaf=leaf.intent_leaf,
                    commitment=bytes(32),
                )
            )
        if change == "garbage" and i == 1:
            leaves[0] = b"\0"
        if change == "checkpoint" and i == len(frames) - 1:
            checkpoint = frames[i - 1].checkpoint
        if change == "drop" and i == 1:
            continue
        out += journal.encode_frame(len(out), leaves, checkpoint)
    path.write_bytes(out)


@pytest.mark.parametrize("change", ["leaf", "garbage", "checkpoint", "drop"])
def test_a_rewritten_previous_log_is_refused(tmp_path: Path, change: str) -> None:
    _, directory = changed_log(tmp_path)
    rewritten(directory, change)
    start_refused(tmp_path, "log.previous")


def test_a_previous_log_shorter_than_published_is_refused(tmp_path: Path) -> None:
    _, directory = changed_log(tmp_path)
    path = directory / "journal"
    frames = [item for item in journal.read_journal(path) if isinstance(item, journal.Frame)]
    path.write_bytes(b"")
    out = b""
    for frame in frames[:-1]:
        out += journal.encode_frame(len(out), frame.leaves, frame.checkpoint)
    path.write_bytes(out)
    start_refused(tmp_path, "log.lost")


@pytest.mark.parametrize("left", ["nothing", "torn", "gone"])
def test_a_log_that_published_but_holds_nothing_is_no_start_that_never_began(tmp_path: Path, left: str) -> None:
    """Only the EPOCH was ever written, so the journal without its one frame looks like a start that failed."""
    open_recorder(tmp_path).close()
    second = open_recorder(tmp_path)
    second.close()
    path = boot_directory(tmp_path, second) / "journal"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if left == "torn" else b"")
    if left == "gone":
        path.unlink()
    start_refused(tmp_path, "log.lost")


def test_what_the_file_system_refuses_at_a_start_has_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = changed_log(tmp_path)
    (directory / "checkpoint").unlink()
    (directory / "checkpoint").mkdir()
    with pytest.raises(ConfigError) as strange:
        open_recorder(tmp_path)
    assert strange.value.code == "log.directory"

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("previous.publish", "recorder.write_sidecar"):
        monkeypatch.setattr(f"countermark_appliance.records.{name}", full)
        with pytest.raises(Unavailable) as caught:
            open_recorder(tmp_path)
        assert caught.value.code == "log.full"
        monkeypatch.undo()
        shutil.rmtree(directory / "checkpoint", ignore_errors=True)
    open_recorder(tmp_path).close()  # nothing was left locked


def test_a_foreign_sidecar_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    changed_log(other)
    root = tmp_path / "log"
    _, directory = changed_log(root)
    foreign = next(path for path in other.iterdir() if path.is_dir())
    shutil.copy(foreign / "epoch", directory / "epoch")
    start_refused(root, "log.previous")


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    _, directory = changed_log(tmp_path)
    path = directory / "epoch"
    data = path.read_bytes()
    for at in (0, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        start_refused(tmp_path, "log.previous")


def test_moving_the_log_away_starts_anew_and_says_so(tmp_path: Path) -> None:
    _, directory = changed_log(tmp_path / "log")
    directory.rename(tmp_path / "aside")
    second = open_recorder(tmp_path / "log")
    assert (second.epoch.epoch, second.epoch.previous) == (1, None)
    second.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_recorder(tmp_path)
    assert caught.value.code == "log.locked"
    script = f"""
import sys, json
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from record_values import open_recorder
from countermark.errors import CountermarkError
try:
    open_recorder(Path({str(tmp_path)!r}))
except CountermarkError as err:
    print(json.dumps([type(err).__name__, err.code]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert json.loads(ran.stdout) == ["ConfigError", "log.locked"]
    recorder.close()
    recorder.close()
    open_recorder(tmp_path).close()


def test_after_close_nothing_is_taken(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)
    recorder.close()
    for call in (lambda: intent(recorder), lambda: outcome(recorder, committed), lambda: recorder.leaves(0, 1)):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.code == "log.closed"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        open_recorder(tmp_path / "file" / "log")
    assert caught.value.code == "log.directory"


def test_ranges_are_checked(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for call in (
        lambda: recorder.inclusion(0, 2),
        lambda: recorder.inclusion(1, 1),
        lambda: recorder.inclusion(-1, 1),
        lambda: recorder.consistency(2, 1),
        lambda: recorder.consistency(1, 2),
        lambda: recorder.leaves(2, 1),
        lambda: recorder.leaves(-1, 1),
        lambda: recorder.leaves(0, 1025),
    ):
        with pytest.raises(LogError) as caught:
            call()
        assert caught.value.code == "log.range"
    recorder.close()
