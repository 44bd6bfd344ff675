"""Every op of the back end in use, once, against its reference: the last step of the start-up self-test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from countermark_kernels import activation, attention, cache, fingerprint, ieee, linear, norm, quantise, rope, sampler

_EPS = ieee.f32(1e-5)


def pattern(*shape: int, seed: int, scale: float = 4.0) -> Tensor:
    """Reproducible binary32 values of both signs, magnitudes spread over about 2^-8..`scale`; no library generator."""
    count = 1
    for size in shape:
        count *= size
    i = torch.arange(count, dtype=torch.int64) + 1
    i = ((i * 2654435761 + seed * 97) & 0xFFFFFFFF) ^ (seed * 40503)
    i = ((i ^ (i >> 15)) * 2246822519) & 0xFFFFFFFF
    unit = ((i >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
    return ((unit * unit) * unit * scale).reshape(shape)


def _int8(*shape: int, seed: int) -> Tensor:
    return ieee.rint(pattern(*shape, seed=seed, scale=127.0)).to(torch.int8)


def _same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _norm() -> bool:
    x = pattern(5, 100, seed=1)
    return _same(norm.norm_quantise(x, _EPS), norm.reference(x, _EPS))


def _quantise() -> bool:
    x = pattern(5, 100, seed=2)
    return _same(quantise.quantise(x), quantise.reference(x))


def _linear() -> bool:
    ok = True
    for rows, outputs, inputs in ((1, 40, 130), (5, 40, 2049)):
        q, w = _int8(rows, inputs, seed=3), _int8(outputs, inputs, seed=4)
        s, ws = pattern(rows, seed=5), pattern(outputs, seed=6)
        bias, residual = pattern(outputs, seed=7), pattern(rows, outputs, seed=8)
        got = linear.linear(q, s, linear.prepare(w, ws), bias=bias, residual=residual)
        ok = ok and torch.equal(got, linear.reference(q, s, w, ws, bias=bias, residual=residual))
    return ok


def _rope() -> bool:
    qkv, angle = pattern(3, 8 * 64, seed=9), pattern(16, 32, seed=10)
    positions = torch.tensor([0, 7, 15], dtype=torch.int32)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "eps": _EPS}
    gains = {"q_gain": pattern(64, seed=11), "k_gain": pattern(64, seed=12)}
    got = rope.rope_quantise(qkv, positions, angle, -angle, **shape, **gains)  # type: ignore[arg-type]
    want = rope.reference(qkv, positions, angle, -angle, **shape, **gains)  # type: ignore[arg-type]
    names = ("q", "s_q", "k", "s_k", "v", "s_v")
    return all(torch.equal(getattr(got, name), getattr(want, name)) for name in names)


def _attention() -> bool:
    tokens, rows = 37, 3
    heads = rope.Heads(
        q=_int8(tokens, 4, 64, seed=13),
        s_q=pattern(tokens, 4, seed=14).abs(),
        k=_int8(tokens, 2, 64, seed=15),
        s_k=pattern(tokens, 2, seed=16).abs(),
        v=torch.full((tokens, 2, 64), 127, dtype=torch.int8),
        s_v=pattern(tokens, 2, seed=17).abs(),
    )
    kept = cache.alone(layers=1, kv_heads=2, head_dim=64, capacity=tokens)
    kept.append(0, heads, 0, tokens, 0)
    first = tokens - rows
    q, s_q = heads.q[first:].contiguous(), heads.s_q[first:].contiguous()
    span = attention.Span(cache=kept, start=0, end=rows, position=first)
    got = attention.attend(q, s_q, [span], layer=0).reshape(rows, 4, 64)
    for head in range(4):
        kv = head // 2
        want = attention.reference(
            q[:, head],
            s_q[:, head],
            torch.arange(first, tokens),
            k=heads.k[:, kv],
            s_k=heads.s_k[:, kv],
            v=heads.v[:, kv],
            s_v=heads.s_v[:, kv],
        )
        if not torch.equal(got[:, head], want):
            return False
    return True


def _activation() -> bool:
    x = pattern(3, 2 * 192, seed=18, scale=100.0)
    return _same(activation.swiglu_quantise(x, 64), activation.reference(x, 64))


def _sampler() -> bool:
    logits = pattern(2, 3000, seed=19, scale=20.0)
    params = (
        sampler.SamplerParams(temperature=ieee.f32(0.7), top_k=500, top_p_20bit=990_000, min_p_20bit=200, seed=2**63),
        sampler.SamplerParams(temperature=0.0),
    )
    got = sampler.sample(logits, params, (5, 6), (sampler.History(),) * 2)
    return got == [sampler.reference(logits[0], params[0], 5), sampler.reference(logits[1], params[1], 6)]


def _fingerprint() -> bool:
    logits = pattern(2, 1000, seed=20)
    return torch.equal(fingerprint.fingerprint(logits, 999), fingerprint.reference(logits, 999))


_CASES: dict[str, Callable[[], bool]] = {
    "norm": _norm,
    "quantise": _quantise,
    "linear": _linear,
    "rope": _rope,
    "attention": _attention,
    "activation": _activation,
    "sampler": _sampler,
    "fingerprint": _fingerprint,
}


def ops_match_references() -> list[str]:
    """Returns the ops compared; raises NumericsError `numerics.self_test` with the first that differs."""
    for name, matches in _CASES.items():
        if not matches():
            raise ieee.NumericsError(f"{name}: expected its reference's bits, got others", code="numerics.self_test")
    return list(_CASES)
