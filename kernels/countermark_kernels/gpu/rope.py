"""Queries, keys and values of one layer, rope.py, and the write of keys and values into a paged pool.

One program: ROWS consecutive rows of one head of q, k or v. The halves of a head stay apart until the last stage of its
Hadamard transform, which is their sum and difference.

A pool of one layer is k [blocks, kv_heads, block, d] and v [blocks, kv_heads, d, block] int8, s_k and s_v [blocks,
kv_heads, block] f32; a row's `slot` is block * its block's number + its place in the block. Dense [T, kv_heads, d]
tensors are a pool of blocks of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import flags, hadamard, ieee
from countermark_kernels.gpu.norm import inverse_rms
from countermark_kernels.gpu.quantise import factors

RANGE_BITS = tl.constexpr((127 + 30) << 23)


@triton.jit
def _kernel(
    qkv,
    positions,
    cos,
    sin,
    q_gain,
    k_gain,
    slots,
    q,
    s_q,
    k,
    s_k,
    v,
    s_v,
    flag,
    rows,
    context,
    heads,
    kv_heads,
    eps,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
    GAINED: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    half: tl.constexpr = D // 2
    at = tl.arange(0, half)[None, :]
    mask = present[:, None] & (at < half)
    start = qkv + (row.to(tl.int64)[:, None] * (heads + 2 * kv_heads) + head) * D + at
    x1 = tl.load(start, mask=mask, other=0.0)
    x2 = tl.load(start + half, mask=mask, other=0.0)
    top = tl.maximum(tl.max(ieee.magnitude(x1), axis=1), tl.max(ieee.magnitude(x2), axis=1))
    flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    if head < heads + kv_heads:
        if GAINED:
            gain = q_gain if head < heads else k_gain
            r = inverse_rms(tl.reshape(tl.join(x1, x2), [ROWS, D]), top, D, eps, flag)[:, None]
            dead = (top < ieee.TINY_BITS)[:, None]
            x1 = tl.where(dead, 0.0, (x1 * r) * tl.load(gain + at))
            x2 = tl.where(dead, 0.0, (x2 * r) * tl.load(gain + half + at))
        position = tl.load(positions + row, mask=present, other=0)
        outside = (position < 0) | (position >= context)
        flags.report(flag, outside, flags.RANGE)
        position = tl.where(outside, 0, position)[:, None].to(tl.int64)
        c = tl.load(cos + position * half + at, mask=mask, other=0.0)
        n = tl.load(sin + position * half + at, mask=mask, other=0.0)
        y1 = hadamard.transform(tl.reshape(x1 * c - x2 * n, [ROWS * half]), ROWS * half, STAGES - 1)
        y2 = hadamard.transform(tl.reshape(x2 * c + x1 * n, [ROWS * half]), ROWS * half, STAGES - 1)
        x1 = tl.reshape(y1 + y2, [ROWS, half])
        x2 = tl.reshape(y1 - y2, [ROWS, half])
        top = tl.maximum(tl.max(ieee.magnitude(x1), axis=1), tl.max(ieee.magnitude(x2), axis=1))
        flags.report(flag, top >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    flags.report(flag, top >= RANGE_BITS, flags.RANGE)
    t, scale = factors(top)
    z1 = ieee.rint_int32(x1 * t[:, None]).to(tl.int8)
    z2 = ieee.rint_int32(x2 * t[:, None]).to(tl.int8)
    if head < heads:
        index = row.to(tl.int64) * heads + head
        tl.store(q + index[:, None] * D + at, z1, mask=mask)
        tl.store(q + index[:, None] * D + half + at, z2, mask=mask)
        tl.store(s_q + index, scale, mask=present)
    else:
        slot = tl.load(slots + row, mask=present, other=0).to(tl.int64)
        token = slot % PAGE
        if head < heads + kv_heads:
            page = (slot // PAGE) * kv_heads + (head - heads)
            to = k + (page * PAGE + token)[:, None] * D + at
            tl.store(to, z1, mask=mask)
            tl.store(to + half, z2, mask=mask)
            tl.store(s_k + page * PAGE + token, scale, mask=present)
        else:
            page = (slot // PAGE) * kv_heads + (head - heads - kv_heads)
            to = v + (page * D)[:, None] * PAGE + at * PAGE + token[:, None]
            tl.store(to, z1, mask=mask)
            tl.store(to + half * PAGE, z2, mask=mask)
            tl.store(s_v + page * PAGE + token, scale, mask=present)


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

    `slots`: [T] int32 or int64; `page`: tokens a block of the pool.
    """
    rows = qkv.shape[0]
    q = torch.empty(rows, heads, head_dim, dtype=torch.int8, device=qkv.device)
    s_q = torch.empty(rows, heads, device=qkv.device)
    tile = 1 if rows < 64 else 16
    if rows:
        _kernel[(triton.cdiv(rows, tile), heads + 2 * kv_heads)](
            qkv,
            positions,
            cos,
            sin,
            q_gain,
            k_gain,
            slots,
            q,
            s_q,
            *pool,
            flags.word(qkv.device),
            rows,
            cos.shape[0],
            heads,
            kv_heads,
            eps,
            PAGE=page,
            D=head_dim,
            STAGES=head_dim.bit_length() - 1,
            GAINED=q_gain is not None,
            ROWS=tile,
            num_warps=1 if tile == 1 else 4,
            **ieee.EXACT,
        )
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
