"""Attention over the paged cache: the formulas of ../attention.py, bit for bit, for ragged batches.

batch.py cuts a batch into tiles: several successive positions of one sequence by the query heads that share a kv head.
`_prefill` walks a tile's blocks twice, for the maxima and then for the sums; attention_hopper.py is the same for
compute capability 9.0. Tiles of few positions go to attention_split.py.

Integer: S, D, n, N, hence tiles are free. Maxima are of values that do not depend on the cut. Binary32: the rest.
Weights are split as n = 256 hi + lo into two int8 operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import attention as specified
from countermark_kernels.binding import gpu
from countermark_kernels.cache import BLOCK
from countermark_kernels.gpu import attention_split, flags, ieee
from countermark_kernels.gpu import attention_steps as steps
from countermark_kernels.gpu.batch import ROWS, Plan, hopper, plan
from countermark_kernels.gpu.launching import prepared

__all__ = ["Plan", "attend", "plan"]


@triton.jit
def _prefill(
    q,
    s_q,
    k,
    s_k,
    v,
    s_v,
    tables,
    tiles,
    out,
    flag,
    c,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    rows, present, position = steps.rows(tile, head, GROUP, KV_HEADS, M)
    table = tables + tl.load(tile + 3)
    end = tl.load(tile + 2) + tl.load(tile + 1)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    queries = tl.load(q + rows[:, None] * D + x[None, :], mask=present[:, None], other=0)
    cq = steps.query(s_q, rows, present, c)
    top = tl.full([M], float("-inf"), tl.float32)
    bound = tl.full([M], float("-inf"), tl.float32)
    for start in range(0, end, N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        power = tl.broadcast_to(steps.power(tl.load(s_v + page * N + n))[None, :], a.shape)
        raised = ieee.fma(a, tl.broadcast_to(cq[:, None], a.shape), power)
        top = tl.maximum(top, tl.max(tl.where(visible, a, float("-inf")), axis=1))
        bound = tl.maximum(bound, tl.max(tl.where(visible, raised, float("-inf")), axis=1))
    m, floor, g = steps.reference(top, bound, cq, flag, present)
    total = tl.zeros([M], tl.int64)
    high = tl.zeros([M, D], tl.int32)
    low = tl.zeros([M, D], tl.int32)
    for start in range(0, end, N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        values = tl.load(v + page * (N * D) + x[:, None] * N + n[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        d, hi, lo = steps.weigh(a, tl.load(s_v + page * N + n), visible, cq, m, floor, g)
        total += ieee.total(d, 1).to(tl.int64)
        high = tl.dot(hi, tl.trans(values), high, out_dtype=tl.int32)
        low = tl.dot(lo, tl.trans(values), low, out_dtype=tl.int32)
    number = ieee.to_f32(high.to(tl.int64) * 256 + low) * 4194304.0
    o = ieee.div(number, tl.broadcast_to((ieee.to_f32(total) * g)[:, None], number.shape))
    tl.store(out + rows[:, None] * D + x[None, :], o, mask=present[:, None])


def attend(q: Tensor, s_q: Tensor, batch: Plan, *, layer: int) -> Tensor:
    """q: [T, heads, d] int8, s_q: [T, heads] f32 -> [T, heads * d] f32; see ../attention.py."""
    pool = batch.pool
    rows, heads, head_dim = q.shape
    out = torch.empty(rows, heads * head_dim, device=q.device)
    c = specified.SCORE_CONSTANTS[head_dim]
    flag = flags.word(q.device)
    k, s_k, v, s_v = pool.layer(layer)
    shape = {"GROUP": heads // pool.kv_heads, "KV_HEADS": pool.kv_heads, "D": head_dim, "N": BLOCK}
    if batch.tiles is not None:
        if hopper(q.device):
            gpu("attention_hopper").attend(q, s_q, pool, layer, batch.tables, batch.tiles, out, flag, c)
        else:
            pool_and_batch = (k, s_k, v, s_v, batch.tables, batch.tiles)
            prefill = prepared(_prefill, M=ROWS, **shape, num_warps=4)
            prefill((pool.kv_heads, batch.tiles.shape[0]), q, s_q, *pool_and_batch, out, flag, c)
    if batch.short is not None:
        attention_split.attend(q, s_q, batch, batch.short, layer=layer, out=out)
    return out
