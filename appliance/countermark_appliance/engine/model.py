"""Llama, Qwen2 and Qwen3 (dense): the forward pass of a ragged batch over one artefact.

A batch is a list of chunks: the next tokens of some sequences, one of them or thousands. Every row of every step is a
function of its own sequence's tokens alone (see `countermark_kernels.decoder`), so the logits of a position do not
depend on how its sequence was cut into chunks nor on who else is in the batch. The residual stays binary32; behind the
last layer only the rows whose logits are wanted go on to the head.

Not checked here: that the artefact's rotations fit the online ones; builder and kernels are tested against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_appliance.engine.weights import Artefact
from countermark_kernels.attention import KvCache, Span
from countermark_kernels.binding import gpu
from countermark_kernels.decoder import Decoder, Layer
from countermark_kernels.linear import Weight, prepare

FIRST_CAPACITY = 256
POOL_TOKENS = 1 << 20
"""On a GPU all sequences share memory for at most so many tokens, or for as many as half of its free memory holds."""


class Cache:
    """Keys and values of one sequence; grows by need, so that memory follows tokens, not the context's length."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kv: KvCache | None = None

    @property
    def size_bytes(self) -> int:
        return 0 if self._kv is None else self._kv.size_bytes

    def reserve(self, tokens: int, keep: int) -> KvCache:
        """Room for `tokens` tokens, of which the first `keep` are already written."""
        if self._kv is None or self._kv.capacity < tokens:
            old = self._kv
            capacity = FIRST_CAPACITY if old is None else 2 * old.capacity
            grown = self._model.new_kv(max(tokens, min(capacity, self._model.context)))
            if old is not None:
                grown.copy_prefix(old, keep)
                old.release()
            self._kv = grown
        return self._kv

    def __del__(self) -> None:
        if self._kv is not None:
            self._kv.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`tokens` of one sequence from position `start` on, all earlier ones being in `cache`.

    `logits`: of how many of its last tokens the logits are wanted.
    """

    cache: Cache
    start: int
    tokens: Sequence[int]
    logits: int


class Model:
    """The tensors of one artefact, ready to run on `device`. Not thread-safe: one thread calls `forward`."""

    def __init__(self, artefact: Artefact, device: str = "cpu") -> None:
        self._config = artefact.config
        self._device = torch.empty(0, device=device).device  # with its index
        self._pool: object = None  # gpu.cache.Pool, made with the first cache
        c = self._config

        def tensor(name: str) -> Tensor:
            return artefact.tensor(name).to(self._device)

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

        self._embed = tensor("embed")
        self._decoder = Decoder(
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

    def new_cache(self) -> Cache:
        return Cache(self)

    def new_kv(self, capacity: int) -> KvCache:
        """A cache for `capacity` tokens where the model is. Raises `MemoryError` where there is no room."""
        c = self._config
        shape = {"layers": c.layers, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        if self._device.type == "cpu":
            return KvCache(**shape, capacity=capacity)
        paged = gpu("cache")
        if self._pool is None:
            room = torch.cuda.mem_get_info(self._device)[0] // 2
            tokens = min(POOL_TOKENS, room // (c.layers * c.kv_heads * (2 * c.head_dim + 8)))
            self._pool = paged.Pool(**shape, blocks=tokens // paged.BLOCK, device=self._device)
        cache: KvCache = paged.PagedCache(self._pool, capacity)
        return cache

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks; write their keys and values; return the wanted logits [rows, vocab] f32, chunk by chunk.

        Running a chunk again writes the same bits again. Raises `NumericsError` where a value leaves the profile's
        range; which chunk it was in is not known.
        """
        ids: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        for chunk in chunks:
            start = len(ids)
            ids += chunk.tokens
            kv = chunk.cache.reserve(chunk.start + len(chunk.tokens), chunk.start)
            spans.append(Span(cache=kv, start=start, end=len(ids), position=chunk.start))
            rows += range(len(ids) - chunk.logits, len(ids))
        x = self._decoder.forward(self._embed[self._indices(ids)], spans)
        if len(rows) < len(ids):
            x = x[self._indices(rows)]
        logits = self._decoder.logits(x) if rows else torch.empty(0, self.vocab, device=self._device)
        if logits.is_cuda:
            gpu("flags").raise_pending(logits.device)
        return logits

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
