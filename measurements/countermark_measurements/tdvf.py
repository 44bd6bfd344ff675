"""MRTD of a TDX virtual firmware image: which pages the VMM adds before the TD runs, and which of them it measures.

The image says so itself. Intel TDX Virtual Firmware Design Guide (344991-004), section 11: a table of GUIDed entries
ends 32 bytes before the end of the file; one entry gives the offset, from the end of the file, of a descriptor
"TDVF" with sections of 32 bytes each. Every section's pages are added; those with the attribute MR.EXTEND are measured.

MRTD is SHA-384 over one stream (Intel TDX Module Base Architecture Specification 348549-004, section 13.1.1, and the
ABI specification's TDH.MEM.PAGE.ADD and TDH.MR.EXTEND):

- adding a page: 128 bytes, "MEM.PAGE.ADD", at offset 16 the guest physical address, the rest zero;
- measuring 256 bytes of it: 128 bytes, "MR.EXTEND", at offset 16 the address of the piece, the rest zero; then the
  piece.

The order is the VMM's. QEMU 9 and later (upstream since 10.1: `KVM_TDX_INIT_MEM_REGION` with the measure flag) have
KVM add a page and measure it before the next one: one pass. The TDX branches of QEMU 8.2 added all pages of a section,
then measured them: two passes. Nothing in the image tells which, so both are computed.

Not checked here: that anybody runs this firmware.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from countermark.errors import FormatError
from countermark.formats.reader import Reader

MAX_FIRMWARE_BYTES: Final = 64 << 20
MAX_SECTIONS: Final = 32
MAX_SECTION_BYTES: Final = 64 << 20
PAGE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 256
_FOOTER: Final = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_METADATA: Final = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_AFTER_FOOTER: Final = 32
_ENTRY: Final = 18  # a table entry without its data: u16 length, GUID
_MR_EXTEND: Final = 1


class SectionKind(Enum):
    """What a section is for (TDVF Design Guide, table 11-4). Other kinds are refused: their effect is unknown here."""

    BFV = 0  # boot firmware volume: the code
    CFV = 1  # configuration firmware volume: the variable store, measured by the firmware itself
    TD_HOB = 2
    TEMP_MEM = 3


class Order(Enum):
    """In which order a VMM adds and measures the pages of a section. The values say which QEMU does so."""

    ONE_PASS = "qemu-9"  # noqa: S105  no password
    TWO_PASSES = "qemu-8.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section: `size` bytes at `address` of the TD's memory, filled with `data` (shorter means then zeros)."""

    kind: SectionKind
    address: int
    size: int
    measured: bool
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tdvf:
    """The sections of a firmware image, in the descriptor's order."""

    sections: tuple[Section, ...]

    def only(self, kind: SectionKind) -> Section:
        """The section of a kind that exists once. Raises `FormatError` `tdvf.sections`."""
        found = [section for section in self.sections if section.kind is kind]
        if len(found) != 1:
            message = f"tdvf.sections: expected one {kind.name}, got {len(found)}"
            raise FormatError(message, code="tdvf.sections")
        return found[0]


def parse_tdvf(firmware: bytes) -> Tdvf:
    """The TDX metadata of a firmware image. Raises `FormatError` with a code below `tdvf.`."""
    if len(firmware) > MAX_FIRMWARE_BYTES:
        raise FormatError(f"tdvf: expected at most {MAX_FIRMWARE_BYTES} bytes", code="tdvf.too_long")
    from_end = int.from_bytes(_metadata_entry(firmware), "little")
    if not 16 <= from_end <= len(firmware):
        raise FormatError("tdvf.metadata: expected an offset inside the file", code="tdvf.metadata")
    reader = Reader(firmware[len(firmware) - from_end :], "tdvf")
    reader.expect(b"TDVF", 4, "metadata")
    length = reader.uint(4, "length")
    reader.expect(1, 4, "metadata")  # version
    count = reader.uint(4, "section_count")
    if not 0 < count <= MAX_SECTIONS or length != 16 + 32 * count:
        message = f"tdvf.metadata: expected 1 to {MAX_SECTIONS} sections and their length, got {count} in {length}"
        raise FormatError(message, code="tdvf.metadata")
    sections = tuple(_section(reader, firmware) for _ in range(count))
    spans = sorted((section.address, section.address + section.size) for section in sections)
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        raise FormatError("tdvf.sections: expected no overlap in memory", code="tdvf.sections")
    return Tdvf(sections=sections)


