"""gpu/ieee.py against countermark_kernels.ieee and exact rationals; its PTX; the error word."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gpu_cases import CUDA, DEVICE, fused, tl, triton
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.gpu import flags
from countermark_kernels.gpu import ieee as device

BLOCK = 1024


@triton.jit
def _unary(x, y, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, FUNCTION(tl.load(x + at, mask=at < n, other=1)), mask=at < n)


@triton.jit
def _binary(a, b, y, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(
        y + at, FUNCTION(tl.load(a + at, mask=inside, other=1), tl.load(b + at, mask=inside, other=1)), mask=inside
    )


@triton.jit
def _product_and_sum(a, b):
    return a * b + a


@triton.jit
def _fused(a, b):
    return device.fma(a, b, a)


@triton.jit
def _report(flag, x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    found = tl.load(x + at, mask=at < n, other=0)
    flags.report(flag, found == 1, flags.NOT_FINITE)
    flags.report(flag, tl.max(found) == 2, flags.RANGE)


def run(kernel: Any, function: Any, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    n = inputs[0].numel()
    y = torch.empty(n, dtype=dtype, device=DEVICE)
    grid = (triton.cdiv(n, BLOCK),)
    kernel[grid](*(x.to(DEVICE) for x in inputs), y, n, FUNCTION=function, BLOCK=BLOCK, **device.EXACT)
    return y.cpu()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


COUNT = 1 << (18 if CUDA else 14)
A, B = ieee._patterns(21)[:COUNT], ieee._patterns(22)[:COUNT]
SUBNORMAL = torch.arange(1, COUNT + 1, dtype=torch.int32).view(torch.float32)


def test_division() -> None:
    for a, b in ((A, B), (SUBNORMAL, B), (A * 2.0**-100, B * 2.0**20), (torch.full_like(B, 127.0), B)):
        assert same_bits(run(_binary, device.div, a, b), ieee.div(a, b))


def test_root() -> None:
    for x in (A, SUBNORMAL, torch.zeros(1)):
        assert same_bits(run(_unary, device.sqrt, x), ieee.sqrt(x))


def test_rounding() -> None:
    halves = torch.arange(-COUNT, COUNT, dtype=torch.int32).to(torch.float32) * 0.5
    edge = torch.tensor([2.0**22, -(2.0**22), 2.0**21 + 0.5, 0.49999997, -0.49999997, 1e-40])
    for x in (halves, edge):
        assert torch.equal(run(_unary, device.rint, x), ieee.rint(x))
        assert torch.equal(run(_unary, device.rint_int32, x, dtype=torch.int32), ieee.rint(x).to(torch.int32))
    positive = torch.cat((halves.abs(), A, torch.tensor([8388607.5, 8388608.0, 16777215.0, 2.0**100, 4194304.5])))
    assert torch.equal(run(_unary, device.rint_positive, positive), ieee.rint(positive))


def test_exponentials() -> None:
    x = torch.arange(-COUNT, COUNT, dtype=torch.int32).to(torch.float32) * (2.0**8 / COUNT)
    x = torch.cat((x, A, -A, SUBNORMAL, torch.tensor([0.0, -0.0, 126.0, -126.0, 0.5, -0.5, 125.5, -125.5])))
    assert same_bits(run(_unary, device.exp2, x), ieee.exp2(x))
    assert same_bits(run(_unary, device.exp, x), ieee.exp(x))


def test_exponents() -> None:
    normal = torch.cat((A, torch.tensor([1.0, 2.0, 1.5, 2.0**-126, 2.0**127])))
    integers = {"dtype": torch.int32}
    assert torch.equal(run(_unary, device.exponent, normal, **integers), ieee.exponent(normal))
    both = torch.cat((normal, torch.zeros(1)))
    assert torch.equal(run(_unary, device.ceil_exponent, both, **integers), ieee.ceil_exponent(both))
    k = torch.arange(-126, 128, dtype=torch.int32)
    assert same_bits(run(_unary, device.pow2, k), ieee.pow2(k))
    assert torch.equal(run(_unary, device.magnitude, -A, **integers), A.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_conversion(dtype: torch.dtype) -> None:
    bound = 1 << (31 if dtype == torch.int32 else 53)
    n = torch.randint(-bound, bound, (COUNT,), dtype=torch.int64, generator=torch.Generator().manual_seed(5))
    n = torch.cat((n, n >> 5, torch.arange(1 << 10) * 2 + (1 << 24) + 1))  # the last: ties
    ties = (torch.arange(1 << 10) * 2 + (1 << 24) + 1) << (5 if dtype == torch.int32 else 20)
    n = torch.cat((n, ties, ties + 1, ties - 1, -ties)).to(dtype)
    assert same_bits(run(_unary, device.to_f32, n), ieee.to_f32(n))


def test_bfloat16() -> None:
    x = torch.cat(
        (A, -B, SUBNORMAL, torch.arange(0x3F800000, 0x3F800000 + (1 << 18), dtype=torch.int32).view(torch.float32))
    )
    assert same_bits(run(_unary, device.round_bf16, x), x.to(torch.bfloat16).to(torch.float32))


def test_products_and_sums_stay_apart_unless_fused() -> None:
    apart = (A * B) + A
    finite = torch.isfinite(apart)
    assert same_bits(run(_binary, _product_and_sum, A, B)[finite], apart[finite])
    once = torch.from_numpy(fused(A.numpy(), B.numpy(), A.numpy()))
    assert same_bits(run(_binary, _fused, A, B)[finite], once[finite])
    assert not torch.equal(once[finite], apart[finite])


def test_the_fused_reference_is_right() -> None:
    a, b = (ieee._patterns(seed)[:2000].numpy() for seed in (31, 32))
    c = ((a * b) * np.float32(2.0**-24)).astype(np.float32)
    for x, y, z, got in zip(a, b, c, fused(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if 2.0**-120 < abs(exact) < 2.0**120:
            below, above = (float(np.nextafter(got, np.float32(s * np.inf))) for s in (-1, 1))
            distance = abs(Fraction(float(got)) - exact)
            assert distance <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))


@pytest.mark.parametrize(
    ("values", "code"), [([0, 0], None), ([0, 1], "not_finite"), ([2, 0], "range"), ([2, 1], "not_finite")]
)
def test_error_word(values: list[int], code: str | None) -> None:
    _report[(1,)](
        flags.word(DEVICE), torch.tensor(values, dtype=torch.int32, device=DEVICE), 2, BLOCK=4, **device.EXACT
    )
    if code is not None:
        with pytest.raises(ieee.NumericsError) as caught:
            flags.raise_pending(DEVICE)
        assert caught.value.code == f"numerics.{code}"
    flags.raise_pending(DEVICE)
