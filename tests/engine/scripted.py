"""Executors for tests of the scheduling: a model whose answer is a hash of the tokens it finds in its blocks.

Each block of the pool is 64 slots for ids. A part writes its ids through its table and draws a hash of every id that it
reads back through it, so a block that two sequences write, that was handed on too early or that holds another prefix
than it should changes the draw. Steps are computed when they are waited for, in the order in which they were started.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinymodel import TinyArtefact

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.request import Finish, Prepared, Request
from countermark_appliance.engine.sampling import resolve_sampling
from countermark_appliance.engine.step import Drawn, Part
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels.cache import BLOCK
from countermark_kernels.ieee import NumericsError

VOCAB = TinyArtefact().config.vocab
TOKENIZER = Tokenizer(TinyArtefact().tokenizer_json, vocab=VOCAB)
POISON = VOCAB - 1  # a prompt that ends in it has no answer


def next_token(tokens: Sequence[int], seed: int) -> tuple[int, bytes]:
    mark = hashlib.sha256(repr((list(tokens), seed)).encode()).digest()[:16]
    return int.from_bytes(mark, "little") % (VOCAB - 1), mark


def prepared(
    prompt: Sequence[int],
    *,
    max_tokens: int,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    scope: bytes = b"",
    ignore_eos: bool = True,
) -> Prepared:
    return Prepared(
        request=Request(prompt="unused", scope=scope),
        model="hash",
        prompt_tokens=tuple(prompt),
        max_tokens=max_tokens,
        stop=stop,
        stop_tokens=() if ignore_eos else tuple(range(0, VOCAB, 9)),
        sampling=resolve_sampling(vocab=VOCAB, seed=seed),
        ignore_eos=ignore_eos,
    )


def expected(request: Prepared) -> tuple[Finish, tuple[int, ...], tuple[bytes, ...], str]:
    """What the request's answer is, alone and without an engine."""
    tokens, marks, text = list(request.prompt_tokens), [], []
    output = Output(TOKENIZER, stop=request.stop, stop_tokens=request.stop_tokens, max_tokens=request.max_tokens)
    while output.end is None:
        token, mark = next_token(tokens, request.sampling.seed)
        tokens.append(token)
        marks.append(mark)
        text.append(output.push(token))
    return output.end, tuple(tokens[len(request.prompt_tokens) :]), tuple(marks), "".join(text)


@dataclass
class Table:
    """What the executor needs of a `KvCache`."""

    blocks: list[int]

    @property
    def capacity(self) -> int:
        return len(self.blocks) * BLOCK


@dataclass
class Ticket:
    executor: HashExecutor
    parts: list[tuple[Part, list[int]]]
    before: Ticket | None
    drawn: list[Drawn] | None = None
    failure: Exception | None = None

    def wait(self) -> list[Drawn]:
        if self.drawn is None and self.failure is None:
            self.executor.compute(self)
        if self.failure is not None:
            raise self.failure
        assert self.drawn is not None
        return self.drawn


@dataclass
class HashExecutor:
    """`on_start`: called with the number of each step, before it. `room`: a step of more parts finds no memory."""

    blocks: Blocks
    pipelined: bool
    on_start: Callable[[int], None] = lambda _: None
    room: int = 1 << 30
    refuse_at_start: bool = False
    piece: int = 1 << 30  # a part of more tokens finds no memory
    steps: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # parts and tokens of each step
    recomputed: int = 0
    forgotten: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = [[-1] * BLOCK for _ in range(self.blocks.count)]
        self.last: Ticket | None = None

    def start(self, parts: Sequence[Part]) -> Ticket:
        self.on_start(self.steps)
        self.steps += 1
        self.sizes.append((len(parts), sum(part.count for part in parts)))
        if self.refuse_at_start and self._too_large(parts):
            raise MemoryError("no room for the step")
        flying = self.last if self.last is not None and self.last.drawn is None and self.last.failure is None else None
        assert flying is None or self.pipelined
        if flying is not None:
            assert flying.before is None or flying.before.drawn is not None or flying.before.failure is not None
            self._check_hands(flying, parts)
        for part in parts:
            assert part.count > 0
            assert part.start + part.count <= len(part.cache.blocks) * BLOCK
            assert 0 not in part.cache.blocks
            if part.carried is not None:
                assert self.last is not None
                assert part.row is None or len(part.row.tokens) >= part.row.length - 1
            if part.row is not None:
                assert part.row.length == part.start + part.count
        ticket = Ticket(self, [(part, list(part.cache.blocks)) for part in parts], self.last)
        self.last = ticket
        if not self.pipelined:
            self.compute(ticket)
        return ticket

    def forget(self, key: object) -> None:
        self.forgotten.append(key)

    def close(self) -> None:
        pass

    def compute(self, ticket: Ticket) -> None:
        before, ticket.before = ticket.before, None
        if before is not None and before.drawn is None and before.failure is None:
            self.compute(before)
        parts = [part for part, _ in ticket.parts]
        if self._too_large(parts):
            ticket.failure = MemoryError("no room for the step")
            return
        drawn, poisoned = [], False
        for part, table in ticket.parts:
            ids = list(part.tokens)
            if part.carried is not None:
                assert before is not None
                if before.drawn is None:  # worth nothing
                    ticket.failure = NumericsError("carried: nothing", code="numerics.not_finite")
                    return
                ids.append(before.drawn[part.carried].token)
            for position, token in enumerate(ids, part.start):
                self.memory[table[position // BLOCK]][position % BLOCK] = token
            end = part.start + len(ids)
            seen = [self.memory[table[p // BLOCK]][p % BLOCK] for p in range(end)]
            if part.row is not None:
                poisoned |= seen[part.row.prompt - 1] == POISON and end == part.row.prompt
                token, mark = next_token(seen, part.row.params.seed)
                drawn.append(Drawn(token=token, fingerprint=mark))
        if poisoned:
            ticket.failure = NumericsError("draw: infinity", code="numerics.not_finite")
        else:
            ticket.drawn = drawn

    def _too_large(self, parts: Sequence[Part]) -> bool:
        return len(parts) > self.room or any(part.count > self.piece for part in parts)

    @staticmethod
    def _check_hands(flying: Ticket, parts: Sequence[Part]) -> None:
        """A block that a step in flight writes is nobody's but its sequence's."""
        written = {
            table[at // BLOCK]: id(part.cache)
            for part, table in flying.parts
            for at in range(part.start, part.start + part.count)
        }
        for part in parts:
            for number in part.cache.blocks:
                assert written.get(number, id(part.cache)) == id(part.cache)
