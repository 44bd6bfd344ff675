"""The sampler in Triton against the CPU's reference: every filter, ties everywhere, vocabularies of any size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import CUDA, DEVICE
from kernel_cases import floats
from torch import Tensor

from countermark_kernels import fingerprint, ieee, logprobs, sampler
from countermark_kernels.gpu import flags
from countermark_kernels.gpu import logprobs as gpu_logprobs
from countermark_kernels.gpu import sampler as gpu_sampler
from countermark_kernels.sampler import History, SamplerParams

GREEDY = SamplerParams(temperature=0.0)
ALL = 1 << 20
CASES = [
    GREEDY,
    SamplerParams(temperature=1.0),
    SamplerParams(temperature=ieee.f32(0.7), top_k=50),
    SamplerParams(temperature=4.0, top_p_20bit=900_000),
    SamplerParams(temperature=ieee.f32(1.3), min_p_20bit=30_000),
    SamplerParams(temperature=ieee.f32(0.9), top_k=400, top_p_20bit=1_000_000, min_p_20bit=500),
    SamplerParams(temperature=1.0, top_k=1),
    SamplerParams(temperature=2.0**-14, top_p_20bit=1),
    SamplerParams(temperature=2.0**14),
    SamplerParams(temperature=2.0**14, top_k=7, top_p_20bit=ALL // 2),
    SamplerParams(temperature=1.0, min_p_20bit=ALL, top_p_20bit=ALL - 1),
    SamplerParams(temperature=8.0, top_k=1 << 20, top_p_20bit=ALL - 1, min_p_20bit=1),
]
VOCABULARIES = (1, 2, 2048, 5003, 151_936, 1 << 18)
ROUNDS = 40
if not CUDA:  # the interpreter takes a second for a row; between them the tests below take every case
    VOCABULARIES, ROUNDS = (1, 2049), 1


@pytest.fixture(autouse=True)
def nothing_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written and did not holds ranks of the heaviest weight."""

    def poisoned(*size: int, **given: Any) -> Tensor:
        return torch.zeros(size, **given)

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(logits: Tensor, params: list[SamplerParams], positions: list[int]) -> list[int]:
    settings = sampler.cuda_settings(params, positions, logits.shape[1])
    ids = gpu_sampler.sample(logits.to(DEVICE), settings.to(DEVICE))
    flags.raise_pending(DEVICE)
    return ids.tolist()


def test_top_p_ends_buckets_before_top_k() -> None:
    """Some tokens in every bucket: the list of ranks must hold top-k's own bucket, behind the one where top-p ends."""
    rows = 8
    logits = (torch.arange(2048) * 1021 % 2048).to(torch.float32) * 2.0**-8 + torch.zeros(rows, 1)
    params = [SamplerParams(top_k=40 + 30 * i, top_p_20bit=700_000, seed=i * 77) for i in range(rows)]
    want = [sampler.reference(row, p, 5) for row, p in zip(logits, params, strict=True)]
    assert draw(logits, params, [5] * rows) == want


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_every_filter(vocab: int, spread: float) -> None:
    """Logits in eighths, so that ties are everywhere; spread 0: all equal."""
    logits = ieee.rint(floats(1, vocab, seed=3, scale=spread) * 8) * 0.125
    chosen = CASES if CUDA else CASES[:: 1 if (vocab, spread) == (2049, 1.0) else 4]
    for turn in range(ROUNDS if vocab < 10_000 else min(ROUNDS, 3)):
        params = [replace(p, seed=(turn + i) * 0x9E3779B97F4A7C15 % (1 << 64)) for i, p in enumerate(chosen)]
        positions = [turn * 1000 + i for i in range(len(chosen))]
        want = [sampler.reference(logits[0], p, at) for p, at in zip(params, positions, strict=True)]
        assert draw(logits.repeat(len(chosen), 1), params, positions) == want


def test_logits_without_ties_among_others() -> None:
    rows = 64 if CUDA else 3
    logits = floats(rows, 32_003 if CUDA else 300, seed=5, scale=2.5)
    params = [replace(CASES[(i + 3) % len(CASES)], seed=i) for i in range(rows)]
    want = [sampler.reference(logits[i], p, i) for i, p in enumerate(params)]
    assert draw(logits, params, list(range(rows))) == want
    assert draw(logits[1:2], params[1:2], [1]) == want[1:2]


def test_rows_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = floats(3, 40, seed=5)
    params = [replace(CASES[i], seed=i) for i in range(3)]
    want = [sampler.reference(logits[i], p, 9) for i, p in enumerate(params)]
    monkeypatch.setattr(gpu_sampler, "LIST_MAX", 80)
    assert draw(logits, params, [9] * 3) == want


def test_greedy_ties_and_zeros() -> None:
    logits = torch.full((3, 3000), -1.0)
    logits[0, [17, 1234, 2999]] = 500.0
    logits[1, [40, 2100]] = torch.tensor([-0.0, 0.0])
    logits[2, 2999] = 2.0**-149
    assert draw(logits, [GREEDY] * 3, [0] * 3) == [17, 40, 2999]


