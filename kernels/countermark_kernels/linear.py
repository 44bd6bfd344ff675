"""Linear layer with int8 activations and int8 weights.

    S = q . w            int32, any order (K <= 32768 keeps |S| <= 5.3e8)
    y = (float(S) * s_x) * s_w
    y = y + bias         where there is one
    y = residual + y     where there is one

Integer: the sum of products, so split-K, tiles, threads and instruction sets are free. Binary32, one rounding each:
the conversion of S and the products and sums above, in that order. q and w lie in -127..127 (never -128), which the
int8 instructions without VNNI need to be exact.

Three ways to the same integers: the native library (see native/gemm.h); torch: float products over chunks of
K <= 1024, in which every partial sum is an integer under 2^24 and hence exact in any order; on CUDA, gpu/linear.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import CWeight, check, gpu, native, pointer

CHUNK = 1024
K_MAX = 32768


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weight:
    """A weight matrix [outputs, inputs] and its scales, in the layout of the back end that `prepare` found.

    `planes`: for torch, see `split`; `transposed`: for torch._int_mm; `native`: the C view of `packed` and `sums`;
    `rows`: on CUDA, [outputs, inputs] as it came.
    """

    outputs: int
    inputs: int
    scale: Tensor
    planes: tuple[Tensor, ...] = ()
    transposed: Tensor | None = None
    packed: Tensor | None = None
    sums: Tensor | None = None
    native: CWeight | None = None
    rows: Tensor | None = None


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
    """Bring w: [N, K] int8 and its channel scales ws: [N] f32 into the back end's own layout, once per model.

    Copies: w may be dropped. The weight lives where w does. Raises ValueError for a value of -128 or a K over 32768.
    """
    check("w", w, torch.int8, (None, None), w.device)
    outputs, inputs = w.shape
    check("ws", ws, torch.float32, (outputs,), w.device)
    if not 1 <= inputs <= K_MAX or not outputs:
        raise ValueError(f"w: expected 1..{K_MAX} inputs and some outputs, got {tuple(w.shape)}")
    if int(w.min()) == -128:
        raise ValueError("w: expected values in -127..127, got -128")
    ws = ws.clone()
    if w.is_cuda:
        weight = Weight(outputs=outputs, inputs=inputs, scale=ws, rows=w.clone())
        gpu("linear").workspace(w.device)
        torch.cuda.synchronize(w.device)  # kernels read weights before they wait for earlier ones
        return weight
    library = native()
    if library is None:
        if _int_mm_wins() and _int_mm_is_exact(outputs, inputs):
            return Weight(outputs=outputs, inputs=inputs, scale=ws, transposed=w.T.clone())
        return Weight(outputs=outputs, inputs=inputs, scale=ws, planes=split(w))
    panels, quads = (outputs + 15) // 16, (inputs + 3) // 4
    packed = torch.empty(panels, quads, 16, 4, dtype=torch.int8)
    sums = torch.empty(panels * 16, dtype=torch.int32)
    library.call("cm_pack", w.data_ptr(), outputs, inputs, packed.data_ptr(), sums.data_ptr())
    view = CWeight(outputs, inputs, packed.data_ptr(), sums.data_ptr(), ws.data_ptr())
    return Weight(outputs=outputs, inputs=inputs, scale=ws, packed=packed, sums=sums, native=view)


def linear(
    q: Tensor, s: Tensor, weight: Weight, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """q: [T, K] int8 in -127..127, s: [T] f32, bias: [N] f32, residual: [T, N] f32 -> [T, N] f32."""
    rows = q.shape[0]
    device = weight.scale.device
    check("q", q, torch.int8, (None, weight.inputs), device)
    check("s", s, torch.float32, (rows,), device)
    if bias is not None:
        check("bias", bias, torch.float32, (weight.outputs,), device)
    if residual is not None:
        check("residual", residual, torch.float32, (rows, weight.outputs), device)
    if weight.rows is not None:
        y: Tensor = gpu("linear").product(q, s, weight.rows, weight.scale, bias, residual)
        return y
    library = native()
    if weight.native is None:
        if weight.transposed is not None:
            return _scale(torch._int_mm(q, weight.transposed), s, weight.scale, bias, residual)
        return _scale(chunked_product(q, weight.planes), s, weight.scale, bias, residual)
    if library is None:
        raise ValueError("weight: expected one prepared for the torch path, got native panels")
    y = torch.empty(rows, weight.outputs)
    extra = (pointer(bias), pointer(residual), y.data_ptr())
    library.call("cm_linear", ctypes.byref(weight.native), q.data_ptr(), s.data_ptr(), rows, *extra)
    return y


def _int_mm_is_exact(outputs: int, inputs: int) -> bool:
    """torch._int_mm against int32 for this shape, with 127 and -127 everywhere: byte instructions can saturate."""
    signs = torch.arange(inputs, dtype=torch.int32) % 2 * 254 - 127
    for rows in (1, 17):
        for a, b in ((127, 127), (127, -127), (-127, signs), (signs, signs)):
            left = (torch.zeros(rows, inputs, dtype=torch.int32) + a).to(torch.int8)
            right = (torch.zeros(outputs, inputs, dtype=torch.int32) + b).to(torch.int8)
            expected = int((left[0].to(torch.int64) * right[0].to(torch.int64)).sum(dtype=torch.int64))
            if not bool((torch._int_mm(left, right.T) == expected).all()):
                return False
    return True


@lru_cache(maxsize=1)
def _int_mm_wins() -> bool:
    """Whether torch._int_mm beats binary32 here. Either gives the same bits, so timing may choose."""
    w = torch.ones(256, 256, dtype=torch.int8)
    planes = split(w)
    return _seconds(lambda: torch._int_mm(w, w.T)) < _seconds(lambda: chunked_product(w, planes))


def _seconds(product: Callable[[], Tensor]) -> float:
    product()
    start = perf_counter()
    product()
    return perf_counter() - start
