"""Binary32 arithmetic against exact rationals and numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_cases import BACKENDS, on

from countermark_kernels import activation, binding, ieee


def nearest(value: Fraction) -> float:
    """The binary32 nearest to a positive rational in the normal range, half to even, by integer arithmetic."""
    exponent = math.floor(math.log2(value))
    exponent += 1 if Fraction(2) ** (exponent + 1) <= value else 0
    exponent -= 1 if Fraction(2) ** exponent > value else 0
    scaled = value / Fraction(2) ** (exponent - 23)
    low = math.floor(scaled)
    rest = scaled - low
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    return float((low + up) * Fraction(2) ** (exponent - 23))


def test_self_test_passes() -> None:
    assert "division" in ieee.self_test()


def test_division_and_root_are_correctly_rounded() -> None:
    a, b = ieee._patterns(11)[:400], ieee._patterns(12)[:400]
    quotient, root = ieee.div(a, b).tolist(), ieee.sqrt(a).tolist()
    for x, y, q, r in zip(a.tolist(), b.tolist(), quotient, root, strict=True):
        assert q == nearest(Fraction(x) / Fraction(y))
        digits = math.isqrt(int(Fraction(x) * 2**300))  # floor(sqrt(x) * 2^150): far more bits than a tie needs
        assert r == nearest(Fraction(2 * digits + 1, 2**151))


def test_rint_is_half_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999998, 8388607.5])
    assert ieee.rint(x).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 2.0, 8388608.0]


def test_exp2_is_close_and_exact_at_integers() -> None:
    x = torch.arange(-(126 << 12), (126 << 12) + 1, dtype=torch.int32).to(torch.float32) * 2.0**-12
    y = ieee.exp2(x).numpy().astype(np.float64)
    want = np.exp2(x.numpy().astype(np.float64))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert (np.abs(y - want) / ulp).max() < 1.4
    whole = torch.arange(-126, 127, dtype=torch.float32)
    assert ieee.exp2(whole).tolist() == [2.0**i for i in range(-126, 127)]
    assert ieee.exp2(torch.tensor([-1000.0, 1000.0])).tolist() == [2.0**-126, 2.0**126]


def test_fma_rounds_once() -> None:
    """Against rationals; the third operand cancels the product, is a tie's far end, or is anything."""
    a, b, other = ieee._patterns(13)[:3000], ieee._patterns(14)[:3000], ieee._patterns(15)[:3000]
    b = torch.where(torch.isfinite(a * b), b, torch.ones_like(b))
    product = a * b
    for c in (-product, product * 2.0**-24, -product * 2.0**-25, product * 1.5 * 2.0**-24, other, -other):
        y = ieee.fma(a, b, c)
        for x in zip(a.tolist(), b.tolist(), c.tolist(), y.tolist(), strict=True):
            exact = Fraction(x[0]) * Fraction(x[1]) + Fraction(x[2])
            if exact == 0 or not 2.0**-125 < abs(exact) < 2.0**127:
                continue
            assert x[3] == math.copysign(nearest(abs(exact)), exact)


def test_exp2_short_is_close_and_one_at_zero() -> None:
    x = torch.linspace(-96, 20, 100_000)
    k = ieee.rint(x)
    exact = torch.exp2(x.to(torch.float64))
    assert bool(((ieee.exp2_short(k, x - k).to(torch.float64) / exact - 1).abs() < 1.03e-4).all())
    assert ieee.exp2_short(torch.zeros(1), torch.zeros(1)).item() == 1.0


@pytest.mark.parametrize("width", [1, 4096])
def test_round_bf16_is_torch_bfloat16(width: int) -> None:
    x = torch.cat((ieee._patterns(16)[:width], -ieee._patterns(17)[:width], torch.tensor([0.0, -0.0, 2.0**-140])))
    assert torch.equal(ieee.round_bf16(x), x.to(torch.bfloat16).to(torch.float32))


def test_exponents_and_powers() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 0.75, 2.0**-107, 3.0 * 2.0**100])
    assert ieee.exponent(x).tolist() == [0, 0, 1, -1, -107, 101]
    assert ieee.ceil_exponent(x).tolist() == [0, 1, 1, 0, -107, 102]
    assert ieee.ceil_exponent(torch.zeros(1)).tolist() == [-127]
    assert ieee.pow2(torch.tensor([-126, 0, 127], dtype=torch.int32)).tolist() == [2.0**-126, 1.0, 2.0**127]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_amax_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ieee.NumericsError) as caught:
        ieee.amax(torch.tensor([[1.0, bad]]))
    assert caught.value.code == "numerics.not_finite"


def test_self_test_catches_flush_to_zero() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert not ieee._subnormals()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flush_to_zero_does_not_reach_the_native_path(backend: str) -> None:
    if backend == "torch":
        return
    gate_up = torch.full((1, 16), 2.0**-70)
    want = activation.reference(gate_up * 2.0**30, 8)
    with on(backend):
        torch.set_flush_denormal(True)
        try:
            got = activation.swiglu_quantise(gate_up * 2.0**30, 8)
        finally:
            torch.set_flush_denormal(False)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_silu_for_every_binary32(backend: str) -> None:
    """All 2^32 patterns but infinities and NaNs, which are refused before they get here."""
    step = 1 << 22
    with on(backend):
        library = binding.native()
        assert library is not None
        for start in range(-(1 << 31), 1 << 31, step):
            x = torch.arange(start, start + step, dtype=torch.int64).to(torch.int32).view(torch.float32)
            x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
            y = torch.empty_like(x)
            library.call("cm_silu", x.data_ptr(), step, y.data_ptr())
            assert torch.equal(y.view(torch.int32), activation.silu(x).view(torch.int32))
