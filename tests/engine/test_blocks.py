"""Blocks against a naive model: nobody's block is anybody else's, none is lost, a hit means equal scope and tokens."""

from __future__ import annotations

import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from countermark_appliance.engine.blocks import BLOCK, Blocks

SCOPES = (b"a", b"b")


def spread(letters: list[int]) -> list[int]:
    """One block of tokens for each letter, so that short examples have long prefixes."""
    return [letter for letter in letters for _ in range(BLOCK)]


class Machine(RuleBasedStateMachine):
    """Sequences that match, take, publish and give, as the scheduler's do."""

    @initialize(count=st.integers(2, 12))
    def start(self, count: int) -> None:
        self.blocks = Blocks(count)
        self.count = count
        self.held: list[tuple[bytes, list[int], list[int], int]] = []  # scope, tokens, numbers, published
        self.written: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # what each block's owner wrote, with all before it

    @rule(
        scope=st.sampled_from(SCOPES),
        letters=st.lists(st.integers(0, 1), max_size=4),
        tail=st.integers(0, BLOCK - 1),
    )
    def admit(self, scope: bytes, letters: list[int], tail: int) -> None:
        tokens = spread(letters) + [7] * tail
        before = self.blocks.available
        shared = self.blocks.match(scope, tokens)
        for i, number in enumerate(shared):
            assert self.written[number] == (scope, tuple(tokens[: (i + 1) * BLOCK]))
        wanted = -(-len(tokens) // BLOCK) - len(shared)
        room = self.blocks.available
        assert room >= before - len(shared)
        if wanted > room:
            with pytest.raises(MemoryError):
                self.blocks.take(wanted)
            self.blocks.give(shared)
            assert self.blocks.available == before
            return
        own = self.blocks.take(wanted)
        assert self.blocks.available == room - wanted
        in_use = {number for _, _, numbers, _ in self.held for number in numbers} | set(shared)
        assert len(set(own)) == len(own)
        assert not in_use & set(own)
        numbers = shared + own
        for i in range(len(shared), len(tokens) // BLOCK):
            self.written[numbers[i]] = (scope, tuple(tokens[: (i + 1) * BLOCK]))
        for number in numbers[len(tokens) // BLOCK :]:
            self.written.pop(number, None)
        self.held.append((scope, tokens, numbers, len(shared)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        scope, tokens, numbers, first = self.held[i]
        end = data.draw(st.integers(first * BLOCK, len(tokens)))
        done = self.blocks.publish(scope, tokens, numbers, first, end)
        assert first <= done <= max(first, end // BLOCK)
        self.held[i] = (scope, tokens, numbers, done)
        # Whatever it could not publish, somebody else has.
        found = self.blocks.match(scope, tokens[:end])
        assert len(found) >= min(done + 1, end // BLOCK)
        assert found[:done] == numbers[:done]
        self.blocks.give(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        _, _, numbers, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.blocks.give(numbers)

    @invariant()
    def none_is_lost(self) -> None:
        if hasattr(self, "blocks"):
            in_use = {number for _, _, numbers, _ in self.held for number in numbers}
            assert 0 not in in_use
            assert self.blocks.available == self.count - 1 - len(in_use)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_goes_first_and_a_child_before_its_parent() -> None:
    blocks = Blocks(5)
    for letters in ([1, 2], [3, 4]):
        numbers = blocks.take(2)
        blocks.publish(b"s", spread(letters), numbers, 0, 2 * BLOCK)
        blocks.give(numbers)
    blocks.give(blocks.match(b"s", spread([1, 2])))  # used again, so the other pair is the older one
    for expected in ([2, 1], [2, 0], [1, 0], [0, 0]):
        blocks.take(1)
        found = [blocks.match(b"s", spread(letters)) for letters in ([1, 2], [3, 4])]
        assert [len(numbers) for numbers in found] == expected
        for numbers in reversed(found):
            blocks.give(numbers)


def test_behind_a_block_that_is_not_its_own_nobody_publishes() -> None:
    """Such a block would be found behind whatever its parent's number holds later."""
    blocks = Blocks(5)
    tokens = spread([1, 2])
    first, second = blocks.take(2), blocks.take(2)
    assert blocks.publish(b"s", tokens, first, 0, BLOCK) == 1
    assert blocks.publish(b"s", tokens, second, 0, 2 * BLOCK) == 0
    assert blocks.match(b"s", tokens) == first[:1]
    blocks.give(second)
    for number in blocks.take(2):
        if number == second[0]:
            blocks.publish(b"t", spread([9]), [number], 0, BLOCK)
    assert blocks.match(b"t", spread([9, 2])) == second[:1]


def test_what_is_held_is_never_evicted() -> None:
    blocks = Blocks(3)
    (number,) = blocks.take(1)
    blocks.publish(b"s", spread([1]), [number], 0, BLOCK)
    blocks.take(1)
    with pytest.raises(MemoryError):
        blocks.take(1)
    assert blocks.match(b"s", spread([1])) == [number]


def test_giving_twice_is_refused() -> None:
    blocks = Blocks(3)
    numbers = blocks.take(1)
    blocks.give(numbers)
    with pytest.raises(ValueError, match="does not hold"):
        blocks.give(numbers)


def test_equal_hashes_are_not_equal_tokens() -> None:
    """The dictionary's hash is made useless; what is found stays right."""

    class Same(bytes):
        __slots__ = ()

        def __hash__(self) -> int:
            return 1

    blocks = Blocks(9)
    numbers = blocks.take(4)
    for i, number in enumerate(numbers):
        blocks.publish(Same([i % 2]), spread([i]), [number], 0, BLOCK)
    assert [blocks.match(Same([i % 2]), spread([i])) for i in range(4)] == [[n] for n in numbers]
    assert blocks.match(Same([1]), spread([0])) == []


def test_its_memory_is_bounded_by_the_pool() -> None:
    blocks = Blocks(16)

    def churn(first: int) -> None:
        for i in range(first, first + 500):
            numbers = blocks.take(5)
            blocks.publish(i.to_bytes(8, "big"), spread([i] * 5), numbers, 0, 5 * BLOCK)
            blocks.give(numbers)

    def size() -> int:
        return sum(map(sys.getsizeof, (blocks._published, blocks._kept, blocks._free, blocks._keys)))

    churn(0)
    before = size()
    churn(500)
    assert size() <= before
    assert len(blocks._published) == len(blocks._kept) == 15
