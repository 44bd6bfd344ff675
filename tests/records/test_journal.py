"""The journal: torn tails are cut, damage is not mistaken for one, a full disk takes nothing back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from countermark.errors import LogError, Unavailable
from countermark_appliance.records import journal
from countermark_appliance.records.journal import CHUNK_BYTES, Frame, Journal, Tail, encode_frame, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def frames(path: Path) -> tuple[list[Frame], Tail]:
    *items, tail = read_journal(path)
    assert isinstance(tail, Tail)
    return [item for item in items if isinstance(item, Frame)], tail


def written(path: Path, count: int = 3) -> list[int]:
    """Writes frames of 1, 2, ... leaves and returns where each ends."""
    log = Journal(path)
    ends = []
    for i in range(1, count + 1):
        log.append([bytes([i]) * (i + j) for j in range(i)], b"checkpoint %d" % i)
        ends.append(log.end)
    log.close()
    return ends


def test_frames_come_back_while_open_and_after_close(path: Path) -> None:
    log = Journal(path)
    offset = log.append([b"first", b"second"], b"checkpoint")
    assert [log.read_leaf(offset), log.read_leaf(offset + 7)] == [b"first", b"second"]
    found, tail = frames(path)  # still allocated ahead: the rest of the file is zero
    assert path.stat().st_size == CHUNK_BYTES
    assert [(f.leaves, f.checkpoint) for f in found] == [((b"first", b"second"), b"checkpoint")]
    assert list(journal.leaf_offsets(found[0])) == [offset, offset + 7]
    assert tail == Tail(end=log.end, torn_bytes=0)
    log.close()
    assert path.stat().st_size == tail.end


def test_every_torn_tail_is_cut_to_the_last_frame(path: Path) -> None:
    ends = written(path)
    data = path.read_bytes()
    for length in range(ends[1], ends[2]):
        for rest in (b"", bytes(100)):
            path.write_bytes(data[:length] + rest)
            found, tail = frames(path)
            assert len(found) == 2
            assert tail.end == ends[1]
            assert tail.torn_bytes <= length - ends[1]


def test_a_page_that_never_arrived_is_a_torn_tail(path: Path) -> None:
    ends = written(path)
    data = bytearray(path.read_bytes())
    data[ends[1] : ends[1] + 8] = bytes(8)
    path.write_bytes(bytes(data))
    found, tail = frames(path)
    assert (len(found), tail.end) == (2, ends[1])
    assert tail.torn_bytes > 0


def test_damage_before_a_complete_frame_is_no_torn_tail(path: Path) -> None:
    ends = written(path)
    data = path.read_bytes()
    for at in range(0, ends[1], 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(LogError) as caught:
            frames(path)
        assert caught.value.code == "log.damaged"


def test_a_frame_moved_elsewhere_is_not_one(path: Path) -> None:
    path.write_bytes(encode_frame(5, [b"leaf"], b"checkpoint"))
    assert frames(path)[0] == []


def test_the_empty_file_has_no_frames(path: Path) -> None:
    path.touch()
    assert frames(path) == ([], Tail(end=0, torn_bytes=0))


def test_cut_is_exact(path: Path) -> None:
    ends = written(path)
    path.write_bytes(path.read_bytes() + b"rest")
    journal.cut(path, ends[2])
    assert path.stat().st_size == ends[2]


def test_a_full_disk_takes_nothing_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(path)
    log.append([b"kept"], b"checkpoint")
    real = os.pwrite

    def half(fd: int, data: bytes, offset: int) -> int:
        if offset > log.end:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(Unavailable) as caught:
        log.append([b"refused"], b"checkpoint")
    assert caught.value.code == "log.full"
    monkeypatch.undo()
    log.append([b"later"], b"checkpoint")
    log.close()
    found, tail = frames(path)
    assert [f.leaves for f in found] == [(b"kept",), (b"later",)]
    assert tail.torn_bytes == 0


def test_a_disk_that_fails_while_syncing_is_never_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(path)

    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            log.append([b"leaf"], b"checkpoint")
        assert caught.value.code == "log.failed"
        monkeypatch.undo()
    log.close()


def test_the_reserve_is_for_ending_what_was_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(path)

    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    room = CHUNK_BYTES - journal.RESERVE_BYTES
    assert log.has_room(room, new=True)
    assert not log.has_room(room + 1, new=True)
    assert log.has_room(CHUNK_BYTES, new=False)
    assert not log.has_room(CHUNK_BYTES + 1, new=False)
    log.close()


def test_no_room_for_the_first_chunk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Unavailable) as caught:
        Journal(path)
    assert caught.value.code == "log.full"
    assert not path.exists()
