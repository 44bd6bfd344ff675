"""The files of a FAT volume, read from an image of it: an EFI system partition as firmware sees it.

Microsoft, "FAT: General Overview of On-Disk Format", 1.03 (2000), as UEFI 2.10 section 13.3 takes it over. FAT12, FAT16
and FAT32, told apart by the number of clusters; long names where there are any. Everything is read, so that whoever
asks for one file can see that there is no other: systemd-stub takes credentials, extensions and addons from this
volume.

Stricter than firmware: 512-byte sectors, every chain as long as its file, no cluster in two files, caps on all counts.

Not checked here: free clusters, the second FAT, times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from countermark.errors import FormatError

MAX_VOLUME_BYTES: Final = 4 << 30
MAX_FILES: Final = 1024
MAX_FILE_BYTES: Final = 1 << 30
MAX_DEPTH: Final = 8
_SECTOR_BYTES: Final = 512
_ENTRY_BYTES: Final = 32
_DIRECTORY: Final = 0x10
_LABEL: Final = 0x08
_LONG_NAME: Final = 0x0F
_LONG_NAME_AT: Final = ((1, 11), (14, 26), (28, 32))


@dataclass(slots=True, kw_only=True)
class _Volume:
    data: bytes
    kind: int  # 12, 16 or 32
    cluster_bytes: int
    clusters: int
    fat: bytes
    data_at: int
    used: set[int] = field(default_factory=set)

    def chain(self, first: int) -> Iterator[int]:
        """The clusters from `first` to the end of their chain, each claimed."""
        cluster = first
        end = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[self.kind]
        while cluster < end:
            if not 2 <= cluster < self.clusters + 2 or cluster in self.used:
                raise FormatError(f"fat: expected a chain of clusters of its own, got {cluster}", code="fat.chain")
            self.used.add(cluster)
            yield cluster
            cluster = self.next(cluster)

    def next(self, cluster: int) -> int:
        if self.kind == 32:
            return int.from_bytes(self.fat[4 * cluster : 4 * cluster + 4], "little") & 0x0FFFFFFF
        if self.kind == 16:
            return int.from_bytes(self.fat[2 * cluster : 2 * cluster + 2], "little")
        at = cluster * 3 // 2
        pair = int.from_bytes(self.fat[at : at + 2], "little")
        return pair >> 4 if cluster % 2 else pair & 0xFFF

    def read(self, first: int) -> bytes:
        """What a chain holds, whole clusters."""
        starts = (self.data_at + (cluster - 2) * self.cluster_bytes for cluster in self.chain(first))
        return b"".join(self.data[start : start + self.cluster_bytes] for start in starts)


def read_files(data: bytes) -> dict[str, bytes]:
    """Every file of a volume by its path (`EFI/BOOT/BOOTX64.EFI`), directories without files by theirs with a slash.

    Raises `FormatError` with a code below `fat.`.
    """
    volume, root = _open(data)
    files: dict[str, bytes] = {}
    _walk(volume, root, "", files, 0)
    return files


def _open(data: bytes) -> tuple[_Volume, bytes]:
    """The volume and its root directory."""
    if not _SECTOR_BYTES <= len(data) <= MAX_VOLUME_BYTES or data[510:512] != b"\x55\xaa":
        raise FormatError("fat: expected a boot sector", code="fat.boot_sector")

    def word(at: int, size: int = 2) -> int:
        return int.from_bytes(data[at : at + size], "little")

    per_cluster, reserved, fats, root_entries = data[13], word(14), data[16], word(17)
    sectors = word(19) or word(32, 4)
    fat_sectors = word(22) or word(36, 4)
    root_sectors = root_entries * _ENTRY_BYTES // _SECTOR_BYTES
    sane = word(11) == _SECTOR_BYTES and per_cluster.bit_count() == 1 and reserved and fats in (1, 2) and fat_sectors
    data_sector = reserved + fats * fat_sectors + root_sectors
    if not sane or root_entries % 16 or not data_sector < sectors <= len(data) // _SECTOR_BYTES:
        raise FormatError("fat: expected a boot sector whose numbers fit the volume", code="fat.boot_sector")
    clusters = (sectors - data_sector) // per_cluster
    kind = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
    fat = data[reserved * _SECTOR_BYTES : (reserved + fat_sectors) * _SECTOR_BYTES]
    if len(fat) * 8 < (clusters + 2) * kind or (kind == 32) != (root_entries == 0) or (kind == 32 and word(42)):
        raise FormatError(f"fat: expected a FAT{kind} for {clusters} clusters", code="fat.boot_sector")
    volume = _Volume(
        data=data,
        kind=kind,
        cluster_bytes=per_cluster * _SECTOR_BYTES,
        clusters=clusters,
        fat=fat,
        data_at=data_sector * _SECTOR_BYTES,
    )
    if kind == 32:
        return volume, volume.read(word(44, 4))
    return volume, data[(data_sector - root_sectors) * _SECTOR_BYTES : data_sector * _SECTOR_BYTES]


def _walk(volume: _Volume, directory: bytes, path: str, files: dict[str, bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"fat: expected at most {MAX_DEPTH} directories in each other", code="fat.too_deep")
    seen: set[str] = set()
    for name, entry in _entries(directory):
        if name in (".", ".."):
            continue
        if name.upper() in seen or len(files) >= MAX_FILES:
            message = f"fat: expected at most {MAX_FILES} files and each name once, got {path}{name}"
            raise FormatError(message, code="fat.names")
        seen.add(name.upper())
        first = int.from_bytes(entry[26:28], "little")
        if volume.kind == 32:
            first |= int.from_bytes(entry[20:22], "little") << 16
        size = int.from_bytes(entry[28:32], "little")
        if entry[11] & _DIRECTORY:
            before = len(files)
            _walk(volume, volume.read(first), f"{path}{name}/", files, depth + 1)
            if len(files) == before:
                files[f"{path}{name}/"] = b""
            continue
        content = volume.read(first) if first else b""
        if size > MAX_FILE_BYTES or len(content) != -(-size // volume.cluster_bytes) * volume.cluster_bytes:
            raise FormatError(f"fat: expected as many clusters as {path}{name} is long", code="fat.chain")
        files[path + name] = content[:size]


def _entries(directory: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and entry of what a directory lists."""
    long_name: list[bytes] = []
    for at in range(0, len(directory), _ENTRY_BYTES):
        entry = directory[at : at + _ENTRY_BYTES]
        if entry[0] == 0:
            return
        if entry[0] == 0xE5:
            long_name = []
            continue
        if entry[11] & 0x3F == _LONG_NAME:
            long_name.append(entry)
            continue
        if entry[11] & _LABEL:
            long_name = []
            continue
        yield (_long(long_name, entry) if long_name else _short(entry)), entry
        long_name = []


