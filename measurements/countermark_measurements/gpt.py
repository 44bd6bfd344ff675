"""A GPT disk: its partition table, and the event that firmware measures of it.

UEFI 2.10, section 5.3: a header in the second sector, an array of entries, a copy of both at the end of the disk; each
has a CRC-32. The event is UEFI_GPT_DATA (TCG PC Client Platform Firmware Profile 1.05, section 10.2.11): the
header (92 bytes), the number of entries in use as u64, then those entries; its digest is over all of this.

edk2 (stable tag 202502, `DxeTpm2MeasureBootLib.c`) measures the primary table when an image is loaded from the disk's
first partition that it boots, once. We demand more than it does: the protective MBR, both copies equal, no overlap, and
sectors of 512 bytes, as QEMU's virtio disks have them.

Not measured by anybody, and not checked here: what the partitions hold.
"""

from __future__ import annotations

import binascii
import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from countermark.errors import FormatError

SECTOR_BYTES: Final = 512
ENTRY_BYTES: Final = 128
MAX_ENTRIES: Final = 128
HEADER_BYTES: Final = 92
EFI_SYSTEM: Final = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_ARRAY_SECTORS: Final = MAX_ENTRIES * ENTRY_BYTES // SECTOR_BYTES
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition: its number from 1, its place in bytes, its name."""

    number: int
    kind: UUID
    unique: UUID
    start: int  # bytes from the start of the disk
    size: int  # bytes
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt:
    """A disk's table. `event`: the bytes that are measured."""

    partitions: tuple[Partition, ...]
    event: bytes

    @property
    def system(self) -> Partition:
        """The EFI system partition. Raises `FormatError` `gpt.system` unless there is exactly one."""
        found = [partition for partition in self.partitions if partition.kind == EFI_SYSTEM]
        if len(found) != 1:
            raise FormatError(f"gpt: expected one EFI system partition, got {len(found)}", code="gpt.system")
        return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    header: bytes
    lba: int
    backup_lba: int
    first_usable: int
    last_usable: int
    entries_lba: int


def read_gpt(disk: Path) -> Gpt:
    """The table of a disk image, both copies checked. Raises `FormatError` with a code below `gpt.`."""
    size = disk.stat().st_size
    last = size // SECTOR_BYTES - 1
    if size % SECTOR_BYTES or last < 67:
        raise FormatError(f"gpt: expected whole sectors and at least 68 of them, got {size} bytes", code="gpt.size")
    with disk.open("rb") as file:

        def sectors(lba: int, count: int) -> bytes:
            file.seek(lba * SECTOR_BYTES)
            return file.read(count * SECTOR_BYTES)

        mbr = sectors(0, 1)
        if mbr[510:512] != b"\x55\xaa" or mbr[450] != 0xEE or any(mbr[462:510]):
            raise FormatError("gpt: expected a protective MBR alone", code="gpt.mbr")
        primary = _table(sectors(1, 1), 1, last)
        backup = _table(sectors(last, 1), last, last)
        entries = sectors(primary.entries_lba, _ARRAY_SECTORS)
        copy = sectors(backup.entries_lba, _ARRAY_SECTORS)
    for table, array in ((primary, entries), (backup, copy)):
        if binascii.crc32(array) != int.from_bytes(table.header[88:92], "little"):
            raise FormatError("gpt: expected the entries' CRC-32", code="gpt.crc")
    same = (primary.header[40:72], primary.header[80:92], primary.lba, primary.backup_lba)
    if entries != copy or same != (backup.header[40:72], backup.header[80:92], backup.backup_lba, backup.lba):
        raise FormatError("gpt: expected both copies to say the same", code="gpt.copy")
    slots = enumerate((entries[at : at + ENTRY_BYTES] for at in range(0, len(entries), ENTRY_BYTES)), start=1)
    used = [(number, entry) for number, entry in slots if any(entry[:16])]
    partitions = tuple(_partition(entry, number, primary) for number, entry in used)
    spans = sorted((item.start, item.start + item.size) for item in partitions)
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        raise FormatError("gpt: expected no overlap of partitions", code="gpt.partition")
    event = primary.header + struct.pack("<Q", len(partitions)) + b"".join(entry for _, entry in used)
    return Gpt(partitions=partitions, event=event)


def _table(sector: bytes, lba: int, last: int) -> _Table:
    fields = _HEADER.unpack(sector[:HEADER_BYTES])
    signature, revision, size, crc, reserved, own, other, first_usable, last_usable = fields[:9]
    entries_lba, count, entry_size = fields[10:13]
    if (signature, revision, size, reserved) != (b"EFI PART", 0x00010000, HEADER_BYTES, 0) or any(
        sector[HEADER_BYTES:]
    ):
        raise FormatError(f"gpt: expected a header of revision 1.0 in sector {lba}", code="gpt.header")
    if crc != binascii.crc32(sector[:16] + bytes(4) + sector[20:HEADER_BYTES]):
        raise FormatError("gpt: expected the header's CRC-32", code="gpt.crc")
    if count != MAX_ENTRIES or entry_size != ENTRY_BYTES:
        message = f"gpt: expected {MAX_ENTRIES} entries of {ENTRY_BYTES} bytes, got {count} of {entry_size}"
        raise FormatError(message, code="gpt.header")
    if own != lba or other != (last if lba == 1 else 1) or not 2 <= entries_lba <= last - _ARRAY_SECTORS:
        raise FormatError("gpt: expected headers in the first and the last sector", code="gpt.header")
    if not 2 + _ARRAY_SECTORS <= first_usable <= last_usable < last - _ARRAY_SECTORS:
        raise FormatError("gpt: expected usable sectors between the two tables", code="gpt.header")
    return _Table(
        header=sector[:HEADER_BYTES],
        lba=own,
        backup_lba=other,
        first_usable=first_usable,
        last_usable=last_usable,
        entries_lba=entries_lba,
    )


def _partition(entry: bytes, number: int, table: _Table) -> Partition:
    first, last, _ = struct.unpack("<QQQ", entry[32:56])
    if not table.first_usable <= first <= last <= table.last_usable:
        raise FormatError(f"gpt: expected partition {number} in the usable sectors", code="gpt.partition")
    try:
        name = entry[56:].decode("utf-16-le").rstrip("\0")
    except ValueError as err:
        raise FormatError(f"gpt: expected UTF-16 in the name of partition {number}", code="gpt.partition") from err
    return Partition(
        number=number,
        kind=UUID(bytes_le=entry[:16]),
        unique=UUID(bytes_le=entry[16:32]),
        start=first * SECTOR_BYTES,
        size=(last - first + 1) * SECTOR_BYTES,
        name=name,
    )
