"""Prefill attention on Hopper's asynchronous matrix unit (compute capability 9.0): attention.py's formulas again.

One program: a tile of 128 rows against the blocks of its sequence. One warp starts the bulk tensor copies of keys,
values and scales into a ring of slots, twice over; two groups of four warps take 64 rows each. Pass 1 finds the two
maxima of each row; pass 2 turns scores into weights in registers, where the accumulator of the first product already
has the layout of an operand of the second, because values lie in the order `cache.value_slot`. The matrix unit adds
one block's weighted values while the arithmetic of the next block runs.

Instructions per score decide the speed, so: rows are scaled after the maximum (rounding is monotone), a weight's two
bytes come from one fused product and sum, and only blocks that reach past a group's first position are masked.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from countermark_kernels import attention as specified
from countermark_kernels import ieee as arithmetic
from countermark_kernels.gpu import ieee
from countermark_kernels.gpu.cache import BLOCK, Pool

SLOTS = 6  # blocks in shared memory
TINY = gl.constexpr(arithmetic.TINY)
LIMIT = gl.constexpr(specified.SCORE_LIMIT)
ROUND = gl.constexpr(specified.ROUND)
P_MAX = gl.constexpr(float(specified.P_MAX))
C3, C2, C1 = (gl.constexpr(c) for c in arithmetic.EXP2_SHORT_COEFFICIENTS)


@gluon.jit
def _produce(pool, ring, end, head, KV_HEADS: gl.constexpr):
    """One warp: start the copies of every block of the sequence, keys for pass 1, keys and values for pass 2."""
    table, k, s_k, v, s_v = pool
    full, empty, ks, sks, vs, svs = ring
    SLOTS: gl.constexpr = ks.shape[0]
    N: gl.constexpr = ks.shape[1]
    D: gl.constexpr = ks.shape[2]
    last = (end + N - 1) // N
    for index in range(2 * last):
        again = index >= last
        slot = index % SLOTS
        block = gl.load(table + gl.where(again, index - last, index)) * KV_HEADS + head
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((index // SLOTS) & 1) ^ 1)
        mbarrier.expect(bar, N * D + 8 * N, pred=index < last)
        mbarrier.expect(bar, 2 * N * D + 8 * N, pred=again)
        tma.async_copy_global_to_shared(k, [block * N, 0], bar, ks.index(slot))
        tma.async_copy_global_to_shared(s_k, [block, 0], bar, sks.index(slot))
        tma.async_copy_global_to_shared(s_v, [block, 0], bar, svs.index(slot))
        tma.async_copy_global_to_shared(v, [block * D, 0], bar, vs.index(slot), pred=again)


@gluon.jit
def _arrived(ring, index):
    """Wait for the copies into the slot of `index`."""
    full = ring[0]
    slots: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(index % slots), (index // slots) & 1)


@gluon.jit
def _release(ring, index):
    """Hand the slot of `index` back: these warps have read it."""
    empty = ring[1]
    gl.thread_barrier()
    mbarrier.arrive(empty.index(index % empty.shape[0]), count=1)


@gluon.jit
def _scores(q, ring, index, zero):
    """Start q . k with the slot of `index`."""
    ks = ring[2]
    keys = ks.index(index % ks.shape[0]).permute((1, 0))
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _scale(scales, index, layout: gl.constexpr):
    """The scales of a slot's tokens."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slot = scales.index(index % scales.shape[0])
    return slot._reinterpret(gl.float32, [scales.shape[2]], flat).load(layout)


