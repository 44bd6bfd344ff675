"""A ragged batch on a GPU: where its rows lie, and attention cut into tiles; on the host, once for all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK, KvCache, Pool
from countermark_kernels.gpu.sizes import cdiv

ROWS = 64  # of a tile
HOPPER_ROWS = 128
CHUNK_MAX = 512  # tokens of a split: 32639 * 127 * 512 < 2^31, so its sums fit int32
CHUNK_MIN = 128
TARGET = 256  # programs wanted of a split kernel: about two a multiprocessor
NO_SPLIT = 1 << 20  # a split past the end of every tile
ALIGNED = 16  # words: every array of a transfer begins at a multiple of 64 bytes, so that kernels are compiled once

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """A batch cut into tiles, on the host. All arrays are int32.

    positions, slots: [T], where each row is in its sequence and in the pool (block * BLOCK + place); tables: the blocks
    of all sequences. long: [n, 4], the tiles of many rows: first row, rows of one head, first position, start of the
    table; the longest first. short: [m, 5], tiles of few rows whose tokens are split: the same, and the splits of the
    tiles before. items: [k, 2], the splits: tile, and number in the tile. chunk: tokens of a split at most; rows: of a
    short tile at most, all query heads of a kv head counted.
    """

    positions: Words
    slots: Words
    tables: Words
    long: Words
    short: Words
    items: Words
    chunk: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Short:
    """`Cut.short` and `Cut.items` on the device. arrivals: a zero for every tile and kv head, zero again after use."""

    tiles: Tensor
    items: Tensor
    rows: int
    chunk: int
    arrivals: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A `Cut` on the device of `pool`. tiles: `Cut.long`, None where there are none."""

    pool: Pool
    heads: int
    positions: Tensor
    slots: Tensor
    tables: Tensor
    tiles: Tensor | None
    short: Short | None


def cut(runs: Iterable[tuple[KvCache, int, int]], heads: int, pool: Pool) -> Cut:
    """Rows in runs of (cache, position, count): `count` successive tokens of one sequence from `position` on.

    Raises ValueError where a cache is of another pool, or its table too short or beyond the pool.
    """
    if not pool.triton:
        raise ValueError("pool: expected one in Triton's layout, got the CPU's")
    group = heads // pool.kv_heads
    few = max(1, 16 // group)
    most = HOPPER_ROWS if hopper(pool.device) else ROWS
    if group > most:
        raise ValueError(f"heads: expected at most {most} query heads a kv head, got {group}")
    blocks: list[int] = []
    found: list[tuple[int, int, int, int]] = []
    row = 0
    for cache_, position, count in runs:
        if cache_.pool is not pool:
            raise ValueError("spans: expected caches in one pool, got others")
        first = len(blocks)
        found.append((row, count, position, first))
        blocks += cache_.blocks[: (position + count + BLOCK - 1) // BLOCK]
        if (len(blocks) - first) * BLOCK < position + count:
            raise ValueError(f"blocks: expected room for {position + count} tokens, got less")
        row += count
    spans = np.array(found, dtype=np.int32).reshape(-1, 4)
    tables = np.array(blocks, dtype=np.int32)
    if blocks and not 0 <= int(tables.min()) <= int(tables.max()) < pool.blocks:
        raise ValueError(f"blocks: expected numbers in 0..{pool.blocks - 1}, got others")
    counts = spans[:, 1]
    positions = np.arange(row, dtype=np.int32) + np.repeat(spans[:, 2] - spans[:, 0], counts)
    slots = tables[np.repeat(spans[:, 3], counts) + positions // BLOCK] * BLOCK + positions % BLOCK
    is_short = counts <= few
    short = spans[is_short]
    chunk, items, before = split(short[:, 1] + short[:, 2], pool.kv_heads)
    step = most // group
    long = [
        (start + i, min(step, count - i), position + i, table)
        for start, count, position, table in spans[~is_short].tolist()
        for i in range(0, count, step)
    ]
    long.sort(key=lambda tile: -tile[2])
    return Cut(
        positions=positions,
        slots=slots,
        tables=tables,
        long=np.array(long, dtype=np.int32).reshape(-1, 4),
        short=np.concatenate((short, before[:, None]), axis=1),
        items=items,
        chunk=chunk,
        rows=group * int(short[:, 1].max(initial=0)),
    )


def split(ends: Words, kv_heads: int) -> tuple[int, Words, Words]:
    """The tokens of a split, the splits of tiles of `ends` tokens, and how many splits precede each tile."""
    if not len(ends):
        return CHUNK_MIN, np.empty((0, 2), dtype=np.int32), ends
    chunk = CHUNK_MAX
    while True:
        counts = (ends + chunk - 1) // chunk
        after = list(accumulate(counts.tolist(), initial=0))
        if chunk == CHUNK_MIN or after[-1] * kv_heads >= TARGET:
            break
        chunk //= 2
    before = np.array(after[:-1], dtype=np.int32)
    tile = np.repeat(np.arange(len(ends), dtype=np.int32), counts)
    number = np.arange(len(tile), dtype=np.int32) - np.repeat(before, counts)
    return chunk, np.stack((tile, number), axis=1), before


def plan(spans: Sequence[Span], heads: int) -> Plan:
    """`spans`, whose caches share one pool, cut and on the pool's device. Does not wait for it."""
    pool = spans[0].cache.pool
    made = cut([(span.cache, span.position, span.end - span.start) for span in spans], heads, pool)
    names = ("positions", "slots", "tables", "long", "short", "items")
    there = dict(zip(names, send([getattr(made, name) for name in names], pool.device), strict=True))
    return planned(made, heads, pool, there)


def planned(made: Cut, heads: int, pool: Pool, there: dict[str, Tensor]) -> Plan:
    """The plan of a cut whose arrays lie on the device by their names in `there`."""
    short = None
    if len(made.short):
        short = Short(
            tiles=there["short"],
            items=there["items"],
            rows=made.rows,
            chunk=made.chunk,
            arrivals=_zeros(pool.device, len(made.short) * pool.kv_heads),
        )
    return Plan(
        pool=pool,
        heads=heads,
        positions=there["positions"],
        slots=there["slots"],
        tables=there["tables"],
        tiles=there["long"] if len(made.long) else None,
        short=short,
    )


def send(arrays: Sequence[Words], device: torch.device) -> list[Tensor]:
    """int32 arrays in one copy that the host does not wait for; the shapes are kept."""
    starts, size = places([array.size for array in arrays])
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    words = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        words[start : start + array.size] = array.reshape(-1)
    there = host.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=True)]


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of so many words begin in one transfer, and its size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += cdiv(size, ALIGNED) * ALIGNED
    return starts, end


@cache
def hopper(device: torch.device) -> bool:
    """Whether `device` has the matrix unit that attention_hopper.py is written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


_arrivals: dict[torch.device, Tensor] = {}


def _zeros(device: torch.device, count: int) -> Tensor:
    """`count` zeros at least, one tensor a device: one stream at a time may count in them."""
    found = _arrivals.get(device)
    if found is None or found.shape[0] < count:
        found = _arrivals[device] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found
