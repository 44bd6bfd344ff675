"""int8 rows against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.quantise import quantise_rows


def nearest32(value: Fraction) -> float:
    """The binary32 nearest to a rational, ties to even, found among its neighbours."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(s)) for s in (-np.inf, np.inf)] + [guess]
    best = min(near, key=lambda c: (abs(Fraction(float(c)) - value), int(np.float32(c).view(np.uint32)) & 1))
    return float(best)


def test_scale_and_codes_are_correctly_rounded() -> None:
    torch.manual_seed(0)
    w = torch.randn(200, 64, dtype=torch.float64) * torch.logspace(-20, 15, 200, dtype=torch.float64)[:, None]
    q, scale = quantise_rows(w, what="w")
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    w32 = w.to(torch.float32)
    for row in range(200):
        amax = max(abs(Fraction(v)) for v in w32[row].tolist())
        assert float(scale[row]) == nearest32(amax / 127)
        for value, code in zip(w32[row].tolist(), q[row].tolist(), strict=True):
            quotient = Fraction(nearest32(Fraction(value) / Fraction(float(scale[row]))))
            assert code == max(-127, min(127, round(quotient)))  # Fraction rounds half to even
    assert int(q.abs().amax(dim=1).min()) == 127


def test_ties_go_to_even() -> None:
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = quantise_rows(w, what="w")
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_empty_rows_are_zero_with_scale_zero() -> None:
    q, scale = quantise_rows(torch.tensor([[0.0, -0.0], [2.0**-101, -(2.0**-120)], [2.0**-100, 0.0]]), what="w")
    assert scale.tolist()[:2] == [0.0, 0.0]
    assert q.tolist() == [[0, 0], [0, 0], [127, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_no_finite_binary32_are_refused(value: float) -> None:
    w = torch.ones(3, 4, dtype=torch.float64)
    w[1, 2] = value
    with pytest.raises(WeightsError) as caught:
        quantise_rows(w, what="w")
    assert caught.value.code == "weights.not_finite"
