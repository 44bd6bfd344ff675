"""Frozen dataclasses to and from maps, every field checked by its annotation; for the records, and nothing clever.

Annotations understood: bytes (32 unless said otherwise), int (unsigned), float, str, bool, `T | None` where the rules
allow it, tuples of str, of int, of (int, float) by ascending int, and the nested dataclasses the rules name. A map must
have exactly the fields of its class; one that may be absent is left out where it is None, and is never null, so that a
value has one encoding. Not checked here: what the values mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from countermark.errors import FormatError
from countermark.formats.cbor import Encoded

MAX_TEXT = 4096
MAX_ITEMS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the annotations do not say, by field name. `absent`: left out where None, unlike `optional`, which are null.
    `max_item`: the largest integer inside a tuple."""

    optional: tuple[str, ...]
    absent: tuple[str, ...]
    lengths: Mapping[str, int]
    nested: Mapping[str, type[Any]]
    choices: Mapping[str, tuple[str, ...]]
    limits: Mapping[str, int]
    max_item: int


def to_map(value: Any, rules: Rules) -> dict[str, object]:
    """The map of a dataclass value."""
    return {
        field.name: to_map(item, rules) if field.name in rules.nested and item is not None else item
        for field in fields(value)
        for item in (getattr(value, field.name),)
        if item is not None or field.name not in rules.absent
    }


def from_map(cls: type[Any], value: object, rules: Rules) -> Any:
    """Build a value of the class from a decoded map. Raises `FormatError` (`record.field`)."""
    given = value.keys() if isinstance(value, dict) else set()
    wanted = [field for field in fields(cls) if field.name in given or field.name not in rules.absent]
    if not isinstance(value, dict) or given != {field.name for field in wanted}:
        raise FormatError(f"record: expected exactly the fields of {cls.__name__}", code="record.field")
    return cls(**{field.name: _field(field.name, str(field.type), value[field.name], rules) for field in wanted})


def _field(name: str, annotation: str, value: Any, rules: Rules) -> Any:
    if value is None and name in rules.optional:
        return None
    if name in rules.nested:
        return value if isinstance(value, Encoded) else from_map(rules.nested[name], value, rules)
    kind = annotation.removesuffix(" | None")
    if kind == "bytes":
        length = rules.lengths.get(name, 32)
        if not isinstance(value, bytes) or len(value) != length:
            raise _wrong(name, f"{length} bytes")
    elif kind == "int":
        if not _is_int(value, rules.limits.get(name, (1 << 63) - 1)):
            raise _wrong(name, "an unsigned integer in range")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise _wrong(name, "true or false")
    elif kind == "float":
        if not isinstance(value, float):
            raise _wrong(name, "a number")
    elif kind == "str":
        if not _is_text(value) or value not in rules.choices.get(name, (value,)):
            raise _wrong(name, f"one of {rules.choices[name]}" if name in rules.choices else "text")
    else:
        return _sequence(name, kind, value, rules)
    return value


def _sequence(name: str, kind: str, value: Any, rules: Rules) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
        raise _wrong(name, f"at most {MAX_ITEMS} items")
    if kind == "tuple[tuple[int, float], ...]":
        pairs = [tuple(item) if isinstance(item, list | tuple) else () for item in value]
        shaped = all(len(p) == 2 and _is_int(p[0], rules.max_item) and isinstance(p[1], float) for p in pairs)
        if not shaped or not all(a[0] < b[0] for a, b in pairwise(pairs)):
            raise _wrong(name, "(integer, number) pairs by ascending integer")
        return tuple(pairs)
    good = map(_is_text, value) if kind == "tuple[str, ...]" else (_is_int(item, rules.max_item) for item in value)
    if not all(good):
        raise _wrong(name, kind)
    return tuple(value)


def _is_int(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _wrong(name: str, expected: str) -> FormatError:
    return FormatError(f"record.{name}: expected {expected}", code="record.field")
