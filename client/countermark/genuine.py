"""Scope `genuine`: raw evidence files of real machines, judged as far as files were given.

The steps are those of `appraise` (1 to 4 for a TD, 6 for its event logs, 8 for GPUs) and run the same functions. There
is no connection and no claim of ours to bind, so the result is a value of its own, never a Verdict: nothing is sent on
it. Every step that can run runs, also after one that failed, because an auditor wants all that is wrong. The first
failing check in the order of steps gives the result its code; it is `reject` when anything was found wrong, else
`undecidable` when something required is missing, else `accept`. A step for which no file was given is SKIP and says so,
and `accept` is then about the files that were given.

Not checked here: measurements of the TD against reference values, report_data, RTMR3's grammar, whether a machine is on
an allow-list, weights and channel: all of these need more than evidence files (`appraise`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, TypeVar

from countermark.appraise import STEPS, TimeBasis
from countermark.checks import Check, Status, rfc3339
from countermark.errors import (
    CountermarkError,
    FormatError,
    PolicyError,
    QuoteError,
    Undecidable,
    VerificationError,
)
from countermark.formats.quote import Quote, TdReport, parse_quote, quote_digest
from countermark.policy import Policy
from countermark.tdx.endorsements import Endorsements, parse_endorsements, verify_endorsements
from countermark.tdx.quote import Platform, verify_quote, verify_root
from countermark.tdx.td import verify_td

SCOPE: Final = "genuine"
_HEX: Final = re.compile(rb"(?:[0-9a-fA-F]{2})+")
_ROOT: Final = "the quote's root"
_ENDORSED: Final = STEPS["2"]
_RATED: Final = STEPS["3"]
_TD: Final = STEPS["4"]
_NO_QUOTE: Final = "the quote does not parse"
_NO_ENDORSEMENTS: Final = "the endorsements do not parse"
_PLATFORM: Final = tuple(item.name for item in fields(Platform))
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


class _Checks:
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
        self._checks.append(Check(step=number, name=name, status=Status.PASS, detail=detail))
        return value

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
    """The bytes a file stands for: themselves, or what they spell when they are hex digits and white space alone."""
    text = b"".join(data.split())
    return bytes.fromhex(text.decode("ascii")) if _HEX.fullmatch(text) else data


def _verify_policy_time(policy: Policy, now: int) -> None:
    if now > policy.not_after:
        message = f"policy.not_after: expected a time until {rfc3339(policy.not_after)}, got {rfc3339(now)}"
        raise PolicyError(message, code="policy.expired")


def appraise_tdx_files(
    quote: bytes, collateral: bytes, policy: Policy, *, now: int, basis: TimeBasis = TimeBasis.NOW
) -> FileAppraisal:
    """Steps 1 to 4 for a quote (binary or hex text) and Intel's endorsements (QuoteCollateralV3 JSON) at time `now`.

    Raises `PolicyError` `policy.expired`; everything found in the files is in the result.
    """
    _verify_policy_time(policy, now)
    checks = _Checks(QuoteError)
    data = hex_or_binary(quote)
    parsed = checks.run("1", "the quote parses", lambda: _described(parse_quote(data), len(data)))
    endorsements = checks.run("1", "the endorsements parse", lambda: (parse_endorsements(collateral), ""))
    if parsed is None:
        checks.skip("2", _ROOT, _NO_QUOTE)
    else:
        checks.run("2", _ROOT, lambda: _rooted(parsed, policy))
    if endorsements is None:
        checks.skip("2", _ENDORSED, _NO_ENDORSEMENTS)
    else:
        checks.run("2", _ENDORSED, lambda: (None, verify_endorsements(endorsements, policy, now=now)))
    platform = None
    if parsed is None or endorsements is None:
        checks.skip("3", _RATED, _NO_QUOTE if parsed is None else _NO_ENDORSEMENTS)
    else:
        platform = _rate(checks, data, parsed, endorsements, policy, now)
    if parsed is None:
        checks.skip("4", _TD, _NO_QUOTE)
    else:
        checks.run("4", _TD, lambda: (None, verify_td(parsed.body, policy)))
    claims = {} if parsed is None else _tdx_claims(data, parsed, platform)
    return checks.done(claims, simulated=policy.simulated, now=now, basis=basis)


def _described(quote: Quote, size: int) -> tuple[Quote, str]:
    return quote, f"{size} bytes; quote version {quote.header.version}"


def _rooted(quote: Quote, policy: Policy) -> tuple[None, str]:
    verify_root(quote, policy)
    return None, f"SHA-256 {policy.tdx_root.hex()}"


def _rate(
    checks: _Checks, data: bytes, quote: Quote, endorsements: Endorsements, policy: Policy, now: int
) -> Platform | None:
    def rated() -> tuple[Platform, str]:
        platform = verify_quote(data, quote, endorsements, policy, now=now)
        return platform, f"{platform.tcb_status}; advisories {', '.join(platform.advisory_ids) or 'none'}"

    return checks.run("3", _RATED, rated)


def _tdx_claims(data: bytes, quote: Quote, platform: Platform | None) -> dict[str, Any]:
    rated: dict[str, Any] = dict.fromkeys(_PLATFORM)
    if platform is not None:
        rated = {name: _json(getattr(platform, name)) for name in _PLATFORM}
    body = {item.name: _json(getattr(quote.body, item.name)) for item in fields(TdReport)}
    return {
        "quote_version": quote.header.version,
        "quote_digest": quote_digest(data).hex(),
        "quote": "verified" if platform else "not verified: step 3 did not pass",
        **rated,
        **{name: value for name, value in body.items() if value is not None},
    }


def _json(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return list(value) if isinstance(value, tuple) else value
