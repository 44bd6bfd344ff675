"""Keys and values: one pool of blocks of BLOCK tokens, from which each sequence holds a table of block numbers.

A `Pool` is memory only; who holds which block is its owner's business. A `KvCache` is a table: token t of its sequence
lies in block `blocks[t // BLOCK]`, place t % BLOCK. Tables may share blocks, and no bit of a result depends on which
blocks a sequence has: attention's sums over tokens are of integers, so their order is free.

Layouts, int8 and binary32, all zero at first. On a CPU, where one head's blocks follow each other, so that a table of
consecutive numbers is read as one stream:

    k [layers, kv_heads, blocks, BLOCK/16, d/4, 16, 4]   16 tokens by 4 channels: an int8 dot product's operand
    v [layers, kv_heads, blocks, BLOCK/2, d, 2]          token pairs
    s_k, s_v [layers, kv_heads, blocks, BLOCK]

Memory is taken when a page is first written, so a large pool costs nothing before. For the Triton kernels:

    k [layers, blocks, kv_heads, BLOCK, d]
    v [layers, blocks, kv_heads, d, BLOCK]               token last, each sixteen in the order gpu.cache.value_slot
    s_k, s_v [layers, blocks, kv_heads, BLOCK]

A block keeps what its last sequence left. The CPU path never reads past the last token into a result; the Triton
kernels multiply what is there by zero, so scales are finite always: rope.py writes no other, not even where it reports
an error. Not checked here: that a block which two sequences share is not written by one of them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from countermark_kernels.binding import CPU, CSpan, check, gpu, native
from countermark_kernels.rope import HEAD_SIZES, Heads

BLOCK = 64
_PANEL = 16


class Pool:
    """The memory of `blocks` blocks on `device`. Raises MemoryError where there is not so much."""

    __slots__ = ("_views", "blocks", "head_dim", "k", "kv_heads", "layers", "s_k", "s_v", "triton", "v")

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        device: torch.device = CPU,
        triton: bool | None = None,
    ) -> None:
        """`triton`: which layout; by default that of the device. Triton's interpreter runs on a CPU."""
        if head_dim not in HEAD_SIZES:
            raise ValueError(f"head_dim: expected 64 or 128, got {head_dim}")
        if min(layers, kv_heads, blocks) < 1:
            raise ValueError(f"pool: expected layers, heads and blocks, got {layers}, {kv_heads}, {blocks}")
        self.layers, self.kv_heads, self.head_dim, self.blocks = layers, kv_heads, head_dim, blocks
        self.triton = device.type != "cpu" if triton is None else triton
        if self.triton:
            outer = (layers, blocks, kv_heads)
            k, v = (BLOCK, head_dim), (head_dim, BLOCK)
            self.k, self.v = (torch.zeros(*outer, *x, dtype=torch.int8, device=device) for x in (k, v))
            self.s_k, self.s_v = (torch.zeros(*outer, BLOCK, device=device) for _ in range(2))
        else:
            outer = (layers, kv_heads, blocks)
            self.k = _zeros(*outer, BLOCK // _PANEL, head_dim // 4, _PANEL, 4, dtype=torch.int8)
            self.v = _zeros(*outer, BLOCK // 2, head_dim, 2, dtype=torch.int8)
            self.s_k, self.s_v = (_zeros(*outer, BLOCK, dtype=torch.float32) for _ in range(2))
        self._views = [self._view(index) for index in range(layers)]

    @staticmethod
    def block_bytes(*, layers: int, kv_heads: int, head_dim: int) -> int:
        """Memory of one block."""
        return layers * kv_heads * BLOCK * (2 * head_dim + 8)

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self.k.device

    @property
    def size_bytes(self) -> int:
        """Memory of all blocks."""
        return self.blocks * self.block_bytes(layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim)

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, s_k, v, s_v of one layer, [blocks, kv_heads, ...]."""
        if not 0 <= index < self.layers:
            raise ValueError(f"layer: expected 0..{self.layers - 1}, got {index}")
        return self._views[index]

    def _view(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, s_k, v, s_v = (x[index] for x in (self.k, self.s_k, self.v, self.s_v))
        if self.triton:
            return k, s_k, v, s_v
        return k.transpose(0, 1), s_k.transpose(0, 1), v.transpose(0, 1), s_v.transpose(0, 1)


class KvCache:
    """Keys and values of one sequence, every layer. `blocks`: its table, to which its owner appends block numbers."""

    __slots__ = ("blocks", "pool")

    def __init__(self, pool: Pool, blocks: Sequence[int] = ()) -> None:
        self.pool = pool
        self.blocks = list(blocks)

    @property
    def capacity(self) -> int:
        """Tokens the table has room for."""
        return len(self.blocks) * BLOCK

    def table(self, tokens: int) -> list[int]:
        """The blocks of the first `tokens` tokens. Raises ValueError where the table or the pool has not so many."""
        if not 0 <= tokens <= self.capacity:
            raise ValueError(f"tokens: expected 0..{self.capacity}, which the table has room for, got {tokens}")
        table = self.blocks[: (tokens + BLOCK - 1) // BLOCK]
        if table and not 0 <= min(table) <= max(table) < self.pool.blocks:
            raise ValueError(f"blocks: expected numbers in 0..{self.pool.blocks - 1}, got {min(table)}..{max(table)}")
        return table

    def append(self, layer: int, heads: Heads, start: int, end: int, position: int) -> None:
        """Write rows start..end of `heads` as the tokens position, position + 1, ... of `layer`."""
        pool, device = self.pool, self.pool.device
        count = heads.k.shape[0]
        check("k", heads.k, torch.int8, (None, pool.kv_heads, pool.head_dim), device)
        check("v", heads.v, torch.int8, (count, pool.kv_heads, pool.head_dim), device)
        check("s_k", heads.s_k, torch.float32, (count, pool.kv_heads), device)
        check("s_v", heads.s_v, torch.float32, (count, pool.kv_heads), device)
        if not (0 <= start <= end <= count and position >= 0):
            raise ValueError(f"rows: expected to lie within 0..{count} and a position, got {start}..{end}, {position}")
        stop = position + end - start
        table = self.table(stop)
        library = native()
        if library is not None and not pool.triton:
            spans, _held = native_spans([(self, start, end, position)], layer)
            rows = (heads.k, heads.s_k, heads.v, heads.s_v)
            library.call("cm_append", spans, pool.kv_heads, pool.head_dim, *(x.data_ptr() for x in rows))
            return
        tokens = torch.arange(position, stop)
        blocks, place = torch.tensor(table, dtype=torch.int64)[tokens // BLOCK], tokens % BLOCK
        k, s_k, v, s_v = pool.layer(layer)
        if pool.triton:
            rows = (heads.k[start:end], heads.s_k[start:end], heads.v[start:end], heads.s_v[start:end])
            gpu("cache").append(rows, (blocks * BLOCK + place).to(device), (k, s_k, v, s_v))
            return
        groups = heads.k[start:end].reshape(end - start, pool.kv_heads, pool.head_dim // 4, 4)
        k[blocks, :, place // _PANEL, :, place % _PANEL] = groups
        v[blocks, :, place // 2, :, place % 2] = heads.v[start:end]
        s_k[blocks, :, place] = heads.s_k[start:end]
        s_v[blocks, :, place] = heads.s_v[start:end]

    def keys(self, layer: int, head: int, tokens: int) -> Tensor:
        """The first `tokens` keys of a head as [tokens, d] int8."""
        blocks = self.pool.layer(layer)[0][self.table(tokens), head]
        if not self.pool.triton:
            blocks = blocks.transpose(2, 3)
        return blocks.reshape(-1, self.pool.head_dim)[:tokens]

    def values(self, layer: int, head: int, tokens: int) -> Tensor:
        """The first `tokens` values of a head as [tokens, d] int8."""
        blocks = self.pool.layer(layer)[2][self.table(tokens), head]
        if self.pool.triton:
            blocks = blocks[..., gpu("cache").value_order()]
        return blocks.transpose(-1, -2).reshape(-1, self.pool.head_dim)[:tokens]

    def scales(self, layer: int, head: int, tokens: int) -> tuple[Tensor, Tensor]:
        """s_k and s_v of a head's first `tokens` tokens, [tokens] f32 each."""
        _, s_k, _, s_v = self.pool.layer(layer)
        table = self.table(tokens)
        return s_k[table, head].reshape(-1)[:tokens], s_v[table, head].reshape(-1)[:tokens]


def alone(
    *, layers: int, kv_heads: int, head_dim: int, capacity: int, device: torch.device = CPU, triton: bool | None = None
) -> KvCache:
    """A cache for `capacity` tokens in a pool of its own."""
    count = (capacity + BLOCK - 1) // BLOCK
    shape = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    return KvCache(Pool(**shape, blocks=1 + count, device=device, triton=triton), range(1, 1 + count))


def native_spans(
    rows: Sequence[tuple[KvCache, int, int, int]], layer: int = 0
) -> tuple[ctypes.Array[CSpan], array[int]]:
    """struct cm_span for each (cache, start, end, position), and the tables they point into: to hold over the call."""
    tables = [cache.table(position + end - start) for cache, start, end, position in rows]
    held = array("i", [number for table in tables for number in table])
    address, size = held.buffer_info()[0], held.itemsize
    spans = (CSpan * len(rows))()
    for span, table, (cache, start, end, position) in zip(spans, tables, rows, strict=True):
        pool = cache.pool
        if pool.triton:
            raise ValueError("spans: expected caches in the CPU's layout, got Triton's")
        if not 0 <= layer < pool.layers:
            raise ValueError(f"layer: expected 0..{pool.layers - 1}, got {layer}")
        stride = pool.blocks * BLOCK
        before = layer * pool.kv_heads * stride  # tokens of the layers before
        span.start, span.end, span.position, span.stride, span.table = start, end, position, stride, address
        span.k, span.v = (x.data_ptr() + before * pool.head_dim for x in (pool.k, pool.v))
        span.s_k, span.s_v = (x.data_ptr() + before * x.itemsize for x in (pool.s_k, pool.s_v))
        address += len(table) * size
    return spans, held


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written; torch.zeros writes them."""
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as err:
        raise MemoryError(f"pool: no memory for {math.prod(shape) * dtype.itemsize} bytes") from err
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)
