"""JSON from outside (RFC 8259), read so that two readers cannot see two values.

Refused: duplicate member names, NaN and Infinity, byte-order marks, anything but UTF-8. Not checked here: the shape;
each format's own parser does that.
"""

from __future__ import annotations

import json
from typing import Any

from countermark.errors import FormatError


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate member name")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def load(data: bytes, what: str, *, max_bytes: int) -> Any:
    """The value of one JSON text that fills `data`. Raises `FormatError` `<what>.too_long` or `<what>.json`."""
    if len(data) > max_bytes:
        raise FormatError(f"{what}: expected at most {max_bytes} bytes, got {len(data)}", code=f"{what}.too_long")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{what}: expected strict JSON, got {err}", code=f"{what}.json") from err


def dump(value: object) -> bytes:
    """The one compact form we write: sorted members, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
