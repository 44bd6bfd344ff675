"""Argument checks and the loader of the native library."""

from __future__ import annotations

import torch
from torch import Tensor


def check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless x is a contiguous CPU tensor of this dtype and shape (None: any size)."""
    if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous() or x.dim() != len(shape):
        raise ValueError(
            f"{name}: expected a contiguous CPU tensor {dtype} of {len(shape)} dimensions, got {describe(x)}"
        )
    for have, want in zip(x.shape, shape, strict=True):
        if want is not None and have != want:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def describe(x: Tensor) -> str:
    """What `check` saw, for its message."""
    return f"{x.device.type} {x.dtype} {tuple(x.shape)}{'' if x.is_contiguous() else ' strided'}"
