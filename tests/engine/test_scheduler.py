"""What runs in a step: budgets, order, fairness, and room in the pool. Steps are settled without computing anything."""

from __future__ import annotations

from scripted import TOKENIZER, Table, prepared

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.scheduler import Scheduler, Work
from countermark_appliance.engine.sequence import Sequence


def sequence(pending: int, *, max_tokens: int = 1000, first: int = 0, scope: bytes = b"") -> Sequence:
    request = prepared(range(first, first + pending), max_tokens=max_tokens, scope=scope)
    return Sequence(request, lambda _: None, TOKENIZER, deadline=None)


def scheduler(*sequences: Sequence, max_sequences: int = 4, blocks: int = 100) -> Scheduler:
    made = Scheduler(
        Blocks(blocks),
        lambda numbers: Table(list(numbers)),  # type: ignore[arg-type,return-value]
        max_sequences=max_sequences,
        step_tokens=100,
        mixed_step_tokens=30,
    )
    for one in sequences:
        made.add(one)
    return made


def shape(works: list[Work]) -> list[tuple[int, int, bool]]:
    return [(work.sequence.pending, work.count, work.samples) for work in works]


def settle(made: Scheduler, works: list[Work]) -> None:
    """As if the step had been computed, and had drawn token 3 for everybody."""
    made.started(works)
    for work in works:
        made.settled(work)
        if work.samples:
            work.sequence.tokens.append(3)


def test_prompts_share_a_budget_oldest_first() -> None:
    made = scheduler(sequence(60), sequence(70), sequence(5))
    assert shape(made.plan()) == [(60, 60, True), (70, 40, False)]


def test_a_long_prompt_is_cut() -> None:
    assert shape(scheduler(sequence(250)).plan()) == [(250, 100, False)]


def test_whoever_decodes_is_in_every_step_and_shrinks_the_prompts_share() -> None:
    works = scheduler(sequence(250), sequence(1), sequence(1)).plan()
    assert shape(works) == [(1, 1, True), (1, 1, True), (250, 30, False)]


def test_places_are_limited_and_filled_again_in_order() -> None:
    ones = [sequence(1) for _ in range(6)]
    made = scheduler(*ones)
    assert len(made.plan()) == 4
    assert len(made) == 6
    ones[1].finish(Finish.STOP)
    made.sweep(0.0)
    assert [work.sequence for work in made.plan()] == [ones[0], ones[2], ones[3], ones[4]]


def test_sweep_ends_the_running_and_the_waiting() -> None:
    ones = [sequence(1) for _ in range(3)]
    made = scheduler(*ones, max_sequences=2)
    made.plan()
    ones[1].cancel()
    ones[2]._deadline = 1.0
    made.sweep(0.5)
    assert [one.done for one in ones] == [False, True, False]
    made.sweep(1.0)
    assert [one.done for one in ones] == [False, True, True]
    assert list(made) == [ones[0]]


def test_an_exhausted_budget_starves_nobody_for_ever() -> None:
    ones = [sequence(90, first=i) for i in range(4)]
    made = scheduler(*ones)
    steps = 0
    while any(one.pending > 1 for one in ones):
        settle(made, made.plan())
        steps += 1
        assert steps < 20


def test_admission_waits_for_room_beside_a_block_for_each_that_runs() -> None:
    """129 tokens and one more are three blocks; of nine, two such leave three, of which two are spoken for."""
    ones = [sequence(129, first=i) for i in range(4)]
    made = scheduler(*ones, blocks=10)
    made.plan()
    assert made.running == 2
    ones[0].finish(Finish.STOP)
    made.sweep(0.0)
    made.plan()
    assert made.running == 2
    assert made._running == ones[1:3]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    ones = [sequence(200), sequence(250, first=9), sequence(1)]
    made = scheduler(*ones, blocks=8)
    assert [work.sequence for work in made.plan()] == [ones[0]]


def test_a_short_answer_needs_no_block_for_a_token_that_is_never_computed() -> None:
    """128 tokens and an answer of one fill two blocks, which is all there is."""
    made = scheduler(sequence(128, max_tokens=1), blocks=3)
    settle(made, made.plan())
    assert shape(made.plan()) == [(28, 28, True)]


def test_who_could_never_run_ends_instead_of_holding_up_the_rest() -> None:
    """`prepare` refuses such a request; what holds the room here is none of the scheduler's."""
    ones = [sequence(130), sequence(1)]
    made = scheduler(*ones, blocks=4)
    made._blocks.take(1)
    assert made.plan() == []
    assert ones[0].done
    made.sweep(0.0)
    assert [work.sequence for work in made.plan()] == [ones[1]]


def test_one_that_grew_beyond_the_pool_alone_ends() -> None:
    one = sequence(60)
    made = scheduler(one, blocks=3)
    made._blocks.take(1)
    for _ in range(5):
        settle(made, made.plan())
    assert not one.done
    assert made.plan() == []
    assert one.done


def test_preempted_the_youngest_first_and_back_in_order() -> None:
    ones = [sequence(61, first=64 * i) for i in range(4)]
    made = scheduler(*ones, blocks=9)
    for one in ones[:3]:
        assert one in [work.sequence for work in made.plan()]
        settle(made, made.plan())
    while made.running == 4:
        settle(made, made.plan())
    assert list(made) == ones
    order = [len(made._running)]
    while len(made._running) > 1:
        settle(made, made.plan())
        if len(made._running) != order[-1]:
            order.append(len(made._running))
            assert list(made) == ones
    assert order == sorted(order, reverse=True)
    assert all(not one.in_flight and one.computed == 0 for one in list(made)[1:])


def test_nobody_gives_way_where_one_that_has_ended_is_about_to() -> None:
    """Its block comes back as soon as its last step has landed."""
    old, young, ended = sequence(63), sequence(1, first=100), sequence(1, first=200)
    made = scheduler(old, young, ended, blocks=6)
    while old.computed < 63:
        settle(made, made.plan())
    made._blocks.take(2)  # the rest; the next token of `old` is the last that its block holds
    works = made.plan()
    assert [work.sequence for work in works] == [old, young, ended]
    made.started(works)
    ended.finish(Finish.STOP)
    made.sweep(0.0)
    for work in works[:2]:
        made.settled(work)
        work.sequence.tokens.append(3)
    assert made.plan() == []
    assert made.running == 2
    made.settled(works[2])
    made.sweep(0.0)
    assert [work.sequence for work in made.plan()] == [old, young]


def test_no_room_is_made_while_a_step_is_in_flight() -> None:
    """The youngest may be in it; the loop settles it and asks again."""
    ones = [sequence(64, first=64 * i) for i in range(2)]
    made = scheduler(*ones, blocks=6)
    works = made.plan()
    while made._blocks.available:
        settle(made, works)
        works = made.plan()
    made.started(works)  # in it the older one has got the last block; the younger one needs its own in the next
    assert made.plan() == []
    assert made.running == 2
    for work in works:
        made.settled(work)
        work.sequence.tokens.append(3)
    assert [work.sequence for work in made.plan()] == ones[:1]
    assert list(made) == ones
