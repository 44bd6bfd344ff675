"""The decoder stack on a GPU: decoder.py's ops in their order, what all layers share made once for the batch.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK
from countermark_kernels.gpu import activation, attention, linear, norm, quantise, rope
from countermark_kernels.gpu.batch import Plan
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import cdiv, next_power_of_2
from countermark_kernels.linear import Weight

if TYPE_CHECKING:
    from countermark_kernels.decoder import Decoder


@triton.jit(do_not_specialize=["vocab"])
def _embed(table, tokens, carried, drawn, x, width, vocab, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64)
    before = tl.load(carried + row)
    if before >= 0:
        token = tl.load(drawn + before.to(tl.int64) * STRIDE)
    # what a failed step has drawn may be no token; its followers are worth nothing, but must not read out of bounds
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)
    inside = at < width
    value = tl.load(table + token * width + at, mask=inside, other=0.0)
    tl.store(x + row.to(tl.int64) * width + at, value, mask=inside)


def embed(table: Tensor, tokens: Tensor, carried: Tensor, drawn: Tensor) -> Tensor:
    """table: [vocab, H] f32; tokens, carried: [T] int32; drawn: [D, n] int64 -> [T, H] f32.

    A row's id is its token, or where its `carried` is not -1 the first column of that row of `drawn`.
    """
    rows, (vocab, width) = tokens.shape[0], table.shape
    x = torch.empty(rows, width, device=table.device)
    block = min(next_power_of_2(width), 1024)
    grid = (rows, cdiv(width, block))
    gather = prepared(_embed, STRIDE=drawn.stride(0), BLOCK=block)
    gather(grid, table, tokens, carried, drawn, x, width, vocab)
    return x


def forward(decoder: Decoder, x: Tensor, spans: Sequence[Span]) -> Tensor:
    """x: [T, H] f32 -> [T, H] f32 as decoder.Decoder.forward, for spans whose caches share one pool on x's device."""
    if not x.is_cuda:  # the interpreter
        return run(decoder, x, attention.plan(spans, decoder.heads))
    with torch.cuda.device(x.device):
        return run(decoder, x, attention.plan(spans, decoder.heads))


def run(decoder: Decoder, x: Tensor, batch: Plan) -> Tensor:
    """All layers over the rows of a plan. x: [T, H] f32 -> [T, H] f32."""
    for index, layer in enumerate(decoder.layers):
        q, s = norm.norm_quantise(x, decoder.eps, first=index == 0)
        q, s = rope.rope_quantise(
            _product(q, s, layer.qkv, layer.qkv_bias),
            batch.positions,
            decoder.cos,
            decoder.sin,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            q_gain=layer.q_gain,
            k_gain=layer.k_gain,
            eps=decoder.eps,
            slots=batch.slots,
            pool=batch.pool.layer(index),
            page=BLOCK,
        )
        q, s = quantise.quantise(attention.attend(q, s, batch, layer=index))
        x = _product(q, s, layer.o, layer.o_bias, x, layer.gate_up)
        q, s = norm.norm_quantise(x, decoder.eps)
        q, s = activation.swiglu_quantise(_product(q, s, layer.gate_up), decoder.block)
        x = _product(q, s, layer.down, residual=x)
    return x


def logits(decoder: Decoder, x: Tensor, out: Tensor) -> None:
    """x: [T, H] f32 -> the head's logits in `out`: [T, vocab] f32."""
    assert decoder.head.rows is not None
    q, s = norm.norm_quantise(x, decoder.eps)
    linear.product(q, s, decoder.head.rows, decoder.head.scale, out=out)


def _product(
    q: Tensor,
    s: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    then: Weight | None = None,
) -> Tensor:
    assert weight.rows is not None
    return linear.product(q, s, weight.rows, weight.scale, bias, residual, then=None if then is None else then.rows)
