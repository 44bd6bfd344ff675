"""The firmware volumes that OVMF unpacks and, with a TPM, measures into PCR 0; used for the platform vtpm alone.

UEFI Platform Initialization specification 1.8, volume 3, sections 2 and 3: the main volume of an OVMF.fd holds one file
(type "firmware volume image") with one section compressed by LZMA (GUID ee4e5898-3914-4259-9d6e-dc7bd79403cf), which
unpacks to two volumes in sections of their own: that of the PEI phase and that of the DXE phase.

edk2 (stable tag 202502, `Tcg2Pei.c`, `OvmfPkg/Tcg/Tcg2Config`): PCR 0 gets the firmware's version as UTF-16LE with NUL
(EV_S_CRTM_VERSION), then the PEI volume and the DXE volume as they lie in memory. The PEI volume's modules run where
they lie and write to their variables, so a few bytes are not the file's: for OVMF on q35 two, the PEI core's copy of
the port of the ACPI timer, 0x0608 (PMBASE of the ICH9 is 0x600). A shape says which bytes those are (`pei_written`);
found by comparing the memory of a stopped QEMU with the unpacked file.

In a TD none of this is measured at run time: MRTD covers the file.

Not checked here: what the volumes hold.
"""

from __future__ import annotations

import lzma
import re
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from countermark.errors import FormatError

MAX_UNPACKED_BYTES: Final = 64 << 20
_LZMA: Final = UUID("ee4e5898-3914-4259-9d6e-dc7bd79403cf").bytes_le
_VOLUME_IMAGE: Final = 0x17
_RAW: Final = 0x19
_GUIDED: Final = 0x02
_FILE_OF_VOLUME: Final = 0x0B
_VERSION: Final = re.compile(rb"(?:[0-9]\0){4}\.\0(?:[0-9]\0){2}(?:[-+~.0-9a-z]\0)*\0\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """The two volumes as unpacked, and the version text in them (UTF-16LE with NUL)."""

    pei: bytes
    dxe: bytes
    version: bytes


def parse_volumes(firmware: bytes) -> Volumes:
    """Unpack a firmware image. Raises `FormatError` with a code below `volumes.`."""
    unpacked = _unpack(_compressed(firmware))
    images = [body for kind, body in _sections(unpacked) if kind == _VOLUME_IMAGE]
    if len(images) != 2:
        raise FormatError(f"volumes: expected two, PEI and DXE, got {len(images)}", code="volumes.contents")
    for image in images:
        if image[40:44] != b"_FVH" or int.from_bytes(image[32:40], "little") != len(image):
            raise FormatError("volumes: expected volumes as long as their sections", code="volumes.contents")
    versions = {match[0] for match in _VERSION.finditer(images[0])}
    if len(versions) != 1:
        message = f"volumes: expected one version such as 2025.02, got {len(versions)}"
        raise FormatError(message, code="volumes.version")
    return Volumes(pei=images[0], dxe=images[1], version=versions.pop())


def written(volume: bytes, changes: tuple[tuple[int, bytes], ...]) -> bytes:
    """A volume with some bytes written over: (offset, bytes) each. Raises `FormatError` `volumes.written`."""
    out = bytearray(volume)
    for offset, data in changes:
        if offset < 0 or offset + len(data) > len(out) or any(out[offset : offset + len(data)]):
            message = f"volumes: expected zeros inside the PEI volume at {offset:#x} for a module to write to"
            raise FormatError(message, code="volumes.written")
        out[offset : offset + len(data)] = data
    return bytes(out)


def _compressed(firmware: bytes) -> bytes:
    """The LZMA stream of the one compressed section in the one volume image file of the firmware's volumes."""
    found: list[bytes] = []
    at = 0
    while at + 56 <= len(firmware) and firmware[at + 40 : at + 44] == b"_FVH":
        length = int.from_bytes(firmware[at + 32 : at + 40], "little")
        header = int.from_bytes(firmware[at + 48 : at + 50], "little")
        extended = int.from_bytes(firmware[at + 52 : at + 54], "little")
        volume = firmware[at : at + length]
        if not 56 <= header <= len(volume) == length or extended + 20 > length:
            raise FormatError("volumes: expected a volume inside the file", code="volumes.contents")
        start = extended + int.from_bytes(volume[extended + 16 : extended + 20], "little") if extended else header
        start += -start % 8
        size = int.from_bytes(volume[start + 20 : start + 23], "little")
        if volume[start + 18 : start + 19] == bytes((_FILE_OF_VOLUME,)):
            for kind, body in _sections(volume[start + 24 : start + size]):
                if kind == _GUIDED and body[:16] == _LZMA:
                    found.append(body[int.from_bytes(body[16:18], "little") - 4 :])
        at += length
    if len(found) != 1:
        raise FormatError(f"volumes: expected one compressed section, got {len(found)}", code="volumes.contents")
    return found[0]


def _sections(data: bytes) -> list[tuple[int, bytes]]:
    """Type and body of each section of a file."""
    found = []
    at = 0
    while at + 4 <= len(data):
        size, kind, header = int.from_bytes(data[at : at + 3], "little"), data[at + 3], 4
        if size == 0xFFFFFF:
            size, header = int.from_bytes(data[at + 4 : at + 8], "little"), 8
        if size < header or at + size > len(data) or kind not in (_GUIDED, _RAW, _VOLUME_IMAGE):
            raise FormatError(f"volumes: expected a section of a known kind at {at}", code="volumes.contents")
        found.append((kind, data[at + header : at + size]))
        at += size + -size % 4
    return found


def _unpack(stream: bytes) -> bytes:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=1 << 28)
    try:
        out = decompressor.decompress(stream, max_length=MAX_UNPACKED_BYTES)
    except lzma.LZMAError as err:
        raise FormatError("volumes: expected an LZMA stream", code="volumes.contents") from err
    if len(out) != int.from_bytes(stream[5:13], "little"):
        raise FormatError("volumes: expected the stream to unpack to its length", code="volumes.contents")
    return out
