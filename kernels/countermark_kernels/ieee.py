"""Binary32 arithmetic with one rounding per written operation: the only module that divides, roots or rounds.

Specification: NUMERICS.md section 1 (profile exact-v1). Everything here is element-wise, so no bit of a result depends
on the shape, the position or the neighbours of an element.

Why not torch directly (measured on x86 with torch 2.13): `torch.sqrt` on binary32 is not correctly rounded (27,073 of
4.2 million wrong), a Python scalar divided by a tensor is a reciprocal and a product (1,053,171 wrong), and libm's exp
differs between machines. Tensor by tensor division is correct, a binary64 root rounded once to binary32 is correct
(53 >= 2 * 24 + 2 bits, Figueroa 1995), and `exp2` here is a polynomial of plain products and sums.

`self_test` proves these properties on the machine at hand, on every torch worker thread. Not checked: the order of
operations inside torch itself beyond those cases.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

LOG2E = struct.unpack("<f", struct.pack("<f", 1.4426950408889634))[0]
"""log2(e) rounded to binary32: 0x1.715476p+0."""

EXP2_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.470b4ap-13",
        "0x1.5f7276p-10",
        "0x1.3b270ep-7",
        "0x1.c6ae72p-5",
        "0x1.ebfbe2p-3",
        "0x1.62e432p-1",
        "0x1p+0",
    )
)
"""2^f on [-1/2, 1/2], degree 6 first: Remez minimax of the relative error with constant term 1, rounded to binary32.

Largest error of the whole evaluation: 1.28 ulp. 2^0 is exactly 1, and f >= 0 gives a result >= 1."""

EXP2_SHORT_COEFFICIENTS = tuple(float.fromhex(c) for c in ("0x1.c2a218p-5", "0x1.f00c4ep-3", "0x1.62f5fap-1"))
"""The same of degree 3 (the constant term 1 is left out), for attention: largest relative error 1.02e-4, 2^0 is 1."""

EXP2_LIMIT = 126.0
EXP_LIMIT = 87.0
TINY = 2.0**-100
"""A row whose largest magnitude is below this is treated as zero."""

_INFINITY_BITS = 0x7F800000
_MAGNITUDE_BITS = 0x7FFFFFFF


class NumericsError(ArithmeticError):
    """A value left the range in which the profile is defined. `code` is stable, such as `numerics.not_finite`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def f32(value: float) -> float:
    """The binary32 nearest to `value` (half to even), as a Python float. Raises OverflowError beyond binary32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def constant(value: float, like: Tensor) -> Tensor:
    """A binary32 tensor of one element that holds `value` on `like`'s device."""
    return torch.tensor([value], dtype=torch.float32, device=like.device)


def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, binary32, correctly rounded. Both are tensors: see the module docstring."""
    return torch.div(a, b)


def sqrt(x: Tensor) -> Tensor:
    """The square root of binary32 x >= 0, correctly rounded."""
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def rint(x: Tensor) -> Tensor:
    """x rounded to an integer, half to even, as binary32."""
    return torch.round(x)


def to_f32(x: Tensor) -> Tensor:
    """An integer tensor (|x| < 2^53) as binary32, rounded once, half to even."""
    return x.to(torch.float64).to(torch.float32)


def pow2(exponent: Tensor) -> Tensor:
    """2^exponent for an int32 tensor in -126..127, exact."""
    return ((exponent + 127) << 23).view(torch.float32)


def exponent(x: Tensor) -> Tensor:
    """floor(log2 x) of a normal binary32 x > 0, as int32."""
    return (x.view(torch.int32) >> 23) - 127


def ceil_exponent(x: Tensor) -> Tensor:
    """The least integer e with 2^e >= x, as int32, for a normal binary32 x > 0; -127 for x = 0."""
    return ((x.view(torch.int32) + 0x7FFFFF) >> 23) - 127


def exp2(x: Tensor) -> Tensor:
    """2^x for x clamped to [-126, 126], by a fixed polynomial.

    k = rint(x); f = x - k (exact); p = Horner over EXP2_COEFFICIENTS, each product and each sum rounded; the result
    is p with k added to its exponent field, which is exact: k = -126 happens only with f >= 0, hence p >= 1.
    """
    x = torch.clamp(x, -EXP2_LIMIT, EXP2_LIMIT)
    k = rint(x)
    f = x - k
    p = torch.full_like(f, EXP2_COEFFICIENTS[0])
    for c in EXP2_COEFFICIENTS[1:]:
        p = p * f
        p = p + c
    return (p.view(torch.int32) + (k.to(torch.int32) << 23)).view(torch.float32)


def exp2_short(k: Tensor, f: Tensor) -> Tensor:
    """2^(k + f) for an integer-valued k in -97..126 and |f| of about 1/2 at most: Horner by `fma`, degree 3."""
    p = fma(torch.full_like(f, EXP2_SHORT_COEFFICIENTS[0]), f, torch.full_like(f, EXP2_SHORT_COEFFICIENTS[1]))
    p = fma(p, f, torch.full_like(f, EXP2_SHORT_COEFFICIENTS[2]))
    p = fma(p, f, torch.ones_like(f))
    return (p.view(torch.int32) + (k.to(torch.int32) << 23)).view(torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once (IEEE 754-2008 fusedMultiplyAdd), for finite binary32 values.

    In binary64 the product is exact and the sum's error is a number (Knuth's two-sum); a sum that is not exact gets an
    odd last bit, from which rounding to binary32 is right (Boldo and Melquiond 2008: 53 >= 24 + 2 bits).
    """
    product, addend = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & ((bits & 1) == 0), bits + towards, bits)
    return odd.view(torch.float64).to(torch.float32)


