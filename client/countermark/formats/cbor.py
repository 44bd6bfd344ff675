"""Deterministic CBOR (RFC 8949 section 4.2.1): the only serialisation of our own signed structures.

`decode` accepts exactly what `encode` produces, item by item as it reads, so that one value has one byte string
(definite lengths, shortest heads and floats, map keys sorted by encoded bytes, no duplicate keys, no trailing bytes).
Values are limited to int, float (finite), bytes, str, bool, None, tuple/list, dict with str or int keys, and CBORTag.

Both directions are ours and know no tag's meaning. A general decoder follows references (tags 25 and 29: kilobytes of
input that stand for terabytes) and builds dates, decimals and regular expressions from what a stranger sent.
Not checked here: what the value means; each format's own parser does that.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import cbor2

from countermark.errors import FormatError

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 16
MAX_ITEMS = (1 << 20) + 4096  # a million token ids and what stands around them
_SIMPLE = {20: False, 21: True, 22: None}
_FLOATS = {25: ">e", 26: ">f", 27: ">d"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value that `encode` encoded before; it is written as it is. No decoder makes one."""

    data: bytes


def encode(value: object) -> bytes:
    """Encode a value deterministically. Raises `FormatError` (`cbor.type`) on a type outside the allowed set.

    Our own encoder, because cbor2's canonical mode sorts map keys by length first (RFC 7049), not bytewise.
    """
    out = bytearray()
    _write(out, value, 0)
    return bytes(out)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Decode one deterministic CBOR item that fills `data` exactly.

    Raises `FormatError`: `cbor.too_long`, `cbor.too_many`, `cbor.malformed`, `cbor.type` or `cbor.not_deterministic`.
    """
    if len(data) > max_bytes:
        raise FormatError(f"cbor: expected at most {max_bytes} bytes, got {len(data)}", code="cbor.too_long")
    _check_items(data)
    value, end = _read(data, 0, 0)
    if end != len(data):
        raise _another(f"the end at offset {end}, got {len(data) - end} more bytes")
    return value


def _another(expected: str) -> FormatError:
    message = f"cbor: expected the deterministic encoding (RFC 8949 4.2.1): {expected}"
    return FormatError(message, code="cbor.not_deterministic")


def _head(out: bytearray, major: int, number: int) -> None:
    if number < 24:
        out.append(major << 5 | number)
        return
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << (8 * size):
            out.append(major << 5 | info)
            out += number.to_bytes(size, "big")
            return
    raise FormatError("cbor: expected an integer of at most 64 bits", code="cbor.type")


def _write_float(out: bytearray, value: float) -> None:
    if not math.isfinite(value):
        raise FormatError("cbor: expected a finite number", code="cbor.type")
    for head, code in ((0xF9, ">e"), (0xFA, ">f"), (0xFB, ">d")):
        try:
            packed = struct.pack(code, value)
        except OverflowError:
            continue
        if struct.unpack(code, packed)[0] == value:
            out.append(head)
            out += packed
            return


def _write(out: bytearray, value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"cbor: nested deeper than {MAX_DEPTH}", code="cbor.malformed")
    match value:  # the most frequent first: records are encoded while their requests wait
        case str():
            out += _text(value)
        case bytes():
            _head(out, 2, len(value))
            out += value
        case None:
            out.append(0xF6)
        case bool():
            out.append(0xF5 if value else 0xF4)
        case int():
            _head(out, *((0, value) if value >= 0 else (1, -1 - value)))
        case float():
            _write_float(out, value)
        case Encoded():
            out += value.data
        case list() | tuple():
            _head(out, 4, len(value))
            for item in value:
                _write(out, item, depth + 1)
        case Mapping():
            if any(isinstance(key, bool) or not isinstance(key, str | int) for key in value):
                raise FormatError("cbor: expected map keys of type str or int", code="cbor.type")
            _head(out, 5, len(value))
            pairs = [(_key(key), item) for key, item in value.items()]
            for key, item in sorted(pairs, key=itemgetter(0)):
                out += key
                _write(out, item, depth + 1)
        case cbor2.CBORTag():
            _head(out, 6, value.tag)
            _write(out, value.value, depth + 1)
        case _:
            raise FormatError(f"cbor: value of type {type(value).__name__}", code="cbor.type")


def _text(value: str) -> bytes:
    try:
        text = value.encode()
    except UnicodeEncodeError as err:
        raise FormatError("cbor: expected text without lone surrogates", code="cbor.type") from err
    out = bytearray()
    _head(out, 3, len(text))
    return bytes(out) + text


def _key(key: str | int) -> bytes:
    """The same few names stand in every map of ours, and small numbers in every key."""
    if isinstance(key, str):
        return _short_text(key) if len(key) <= 64 else _text(key)
    return bytes((key if key >= 0 else 0x1F - key,)) if -24 <= key < 24 else encode(key)


_short_text = functools.lru_cache(1024)(_text)


def _check_items(data: bytes) -> None:
    """Count the items before any is built: one byte that came can stand for a hundred of memory.

    Items follow one another whatever contains them, so a walk over the heads needs no nesting. It ends where a head is
    none; `_read` comes to the same place and says why.
    """
    offset = items = 0
    while offset < len(data):
        items += 1
        if items > MAX_ITEMS:
            raise FormatError(f"cbor: expected at most {MAX_ITEMS} items", code="cbor.too_many")
        major, info = divmod(data[offset], 32)
        if info > 27:
            return
        start = offset + 1
        offset = start if info < 24 else start + (1 << (info - 24))
        if major in (2, 3):
            offset += info if info < 24 else int.from_bytes(data[start:offset], "big")


def _read(data: bytes, offset: int, depth: int) -> tuple[Any, int]:
    """The item at `offset` and the offset behind it: of every item, the one form that `encode` gives."""
    if depth > MAX_DEPTH:
        raise FormatError(f"cbor: nested deeper than {MAX_DEPTH}", code="cbor.malformed")
    major, info = divmod(_take(data, offset, 1)[0], 32)
    offset += 1
    if info == 31 and 2 <= major <= 5:
        raise FormatError("cbor: expected a definite length", code="cbor.not_deterministic")
    if info > 27:
        raise FormatError(f"cbor: expected no reserved head, got {info}", code="cbor.malformed")
    if major == 7:
        return _read_simple(data, offset, info)
    number = info
    if info >= 24:
        size = 1 << (info - 24)
        number = int.from_bytes(_take(data, offset, size), "big")
        offset += size
        if number < (24 if size == 1 else 1 << (4 * size)):
            raise _another(f"the shortest head of {number}")
    match major:
        case 0:
            return number, offset
        case 1:
            return -1 - number, offset
        case 2:
            return _take(data, offset, number), offset + number
        case 3:
            try:
                return _take(data, offset, number).decode(), offset + number
            except UnicodeDecodeError as err:
                raise FormatError("cbor: expected UTF-8", code="cbor.malformed") from err
        case 6:
            value, offset = _read(data, offset, depth + 1)
            return cbor2.CBORTag(number, value), offset
    _take(data, offset, number)  # an item has at least one byte: no count can ask for more than came
    if major == 4:
        items = []
        for _ in range(number):
            item, offset = _read(data, offset, depth + 1)
            items.append(item)
        return items, offset
    return _read_map(data, offset, number, depth + 1)


def _read_map(data: bytes, offset: int, count: int, depth: int) -> tuple[dict[str | int, Any], int]:
    keys: list[Any] = []
    encoded: list[bytes] = []
    values: list[Any] = []
    for _ in range(count):
        key, end = _read(data, offset, depth)
        keys.append(key)
        encoded.append(data[offset:end])
        value, offset = _read(data, end, depth)
        values.append(value)
    if any(isinstance(key, bool) or not isinstance(key, str | int) for key in keys):
        raise FormatError("cbor: expected map keys of type str or int", code="cbor.type")
    if any(before >= after for before, after in pairwise(encoded)):  # so that no key comes twice, either
        raise _another(f"map keys in the order of their bytes, got {keys!r:.200}")
    return dict(zip(keys, values, strict=True)), offset


def _read_simple(data: bytes, offset: int, info: int) -> tuple[float | bool | None, int]:
    if info in _SIMPLE:
        return _SIMPLE[info], offset
    if info not in _FLOATS:
        raise FormatError(f"cbor: expected false, true, null or a float, got {info}", code="cbor.type")
    size = struct.calcsize(_FLOATS[info])
    (value,) = struct.unpack(_FLOATS[info], _take(data, offset, size))
    shortest = bytearray()
    _write_float(shortest, value)
    if shortest != data[offset - 1 : offset + size]:
        raise _another(f"the shortest form of {value}")
    return value, offset + size


def _take(data: bytes, offset: int, count: int) -> bytes:
    if count > len(data) - offset:
        message = f"cbor: expected {count} bytes at offset {offset}, got {len(data) - offset}"
        raise FormatError(message, code="cbor.malformed")
    return data[offset : offset + count]


def fields(value: object, what: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Check that `value` is a map with exactly the named text keys, each of the named type, and return it.

    `bool` is not accepted for `int`. Raises `FormatError` with code `<what>.field`.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected a map, got {type(value).__name__}", code=f"{what}.field")
    if value.keys() != types.keys():
        missing = sorted(set(types) - set(value))
        unknown = sorted(map(str, set(value) - set(types)))
        raise FormatError(f"{what}: missing fields {missing}, unknown fields {unknown}", code=f"{what}.field")
    for key, kind in types.items():
        item = value[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
            names = "|".join(k.__name__ for k in kinds)
            raise FormatError(f"{what}.{key}: expected {names}, got {type(item).__name__}", code=f"{what}.field")
    return value
