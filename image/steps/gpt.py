"""A GPT disk whose every byte is chosen (UEFI specification 2.10, section 5.3): 512-byte sectors, partitions on MiB."""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BuildError

SECTOR: Final = 512
ALIGN: Final = 2048  # sectors
ENTRIES: Final = 128
ENTRY_BYTES: Final = 128
TABLE_SECTORS: Final = ENTRIES * ENTRY_BYTES // SECTOR

TYPE_ESP: Final = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
TYPE_ROOT: Final = uuid.UUID(
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
)  # root, x86-64 (Discoverable Partitions Specification)
TYPE_ROOT_VERITY: Final = uuid.UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
TYPE_DATA: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition and the file that fills it, padded with zeros to a whole MiB."""

    name: str
    type_guid: uuid.UUID
    guid: uuid.UUID
    content: Path


def write_disk(target: Path, disk_guid: uuid.UUID, partitions: tuple[Partition, ...]) -> None:
    """Write a disk image with these partitions, one after the other from the first MiB on.

    The file is sparse where contents are zero. Raises `BuildError` for a name that GPT cannot hold.
    """
    entries, start, places = b"", ALIGN, []
    for partition in partitions:
        name = partition.name.encode("utf-16-le")
        if len(name) > 70 or not partition.content.stat().st_size:
            raise BuildError(f"partition {partition.name}: name longer than 35 characters, or no content")
        sectors = -(-partition.content.stat().st_size // (ALIGN * SECTOR)) * ALIGN
        ends = struct.pack("<QQQ", start, start + sectors - 1, 0)
        entries += partition.type_guid.bytes_le + partition.guid.bytes_le + ends + name.ljust(72, b"\0")
        places.append((partition, start))
        start += sectors
    entries = entries.ljust(ENTRIES * ENTRY_BYTES, b"\0")
    total = start + ALIGN  # room for the second table, on a whole MiB
    first = _header(1, total - 1, 2, total, disk_guid, entries)
    second = _header(total - 1, 1, total - 1 - TABLE_SECTORS, total, disk_guid, entries)
    with target.open("wb") as out:
        out.truncate(total * SECTOR)
        out.write(_protective_mbr(total) + first + entries)
        out.seek((total - 1 - TABLE_SECTORS) * SECTOR)
        out.write(entries + second)
        for partition, at in places:
            out.seek(at * SECTOR)
            _copy_sparse(partition.content, out.fileno(), at * SECTOR)


def _header(here: int, other: int, table: int, total: int, disk: uuid.UUID, entries: bytes) -> bytes:
    first, last = 2 + TABLE_SECTORS, total - 2 - TABLE_SECTORS
    fields = (b"EFI PART", 0x00010000, 92, 0, 0, here, other, first, last, disk.bytes_le, table)
    tail = (ENTRIES, ENTRY_BYTES, zlib.crc32(entries))
    header = struct.pack("<8sIIIIQQQQ16sQIII", *fields, *tail)
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    return header.ljust(SECTOR, b"\0")


def _protective_mbr(total: int) -> bytes:
    # One partition of type EE from sector 1 to the end; start and end cylinders as section 5.2.3 has them.
    record = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, min(total - 1, 0xFFFFFFFF))
    return bytes(446) + record + bytes(48) + b"\x55\xaa"


def _copy_sparse(source: Path, target: int, at: int) -> None:
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                os.pwrite(target, block, at)
            at += len(block)
