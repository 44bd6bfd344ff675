"""Seeded mutation of bytes, and of values inside JSON and CBOR, for fuzzing parsers.

Cheap on purpose: some 20 microseconds an input, so that a parser and not the fuzzer takes the time. The same seed gives
the same inputs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from countermark.errors import FormatError
from countermark.formats import cbor

HEX = re.compile(r"([0-9a-fA-F]{2})+")
INTERESTING = (0, 1, 2, 3, 0x10, 0x20, 0x7F, 0x80, 0xAA, 0xFE, 0xFF)
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63)
TOKENS = tuple(
    b'|{|}|[|]|[[[[[[[[|{"a":|"|\\|,|:|null|true|-1|1e999|99999999999999999999|NaN|\\u0000|\xef\xbb\xbf|\0|\n|\r\n'
    b'|-----BEGIN CERTIFICATE-----\n|-----END CERTIFICATE-----\n|<!DOCTYPE a [<!ENTITY b "c">]>|&b;|&lt;|<a>|</a>|<!--'
    b'|<?xml version="1.0"?>|xmlns=""|0x|ff|FF|00|=|\'\'\'|"""|#|[[a]]\n|a.b.c=1\n|1979-05-27T07:32:00Z'.split(b"|")
)
ODD_VALUES = (None, True, False, 0, -1, 1, 1 << 32, 1 << 64, "", "a", "0" * 96, [], {}, [[]], {"a": 1}, 1.5, "\u0000")


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to four changes of `data`; `other` is what parts are taken from."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        _change(rng, out, other)
    return bytes(out)


def _change(rng: random.Random, out: bytearray, other: bytes) -> None:
    kind = rng.randrange(12)
    at = rng.randrange(len(out) + 1)
    if kind <= 3 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 4 and at < len(out):
        out[at] = rng.choice(INTERESTING)
    elif kind == 5:
        size = rng.choice((1, 2, 4, 8))
        out[at : at + size] = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(
            size, rng.choice(("little", "big"))
        )
    elif kind == 6:
        out[at:at] = rng.choice(TOKENS)
    elif kind == 7:
        del out[at : at + rng.choice((1, 1, 2, 4, 16, 64, 1024))]
    elif kind == 8:
        size = rng.choice((1, 4, 16, 64, 1024))
        out[at:at] = out[at : at + size] * rng.choice((1, 1, 2, 8))
    elif kind == 9:
        start = rng.randrange(len(other) + 1)
        size = rng.choice((1, 4, 16, 64, 512))
        out[at : at + size] = other[start : start + size]
    elif kind == 10:
        del out[at:]
    else:
        out += rng.choice((b"\0", b"\xff" * 8, b"\n", b" ", rng.randbytes(rng.randrange(1, 32))))


def mutate_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A change of one value inside a JSON text (of the bytes that hex text stands for); else of its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(rng, data, other)
    return json.dumps(_inside(rng, value, _json_leaf)).encode()


def mutate_cbor(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A change of one value inside deterministic CBOR, encoded deterministically again; else of its bytes."""
    try:
        return cbor.encode(_inside(rng, cbor.decode(data), _cbor_leaf))
    except (FormatError, OverflowError):
        return mutate(rng, data, other)


def _inside(rng: random.Random, value: Any, leaf: Callable[[random.Random, Any], Any]) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.05:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _inside(rng, value[key], leaf)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return rng.choice((value[:at], [*value, value[at]], value[1:], value * 40))
        return [*value[:at], _inside(rng, value[at], leaf), *value[at + 1 :]]
    return rng.choice(ODD_VALUES) if rng.random() < 0.1 else leaf(rng, value)


def _json_leaf(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, str):
        return rng.choice(ODD_VALUES)
    if HEX.fullmatch(value):
        return mutate(rng, bytes.fromhex(value), b"").hex()
    if value[:1] in ("{", "[") and rng.random() < 0.8:
        return mutate_json(rng, value.encode(), b"").decode("utf-8", "replace")
    return mutate(rng, value.encode("utf-8", "replace"), value.encode("utf-8", "replace")).decode("utf-8", "replace")


def _cbor_leaf(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bytes):
        return mutate(rng, value, value)
    if isinstance(value, str):
        return mutate(rng, value.encode(), b"").decode("utf-8", "ignore")
    return rng.choice((None, True, 0, 1, -1, 1 << 32, (1 << 64) - 1, -(1 << 63), "", b"", [], {}))