def test_philox() -> None:
    """All weights equal: the token is the upper bits of word 0."""
    counters = [(0, 0), (1, (1 << 64) - 1), ((1 << 32) - 1, 1 << 63), (7, 0x123456789ABCDEF)]
    words = [sampler.philox4x32((at, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] for at, seed in counters]
    params = [SamplerParams(temperature=1.0, seed=seed) for _, seed in counters]
    assert draw(torch.zeros(4, 1024), params, [at for at, _ in counters]) == [word >> 22 for word in words]


def test_bias_and_penalties() -> None:
    logits = floats(4, 50, seed=9, scale=2.0)
    logits[0, 7] = -0.0
    params = [
        SamplerParams(temperature=0.0, repetition=ieee.f32(1.3), presence=ieee.f32(0.7), frequency=ieee.f32(0.1)),
        SamplerParams(temperature=0.0, logit_bias={3: ieee.f32(0.1), 7: 0.0, 49: -100.0}, repetition=ieee.f32(0.9)),
        SamplerParams(temperature=0.0),
        SamplerParams(temperature=0.0, frequency=-ieee.f32(0.3), logit_bias={0: 1.0}),
    ]
    histories = [History(prompt=(1, 2, 2, 7), output=(3, 3, 7, 9)) for _ in params]
    entries = sampler.cuda_adjustments(params, histories, 50)
    settings = sampler.cuda_settings(params, [0] * 4, 50)
    got = gpu_sampler.adjust(logits.to(DEVICE), entries.to(DEVICE), settings.to(DEVICE)).cpu()
    for row, p, history, mine in zip(logits, params, histories, got, strict=True):
        assert torch.equal(mine.view(torch.int32), sampler.adjust(row, p, history).view(torch.int32))
    entries = sampler.cuda_adjustments(params[2:3], histories[2:3], 50)
    assert gpu_sampler.adjust(logits, entries, settings[2:3]) is logits
    with pytest.raises(ValueError, match="ids"):
        sampler.cuda_adjustments(params[:1], [History(output=(50,))], 50)


def test_a_draw_from_states() -> None:
    """Counts and biases by their places, several draws on end, against the reference with the whole history."""
    vocab, rows = 600, 5
    logits = floats(rows, vocab, seed=9, scale=2.0)
    logits[0, 7] = -0.0
    biases = [{}, {3: ieee.f32(0.1), 7: 0.0, 49: -100.0}, {}, {0: 1.0}, {}]
    penalties = [
        {"repetition": ieee.f32(1.3), "presence": ieee.f32(0.7), "frequency": ieee.f32(0.1)},
        {"repetition": ieee.f32(0.9)}, {}, {"frequency": -ieee.f32(0.3)}, {},
    ]  # fmt: skip
    params = [
        SamplerParams(temperature=float(i % 2), seed=i, logit_bias=bias, **penalty)
        for i, (bias, penalty) in enumerate(zip(biases, penalties, strict=True))
    ]
    prompt, output = (1, 2, 2, 7), [[3, 3, 7, 9] for _ in range(rows)]
    fields = sampler.cuda_settings(params, [8] * rows, vocab)
    counts = torch.full((3, vocab), 77, dtype=torch.int32, device=DEVICE)
    bias = torch.full((2, vocab), -0.0, device=DEVICE)
    for place, row in enumerate((0, 1, 3)):
        fields[row, gpu_sampler.COUNTS.value] = place
        history = torch.tensor([*prompt, *output[row]], dtype=torch.int32, device=DEVICE)
        gpu_sampler.remember(counts[place], history, len(prompt))
    for place, row in enumerate((1, 3)):
        fields[row, gpu_sampler.BIAS.value] = place
        bias[place, list(biases[row])] = torch.tensor(list(biases[row].values()), device=DEVICE)
    scratch = gpu_sampler.Scratch(rows, vocab, DEVICE)
    for step in range(3):
        fields[:, gpu_sampler.POSITION.value] = 8 + step
        given = logits.to(DEVICE, copy=True)
        gpu_sampler.draw(given, fields.to(DEVICE), counts, bias, scratch, greedy=False)
        results = scratch.results.cpu()
        assert torch.equal(results[:rows, 1:], fingerprint.reference(logits, vocab))
        assert int(results[rows, 0]) == 0
        for row, p in enumerate(params):
            adjusted = sampler.adjust(logits[row], p, History(prompt=prompt, output=output[row]))
            assert torch.equal(given[row].cpu().view(torch.int32), adjusted.view(torch.int32))
            assert int(results[row, 0]) == sampler.reference(adjusted, p, 8 + step)
            output[row].append(int(results[row, 0]))


@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (2049, 20), (151_936 if CUDA else 300, 5)])
def test_log_probabilities(vocab: int, count: int) -> None:
    """The sum and the likeliest ids are the CPU's."""
    logits = ieee.rint(floats(3, vocab, seed=vocab, scale=4.0) * 4) * 0.25  # ties everywhere
    logits[0, 0] = -0.0
    assert torch.equal(gpu_logprobs.likely(logits.to(DEVICE), count).cpu(), logprobs.reference(logits, count))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "code"),
    [(math.nan, "not_finite"), (math.inf, "not_finite"), (-math.inf, "not_finite"), (2.0**100, "range")],
)
def test_wrong_logits_are_reported(temperature: float, bad: float, code: str) -> None:
    logits = floats(2, 100, seed=4)
    logits[1, 57] = bad
    params = [SamplerParams(temperature=temperature, top_k=3)] * 2
    with pytest.raises(ieee.NumericsError) as caught:
        draw(logits, params, [0, 0])
    assert caught.value.code == f"numerics.{code}"
    draw(logits[:1], [GREEDY], [0])


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_wrapper_takes_cuda_tensors() -> None:
    logits = floats(3, 1000, seed=1)
    params = [SamplerParams(temperature=1.0, repetition=2.0), GREEDY, CASES[5]]
    histories = [History(prompt=(1, 2), output=(3,))] * 3
    want = sampler.sample(logits, params, [3, 4, 5], histories)
    assert sampler.sample(logits.to(DEVICE), params, [3, 4, 5], histories) == want
