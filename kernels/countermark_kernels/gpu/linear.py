"""The linear layer on a GPU, linear.py: int8 products summed in int32, the scales in the epilogue.

    S = q . w            int32, any order
    y = (float(S) * s_x) * s_w;   y = y + bias;   y = residual + y

Integer: products and sums, so tiles, split K and the order in which programs arrive are free. Binary32, one rounding
each: the rest. An element of y depends on its row of q and its row of w alone.

Three kernels, chosen by shape from times measured on an H100 (bench/gpu_linear.py). Up to 2 rows `_rows`: a program
holds whole rows of w in registers, no matrix unit. Else, on compute capability 9.0, linear_hopper.py, but for so few
rows that reading w is all that counts: there, and on any other GPU, `_tiles`, which may split K over programs.

Every kernel lets the next one start early (overlap.py), and most fetch weights before they wait for the one before.
Hence two rules: weights and their scales are complete before the first launch that uses them (`prepare`
waits), and one stream at a time uses a device, because split tiles share a workspace.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import ieee, linear_hopper, overlap
from countermark_kernels.gpu.batch import hopper
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import cdiv, next_power_of_2

ROWS_MAX = 2
PROGRAM_BYTES = 1 << 15  # weights in the registers of one program of `_rows`
N, K, STAGES = 64, 256, 4  # of `_tiles`
PROGRAMS = 132  # split tiles up to this many programs
WORKSPACE = PROGRAMS * 64 * N


@triton.jit
def _dot4(a, b, GPU: tl.constexpr):
    """The sum of the four products of the signed bytes of a and b."""
    if GPU:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:  # noqa: RET505 - a compile-time choice
        total = (a >> 24) * (b >> 24)
        for byte in tl.static_range(3):
            total += (a << (24 - 8 * byte) >> 24) * (b << (24 - 8 * byte) >> 24)
        return total


@triton.jit(do_not_specialize=["count"])
def _rows(
    q, s, w, ws, bias, residual, then, y, count, outputs, words,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BYTES: tl.constexpr, GPU: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of up to ROWS rows. q and w are read as words of four bytes, `words` a row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    n_inside = n < outputs
    at = n.to(tl.int64)[:, None] * words + k[None, :]
    weights = tl.load(w + at, mask=n_inside[:, None] & (k < words)[None, :], other=0, eviction_policy="evict_first")
    ws_n = tl.load(ws + n, mask=n_inside, other=0.0)
    if EARLY:
        if then is not None:
            overlap.prefetch(then + tl.program_id(0) * BYTES + tl.arange(0, BYTES // 128) * 128)
        tl.extra.cuda.gdc_wait()
    for m in tl.static_range(ROWS):
        inside = n_inside & (m < count)
        row = tl.load(q + m * words + k, mask=(k < words) & (m < count), other=0)
        s_m = tl.load(s + m, mask=m < count, other=0.0)
        if residual is not None:
            residual_n = tl.load(residual + m * outputs + n, mask=inside, other=0.0)
        value = ieee.to_f32(ieee.total(_dot4(weights, row[None, :], GPU), 1)) * s_m
        value = value * ws_n
        if bias is not None:
            value = value + tl.load(bias + n, mask=n_inside, other=0.0)
        if residual is not None:
            value = residual_n + value
        tl.store(y + m * outputs + n, value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _tiles(
    q, s, w, ws, bias, residual, y, partial, arrivals, count, outputs, inputs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of y, or one of SPLIT ranges of K of it; the last program of a tile to arrive adds up the ranges.

    The product is taken as w . q^T: the matrix unit wants 64 rows of its left operand, and there may be few of q.
    """
    overlap.begin(EARLY)
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    tiles_m = tl.cdiv(count, BM)
    row = (tile % tiles_m).to(tl.int64) * BM + tl.arange(0, BM)
    column = (tile // tiles_m).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_inside = row < count
    column_inside = column < outputs
    q_at = q + row[:, None] * inputs + k[None, :]
    w_at = w + column[:, None] * inputs + k[None, :]
    steps = tl.cdiv(inputs, BK)
    total = tl.zeros((BN, BM), dtype=tl.int32)
    for step in range(steps * part // SPLIT, steps * (part + 1) // SPLIT):
        q_inside = row_inside[:, None]
        w_inside = column_inside[:, None]
        if not EVEN:
            q_inside = q_inside & (k[None, :] < inputs - step * BK)
            w_inside = w_inside & (k[None, :] < inputs - step * BK)
        a = tl.load(q_at + step * BK, mask=q_inside, other=0)
        b = tl.load(w_at + step * BK, mask=w_inside, other=0, eviction_policy="evict_first")
        total = tl.dot(b, tl.trans(a), total, out_dtype=tl.int32)
    mine = True
    if SPLIT > 1:
        cell = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        sums = partial + tile * (SPLIT * BM * BN) + cell
        tl.store(sums + part * (BM * BN), total, cache_modifier=".cg")
        tl.debug_barrier()
        mine = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1
        tl.debug_barrier()
        if mine:
            total = tl.load(sums, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(sums + other * (BM * BN), cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    if mine:
        value = ieee.to_f32(total) * tl.load(s + row, mask=row_inside, other=0.0)[None, :]
        value = value * tl.load(ws + column, mask=column_inside, other=0.0)[:, None]
        if bias is not None:
            value = value + tl.load(bias + column, mask=column_inside, other=0.0)[:, None]
        at = row[None, :] * outputs + column[:, None]
        inside = row_inside[None, :] & column_inside[:, None]
        if residual is not None:
            value = tl.load(residual + at, mask=inside, other=0.0) + value
        tl.store(y + at, value, mask=inside)


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of split tiles, and how many programs of each have arrived: zero before and after every launch."""
    return (
        torch.empty(WORKSPACE, dtype=torch.int32, device=device),
        torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
    )


def rows(
    q: Tensor, s: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    then: Tensor | None = None,
) -> None:  # fmt: skip
    """y for at most ROWS_MAX rows and a K that is a multiple of 4. `then`: see `product`."""
    count, inputs = q.shape
    outputs = w.shape[0]
    block = next_power_of_2(inputs // 4)
    n = max(1, PROGRAM_BYTES // (4 * block))
    grid = cdiv(outputs, n)
    if then is not None and then.numel() < grid * PROGRAM_BYTES:
        then = None
    prepared(
        _rows, ROWS=next_power_of_2(count), BN=n, BK=block, BYTES=PROGRAM_BYTES, GPU=q.is_cuda, num_warps=4,
        **overlap.launch(q.device),
    )(
        (grid,), q.view(torch.int32), s, w.view(torch.int32), ws, bias, residual, then, y, count, outputs, inputs // 4
    )  # fmt: skip


def tiles(
    q: Tensor, s: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    split: int | None = None,
) -> None:  # fmt: skip
    """y for any shape, in `split` ranges of K (a power of two; None: enough to fill the GPU)."""
    count, inputs = q.shape
    outputs = w.shape[0]
    m = min(64, max(16, next_power_of_2(count)))
    grid = cdiv(count, m) * cdiv(outputs, N)
    if split is None:
        split = 1
        while grid * split * 2 <= PROGRAMS and split * 8 * K <= inputs:
            split *= 2
    if split > 1 and grid * split > PROGRAMS:
        raise ValueError(f"split: expected at most {PROGRAMS} programs, got {grid * split}")
    prepared(
        _tiles, BM=m, BN=N, BK=K, SPLIT=split, EVEN=inputs % K == 0, num_warps=4, num_stages=STAGES,
        **overlap.launch(q.device),
    )((grid * split,), q, s, w, ws, bias, residual, y, *workspace(q.device), count, outputs, inputs)  # fmt: skip


def few(count: int, outputs: int) -> bool:
    """Whether reading w takes so much longer than multiplying that `tiles` is the faster on Hopper too."""
    return count <= 16 or (count <= 32 and outputs >= 1 << 14)


def product(
    q: Tensor,
    s: Tensor,
    w: Tensor,
    ws: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    then: Tensor | None = None,
) -> Tensor:
    """q: [T, K] int8, s: [T] f32, w: [N, K] int8, ws: [N] f32, bias: [N], residual: [T, N] f32 -> [T, N] f32.

    The result is written to `out` where it is given. `then`: weights wanted soon, asked for where memory has nothing
    else to do.
    """
    count, inputs = q.shape
    outputs = w.shape[0]
    y = torch.empty(count, outputs, device=q.device) if out is None else out
    if not count:
        return y
    if count <= ROWS_MAX and inputs % 4 == 0:
        rows(q, s, w, ws, bias, residual, y, then)
    elif hopper(q.device) and inputs % 16 == 0 and not few(count, outputs):
        linear_hopper.tiles(q, s, w, ws, bias, residual, y)
    else:
        tiles(q, s, w, ws, bias, residual, y)
    return y
