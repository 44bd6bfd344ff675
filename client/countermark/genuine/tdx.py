"""A TD's raw quote with Intel's endorsements (steps 1 to 4, and 9), and event logs against a quote's registers (6)."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, Final

from countermark.appraise import STEPS, TimeBasis, verify_ppid
from countermark.errors import FormatError, MeasurementError, QuoteError, VerificationError
from countermark.formats.quote import Quote, TdReport, parse_quote, quote_digest
from countermark.genuine.result import Checks, FileAppraisal, hex_or_binary, verify_policy_time
from countermark.policy import Policy
from countermark.tdx.endorsements import Endorsements, parse_endorsements, verify_endorsements
from countermark.tdx.eventlogs import (
    DigestCheck,
    LogAppraisal,
    RegisterResult,
    appraise_event_log,
    require_digests,
    require_replay,
)
from countermark.tdx.quote import Platform, rate_platform, verify_quote, verify_root
from countermark.tdx.td import verify_td

_PARSES: Final = "the quote parses"
_ROOT: Final = "the quote's root"
_ENDORSED: Final = STEPS["2"]
_RATED: Final = STEPS["3"]
_TD: Final = STEPS["4"]
_NO_QUOTE: Final = "the quote does not parse"
_NO_ENDORSEMENTS: Final = "the endorsements do not parse"
_PLATFORM: Final = tuple(item.name for item in fields(Platform))


def appraise_tdx_files(
    quote: bytes, collateral: bytes, policy: Policy, *, now: int, basis: TimeBasis = TimeBasis.NOW
) -> FileAppraisal:
    """Steps 1 to 4 for a quote (binary or hex text) and Intel's endorsements (QuoteCollateralV3 JSON) at time `now`.

    And step 9 where the policy names machines. Raises `PolicyError` `policy.expired`; everything found in the files is
    in the result.
    """
    verify_policy_time(policy, now)
    checks = Checks(QuoteError)
    data = hex_or_binary(quote)
    parsed = _parse_quote(checks, data)
    endorsements = checks.run("1", "the endorsements parse", lambda: (parse_endorsements(collateral), ""))
    if parsed is None:
        checks.skip("2", _ROOT, _NO_QUOTE)
    else:
        checks.hold("2", _ROOT, f"SHA-256 {policy.tdx_root.hex()}", lambda: verify_root(parsed, policy))
    endorsed = False
    if endorsements is None:
        checks.skip("2", _ENDORSED, _NO_ENDORSEMENTS)
    else:
        endorsed = checks.run("2", _ENDORSED, partial(_endorsed, endorsements, policy, now)) is not None
    platform = rated = None
    if parsed is None or endorsements is None:
        checks.skip("3", _RATED, _NO_QUOTE if parsed is None else _NO_ENDORSEMENTS)
    else:
        platform = rated = checks.run("3", _RATED, partial(_verify, data, parsed, endorsements, policy, now))
        if endorsed and rated is None:  # refused by the policy perhaps; what it refused is known all the same
            rated = _rate(data, parsed, endorsements, policy, now)
    if parsed is None:
        checks.skip("4", _TD, _NO_QUOTE)
    elif checks.run("4", _TD, lambda: (True, verify_td(parsed.body, policy))) is None and not endorsed:
        rated = None  # dcap-qvl does not rate such a TD, so nobody has looked at the endorsements' signatures
    if not policy.any_hardware:
        if platform is None:
            checks.skip("9", STEPS["9"], "step 3 did not pass")
        else:
            checks.hold("9", STEPS["9"], f"PPID {platform.ppid.hex()}", lambda: verify_ppid(platform.ppid, policy))
    claims = {} if parsed is None else _tdx_claims(data, parsed, platform is not None, rated)
    return checks.done(claims, simulated=policy.simulated, now=now, basis=basis)


def _endorsed(endorsements: Endorsements, policy: Policy, now: int) -> tuple[bool, str]:
    return True, verify_endorsements(endorsements, policy, now=now)


def _parse_quote(checks: Checks, data: bytes) -> Quote | None:
    def parsed() -> tuple[Quote, str]:
        try:
            quote = parse_quote(data)
        except FormatError as err:  # also where it stands beside an event log
            raise QuoteError(str(err), code=err.code, step="1") from err
        return quote, f"{len(data)} bytes; quote version {quote.header.version}"

    quote = checks.run("1", _PARSES, parsed)
    if quote is not None:
        return quote
    try:
        return parse_quote(data, any_trailing=True)  # foreign bytes at the end are a failure, and do not end the audit
    except FormatError:
        return None


def _verify(data: bytes, quote: Quote, endorsements: Endorsements, policy: Policy, now: int) -> tuple[Platform, str]:
    platform = verify_quote(data, quote, endorsements, policy, now=now)
    return platform, f"{platform.tcb_status}; advisories {', '.join(platform.advisory_ids) or 'none'}"


def _rate(data: bytes, quote: Quote, endorsements: Endorsements, policy: Policy, now: int) -> Platform | None:
    try:
        return rate_platform(data, quote, endorsements, policy, now=now)
    except (VerificationError, FormatError):  # step 3 has said so
        return None


def _tdx_claims(data: bytes, quote: Quote, verified: bool, rated: Platform | None) -> dict[str, Any]:
    platform: dict[str, Any] = dict.fromkeys(_PLATFORM)
    if rated is not None:
        platform = {name: _json(getattr(rated, name)) for name in _PLATFORM}
    body = {item.name: _json(getattr(quote.body, item.name)) for item in fields(TdReport)}
    refused = "signatures verify, and step 3 refuses the platform" if rated else "not verified: step 3 did not pass"
    return {
        "quote_version": quote.header.version,
        "quote_digest": quote_digest(data).hex(),
        "quote": "verified" if verified else refused,
        **platform,
        **{name: value for name, value in body.items() if value is not None},
    }


def _json(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return list(value) if isinstance(value, tuple) else value


def appraise_event_log_files(log: bytes, quote: bytes, *, now: int, basis: TimeBasis = TimeBasis.NOW) -> FileAppraisal:
    """Step 6 for an event log (CCEL binary or a JSON event list) against the registers in a quote (binary or hex text).

    A register replays when its events lead from zero to its value in the quote. A firmware's log has no events of
    RTMR3, which the guest extends later: there it is SKIP. The quote's own signatures are not judged.
    """
    checks = Checks(MeasurementError)
    data = hex_or_binary(quote)
    alone = checks.run("1", "the event log parses", lambda: (appraise_event_log(log, None), f"{len(log)} bytes"))
    parsed = _parse_quote(checks, data)
    claims: dict[str, Any] = {"quote": "not verified: no endorsements given"}
    if alone is None or parsed is None:
        checks.skip("6", STEPS["6"], "the event log does not parse" if alone is None else _NO_QUOTE)
        return checks.done(claims, simulated=False, now=now, basis=basis)
    found = appraise_event_log(log, data[: len(data) - len(parsed.trailing)])
    for register in found.registers:
        _replay(checks, register)
    checks.run("6", "digests are those of the events' data", lambda: (None, _digests(found)))
    return checks.done({**claims, **found.as_json()}, simulated=False, now=now, basis=basis)


def _replay(checks: Checks, register: RegisterResult) -> None:
    name = f"{register.name} replays"
    events = f"{register.events} event{'' if register.events == 1 else 's'}"
    if register.matches is None:
        checks.skip("6", name, f"{events} of it in this log, which is the firmware's; it is in use after the firmware")
    else:
        checks.hold("6", name, f"{events}; {register.replayed.hex()}", lambda: require_replay([register]))


def _digests(found: LogAppraisal) -> str:
    require_digests(found.read.events, found.digests)
    counts = ((check, found.digests.count(check)) for check in DigestCheck)
    return ", ".join(f"{count} {check.value}" for check, count in counts if count)
