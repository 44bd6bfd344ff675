"""PE images: the hash that firmware measures of one, and its sections as they lie in memory.

The hash is Authenticode's ("Windows Authenticode Portable Executable Signature Format", 2008, and PE/COFF
specification 11.0): over the file without the checksum field, the certificate directory's entry and the certificates;
first the headers, then each section's raw data in order of file offset, then what follows. edk2 (stable tag 202502,
`HashPeImageByType` and `MeasurePeImageAndExtend`) computes it so, with the algorithm of each bank.

We demand more than the loader: PE32+ for x86-64; sections that follow each other in the file and lie apart in memory;
certificates, if any, at the very end. So every byte but the excepted ones is hashed once, and what is loaded is hashed.

Not checked here: relocations, imports, whether the image would run.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark.formats.reader import Reader

MAX_IMAGE_BYTES: Final = 1 << 30
MAX_SECTIONS: Final = 32
MAX_FILL_BYTES: Final = 4 << 20  # of one section
APPLICATION: Final = 10  # IMAGE_SUBSYSTEM_EFI_APPLICATION
_X86_64: Final = 0x8664
_PE32_PLUS: Final = 0x020B
_CHECKSUM_AT: Final = 64  # in the optional header
_DIRECTORIES_AT: Final = 112
_CERTIFICATES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PeSection:
    """One section: `data` is what it holds in memory (`VirtualSize` bytes: the file's, cut or filled with zeros)."""

    name: str
    offset: int  # in the file
    raw_size: int
    address: int  # in memory, relative to the image
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pe:
    """An image: its sections in the header's order, and its Authenticode hash (SHA-384)."""

    subsystem: int
    sections: tuple[PeSection, ...]
    authenticode: bytes


def parse_pe(data: bytes) -> Pe:
    """Parse an image. Raises `FormatError` with a code below `pe.`."""
    if len(data) > MAX_IMAGE_BYTES or data[:2] != b"MZ":
        raise FormatError(f"pe: expected an MZ image of at most {MAX_IMAGE_BYTES} bytes", code="pe.header")
    start = int.from_bytes(data[0x3C:0x40], "little")
    if not 0x40 <= start <= len(data):
        raise FormatError("pe: expected the PE header inside the file", code="pe.header")
    reader = Reader(data, "pe", offset=start)
    reader.expect(b"PE\0\0", 4, "header")
    reader.expect(_X86_64, 2, "header")
    count = reader.uint(2, "section_count")
    reader.take(12, "symbols")
    optional_size = reader.uint(2, "optional_size")
    reader.take(2, "characteristics")
    optional_at = reader.offset
    optional = Reader(reader.take(optional_size, "optional"), "pe")
    optional.expect(_PE32_PLUS, 2, "header")
    optional.take(58, "optional")
    headers_size = optional.uint(4, "headers_size")
    optional.take(4, "checksum")
    subsystem = optional.uint(2, "subsystem")
    optional.take(38, "optional")
    directories = optional.uint(4, "directory_count")
    if not 0 < count <= MAX_SECTIONS or directories > 16 or optional.left < 8 * directories:
        raise FormatError(f"pe: expected 1 to {MAX_SECTIONS} sections and at most 16 directories", code="pe.header")
    sections = tuple(_section(reader, data) for _ in range(count))
    if not reader.offset <= headers_size <= len(data):
        raise FormatError("pe: expected the headers inside the file", code="pe.header")
    _check_places(sections, headers_size)
    entry_at, certificates = optional_at + _DIRECTORIES_AT + 8 * _CERTIFICATES, 0
    if directories > _CERTIFICATES:
        offset = int.from_bytes(data[entry_at : entry_at + 4], "little")
        certificates = int.from_bytes(data[entry_at + 4 : entry_at + 8], "little")
        if (offset or certificates) and (offset + certificates != len(data) or offset < headers_size):
            raise FormatError("pe: expected certificates at the end of the file", code="pe.certificates")
    end = len(data) - certificates
    digest = hashlib.sha384(data[: optional_at + _CHECKSUM_AT])
    if directories > _CERTIFICATES:
        digest.update(data[optional_at + _CHECKSUM_AT + 4 : entry_at])
        digest.update(data[entry_at + 8 : headers_size])
    else:
        digest.update(data[optional_at + _CHECKSUM_AT + 4 : headers_size])
    hashed = headers_size
    for section in sorted(sections, key=lambda item: item.offset):
        digest.update(data[section.offset : section.offset + section.raw_size])
        hashed += section.raw_size
    if hashed > end:
        raise FormatError("pe: expected no section in the certificates", code="pe.certificates")
    digest.update(data[hashed:end])
    return Pe(subsystem=subsystem, sections=sections, authenticode=digest.digest())


def _section(reader: Reader, data: bytes) -> PeSection:
    raw_name = reader.take(8, "section").rstrip(b"\0")
    size, address = reader.uint(4, "section"), reader.uint(4, "section")
    raw_size, offset = reader.uint(4, "section"), reader.uint(4, "section")
    reader.take(12, "relocations")
    reader.uint(4, "characteristics")
    if not raw_name.isascii() or b"\0" in raw_name:
        raise FormatError("pe: expected section names in ASCII", code="pe.section")
    if offset + raw_size > len(data) or size > MAX_IMAGE_BYTES or address + size > 1 << 32:
        raise FormatError(f"pe: expected section {raw_name.decode()} inside the file", code="pe.section")
    held = data[offset : offset + min(raw_size, size)]
    # Zeros that the file does not have would fill memory without bound; a kernel has half a megabyte of them.
    if size - len(held) > MAX_FILL_BYTES:
        raise FormatError(f"pe: expected section {raw_name.decode()} to be filled by the file", code="pe.section")
    content = held + bytes(size - len(held))
    return PeSection(name=raw_name.decode(), offset=offset, raw_size=raw_size, address=address, data=content)


def _check_places(sections: tuple[PeSection, ...], headers_size: int) -> None:
    """In the file: no overlap with each other or the headers, no gap (a gap would be hashed as a part of the rest)."""
    at = headers_size
    for section in sorted((item for item in sections if item.raw_size), key=lambda item: item.offset):
        if section.offset != at:
            message = (
                f"pe: expected section {section.name} at {at}, right behind what is before it, got {section.offset}"
            )
            raise FormatError(message, code="pe.section")
        at += section.raw_size
    spans = sorted((item.address, item.address + len(item.data)) for item in sections)
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        raise FormatError("pe: expected sections apart in memory", code="pe.section")
