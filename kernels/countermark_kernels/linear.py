"""Linear layer with int8 activations and int8 weights.

    S = q . w            int32, any order (K <= 32768 keeps |S| <= 5.3e8)
    y = (float(S) * s_x) * s_w
    y = y + bias         where there is one
    y = residual + y     where there is one

Integer: the sum of products, so split-K, tiles, threads and instruction sets are free. Binary32, one rounding each:
the conversion of S and the products and sums above, in that order. q and w lie in -127..127 (never -128), which the
int8 instructions without VNNI need to be exact.

Two ways to the same integers: the native library (see native/gemm.h), or torch: float products over chunks of
K <= 1024, in which every partial sum is an integer under 2^24 and hence exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import check

CHUNK = 1024
K_MAX = 32768


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weight:
    """A weight matrix prepared for one backend. `outputs` x `inputs`; build it with `prepare`."""

    outputs: int
    inputs: int
    scale: Tensor
    planes: tuple[Tensor, ...]


def reference(
    q: Tensor, s: Tensor, w: Tensor, ws: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """q: [T, K] int8, s: [T] f32, w: [N, K] int8, ws: [N] f32, bias: [N] f32, residual: [T, N] f32 -> [T, N] f32."""
    total = q.to(torch.int32) @ w.to(torch.int32).T
    return _scale(total, s, ws, bias, residual)


def _scale(total: Tensor, s: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = ieee.to_f32(total) * s.unsqueeze(-1)
    y = y * ws
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = residual + y
    return y


def chunked_product(a: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
    """Exact a @ w^T as int32 for integer-valued a: [..., M, K] int8 and w^T as f32 `planes` of at most CHUNK rows."""
    total: Tensor | None = None
    start = 0
    for plane in planes:
        stop = start + plane.shape[-2]
        part = (a[..., start:stop].to(torch.float32) @ plane).to(torch.int32)
        total = part if total is None else total + part
        start = stop
    if total is None:
        raise ValueError("planes: expected at least one, got none")
    return total


def split(w: Tensor) -> tuple[Tensor, ...]:
    """w: [..., N, K] int8 -> its transpose as f32 chunks [..., <= CHUNK, N] for `chunked_product`."""
    return tuple(w[..., i : i + CHUNK].to(torch.float32).transpose(-1, -2) for i in range(0, w.shape[-1], CHUNK))


def prepare(w: Tensor, ws: Tensor) -> Weight:
    """Bring w: [N, K] int8 and its channel scales ws: [N] f32 into the backend's own layout, once per model.

    Raises ValueError for a value of -128 or a K over 32768.
    """
    check("w", w, torch.int8, (None, None))
    outputs, inputs = w.shape
    check("ws", ws, torch.float32, (outputs,))
    if not 1 <= inputs <= K_MAX:
        raise ValueError(f"w: expected 1..{K_MAX} inputs, got {inputs}")
    if outputs and int(w.min()) == -128:
        raise ValueError("w: expected values in -127..127, got -128")
    return Weight(outputs=outputs, inputs=inputs, scale=ws, planes=split(w))


def linear(
    q: Tensor, s: Tensor, weight: Weight, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """q: [T, K] int8 in -127..127, s: [T] f32, bias: [N] f32, residual: [T, N] f32 -> [T, N] f32."""
    check("q", q, torch.int8, (None, weight.inputs))
    check("s", s, torch.float32, (q.shape[0],))
    if bias is not None:
        check("bias", bias, torch.float32, (weight.outputs,))
    if residual is not None:
        check("residual", residual, torch.float32, (q.shape[0], weight.outputs))
    return _scale(chunked_product(q, weight.planes), s, weight.scale, bias, residual)
