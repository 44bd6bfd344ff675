"""What runs in a step: budgets, order, fairness. Sequences are stand-ins with only what a scheduler looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.scheduler import Scheduler, Work
from countermark_appliance.engine.sequence import Sequence


@dataclass
class Stub:
    pending: int
    done: bool = False
    ends: Finish | None = None

    def overdue(self, now: float) -> Finish | None:
        return self.ends

    def finish(self, reason: Finish, detail: str = "") -> None:
        self.done = True


def scheduler(*stubs: Stub, max_sequences: int = 4) -> Scheduler:
    made = Scheduler(max_sequences=max_sequences, step_tokens=100, mixed_step_tokens=30)
    for stub in stubs:
        made.add(cast(Sequence, stub))
    return made


def shape(works: list[Work]) -> list[tuple[Any, int, bool]]:
    return [(work.sequence.pending, work.count, work.samples) for work in works]


def test_prompts_share_a_budget_oldest_first() -> None:
    assert shape(scheduler(Stub(60), Stub(70), Stub(5)).plan()) == [(60, 60, True), (70, 40, False)]


def test_a_long_prompt_is_cut() -> None:
    assert shape(scheduler(Stub(250)).plan()) == [(250, 100, False)]


def test_whoever_decodes_is_in_every_step_and_shrinks_the_prompts_share() -> None:
    works = scheduler(Stub(250), Stub(1), Stub(1)).plan()
    assert shape(works) == [(1, 1, True), (1, 1, True), (250, 30, False)]


def test_places_are_limited_and_filled_again_in_order() -> None:
    stubs = [Stub(1) for _ in range(6)]
    made = scheduler(*stubs)
    assert len(made.plan()) == 4
    assert len(made) == 6
    stubs[1].done = True
    made.sweep(0.0)
    assert [work.sequence for work in made.plan()] == [stubs[0], stubs[2], stubs[3], stubs[4]]


def test_sweep_ends_the_running_and_the_waiting() -> None:
    stubs = [Stub(1), Stub(1, ends=Finish.CANCELLED), Stub(1, ends=Finish.DEADLINE)]
    made = scheduler(*stubs, max_sequences=2)
    made.plan()
    made.sweep(0.0)
    assert [stub.done for stub in stubs] == [False, True, True]
    assert list(made) == [stubs[0]]


def test_an_exhausted_budget_starves_nobody_for_ever() -> None:
    stubs = [Stub(90) for _ in range(4)]
    made = scheduler(*stubs)
    steps = 0
    while any(stub.pending > 1 for stub in stubs):
        for work in made.plan():
            stub = cast(Stub, work.sequence)
            stub.pending = max(1, stub.pending - work.count)
        steps += 1
        assert steps < 20
