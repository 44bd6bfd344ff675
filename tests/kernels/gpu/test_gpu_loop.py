"""The engine's loop over the executor of a GPU: one step in flight, tokens carried on the device, a pool too small."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_cases import CUDA
from test_gpu_executor import SHAPES, Host, there

from countermark_appliance.engine import graphs
from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.executor import HostExecutor
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.request import DoneEvent, Event, Prepared, Request
from countermark_appliance.engine.sampling import resolve_sampling
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.engine.step import Executor
from countermark_kernels.cache import KvCache, Pool

pytestmark = [] if CUDA else [pytest.mark.slow]  # more than a minute in the interpreter


class Silent:
    """A tokenizer whose tokens are no text."""

    def token_bytes(self, token: int) -> bytes:
        return b""


def asked(seed: int, length: int, max_tokens: int) -> Prepared:
    generator = torch.Generator().manual_seed(seed)
    return Prepared(
        request=Request(),
        model="tiny",
        prompt_tokens=tuple(torch.randint(SHAPES.vocab, (length,), generator=generator).tolist()),
        max_tokens=max_tokens,
        stop=(),
        stop_tokens=(7,) if seed % 2 else (),
        sampling=resolve_sampling(
            vocab=SHAPES.vocab, temperature=1.0, repetition_penalty=1.2, logit_bias={3: 1.0}, seed=seed
        ),
        ignore_eos=False,
        logprobs=seed % 3,
    )


def serve(executor: Executor, pool: Pool, blocks: int, requests: list[Prepared]) -> tuple[list[DoneEvent], int]:
    """Every answer, and how often somebody was preempted."""
    preempted = 0

    class Counting(Scheduler):
        def _preempt(self, sequence: Sequence) -> None:
            nonlocal preempted
            preempted += 1
            super()._preempt(sequence)

    bookkeeping = Blocks(blocks)
    scheduler = Counting(
        bookkeeping,
        lambda numbers: KvCache(pool, numbers),
        max_sequences=8,
        step_tokens=70,
        mixed_step_tokens=70,
        forget=executor.forget,
    )
    loop = Loop(executor, scheduler)
    ends = [threading.Event() for _ in requests]
    found: list[list[Event]] = [[] for _ in requests]

    def sink(i: int) -> None:
        def take(event: Event) -> None:
            found[i].append(event)
            if isinstance(event, DoneEvent):
                ends[i].set()

        sequence = Sequence(requests[i], take, Silent(), deadline=None)  # type: ignore[arg-type]
        loop.submit(sequence)

    for i in range(len(requests)):
        sink(i)
    for end in ends:
        assert end.wait(500)
    loop.close()
    assert not loop.failed
    assert bookkeeping.available == blocks - 1
    return [events[-1] for events in found if isinstance(events[-1], DoneEvent)], preempted


def test_a_pool_too_small_changes_no_bit() -> None:
    """The two that outgrow their first block need four between them, and there are three."""
    lengths = [(62, 6), (62, 6)] + ([(5, 40), (100, 28), (1, 100), (64, 60)] if CUDA else [])
    requests = [asked(i, *one) for i, one in enumerate(lengths)]
    host = Host()
    expected, _ = serve(HostExecutor(host), host.pool, 40, requests)
    model = there(4)
    executor = graphs.GraphExecutor(model, max_rows=8, warm=CUDA)
    assert executor.pipelined
    answers, preempted = serve(executor, model.pool, 4, requests)
    executor.close()
    assert preempted
    for one, other in zip(answers, expected, strict=True):
        assert (one.output_tokens, one.fingerprints, one.reason) == (
            other.output_tokens,
            other.fingerprints,
            other.reason,
        )
