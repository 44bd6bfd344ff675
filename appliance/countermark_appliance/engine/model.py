"""Llama, Qwen2 and Qwen3 (dense): the forward pass of a ragged batch over one artefact.

A batch is a list of chunks: the next tokens of some sequences, one of them or thousands. Every row of every step is a
function of its own sequence's tokens alone (see `countermark_kernels.decoder`), so the logits of a position do not
depend on how its sequence was cut into chunks nor on who else is in the batch. The residual stays binary32; behind the
last layer only the rows whose logits are wanted go on to the head.

Not checked here: that the artefact's rotations fit the online ones; builder and kernels are tested against each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.weights import Artefact
from countermark_kernels.attention import Span
from countermark_kernels.binding import gpu
from countermark_kernels.cache import BLOCK, KvCache, Pool
from countermark_kernels.decoder import Decoder, Layer
from countermark_kernels.linear import Weight, prepare

BATCH_SEQUENCES, BATCH_CONTEXT = 16, 8192
"""On a CPU the pool has room for one sequence of the whole context, and for 16 of it or of 8,192 tokens."""
POOL_TOKENS = 1 << 20
"""On a GPU the pool holds at most so many tokens, or as many as half of its free memory has room for."""
_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's CPU allocator, and CUDA


class Cache(KvCache):
    """Keys and values of one sequence, in blocks of its own; `close`, or being collected, gives them back."""

    __slots__ = ("_owner",)

    def __init__(self, pool: Pool, owner: Blocks, tokens: int) -> None:
        super().__init__(pool)
        self._owner = owner
        self.blocks = owner.take((tokens + BLOCK - 1) // BLOCK)

    def close(self) -> None:
        """Give the blocks back: the cache holds nothing from then on. Idempotent."""
        numbers, self.blocks = self.blocks, []
        self._owner.give(numbers)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`tokens` of one sequence from position `start` on, all earlier ones being in `cache`.

    `logits`: of how many of its last tokens the logits are wanted.
    """

    cache: KvCache
    start: int
    tokens: Sequence[int]
    logits: int


