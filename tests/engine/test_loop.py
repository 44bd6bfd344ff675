"""The loop against a model that is a hash of what it finds in its blocks: pipelined or not, every answer is the one.

Everything that may happen between two steps happens at a chosen one: arrivals, cancels, deadlines, stop strings, pools
too small for who is there, sinks that raise, steps that fail. The script runs on the engine's thread, so that a case
found once is found again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import POISON, TOKENIZER, VOCAB, HashExecutor, Table, expected, prepared

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, TokensEvent
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.sequence import Sequence


class One:
    """A request of a script, and what became of it."""

    def __init__(self, request: Prepared, *, arrives: int = 0, ends: tuple[int, str] | None = None) -> None:
        self.request, self.arrives, self.ends = request, arrives, ends
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.raises_at = 1 << 30
        self.released = 0
        self.sequence = Sequence(request, self._sink, TOKENIZER, deadline=None, release=self._release)

    def _sink(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, DoneEvent):
            self.ended.set()
        if len(self.events) >= self.raises_at:
            raise OSError("gone")

    def _release(self) -> None:
        self.released += 1

    @property
    def done(self) -> DoneEvent:
        assert isinstance(self.events[-1], DoneEvent)
        return self.events[-1]

    def check(self) -> None:
        """The events agree with each other, and the answer is the expected one as far as it goes."""
        tokens = [event for event in self.events if isinstance(event, TokensEvent)]
        assert self.released == 1
        assert len(self.events) == len(tokens) + 1
        done = self.done
        assert tuple(i for event in tokens for i in event.ids) == done.output_tokens
        assert "".join(event.text for event in tokens) == done.text
        reason, ids, marks, text = expected(self.request)
        count = len(done.output_tokens)
        assert (done.output_tokens, done.fingerprints) == (ids[:count], marks[:count])
        assert done.cached_tokens <= max(0, done.prompt_tokens - 1)
        if done.reason in (Finish.CANCELLED, Finish.DEADLINE, Finish.ERROR):
            assert self.ends is not None or self.request.prompt_tokens[-1] == POISON or self.raises_at < 1 << 30
        else:
            assert (done.reason, done.output_tokens, done.text) == (reason, ids, text)


def play(
    ones: list[One],
    *,
    pipelined: bool,
    blocks: int = 64,
    max_sequences: int = 4,
    step: int = 100,
    mixed: int = 40,
    change: Callable[[HashExecutor], None] = lambda _: None,
) -> HashExecutor:
    """Run a script to its end and check what must hold for every one."""
    pool = Blocks(blocks)

    def act(now: int) -> None:
        for one in ones:
            if one.arrives == now and now > 0:
                loop.submit(one.sequence)
            if one.ends is not None and one.ends[0] == now:
                if one.ends[1] == "cancel":
                    one.sequence.cancel()
                else:
                    one.sequence._deadline = 0.0

    executor = HashExecutor(pool, pipelined, on_start=act)
    change(executor)
    scheduler = Scheduler(
        pool,
        lambda numbers: Table(list(numbers)),  # type: ignore[arg-type,return-value]
        max_sequences=max_sequences,
        step_tokens=step,
        mixed_step_tokens=mixed,
        forget=executor.forget,
    )
    loop = Loop(executor, scheduler)  # type: ignore[arg-type]
    for one in ones:
        if one.arrives == 0:
            loop.submit(one.sequence)
    for one in sorted(ones, key=lambda one: one.arrives):
        while not one.ended.wait(0.01):
            assert not loop.failed
            if (
                all(other.ended.is_set() for other in ones if other.arrives < one.arrives)
                and executor.steps <= one.arrives
            ):
                later = [other for other in ones if other.arrives == one.arrives]
                for other in later:  # nobody is left whose step could be the one it waits for
                    other.arrives = -1
                    loop.submit(other.sequence)
    loop.close()
    assert not loop.failed
    for one in ones:
        one.check()
    return executor


def prompt(rng: random.Random, length: int, common: int) -> list[int]:
    """Some of them begin alike."""
    alike = random.Random(common)
    shared = rng.choice([0, length // 2, length - 1]) if length > 1 else 0
    return [alike.randrange(VOCAB - 1) for _ in range(shared)] + [
        rng.randrange(VOCAB - 1) for _ in range(length - shared)
    ]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), pipelined=st.booleans(), blocks=st.integers(3, 16), crowd=st.integers(1, 12))
def test_any_script_gives_every_answer_as_alone(seed: int, pipelined: bool, blocks: int, crowd: int) -> None:
    rng = random.Random(seed)
    pool = (blocks - 1) * 64
    ones = []
    for i in range(crowd):
        length = min(rng.choice([1, 2, 63, 64, 65, 128, 200, rng.randint(1, pool)]), pool)
        tokens = prompt(rng, length, rng.randrange(2))
        if rng.random() < 0.05:
            tokens[-1] = POISON
        most = pool + 1 - length
        request = prepared(
            tokens,
            max_tokens=min(most, rng.choice([1, 2, 40, 65, 130, 200, most])),
            seed=rng.randrange(2),
            stop=rng.choice([(), (), (), ("a",), ("th", "zq")]),
            scope=rng.choice([b"", b"x"]),
            ignore_eos=rng.random() < 0.8,
        )
        ends = (rng.randrange(200), rng.choice(["cancel", "deadline"])) if rng.random() < 0.25 else None
        ones.append(One(request, arrives=0 if i == 0 else rng.randrange(40), ends=ends))
        if rng.random() < 0.05:
            ones[-1].raises_at = rng.randint(1, 5)

    def change(executor: HashExecutor) -> None:
        if rng.random() < 0.3:
            executor.room = rng.randint(1, 3)
            executor.refuse_at_start = rng.random() < 0.5
        if rng.random() < 0.1:
            executor.piece = 64

    executor = play(
        ones,
        pipelined=pipelined,
        blocks=blocks,
        max_sequences=rng.randint(1, 6),
        step=rng.choice([1, 30, 64, 100, 1000]),
        mixed=rng.choice([1, 20, 64]),
        change=change,
    )
    for one in ones:
        if one.request.prompt_tokens[-1] == POISON and one.ends is None:
            assert one.done.reason is Finish.ERROR
            assert one.done.output_tokens == ()
    assert executor.blocks.available == executor.blocks.count - 1
    assert {id(key) for key in executor.forgotten} == {id(one.sequence) for one in ones}


BOTH = pytest.mark.parametrize("pipelined", [False, True])


def made(length: int, max_tokens: int, *, seed: int = 0, scope: bytes = b"") -> Prepared:
    """A request whose prompt begins like that of every longer one of its seed."""
    rng = random.Random(seed)
    tokens = [rng.randrange(VOCAB - 1) for _ in range(length)]
    return prepared(tokens, max_tokens=max_tokens, seed=seed, scope=scope)


@BOTH
def test_nothing_is_computed_behind_the_last_token(pipelined: bool) -> None:
    """The draw that ends an answer by its length is known to, also unseen."""
    executor = play([One(made(10, 5))], pipelined=pipelined)
    assert executor.sizes == [(1, 10)] + [(1, 1)] * 4
    assert play([One(made(10, 1))], pipelined=pipelined).sizes == [(1, 10)]


def test_a_pipelined_step_is_started_before_the_one_before_it_is_settled() -> None:
    """Else there would be nothing to test."""
    one = One(made(10, 5))
    seen: list[int] = []
    play([one], pipelined=True, change=lambda executor: watch(executor, lambda _: seen.append(len(one.events))))
    assert seen == [0, 0, 1, 2, 3]


def watch(executor: HashExecutor, look: Callable[[int], None]) -> None:
    act = executor.on_start

    def on_start(now: int) -> None:
        look(now)
        act(now)

    executor.on_start = on_start


@BOTH
def test_the_youngest_gives_way_and_resumes(pipelined: bool) -> None:
    """Two answers of four blocks in a pool of six: the younger one is computed twice, the older one once."""
    ones = [One(made(100, 150, seed=1)), One(made(100, 150, seed=2), arrives=1)]
    executor = play(ones, pipelined=pipelined, blocks=7, step=1000, mixed=1000)
    assert [one.done.reason for one in ones] == ["length", "length"]
    computed = sum(tokens for _, tokens in executor.sizes)
    assert 2 * 249 < computed < 3 * 249
    ended = [one.done.end_time for one in ones]
    assert ended[0] < ended[1]


@BOTH
def test_who_resumes_finds_its_own_blocks(pipelined: bool) -> None:
    """It needs a seventh block and there is none, waits, and loses one of six to the other: 5 * 64 of 385 are left."""
    ones = [One(made(60, 150, seed=1)), One(made(320, 120, seed=2), arrives=20)]
    executor = play(ones, pipelined=pipelined, blocks=10, step=1000, mixed=1000)
    assert [tokens for _, tokens in executor.sizes if tokens > 2] == [60, 321, 65]
    assert ones[1].done.cached_tokens == 0  # it computed all of its prompt itself, if not just now


@BOTH
def test_the_oldest_is_never_starved(pipelined: bool) -> None:
    """Its tokens come one a step, whoever arrives; everybody else is served in turn."""
    oldest = One(made(60, 200, seed=99))
    crowd = [One(made(64 + i, 64, seed=i), arrives=i + 1) for i in range(20)]
    executor = play([oldest, *crowd], pipelined=pipelined, blocks=8)
    assert executor.sizes[0] == (1, 60)
    times = [one.done.end_time for one in [oldest, *crowd]]
    assert {one.done.reason for one in [oldest, *crowd]} == {"length"}
    assert sorted(range(1, 21), key=times.__getitem__)[:3] == [1, 2, 3]


@BOTH
def test_a_prefix_is_found_again_in_its_scope_only(pipelined: bool) -> None:
    """And never the whole prompt, whose last token gives the logits."""
    arrivals = [(200, b""), (200, b""), (200, b"x"), (128, b""), (129, b""), (300, b"x"), (63, b"")]
    ones = [One(made(length, 3, scope=scope), arrives=20 * i) for i, (length, scope) in enumerate(arrivals)]
    executor = play(ones, pipelined=pipelined, step=1000)
    assert [one.done.cached_tokens for one in ones] == [0, 192, 0, 64, 128, 192, 0]
    assert [tokens for _, tokens in executor.sizes[::3]] == [200, 8, 200, 64, 1, 108, 63]


@BOTH
def test_an_answer_is_a_prefix_too(pipelined: bool) -> None:
    """The next turn of a conversation begins with the last one's prompt and answer."""
    first = made(100, 100)
    _, answer, _, _ = expected(first)
    second = prepared([*first.prompt_tokens, *answer, 5, 6], max_tokens=2)
    ones = [One(first), One(second, arrives=200)]
    play(ones, pipelined=pipelined)
    assert ones[1].done.cached_tokens == 192


