"""The journal: the one file of a log that is synced. Everything else on disk is derived from it.

A frame is what one group commit appended: magic, u32 body length, u32 leaf count, body, 16 bytes of SHA-256 over the
frame's offset and all before. The body is the leaves, each after its u16 length (big-endian), then the checkpoint that
covers them. A frame is acknowledged only after `fdatasync`, and no second frame is begun before that; so after a crash
at most the last frame is incomplete, and an incomplete frame was never acknowledged.

The file is allocated ahead of its end. The last `RESERVE_BYTES` of what the disk gives are kept for ending what was
begun: a full disk refuses new INTENTs first and still takes the OUTCOMEs of accepted ones.

The checksum finds crashes, not forgers: who may write the disk may write a checksum. The checkpoint's signatures are
checked by whoever reads a journal back (`previous`).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from countermark.errors import LogError, Unavailable

MAGIC: Final = b"cmJ1"
HEADER_BYTES: Final = 12
DIGEST_BYTES: Final = 16
MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
CHUNK_BYTES: Final = 4 * 1024 * 1024
RESERVE_BYTES: Final = 1024 * 1024
FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One group commit. `offset` is where its first leaf's length stands in the file."""

    offset: int
    leaves: tuple[bytes, ...]
    checkpoint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """How a journal ends: at `end`, after which `torn_bytes` of an incomplete frame follow."""

    end: int
    torn_bytes: int


class Journal:
    """The journal of a running log, open for appending. Not thread-safe: its owner holds a lock."""

    def __init__(self, path: Path) -> None:
        """Create the file. Raises `Unavailable` (`log.full`) when there is no room for a first chunk."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.end = 0
        self._allocated = 0
        self._failed = False
        if not self.has_room(0, new=True):
            self.close()
            path.unlink()
            raise _full()

    def close(self) -> None:
        """Give back what was allocated ahead and close."""
        if not self._failed:
            os.ftruncate(self._fd, self.end)
            os.fsync(self._fd)
        os.close(self._fd)

    def has_room(self, size: int, *, new: bool) -> bool:
        """Whether `size` more bytes fit; for something `new`, without touching the reserve."""
        wanted = self.end + size + (RESERVE_BYTES if new else 0)
        while self._allocated < wanted:
            try:
                os.posix_fallocate(self._fd, self._allocated, CHUNK_BYTES)
            except OSError as err:
                if err.errno not in FULL:
                    raise
                return False
            self._allocated += CHUNK_BYTES
        return True

    def append(self, leaves: Sequence[bytes], checkpoint: bytes) -> int:
        """Write one frame and sync it; returns the offset of its first leaf.

        Raises `Unavailable`: `log.full` (nothing was appended; the journal stays usable) or `log.failed` (the disk
        failed while syncing; what it holds is unknown, so nothing is ever appended again).
        """
        if self._failed:
            raise _failed()
        frame = encode_frame(self.end, leaves, checkpoint)
        try:
            _write_all(self._fd, frame, self.end)
        except OSError as err:
            self._take_back()
            if err.errno in FULL:
                raise _full() from err
            self._failed = True
            raise _failed() from err
        try:
            os.fdatasync(self._fd)
        except OSError as err:
            self._failed = True
            raise _failed() from err
        start = self.end + HEADER_BYTES
        self.end += len(frame)
        self._allocated = max(self._allocated, self.end)
        return start

    def read_leaf(self, offset: int) -> bytes:
        """The leaf whose length stands at `offset`."""
        return leaf_at(self._fd, offset)

    def _take_back(self) -> None:
        """Cut what a failed write may have left, so that nothing stale ever follows a frame."""
        try:
            os.ftruncate(self._fd, self.end)
        except OSError:
            self._failed = True
        self._allocated = self.end


def encode_frame(offset: int, leaves: Sequence[bytes], checkpoint: bytes) -> bytes:
    """The bytes of one frame that will stand at `offset`."""
    body = b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in leaves) + checkpoint
    frame = MAGIC + len(body).to_bytes(4, "big") + len(leaves).to_bytes(4, "big") + body
    return frame + _digest(offset, frame)


def read_journal(path: Path) -> Iterator[Frame | Tail]:
    """All complete frames of a journal, then its `Tail`.

    Raises `LogError` (`log.damaged`) when a complete frame stands after an incomplete one: that is no torn tail.
    """
    if path.stat().st_size == 0:
        yield Tail(end=0, torn_bytes=0)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while (frame := _parse_frame(data, at)) is not None:
            yield frame[0]
            at = frame[1]
        search = at
        while (search := data.find(MAGIC, search + 1)) >= 0:
            if _parse_frame(data, search) is not None:
                message = f"{path.name}: damaged at byte {at}, before a complete frame at byte {search}"
                raise LogError(message, code="log.damaged")
        yield Tail(end=at, torn_bytes=_used(data, at))


def leaf_at(fd: int, offset: int) -> bytes:
    """The leaf whose length stands at `offset` of an open journal (leaves are under 1000 bytes)."""
    head = os.pread(fd, 1024, offset)
    return head[2 : 2 + int.from_bytes(head[:2], "big")]


def leaf_offsets(frame: Frame) -> Iterator[int]:
    """Where each leaf of a frame stands."""
    offset = frame.offset
    for leaf in frame.leaves:
        yield offset
        offset += 2 + len(leaf)


def cut(path: Path, end: int) -> None:
    """Cut a journal to its complete frames, durably."""
    with path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _used(data: mmap.mmap, start: int) -> int:
    """Length of what follows `start`, without the zeros of space allocated ahead."""
    end = len(data)
    while end > start:
        kept = data[max(start, end - CHUNK_BYTES) : end].rstrip(b"\0")
        if kept:
            return max(start, end - CHUNK_BYTES) + len(kept) - start
        end = max(start, end - CHUNK_BYTES)
    return 0


def _parse_frame(data: mmap.mmap, at: int) -> tuple[Frame, int] | None:
    """The complete frame at `at` and where it ends."""
    head = data[at : at + HEADER_BYTES]
    if len(head) < HEADER_BYTES or head[:4] != MAGIC:
        return None
    length, count = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    body_end = at + HEADER_BYTES + length
    if length > MAX_FRAME_BYTES or body_end + DIGEST_BYTES > len(data):
        return None
    if data[body_end : body_end + DIGEST_BYTES] != _digest(at, data[at:body_end]):
        return None
    leaves: list[bytes] = []
    position = at + HEADER_BYTES
    for _ in range(count):
        end = position + 2 + int.from_bytes(data[position : position + 2], "big")
        if end > body_end:
            return None
        leaves.append(data[position + 2 : end])
        position = end
    frame = Frame(offset=at + HEADER_BYTES, leaves=tuple(leaves), checkpoint=data[position:body_end])
    return frame, body_end + DIGEST_BYTES


def _digest(offset: int, frame: bytes) -> bytes:
    return hashlib.sha256(offset.to_bytes(8, "big") + frame).digest()[:DIGEST_BYTES]


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _full() -> Unavailable:
    return Unavailable("log: the disk is full; nothing was appended", code="log.full")


def _failed() -> Unavailable:
    return Unavailable("log: the disk failed; restart on a working one", code="log.failed")
