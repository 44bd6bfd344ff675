"""The few DER forms (ITU-T X.690) that Intel's and NVIDIA's certificate extensions need. Encoding only."""

from __future__ import annotations


def tlv(tag: int, body: bytes) -> bytes:
    """One element; bodies up to 65535 bytes."""
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    length = size.to_bytes(1 if size < 0x100 else 2, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


def sequence(*items: bytes) -> bytes:
    """SEQUENCE."""
    return tlv(0x30, b"".join(items))


def integer(value: int) -> bytes:
    """INTEGER, non-negative."""
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def enumerated(value: int) -> bytes:
    """ENUMERATED, 0 to 127."""
    return tlv(0x0A, bytes((value,)))


def boolean(value: bool) -> bytes:
    """BOOLEAN."""
    return tlv(0x01, b"\xff" if value else b"\x00")


def octets(value: bytes) -> bytes:
    """OCTET STRING."""
    return tlv(0x04, value)


def utf8(value: str) -> bytes:
    """UTF8String."""
    return tlv(0x0C, value.encode())


def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER."""
    first, second, *rest = map(int, dotted.split("."))
    body = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        body += bytes(reversed(groups))
    return tlv(0x06, bytes(body))
