"""The image's container: a deterministic, uncompressed USTAR archive (POSIX.1-1988) that is a whole number of blocks.

One member list has one image: mode 0444, uid, gid and times zero, no user or group names, data padded with zeros to 512
bytes, two zero records, then zeros to a multiple of 4096. Any tar extracts it. The reader accepts nothing else: each
header must equal, byte for byte, the header this module would write for that name and size.

Not checked here: which members there are and what they hold (`artefact`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from blake3 import blake3

from countermark.errors import WeightsError

RECORD = 512
BLOCK = 4096
MAX_MEMBERS = 65_536
MAX_MEMBER_BYTES = 8**11 - 1
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.]*(?:/[A-Za-z0-9_][A-Za-z0-9_.]*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of the image; `offset` is where its data begins."""

    name: str
    offset: int
    size_bytes: int


def header(name: str, size_bytes: int) -> bytes:
    """The 512-byte USTAR header of one member."""
    raw = name.encode("ascii")
    assert len(raw) <= 100 and _NAME.fullmatch(raw) and 0 <= size_bytes <= MAX_MEMBER_BYTES
    fields = (
        raw.ljust(100, b"\0"),
        b"0000444\0",
        b"0000000\0" * 2,  # uid, gid
        b"%011o\0" % size_bytes,
        b"00000000000\0",  # mtime
        b" " * 8,  # checksum, computed with spaces here
        b"0",  # regular file
        bytes(100),  # link name
        b"ustar\x0000",
        bytes(64),  # user and group names
        b"0000000\0" * 2,  # device numbers
        bytes(167),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def image_bytes(sizes: list[int]) -> int:
    """Size of the image that holds members of these sizes."""
    return padded(sum(RECORD + padded(size, RECORD) for size in sizes) + 2 * RECORD, BLOCK)


class Packer:
    """Writes one image, member by member, and keeps each member's BLAKE3."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("w+b")
        self._left = 0
        self._hash = blake3()
        self._name = ""
        self.digests: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, name: str, size_bytes: int) -> int:
        """Start a member of exactly `size_bytes`; returns the offset of its data."""
        assert self._left == 0 and name not in self.digests
        self._file.write(header(name, size_bytes))
        self._name, self._left, self._hash = name, size_bytes, blake3(max_threads=blake3.AUTO)
        offset = self._file.tell()
        if size_bytes == 0:
            self._end()
        return offset

    def write(self, data: bytes | memoryview) -> None:
        """Append to the current member."""
        size = memoryview(data).nbytes
        assert 0 < size <= self._left
        self._file.write(data)
        self._hash.update(data)
        self._left -= size
        if self._left == 0:
            self._end()

    def _end(self) -> None:
        self.digests[self._name] = self._hash.digest()
        self._file.write(bytes(-self._file.tell() % RECORD))

    def rewrite(self, offset: int, data: bytes) -> None:
        """Replace bytes of a finished member (the manifest, whose size is known before its content)."""
        end = self._file.tell()
        self._file.seek(offset)
        self._file.write(data)
        self._file.seek(end)

    def close(self) -> int:
        """Write the end of the archive; returns the image's size."""
        assert self._left == 0
        self._file.write(bytes(2 * RECORD))
        self._file.write(bytes(-self._file.tell() % BLOCK))
        size = self._file.tell()
        self._file.flush()
        return size


def read_header(image: memoryview, position: int) -> Member | None:
    """The member whose header is at `position`, or None at the end-of-archive record. Raises `weights.image`."""
    raw = bytes(image[position : position + RECORD])
    if raw == bytes(RECORD):
        return None
    name, digits = raw[:100].rstrip(b"\0"), raw[124:135]
    if not _NAME.fullmatch(name) or not re.fullmatch(rb"[0-7]{11}", digits):
        raise _bad(position, "expected a member's header")
    size = int(digits, 8)
    if raw != header(name.decode("ascii"), size):
        raise _bad(position, "expected the one header of this name and size")
    if position + RECORD + padded(size, RECORD) > len(image):
        raise _bad(position, f"expected {size} bytes of data inside the image")
    return Member(name=name.decode("ascii"), offset=position + RECORD, size_bytes=size)


def read_members(image: memoryview) -> list[Member]:
    """All members of an image; every header, padding byte and the end are checked. Raises `weights.image`."""
    found: list[Member] = []
    position = 0
    while (member := read_header(image, position)) is not None:
        end = member.offset + member.size_bytes
        position = member.offset + padded(member.size_bytes, RECORD)
        if any(image[end:position]):
            raise _bad(end, "expected zeros after the data")
        found.append(member)
        if len(found) > MAX_MEMBERS:
            raise _bad(position, f"expected at most {MAX_MEMBERS} members")
    if len(image) != padded(position + 2 * RECORD, BLOCK) or any(image[position:]):
        raise _bad(position, "expected zeros to the end of the last block and nothing after")
    return found


def _bad(position: int, problem: str) -> WeightsError:
    return WeightsError(f"image, byte {position}: {problem}", code="weights.image")
