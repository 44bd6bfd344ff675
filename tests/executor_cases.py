"""Steps for executors, and the same answers computed one token at a time: for tests on a CPU and on a device.

`run` drives an executor as the engine does: prompts in chunks beside sequences that decode, draws carried on the device
from step to step where the executor is pipelined, sequences that end and others that begin. `alone` computes each
sequence by itself, its whole history anew for every token, through the reference of the sampler.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from countermark_appliance.engine.executor import HostExecutor
from countermark_appliance.engine.grammar import BARRED, Mask, unpacked
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.step import Drawn, Executor, Part, Row, Ticket
from countermark_kernels import fingerprint, ieee, sampler
from countermark_kernels.cache import BLOCK, KvCache, Pool
from countermark_kernels.sampler import History, SamplerParams

GREEDY = SamplerParams(temperature=0.0)
PARAMS = (
    GREEDY,
    SamplerParams(temperature=0.0, repetition=ieee.f32(1.3), presence=ieee.f32(0.7), frequency=ieee.f32(0.1)),
    SamplerParams(temperature=1.0, seed=3),
    SamplerParams(temperature=ieee.f32(0.8), top_k=40, top_p_20bit=950_000, seed=1 << 63),
    SamplerParams(temperature=1.5, frequency=-ieee.f32(0.3), logit_bias={0: 1.0, 7: -100.0, 11: 0.0}, seed=9),
    SamplerParams(temperature=0.0, logit_bias={5: 4.0, 6: ieee.f32(4.1)}),
    SamplerParams(temperature=4.0, min_p_20bit=30_000, repetition=ieee.f32(0.9), seed=77),
)


@dataclass(slots=True)
class Answer:
    """One sequence: what it began with, and what came of it."""

    params: SamplerParams
    prompt: list[int]
    length: int
    logprobs: int = 0
    keyed: bool = True
    chunk: int = 1 << 20
    begin: int = 0
    masked: bool = False
    tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    cache: KvCache | None = None
    computed: int = 0
    started: int = 0
    waiting: int = -1


def answers(count: int, vocab: int, *, longest: int, length: int, seed: int = 1) -> list[Answer]:
    """Sequences of every kind of sampling, prompts of 1 to `longest` tokens, that begin one after another."""
    rng = random.Random(seed)
    return [
        Answer(
            params=PARAMS[i % len(PARAMS)],
            prompt=[rng.randrange(vocab) for _ in range(rng.randint(1, longest))],
            length=rng.randint(1, length),
            logprobs=rng.choice((0, 0, 1, 5)),
            keyed=i % 3 != 2,
            chunk=rng.choice((3, longest)),
            begin=rng.randint(0, count // 2),
            masked=i % 3 == 1,
        )
        for i in range(count)
    ]


def mask(answer: Answer, length: int, vocab: int) -> Mask | None:
    """Some ids, others at each position; a single one at some."""
    if not answer.masked:
        return None
    rng = random.Random(f"{answer.prompt} {length}")
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.bool_)
    bits[rng.sample(range(vocab), rng.choice((1, 2, vocab // 3, vocab - 1)))] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def run(
    executor: Executor, pool: Pool, asked: Sequence[Answer], seen: list[Tensor], *, vocab: int, seed: int = 1
) -> None:
    """Fill in what the executor draws. `seen`: a list that the executor's `observe` appends its logits to."""
    blocks = list(range(1, pool.blocks))
    random.Random(seed).shuffle(blocks)
    before: tuple[Ticket, list[Answer], int] | None = None
    step = 0
    while any(len(answer.drawn) < answer.length for answer in asked):
        parts: list[Part] = []
        drawing: list[Answer] = []
        for answer in asked:
            if answer.begin > step or answer.started >= answer.length:
                continue
            known = answer.prompt + answer.tokens
            carried = None if answer.waiting < 0 else answer.waiting
            tokens = known[answer.computed : answer.computed + answer.chunk]
            count = len(tokens) + (carried is not None)
            last = answer.computed + count == len(answer.prompt) + answer.started
            if answer.cache is None:
                answer.cache = KvCache(pool)
            while answer.cache.capacity < answer.computed + count:
                answer.cache.blocks.append(blocks.pop())
            row = None
            if last:
                row = Row(
                    params=answer.params, tokens=known, prompt=len(answer.prompt), length=answer.computed + count,
                    logprobs=answer.logprobs, key=id(answer) if answer.keyed else None,
                    mask=mask(answer, answer.computed + count, vocab),
                )  # fmt: skip
                drawing.append(answer)
            parts.append(Part(cache=answer.cache, start=answer.computed, tokens=tokens, carried=carried, row=row))
            answer.computed += count
            answer.waiting = -1
        ticket = executor.start(parts) if parts else None
        if executor.pipelined and before is not None:
            _settle(executor, *before, seen, blocks)
        for place, answer in enumerate(drawing):
            answer.started += 1
            answer.waiting = place
        before = None if ticket is None else (ticket, drawing, len(seen) - 1)
        if not executor.pipelined and before is not None:
            _settle(executor, *before, seen, blocks)
            before = None
        step += 1
    if before is not None:
        _settle(executor, *before, seen, blocks)