def ceil(x: Tensor) -> Tensor:
    """The least integer >= x, as binary32."""
    return torch.ceil(x)


def round_bf16(x: Tensor) -> Tensor:
    """x rounded to bfloat16 (8 bits of significand), half to even, as binary32.

    In integers: half of the last kept place, less one where that place is even, is added and the low bits dropped.
    """
    bits = x.view(torch.int32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000).view(torch.float32)


def exp(x: Tensor) -> Tensor:
    """e^x as exp2(x * LOG2E) for x clamped to [-87, 87]."""
    return exp2(torch.clamp(x, -EXP_LIMIT, EXP_LIMIT) * LOG2E)


def amax(x: Tensor) -> Tensor:
    """The largest magnitude of each row (last dimension) of binary32 x, as binary32.

    An integer maximum over the bit patterns without their sign: free of order. Raises NumericsError
    `numerics.not_finite` where a row holds an infinity or a NaN.
    """
    bits = (x.view(torch.int32) & _MAGNITUDE_BITS).amax(dim=-1)
    if bool((bits >= _INFINITY_BITS).any()):
        raise not_finite()
    return bits.view(torch.float32)


def not_finite() -> NumericsError:
    """The error for an infinity or a NaN on the path."""
    return NumericsError("activation: expected finite values, got infinity or NaN", code="numerics.not_finite")


def self_test() -> tuple[str, ...]:
    """Prove on this machine what the module promises; returns the names of what was checked.

    Raises NumericsError `numerics.self_test` with the first property that does not hold. Every case is large enough
    that torch spreads it over all its worker threads, because a library built with fast-math can set flush-to-zero on
    one thread and not on another.
    """
    cases: dict[str, Callable[[], bool]] = {
        "division": _division,
        "square root": _square_root,
        "rounding": _rounding,
        "subnormals": _subnormals,
        "integer to binary32": _conversion,
        "product and sum stay apart": _contraction,
        "fused product and sum": _fusion,
        "exp2": _exp2,
        "matmul precision": _matmul_precision,
    }
    for name, holds in cases.items():
        if not holds():
            raise NumericsError(
                f"arithmetic: expected {name} as specified, got another result", code="numerics.self_test"
            )
    return tuple(cases)


_MANY = 1 << 18


def _patterns(seed: int) -> Tensor:
    """`_MANY` finite positive binary32 values over most of the exponent range, the same on every machine."""
    i = torch.arange(_MANY, dtype=torch.int64)
    i = (i * 2654435761 + seed * 40503 + 12345) & 0xFFFFFFFF
    i = ((i ^ (i >> 15)) * 2246822519) & 0xFFFFFFFF
    mantissa = (i ^ (i >> 13)) & 0x7FFFFF
    exponents = 67 + ((i >> 23) % 120)
    return ((exponents << 23) | mantissa).to(torch.int32).view(torch.float32)


