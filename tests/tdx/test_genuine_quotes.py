"""Genuine TDX quotes under Intel's root: what the strict default accepts, what it refuses, and why.

The quotes and endorsements are third-party files (see `vectors`); their times are in the past, so time is a parameter.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

import vectors
from countermark.errors import CountermarkError
from countermark.formats.eventlog import EventLog, SpecId, parse_json_events
from countermark.formats.quote import Quote, TdAttributes, parse_quote
from countermark.policy import DAY_S, KNOWN_MRSEAM, Policy, Profile, Waiver, new_policy
from countermark.tdx.endorsements import parse_endorsements, verify_endorsements
from countermark.tdx.quote import Platform, verify_quote, verify_root
from countermark.tdx.registers import verify_event_log
from countermark.tdx.td import verify_td


def strict(now: int) -> Policy:
    return new_policy(Profile.PRODUCTION, now=now)


def steps_1_to_4(item: vectors.TdxSet, policy: Policy, *, now: int | None = None) -> tuple[Quote, Platform]:
    now = item.at if now is None else now
    quote = parse_quote(item.quote)
    endorsements = parse_endorsements(item.collateral.encode())
    verify_root(quote, policy)
    verify_endorsements(endorsements, policy, now=now)
    platform = verify_quote(item.quote, quote, endorsements, policy, now=now)
    verify_td(quote.body, policy)
    return quote, platform


def refusal(item: vectors.TdxSet, policy: Policy, *, now: int | None = None) -> tuple[str, str | None]:
    with pytest.raises(CountermarkError) as err:
        steps_1_to_4(item, policy, now=now)
    return err.value.code, err.value.step


@pytest.mark.parametrize(
    ("name", "number", "fmspc"), [("dstack-90c06f", 18, "90c06f000000"), ("phala-b0c06f", 17, "b0c06f000000")]
)
def test_up_to_date_platforms_are_accepted(name: str, number: int, fmspc: str) -> None:
    item = vectors.tdx(name)
    quote, platform = steps_1_to_4(item, strict(item.at))
    assert (platform.tcb_status, platform.advisory_ids) == ("UpToDate", ())
    assert (platform.evaluation_data_number, platform.fmspc.hex()) == (number, fmspc)
    assert quote.body.attributes == TdAttributes.SEPT_VE_DISABLE
    assert quote.body.mrseam in KNOWN_MRSEAM


def test_a_debug_td_is_refused_for_being_one() -> None:
    item = vectors.tdx("debug-td")
    assert strict(item.at).min_tcb_evaluation_data_number == 15
    assert refusal(item, strict(item.at)) == ("tdx.debug", "4")
    later = replace(strict(item.at), min_tcb_evaluation_data_number=16)
    assert refusal(item, later) == ("endorsements.rolled_back", "2")


def test_an_out_of_date_platform_needs_a_waiver_that_lasts() -> None:
    item = vectors.tdx("outofdate-00a06d")
    assert refusal(item, strict(item.at)) == ("tcb.status", "3")
    waived = replace(strict(item.at), accepted_statuses=(Waiver(name="OutOfDate", until=item.at),))
    assert steps_1_to_4(item, waived)[1].tcb_status == "OutOfDate"
    assert refusal(item, waived, now=item.at + 1) == ("tcb.status", "3")


def test_a_td_without_sept_ve_disable_is_refused() -> None:
    item = vectors.tdx("no-sept-ve")
    assert refusal(item, strict(item.at)) == ("quote.trailing", None)
    whole = replace(item, quote=item.quote[:4935])
    assert refusal(whole, strict(item.at)) == ("tcb.no_level", "3")
    with pytest.raises(CountermarkError) as err:
        verify_td(parse_quote(item.quote, any_trailing=True).body, strict(item.at))
    assert (err.value.code, err.value.step) == ("tdx.sept_ve_disable", "4")


@pytest.mark.parametrize("name", ["dstack-90c06f", "phala-b0c06f"])
def test_endorsements_hold_only_in_their_own_time(name: str) -> None:
    item = vectors.tdx(name)
    assert refusal(item, strict(item.at), now=item.at + 31 * DAY_S) == ("endorsements.expired", "2")
    assert refusal(item, strict(item.at), now=item.at - 31 * DAY_S) == ("endorsements.not_yet_valid", "2")


def test_a_module_off_the_list_is_refused() -> None:
    item = vectors.tdx("dstack-90c06f")
    others = tuple(value for value in KNOWN_MRSEAM if not value.hex().startswith("7bf06328"))
    assert len(others) == len(KNOWN_MRSEAM) - 1
    assert refusal(item, replace(strict(item.at), mrseam=others)) == ("tdx.mrseam", "4")


def test_genuine_evidence_is_refused_where_a_simulated_root_is_named() -> None:
    item = vectors.tdx("dstack-90c06f")
    policy = new_policy(Profile.TEST, now=item.at, simulated_tdx_root=hashlib.sha256(b"root").digest())
    assert refusal(item, policy) == ("quote.root", "2")


def test_endorsements_of_another_platform_do_not_fit() -> None:
    item = vectors.tdx("dstack-90c06f")
    other = vectors.tdx("outofdate-00a06d")
    assert refusal(replace(item, collateral=other.collateral), strict(other.at), now=other.at) == ("tcb.fmspc", "3")


def test_flipped_bytes_of_a_genuine_quote_are_refused() -> None:
    item = vectors.tdx("dstack-90c06f")
    policy = strict(item.at)
    end = item.quote.index(b"-----BEGIN")
    for position in range(0, end, 97):
        changed = bytearray(item.quote)
        changed[position] ^= 1
        code, _ = refusal(replace(item, quote=bytes(changed)), policy)
        assert code.startswith("quote."), (position, code)


def test_a_genuine_event_log_replays_to_its_quote() -> None:
    item = vectors.tdx("dstack-90c06f")
    events = parse_json_events(vectors.dstack_report()["event_log"].encode())
    firmware = tuple(event for event in events if event.register < 4)
    log = EventLog(spec=SpecId(), events=firmware)
    assert verify_event_log(parse_quote(item.quote).body, log)
    with pytest.raises(CountermarkError) as err:
        verify_event_log(parse_quote(item.quote).body, replace(log, events=events))
    assert err.value.code == "eventlog.rtmr3"
    with pytest.raises(CountermarkError) as err:
        verify_event_log(parse_quote(item.quote).body, replace(log, events=firmware[1:]))
    assert err.value.code == "eventlog.rtmr0"


def test_endorsements_are_capped_and_exact() -> None:
    for data, code in (
        (b" " * (1 << 20) + b"{}", "endorsements.too_long"),
        (b"[]", "endorsements.malformed"),
        (b'{"a": 1, "a": 2}', "endorsements.json"),
        (b"{}", "endorsements.crl_missing"),
    ):
        with pytest.raises(CountermarkError) as err:
            parse_endorsements(data)
        assert err.value.code == code
