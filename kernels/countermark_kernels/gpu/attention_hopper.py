"""Prefill attention on Hopper's asynchronous matrix unit (compute capability 9.0): attention.py's formulas again.

A program does tiles of 128 rows against the blocks of their sequences, one after the other, and starts the copies of
the next tile while it finishes one. One warp starts the bulk tensor copies of keys, values and scales into a ring of
slots of two blocks, twice over for a tile; one computes the exponents of the values' scales; two groups of four warps
take 64 rows each. Pass 1 finds the two maxima of each row; pass 2 turns scores into weights in registers, where the
accumulator of the first product already has the layout of an operand of the second, because values lie in the order
`cache.value_slot`. While the arithmetic does half a block, the matrix unit adds the half before and computes the scores
of the next. (Halves, because accumulators leave no registers for a whole block more.)

Instructions per score decide the speed, so: rows are scaled after the maximum (rounding is monotone), a weight's two
bytes come from one fused product and sum, and only blocks that reach past a group's first position are masked.
"""

from __future__ import annotations

from functools import cache

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

from countermark_kernels import attention as specified
from countermark_kernels import ieee as arithmetic
from countermark_kernels.gpu.cache import BLOCK, Pool
from countermark_kernels.gpu.launching import Block, Matrix, prepared
from countermark_kernels.gpu.linear_hopper import multiprocessors

SLOTS = 4  # pairs of blocks in shared memory
TINY = gl.constexpr(arithmetic.TINY)
LIMIT = gl.constexpr(specified.SCORE_LIMIT)
ROUND = gl.constexpr(specified.ROUND)
P_MAX = gl.constexpr(float(specified.P_MAX))
C3, C2, C1 = (gl.constexpr(c) for c in arithmetic.EXP2_SHORT_COEFFICIENTS)


@gluon.jit
def _item(turn):
    """What a program does in its turn: there and back over the programs, because items are sorted by length."""
    at = gl.program_id(0)
    return turn * gl.num_programs(0) + gl.where(turn % 2 == 0, at, gl.num_programs(0) - 1 - at)


