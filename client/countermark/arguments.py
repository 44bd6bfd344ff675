"""What several commands read from their arguments. argparse prints the message of the error raised here."""

from __future__ import annotations

import argparse
import re
from datetime import datetime
from typing import Final

_TIMES: Final = "expected a time such as 2026-01-31T12:00:00Z, Unix seconds, or 'now'"
_LAST: Final = 253_402_300_799  # the end of the year 9999: no calendar date has later seconds


def moment(text: str) -> int | None:
    """Unix seconds of an RFC 3339 time or of a number; None for `now`."""
    if text == "now":
        return None
    if re.fullmatch("[0-9]{1,12}", text) and int(text) <= _LAST:
        return int(text)
    try:
        value = datetime.fromisoformat(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{_TIMES}, got {text!r}") from err
    if value.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{_TIMES}, got {text!r} without an offset")
    return int(value.timestamp())


def digest(text: str) -> bytes:
    """A SHA-256 in lower-case hex."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 lower-case hex digits, got {text!r}")
    return bytes.fromhex(text)


def nonce(text: str) -> bytes:
    """The 32 bytes of a GPU's challenge in hex."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected a nonce of 64 hex digits, got {text!r}")
    return bytes.fromhex(text)
