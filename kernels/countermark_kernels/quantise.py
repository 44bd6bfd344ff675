"""Symmetric int8 quantisation of each row of activations.

    amax = max |x|                     integer maximum over the bits; >= infinity is an error
    q    = rint(x * div(127, amax))    int8, in -127..127
    s    = div(amax, 127)              binary32
    amax < 2^-100: q = 0, s = 0

Integer: the maximum. Binary32, one rounding each: the quotient, the product, the rounding. A maximum of integers is
free of order, and every other step touches one element and its row's maximum, so no bit depends on the batch, on the
position in it, or on how the row was split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import check, gpu, native


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., K] f32 -> (q: [..., K] int8, s: [...] f32)."""
    amax = ieee.amax(x)
    tiny = amax < ieee.TINY
    safe = torch.where(tiny, torch.ones_like(amax), amax)
    scale = ieee.div(ieee.constant(127.0, x), safe)
    q = ieee.rint(x * scale.unsqueeze(-1)).to(torch.int8)
    s = ieee.div(amax, ieee.constant(127.0, x))
    return q.masked_fill(tiny.unsqueeze(-1), 0), s.masked_fill(tiny, 0.0)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K] f32 -> (q: [T, K] int8, s: [T] f32).

    Raises NumericsError `numerics.not_finite` for an infinity or a NaN (on CUDA: `gpu.flags.raise_pending`).
    """
    check("x", x, torch.float32, (None, None), x.device)
    if x.is_cuda:
        on_cuda: tuple[Tensor, Tensor] = gpu("quantise").quantise(x)
        return on_cuda
    library = native()
    if library is None:
        return reference(x)
    q, s = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    library.call("cm_quantise", x.data_ptr(), *x.shape, q.data_ptr(), s.data_ptr())
    return q, s