def _division() -> bool:
    a, b = _patterns(1), _patterns(2)
    ones = torch.full_like(a, 127.0)
    exact = (a.to(torch.float64) / b.to(torch.float64)).to(torch.float32)
    reciprocal = (ones.to(torch.float64) / b.to(torch.float64)).to(torch.float32)
    broadcast = div(constant(127.0, b), b)
    return (
        torch.equal(div(a, b), exact) and torch.equal(div(ones, b), reciprocal) and torch.equal(broadcast, reciprocal)
    )


def _square_root() -> bool:
    """r is the rounded root of x when x lies between the squares of r's two midpoints (exact in 50 bits)."""
    x = _patterns(3)
    r = sqrt(x)
    bits = r.view(torch.int32)
    wide = r.to(torch.float64)
    low = (wide + (bits - 1).view(torch.float32).to(torch.float64)) * 0.5
    high = (wide + (bits + 1).view(torch.float32).to(torch.float64)) * 0.5
    return bool(((low * low <= x.to(torch.float64)) & (x.to(torch.float64) <= high * high)).all())


def _rounding() -> bool:
    halves = torch.arange(-_MANY, _MANY, dtype=torch.int32)
    floor = halves >> 1
    expected = torch.where((halves & 1) == 0, floor, floor + (floor & 1))
    return torch.equal(rint(halves.to(torch.float32) * 0.5), expected.to(torch.float32))


def _subnormals() -> bool:
    bits = torch.arange(1, _MANY + 1, dtype=torch.int32)
    x = bits.view(torch.float32)
    doubled = (x + x).view(torch.int32)
    scaled = (x * 2.0**20).to(torch.float64) * 2.0**129
    return torch.equal(doubled, bits * 2) and torch.equal(scaled.to(torch.int64), bits.to(torch.int64))


def _conversion() -> bool:
    n = torch.arange(_MANY, dtype=torch.int64) + (1 << 23)
    tie = ((n * 2) + 1) << 20
    to_even = torch.equal(to_f32(tie).to(torch.int64), (n + (n & 1)) << 21)
    upwards = torch.equal(to_f32(tie + 1).to(torch.int64), (n + 1) << 21)
    return to_even and upwards


def _contraction() -> bool:
    a, b = _patterns(4), _patterns(5)
    product = (a.to(torch.float64) * b.to(torch.float64)).to(torch.float32)
    finite = torch.isfinite(product)
    difference = a * b - product
    return not bool(difference[finite].any())


def _fusion() -> bool:
    """What rounding took from a product comes back whole, and a tie is broken by what lies far below it."""
    a, b = _patterns(6), _patterns(7)
    exact = a.to(torch.float64) * b.to(torch.float64)
    product = exact.to(torch.float32)
    rest = (exact - product.to(torch.float64)).to(torch.float32)
    usable = torch.isfinite(product) & (product >= 2.0**-60)
    whole = torch.equal(fma(a, b, -product)[usable], rest[usable])
    one = torch.full_like(a, 1.0 + 2.0**-12)
    tiny = torch.full_like(a, 2.0**-80)
    up = fma(one, one, tiny) == 1.0 + 2.0**-11 + 2.0**-23
    down = fma(one, one, -tiny) == 1.0 + 2.0**-11
    return whole and bool(up.all()) and bool(down.all())


def _exp2() -> bool:
    x = torch.arange(-_MANY, _MANY, dtype=torch.int32).to(torch.float32) * 2.0**-11
    narrow = torch.clamp(x, -96.0, 96.0)
    k = rint(narrow)
    weights = torch.arange(x.numel(), dtype=torch.int64) * 2 + 1
    long, short = (
        int((y.view(torch.int32).to(torch.int64) * weights).sum(dtype=torch.int64))
        for y in (exp2(x), exp2_short(k, narrow - k))
    )
    return (long, short) == (EXP2_DIGEST, EXP2_SHORT_DIGEST)


EXP2_DIGEST = 3676592844379889996
EXP2_SHORT_DIGEST = -4711113216200092736


def _matmul_precision() -> bool:
    precision: str = torch.get_float32_matmul_precision()
    return precision == "highest"
