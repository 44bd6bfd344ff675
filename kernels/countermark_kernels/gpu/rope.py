"""Queries, keys and values of one layer, rope.py, and the write of keys and values into a paged pool.

A program does GROUP heads of q or of k of one row, or some successive rows of one head of v. The halves of a head stay
apart until the last stage of its Hadamard transform, which is their sum and difference. With few rows one launch does
all; with many the values have their own, whose tiles fill the pool's lines of tokens.

For the pool's layout see cache.py; a row's `slot` is its block's number times the block, plus its place in it. Dense
[T, kv_heads, d] tensors are a pool of blocks of one token.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, hadamard, ieee, overlap
from countermark_kernels.gpu.cache import value_slot
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.norm import exponent, inverse_rms, squares
from countermark_kernels.gpu.quantise import factors
from countermark_kernels.gpu.sizes import cdiv

RANGE_BITS = tl.constexpr((127 + 30) << 23)
FEW = 128
VALUES = 32


@triton.jit
def _amax(x1, x2, flag):
    top = tl.maximum(tl.max(ieee.magnitude(x1), axis=1), tl.max(ieee.magnitude(x2), axis=1))
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    return top


@triton.jit
def _quantise(x1, x2, flag):
    """Two halves [N, d/2] -> int8 halves and the scale of each row."""
    top = _amax(x1, x2, flag)
    beyond = top >= RANGE_BITS
    flags.report(flag, beyond, flags.RANGE)
    t, scale = factors(top)
    scale = tl.where(beyond, 0.0, scale)  # finite even so: it stays in the pool, for other sequences to multiply by 0
    t = t[:, None]
    return ieee.rint_int32(x1 * t).to(tl.int8), ieee.rint_int32(x2 * t).to(tl.int8), scale


@triton.jit
def _qk_norm(x1, x2, gain1, gain2, eps, flag, D: tl.constexpr):
    top = _amax(x1, x2, flag)
    e = exponent(top)
    power = ieee.pow2(14 - e)[:, None]
    total = ieee.total((squares(x1, power) + squares(x2, power)).to(tl.int64), 1)
    r = inverse_rms(total, e, D, eps, flag)[:, None]
    dead = (top < ieee.TINY_BITS)[:, None]
    return tl.where(dead, 0.0, (x1 * r) * gain1), tl.where(dead, 0.0, (x2 * r) * gain2)


@triton.jit
def _queries_keys(
    qkv, positions, cos, sin, q_gain, k_gain, slots, q, s_q, k, s_k, flag, context, heads, kv_heads, eps, program,
    PAGE: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, GAINED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = D // 2
    at = tl.arange(0, half)[None, :]
    groups = (heads + kv_heads) // GROUP
    row = (program // groups).to(tl.int64)
    first = (program % groups) * GROUP
    head = first + tl.arange(0, GROUP)
    start = qkv + row * ((heads + 2 * kv_heads) * D) + head[:, None] * D + at
    # Every load before the first report: no load is moved ahead of an atomic.
    position = tl.load(positions + row)
    slot = tl.load(slots + row).to(tl.int64)
    x1, x2 = tl.load(start), tl.load(start + half)
    outside = (position < 0) | (position >= context)
    table = tl.where(outside, 0, position).to(tl.int64) * half + at
    c, n = tl.load(cos + table), tl.load(sin + table)
    if GAINED:
        gain = q_gain if first < heads else k_gain
        x1, x2 = _qk_norm(x1, x2, tl.load(gain + at), tl.load(gain + half + at), eps, flag, D)
    flags.report(flag, outside, flags.RANGE)
    y1 = hadamard.transform(tl.reshape(x1 * c - x2 * n, [GROUP * half]), GROUP * half, STAGES - 1)
    y2 = hadamard.transform(tl.reshape(x2 * c + x1 * n, [GROUP * half]), GROUP * half, STAGES - 1)
    z1, z2, scale = _quantise(tl.reshape(y1 + y2, [GROUP, half]), tl.reshape(y1 - y2, [GROUP, half]), flag)
    if first < heads:
        to = row * heads + head
        tl.store(s_q + to, scale)
        tl.store(q + to[:, None] * D + at, z1)
        tl.store(q + to[:, None] * D + half + at, z2)
    else:
        to = ((slot // PAGE) * kv_heads + (head - heads)) * PAGE + slot % PAGE
        tl.store(s_k + to, scale)
        tl.store(k + to[:, None] * D + at, z1)
        tl.store(k + to[:, None] * D + half + at, z2)


@triton.jit
def _values(
    qkv, slots, v, s_v, flag, rows, heads, kv_heads, program, PAGE: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr
):
    half: tl.constexpr = D // 2
    at = tl.arange(0, half)
    head = program % kv_heads
    row = (program // kv_heads) * VALUES + tl.arange(0, VALUES)
    present = row < rows
    start = qkv + (row.to(tl.int64)[:, None] * (heads + 2 * kv_heads) + heads + kv_heads + head) * D + at[None, :]
    slot = tl.load(slots + row, mask=present, other=0).to(tl.int64)
    x1 = tl.load(start, mask=present[:, None], other=0.0)
    x2 = tl.load(start + half, mask=present[:, None], other=0.0)
    z1, z2, scale = _quantise(x1, x2, flag)
    page = (slot // PAGE) * kv_heads + head
    # Not transposed: of two dimensions without a stride of 1 Triton gives neighbouring threads the first, here tokens.
    to = v + (page * (D * PAGE) + value_slot(slot % PAGE))[:, None] + at[None, :] * PAGE
    tl.store(to, z1, mask=present[:, None])
    tl.store(to + half * PAGE, z2, mask=present[:, None])
    tl.store(s_v + page * PAGE + slot % PAGE, scale, mask=present)


@triton.jit
def _kernel(
    qkv, positions, cos, sin, q_gain, k_gain, slots, q, s_q, k, s_k, v, s_v, flag, rows, context, heads, kv_heads, eps,
    PAGE: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, GAINED: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    overlap.begin(EARLY)
    program = tl.program_id(0)
    others = rows * ((heads + kv_heads) // GROUP)
    if program < others:
        _queries_keys(
            qkv, positions, cos, sin, q_gain, k_gain, slots, q, s_q, k, s_k, flag, context, heads, kv_heads, eps,
            program, PAGE, D, STAGES, GAINED, GROUP,
        )  # fmt: skip
    else:
        _values(qkv, slots, v, s_v, flag, rows, heads, kv_heads, program - others, PAGE, D, 1)


@triton.jit
def _values_kernel(
    qkv, slots, v, s_v, flag, rows, heads, kv_heads,
    PAGE: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    overlap.begin(EARLY)
    _values(qkv, slots, v, s_v, flag, rows, heads, kv_heads, tl.program_id(0), PAGE, D, VALUES)


def rope_quantise(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    slots: Tensor,
    pool: tuple[Tensor, Tensor, Tensor, Tensor],
    page: int,
) -> tuple[Tensor, Tensor]:
    """Shapes as rope.rope_quantise -> (q: [T, heads, d] int8, s_q: [T, heads] f32); k, s_k, v, s_v go to `pool`.

    `slots`: [T] int32 or int64; `page`: tokens a block of the pool, BLOCK or 1.
    """
    rows = qkv.shape[0]
    _, _, v, s_v = pool
    q = torch.empty(rows, heads, head_dim, dtype=torch.int8, device=qkv.device)
    s_q = torch.empty(rows, heads, device=qkv.device)
    flag = flags.word(qkv.device)
    group = math.gcd(heads, kv_heads, 4)
    programs = rows * ((heads + kv_heads) // group)
    common = {"PAGE": page, "D": head_dim, **overlap.launch(qkv.device, rows)}
    if rows:
        gained = q_gain is not None
        kernel = prepared(_kernel, STAGES=head_dim.bit_length() - 1, GAINED=gained, GROUP=group, num_warps=1, **common)
        kernel(
            (programs + (rows * kv_heads if rows <= FEW else 0),),
            qkv, positions, cos, sin, q_gain, k_gain, slots, q, s_q, *pool, flag, rows, cos.shape[0], heads, kv_heads,
            eps,
        )  # fmt: skip
    if rows > FEW:
        grid = (cdiv(rows, VALUES) * kv_heads,)
        values = prepared(_values_kernel, VALUES=VALUES, num_warps=4, **common)
        values(grid, qkv, slots, v, s_v, flag, rows, heads, kv_heads)
    return q, s_q


def dense(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The same with k, v: [T, kv_heads, d] int8 and s_k, s_v: [T, kv_heads] f32 -> (q, s_q, k, s_k, v, s_v)."""
    rows, device = qkv.shape[0], qkv.device
    k, v = (torch.empty(rows, kv_heads, head_dim, dtype=torch.int8, device=device) for _ in range(2))
    s_k, s_v = (torch.empty(rows, kv_heads, device=device) for _ in range(2))
    q, s_q = rope_quantise(
        qkv,
        positions,
        cos,
        sin,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_gain=q_gain,
        k_gain=k_gain,
        eps=eps,
        slots=torch.arange(rows, device=device),
        pool=(k, s_k, v, s_v),
        page=1,
    )
    return q, s_q, k, s_k, v, s_v
