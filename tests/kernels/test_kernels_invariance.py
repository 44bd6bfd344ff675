"""The claim itself: no bit depends on batch, position in it, neighbours, chunking, threads or instruction set.

`logits_of` runs the tiny model over a token sequence under one `Way`; all ways must agree with the torch path taken
token by token. The mutants at the end break the rule in the two classic manners, a sum of floats in an order that
follows the shape and a running rescale in attention, and must be caught by the same comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from kernel_cases import BACKENDS, TinyModel, floats, on
from torch import Tensor

from countermark_kernels import attention, ieee, launch, norm
from countermark_kernels.decoder import Decoder

MODEL = TinyModel()
TOKENS = 30
EMBEDDED = floats(TOKENS, MODEL.hidden, seed=7)


@dataclass(frozen=True)
class Way:
    """How to process the sequence: chunk sizes, other sequences beside it, threads, one call or single ops."""

    chunks: tuple[int, ...] = (TOKENS,)
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    threads: int = 2
    stepwise: bool = False


def logits_of(way: Way, embedded: Tensor = EMBEDDED) -> Tensor:
    launch.set_threads(way.threads)
    try:
        decoder = MODEL.decoder()
        mine = MODEL.cache()
        others = [MODEL.cache() for _ in (*way.before, *way.after)]
        rows: list[Tensor] = []
        at = 0
        for turn, chunk in enumerate(way.chunks):
            sizes = (*way.before, chunk, *way.after)
            caches = (*others[: len(way.before)], mine, *others[len(way.before) :])
            parts: list[Tensor] = []
            spans: list[attention.Span] = []
            start = 0
            for size, cache in zip(sizes, caches, strict=True):
                own = cache is mine
                parts.append(embedded[at : at + size] if own else floats(size, MODEL.hidden, seed=turn, scale=9.0))
                position = at if own else 3 * turn
                spans.append(attention.Span(cache=cache, start=start, end=start + size, position=position))
                start += size
            x = _forward(decoder, torch.cat(parts), spans, stepwise=way.stepwise)
            first = sum(way.before)
            rows.append(decoder.logits(x[first : first + chunk].contiguous()))
            at += chunk
        return torch.cat(rows)
    finally:
        launch.set_threads(2)


def _forward(decoder: Decoder, x: Tensor, spans: list[attention.Span], *, stepwise: bool) -> Tensor:
    if not stepwise:
        return decoder.forward(x, spans)
    counts = [torch.arange(s.position, s.position + s.end - s.start, dtype=torch.int32) for s in spans]
    return decoder.stepwise(x, spans, torch.cat(counts))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with on("torch"):
        return logits_of(Way(chunks=(1,) * TOKENS, threads=1))


WAYS = {
    "at once": Way(),
    "token by token": Way(chunks=(1,) * TOKENS, threads=1),
    "in chunks": Way(chunks=(9, 1, 19, 1), threads=1),
    "among others": Way(chunks=(5,) * 6, before=(3, 1), after=(2, 6)),
    "one thread": Way(threads=1),
    "many threads": Way(chunks=(15, 15), threads=7, after=(1,)),
    "single ops": Way(stepwise=True, chunks=(21, 9)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WAYS)
def test_same_bits(expected: Tensor, backend: str, name: str) -> None:
    with on(backend):
        assert torch.equal(logits_of(WAYS[name]), expected)


def _float_sum_rms(x: Tensor, amax: Tensor, eps: float) -> Tensor:
    """RMSNorm as everyone writes it: a sum of floats, whose order follows the shape of the batch."""
    squares = x * x
    total = squares.sum(dim=-1) if x.shape[0] % 2 else squares.reshape(*x.shape[:-1], -1, 2).sum(dim=-2).sum(dim=-1)
    return ieee.div(torch.ones_like(amax), ieee.sqrt(ieee.div(total, torch.full_like(total, x.shape[-1])) + eps))


def _online_attention(
    q: Tensor, s_q: Tensor, positions: Tensor, *, k: Tensor, s_k: Tensor, v: Tensor, s_v: Tensor
) -> Tensor:
    """Attention with a running maximum, rescaling and bfloat16 weights, in blocks that follow the number of rows."""
    c = attention.SCORE_CONSTANTS[q.shape[1]]
    m = torch.full((q.shape[0], 1), -1e30)
    total, out = torch.zeros(q.shape[0], 1), torch.zeros(q.shape)
    block = 16 if q.shape[0] > 8 else 24
    for start in range(0, k.shape[0], block):
        t = slice(start, start + block)
        score = (q.float() @ k[t].float().T) * (s_q * c).unsqueeze(1) * s_k[t]
        hidden = torch.arange(k.shape[0])[t].unsqueeze(0) > positions.unsqueeze(1)
        score = score.masked_fill(hidden, -1e30)
        top = torch.maximum(m, score.amax(dim=1, keepdim=True))
        weight, keep = ieee.exp2(score - top).masked_fill(hidden, 0.0), ieee.exp2(m - top)
        total = total * keep + weight.sum(dim=1, keepdim=True)
        out = out * keep + ieee.round_bf16(weight) @ (v[t].float() * s_v[t].unsqueeze(1))
        m = top
    return out / total


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [(norm, "inverse_rms", _float_sum_rms), (attention, "reference", _online_attention)],
    ids=["float sum", "online softmax"],
)
def test_mutants_are_caught(module: object, name: str, mutant: Callable[..., Tensor]) -> None:
    with on("torch"), mock.patch.object(module, name, mutant):
        at_once = logits_of(WAYS["one thread"])
        differing = [way for way in ("token by token", "in chunks") if not torch.equal(logits_of(WAYS[way]), at_once)]
    assert differing