@gluon.jit
def _exponents(svs, index, layout: gl.constexpr):
    """lambda of a slot's tokens as binary32, each computed by one thread."""
    s_v = _scale(svs, index, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    power = gl.maximum(((s_v.to(gl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127, -40)
    return gl.convert_layout(power.to(gl.float32), layout)


@gluon.jit
def _fold(x):
    """Maxima over the elements of a row that one thread holds."""
    return gl.max(gl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 1)


@gluon.jit
def _extend(top, bound, s, unit, power, cq):
    """The maxima of pass 1 with one more block in them."""
    a = s.to(gl.float32) * unit[None, :]
    return gl.maximum(top, _fold(a)), gl.maximum(bound, _fold(gl.fma(a, cq[:, None], power[None, :])))


@gluon.jit
def _ceil(x):
    """ieee.ceil."""
    whole = (x + ROUND) - ROUND
    return gl.where(whole < x, whole + 1.0, whole)


@gluon.jit
def _weights(a, s_v, cq, base, floor, g):
    """E * 2^22 rounded, and the weights n + 128, as int32 patterns with the exponent of the rounding constant."""
    one = gl.full_like(a, 1.0)
    a = gl.maximum(a, floor[:, None])
    w = gl.fma(a, cq[:, None], base[:, None])
    f = gl.fma(a, cq[:, None], base[:, None] - w)
    p = gl.fma(f, one * C3, one * C2)
    p = gl.fma(p, f, one * C1)
    p = gl.fma(p, f, one)
    e = (p.to(gl.int32, bitcast=True) + (w.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)
    d = gl.fma(e, one * 4194304.0, one * 8388608.0).to(gl.int32, bitcast=True)
    n = gl.fma(e * s_v[None, :], g[:, None], one * 12583040.0)
    return d, n.to(gl.int32, bitcast=True)


@gluon.jit
def _sum(d):
    """The rows' sums of E * 2^22 over one block, from patterns: [M, N] -> [M] int64."""
    gl.static_assert(d.dtype.is_int())
    N: gl.constexpr = d.shape[1]
    offset: gl.constexpr = (N * 0x4B000000 + 0x80000000) % 0x100000000 - 0x80000000
    return (gl.sum(d, 1) - offset).to(gl.int64)


@gluon.jit
def _planes(n, operand: gl.constexpr):
    """n + 128 to the bytes hi and lo with n = 256 hi + lo, as operands."""
    M: gl.constexpr = n.shape[0]
    N: gl.constexpr = n.shape[1]
    n = gl.reshape(gl.permute(gl.reshape(n, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))
    n = gl.convert_layout(n, operand, assert_trivial=True)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 x, y;
        prmt.b32 x, $2, $3, 0x5140;
        prmt.b32 y, $4, $5, 0x5140;
        prmt.b32 $0, x, y, 0x7632;
        prmt.b32 x, x, y, 0x5410;
        xor.b32 $1, x, 0x80808080;
        }""",
        "=r,=r,r,r,r,r",
        [n],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _consume(
    job, PART: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of the tile against every block."""
    queries, ring, s_q_ptr, out_ptr, flag, c, tile, head = job
    M: gl.constexpr = 64
    GROUP: gl.constexpr = HEADS // KV_HEADS
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=VALUE, k_width=4)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORE)
    sks, vs, svs = ring[3], ring[4], ring[5]
    SLOTS: gl.constexpr = vs.shape[0]
    q = queries.slice(PART * M, M)
    count = gl.load(tile + 1)
    start = gl.load(tile + 2)
    full = (start + PART * M // GROUP) // N
    last = (start + count + N - 1) // N
    r = PART * M + gl.arange(0, M, layout=ROW)
    n = gl.arange(0, N, layout=COLUMN)
    present = r // GROUP < count
    position = start + r // GROUP
    row = (gl.load(tile) + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
    cq = gl.load(s_q_ptr + row, mask=present, other=0.0) * c
    cq = gl.where(cq < TINY, 0.0, cq)

    zero = gl.zeros([M, N], gl.int32, SCORE)
    top = _fold(gl.full([M, N], float("-inf"), gl.float32, SCORE))
    bound = top
    full = gl.minimum(full, last - 1)
    _arrived(ring, 0)
    for i in range(full // 2):
        left = _scores(q, ring, 2 * i, zero)
        _arrived(ring, 2 * i + 1)
        right = _scores(q, ring, 2 * i + 1, zero)
        unit, power = _scale(sks, 2 * i, COLUMN), _exponents(svs, 2 * i, COLUMN)
        s = warpgroup_mma_wait(1, [left])
        _release(ring, 2 * i)
        top, bound = _extend(top, bound, s, unit, power, cq)
        unit, power = _scale(sks, 2 * i + 1, COLUMN), _exponents(svs, 2 * i + 1, COLUMN)
        _arrived(ring, 2 * i + 2)
        s, top, bound = warpgroup_mma_wait(0, [right, top, bound])
        _release(ring, 2 * i + 1)
        top, bound = _extend(top, bound, s, unit, power, cq)
    top = gl.convert_layout(gl.max(top, 1), ROW)
    bound = gl.convert_layout(gl.max(bound, 1), ROW)
    for j in range(full // 2 * 2, last):
        _arrived(ring, j)
        s = warpgroup_mma_wait(0, [_scores(q, ring, j, zero)])
        a = s.to(gl.float32) * _scale(sks, j, COLUMN)[None, :]
        power = _exponents(svs, j, COLUMN)
        visible = (j * N + n)[None, :] <= position[:, None]
        top = gl.maximum(top, gl.max(gl.where(visible, a, float("-inf")), 1))
        raised = gl.fma(a, cq[:, None], power[None, :])
        bound = gl.maximum(bound, gl.max(gl.where(visible, raised, float("-inf")), 1))
        _release(ring, j)
    top = top * cq
    bad = present & ((top >= LIMIT) | (top <= -LIMIT))
    gl.atomic_or(flag + gl.zeros_like(r), gl.zeros_like(r) + 2, mask=bad)
    top = _ceil(top)
    base = ROUND - top
    floor = gl.div_rn(top - 96.0, gl.maximum(cq, TINY))
    g = P_MAX * ((top - _ceil(bound)).to(gl.int32) + 127 << 23).to(gl.float32, bitcast=True)

    total = gl.zeros([M], gl.int64, ROW)
    high = gl.zeros([M, D], gl.int32, VALUE)
    low = gl.zeros([M, D], gl.int32, VALUE)
    w = zero + 128
    _arrived(ring, last)
    for j in range(full):
        at = last + j
        before = last + gl.maximum(j - 1, 0)
        values = vs.index(before % SLOTS).permute((1, 0))
        hi, lo = _planes(w, OPERAND)
        scores = _scores(q, ring, at, zero)
        highs = warpgroup_mma(hi, values, high, is_async=True)
        lows = warpgroup_mma(lo, values, low, is_async=True)
        s = warpgroup_mma_wait(2, [scores])
        a = s.to(gl.float32) * _scale(sks, at, COLUMN)[None, :]
        d, w = _weights(a, _scale(svs, at, COLUMN), cq, base, floor, g)
        total += _sum(d)
        _arrived(ring, at + 1)
        high, low, w = warpgroup_mma_wait(0, [highs, lows, w])
        if j > 0:
            _release(ring, at - 1)
    for j in range(full, last):
        at = last + j
        before = last + gl.maximum(j - 1, 0)
        values = vs.index(before % SLOTS).permute((1, 0))
        _arrived(ring, at)
        s = warpgroup_mma_wait(0, [_scores(q, ring, at, zero)])
        hi, lo = _planes(w, OPERAND)
        high = warpgroup_mma(hi, values, high, is_async=False)
        low = warpgroup_mma(lo, values, low, is_async=False)
        if j > 0:
            _release(ring, at - 1)
        a = s.to(gl.float32) * _scale(sks, at, COLUMN)[None, :]
        d, w = _weights(a, _scale(svs, at, COLUMN), cq, base, floor, g)
        visible = (j * N + n)[None, :] <= position[:, None]
        total += _sum(gl.where(visible, d, 0x4B000000))
        w = gl.where(visible, w, 128)
    hi, lo = _planes(w, OPERAND)
    values = vs.index((2 * last - 1) % SLOTS).permute((1, 0))
    high = warpgroup_mma(hi, values, high, is_async=False)
    low = warpgroup_mma(lo, values, low, is_async=False)

    OUT: gl.constexpr = gl.SliceLayout(1, VALUE)
    divisor = gl.convert_layout(total.to(gl.float32) * g, OUT)
    number = high.to(gl.int64) * 256 + low.to(gl.int64)
    o = gl.div_rn(number.to(gl.float32) * 4194304.0, divisor[:, None] + gl.zeros([M, D], gl.float32, VALUE))
    r = PART * M + gl.arange(0, M, layout=OUT)
    row = (gl.load(tile, volatile=True) + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
    present = r // GROUP < gl.load(tile + 1, volatile=True)
    x = gl.arange(0, D, layout=gl.SliceLayout(0, VALUE))
    gl.store(out_ptr + row[:, None] * D + x[None, :], o, mask=present[:, None])


@gluon.jit
def prefill(
    q_ptr, s_q_ptr, k, s_k, v, s_v, tables, tiles, out_ptr, flag, c,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = HEADS // KV_HEADS
    WIDE: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)

    head = gl.program_id(0)
    tile = tiles + gl.program_id(1) * 4
    first = gl.load(tile)
    count = gl.load(tile + 1)
    start = gl.load(tile + 2)
    pool = (tables + gl.load(tile + 3), k, s_k, v, s_v)
    arrived = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ks = gl.allocate_shared_memory(gl.int8, [SLOTS, N, D], k.layout)
    vs = gl.allocate_shared_memory(gl.int8, [SLOTS, D, N], v.layout)
    sks = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, N], s_k.layout)
    svs = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, N], s_v.layout)
    ring = (arrived, empty, ks, sks, vs, svs)
    for i in gl.static_range(SLOTS):
        mbarrier.init(arrived.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    r = gl.arange(0, 2 * 64, layout=gl.SliceLayout(1, WIDE))
    x = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    line = (first + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
    q = gl.load(q_ptr + line[:, None] * D + x[None, :], mask=(r // GROUP < count)[:, None], other=0)
    queries = gl.allocate_shared_memory(gl.int8, [2 * 64, D], LINE, q)
    fence_async_shared()
    gl.thread_barrier()
    job = (queries, ring, s_q_ptr, out_ptr, flag, c, tile, head)
    gl.warp_specialize(
        [
            (_consume, (job, 0, HEADS, KV_HEADS, D, N)),
            (_consume, (job, 1, HEADS, KV_HEADS, D, N)),
            (_produce, (pool, ring, start + count, head, KV_HEADS)),
        ],
        [4, 1],
        [240, 24],
    )


def attend(
    q: Tensor, s_q: Tensor, pool: Pool, layer: int, tables: Tensor, tiles: Tensor, out: Tensor, flag: Tensor, c: float
) -> None:
    """Launch `prefill` over `tiles` of at most batch.HOPPER_ROWS rows."""
    prefill[(pool.kv_heads, tiles.shape[0])](
        q,
        s_q,
        *_descriptors(pool, layer),
        tables,
        tiles,
        out,
        flag,
        c,
        HEADS=q.shape[1],
        KV_HEADS=pool.kv_heads,
        D=pool.head_dim,
        N=BLOCK,
        SLOTS=SLOTS,
        num_warps=4,
        **ieee.EXACT,
    )


def _descriptors(pool: Pool, layer: int) -> tuple[TensorDescriptor, ...]:
    """k, s_k, v, s_v of a layer as matrices of lines, for bulk copies."""
    k, s_k, v, s_v = pool.layer(layer)
    d = pool.head_dim
    bytes_k = gl.NVMMASharedLayout(swizzle_byte_width=d, element_bitwidth=8, rank=2)
    bytes_v = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK, element_bitwidth=8, rank=2)
    words = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return (
        TensorDescriptor.from_tensor(k.view(-1, d), [BLOCK, d], bytes_k),
        TensorDescriptor.from_tensor(s_k.view(-1, BLOCK), [1, BLOCK], words),
        TensorDescriptor.from_tensor(v.view(-1, BLOCK), [d, BLOCK], bytes_v),
        TensorDescriptor.from_tensor(s_v.view(-1, BLOCK), [1, BLOCK], words),
    )
