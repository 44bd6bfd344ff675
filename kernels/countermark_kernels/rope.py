"""Queries, keys and values of one layer: QK-norm, rotary position, per-head Hadamard, quantisation.

For each head of q and k (d elements; the projection's bias is already added):

    x = (x * r) * gain                      only with QK-norm; r as in norm.py over the head's d elements
    y1 = x1 * cos - x2 * sin                x1, x2 the two halves of the head (rotate-half), cos and sin of the
    y2 = x2 * cos + x1 * sin                position's row in the artefact's tables
    y  = H_d y                              hadamard.py, unnormalised
    q8, s = quantise(y)                     |y| < 2^30, else an error: attention.py needs bounded scales

v is quantised as it is: its Hadamard transform is in the weights. Integer: the maxima and QK-norm's sum of squares.
Binary32: the rest, one rounding per operation. A head depends on its own row and position alone.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_kernels import hadamard, ieee, norm, quantise
from countermark_kernels.binding import CRope, check, gpu, native, pointer

HEAD_SIZES = (64, 128)
HEAD_LIMIT = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heads:
    """q: [T, heads, d] int8, s_q: [T, heads] f32; k, v: [T, kv_heads, d] int8, s_k, s_v: [T, kv_heads] f32."""

    q: Tensor
    s_q: Tensor
    k: Tensor
    s_k: Tensor
    v: Tensor
    s_v: Tensor


def reference(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
) -> Heads:
    """Shapes as `rope_quantise`."""
    q, k, v = (
        part.reshape(qkv.shape[0], -1, head_dim)
        for part in torch.split(qkv, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    )
    rows = positions.to(torch.int64)
    table = (cos[rows].unsqueeze(1), sin[rows].unsqueeze(1))
    q8, s_q = _quantise(hadamard.reference(_rotate(_qk_norm(q, q_gain, eps), *table), head_dim))
    k8, s_k = _quantise(hadamard.reference(_rotate(_qk_norm(k, k_gain, eps), *table), head_dim))
    v8, s_v = _quantise(v)
    return Heads(q=q8, s_q=s_q, k=k8, s_k=s_k, v=v8, s_v=s_v)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    if bool((ieee.amax(x) >= HEAD_LIMIT).any()):
        raise ieee.NumericsError("head: expected magnitudes under 2^30, got more", code="numerics.range")
    return quantise.reference(x)


def _qk_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return x
    amax = ieee.amax(x)
    y = (x * norm.inverse_rms(x, amax, eps).unsqueeze(-1)) * gain
    return y.masked_fill((amax < ieee.TINY).unsqueeze(-1), 0.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rope_quantise(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 0.0,
) -> Heads:
    """qkv: [T, (heads + 2 kv_heads) d] f32, rows q then k then v; positions: [T] int32; cos, sin: [context, d/2] f32.

    `q_gain`, `k_gain`: [d] f32 with QK-norm (and its `eps`), else both None.

    Raises NumericsError `numerics.not_finite` or `numerics.range`; ValueError for a head size other than 64 or 128 or
    a position outside the tables. On CUDA `gpu.flags.raise_pending` raises, `numerics.range` for such a position.
    """
    if head_dim not in HEAD_SIZES:
        raise ValueError(f"head_dim: expected 64 or 128, got {head_dim}")
    if kv_heads < 1 or heads % kv_heads or heads < 1:
        raise ValueError(f"heads: expected a multiple of {kv_heads} kv heads, got {heads}")
    if (q_gain is None) != (k_gain is None):
        raise ValueError("q_gain, k_gain: expected both or neither, got one")
    device = qkv.device
    check("qkv", qkv, torch.float32, (None, (heads + 2 * kv_heads) * head_dim), device)
    check("positions", positions, torch.int32, (qkv.shape[0],), device)
    check("cos", cos, torch.float32, (None, head_dim // 2), device)
    check("sin", sin, torch.float32, (cos.shape[0], head_dim // 2), device)
    if q_gain is not None:
        norm.check_eps(eps)
    for name, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        if gain is not None:
            check(name, gain, torch.float32, (head_dim,), device)
    if qkv.is_cuda:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "eps": eps}
        dense = gpu("rope").dense(qkv, positions, cos, sin, q_gain=q_gain, k_gain=k_gain, **shape)
        return Heads(**dict(zip(("q", "s_q", "k", "s_k", "v", "s_v"), dense, strict=True)))
    if qkv.shape[0] and not (int(positions.min()) >= 0 and int(positions.max()) < cos.shape[0]):
        raise ValueError(f"positions: expected values in 0..{cos.shape[0] - 1}, got others")
    library = native()
    if library is not None:
        rows = qkv.shape[0]
        out = Heads(
            q=torch.empty(rows, heads, head_dim, dtype=torch.int8),
            s_q=torch.empty(rows, heads),
            k=torch.empty(rows, kv_heads, head_dim, dtype=torch.int8),
            s_k=torch.empty(rows, kv_heads),
            v=torch.empty(rows, kv_heads, head_dim, dtype=torch.int8),
            s_v=torch.empty(rows, kv_heads),
        )
        tables = (positions, cos, sin, q_gain, k_gain)
        call = CRope(*(pointer(x) for x in tables), heads, kv_heads, head_dim, eps)
        results = (out.q, out.s_q, out.k, out.s_k, out.v, out.s_v)
        library.call("cm_rope_quantise", ctypes.byref(call), qkv.data_ptr(), rows, *(x.data_ptr() for x in results))
        return out
    return reference(
        qkv,
        positions,
        cos,
        sin,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_gain=q_gain,
        k_gain=k_gain,
        eps=eps,
    )