@BOTH
def test_only_the_sequence_that_fails_alone_ends(pipelined: bool) -> None:
    ones = [One(made(20, 40, seed=i)) for i in range(3)]
    poisoned = [One(prepared([*range(30 + i), POISON], max_tokens=9), arrives=3 + i) for i in range(2)]
    ones += [One(made(200, 5, seed=9 + i), arrives=3 + i) for i in range(3)]  # begin in a step behind one that fails
    play([*ones, *poisoned], pipelined=pipelined, max_sequences=9, step=1000, mixed=1000)
    assert [one.done.reason for one in ones] == ["length"] * 6
    assert [one.done.reason for one in poisoned] == ["error"] * 2
    assert all("numerics" not in one.done.detail and one.done.detail for one in poisoned)


@BOTH
@pytest.mark.parametrize("at_start", [False, True])
def test_no_memory_for_the_step_means_fewer_sequences(pipelined: bool, at_start: bool) -> None:
    ones = [One(made(20 + i, 30, seed=i)) for i in range(6)]

    def change(executor: HashExecutor) -> None:
        executor.room, executor.refuse_at_start = 2, at_start

    executor = play(ones, pipelined=pipelined, max_sequences=6, change=change)
    assert {one.done.reason for one in ones} == {"length"}
    assert sum(parts > 2 for parts, _ in executor.sizes) <= 4 * (1 + pipelined)  # it learns


