"""The decoder stack on a GPU: decoder.py's ops in their order, what all layers share made once for the batch.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK
from countermark_kernels.gpu import activation, attention, linear, norm, quantise, rope
from countermark_kernels.linear import Weight

if TYPE_CHECKING:
    from countermark_kernels.decoder import Decoder


def forward(decoder: Decoder, x: Tensor, spans: Sequence[Span]) -> Tensor:
    """x: [T, H] f32 -> [T, H] f32 as decoder.Decoder.forward, for spans whose caches share one pool on x's device."""
    batch = attention.plan(spans, decoder.heads)
    positions, slots = (torch.cat(parts).to(x.device) for parts in zip(*map(_places, spans), strict=True))
    for index, layer in enumerate(decoder.layers):
        q, s = norm.norm_quantise(x, decoder.eps)
        q, s = rope.rope_quantise(
            _product(q, s, layer.qkv, layer.qkv_bias),
            positions,
            decoder.cos,
            decoder.sin,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            q_gain=layer.q_gain,
            k_gain=layer.k_gain,
            eps=decoder.eps,
            slots=slots,
            pool=batch.pool.layer(index),
            page=BLOCK,
        )
        q, s = quantise.quantise(attention.attend(q, s, batch, layer=index))
        x = _product(q, s, layer.o, layer.o_bias, x)
        q, s = norm.norm_quantise(x, decoder.eps)
        q, s = activation.swiglu_quantise(_product(q, s, layer.gate_up), decoder.block)
        x = _product(q, s, layer.down, residual=x)
    return x


def _places(span: Span) -> tuple[Tensor, Tensor]:
    """The positions of a span's rows and their slots in the pool."""
    at = torch.arange(span.position, span.position + span.end - span.start)
    return at, torch.tensor(span.cache.blocks)[at // BLOCK] * BLOCK + at % BLOCK


def _product(
    q: Tensor, s: Tensor, weight: Weight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    assert weight.rows is not None
    return linear.product(q, s, weight.rows, weight.scale, bias, residual)