@gluon.jit
def _produce(pool, ring, tables, tiles, items, KV_HEADS: gl.constexpr):
    """One warp: start the copies of every block of a tile's sequence, keys for pass 1, keys and values for pass 2."""
    k, s_k, v, s_v = pool
    full, empty, ks, sks, vs, svs = ring
    SLOTS: gl.constexpr = full.shape[0]
    N: gl.constexpr = ks.shape[1]
    D: gl.constexpr = ks.shape[2]
    index = gl.program_id(0) * 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = _item(turn)
        if item < items:
            tile = tiles + item // KV_HEADS * 4
            head = item % KV_HEADS
            last = (gl.load(tile + 1) + gl.load(tile + 2) + N - 1) // N
            table = tables + gl.load(tile + 3)
            for again in gl.static_range(2):
                left = gl.load(table)
                right = gl.load(table + gl.minimum(1, last - 1))
                for at in range(0, last, 2):
                    slot = index % SLOTS
                    bar = full.index(slot)
                    mbarrier.wait(empty.index(slot), ((index // SLOTS) & 1) ^ 1)
                    mbarrier.expect(bar, 2 * ((1 + again) * N * D + 8 * N))
                    for half in gl.static_range(2):
                        line = (right if half else left) * KV_HEADS + head
                        tma.async_copy_global_to_shared(k, [line * N, 0], bar, ks.index(2 * slot + half))
                        tma.async_copy_global_to_shared(s_k, [line, 0], bar, sks.index(2 * slot + half))
                        tma.async_copy_global_to_shared(s_v, [line, 0], bar, svs.index(2 * slot + half))
                        if again == 1:
                            tma.async_copy_global_to_shared(v, [line * D, 0], bar, vs.index(2 * slot + half))
                    left = gl.load(table + gl.minimum(at + 2, last - 1))
                    right = gl.load(table + gl.minimum(at + 3, last - 1))
                    index += 1


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
def _scores(q, ring, index, half, zero, FIRST: gl.constexpr):
    """Start q . k with a block in the slot of `index`: as many tokens as zero has columns, from FIRST on."""
    ks = ring[2]
    keys = ks.index(index % (ks.shape[0] // 2) * 2 + half).slice(FIRST, zero.shape[1]).permute((1, 0))
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _scale(scales, index, half, FIRST: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """The scales of some of a block's tokens."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    block = scales.index(index % (scales.shape[0] // 2) * 2 + half)._reinterpret(gl.float32, [scales.shape[2]], flat)
    return block.slice(FIRST, COUNT).load(layout)


@gluon.jit
def _annotate(ring, powers, ready, tiles, items, KV_HEADS: gl.constexpr):
    """One warp: lambda of the tokens of every block of pass 1, as binary32."""
    empty, svs = ring[1], ring[5]
    N: gl.constexpr = svs.shape[2]
    SLOTS: gl.constexpr = empty.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    index = gl.program_id(0) * 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = _item(turn)
        if item < items:
            tile = tiles + item // KV_HEADS * 4
            pairs = (gl.load(tile + 1) + gl.load(tile + 2) + 2 * N - 1) // (2 * N)
            for at in range(2 * pairs):
                slot = index % SLOTS
                _arrived(ring, index)
                if at < pairs:
                    for half in gl.static_range(2):
                        bits = _scale(svs, index, half, 0, N, layout).to(gl.int32, bitcast=True)
                        power = gl.maximum(((bits + 0x7FFFFF) >> 23) - 127, -40).to(gl.float32)
                        powers.index(2 * slot + half).store(power)
                    gl.thread_barrier()
                mbarrier.arrive(ready.index(slot), count=1)
                mbarrier.arrive(empty.index(slot), count=1)
                index += 1


@gluon.jit
def _fold(x):
    """Maxima over the elements of a row that one thread holds."""
    return gl.max(gl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 1)


@gluon.jit
def _ceil(x):
    """ieee.ceil."""
    whole = (x + ROUND) - ROUND
    return gl.where(whole < x, whole + 1.0, whole)


@gluon.jit
def _maxima(s, top, bound, ring, lambdas, index, half, ahead, then, zero, q, cq, seen, wait: gl.constexpr):
    """Pass 1 over one block, its scores in s, while the next one's are computed: those, and the maxima."""
    powers, ready = lambdas
    slots: gl.constexpr = ready.shape[0]
    column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    if wait:
        _arrived(ring, ahead)
    following = _scores(q, ring, ahead, then, zero, 0)
    if not wait or seen is not None:
        mbarrier.wait(ready.index(index % slots), (index // slots) & 1)
    a = s.to(gl.float32) * _scale(ring[3], index, half, 0, s.shape[1], column)[None, :]
    raised = gl.fma(a, cq[:, None], powers.index(index % slots * 2 + half).load(column)[None, :])
    if seen is not None:
        visible = gl.arange(0, s.shape[1], layout=column)[None, :] <= seen[:, None]
        a = gl.where(visible, a, float("-inf"))
        raised = gl.where(visible, raised, float("-inf"))
    top = gl.maximum(top, _fold(a))
    bound = gl.maximum(bound, _fold(raised))
    return warpgroup_mma_wait(0, [following, top, bound])


@gluon.jit
def _weights(s, ring, block, row, visible, FIRST: gl.constexpr):
    """Some tokens' sums of E * 2^22 over what one thread holds of a row, and their weights as words of `_pairs`."""
    cq, base, floor, g = row
    column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    s_k = _scale(ring[3], block // 2, block % 2, FIRST, s.shape[1], column)
    s_v = _scale(ring[5], block // 2, block % 2, FIRST, s.shape[1], column)
    a = s.to(gl.float32) * s_k[None, :]
    one = gl.full_like(a, 1.0)
    a = gl.maximum(a, floor[:, None])
    w = gl.fma(a, cq[:, None], base[:, None])
    f = gl.fma(a, cq[:, None], base[:, None] - w)
    p = gl.fma(f, one * C3, one * C2)
    p = gl.fma(p, f, one * C1)
    p = gl.fma(p, f, one)
    e = (p.to(gl.int32, bitcast=True) + (w.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)
    if visible is not None:
        e = gl.where(visible, e, 0.0)
    d = gl.fma(e, one * 4194304.0, one * 8388608.0).to(gl.int32, bitcast=True)
    n = gl.fma(e * s_v[None, :], g[:, None], one * 12583040.0)
    x, y = _pairs(n.to(gl.int32, bitcast=True))
    return _sum(d), x, y


@gluon.jit
def _sum(d):
    """Sums of E * 2^22 over what one thread holds of a row, from patterns: [M, N] -> [M, 4] int64."""
    gl.static_assert(d.dtype.is_int())
    M: gl.constexpr = d.shape[0]
    N: gl.constexpr = d.shape[1]
    offset: gl.constexpr = (N // 4 * 0x4B000000 + 0x80000000) % 0x100000000 - 0x80000000
    pairs = gl.reshape(d, (M, N // 8, 4, 2))
    gl.static_assert(pairs.dtype.is_int())
    d = gl.sum(pairs, 3)
    d = gl.sum(d, 1)
    return (d - offset).to(gl.int64)


@gluon.jit
def _pairs(n):
    """n + 128, [M, N], to words of two weights' bytes, low bytes first: for each four weights that follow each other in
    the order of cache.value_slot, their first and their second pair. `_planes` does the rest a step later, because an
    operand must not be written while the matrix unit works.
    """
    M: gl.constexpr = n.shape[0]
    N: gl.constexpr = n.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(n, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)))
    n0, n2 = gl.split(left)
    n1, n3 = gl.split(right)
    return _bytes(n0, n1), _bytes(n2, n3)


@gluon.jit
def _bytes(a, b):
    """The lowest bytes of a and b, then the next ones."""
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def _planes(x, y, layout: gl.constexpr):
    """Words of `_pairs` to hi and lo with n = 256 hi + lo, as int8 operands."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] * 16
    x = gl.join(x, x)
    y = gl.join(y, y)
    x = gl.convert_layout(gl.reshape(gl.join(x, x), (M, N)), layout, assert_trivial=True)
    y = gl.convert_layout(gl.reshape(gl.join(y, y), (M, N)), layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t; // $3 $4 $5 $7 $8 $9
        prmt.b32 $0, $2, $6, 0x7632;
        prmt.b32 t, $2, $6, 0x5410;
        xor.b32 $1, t, 0x80808080;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r",
        [x, y],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _sums(
    s, x, y, high, low, total, zero, q, ring, block, ahead, back, row, seen, FIRST: gl.constexpr, operand: gl.constexpr
):  # fmt: skip
    """Pass 2 over the half of `block` that starts at FIRST, its scores in s, while the matrix unit adds the half before
    (in the block `back`, its weights in x and y) and computes the scores of the next (in the block `ahead`).
    """
    H: gl.constexpr = s.shape[1]
    ks, vs = ring[2], ring[4]
    keys = ks.index(ahead).slice(H - FIRST, H).permute((1, 0))
    values = vs.index(back).permute((1, 0)).slice(H - FIRST, H)
    hi, lo = _planes(x, y, operand)
    following = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    highs = warpgroup_mma(hi, values, high, is_async=True)
    lows = warpgroup_mma(lo, values, low, is_async=True)
    visible = None
    if seen is not None:
        visible = gl.arange(FIRST, FIRST + H, layout=gl.SliceLayout(0, s.type.layout))[None, :] <= seen[:, None]
    d, x, y = _weights(s, ring, block, row, visible, FIRST)
    total += d
    high, low, s, x, y, total = warpgroup_mma_wait(0, [highs, lows, following, x, y, total])
    return s, x, y, high, low, total


@gluon.jit
def _as(x, layout: gl.constexpr):
    return gl.convert_layout(x, layout)


@gluon.jit
def _quotient(a, b, y):
    """a / b correctly rounded, for y = 1 / b correctly rounded (Markstein 1990).

    The first correction leaves less than a unit in the last place, which is what the second needs. Nothing here is
    subnormal: a is 0 or in 2^22..2^62, b in 2^-6..2^97.
    """
    q = a * y
    q = gl.fma(gl.fma(-q, b, a), y, q)
    return gl.fma(gl.fma(-q, b, a), y, q)


@gluon.jit
def _consume(
    job, PART: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of each tile against every block."""
    queries, lambdas, ring, q_ptr, s_q_ptr, out_ptr, flag, c, tiles, items = job
    M: gl.constexpr = 64
    GROUP: gl.constexpr = HEADS // KV_HEADS
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32])
    HALF: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N // 2, 32])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=VALUE, k_width=4)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    KEPT: gl.constexpr = gl.SliceLayout(1, HALF)
    OUT: gl.constexpr = gl.SliceLayout(1, VALUE)
    q = queries.index(PART)
    SLOTS: gl.constexpr = ring[0].shape[0]
    zero = gl.zeros([M, N], gl.int32, SCORE)
    first = gl.program_id(0) * 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = _item(turn)
        if item < items:
            tile = tiles + item // KV_HEADS * 4
            head = item % KV_HEADS
            token = gl.load(tile)
            count = gl.load(tile + 1)
            start = gl.load(tile + 2)
            r = PART * M + gl.arange(0, M, layout=gl.SliceLayout(1, WIDE))
            x = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
            line = (token + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
            q.store(gl.load(q_ptr + line[:, None] * D + x[None, :], mask=(r // GROUP < count)[:, None], other=0))
            last = (start + count + N - 1) // N
            full = gl.minimum((start + PART * M // GROUP) // N, last - 1) // 2
            pairs = (last + 1) // 2
            r = PART * M + gl.arange(0, M, layout=ROW)
            present = r // GROUP < count
            position = start + r // GROUP
            line = (token + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
            cq = gl.load(s_q_ptr + line, mask=present, other=0.0) * c
            cq = gl.where(cq < TINY, 0.0, cq)
            _arrived(ring, first)
            fence_async_shared()
            gl.thread_barrier()

            s = warpgroup_mma_wait(0, [_scores(q, ring, first, 0, zero, 0)])
            top = _fold(gl.full([M, N], float("-inf"), gl.float32, SCORE))
            bound = top
            for i in range(full):
                at = first + i
                s, top, bound = _maxima(s, top, bound, ring, lambdas, at, 0, at, 1, zero, q, cq, None, False)
                s, top, bound = _maxima(s, top, bound, ring, lambdas, at, 1, at + 1, 0, zero, q, cq, None, True)
                _release(ring, at)
            for j in range(2 * full, last):
                at = first + j // 2
                ahead = gl.where(j + 1 < last, first + (j + 1) // 2, first + pairs)
                then = gl.where(j + 1 < last, (j + 1) % 2, 0)
                s, top, bound = _maxima(
                    s, top, bound, ring, lambdas, at, j % 2, ahead, then, zero, q, cq, position - j * N, True
                )
            for i in range(full, pairs):
                _release(ring, first + i)
            first += pairs
            top = _as(gl.max(top, 1), ROW) * cq
            bound = _as(gl.max(bound, 1), ROW)
            bad = present & ((top >= LIMIT) | (top <= -LIMIT))
            gl.atomic_or(flag + gl.zeros_like(r), gl.zeros_like(r) + 2, mask=bad)
            top = _ceil(top)
            base = ROUND - top
            floor = gl.div_rn(top - 96.0, gl.maximum(cq, TINY))
            g = P_MAX * ((top - _ceil(bound)).to(gl.int32) + 127 << 23).to(gl.float32, bitcast=True)
            row = (_as(cq, KEPT), _as(base, KEPT), _as(floor, KEPT), _as(g, KEPT))
            position = _as(position, KEPT)

            none = gl.zeros([M, N // 2], gl.int32, HALF)
            total = _sum(none + 0x4B000000)
            high = gl.zeros([M, D], gl.int32, VALUE)
            low = gl.zeros([M, D], gl.int32, VALUE)
            x, y = _pairs(none + 128)
            s = warpgroup_mma_wait(0, [_scores(q, ring, first, 0, none, 0)])
            past = gl.minimum((start + PART * M // GROUP) // N, last - 1)
            b0 = 2 * first
            b = b0 % (2 * SLOTS)
            before = b + 0  # a value of its own: Triton takes a name for unchanged by a loop that gets its own value
            for j in range(past):
                s, x, y, high, low, total = _sums(
                    s, x, y, high, low, total, none, q, ring, b, b, before, row, None, 0, OPERAND
                )
                if (j % 2 == 0) & (j > 0):
                    _release(ring, first + j // 2 - 1)
                before = b
                b = (b0 + j + 1) % (2 * SLOTS)
                _arrived(ring, first + (j + 1) // 2)
                s, x, y, high, low, total = _sums(
                    s, x, y, high, low, total, none, q, ring, before, b, before, row, None, N // 2, OPERAND
                )
            for j in range(past, last):
                seen = position - j * N
                s, x, y, high, low, total = _sums(
                    s, x, y, high, low, total, none, q, ring, b, b, before, row, seen, 0, OPERAND
                )
                if (j % 2 == 0) & (j > 0):
                    _release(ring, first + j // 2 - 1)
                before = b
                b = (b0 + gl.minimum(j + 1, last - 1)) % (2 * SLOTS)
                _arrived(ring, first + gl.minimum(j + 1, last - 1) // 2)
                s, x, y, high, low, total = _sums(
                    s, x, y, high, low, total, none, q, ring, before, b, before, row, seen, N // 2, OPERAND
                )
            hi, lo = _planes(x, y, OPERAND)
            values = ring[4].index(before).permute((1, 0)).slice(N // 2, N // 2)
            highs = warpgroup_mma(hi, values, high, is_async=True)
            lows = warpgroup_mma(lo, values, low, is_async=True)
            high, low = warpgroup_mma_wait(0, [highs, lows])
            _release(ring, first + pairs - 1)
            first += pairs

            gl.static_assert(total.dtype.is_int())
            total = _as(gl.sum(total, 1), OUT)
            divisor = total.to(gl.float32) * _as(g, OUT)
            inverse = gl.div_rn(gl.full_like(divisor, 1.0), divisor)
            number = (high.to(gl.int64) * 256 + low.to(gl.int64)).to(gl.float32) * 4194304.0
            o = _quotient(number, divisor[:, None], inverse[:, None])
            r = PART * M + gl.arange(0, M, layout=OUT)
            line = (gl.load(tile, volatile=True) + r // GROUP).to(gl.int64) * HEADS + head * GROUP + r % GROUP
            present = r // GROUP < gl.load(tile + 1, volatile=True)
            x = gl.arange(0, D, layout=gl.SliceLayout(0, VALUE))
            gl.store(out_ptr + line[:, None] * D + x[None, :], o, mask=present[:, None])


@gluon.jit(do_not_specialize=["items"])
def prefill(
    q_ptr, s_q_ptr, k, s_k, v, s_v, tables, tiles, out_ptr, flag, c, items,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    LINE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    arrived = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ks = gl.allocate_shared_memory(gl.int8, [2 * SLOTS, N, D], k.layout)
    vs = gl.allocate_shared_memory(gl.int8, [2 * SLOTS, D, N], v.layout)
    sks = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, 1, N], s_k.layout)
    svs = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, 1, N], s_v.layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ring = (arrived, empty, ks, sks, vs, svs)
    for i in gl.static_range(SLOTS):
        mbarrier.init(arrived.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
        mbarrier.init(ready.index(i), count=1)
    queries = gl.allocate_shared_memory(gl.int8, [2, 64, D], LINE)
    powers = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, N], FLAT)
    fence_async_shared()
    gl.thread_barrier()
    job = (queries, (powers, ready), ring, q_ptr, s_q_ptr, out_ptr, flag, c, tiles, items)
    gl.warp_specialize(
        [
            (_consume, (job, 0, HEADS, KV_HEADS, D, N)),
            (_consume, (job, 1, HEADS, KV_HEADS, D, N)),
            (_produce, ((k, s_k, v, s_v), ring, tables, tiles, items, KV_HEADS)),
            (_annotate, (ring, powers, ready, tiles, items, KV_HEADS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def attend(
    q: Tensor, s_q: Tensor, pool: Pool, layer: int, tables: Tensor, tiles: Tensor, out: Tensor, flag: Tensor, c: float
) -> None:
    """Launch `prefill` over `tiles` of at most batch.HOPPER_ROWS rows, the longest first."""
    items = tiles.shape[0] * pool.kv_heads
    sizes = {"HEADS": q.shape[1], "KV_HEADS": pool.kv_heads, "D": pool.head_dim, "N": BLOCK, "SLOTS": SLOTS}
    launch = prepared(prefill, **sizes, num_warps=4)
    grid = (min(multiprocessors(q.device), items),)
    launch(grid, q, s_q, *_lines(pool, layer), tables, tiles, out, flag, c, items)


@cache
def _blocks(d: int) -> tuple[Block, Block, Block]:
    """Of keys, of values, and of the scales of either."""
    return (
        Block(BLOCK, d, gl.NVMMASharedLayout(swizzle_byte_width=d, element_bitwidth=8, rank=2)),
        Block(d, BLOCK, gl.NVMMASharedLayout(swizzle_byte_width=BLOCK, element_bitwidth=8, rank=2)),
        Block(1, BLOCK, gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)),
    )


def _lines(pool: Pool, layer: int) -> tuple[Matrix, ...]:
    """k, s_k, v, s_v of a layer as matrices of lines."""
    k, s_k, v, s_v = pool.layer(layer)
    keys, values, scales = _blocks(pool.head_dim)
    return (
        Matrix(k.view(-1, pool.head_dim), keys),
        Matrix(s_k.view(-1, BLOCK), scales),
        Matrix(v.view(-1, BLOCK), values),
        Matrix(s_v.view(-1, BLOCK), scales),
    )
