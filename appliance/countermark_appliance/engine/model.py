"""Llama, Qwen2 and Qwen3 (dense): the forward pass of a ragged batch, composed from the exact kernels.

A batch is a list of chunks: the next tokens of some sequences, one of them or thousands. Every row of every step is a
function of its own sequence's tokens alone; integers are summed and everything else is element-wise or per row, so the
logits of a position do not depend on how its sequence was cut into chunks nor on who else is in the batch. The residual
stays binary32. Behind the last layer's keys and values only the rows whose logits are wanted go on.

Not checked here: that the artefact's rotations fit the online ones; `weights` and the kernels share one definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from countermark_kernels.activation import swiglu_quantise
from countermark_kernels.attention import KvCache, Span, attend
from countermark_kernels.linear import Weight, linear, prepare
from countermark_kernels.norm import norm_quantise
from countermark_kernels.quantise import quantise
from countermark_kernels.rope import Heads, rope_quantise

if TYPE_CHECKING:
    from countermark_appliance.engine.weights import Artefact

FIRST_CAPACITY = 256


class Cache:
    """Keys and values of one sequence; grows by need, so that memory follows tokens, not the context's length."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.kv: KvCache | None = None

    def reserve(self, tokens: int, keep: int) -> KvCache:
        """Room for `tokens` tokens, of which the first `keep` are already written."""
        if self.kv is None or self.kv.capacity < tokens:
            old = self.kv
            capacity = max(tokens, FIRST_CAPACITY if old is None else min(2 * old.capacity, self._model.context))
            self.kv = self._model.new_kv(capacity)
            if old is not None:
                self.kv.copy_prefix(old, keep)
        return self.kv


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`tokens` of one sequence from position `start` on, all earlier ones being in `cache`.

    `logits`: of how many of its last tokens the logits are wanted.
    """

    cache: Cache
    start: int
    tokens: Sequence[int]
    logits: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    qkv: Weight
    qkv_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    o: Weight
    o_bias: Tensor | None
    gate_up: Weight
    down: Weight


class Model:
    """The tensors of one artefact, ready to run. Not thread-safe: one thread calls `forward`."""

    def __init__(self, artefact: Artefact) -> None:
        self._config = artefact.config
        c = self._config

        def weight(name: str) -> Weight:
            return prepare(artefact.tensor(name), artefact.tensor(f"{name}.scale"))

        self._embed = artefact.tensor("embed")
        self._cos, self._sin = artefact.tensor("rope.cos"), artefact.tensor("rope.sin")
        self._layers = [
            _Layer(
                qkv=weight(f"layers.{i}.qkv"),
                qkv_bias=artefact.tensor(f"layers.{i}.qkv.bias") if c.attention_bias else None,
                q_gain=artefact.tensor(f"layers.{i}.q_norm") if c.qk_norm else None,
                k_gain=artefact.tensor(f"layers.{i}.k_norm") if c.qk_norm else None,
                o=weight(f"layers.{i}.o"),
                o_bias=artefact.tensor(f"layers.{i}.o.bias") if c.output_bias else None,
                gate_up=weight(f"layers.{i}.gate_up"),
                down=weight(f"layers.{i}.down"),
            )
            for i in range(c.layers)
        ]
        self._head = weight("head")

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
        c = self._config
        return KvCache(layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim, capacity=capacity)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks; write their keys and values; return the wanted logits [rows, vocab] f32, chunk by chunk.

        Running a chunk again writes the same bits again. Raises `NumericsError` where a value leaves the profile's
        range; which chunk it was in is not known.
        """
        ids = [token for chunk in chunks for token in chunk.tokens]
        places = [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.tokens))]
        positions = torch.tensor(places, dtype=torch.int32)
        x = self._embed[torch.tensor(ids)]
        spans, wanted, rows = _spans(chunks)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            heads = self._heads(layer, x, positions)
            for span in spans:
                span.cache.append(i, heads, span.start, span.end, span.position)
            q, s_q = heads.q, heads.s_q
            if i == last and len(rows) < len(ids):
                index = torch.tensor(rows, dtype=torch.int64)
                x, q, s_q, spans = x[index], q[index], s_q[index], wanted
                if not rows:
                    break
            out, s_out = quantise(attend(q, s_q, spans, layer=i))
            x = linear(out, s_out, layer.o, bias=layer.o_bias, residual=x)
            gate_up = linear(*norm_quantise(x, self._config.rms_eps), layer.gate_up)
            x = linear(*swiglu_quantise(gate_up, self._config.hadamard_block), layer.down, residual=x)
        if not rows:
            return torch.empty(0, self.vocab)
        return linear(*norm_quantise(x, self._config.rms_eps), self._head)

    def _heads(self, layer: _Layer, x: Tensor, positions: Tensor) -> Heads:
        c = self._config
        qkv = linear(*norm_quantise(x, c.rms_eps), layer.qkv, bias=layer.qkv_bias)
        return rope_quantise(
            qkv,
            positions,
            self._cos,
            self._sin,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            q_gain=layer.q_gain,
            k_gain=layer.k_gain,
            eps=c.rms_eps,
        )


def _spans(chunks: Sequence[Chunk]) -> tuple[list[Span], list[Span], list[int]]:
    """All rows as spans; the rows with logits as spans among themselves; their indices among all rows."""
    spans: list[Span] = []
    wanted: list[Span] = []
    rows: list[int] = []
    at = 0
    for chunk in chunks:
        count = len(chunk.tokens)
        end = chunk.start + count
        kv = chunk.cache.reserve(end, chunk.start)
        spans.append(Span(cache=kv, start=at, end=at + count, position=chunk.start))
        if chunk.logits:
            first = len(rows)
            rows += range(at + count - chunk.logits, at + count)
            wanted.append(Span(cache=kv, start=first, end=len(rows), position=end - chunk.logits))
        at += count
    return spans, wanted, rows
