"""The linear layer on Hopper for many rows: gpu/linear.py's formulas over tiles of 128 x 256 outputs.

One warp starts the bulk tensor copies of q and w into a ring of slots; two groups of four warps take 64 rows of a tile
each. A program walks over whole tiles, as many apart as there are programs, and the ring runs on across the end of a
tile: one group's products run while the other writes its results, which leave through shared memory as bulk copies too,
COLUMNS at a time, and the residual of the next pieces is on its way meanwhile. K is not split.

Integer: products and sums. Binary32, one rounding each: the epilogue, element by element. Compute capability 9.0 only.
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

from countermark_kernels.gpu.launching import Block, Matrix, prepared
from countermark_kernels.gpu.sizes import cdiv

GROUPS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a group
STAGES = gl.constexpr(4)
COLUMNS = gl.constexpr(32)  # of a piece of the results
BUFFERS = gl.constexpr(2)  # pieces of a group in shared memory
AHEAD = gl.constexpr(3)  # pieces whose residual is under way
HEIGHT = gl.constexpr(8)  # tiles of rows that share columns of w while they are in the L2 cache
M, N, K = 128, 256, 128
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
OF_Q, OF_W = Block(ROWS.value, K, OPERAND), Block(N, K, OPERAND)
OF_Y = Block(ROWS.value, COLUMNS.value, RESULT)


@gluon.jit
def place(tile, count, outputs, BM: gl.constexpr, BN: gl.constexpr):
    """Tile number -> its first row and column, down HEIGHT tiles of rows before the next column."""
    band = HEIGHT * gl.cdiv(outputs, BN)
    first = tile // band * HEIGHT
    height = gl.minimum(gl.cdiv(count, BM) - first, HEIGHT)
    return (first + tile % band % height) * BM, tile % band // height * BN


@gluon.jit
def _wait_for_kernel_before():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _produce(ring, q, w, count, outputs, inputs):
    """One warp: start the copies of every step. The first of w do not wait for the kernel before, which may make q."""
    full, empty, qs, ws = ring
    BM: gl.constexpr = ROWS * GROUPS
    BN: gl.constexpr = ws.shape[1]
    BK: gl.constexpr = ws.shape[2]
    BYTES: gl.constexpr = (BM + BN) * BK
    first = gl.program_id(0)
    tiles = gl.cdiv(count, BM) * gl.cdiv(outputs, BN)
    steps = gl.cdiv(inputs, BK)
    early = gl.minimum(steps, STAGES)
    m, n = place(first, count, outputs, BM, BN)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        tma.async_copy_global_to_shared(w, [n, i * BK], full.index(i), ws.index(i))
    _wait_for_kernel_before()
    index = first * 0
    for at in range(first, tiles, gl.num_programs(0)):
        m, n = place(at, count, outputs, BM, BN)
        for step in range(steps):
            slot = index % STAGES
            bar = full.index(slot)
            if index >= early:
                mbarrier.wait(empty.index(slot), ((index // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(w, [n, step * BK], bar, ws.index(slot))
            for part in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(q, [m + ROWS * part, step * BK], bar, qs.index(slot * GROUPS + part))
            index += 1


@gluon.jit
def _pieces(x):
    """x in pieces of COLUMNS columns."""
    if x.shape[1] <= COLUMNS:
        return (x,)
    else:  # noqa: RET505 - a compile-time choice
        rows: gl.constexpr = x.shape[0]
        half: gl.constexpr = x.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(x, (rows, 2, half)), (0, 2, 1)))
        return _pieces(left) + _pieces(right)


@gluon.jit
def _columns(values, n, outputs, layout: gl.constexpr):
    """COLUMNS values from n on, as a row."""
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    return gl.expand_dims(gl.load(values + n + column, mask=column < outputs - n, other=0.0), 0)


@gluon.jit
def _residual(residual, m, n, count, outputs, layout: gl.constexpr):
    """The residual of one piece."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    inside = gl.expand_dims(row < count - m, 1) & gl.expand_dims(column < outputs - n, 0)
    at = gl.expand_dims(row * outputs, 1) + gl.expand_dims(column, 0)
    return gl.load(residual + m.to(gl.int64) * outputs + n + at, mask=inside, other=0.0)


