"""The decoder stack: the ops of this package in their order, layer by layer. No arithmetic of its own.

    q, s = norm_quantise(x)          qkv = linear(q, s, W_qkv) [+ bias]
    heads = rope_quantise(qkv)       cache.append(heads);  a = attend(heads)
    x = x + (linear(quantise(a), W_o) [+ bias])
    q, s = norm_quantise(x)          gate_up = linear(q, s, W_gate_up)
    x = x + linear(swiglu_quantise(gate_up), W_down)

The native path runs all layers of a batch in one call, through the same functions as the single ops, so the bits are
those of the ops called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_kernels.activation import swiglu_quantise
from countermark_kernels.attention import Span, attend
from countermark_kernels.binding import check
from countermark_kernels.linear import Weight, linear
from countermark_kernels.norm import norm_quantise
from countermark_kernels.quantise import quantise
from countermark_kernels.rope import rope_quantise


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """The prepared tensors of one layer. Biases and gains: [N] or [d] f32, or None where the model has none."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A stack of layers, its head, and what they share. cos, sin: [context, d/2] f32; `block`: see hadamard.py."""

    layers: tuple[Layer, ...]
    head: Weight
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    block: int
    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """x: [T, H] f32, the embeddings of a ragged batch (see attention.Span) -> [T, H] f32, the last residual.

        Keys and values are appended to each span's cache. x is left as it is.
        """
        check("x", x, torch.float32, (None, self.layers[0].qkv.inputs))
        positions = torch.cat(
            [torch.arange(s.position, s.position + s.end - s.start, dtype=torch.int32) for s in spans]
        )
        for index, layer in enumerate(self.layers):
            q, s = norm_quantise(x, self.eps)
            heads = rope_quantise(
                linear(q, s, layer.qkv, bias=layer.qkv_bias),
                positions,
                self.cos,
                self.sin,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                q_gain=layer.q_gain,
                k_gain=layer.k_gain,
                eps=self.eps,
            )
            for span in spans:
                span.cache.append(index, heads, span.start, span.end, span.position)
            q, s = quantise(attend(heads.q, heads.s_q, spans, layer=index))
            x = linear(q, s, layer.o, bias=layer.o_bias, residual=x)
            q, s = norm_quantise(x, self.eps)
            q, s = swiglu_quantise(linear(q, s, layer.gate_up), self.block)
            x = linear(q, s, layer.down, residual=x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x: [S, H] f32, rows of `forward`'s result -> [S, V] f32."""
        q, s = norm_quantise(x, self.eps)
        return linear(q, s, self.head)
