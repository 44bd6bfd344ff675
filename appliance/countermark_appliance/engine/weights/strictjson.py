"""JSON from outside, read strictly: no duplicate keys, no NaN or Infinity, capped length, and typed field access.

RFC 8259. Used for our own `model.json` and `weights.json` (where unknown fields are refused) and for checkpoints'
`config.json` and headers (where they are tolerated, as their publishers add fields freely).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Never, TypeAlias

from countermark.errors import WeightsError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def parse_object(data: bytes, *, what: str, max_bytes: int) -> dict[str, Json]:
    """Parse one JSON object. Raises `WeightsError` (`weights.json`) on anything else."""
    if len(data) > max_bytes:
        raise WeightsError(f"{what}: expected at most {max_bytes} bytes, got {len(data)}", code="weights.json")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as err:
        raise WeightsError(f"{what}: expected JSON, got {type(err).__name__}", code="weights.json") from err
    if not isinstance(value, dict):
        raise WeightsError(f"{what}: expected a JSON object, got {type(value).__name__}", code="weights.json")
    return value


def encode_object(value: dict[str, Json]) -> bytes:
    """The one encoding of our own files: sorted keys, one-space indent, ASCII, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def exact_keys(value: dict[str, Json], keys: Iterable[str], *, what: str) -> None:
    """Raise `WeightsError` (`weights.json`) unless the object's keys are exactly `keys`; names the first odd one."""
    odd = sorted(set(keys) ^ value.keys())
    if odd:
        problem = "unknown field" if odd[0] in value else "missing field"
        raise WeightsError(f"{what}: {problem} {odd[0][:64]!r}", code="weights.json")


def integer(value: dict[str, Json], key: str, *, what: str, default: int | None = None) -> int:
    """An integer field (a bool is not one). `default` stands for an absent field or null."""
    found = value.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, int) or isinstance(found, bool):
        raise _wrong(what, key, "an integer", found)
    return found


def number(value: dict[str, Json], key: str, *, what: str, default: float | None = None) -> float:
    """A number field as a float. `default` stands for an absent field or null."""
    found = value.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, int | float) or isinstance(found, bool) or abs(found) > 1e300:
        raise _wrong(what, key, "a number", found)
    return float(found)


def boolean(value: dict[str, Json], key: str, *, what: str, default: bool | None = None) -> bool:
    """A true or false field. `default` stands for an absent field or null."""
    found = value.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, bool):
        raise _wrong(what, key, "true or false", found)
    return found


def text(value: dict[str, Json], key: str, *, what: str) -> str:
    """A string field."""
    found = value.get(key)
    if not isinstance(found, str):
        raise _wrong(what, key, "a string", found)
    return found


def mapping(value: dict[str, Json], key: str, *, what: str) -> dict[str, Json]:
    """An object field."""
    found = value.get(key)
    if not isinstance(found, dict):
        raise _wrong(what, key, "an object", found)
    return found


def digest(value: dict[str, Json], key: str, *, what: str) -> bytes:
    """A 32-byte digest field in lower-case hex."""
    found = text(value, key, what=what)
    if len(found) != 64 or set(found) - set("0123456789abcdef"):
        raise _wrong(what, key, "64 lower-case hex digits", found)
    return bytes.fromhex(found)


def _wrong(what: str, key: str, expected: str, found: Json) -> WeightsError:
    return WeightsError(f"{what}.{key}: expected {expected}, got {str(found)[:64]!r}", code="weights.json")


def _pairs(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _constant(name: str) -> Never:
    raise ValueError(name)