@BOTH
def test_no_memory_for_a_prompt_means_smaller_pieces(pipelined: bool) -> None:
    one = One(made(1000, 2))

    def change(executor: HashExecutor) -> None:
        executor.piece = 130

    executor = play([one], pipelined=pipelined, step=1000, change=change)
    assert one.done.reason == "length"
    halves = [500, 250, 125, 125, 250, 125, 125]
    dropped = [1] * pipelined  # what was started behind the step that failed
    assert [tokens for _, tokens in executor.sizes] == [1000, *dropped, *halves, *halves, 1]


@BOTH
def test_no_memory_for_a_single_token_is_an_error_and_the_thread_lives(pipelined: bool) -> None:
    ones = [One(made(300, 2), ends=(99, "error")), One(made(5, 3, seed=1), arrives=30)]

    def change(executor: HashExecutor) -> None:
        executor.room = 0
        watch(executor, lambda now: setattr(executor, "room", 9) if now >= 4 + pipelined else None)

    play(ones, pipelined=pipelined, step=1000, change=change)
    assert [one.done.reason for one in ones] == ["error", "length"]


def test_the_configured_sizes_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark_appliance.engine.loop.NARROW_STEPS", 10)
    ones = [One(made(20, 100, seed=i)) for i in range(4)]

    def change(executor: HashExecutor) -> None:
        executor.room = 2
        watch(executor, lambda now: setattr(executor, "room", 9) if now >= 20 else None)

    executor = play(ones, pipelined=True, change=change)
    assert executor.sizes[-50][0] == 4


@BOTH
def test_who_is_cancelled_in_flight_keeps_its_blocks_until_it_has_landed(pipelined: bool) -> None:
    """The check is the executor's: a block that a step in flight writes is nobody else's."""
    ones = [One(made(120, 100, seed=i), arrives=i, ends=(i + 9, "cancel")) for i in range(40)]
    play(ones, pipelined=pipelined, blocks=10)
    assert all(one.done.reason == "cancelled" for one in ones)