class Model:
    """The tensors of one artefact, ready to run on `device`, and the pool of its keys and values.

    Not thread-safe: one thread calls `forward`.
    """

    def __init__(self, artefact: Artefact, device: str = "cpu") -> None:
        self._config = artefact.config
        self.device = torch.empty(0, device=device).device  # with its index
        self._pool: tuple[Pool, Blocks] | None = None
        c = self._config

        def tensor(name: str) -> Tensor:
            return artefact.tensor(name).to(self.device)

        def weight(name: str) -> Weight:
            return prepare(tensor(name), tensor(f"{name}.scale"))

        def layer(name: str) -> Layer:
            return Layer(
                qkv=weight(f"{name}.qkv"),
                o=weight(f"{name}.o"),
                gate_up=weight(f"{name}.gate_up"),
                down=weight(f"{name}.down"),
                qkv_bias=tensor(f"{name}.qkv.bias") if c.attention_bias else None,
                o_bias=tensor(f"{name}.o.bias") if c.output_bias else None,
                q_gain=tensor(f"{name}.q_norm") if c.qk_norm else None,
                k_gain=tensor(f"{name}.k_norm") if c.qk_norm else None,
            )

        self.embed = tensor("embed")
        self.decoder = Decoder(
            layers=tuple(layer(f"layers.{i}") for i in range(c.layers)),
            head=weight("head"),
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            eps=c.rms_eps,
            block=c.hadamard_block,
            cos=tensor("rope.cos"),
            sin=tensor("rope.sin"),
        )

    @property
    def context(self) -> int:
        return self._config.context

    @property
    def vocab(self) -> int:
        return self._config.vocab

    @property
    def quantisation(self) -> str:
        """What the linear layers compute with, and what they were made from."""
        return f"w8a8 from {self._config.source.format}"

    @property
    def block_bytes(self) -> int:
        """Memory of one block of the pool."""
        c = self._config
        return Pool.block_bytes(layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim)

    @property
    def pool(self) -> Pool:
        """The keys and values of all sequences; made on first use where `size_pool` was not called before."""
        return self._made()[0]

    @property
    def blocks(self) -> Blocks:
        """Who holds which block of the pool."""
        return self._made()[1]

    def size_pool(self, blocks: int) -> None:
        """Make the pool, of so many blocks, block 0 included. Raises MemoryError, and ValueError the second time."""
        if self._pool is not None:
            raise ValueError("size_pool: expected no pool yet, got a second call")
        c = self._config
        with computing(self.device):
            pool = Pool(layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim, blocks=blocks, device=self.device)
        self._pool = pool, Blocks(blocks)

    def new_cache(self, tokens: int) -> Cache:
        """A cache for `tokens` tokens in blocks of its own. Raises MemoryError where the pool has not so many."""
        return Cache(self.pool, self.blocks, tokens)

    def _made(self) -> tuple[Pool, Blocks]:
        if self._pool is None:
            self.size_pool(self._default_blocks())
        assert self._pool is not None
        return self._pool

    def _default_blocks(self) -> int:
        if self.device.type == "cpu":
            tokens = max(self.context, BATCH_SEQUENCES * min(self.context, BATCH_CONTEXT))
            room = available_bytes() // 4
        else:
            tokens, room = POOL_TOKENS, torch.cuda.mem_get_info(self.device)[0] // 2
        return 1 + max(1, min((tokens + BLOCK - 1) // BLOCK, room // self.block_bytes))

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks; write their keys and values; return the wanted logits [rows, vocab] f32, chunk by chunk.

        Running a chunk again writes the same bits again. Raises `NumericsError` where a value leaves the profile's
        range; which chunk it was in is not known. Raises `MemoryError` where the work does not fit.
        """
        return self.logits(self.hidden(chunks))

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """`forward` up to the head: what `logits` makes the wanted logits of, [rows, hidden] f32.

        On a GPU it is `logits` that raises what went wrong here.
        """
        ids: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        for chunk in chunks:
            start = len(ids)
            ids += chunk.tokens
            spans.append(Span(cache=chunk.cache, start=start, end=len(ids), position=chunk.start))
            rows += range(len(ids) - chunk.logits, len(ids))
        with computing(self.device):
            x = self.decoder.forward(self.embed[self._indices(ids)], spans)
            return x[self._indices(rows)] if len(rows) < len(ids) else x

    def logits(self, hidden: Tensor) -> Tensor:
        """The head over some rows of `hidden`: [rows, vocab] f32."""
        with computing(self.device):
            rows = hidden.shape[0]
            logits = self.decoder.logits(hidden) if rows else torch.empty(0, self.vocab, device=self.device)
            if logits.is_cuda:
                gpu("flags").raise_pending(logits.device)
            return logits

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def available_bytes() -> int:
    """Memory that this process could still have without swapping: the system's, or what its control groups leave it."""
    return min([_left_in_system(), *_left_in_groups()])


def _left_in_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups() -> list[int]:
    """Of this process's group and each above it that has a limit; cgroup v2. A container sees its own as the root."""
    try:
        own = next(line[3:] for line in _OWN_GROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    left: list[int] = []
    for group in (_GROUPS / own.strip("/"), *(_GROUPS / own.strip("/")).parents):
        with suppress(OSError, ValueError, KeyError):  # no such file, or "max": no limit
            most, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            left.append(max(0, most - used + int(stat["inactive_file"])))  # page cache that goes first
        if group == _GROUPS:
            break
    return left


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Kernels are launched on `device`, and torch's ways to say that there is no memory become MemoryError."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except RuntimeError as err:  # torch.OutOfMemoryError is one
        if no_memory(err):
            raise MemoryError(f"model: expected memory for the step, got {err!s:.200}") from err
        raise


def no_memory(err: RuntimeError) -> bool:
    """Whether torch says that there is no memory: its own error, or one of the allocators below it."""
    return isinstance(err, torch.OutOfMemoryError) or any(words in str(err) for words in _OUT_OF_MEMORY)
