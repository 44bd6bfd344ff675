"""The strings a host puts into SMBIOS for a guest's software to act on: OEM strings, structure type 11.

DMTF DSP0134 3.8.0, section 6.1 (structures: type, length of the formatted area, handle, then strings that each end in a
zero byte, one more zero byte after the last; at least two zero bytes), section 6.1.3 (text strings), section 7.12
(type 11: the count of strings at offset 4), section 7.46 (type 127 ends the table). What follows the end is read over.

systemd's stub takes a kernel command line from such strings, and systemd credentials.
"""

from __future__ import annotations

from typing import Final

from countermark.errors import FormatError

OEM_STRINGS: Final = 11
END: Final = 127
MAX_BYTES: Final = 1024 * 1024
_HEADER: Final = 4


def oem_strings(table: bytes) -> tuple[bytes, ...]:
    """The strings of every structure of type 11, in order. Raises `FormatError` `smbios.malformed`."""
    if len(table) > MAX_BYTES:
        raise _malformed(f"at most {MAX_BYTES} bytes, got {len(table)}")
    found: list[bytes] = []
    offset = 0
    while offset < len(table):
        if offset + _HEADER > len(table):
            raise _malformed(f"a structure at {offset}, got {len(table) - offset} bytes")
        kind, length = table[offset], table[offset + 1]
        end = table.find(b"\0\0", offset + length)
        if length < _HEADER or end < 0:
            raise _malformed(f"a structure of at least 4 bytes and the end of its strings at {offset}")
        if kind == OEM_STRINGS:
            found += [text for text in table[offset + length : end].split(b"\0") if text]
        if kind == END:
            break
        offset = end + 2
    return tuple(found)


def _malformed(message: str) -> FormatError:
    return FormatError(f"smbios: expected {message}", code="smbios.malformed")
