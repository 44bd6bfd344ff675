"""Attention of few rows: two kernels over splits of the context, so that one sequence fills the GPU.

`_score` stores a_t and the maxima of each split; `_combine` the weighted sums of each split, and the last split to
arrive adds them. Every key and value is read once. `_combine` may start while `_score` still runs (overlap.py): it
then fetches its values into the L2 cache and waits.

A program is one split (an item: its tile and its number in the tile) of one kv head. Scores and partial results lie
by items, so that scratch follows the tokens of the batch, not tiles times the longest. Where every tile is a single
split, and of few rows, `_whole` does the work of both kernels, and nothing partial is written.

Integer: the sums, so splits and the order of arrival are free. Maxima are of values that do not depend on the split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import attention as specified
from countermark_kernels.cache import BLOCK
from countermark_kernels.gpu import attention_steps as steps
from countermark_kernels.gpu import flags, ieee, overlap
from countermark_kernels.gpu.batch import Plan, Short
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import next_power_of_2

STAGES, STAGES_WHOLE = 5, 3
ROWS_WHOLE = 8
"""Rows that `_whole` takes: as few as the portable matrix instructions have columns."""
OTHERS = 16
"""Splits whose maxima are read at a time."""


@triton.jit
def _ask(v, pages, N: tl.constexpr, D: tl.constexpr):
    """Ask for blocks of values in the L2 cache."""
    overlap.prefetch(v + pages[:, None] * (N * D) + (tl.arange(0, N * D // 128) * 128)[None, :])


@triton.jit
def _prefetch(
    v,
    table,
    start,
    end,
    head,
    KV_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Ask for a split's values in the L2 cache."""
    block = start // N + tl.arange(0, CHUNK // N)
    _ask(v, tl.load(table + block, mask=block * N < end, other=0).to(tl.int64) * KV_HEADS + head, N, D)