def _settle(
    executor: Executor, ticket: Ticket, drawing: list[Answer], at: int, seen: list[Tensor], blocks: list[int]
) -> None:
    for place, (answer, drawn) in enumerate(zip(drawing, ticket.wait(), strict=True)):
        answer.tokens.append(drawn.token)
        answer.drawn.append(drawn)
        answer.logits.append(seen[at][place].cpu())
        if not executor.pipelined:
            answer.waiting = -1
        if len(answer.drawn) == answer.length and answer.cache is not None:
            executor.forget(id(answer))
            blocks += answer.cache.blocks  # others may have them, though they still hold this sequence's keys
            answer.cache = None


def alone(model: Model, answer: Answer) -> tuple[list[int], list[bytes], Tensor]:
    """Ids, fingerprints and raw logits of a sequence by itself, on the CPU."""
    tokens, ids, marks, rows = list(answer.prompt), [], [], []
    for _ in range(answer.length):
        cache = model.new_cache(len(tokens))
        logits = model.forward([Chunk(cache=cache, start=0, tokens=tokens, logits=1)])
        history = History(prompt=answer.prompt, output=tokens[len(answer.prompt) :])
        adjusted = sampler.adjust(logits[0], answer.params, history)
        allowed = mask(answer, len(tokens), len(adjusted))
        if allowed is not None:
            adjusted = torch.where(torch.from_numpy(unpacked(allowed, len(adjusted))), adjusted, BARRED)
        ids.append(sampler.reference(adjusted, answer.params, len(tokens)))
        marks += fingerprint.encode(fingerprint.reference(logits, logits.shape[1]))
        rows.append(logits)
        tokens.append(ids[-1])
    return ids, marks, torch.cat(rows)


def check(answer: Answer, want: tuple[list[int], list[bytes], Tensor]) -> None:
    """Every id, fingerprint and logit; log probabilities against torch's in binary64."""
    ids, marks, logits = want
    assert torch.equal(torch.stack(answer.logits), logits)
    assert [drawn.token for drawn in answer.drawn] == ids
    assert [drawn.fingerprint for drawn in answer.drawn] == marks
    for drawn, row in zip(answer.drawn, logits, strict=True):
        if not answer.logprobs:
            assert (drawn.logprob, drawn.top) == (None, ())
            continue
        expected = torch.log_softmax(row.double(), dim=-1)
        assert drawn.logprob is not None
        assert abs(drawn.logprob - float(expected[drawn.token])) < 1e-3
        order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))[: answer.logprobs]
        assert [i for i, _ in drawn.top] == order
        assert all(abs(p - float(expected[i])) < 1e-3 for i, p in drawn.top)


def on_the_host(model: Model, asked: Sequence[Answer]) -> None:
    """`run` through the plain executor."""
    seen: list[Tensor] = []
    executor = HostExecutor(model, observe=lambda _, logits: seen.append(logits.clone()))
    run(executor, model.pool, asked, seen, vocab=model.vocab)


def same(one: Answer, other: Answer) -> None:
    """Bit for bit, log probabilities too."""
    assert one.drawn == other.drawn
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))


__all__ = ["BLOCK", "GREEDY", "PARAMS", "Answer", "alone", "answers", "check", "on_the_host", "run", "same"]
