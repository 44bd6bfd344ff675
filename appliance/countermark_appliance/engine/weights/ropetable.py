"""The RoPE tables: cos and sin of every position and frequency, each the binary32 value nearest to the true one.

Frequencies follow transformers' formula with each operation correctly rounded to binary32, which no pow of a library
promises: e = 2i / d (exact), p = RN32(theta^e) by mpmath, inv_freq = RN32(1 / p). Angle = RN32(pos * inv_freq), pos as
binary32 (exact below 2^24). Then cos and sin of that binary32 angle in float64, rounded to binary32; where the float64
value lies within 4 ulp of the midpoint of two binary32 values it is recomputed with mpmath, so that a library within
4 ulp gives the same table everywhere. torch's float64 cos and sin are within 1 ulp (SLEEF u10).

Scaling `linear` divides each inv_freq by the factor; `llama3` follows transformers' `_compute_llama3_parameters`; every
written operation is one binary32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import torch
from torch import Tensor

from countermark_appliance.engine.weights.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling

_PRECISION_BITS = 160
_LOW_BITS = 29  # a binary64 has this many more fraction bits than a binary32
_NEAR_ULP = 4


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """The [head_dim / 2] binary32 rotation frequencies."""
    values = np.empty(head_dim // 2, dtype=np.float32)
    for i in range(head_dim // 2):
        with mpmath.workprec(_PRECISION_BITS):
            power = mpmath.power(mpmath.mpf(theta), mpmath.mpf(2 * i) / head_dim)
        plain = np.float32(1.0) / np.float32(_round(power))
        values[i] = _scaled(plain, scaling)
    return torch.from_numpy(values)


def _scaled(inv_freq: np.float32, scaling: RopeScaling | None) -> np.float32:
    if isinstance(scaling, Llama3Scaling):
        return _llama3(inv_freq, scaling)
    return inv_freq / np.float32(scaling.factor) if isinstance(scaling, LinearScaling) else inv_freq


def _llama3(inv_freq: np.float32, scaling: Llama3Scaling) -> np.float32:
    f = np.float32
    context, factor, low = f(scaling.original_context), f(scaling.factor), f(scaling.low_freq_factor)
    wavelength = f(2 * math.pi) / inv_freq
    if wavelength < f(scaling.original_context / scaling.high_freq_factor):
        return inv_freq
    if wavelength > f(scaling.original_context / scaling.low_freq_factor):
        return inv_freq / factor
    smooth = (context / wavelength - low) / f(scaling.high_freq_factor - scaling.low_freq_factor)
    return (f(1.0) - smooth) * inv_freq / factor + smooth * inv_freq


def angles(config: ModelConfig, start: int, stop: int) -> Tensor:
    """The binary32 angles of positions start to stop: [stop - start, head_dim / 2]."""
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    positions = torch.arange(start, stop, dtype=torch.float32)
    return positions[:, None] * inv_freq


def table_rows(config: ModelConfig, which: str, *, rows: int = 8192) -> Iterator[Tensor]:
    """The `cos` or `sin` table in blocks of `rows` positions: [rows, head_dim / 2] float32."""
    for start in range(0, config.context, rows):
        yield rounded(angles(config, start, min(start + rows, config.context)), which)


def rounded(angle: Tensor, which: str) -> Tensor:
    """cos or sin of binary32 angles, correctly rounded to binary32."""
    wide = angle.to(torch.float64)
    value = torch.cos(wide) if which == "cos" else torch.sin(wide)
    result = value.to(torch.float32)
    low = value.view(torch.int64) & ((1 << _LOW_BITS) - 1)
    near = (low - (1 << (_LOW_BITS - 1))).abs() <= _NEAR_ULP
    exact: Callable[[mpmath.mpf], mpmath.mpf] = mpmath.cos if which == "cos" else mpmath.sin
    for index in near.nonzero().tolist():
        with mpmath.workprec(_PRECISION_BITS):
            result[tuple(index)] = _round(exact(mpmath.mpf(float(wide[tuple(index)]))))
    return result


def _round(value: mpmath.mpf) -> float:
    """Round a value of high precision once to binary32 (24 significant bits; never subnormal here)."""
    with mpmath.workprec(24):
        return float(+value)
