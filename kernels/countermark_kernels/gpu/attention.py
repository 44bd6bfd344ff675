"""Attention over the paged cache: the formulas of ../attention.py, bit for bit, for ragged batches.

A batch is cut into tiles: several successive positions of one sequence by the query heads that share a kv head.
`_prefill` walks a tile's blocks twice, for the maxima and then for the sums; on Hopper attention_hopper.py does it.
Tiles of few positions take two kernels over splits of their context: `_score` stores a_t and the maxima of each split,
`_combine` the weighted sums of each split, and the last split to arrive adds them, so every key and value is read once.

Integer: S, D, n, N, hence splits, tiles and arrival are free. Maxima are of values that do not depend on the cut.
Binary32: the rest. Weights are split as n = 256 hi + lo into two int8 operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import attention as specified
from countermark_kernels import ieee as arithmetic
from countermark_kernels.gpu import flags, ieee
from countermark_kernels.gpu.cache import BLOCK, PagedCache, Pool

C3, C2, C1 = (tl.constexpr(c) for c in arithmetic.EXP2_SHORT_COEFFICIENTS)
TINY = tl.constexpr(arithmetic.TINY)
TINY_BITS = tl.constexpr((127 - 100) << 23)
LIMIT = tl.constexpr(specified.SCORE_LIMIT)
P_MAX = tl.constexpr(float(specified.P_MAX))
CHUNK_MAX = 512  # tokens of a split: 32639 * 127 * 512 < 2^31, so its N fits int32
TARGET = 132  # programs wanted of a split kernel: one a multiprocessor


@triton.jit
def _query(s_q, rows, present, c):
    """s_q * c of each row, or 0 where that is below TINY."""
    cq = tl.load(s_q + rows, mask=present, other=0.0) * c
    return tl.where(cq < TINY, 0.0, cq)


@triton.jit
def _power(s_v):
    """lambda of each token, as binary32."""
    return tl.maximum(ieee.ceil_exponent(s_v), -40).to(tl.float32)


@triton.jit
def _reference(top, bound, cq, flag, present):
    """The maxima of rows -> M, the least a that counts, and g; a score out of range is reported."""
    top = top * cq
    flags.report(flag, present & ~(tl.abs(top) < LIMIT), flags.RANGE)
    m = tl.ceil(top)
    floor = ieee.div(m - 96.0, tl.maximum(cq, TINY))
    return m, floor, ieee.pow2((m - tl.ceil(bound)).to(tl.int32)) * P_MAX


@triton.jit
def _weigh(a, s_v, visible, cq, m, floor, g):
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
def _rows(tile, head, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, M: tl.constexpr):
    """A tile's rows in q and s_q, which of them are there, and their positions."""
    r = tl.arange(0, M)
    token = r // GROUP
    rows = (tl.load(tile) + token).to(tl.int64) * (GROUP * KV_HEADS) + head * GROUP + r % GROUP
    return rows, token < tl.load(tile + 1), tl.load(tile + 2) + token


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
    rows, present, position = _rows(tile, head, GROUP, KV_HEADS, M)
    table = tables + tl.load(tile + 3)
    end = tl.load(tile + 2) + tl.load(tile + 1)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    queries = tl.load(q + rows[:, None] * D + x[None, :], mask=present[:, None], other=0)
    cq = _query(s_q, rows, present, c)
    top = tl.full([M], float("-inf"), tl.float32)
    bound = tl.full([M], float("-inf"), tl.float32)
    for start in range(0, end, N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        power = tl.broadcast_to(_power(tl.load(s_v + page * N + n))[None, :], a.shape)
        raised = ieee.fma(a, tl.broadcast_to(cq[:, None], a.shape), power)
        top = tl.maximum(top, tl.max(tl.where(visible, a, float("-inf")), axis=1))
        bound = tl.maximum(bound, tl.max(tl.where(visible, raised, float("-inf")), axis=1))
    m, floor, g = _reference(top, bound, cq, flag, present)
    total = tl.zeros([M], tl.int64)
    high = tl.zeros([M, D], tl.int32)
    low = tl.zeros([M, D], tl.int32)
    for start in range(0, end, N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        values = tl.load(v + page * (N * D) + x[:, None] * N + n[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        d, hi, lo = _weigh(a, tl.load(s_v + page * N + n), visible, cq, m, floor, g)
        total += tl.sum(d, axis=1).to(tl.int64)
        high = tl.dot(hi, tl.trans(values), high, out_dtype=tl.int32)
        low = tl.dot(lo, tl.trans(values), low, out_dtype=tl.int32)
    number = ieee.to_f32(high.to(tl.int64) * 256 + low) * 4194304.0
    o = ieee.div(number, tl.broadcast_to((ieee.to_f32(total) * g)[:, None], number.shape))
    tl.store(out + rows[:, None] * D + x[None, :], o, mask=present[:, None])


@triton.jit
def _score(
    q,
    s_q,
    k,
    s_k,
    s_v,
    tables,
    tiles,
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
):
    split = tl.program_id(0)
    head = tl.program_id(1)
    tile = tiles + tl.program_id(2) * 5
    end = tl.load(tile + 2) + tl.load(tile + 1)
    if split * CHUNK >= end:
        return
    rows, present, position = _rows(tile, head, GROUP, KV_HEADS, M)
    table = tables + tl.load(tile + 3)
    width = (end + N - 1) // N * N
    r = tl.arange(0, M)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    queries = tl.load(q + rows[:, None] * D + x[None, :], mask=present[:, None], other=0)
    cq = _query(s_q, rows, present, c)
    line = scores + (tl.load(tile + 4).to(tl.int64) * KV_HEADS + head * width) * R + r * width
    top = tl.full([M, N], float("-inf"), tl.float32)
    bound = tl.full([M, N], float("-inf"), tl.float32)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, width), N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        keys = tl.load(k + page * (N * D) + n[:, None] * D + x[None, :])
        a = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32) * tl.load(s_k + page * N + n)[None, :]
        power = tl.broadcast_to(_power(tl.load(s_v + page * N + n))[None, :], a.shape)
        raised = ieee.fma(a, tl.broadcast_to(cq[:, None], a.shape), power)
        top = tl.maximum(top, tl.where(visible, a, float("-inf")))
        bound = tl.maximum(bound, tl.where(visible, raised, float("-inf")))
        tl.store(line[:, None] + (start + n)[None, :], a, mask=(r < R)[:, None])
    at = (tl.program_id(2) * KV_HEADS + head) * tl.num_programs(0) + split
    tl.store(maxima + at * (2 * R) + r, tl.max(top, axis=1), mask=r < R)
    tl.store(maxima + at * (2 * R) + R + r, tl.max(bound, axis=1), mask=r < R)


@triton.jit
def _combine(
    s_q,
    v,
    s_v,
    tables,
    tiles,
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
    SPLITS: tl.constexpr,
):
    split = tl.program_id(0)
    head = tl.program_id(1)
    tile = tiles + tl.program_id(2) * 5
    end = tl.load(tile + 2) + tl.load(tile + 1)
    if split * CHUNK >= end:
        return
    rows, present, position = _rows(tile, head, GROUP, KV_HEADS, M)
    table = tables + tl.load(tile + 3)
    width = (end + N - 1) // N * N
    splits = tl.cdiv(end, CHUNK)
    r = tl.arange(0, M)
    x = tl.arange(0, D)
    n = tl.arange(0, N)
    pair = tl.program_id(2) * KV_HEADS + head
    first = pair * tl.num_programs(0)
    cq = _query(s_q, rows, present, c)
    others = tl.arange(0, SPLITS)
    found = maxima + (first + others)[:, None] * (2 * R) + r[None, :]
    there = (others < splits)[:, None] & (r < R)[None, :]
    top = tl.max(tl.load(found, mask=there, other=float("-inf")), axis=0)
    bound = tl.max(tl.load(found + R, mask=there, other=float("-inf")), axis=0)
    m, floor, g = _reference(tl.where(present, top, 0.0), tl.where(present, bound, 0.0), cq, flag, present)
    line = scores + (tl.load(tile + 4).to(tl.int64) * KV_HEADS + head * width) * R + r * width
    total = tl.zeros([M, N], tl.int32)
    high = tl.zeros([M, D], tl.int32)
    low = tl.zeros([M, D], tl.int32)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, width), N):
        page = tl.load(table + start // N).to(tl.int64) * KV_HEADS + head
        visible = (start + n)[None, :] <= position[:, None]
        values = tl.load(v + page * (N * D) + x[:, None] * N + n[None, :])
        a = tl.load(line[:, None] + (start + n)[None, :], mask=(r < R)[:, None], other=0.0)
        d, hi, lo = _weigh(a, tl.load(s_v + page * N + n), visible, cq, m, floor, g)
        total += d
        high = tl.dot(hi, tl.trans(values), high, out_dtype=tl.int32)
        low = tl.dot(lo, tl.trans(values), low, out_dtype=tl.int32)
    cell = r[:, None] * D + x[None, :]
    inside = (r < R)[:, None] & (x < D)[None, :]
    tl.store(partial + (first + split).to(tl.int64) * (R * D) + cell, high * 256 + low, mask=inside)
    tl.store(sums + (first + split) * R + r, tl.sum(total.to(tl.int64), axis=1), mask=r < R)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        number = tl.zeros([M, D], tl.int64)
        divisor = tl.zeros([M], tl.int64)
        for other in range(splits):
            at = (first + other).to(tl.int64)
            number += tl.load(partial + at * (R * D) + cell, mask=inside, other=0, cache_modifier=".cg").to(tl.int64)
            divisor += tl.load(sums + at * R + r, mask=r < R, other=0, cache_modifier=".cg")
        scaled = ieee.to_f32(number) * 4194304.0
        divisor = tl.where(present, ieee.to_f32(divisor) * g, 1.0)
        o = ieee.div(scaled, tl.broadcast_to(divisor[:, None], scaled.shape))
        tl.store(out + rows[:, None] * D + x[None, :], o, mask=present[:, None])
        tl.store(arrivals + pair, 0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Short:
    """Tiles of at most `rows` rows, split into parts of `chunk` tokens. tiles: [n, 5] int32, see `plan`."""

    tiles: Tensor
    rows: int
    chunk: int
    splits: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A ragged batch cut into tiles, once for all layers. tables: [blocks] int32; tiles: [n, 4] int32 or None."""

    pool: Pool
    heads: int
    rows: int
    tables: Tensor
    tiles: Tensor | None
    short: Short | None


def plan(spans: Sequence[specified.Span], heads: int) -> Plan:
    """Cut `spans`, whose caches share one pool, into tiles for `heads` query heads.

    A tile is (first row, rows of one head, first position, start of the table); tiles of the split kernels end with the
    tokens, in whole blocks, of the tiles before them. Long tiles come first.
    """
    caches = [span.cache for span in spans if isinstance(span.cache, PagedCache)]
    if len(caches) < len(spans) or any(cache.pool is not caches[0].pool for cache in caches):
        raise ValueError("spans: expected caches in one pool, got others")
    pool = caches[0].pool
    group = heads // pool.kv_heads
    few = max(1, 16 // group)
    step = max(1, _tile_rows(pool.device) // group)
    tables: list[int] = []
    long: list[tuple[int, int, int, int]] = []
    short: list[tuple[int, int, int, int, int]] = []
    width = 0
    for span, cache in zip(spans, caches, strict=True):
        count = span.end - span.start
        if count <= few:
            short.append((span.start, count, span.position, len(tables), width))
            width += triton.cdiv(span.position + count, BLOCK) * BLOCK
        else:
            long += [
                (span.start + i, min(step, count - i), span.position + i, len(tables)) for i in range(0, count, step)
            ]
        tables += cache.blocks
    long.sort(key=lambda tile: -tile[2])
    split = None
    if short:
        ends = [tile[2] + tile[1] for tile in short]
        chunk = CHUNK_MAX
        while chunk > BLOCK and sum(triton.cdiv(end, chunk) for end in ends) * pool.kv_heads < TARGET:
            chunk //= 2
        split = Short(
            tiles=_int32(short, pool.device),
            rows=group * max(tile[1] for tile in short),
            chunk=chunk,
            splits=triton.cdiv(max(ends), chunk),
            width=width,
        )
    return Plan(
        pool=pool,
        heads=heads,
        rows=spans[-1].end,
        tables=_int32(tables, pool.device),
        tiles=_int32(long, pool.device) if long else None,
        short=split,
    )


def _int32(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _tile_rows(device: torch.device) -> int:
    if not _hopper(device):
        return 64
    from countermark_kernels.gpu import attention_hopper

    return attention_hopper.ROWS


_arrivals: dict[torch.device, Tensor] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros; the kernel that counts in them leaves zeros. One stream at a time per device."""
    found = _arrivals.get(device)
    if found is None or found.shape[0] < count:
        found = _arrivals[device] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found


def attend(q: Tensor, s_q: Tensor, batch: Plan, *, layer: int) -> Tensor:
    """q: [T, heads, d] int8, s_q: [T, heads] f32 -> [T, heads * d] f32; see ../attention.py."""
    pool = batch.pool
    rows, heads, head_dim = q.shape
    out = torch.empty(rows, heads * head_dim, device=q.device)
    c = specified.SCORE_CONSTANTS[head_dim]
    flag = flags.word(q.device)
    shape = {"GROUP": heads // pool.kv_heads, "KV_HEADS": pool.kv_heads, "D": head_dim, "N": BLOCK}
    k, s_k, v, s_v = pool.layer(layer)
    if batch.tiles is not None:
        if _hopper(q.device):
            from countermark_kernels.gpu import attention_hopper

            attention_hopper.attend(q, s_q, batch.pool, layer, batch.tables, batch.tiles, out, flag, c)
        else:
            pool_and_batch = (k, s_k, v, s_v, batch.tables, batch.tiles)
            _prefill[pool.kv_heads, batch.tiles.shape[0]](
                q, s_q, *pool_and_batch, out, flag, c, M=64, **shape, num_warps=4, **ieee.EXACT
            )
    if batch.short is not None:
        short = batch.short
        pairs = short.tiles.shape[0] * pool.kv_heads
        parts = pairs * short.splits * short.rows
        scores = torch.empty(short.width * pool.kv_heads * short.rows, device=q.device)
        maxima = torch.empty(2 * parts, device=q.device)
        partial = torch.empty(parts * head_dim, dtype=torch.int32, device=q.device)
        sums = torch.empty(parts, dtype=torch.int64, device=q.device)
        grid = (short.splits, pool.kv_heads, short.tiles.shape[0])
        cut = shape | {"R": short.rows, "M": max(16, triton.next_power_of_2(short.rows)), "CHUNK": short.chunk}
        found = (batch.tables, short.tiles, scores, maxima)
        options = {"num_warps": 4, "num_stages": 5} | ieee.EXACT
        _score[grid](q, s_q, k, s_k, s_v, *found, c, **cut, **options)
        results = (partial, sums, _counters(q.device, pairs), out, flag)
        splits = triton.next_power_of_2(short.splits)
        _combine[grid](s_q, v, s_v, *found, *results, c, **cut, SPLITS=splits, **options)
    return out
