"""Shared inputs for the kernel tests: reproducible tensors, a small model, and every back end of this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from countermark_kernels import cache as caches
from countermark_kernels import hadamard, ieee, launch, linear
from countermark_kernels.decoder import Decoder, Layer

EPS = ieee.f32(1e-5)
BACKENDS = ("torch", *launch.isas())
"""The torch path and each native instruction set that this processor has."""


@contextmanager
def on(backend: str) -> Iterator[None]:
    """Run a block on one of BACKENDS."""
    if backend == "torch":
        with launch.forced(backend="torch"):
            yield
    else:
        with launch.forced(isa=backend):
            yield


def floats(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values with an outlier here and there, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * scale
    return torch.where(torch.rand(*shape, generator=generator) < 0.01, x * 20.0, x)


def int8s(*shape: int, seed: int) -> Tensor:
    """Uniform in -127..127."""
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def scales(*shape: int, seed: int, scale: float = 0.01) -> Tensor:
    """Positive scales."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1) * scale


def rope_tables(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of pos * 10000^(-2i/d), [context, d/2] f32."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(context, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().to(torch.float32), angle.sin().to(torch.float32)


def hadamard_matrix(size: int) -> Tensor:
    """H[i, j] = (-1)^popcount(i & j), f64: Sylvester's matrix from its definition."""
    rows = [[1.0 - 2.0 * ((i & j).bit_count() & 1) for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


class TinyModel:
    """Raw int8 tensors of a small decoder with every optional part; `decoder()` prepares it for the back end in use."""

    hidden, intermediate, heads, kv_heads, head_dim, layers, vocab, context = 96, 320, 4, 2, 64, 2, 70, 128

    def __init__(self) -> None:
        width, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "qkv": (width + 2 * kv, self.hidden),
            "o": (self.hidden, width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        self.weights = [
            {name: self._weight(shape, 10 * i + j) for j, (name, shape) in enumerate(shapes.items())}
            for i in range(self.layers)
        ]
        self.head = self._weight((self.vocab, self.hidden), 99)
        self.vectors = {
            "qkv_bias": floats(width + 2 * kv, seed=1, scale=0.1),
            "o_bias": floats(self.hidden, seed=2, scale=0.1),
            "q_gain": scales(self.head_dim, seed=3, scale=1.0),
            "k_gain": scales(self.head_dim, seed=4, scale=1.0),
        }
        self.cos, self.sin = rope_tables(self.context, self.head_dim)

    @staticmethod
    def _weight(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        return int8s(*shape, seed=seed), scales(shape[0], seed=seed, scale=1.0 / (70.0 * math.sqrt(shape[1])))

    def decoder(self) -> Decoder:
        """The model on the back end in use."""
        return Decoder(
            layers=tuple(
                Layer(**{name: linear.prepare(*w) for name, w in layer.items()}, **self.vectors)
                for layer in self.weights
            ),
            head=linear.prepare(*self.head),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            eps=EPS,
            block=hadamard.block_size(self.intermediate),
            cos=self.cos,
            sin=self.sin,
        )

    def cache(self, capacity: int | None = None) -> caches.KvCache:
        """An empty cache."""
        return caches.alone(
            layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim, capacity=capacity or self.context
        )
