"""RMSNorm with its gain folded into the next weights, and quantisation, in one step.

    amax, q as in quantise.py, from the residual x itself (the norm divides a row by one number, which cancels in q)
    e = exponent(amax);  z = rint(x * 2^(14 - e));  S = sum z^2  in int64
    r = div(1, sqrt(div(float(S), float(n)) * 2^clamp(2e - 28, -126, 127) + eps))
    s = div(amax, 127) * r
    amax < 2^-100: q = 0, s = 0

Integer: the maximum, z and the sum of squares (|z| <= 2^15, so n up to 2^16 stays under 2^46). Binary32: the rest,
one rounding per operation. Integer sums are free of order and everything else is a function of one element and two
numbers of its row, so no bit depends on batch, position or split. The clamp makes the power a normal number: below it
(amax < 2^-48) the product is under 2^-96 and vanishes beside eps; above it the product overflows, which is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countermark_kernels import ieee, quantise
from countermark_kernels.binding import check, gpu, native

EPS_MIN = 2.0**-40


def check_eps(eps: float) -> None:
    """Raise ValueError unless `eps` is a binary32 value in 2^-40..1."""
    if not EPS_MIN <= eps <= 1.0 or ieee.f32(eps) != eps:
        raise ValueError(f"eps: expected a binary32 value in 2^-40..1, got {eps!r}")


def inverse_rms(x: Tensor, amax: Tensor, eps: float) -> Tensor:
    """r of the formula above for x: [..., n] f32 and its rows' amax: [...]; 1 where amax < 2^-100.

    Raises NumericsError `numerics.range` where the mean square overflows binary32.
    """
    one = ieee.constant(1.0, x)
    tiny = amax < ieee.TINY
    e = ieee.exponent(torch.where(tiny, torch.ones_like(amax), amax))
    z = ieee.rint(x * ieee.pow2(14 - e).unsqueeze(-1)).to(torch.int64)
    total = (z * z).sum(dim=-1, dtype=torch.int64)
    mean = ieee.div(ieee.to_f32(total), ieee.constant(float(x.shape[-1]), x))
    mean_square = mean * ieee.pow2(torch.clamp(2 * e - 28, -126, 127))
    if not bool(torch.isfinite(mean_square).all()):
        raise ieee.NumericsError("mean square: expected less than 2^128, got more", code="numerics.range")
    return ieee.div(one, ieee.sqrt(mean_square + eps)).masked_fill(tiny, 1.0)


def reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [T, H] f32 -> (q: [T, H] int8, s: [T] f32)."""
    amax = ieee.amax(x)
    q, s = quantise.reference(x)
    return q, s * inverse_rms(x, amax, eps)


def norm_quantise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [T, H] f32, the residual -> (q: [T, H] int8, s: [T] f32). `eps` is a binary32 value.

    Raises NumericsError `numerics.not_finite` or `numerics.range` (on CUDA: `gpu.flags.raise_pending`).
    """
    check("x", x, torch.float32, (None, None), x.device)
    check_eps(eps)
    if x.is_cuda:
        on_cuda: tuple[Tensor, Tensor] = gpu("norm").norm_quantise(x, eps)
        return on_cuda
    library = native()
    if library is None:
        return reference(x, eps)
    q, s = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    library.call("cm_norm_quantise", x.data_ptr(), *x.shape, eps, q.data_ptr(), s.data_ptr())
    return q, s
