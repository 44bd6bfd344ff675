"""The sampler against published vectors, big-integer arithmetic written out here, and binary64 probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kernel_cases import BACKENDS, floats, on
from torch import Tensor

from countermark_kernels import ieee, sampler
from countermark_kernels.sampler import History, SamplerParams

backends = pytest.mark.parametrize("backend", BACKENDS)
NONE = History()


def draw(logits: Tensor, params: SamplerParams, position: int = 0, history: History = NONE) -> int:
    return sampler.sample(logits.reshape(1, -1), [params], [position], [history])[0]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123 1.14.0, tests/kat_vectors, philox4x32 10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert sampler.philox4x32(counter, key) == expected


def by_the_book(weights: Sequence[tuple[float, int, int]], p: SamplerParams, position: int) -> int:
    """Steps 6 to 10 with Python integers. `weights`: (t, id, w)."""
    kept = sorted(weights, key=lambda entry: (-entry[0], entry[1]))
    if p.top_k:
        kept = kept[: p.top_k]
    total, cumulated, prefix = sum(w for _, _, w in kept), 0, []
    for entry in kept:
        prefix.append(entry)
        cumulated += entry[2]
        if p.top_p_20bit < 1 << 20 and cumulated * (1 << 20) >= p.top_p_20bit * total:
            break
    kept = [entry for entry in prefix if entry[2] * (1 << 20) >= p.min_p_20bit * prefix[0][2]]
    total = sum(w for _, _, w in kept)
    r32 = sampler.philox4x32((position, 0, 0, 0), (p.seed % (1 << 32), p.seed >> 32))[0]
    u, cumulated = r32 * total // (1 << 32), 0
    for _, token, w in kept:
        cumulated += w
        if cumulated > u:
            return token
    raise AssertionError("no token")


CASES = [
    SamplerParams(temperature=1.0),
    SamplerParams(temperature=ieee.f32(0.7), top_k=50),
    SamplerParams(temperature=4.0, top_p_20bit=900_000),
    SamplerParams(temperature=ieee.f32(1.3), min_p_20bit=30_000),
    SamplerParams(temperature=ieee.f32(0.9), top_k=400, top_p_20bit=1_000_000, min_p_20bit=500),
    SamplerParams(temperature=1.0, top_k=1),
    SamplerParams(temperature=2.0**-14, top_p_20bit=1),
    SamplerParams(temperature=2.0**14),
    SamplerParams(temperature=1.0, min_p_20bit=1 << 20, top_p_20bit=(1 << 20) - 1),
]


@backends
@pytest.mark.parametrize("params", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_against_integers(backend: str, params: SamplerParams, spread: float) -> None:
    logits = ieee.rint(floats(1500, seed=3, scale=spread) * 8) * 0.125  # many exact ties
    top = float(logits.max())
    weights = []
    for token, value in enumerate(logits.tolist()):
        t = ieee.f32((value - top) / params.temperature)
        weight = ieee.rint(ieee.exp2(torch.tensor([ieee.f32(t * ieee.LOG2E)])) * 2.0**24)
        weights.append((t, token, int(weight[0])))
    with on(backend):
        for position in range(12):
            p = replace(params, seed=position * 0x123456789ABCDEF)
            assert draw(logits, p, position) == by_the_book(weights, p, position)


@backends
def test_frequencies_follow_softmax(backend: str) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.0])
    draws = 4000
    with on(backend):
        params = [SamplerParams(temperature=1.0, seed=7)] * draws
        got = sampler.sample(logits.repeat(draws, 1), params, list(range(draws)), [NONE] * draws)
    wanted = torch.softmax(logits.to(torch.float64), dim=0) * draws
    counted = torch.bincount(torch.tensor(got), minlength=5)
    chi_square = float(((counted - wanted) ** 2 / wanted).sum())
    assert chi_square < 18.5  # 99.9 % for 4 degrees of freedom


@backends
def test_greedy_ties_go_to_the_lower_id(backend: str) -> None:
    logits = floats(3000, seed=1)
    logits[[17, 1234, 2999]] = 500.0
    with on(backend):
        assert draw(logits, SamplerParams(temperature=0.0)) == 17
        logits[17] = -500.0
        assert draw(logits, SamplerParams(temperature=0.0)) == 1234


@backends
def test_row_is_drawn_alike_among_others(backend: str) -> None:
    logits = floats(9, 700, seed=2, scale=3.0)
    params = [replace(CASES[i % len(CASES)], seed=i) for i in range(9)]
    with on(backend):
        together = sampler.sample(logits, params, list(range(9)), [NONE] * 9)
        assert together == [draw(logits[i], params[i], i) for i in range(9)]


@backends
def test_bias_and_penalties(backend: str) -> None:
    logits = torch.tensor([4.0, 3.0, -2.0, 1.0, 0.5])
    history = History(prompt=(0, 2, 2), output=(1, 1, 3))
    params = SamplerParams(
        temperature=0.0, repetition=2.0, presence=0.25, frequency=0.5, logit_bias={4: 1.0, 2: ieee.f32(0.1)}
    )
    want = [
        4.0 / 2.0,
        3.0 / 2.0 - 0.25 - 2 * 0.5,
        float((torch.tensor([-2.0]) + ieee.f32(0.1)) * 2.0),
        1.0 / 2.0 - 0.25 - 0.5,
        1.5,
    ]
    assert sampler.adjust(logits, params, history).tolist() == want
    with on(backend):
        assert draw(logits, params, 6, history) == 0
        assert draw(logits, replace(params, logit_bias={4: 2.0}), 6, history) == 4
    assert logits.tolist() == [4.0, 3.0, -2.0, 1.0, 0.5]


@backends
@pytest.mark.parametrize(("bad", "code"), [(math.nan, "not_finite"), (math.inf, "not_finite"), (2.0**100, "range")])
def test_wrong_logits_are_errors(backend: str, bad: float, code: str) -> None:
    logits = floats(100, seed=4)
    logits[57] = bad
    with on(backend), pytest.raises(ieee.NumericsError) as caught:
        draw(logits, SamplerParams())
    assert caught.value.code == f"numerics.{code}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.7},
        {"temperature": -1.0},
        {"temperature": 2.0**-15},
        {"repetition": 0.0},
        {"presence": math.inf},
        {"frequency": math.nan},
        {"top_k": -1},
        {"top_p_20bit": 0},
        {"top_p_20bit": (1 << 20) + 1},
        {"min_p_20bit": -1},
        {"seed": 1 << 64},
        {"seed": -1},
        {"logit_bias": {1: 0.1}},
        {"logit_bias": {1: 1e30}},
        {"presence": 1e300},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SamplerParams(**wrong)  # type: ignore[arg-type]


def test_wrong_ids_are_refused() -> None:
    logits = floats(10, seed=5)
    with pytest.raises(ValueError, match="ids"):
        draw(logits, SamplerParams(logit_bias={10: 1.0}))
    with pytest.raises(ValueError, match="ids"):
        draw(logits, SamplerParams(presence=1.0), 1, History(output=(-1,)))
    with pytest.raises(ValueError, match="positions"):
        draw(logits, SamplerParams(), 1 << 32)
