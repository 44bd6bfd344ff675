"""The device the kernels are tested on, and the interpreter's missing fused product.

Every test module here imports this one first: where triton is not installed, each is skipped by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: no kernel of gpu/ was tested")
tl = pytest.importorskip("triton.language")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")


def fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z for binary32 arrays, rounded once: the sum in binary64 rounded to odd, then to binary32.

    The product is exact in binary64. 53 >= 2 * 24 + 2 bits make the second rounding harmless after one to odd
    (Boldo and Melquiond 2008).
    """
    product, z = np.multiply(x, y, dtype=np.float64), np.asarray(z, dtype=np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def _patch() -> None:
    """Two faults of the interpreter: create_fma rounds the product too; an array of one element is no loop bound."""
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_fma = create_fma
    interpreter._patch_lang_tensor = patch_lang_tensor


if not CUDA:
    _patch()
