"""Keys and values on a GPU: one pool of blocks of BLOCK tokens, from which each sequence holds a table of blocks.

A pool is k [layers, blocks, kv_heads, BLOCK, d] and v [layers, blocks, kv_heads, d, BLOCK] int8, s_k and s_v [layers,
blocks, kv_heads, BLOCK] f32, all zero at first. Values lie with the token last, as an 8-bit operand of a matrix
product wants them, and each sixteen tokens of a block in the order `value_slot`: that in which the threads that
compute their weights hold them. Nothing is computed here; sums over tokens are of integers, so their order is free.

A block keeps what its last sequence left, which attention multiplies by zero. Hence scales are finite always: rope.py
writes no other, not even where it reports an error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import ieee as arithmetic
from countermark_kernels.attention import CONTEXT_MAX, KvCache
from countermark_kernels.gpu import ieee
from countermark_kernels.rope import HEAD_SIZES, Heads

BLOCK = 64


@triton.jit
def value_slot(token):
    """Where in its block the value of a token lies: of its last four bits wttb, the order becomes ttwb."""
    return (token & -16) | ((token & 6) << 1) | ((token & 8) >> 2) | (token & 1)


@triton.jit
def _append(k, s_k, v, s_v, slots, to_k, to_s_k, to_v, to_s_v, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    page = (slot // BLOCK) * heads + head
    token = slot % BLOCK
    at = tl.arange(0, D)
    source = row * heads + head
    tl.store(to_k + (page * BLOCK + token) * D + at, tl.load(k + source * D + at))
    tl.store(to_v + (page * D + at) * BLOCK + value_slot(token), tl.load(v + source * D + at))
    tl.store(to_s_k + page * BLOCK + token, tl.load(s_k + source))
    tl.store(to_s_v + page * BLOCK + token, tl.load(s_v + source))


class Pool:
    """The memory of all sequences on `device`."""

    __slots__ = ("free", "head_dim", "k", "kv_heads", "layers", "s_k", "s_v", "v")

    def __init__(self, *, layers: int, kv_heads: int, head_dim: int, blocks: int, device: torch.device) -> None:
        if head_dim not in HEAD_SIZES:
            raise ValueError(f"head_dim: expected 64 or 128, got {head_dim}")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.k = torch.zeros(layers, blocks, kv_heads, BLOCK, head_dim, dtype=torch.int8, device=device)
        self.v = torch.zeros(layers, blocks, kv_heads, head_dim, BLOCK, dtype=torch.int8, device=device)
        self.s_k = torch.zeros(layers, blocks, kv_heads, BLOCK, device=device)
        self.s_v = torch.zeros(layers, blocks, kv_heads, BLOCK, device=device)
        self.free = list(range(blocks - 1, -1, -1))

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self.k.device

    @property
    def size_bytes(self) -> int:
        """Memory of the four tensors."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.s_k, self.s_v))

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, s_k, v, s_v of one layer."""
        return self.k[index], self.s_k[index], self.v[index], self.s_v[index]


class PagedCache(KvCache):
    """Keys and values of one sequence, for up to `capacity` tokens (rounded up to whole blocks), in blocks of `pool`.

    `release` gives the blocks back.
    """

    __slots__ = ("blocks", "pool")

    def __init__(self, pool: Pool, capacity: int) -> None:
        if not 1 <= capacity <= CONTEXT_MAX:
            raise arithmetic.NumericsError(
                f"context: expected 1..{CONTEXT_MAX} tokens, got {capacity}", code="numerics.context"
            )
        count = (capacity + BLOCK - 1) // BLOCK
        if count > len(pool.free):
            raise MemoryError(f"capacity: expected at most {len(pool.free)} blocks free, got {count} to take")
        self.pool = pool
        self.blocks = [pool.free.pop() for _ in range(count)]
        self.layers, self.kv_heads, self.head_dim = pool.layers, pool.kv_heads, pool.head_dim
        self.capacity = count * BLOCK

    @property
    def size_bytes(self) -> int:
        """Memory of the sequence's blocks."""
        return self.pool.size_bytes // self.pool.k.shape[1] * len(self.blocks)

    def slots(self, position: int, count: int) -> list[int]:
        """Where tokens position.. lie in the pool: BLOCK * block + place in the block."""
        return [self.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(position, position + count)]

    def append(self, layer: int, heads: Heads, start: int, end: int, position: int) -> None:
        """Write rows start..end of `heads` as the tokens position, position + 1, ... of `layer`."""
        if not (0 <= start <= end <= heads.k.shape[0] and 0 <= position <= self.capacity - (end - start)):
            raise ValueError(f"rows: expected {start}..{end} to fit a capacity of {self.capacity} at {position}")
        slots = torch.tensor(self.slots(position, end - start), dtype=torch.int64, device=self.pool.device)
        if start < end:
            rows = (x[start:end] for x in (heads.k, heads.s_k, heads.v, heads.s_v))
            pool = self.pool.layer(layer)
            sizes = {"D": self.head_dim, "BLOCK": BLOCK}
            _append[end - start, self.kv_heads](*rows, slots, *pool, self.kv_heads, **sizes, **ieee.EXACT)

    def keys(self, layer: int, head: int, tokens: int) -> Tensor:
        """The first `tokens` keys of a head as [tokens, d] int8."""
        return self.pool.k[layer, self.blocks, head].reshape(-1, self.head_dim)[:tokens]

    def values(self, layer: int, head: int, tokens: int) -> Tensor:
        """The first `tokens` values of a head as [tokens, d] int8."""
        order = [value_slot.fn(token) for token in range(BLOCK)]
        blocks = self.pool.v[layer, self.blocks, head][..., order]
        return blocks.transpose(1, 2).reshape(-1, self.head_dim)[:tokens]

    def copy_prefix(self, source: KvCache, tokens: int) -> None:
        """Take over the first `tokens` tokens of `source`, a cache in the same pool."""
        if not isinstance(source, PagedCache) or source.pool is not self.pool:
            raise ValueError("source: expected a cache in the same pool, got another")
        if not 0 <= tokens <= min(self.capacity, source.capacity):
            raise ValueError(f"tokens: expected 0..{min(self.capacity, source.capacity)}, got {tokens}")
        count = (tokens + BLOCK - 1) // BLOCK
        for x in (self.pool.k, self.pool.v, self.pool.s_k, self.pool.s_v):
            x[:, self.blocks[:count]] = x[:, source.blocks[:count]]

    def release(self) -> None:
        """Give the blocks back to the pool: the cache is empty and holds nothing from then on."""
        self.pool.free.extend(reversed(self.blocks))
        self.blocks, self.capacity = [], 0