def mrtd(tdvf: Tdvf, order: Order) -> bytes:
    """MRTD (48 bytes) of a TD that a VMM builds from this firmware in this order."""
    digest = hashlib.sha384()
    for section in tdvf.sections:
        pages = range(0, section.size, PAGE_BYTES)
        if order is Order.ONE_PASS:
            for page in pages:
                digest.update(_page_add(section.address + page))
                for part in _extend(section, page):
                    digest.update(part)
            continue
        for page in pages:
            digest.update(_page_add(section.address + page))
        for page in pages:
            for part in _extend(section, page):
                digest.update(part)
    return digest.digest()


def _metadata_entry(firmware: bytes) -> bytes:
    """The data of the table entry that points to the TDX metadata: 4 bytes."""
    end = len(firmware) - _AFTER_FOOTER
    if end < _ENTRY or firmware[end - 16 : end] != _FOOTER:
        raise FormatError(
            "tdvf.table: expected OVMF's table of GUIDed entries before the reset vector", code="tdvf.table"
        )
    total = int.from_bytes(firmware[end - _ENTRY : end - 16], "little")
    start, at = end - total, end - _ENTRY
    if total < _ENTRY or start < 0:
        raise FormatError(f"tdvf.table: expected a table inside the file, got {total} bytes", code="tdvf.table")
    found: list[bytes] = []
    while at > start:  # backwards: GUID and length stand behind the data
        size = int.from_bytes(firmware[max(at - _ENTRY, 0) : max(at - 16, 0)], "little")
        if size < _ENTRY or at - size < start:
            raise FormatError(f"tdvf.table: expected an entry inside the table, got {size} bytes", code="tdvf.table")
        if firmware[at - 16 : at] == _METADATA:
            found.append(firmware[at - size : at - _ENTRY])
        at -= size
    if len(found) != 1 or len(found[0]) != 4:
        raise FormatError("tdvf.table: expected one entry with the offset of the TDX metadata", code="tdvf.table")
    return found[0]


def _section(reader: Reader, firmware: bytes) -> Section:
    offset, raw = reader.uint(4, "data_offset"), reader.uint(4, "raw_size")
    address, size = reader.uint(8, "address"), reader.uint(8, "size")
    number, attributes = reader.uint(4, "kind"), reader.uint(4, "attributes")
    try:
        kind = SectionKind(number)
    except ValueError as err:
        raise FormatError(f"tdvf.sections: expected kind 0 to 3, got {number}", code="tdvf.sections") from err
    measured = bool(attributes & _MR_EXTEND)
    has_data = kind in (SectionKind.BFV, SectionKind.CFV)
    whole = address % PAGE_BYTES == 0 and size % PAGE_BYTES == 0 and 0 < size <= MAX_SECTION_BYTES
    if not whole or address + size > 1 << 52 or attributes & ~_MR_EXTEND:
        message = f"tdvf.sections: expected whole pages and no attribute but MR.EXTEND, got {kind.name} at {address:#x}"
        raise FormatError(message, code="tdvf.sections")
    if offset + raw > len(firmware) or (raw != size if has_data else raw or offset or measured):
        message = f"tdvf.sections: expected data for BFV and CFV alone, as long as its memory, got {kind.name}"
        raise FormatError(message, code="tdvf.sections")
    return Section(kind=kind, address=address, size=size, measured=measured, data=firmware[offset : offset + raw])


def _page_add(address: int) -> bytes:
    return (b"MEM.PAGE.ADD".ljust(16, b"\0") + address.to_bytes(8, "little")).ljust(128, b"\0")


def _extend(section: Section, page: int) -> Iterator[bytes]:
    if section.measured:
        for at in range(page, page + PAGE_BYTES, _CHUNK_BYTES):
            yield (b"MR.EXTEND".ljust(16, b"\0") + (section.address + at).to_bytes(8, "little")).ljust(128, b"\0")
            yield section.data[at : at + _CHUNK_BYTES]
