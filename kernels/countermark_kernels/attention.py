"""Causal attention over an int8 key-value cache, in two passes whose reductions are integers or exact maxima.

For one query row at position p, over the tokens t <= p of its sequence (c = binary32(log2(e) / (d * sqrt(d))): the
1/sqrt(d) of attention and the 1/d of the two unnormalised Hadamard transforms):

    cq = s_q * c, 0 where that is under 2^-100
    S = q . k_t                              int32
    a = float(S) * s_k
    lambda = the least integer with 2^lambda >= s_v, at least -40
    pass 1   M = ceil(max a * cq);  M' = ceil(max fma(a, cq, lambda));  g = 32512 * 2^(M - M')
    pass 2   B = 12582912 - M;  a' = max(a, div(M - 96, max(cq, 2^-100)))
             t = fma(a', cq, B), whose last bits are the integer k = rint(a' cq) - M;  f = fma(a', cq, B - t)
             E = 2^(k + f)                   ieee.exp2_short
             D = sum rint(E * 2^22)          int64
             n = fma(E * s_v, g, 12582912) - 12582912;  at most 32639: int16, or two int8 planes
             N = sum n * v_t                 int64
             o = div(float(N) * 2^22, float(D) * g)

M' keeps p's fifteen bits for the tokens that carry values: the heaviest token of a row is often one whose value is
next to nothing (an attention sink). A score 96 powers of two below the largest counts as that far.

Integer: S, M, M', D, n, N. Binary32: the rest, one rounding per operation, fma being one. A maximum of binary32 values
and sums of integers are free of order, so no bit depends on how tokens are split into blocks, chunks, steps or
threads, nor on which other rows are computed beside this one: a prompt processed at once, in chunks, or token by token
gives the same bits. Online rescaling of a running maximum is forbidden: it rounds differently per split.

Bounds: |S| < 2^21, so its conversion is exact. Scales are under 2^24 (rope.py), |max a * cq| < 2^14 or the row is an
error: so E <= 1.0005, lambda in -40..24, M' - M in -42..25, nothing overflows, and n <= 32545. At most 131,072 tokens
keep the sums of both int8 planes within int32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.binding import check, gpu, native
from countermark_kernels.cache import KvCache, native_spans
from countermark_kernels.linear import chunked_product, split

CONTEXT_MAX = 131_072
P_MAX = 32512
LAMBDA_MIN = -40
SCORE_LIMIT = 2.0**14
FLOOR = 96.0
ROUND = 12582912.0
_QUERY_BLOCK = 128


SCORE_CONSTANTS = {64: float.fromhex("0x1.715476p-9"), 128: float.fromhex("0x1.0527dcp-10")}
"""binary32(log2(e) / (d sqrt d)), c of the formulas above, for each head size."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """Rows start..end of a ragged batch are the tokens position.. of the sequence in `cache`."""

    cache: KvCache
    start: int
    end: int
    position: int


def reference(q: Tensor, s_q: Tensor, positions: Tensor, *, k: Tensor, s_k: Tensor, v: Tensor, s_v: Tensor) -> Tensor:
    """One kv head: q: [R, d] int8, s_q: [R] f32, positions: [R] int, k, v: [L, d] int8, s_k, s_v: [L] f32 -> [R, d]."""
    tokens = torch.arange(k.shape[0])
    visible = tokens.unsqueeze(0) <= positions.unsqueeze(1)
    hidden = ~visible
    total = chunked_product(q, split(k))
    a = ieee.to_f32(total) * s_k
    cq = s_q * SCORE_CONSTANTS[q.shape[1]]
    cq = torch.where(cq < ieee.TINY, 0.0, cq).unsqueeze(-1)
    largest = a.masked_fill(hidden, -math.inf).amax(dim=-1, keepdim=True) * cq
    if not bool((largest.abs() < SCORE_LIMIT).all()):
        raise ieee.NumericsError("score: expected magnitudes under 2^14, got more", code="numerics.range")
    raised = ieee.fma(a, cq.expand_as(a), torch.clamp(ieee.ceil_exponent(s_v), min=LAMBDA_MIN).to(torch.float32))
    m, m2 = ieee.ceil(largest), ieee.ceil(raised.masked_fill(hidden, -math.inf).amax(dim=-1, keepdim=True))
    g = ieee.pow2((m - m2).to(torch.int32)) * float(P_MAX)
    a = torch.maximum(a, ieee.div(m - FLOOR, torch.clamp(cq, min=ieee.TINY)))
    bias = ROUND - m
    whole = ieee.fma(a, cq, bias)
    e = ieee.exp2_short(whole - ROUND, ieee.fma(a, cq, bias - whole)).masked_fill(hidden, 0.0)
    d = ieee.rint(e * 2.0**22).to(torch.int64).sum(dim=-1, keepdim=True, dtype=torch.int64)
    n = (ieee.fma(e * s_v, g, torch.full_like(g, ROUND)) - ROUND).to(torch.int32)
    low = ((n + 128) & 255) - 128
    planes = split(v.T)
    high, low = ((chunked_product(part.to(torch.int8), planes)).to(torch.int64) for part in ((n - low) >> 8, low))
    return ieee.div(ieee.to_f32(high * 256 + low) * 2.0**22, ieee.to_f32(d) * g)


def attend(q: Tensor, s_q: Tensor, spans: Sequence[Span], *, layer: int) -> Tensor:
    """q: [T, heads, d] int8, s_q: [T, heads] f32 -> [T, heads * d] f32.

    `spans` cover rows 0..T in order, without gaps. Each row attends to every token of its sequence up to its own,
    whose keys and values (its own included) are in the cache: append first. Query head h reads kv head
    h // (heads / kv_heads). Raises NumericsError `numerics.range` for a score of 2^14 or more; on CUDA
    `gpu.flags.raise_pending` does.
    """
    check("q", q, torch.int8, (None, None, None), q.device)
    rows, heads, head_dim = q.shape
    check("s_q", s_q, torch.float32, (rows, heads), q.device)
    check_spans(spans, rows, heads, head_dim)
    if q.is_cuda and spans:
        kernels = gpu("attention")
        out: Tensor = kernels.attend(q, s_q, kernels.plan(spans, heads), layer=layer)
        return out
    result = torch.empty(rows, heads, head_dim, device=q.device)
    library = native()
    if library is not None and spans:
        calls, _held = native_spans([(x.cache, x.start, x.end, x.position) for x in spans], layer)
        sizes = (len(spans), heads, spans[0].cache.pool.kv_heads, head_dim, SCORE_CONSTANTS[head_dim])
        library.call("cm_attend", calls, *sizes, q.data_ptr(), s_q.data_ptr(), result.data_ptr())
        return result.reshape(rows, heads * head_dim)
    for span in spans:
        kv_heads = span.cache.pool.kv_heads
        group = heads // kv_heads
        for kv_head in range(kv_heads):
            mine = slice(kv_head * group, (kv_head + 1) * group)
            for start in range(span.start, span.end, _QUERY_BLOCK):
                end = min(start + _QUERY_BLOCK, span.end)
                length = span.position + end - span.start
                positions = torch.arange(length - (end - start), length).repeat_interleave(group)
                s_k, s_v = span.cache.scales(layer, kv_head, length)
                result[start:end, mine] = reference(
                    q[start:end, mine].reshape(-1, head_dim),
                    s_q[start:end, mine].reshape(-1),
                    positions,
                    k=span.cache.keys(layer, kv_head, length),
                    s_k=s_k,
                    v=span.cache.values(layer, kv_head, length),
                    s_v=s_v,
                ).reshape(end - start, group, head_dim)
    return result.reshape(rows, heads * head_dim)


def check_spans(spans: Sequence[Span], rows: int, heads: int, head_dim: int) -> None:
    """Raise ValueError unless the spans tile rows 0..`rows` and their caches fit the heads and the positions.

    Raises NumericsError `numerics.context` past CONTEXT_MAX tokens.
    """
    at = 0
    for span in spans:
        pool, tokens = span.cache.pool, span.position + span.end - span.start
        if span.start != at or span.end <= span.start:
            raise ValueError(f"spans: expected one that starts at row {at}, got {span.start}..{span.end}")
        if pool.head_dim != head_dim or heads % pool.kv_heads or pool.kv_heads != spans[0].cache.pool.kv_heads:
            raise ValueError(f"spans: expected a cache for {heads} heads of {head_dim}, got another")
        if tokens > CONTEXT_MAX:
            raise ieee.NumericsError(
                f"context: expected at most {CONTEXT_MAX} tokens, got {tokens}", code="numerics.context"
            )
        if span.position < 0 or tokens > span.cache.capacity:
            raise ValueError(
                f"spans: expected tokens within the {span.cache.capacity} of the cache's blocks, "
                f"got {span.position}..{tokens}"
            )
        span.cache.table(tokens)
        at = span.end
    if at != rows:
        raise ValueError(f"spans: expected to cover {rows} rows, got {at}")
