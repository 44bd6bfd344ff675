"""The decoder stack: the ops of this package in their order, layer by layer. No arithmetic of its own.

    q, s = norm_quantise(x)          qkv = linear(q, s, W_qkv) [+ bias]
    heads = rope_quantise(qkv)       cache.append(heads);  a = attend(heads)
    x = x + (linear(quantise(a), W_o) [+ bias])
    q, s = norm_quantise(x)          gate_up = linear(q, s, W_gate_up)
    x = x + linear(swiglu_quantise(gate_up), W_down)

The native path runs all layers of a batch in one call, through the same functions as the single ops, so the bits are
those of the ops called one by one; so does gpu/decoder.py on CUDA, where errors show when `gpu.flags.raise_pending` is
asked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from countermark_kernels.activation import swiglu_quantise
from countermark_kernels.attention import SCORE_CONSTANTS, Span, attend, check_spans
from countermark_kernels.binding import CDecoder, CLayer, check, gpu, native, pointer
from countermark_kernels.cache import native_spans
from countermark_kernels.linear import Weight, linear
from countermark_kernels.norm import check_eps, norm_quantise
from countermark_kernels.quantise import quantise
from countermark_kernels.rope import HEAD_SIZES, rope_quantise


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
    _native: CDecoder | None = field(init=False, repr=False)
    _native_layers: ctypes.Array[CLayer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        width, hidden = self.heads * self.head_dim, self.head.inputs
        device = self.cos.device
        check("cos", self.cos, torch.float32, (None, self.head_dim // 2), device)
        check("sin", self.sin, torch.float32, (self.cos.shape[0], self.head_dim // 2), device)
        check_eps(self.eps)
        intermediate = self.layers[0].down.inputs
        if self.head_dim not in HEAD_SIZES or intermediate % self.block or self.block & (self.block - 1):
            raise ValueError(f"decoder: expected heads of 64 or 128 and a block, got {self.head_dim}, {self.block}")
        sizes = {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, hidden),
            "o": (hidden, width),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
        for layer in self.layers:
            for name, size in sizes.items():
                weight: Weight = getattr(layer, name)
                if (weight.outputs, weight.inputs) != size:
                    raise ValueError(f"{name}: expected shape {size}, got {(weight.outputs, weight.inputs)}")
            vectors = ((layer.qkv_bias, sizes["qkv"][0]), (layer.o_bias, hidden))
            for x, length in (*vectors, (layer.q_gain, self.head_dim), (layer.k_gain, self.head_dim)):
                if x is not None:
                    check("bias or gain", x, torch.float32, (length,), device)
            if (layer.q_gain is None) != (layer.k_gain is None):
                raise ValueError("q_gain, k_gain: expected both or neither, got one")
        layers = (CLayer * len(self.layers))(*(_view(layer) for layer in self.layers))
        view = None
        if all(getattr(layer, name).native is not None for layer in self.layers for name in sizes):
            shape = (len(self.layers), hidden, self.heads, self.kv_heads, self.head_dim, intermediate, self.block)
            tables = (self.cos.data_ptr(), self.sin.data_ptr())
            view = CDecoder(ctypes.addressof(layers), *shape, *tables, self.eps, SCORE_CONSTANTS[self.head_dim])
        object.__setattr__(self, "_native_layers", layers)
        object.__setattr__(self, "_native", view)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """x: [T, H] f32, the embeddings of a ragged batch (see attention.Span) -> [T, H] f32, the last residual.

        Keys and values are appended to each span's cache. x is left as it is.
        """
        check("x", x, torch.float32, (None, self.layers[0].qkv.inputs), self.cos.device)
        check_spans(spans, x.shape[0], self.heads, self.head_dim)
        if any(s.position + s.end - s.start > self.cos.shape[0] for s in spans):
            raise ValueError(f"spans: expected positions within {self.cos.shape[0]}, got more")
        if any((s.cache.pool.kv_heads, s.cache.pool.layers) != (self.kv_heads, len(self.layers)) for s in spans):
            raise ValueError(
                f"spans: expected caches of {len(self.layers)} layers by {self.kv_heads} heads, got others"
            )
        if not spans:
            return x.clone()
        if x.is_cuda:
            on_cuda: Tensor = gpu("decoder").forward(self, x, spans)
            return on_cuda
        positions = torch.cat(
            [torch.arange(s.position, s.position + s.end - s.start, dtype=torch.int32) for s in spans]
        )
        library = native()
        if library is not None and self._native is not None:
            x = x.clone()
            calls, _held = native_spans([(s.cache, s.start, s.end, s.position) for s in spans])
            rows = (x.data_ptr(), x.shape[0], positions.data_ptr())
            library.call("cm_decode", ctypes.byref(self._native), *rows, calls, len(spans))
            return x
        return self.stepwise(x, spans, positions)

    def stepwise(self, x: Tensor, spans: Sequence[Span], positions: Tensor) -> Tensor:
        """`forward` as single ops, on whichever back end the weights were prepared for."""
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


def _view(layer: Layer) -> CLayer:
    weights = {name: getattr(layer, name).native for name in ("qkv", "o", "gate_up", "down")}
    vectors = {name: pointer(getattr(layer, name)) for name in ("qkv_bias", "o_bias", "q_gain", "k_gain")}
    return CLayer(**{name: w for name, w in weights.items() if w is not None}, **vectors)
