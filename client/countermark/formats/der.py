"""DER (ITU-T X.690 section 10) of the few small structures in certificate extensions: strict, bounded, no schema.

Only definite lengths in their shortest form and tag numbers below 31, as DER demands and these structures need. What
the elements mean, and their order, is their reader's. Not checked here: the content of primitive elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError

INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OID: Final = 0x06
SEQUENCE: Final = 0x30
MAX_BYTES: Final = 64 * 1024
MAX_ELEMENTS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One element: its identifier octet, its content, and both with the length between them."""

    tag: int
    value: bytes
    encoded: bytes


def parse_elements(data: bytes) -> tuple[Element, ...]:
    """The elements that fill `data`. Raises `FormatError` `der.form`."""
    elements: list[Element] = []
    offset = 0
    while offset < len(data):
        if len(elements) == MAX_ELEMENTS:
            raise _refuse(f"at most {MAX_ELEMENTS} elements", "more")
        elements.append(_element(data, offset))
        offset += len(elements[-1].encoded)
    return tuple(elements)


def parse_sequence(data: bytes) -> tuple[Element, ...]:
    """The elements of the one SEQUENCE that fills `data`. Raises `FormatError` `der.form`."""
    if len(data) > MAX_BYTES:
        raise _refuse(f"at most {MAX_BYTES} bytes", str(len(data)))
    outer = parse_elements(data)
    if len(outer) != 1 or outer[0].tag != SEQUENCE:
        raise _refuse("one SEQUENCE", f"{len(outer)} elements")
    return parse_elements(outer[0].value)


def _element(data: bytes, offset: int) -> Element:
    tag, rest = data[offset], data[offset + 1 : offset + 5]
    if tag & 0x1F == 0x1F or not rest:
        raise _refuse(f"a tag below 31 and a length at offset {offset}", data[offset : offset + 2].hex())
    octets = rest[0] & 0x7F if rest[0] & 0x80 else 0
    size = int.from_bytes(rest[1 : 1 + octets]) if octets else rest[0]
    shortest = size < 0x80 if not octets else size >= 0x80 and rest[1:2] != b"\0"
    start = offset + 2 + octets
    if octets > 2 or (rest[0] == 0x80) or not shortest or start + size > len(data):
        raise _refuse(f"a shortest length within the data at offset {offset}", rest[: 1 + octets].hex())
    return Element(tag=tag, value=data[start : start + size], encoded=data[offset : start + size])


def _refuse(expected: str, got: str) -> FormatError:
    return FormatError(f"DER: expected {expected}, got {got}", code="der.form")
