"""A ragged batch of attention cut into tiles, on the host, once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK, Pool

ROWS = 64  # of a tile
HOPPER_ROWS = 128
CHUNK_MAX = 512  # tokens of a split: 32639 * 127 * 512 < 2^31, so its sums fit int32
CHUNK_MIN = 128
TARGET = 256  # programs wanted of a split kernel: about two a multiprocessor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Short:
    """Tiles of at most `rows` rows, in `splits` parts of `chunk` tokens at most. tiles: [n, 5] int32, see `plan`.

    `width`: tokens of all tiles, in whole blocks; `arrivals`: a zero for every tile and kv head, zero again after use.
    """

    tiles: Tensor
    rows: int
    chunk: int
    splits: int
    width: int
    arrivals: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A ragged batch cut into tiles, once for all layers. tables: [blocks] int32; tiles: [n, 4] int32 or None."""

    pool: Pool
    heads: int
    rows: int
    tables: Tensor
    tiles: Tensor | None
    short: Short | None


def plan(spans: Sequence[Span], heads: int) -> Plan:
    """Cut `spans`, whose caches share one pool, into tiles for `heads` query heads.

    A tile is (first row, rows of one head, first position, start of the table); tiles of the split kernels end with the
    tokens, in whole blocks, of the tiles before them. Long tiles come first.
    """
    caches = [span.cache for span in spans]
    pool = caches[0].pool
    if not pool.triton or any(cache.pool is not pool for cache in caches):
        raise ValueError("spans: expected caches in one pool in Triton's layout, got others")
    group = heads // pool.kv_heads
    few = max(1, 16 // group)
    rows = HOPPER_ROWS if hopper(pool.device) else ROWS
    if group > rows:
        raise ValueError(f"heads: expected at most {rows} query heads a kv head, got {group}")
    step = rows // group
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
        while chunk > CHUNK_MIN and sum(triton.cdiv(end, chunk) for end in ends) * pool.kv_heads < TARGET:
            chunk //= 2
        split = Short(
            tiles=_int32(short, pool.device),
            rows=group * max(tile[1] for tile in short),
            chunk=chunk,
            splits=triton.cdiv(max(ends), chunk),
            width=width,
            arrivals=_zeros(pool.device, len(short) * pool.kv_heads),
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
