"""The result of appraising files, and the collector that runs step after step whatever fails.

Not checked here: anything about evidence; the steps are the callers'.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from countermark.appraise import TimeBasis
from countermark.checks import Check, Status, rfc3339
from countermark.errors import CountermarkError, FormatError, PolicyError, Undecidable, VerificationError
from countermark.policy import Policy

SCOPE: Final = "genuine"
_SPACE: Final = string.whitespace.encode()
_HEX: Final = string.hexdigits.encode()
_T = TypeVar("_T")


class Outcome(StrEnum):
    """What an appraisal of files comes to."""

    ACCEPT = "accept"
    REJECT = "reject"
    UNDECIDABLE = "undecidable"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAppraisal:
    """What the files show. `claims` is JSON-ready; what in it is not verified says so.

    `simulated`: a simulated root vouches for any of it. `failure`: the first failing check's error, None when accepted.
    """

    verdict: Outcome
    checks: tuple[Check, ...]
    claims: dict[str, Any]
    simulated: bool
    time: int
    time_basis: TimeBasis
    failure: CountermarkError | None
    scope: str = SCOPE

    @property
    def code(self) -> str:
        """The stable code of the first failing check, empty when accepted."""
        return self.failure.code if self.failure else ""

    @property
    def exit_code(self) -> int:
        """0 when accepted, else that of the error class of `code`."""
        return self.failure.exit_code if self.failure else 0

    def __str__(self) -> str:
        """One line for people."""
        why = f" ({self.code}): {self.failure}" if self.failure else ", as far as files were given"
        at = f"time {rfc3339(self.time)} {self.time_basis.value}"
        return f"{'SIMULATED ' if self.simulated else ''}{self.verdict.value}{why}; {at}"

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys; digests in hex."""
        return {
            "verdict": self.verdict.value,
            "scope": self.scope,
            "code": self.code,
            "checks": [check.as_json() for check in self.checks],
            "claims": self.claims,
            "simulated": self.simulated,
            "time": {"value": self.time, "basis": self.time_basis.value},
        }


class Checks:
    """Runs steps one after the other and keeps what each came to; one that fails ends none of the others.

    `malformed`: the error class for bytes that do not parse, which here are evidence and refused as such.
    """

    def __init__(self, malformed: type[VerificationError]) -> None:
        self._malformed = malformed
        self._checks: list[Check] = []
        self._failures: list[CountermarkError] = []
        self._elsewhere: list[CountermarkError] = []  # left to the step they belong to, and refused even if it passes

    def run(self, number: str, name: str, step: Callable[[], tuple[_T, str]]) -> _T | None:
        """The step's value, or None when it failed. `step` returns the value and the check's detail."""
        try:
            value, detail = step()
        except (VerificationError, FormatError, Undecidable) as err:
            if err.step in (None, number):
                self.fail(number, name, err)
            else:
                self._elsewhere.append(err)
                self.skip(number, name, f"not decided, because of step {err.step}: {err}")
            return None
        self.passed(number, name, detail)
        return value

    def hold(self, number: str, name: str, detail: str, step: Callable[[], None]) -> bool:
        """Run a step that gives no value; whether it held."""

        def held() -> tuple[bool, str]:
            step()
            return True, detail

        return self.run(number, name, held) is not None

    def passed(self, number: str, name: str, detail: str) -> None:
        """Record a step that held."""
        self._checks.append(Check(step=number, name=name, status=Status.PASS, detail=detail))

    def fail(self, number: str, name: str, err: CountermarkError) -> None:
        """Record a failure."""
        if isinstance(err, FormatError):
            err = self._malformed(str(err), code=err.code, step=number)
        self._checks.append(Check(step=number, name=name, status=Status.FAIL, detail=str(err), code=err.code))
        self._failures.append(err)

    def skip(self, number: str, name: str, why: str) -> None:
        """Record a step that could not run."""
        self._checks.append(Check(step=number, name=name, status=Status.SKIP, detail=why))

    def done(self, claims: dict[str, Any], *, simulated: bool, now: int, basis: TimeBasis) -> FileAppraisal:
        """The result of all steps."""
        failures = self._failures or self._elsewhere
        rejects = any(not isinstance(err, Undecidable) for err in failures)
        missing = Outcome.UNDECIDABLE if failures else Outcome.ACCEPT
        return FileAppraisal(
            verdict=Outcome.REJECT if rejects else missing,
            checks=tuple(self._checks),
            claims=claims,
            simulated=simulated,
            time=now,
            time_basis=basis,
            failure=failures[0] if failures else None,
        )


def hex_or_binary(data: bytes) -> bytes:
    """The bytes a file stands for: themselves, or what they spell when they are hex digits and white space alone.

    Hex may start with 0x, which no binary form read here does.
    """
    text = data.translate(None, _SPACE)  # not a pattern: its memory is many times that of a large file
    text = text[2:] if text[:2].lower() == b"0x" else text
    spells = bool(text) and len(text) % 2 == 0 and not text.translate(None, _HEX)
    return bytes.fromhex(text.decode("ascii")) if spells else data


def verify_policy_time(policy: Policy, now: int) -> None:
    if now > policy.not_after:
        message = f"policy.not_after: expected a time until {rfc3339(policy.not_after)}, got {rfc3339(now)}"
        raise PolicyError(message, code="policy.expired")
