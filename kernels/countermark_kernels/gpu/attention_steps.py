"""What the Triton kernels of attention share: a row's constants and a block's weights, as ../attention.py has them."""

from __future__ import annotations

import triton
import triton.language as tl

from countermark_kernels import attention as specified
from countermark_kernels import ieee as arithmetic
from countermark_kernels.gpu import flags, ieee

C3, C2, C1 = (tl.constexpr(c) for c in arithmetic.EXP2_SHORT_COEFFICIENTS)
TINY = tl.constexpr(arithmetic.TINY)
LIMIT = tl.constexpr(specified.SCORE_LIMIT)
P_MAX = tl.constexpr(float(specified.P_MAX))


@triton.jit
def query(s_q, rows, present, c):
    """s_q * c of each row, or 0 where that is below TINY."""
    cq = tl.load(s_q + rows, mask=present, other=0.0) * c
    return tl.where(cq < TINY, 0.0, cq)


@triton.jit
def power(s_v):
    """lambda of each token, as binary32."""
    return tl.maximum(ieee.ceil_exponent(s_v), -40).to(tl.float32)


@triton.jit
def reference(top, bound, cq, flag, present):
    """The maxima of rows -> M, the least a that counts, and g; a score out of range is reported."""
    top = top * cq
    flags.report(flag, present & ~(tl.abs(top) < LIMIT), flags.RANGE)
    m = ieee.ceil(top)
    floor = ieee.div(m - 96.0, tl.maximum(cq, TINY))
    return m, floor, ieee.pow2((m - ieee.ceil(bound)).to(tl.int32)) * P_MAX


@triton.jit
def weigh(a, s_v, visible, cq, m, floor, g):
    """E * 2^22 rounded (0 where not visible) and the bytes of n, tokens in the order of cache.value_slot."""
    a = tl.maximum(a, floor[:, None])
    scale = tl.broadcast_to(cq[:, None], a.shape)
    base = tl.broadcast_to((12582912.0 - m)[:, None], a.shape)
    whole = ieee.fma(a, scale, base)
    f = ieee.fma(a, scale, base - whole)
    one = tl.full(a.shape, 1.0, tl.float32)
    p = ieee.fma(one * C3, f, one * C2)
    p = ieee.fma(p, f, one * C1)
    p = ieee.fma(p, f, one)
    e = ieee.value(ieee.bits(p) + (ieee.bits(whole) << 23))
    e = tl.where(visible, e, 0.0)
    d = ieee.bits(e * 4194304.0 + 8388608.0) - 0x4B000000
    n = ieee.bits(ieee.fma(e * s_v[None, :], tl.broadcast_to(g[:, None], a.shape), one * 12583040.0)) - 0x4B400000
    shape: tl.constexpr = (n.shape[0], n.shape[1] // 16, 2, 4, 2)
    n = tl.reshape(tl.permute(tl.reshape(n, shape), (0, 1, 3, 2, 4)), (n.shape[0], n.shape[1]))
    return d, (n >> 8).to(tl.int8), (n ^ 128).to(tl.int8)


@triton.jit
def rows(tile, head, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, M: tl.constexpr):
    """A tile's rows in q and s_q, which of them are there, and their positions."""
    r = tl.arange(0, M)
    token = r // GROUP
    rows = (tl.load(tile) + token).to(tl.int64) * (GROUP * KV_HEADS) + head * GROUP + r % GROUP
    return rows, token < tl.load(tile + 1), tl.load(tile + 2) + token
