"""Numbered checks: what a verification did, in order, for people and for `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum


def rfc3339(seconds: int) -> str:
    """Unix seconds as a time people can read; as they are where no calendar has them."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s"


class Status(Enum):
    """A SKIP never counts as a pass: whoever needs the skipped step raises `Undecidable`."""

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a verification: `step` is its number (`4`, `7b`), `name` a few plain words, `detail` what was seen.

    `code` is the stable failure code, empty unless `status` is FAIL.
    """

    step: str
    name: str
    status: Status
    detail: str = ""
    code: str = ""

    def as_json(self) -> dict[str, str]:
        """A JSON-ready dict with the stable keys `step`, `name`, `status`, `detail`, `code`."""
        return {
            "step": self.step,
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "code": self.code,
        }