def _short(entry: bytes) -> str:
    # Bits 3 and 4 of byte 12 say that base or extension are in lower case (Windows NT and Linux write this).
    base, extension = entry[:8].rstrip(b" "), entry[8:11].rstrip(b" ")
    base = base.lower() if entry[12] & 0x08 else base
    extension = extension.lower() if entry[12] & 0x10 else extension
    name = (base + b"." + extension if extension else base).decode("latin-1")
    if not name.isascii() or not name.isprintable() or any(char in name for char in "/\\"):
        raise FormatError("fat: expected a printable name in ASCII", code="fat.names")
    return name


def _long(parts: list[bytes], entry: bytes) -> str:
    """The long name in these entries, which stand in reverse order before the short one."""
    checksum = 0
    for byte in entry[:11]:
        checksum = ((checksum >> 1 | checksum << 7) + byte) & 0xFF
    count = len(parts)
    for number, part in zip(range(count, 0, -1), parts, strict=True):
        if part[0] != number | (0x40 if number == count else 0) or part[13] != checksum:
            raise FormatError("fat: expected the parts of a long name in order, with its checksum", code="fat.names")
    raw = b"".join(part[start:end] for part in reversed(parts) for start, end in _LONG_NAME_AT)
    try:
        name = raw.decode("utf-16-le").split("\0", 1)[0]
    except ValueError as err:
        raise FormatError("fat: expected UTF-16 in a long name", code="fat.names") from err
    if not name or not name.isascii() or not name.isprintable() or any(char in name for char in "/\\"):
        raise FormatError("fat: expected a printable name in ASCII", code="fat.names")
    return name