@triton.jit
def _score(
    q,
    s_q,
    k,
    s_k,
    s_v,
    tables,
    tiles,
    items,
    scores,
    maxima,
    c,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item = items + tl.program_id(0) // KV_HEADS * 2
    which, split = tl.load(item), tl.load(item + 1)
    head = tl.program_id(0) % KV_HEADS  # heads of one block lie side by side in memory: they are read together
    tile = tiles + which * 5
    end = tl.load(tile + 2) + tl.load(tile + 1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if split * CHUNK >= end:
        return
    rows, present, position = steps.rows(tile, head, GROUP, KV_HEADS, M)
    table = tables + tl.load(tile + 3)
    width = (end + N - 1) // N * N
    r = tl.arange(0, M)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    queries = tl.load(q + rows[:, None] * D + x[None, :], mask=present[:, None], other=0)
    cq = steps.query(s_q, rows, present, c)
    before = tl.load(tile + 4).to(tl.int64)
    line = scores + (before * (CHUNK * KV_HEADS) + head * width) * R + r * width
    top = tl.full([M, N], float("-inf"), tl.float32)
    bound = tl.full([M, N], float("-inf"), tl.float32)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, width), N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        power = tl.broadcast_to(steps.power(tl.load(s_v + page * N + n))[None, :], a.shape)
        raised = ieee.fma(a, tl.broadcast_to(cq[:, None], a.shape), power)
        top = tl.maximum(top, tl.where(visible, a, float("-inf")))
        bound = tl.maximum(bound, tl.where(visible, raised, float("-inf")))
        tl.store(line[:, None] + (start + n)[None, :], a, mask=(r < R)[:, None])
    at = (before + split) * KV_HEADS + head
    tl.store(maxima + at * (2 * R) + r, tl.max(top, axis=1), mask=r < R)
    tl.store(maxima + at * (2 * R) + R + r, tl.max(bound, axis=1), mask=r < R)


@triton.jit
def _store(out, rows, present, x, number, divisor, g, D: tl.constexpr):
    """o of a tile's rows from its sums."""
    scaled = ieee.to_f32(number) * 4194304.0
    divisor = tl.where(present, ieee.to_f32(divisor) * g, 1.0)
    o = ieee.div(scaled, tl.broadcast_to(divisor[:, None], scaled.shape))
    tl.store(out + rows[:, None] * D + x[None, :], o, mask=present[:, None])


@triton.jit
def _combine(
    s_q,
    v,
    s_v,
    tables,
    tiles,
    items,
    scores,
    maxima,
    partial,
    sums,
    arrivals,
    out,
    flag,
    c,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    OTHERS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item = items + tl.program_id(0) // KV_HEADS * 2
    which, split = tl.load(item), tl.load(item + 1)
    head = tl.program_id(0) % KV_HEADS  # heads of one block lie side by side in memory: they are read together
    tile = tiles + which * 5
    end = tl.load(tile + 2) + tl.load(tile + 1)
    table = tables + tl.load(tile + 3)
    if EARLY:
        _prefetch(v, table, split * CHUNK, end, head, KV_HEADS, N, D, CHUNK)
        tl.extra.cuda.gdc_wait()
    if split * CHUNK >= end:
        return
    rows, present, position = steps.rows(tile, head, GROUP, KV_HEADS, M)
    width = (end + N - 1) // N * N
    splits = tl.cdiv(end, CHUNK)
    r = tl.arange(0, M)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    pair = which * KV_HEADS + head
    before = tl.load(tile + 4).to(tl.int64)
    first = before * KV_HEADS + head
    cq = steps.query(s_q, rows, present, c)
    top = tl.full([M], float("-inf"), tl.float32)
    bound = tl.full([M], float("-inf"), tl.float32)
    for start in range(0, splits, OTHERS):
        others = start + tl.arange(0, OTHERS)
        found = maxima + (first + others * KV_HEADS)[:, None] * (2 * R) + r[None, :]
        there = (others < splits)[:, None] & (r < R)[None, :]
        top = tl.maximum(top, tl.max(tl.load(found, mask=there, other=float("-inf")), axis=0))
        bound = tl.maximum(bound, tl.max(tl.load(found + R, mask=there, other=float("-inf")), axis=0))
    m, floor, g = steps.reference(tl.where(present, top, 0.0), tl.where(present, bound, 0.0), cq, flag, present)
    line = scores + (before * (CHUNK * KV_HEADS) + head * width) * R + r * width
    total = tl.zeros([M, N], tl.int32)
    high = tl.zeros([M, D], tl.int32)
    low = tl.zeros([M, D], tl.int32)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, width), N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        values = tl.load(v + page * (N * D) + x[:, None] * N + n[None, :])
        a = tl.load(line[:, None] + (start + n)[None, :], mask=(r < R)[:, None], other=0.0)
        d, hi, lo = steps.weigh(a, tl.load(s_v + page * N + n), visible, cq, m, floor, g)
        total += d
        high = tl.dot(hi, tl.trans(values), high, out_dtype=tl.int32)
        low = tl.dot(lo, tl.trans(values), low, out_dtype=tl.int32)
    cell = r[:, None] * D + x[None, :]
    sum_of_weights = ieee.total(total.to(tl.int64), 1)
    if splits == 1:
        _store(out, rows, present, x, (high * 256 + low).to(tl.int64), sum_of_weights, g, D)
        return
    inside = (r < R)[:, None] & (x < D)[None, :]
    mine = first + split * KV_HEADS
    tl.store(partial + mine * (R * D) + cell, high * 256 + low, mask=inside)
    tl.store(sums + mine * R + r, sum_of_weights, mask=r < R)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        number = tl.zeros([M, D], tl.int64)
        divisor = tl.zeros([M], tl.int64)
        for start in range(0, splits, 8):
            for i in tl.static_range(8):
                at = first + (start + i) * KV_HEADS
                more = start + i < splits
                part = tl.load(partial + at * (R * D) + cell, mask=inside & more, other=0, cache_modifier=".cg")
                number += part.to(tl.int64)
                divisor += tl.load(sums + at * R + r, mask=(r < R) & more, other=0, cache_modifier=".cg")
        _store(out, rows, present, x, number, divisor, g, D)
        tl.store(arrivals + pair, 0)


@triton.jit
def _whole(
    q,
    s_q,
    k,
    s_k,
    v,
    s_v,
    tables,
    tiles,
    scores,
    out,
    flag,
    c,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Both kernels in one, where every tile is a single split of at most M rows.

    Products are taken with the tokens as their rows, of which the matrix unit wants many, and there are few queries.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    tile = tiles + number * 5
    end = tl.load(tile + 2) + tl.load(tile + 1)
    block = tl.arange(0, CHUNK // N)  # all numbers at once: no copy then waits for its block's number
    pages = tl.load(tables + tl.load(tile + 3) + block, mask=block * N < end, other=0).to(tl.int64) * KV_HEADS + head
    if EARLY:
        _ask(v, pages, N, D)
        tl.extra.cuda.gdc_wait()
    rows, present, position = steps.rows(tile, head, GROUP, KV_HEADS, M)
    width = (end + N - 1) // N * N
    r = tl.arange(0, M)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    queries = tl.load(q + rows[:, None] * D + x[None, :], mask=present[:, None], other=0)
    cq = steps.query(s_q, rows, present, c)
    line = scores + tl.program_id(0).to(tl.int64) * (CHUNK * R) + r
    top = tl.full([M, N], float("-inf"), tl.float32)
    bound = tl.full([M, N], float("-inf"), tl.float32)
    for start in range(0, width, N):
        page = ieee.total(tl.where(block == start // N, pages, 0), 0)
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        sums = tl.trans(tl.dot(keys, tl.trans(queries), out_dtype=tl.int32))
        a = sums.to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        power = tl.broadcast_to(steps.power(tl.load(s_v + page * N + n))[None, :], a.shape)
        raised = ieee.fma(a, tl.broadcast_to(cq[:, None], a.shape), power)
        top = tl.maximum(top, tl.where(visible, a, float("-inf")))
        bound = tl.maximum(bound, tl.where(visible, raised, float("-inf")))
        tl.store(line[:, None] + ((start + n) * R)[None, :], a, mask=(r < R)[:, None])
    largest = tl.where(present, tl.max(top, axis=1), 0.0)
    m, floor, g = steps.reference(largest, tl.where(present, tl.max(bound, axis=1), 0.0), cq, flag, present)
    total = tl.zeros([M, N], tl.int32)
    high = tl.zeros([D, M], tl.int32)
    low = tl.zeros([D, M], tl.int32)
    tl.debug_barrier()  # a thread reads what others have stored
    for start in range(0, width, N):
        page = ieee.total(tl.where(block == start // N, pages, 0), 0)
        visible = (start + n)[None, :] <= position[:, None]
        values = tl.load(v + page * (N * D) + x[:, None] * N + n[None, :])
        a = tl.load(line[:, None] + ((start + n) * R)[None, :], mask=(r < R)[:, None], other=0.0)
        d, hi, lo = steps.weigh(a, tl.load(s_v + page * N + n), visible, cq, m, floor, g)
        total += d
        high = tl.dot(values, tl.trans(hi), high, out_dtype=tl.int32)
        low = tl.dot(values, tl.trans(lo), low, out_dtype=tl.int32)
    weights = ieee.total(total.to(tl.int64), 1)
    _store(out, rows, present, x, tl.trans(high * 256 + low).to(tl.int64), weights, g, D)


def attend(q: Tensor, s_q: Tensor, batch: Plan, short: Short, *, layer: int, out: Tensor) -> None:
    """The rows of `short` into `out`, [T, heads * d] f32."""
    pool, device, head_dim = batch.pool, q.device, q.shape[2]
    k, s_k, v, s_v = pool.layer(layer)
    items = short.items.shape[0]
    parts = items * pool.kv_heads * short.rows
    scores = torch.empty(parts * short.chunk, device=device)
    shape = {"GROUP": batch.heads // pool.kv_heads, "KV_HEADS": pool.kv_heads, "D": head_dim, "N": BLOCK}
    shape |= {"R": short.rows, "M": max(16, next_power_of_2(short.rows)), "CHUNK": short.chunk}
    options = {"num_warps": 4, "num_stages": STAGES, **overlap.launch(device)}
    grid = (items * pool.kv_heads,)
    flag = flags.word(device)
    c = specified.SCORE_CONSTANTS[head_dim]
    if items == short.tiles.shape[0] and short.rows <= ROWS_WHOLE:
        shape["M"], options["num_stages"] = ROWS_WHOLE, STAGES_WHOLE
        whole = prepared(_whole, **shape, **options)
        whole(grid, q, s_q, k, s_k, v, s_v, batch.tables, short.tiles, scores, out, flag, c)
        return
    maxima = torch.empty(2 * parts, device=device)
    partial = torch.empty(parts * head_dim, dtype=torch.int32, device=device)
    sums = torch.empty(parts, dtype=torch.int64, device=device)
    found = (batch.tables, short.tiles, short.items, scores, maxima)
    prepared(_score, **shape, **options)(grid, q, s_q, k, s_k, s_v, *found, c)
    results = (partial, sums, short.arrivals, out, flag)
    prepared(_combine, **shape, OTHERS=OTHERS, **options)(grid, s_q, v, s_v, *found, *results, c)
