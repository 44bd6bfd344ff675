"""The linear layer on Hopper's asynchronous matrix unit (compute capability 9.0): gpu/linear.py's formulas again.

Triton waits for each int8 product before it starts the next; here one is always under way. A program walks over whole
tiles, as many apart as there are programs. Bulk tensor copies bring q and w of the next STAGES steps (BK inputs of a
tile) into a ring of slots; a slot is filled again once its product is done, across the end of a tile, so that the
copies of the next one overlap the epilogue. K is not split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from countermark_kernels.gpu import linear_wide
from countermark_kernels.gpu.launching import Block, Matrix, prepared
from countermark_kernels.gpu.linear_wide import place
from countermark_kernels.gpu.sizes import cdiv

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def _next(tile, k, m, n, count, outputs, inputs, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr):
    """The step after k of `tile`, whose first row and column are m and n."""
    k += BK
    if k >= inputs:
        k = 0
        tile += gl.num_programs(0)
        m, n = place(tile, count, outputs, BM, BN)
    return tile, k, m, n


@gluon.jit
def _finish(total, m, n, s, ws, bias, residual, y, count, outputs):
    """Epilogue of a block of sums whose first row and column are m and n."""
    layout: gl.constexpr = total.type.layout
    row = gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout))
    row_inside = row < count - m
    column_inside = column < outputs - n
    value = total.to(gl.float32) * gl.expand_dims(gl.load(s + m + row, mask=row_inside, other=0.0), 1)
    value = value * gl.expand_dims(gl.load(ws + n + column, mask=column_inside, other=0.0), 0)
    if bias is not None:
        value = value + gl.expand_dims(gl.load(bias + n + column, mask=column_inside, other=0.0), 0)
    corner = m.to(gl.int64) * outputs + n
    at = gl.expand_dims(row * outputs, 1) + gl.expand_dims(column, 0)
    inside = gl.expand_dims(row_inside, 1) & gl.expand_dims(column_inside, 0)
    if residual is not None:
        value = gl.load(residual + corner + at, mask=inside, other=0.0) + value
    gl.store(y + corner + at, value, mask=inside)


@gluon.jit(do_not_specialize=["count"])
def _tiles(
    q, s, w, ws, bias, residual, y, count, outputs, inputs,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (BM + BN) * BK
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BN if BN < 128 else 128, 32]
    )
    q_slots = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], q.layout)
    w_slots = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)

    first = gl.program_id(0)
    steps = gl.cdiv(inputs, BK)
    tiles = gl.cdiv(count, BM) * gl.cdiv(outputs, BN)
    mine = gl.cdiv(tiles - first, gl.num_programs(0)) * steps
    first_m, first_n = place(first, count, outputs, BM, BN)

    # The ring is filled before the kernel before is done, but for q, which it may have made.
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)
    tile, k, m, n = first, first * 0, first_m, first_n
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES, pred=i < mine)
        tma.async_copy_global_to_shared(w, [n, k], full.index(i), w_slots.index(i), pred=i < mine)
        tile, k, m, n = _next(tile, k, m, n, count, outputs, inputs, BM, BN, BK)
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)
    tile, k, m, n = first, first * 0, first_m, first_n
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(q, [m, k], full.index(i), q_slots.index(i), pred=i < mine)
        tile, k, m, n = _next(tile, k, m, n, count, outputs, inputs, BM, BN, BK)

    done = first * 0
    for at in range(first, tiles, gl.num_programs(0)):
        total = gl.zeros((BM, BN), gl.int32, layout)
        for step in range(steps):
            slot = done % STAGES
            mbarrier.wait(full.index(slot), done // STAGES & 1)
            right = w_slots.index(slot).permute((1, 0))
            total = warpgroup_mma(q_slots.index(slot), right, total, use_acc=step > 0, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            if (done > 0) & (done + STAGES <= mine):
                free = (done - 1) % STAGES
                gl.thread_barrier()
                mbarrier.expect(full.index(free), BYTES)
                tma.async_copy_global_to_shared(w, [n, k], full.index(free), w_slots.index(free))
                tma.async_copy_global_to_shared(q, [m, k], full.index(free), q_slots.index(free))
                tile, k, m, n = _next(tile, k, m, n, count, outputs, inputs, BM, BN, BK)
            done += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        to_m, to_n = place(at, count, outputs, BM, BN)
        _finish(total, to_m, to_n, s, ws, bias, residual, y, count, outputs)


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of y, inputs a step, steps in the ring, programs a multiprocessor, cost of a round of tiles."""

    m: int
    n: int
    k: int
    stages: int
    programs: int = 1
    cost: int = 0


FEW = Tile(64, 64, 256, 6)
FEW_TWICE = Tile(64, 32, 256, 4, programs=2)
UP_TO_128 = (Tile(64, 64, 256, 6, cost=21), Tile(64, 128, 128, 8, cost=23))
WIDE = Tile(linear_wide.M, linear_wide.N, linear_wide.K, linear_wide.STAGES.value, cost=76)
BEYOND = (Tile(128, 64, 128, 8, cost=31), Tile(128, 128, 128, 6, cost=45))
"""Costs: measured microseconds on an H100 for 100 steps of 128 inputs, all multiprocessors busy."""


@cache
def multiprocessors(device: torch.device) -> int:
    """How many `device` has."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def block(rows: int, columns: int) -> Block:
    """A block of q or w."""
    return Block(rows, columns, LAYOUT)


@lru_cache(maxsize=4096)
def choose(count: int, outputs: int, multiprocessors: int) -> Tile:
    """The tile for this shape: by rounds of tiles, where the matrix unit or the L2 cache is what limits."""
    if count <= 64:
        return FEW_TWICE if count > 32 and outputs > 32 * multiprocessors else FEW
    tiles = UP_TO_128 if count <= 128 else (*BEYOND, WIDE) if outputs % 4 == 0 else BEYOND

    def cost(tile: Tile) -> int:
        number = cdiv(count, tile.m) * cdiv(outputs, tile.n)
        rounds: int = cdiv(number, multiprocessors)
        return rounds * tile.cost

    return min(tiles, key=cost)


def tiles(q: Tensor, s: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """y for a K that is a multiple of 16."""
    count, inputs = q.shape
    outputs = w.shape[0]
    tile = choose(count, outputs, multiprocessors(q.device))
    if tile is WIDE:
        linear_wide.tiles(q, s, w, ws, bias, residual, y, multiprocessors(q.device))
        return
    grid = min(multiprocessors(q.device) * tile.programs, cdiv(count, tile.m) * cdiv(outputs, tile.n))
    product = prepared(
        _tiles, BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.m // 16, launch_pdl=True
    )
    product(
        (grid,), Matrix(q, block(tile.m, tile.k)), s, Matrix(w, block(tile.n, tile.k)), ws,
        bias, residual, y, count, outputs, inputs,
    )  # fmt: skip
