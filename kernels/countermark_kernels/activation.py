"""SwiGLU, block Hadamard, quantisation: the input of the down projection.

    a = div(g, 1 + exp(-g)) * u       g, u: the two halves of the gate-up projection's output
    a = H_B a                         hadamard.py, blocks of B, unnormalised (1/sqrt(B) is in the weights)
    q, s = quantise(bf16(a))

exp is ieee.exp (clamped to -87..87, a fixed polynomial). Integer: the maximum. Binary32: the rest, one rounding per
operation. A row depends on itself alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countermark_kernels import hadamard, ieee, quantise
from countermark_kernels.binding import check, gpu, native


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x) for binary32 x."""
    return ieee.div(x, ieee.exp(-x) + 1.0)


def reference(gate_up: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2I] f32 -> (q: [T, I] int8, s: [T] f32)."""
    gate, up = gate_up.chunk(2, dim=-1)
    a = hadamard.reference(silu(gate) * up, block)
    ieee.amax(a)  # raises before the rounding, which turns one NaN pattern into zero
    return quantise.reference(ieee.round_bf16(a))


def swiglu_quantise(gate_up: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2I] f32, gate in the first half, up in the second -> (q: [T, I] int8, s: [T] f32).

    `block`: the Hadamard block, a power of two that divides I (`hadamard.block_size`).
    Raises NumericsError `numerics.not_finite` (on CUDA: `gpu.flags.raise_pending`).
    """
    check("gate_up", gate_up, torch.float32, (None, None), gate_up.device)
    width = gate_up.shape[1]
    if width % 2 or block < 1 or block & (block - 1) or width % (2 * block):
        raise ValueError(f"block: expected a power of two that divides half of {width}, got {block}")
    if gate_up.is_cuda:
        on_cuda: tuple[Tensor, Tensor] = gpu("activation").swiglu_quantise(gate_up, block)
        return on_cuda
    library = native()
    if library is None:
        return reference(gate_up, block)
    rows, half = gate_up.shape[0], width // 2
    q, s = torch.empty(rows, half, dtype=torch.int8), torch.empty(rows)
    library.call("cm_swiglu_quantise", gate_up.data_ptr(), rows, half, block, q.data_ptr(), s.data_ptr())
    return q, s
