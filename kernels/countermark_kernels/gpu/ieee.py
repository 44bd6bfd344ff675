"""Binary32 arithmetic inside Triton kernels: the only file here that divides, roots or rounds.

The functions of countermark_kernels/ieee.py under the same names, for blocks of values in registers, bit for bit.
What makes them so (read off the PTX by tests/kernels/gpu, for compute capability 9.0):

- every launch passes EXACT, so that a product and a sum are never contracted; no function here is flushed to zero;
- `div` and `sqrt` are div.rn.f32 and sqrt.rn.f32: Triton's `/` and `tl.sqrt` are approximate;
- `rint` adds and subtracts a constant at which one unit in the last place is 1: to nearest, half to even;
- conversions from integers are cvt.rn: one rounding, half to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countermark_kernels import ieee as specified

EXACT = {"enable_fp_fusion": False}
"""Launch options of every kernel: products and sums stay apart."""

C6, C5, C4, C3, C2, C1, C0 = (tl.constexpr(c) for c in specified.EXP2_COEFFICIENTS)
LOG2E = tl.constexpr(specified.LOG2E)
TINY = tl.constexpr(specified.TINY)
EXP_LIMIT = tl.constexpr(specified.EXP_LIMIT)
EXP2_LIMIT = tl.constexpr(specified.EXP2_LIMIT)
INFINITY_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
TINY_BITS = tl.constexpr((127 - 100) << 23)
SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23
SHIFT_BITS = tl.constexpr(0x4B400000)
UNIT = tl.constexpr(8388608.0)  # 2^23


@triton.jit
def bits(x):
    """The pattern of binary32 x as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def value(pattern):
    """The binary32 of an int32 pattern."""
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """bits(x) without the sign, as int32: ordered like |x|, and at least INFINITY_BITS for an infinity or a NaN."""
    return bits(x) & 0x7FFFFFFF


@triton.jit
def div(a, b):
    """a / b, correctly rounded."""
    return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    """The square root of x >= 0, correctly rounded."""
    return tl.sqrt_rn(x)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once."""
    return tl.fma(a, b, c)


@triton.jit
def rint(x):
    """x rounded to an integer, half to even, for |x| <= 2^22."""
    return (x + SHIFT) - SHIFT


@triton.jit
def rint_positive(x):
    """x rounded to an integer, half to even, for x >= 0 of any size."""
    return tl.where(x < UNIT, (x + UNIT) - UNIT, x)


@triton.jit
def rint_int32(x):
    """rint(x) as int32, for |x| <= 2^22."""
    return bits(x + SHIFT) - SHIFT_BITS


@triton.jit
def ceil(x):
    """The least integer at or above x, for |x| <= 2^22. Triton's own takes a subnormal x for zero."""
    whole = rint(x)
    return tl.where(whole < x, whole + 1.0, whole)


@triton.jit
def to_f32(n):
    """An int32 or int64 as binary32, rounded once, half to even."""
    return n.to(tl.float32)


@triton.jit
def round_bf16(x):
    """Finite x rounded to bfloat16, half to even, as binary32; an infinity where it rounds beyond bfloat16."""
    pattern = bits(x)
    return value((pattern + 0x7FFF + ((pattern >> 16) & 1)) & -65536)


@triton.jit
def pow2(k):
    """2^k for int32 k in -126..127, exact."""
    return value((k + 127) << 23)


@triton.jit
def exponent(x):
    """floor(log2 x) of a normal x > 0, as int32."""
    return (bits(x) >> 23) - 127


@triton.jit
def ceil_exponent(x):
    """The least integer e with 2^e >= x, as int32, for a normal x > 0; -127 for x = 0."""
    return ((bits(x) + 0x7FFFFF) >> 23) - 127


@triton.jit
def exp2(x):
    """2^x for x clamped to -126..126, by the polynomial of the specification."""
    return _exp2(tl.minimum(tl.maximum(x, -EXP2_LIMIT), EXP2_LIMIT))


@triton.jit
def _exp2(x):
    shifted = x + SHIFT  # its pattern ends in rint(x), and SHIFT's own falls out of the shift below
    f = x - (shifted - SHIFT)
    p = f * C6 + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + C0
    return value(bits(p) + (bits(shifted) << 23))


@triton.jit
def exp(x):
    """e^x as exp2(x * LOG2E) for x clamped to -87..87."""
    return _exp2(tl.minimum(tl.maximum(x, -EXP_LIMIT), EXP_LIMIT) * LOG2E)


@triton.jit
def truncate(x):
    """x without its fraction as int32, for |x| < 2^31."""
    return x.to(tl.int32)


@triton.jit
def total(n, axis: tl.constexpr):
    """The sum of integers along an axis: free of order."""
    tl.static_assert(n.dtype.is_int())
    return tl.sum(n, axis=axis)


@triton.jit
def running(n):
    """The running totals of integers [N], each element's own included."""
    tl.static_assert(n.dtype.is_int())
    return tl.cumsum(n, 0)


@triton.jit
def add(to, n, mask):
    """Add integers to memory, in any order."""
    tl.static_assert(n.dtype.is_int())
    return tl.atomic_add(to, n, mask=mask, sem="relaxed")
