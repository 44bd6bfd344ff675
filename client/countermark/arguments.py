"""What several commands read from their arguments. argparse prints the message of the error raised here."""

from __future__ import annotations

import argparse
import re
from datetime import datetime
from pathlib import Path
from typing import Final

from countermark.errors import UsageError
from countermark.files import read_file

_TIMES: Final = "expected a time such as 2026-01-31T12:00:00Z, Unix seconds, or 'now'"
_MAX_KEY_BYTES: Final = 1024
_LAST: Final = 253_370_764_799  # the end of the year 9998: a policy made then ends in one that calendars have


def moment(text: str) -> int | None:
    """Unix seconds of an RFC 3339 time or of a number; None for `now`."""
    if text == "now":
        return None
    if re.fullmatch("[0-9]{1,12}", text):
        seconds = int(text)
    else:
        try:
            value = datetime.fromisoformat(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{_TIMES}, got {text!r}") from err
        if value.tzinfo is None:
            raise argparse.ArgumentTypeError(f"{_TIMES}, got {text!r} without an offset")
        seconds = int(value.timestamp())
    if not 0 <= seconds <= _LAST:
        raise argparse.ArgumentTypeError(f"expected a time in the years 1970 to 9998, got {text!r}")
    return seconds


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


def pair(text: str) -> tuple[str, str]:
    """NAME=TEXT."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=TEXT, got {text!r}")
    return name, value


def add_key(parser: argparse.ArgumentParser) -> None:
    """Add `--key-file`; `key` reads it."""
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="the key that the operator gave you")


def key(args: argparse.Namespace) -> str | None:
    """The key in the file, or None. Raises `UsageError` as `read_file` does, and `usage.key`."""
    if args.key_file is None:
        return None
    try:
        return read_file(args.key_file, max_bytes=_MAX_KEY_BYTES).decode("ascii").strip()
    except UnicodeDecodeError as err:
        raise UsageError(f"--key-file: expected ASCII in {args.key_file}", code="usage.key") from err