@gluon.jit
def _finish(total, m, n, s_m, scales, bias, residual, y, stage, count, outputs, PART: gl.constexpr):
    """Epilogue of a group's sums, whose first row and column are m and n."""
    pieces = _pieces(total)
    COUNT: gl.constexpr = total.shape[1] // COLUMNS
    layout: gl.constexpr = pieces[0].type.layout
    s_rows = gl.expand_dims(gl.convert_layout(s_m, gl.SliceLayout(1, layout)), 1)
    before = ()
    if residual is not None:
        for i in gl.static_range(AHEAD):
            before = before + (_residual(residual, m, n + i * COLUMNS, count, outputs, layout),)  # type: ignore[assignment]  # noqa: RUF005
    scale = _columns(scales, n, outputs, layout)
    for i in gl.static_range(COUNT):
        at = n + i * COLUMNS
        value = pieces[i].to(gl.float32) * s_rows
        value = value * scale
        if i + 1 < COUNT:
            scale = _columns(scales, at + COLUMNS, outputs, layout)
        if bias is not None:
            value = value + _columns(bias, at, outputs, layout)
        if residual is not None:
            value = before[i] + value
            if i + AHEAD < COUNT:
                before = before + (_residual(residual, m, at + AHEAD * COLUMNS, count, outputs, layout),)  # type: ignore[assignment]  # noqa: RUF005
        tma.store_wait(BUFFERS - 1)
        gl.thread_barrier()
        here = stage.index(PART * BUFFERS + i % BUFFERS)
        here.store(value)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y, [m, at], here)


@gluon.jit
def _consume(ring, stage, s, scales, bias, residual, y, count, outputs, inputs, PART: gl.constexpr):
    """Four warps: the products of rows 64 PART.. of every tile, and their epilogue."""
    full, empty, qs, ws = ring
    BM: gl.constexpr = ROWS * GROUPS
    BN: gl.constexpr = ws.shape[1]
    BK: gl.constexpr = ws.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    _wait_for_kernel_before()
    first = gl.program_id(0)
    tiles = gl.cdiv(count, BM) * gl.cdiv(outputs, BN)
    steps = gl.cdiv(inputs, BK)
    index = first * 0
    for at in range(first, tiles, gl.num_programs(0)):
        m, n = place(at, count, outputs, BM, BN)
        m += ROWS * PART
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        s_m = gl.load(s + m + row, mask=row < count - m, other=0.0)
        total = gl.zeros((ROWS, BN), gl.int32, layout)
        for step in range(steps):
            slot = index % STAGES
            mbarrier.wait(full.index(slot), (index // STAGES) & 1)
            right = ws.index(slot).permute((1, 0))
            total = warpgroup_mma(qs.index(slot * GROUPS + PART), right, total, use_acc=step > 0, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            if step > 0:
                gl.thread_barrier()
                mbarrier.arrive(empty.index((index - 1) % STAGES), count=1)
            index += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((index - 1) % STAGES), count=1)
        _finish(total, m, n, s_m, scales, bias, residual, y, stage, count, outputs, PART)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["count"])
def _tiles(q, s, w, scales, bias, residual, y, count, outputs, inputs):
    BN: gl.constexpr = w.block_type.shape[0]
    BK: gl.constexpr = w.block_type.shape[1]
    qs = gl.allocate_shared_memory(gl.int8, [STAGES * GROUPS, ROWS, BK], q.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    stage = gl.allocate_shared_memory(gl.float32, [GROUPS * BUFFERS, ROWS, COLUMNS], y.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    gl.thread_barrier()
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)
    ring = (full, empty, qs, ws)
    gl.warp_specialize(
        [
            (_consume, (ring, stage, s, scales, bias, residual, y, count, outputs, inputs, 0)),
            (_consume, (ring, stage, s, scales, bias, residual, y, count, outputs, inputs, 1)),
            (_produce, (ring, q, w, count, outputs, inputs)),
        ],
        [4, 1],
        [240, 24],
    )


def tiles(
    q: Tensor, s: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, programs: int
) -> None:
    """y, by at most `programs` programs. Inputs a multiple of 16 and outputs of 4, as bulk copies want."""
    count, inputs = q.shape
    outputs = w.shape[0]
    grid = min(programs, cdiv(count, M) * cdiv(outputs, N))
    product = prepared(_tiles, num_warps=4, launch_pdl=True)
    product((grid,), Matrix(q, OF_Q), s, Matrix(w, OF_W), ws, bias, residual, Matrix(y, OF_Y), count, outputs, inputs)
