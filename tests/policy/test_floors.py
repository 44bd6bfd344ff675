"""The floor of tcbEvaluationDataNumber: never above what genuine endorsements of the time carry, and never falling."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime

import pytest

import vectors
from countermark.policy import floors
from countermark.policy.floors import tcb_evaluation_floor

DAY_S = 86_400


def at(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    ("now", "floor"),
    [
        (0, 15),
        (at(2023, 6, 30), 15),
        (at(2024, 8, 1), 15),
        (at(2024, 8, 2), 16),
        (at(2025, 7, 18), 16),
        (at(2025, 7, 19), 17),
        (at(2026, 2, 10), 17),
        (at(2026, 2, 11), 18),
        (at(2026, 9, 10), 18),
        (at(2026, 9, 11), 19),
        (at(2026, 9, 13), 20),
        (at(2040, 1, 1), 20),
    ],
)
def test_the_floor_follows_what_was_the_standard_thirty_days_before(now: int, floor: int) -> None:
    assert tcb_evaluation_floor(now) == floor
    assert now == 0 or tcb_evaluation_floor(now - DAY_S) in (floor, floor - 1)


def test_the_table_only_rises() -> None:
    assert list(floors.STANDARD_SINCE) == sorted(floors.STANDARD_SINCE)
    days = [day for _, day in floors.STANDARD_SINCE]
    assert days == sorted(days)
    assert len({number for number, _ in floors.STANDARD_SINCE}) == len(days)


@pytest.mark.parametrize("name", vectors.TDX_AT)
def test_genuine_endorsements_meet_the_floor_of_their_time(name: str) -> None:
    item = vectors.tdx(name)
    members = json.loads(item.collateral)
    for document in ("tcb_info", "qe_identity"):
        assert json.loads(members[document])["tcbEvaluationDataNumber"] >= tcb_evaluation_floor(item.at)


def test_a_number_in_the_table_was_the_standard_one_by_its_day() -> None:
    """Where a genuine document is the source, it says so itself."""
    issued = {}
    for name in ("debug-td", "phala-b0c06f", "dstack-90c06f"):
        for document in ("tcb_info", "qe_identity"):
            value = json.loads(json.loads(vectors.tdx(name).collateral)[document])
            day = date.fromisoformat(value["issueDate"][:10])
            number = value["tcbEvaluationDataNumber"]
            issued[number] = min(day, issued.get(number, day))
    assert {number: day for number, day in floors.STANDARD_SINCE if number in issued} == issued
