"""Every op of the back end in use, once, against its reference: the last step of the start-up self-test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from countermark_kernels import activation, attention, cache, fingerprint, ieee, linear, logprobs, norm, quantise, rope
from countermark_kernels import sampler as sampling
from countermark_kernels.binding import CPU, gpu

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
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def _norm(device: torch.device) -> bool:
    x = pattern(5, 100, seed=1)
    return _same(norm.norm_quantise(x.to(device), _EPS), norm.reference(x, _EPS))


def _quantise(device: torch.device) -> bool:
    x = pattern(5, 100, seed=2)
    return _same(quantise.quantise(x.to(device)), quantise.reference(x))


def _linear(device: torch.device) -> bool:
    """Few rows and many, which a GPU computes by different kernels; a K that their steps divide, and others."""
    ok = True
    for rows, outputs, inputs in (
        (1, 40, 130),
        (5, 40, 2049),
        (2, 64, 256),
        (17, 80, 512),
        (40, 72, 256),
        (130, 72, 512),
    ):
        q, w = _int8(rows, inputs, seed=3), _int8(outputs, inputs, seed=4)
        s, ws = pattern(rows, seed=5), pattern(outputs, seed=6)
        bias, residual = pattern(outputs, seed=7), pattern(rows, outputs, seed=8)
        weight = linear.prepare(w.to(device), ws.to(device))
        got = linear.linear(q.to(device), s.to(device), weight, bias=bias.to(device), residual=residual.to(device))
        ok = ok and torch.equal(got.cpu(), linear.reference(q, s, w, ws, bias=bias, residual=residual))
    return ok


def _rope(device: torch.device) -> bool:
    qkv, angle = pattern(3, 8 * 64, seed=9), pattern(16, 32, seed=10)
    positions = torch.tensor([0, 7, 15], dtype=torch.int32)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "eps": _EPS}
    gains = {"q_gain": pattern(64, seed=11), "k_gain": pattern(64, seed=12)}
    want = rope.reference(qkv, positions, angle, -angle, **shape, **gains)  # type: ignore[arg-type]
    cos, sin = angle.to(device), -angle.to(device)
    moved = {name: x.to(device) for name, x in gains.items()}
    got = rope.rope_quantise(qkv.to(device), positions.to(device), cos, sin, **shape, **moved)  # type: ignore[arg-type]
    names = ("q", "s_q", "k", "s_k", "v", "s_v")
    return all(torch.equal(getattr(got, name).cpu(), getattr(want, name)) for name in names)


def _attention(device: torch.device) -> bool:
    """A few rows and many of a sequence: a GPU splits the context of the one and the rows of the other."""
    return all(_attends(device, tokens, rows) for tokens, rows in ((37, 3), (300, 1), (150, 90)))


def _attends(device: torch.device, tokens: int, rows: int) -> bool:
    heads = rope.Heads(
        q=_int8(tokens, 4, 64, seed=13),
        s_q=pattern(tokens, 4, seed=14).abs(),
        k=_int8(tokens, 2, 64, seed=15),
        s_k=pattern(tokens, 2, seed=16).abs(),
        v=torch.full((tokens, 2, 64), 127, dtype=torch.int8),
        s_v=pattern(tokens, 2, seed=17).abs(),
    )
    there = rope.Heads(**{name: getattr(heads, name).to(device) for name in ("q", "s_q", "k", "s_k", "v", "s_v")})
    kept = cache.alone(layers=1, kv_heads=2, head_dim=64, capacity=tokens, device=device)
    kept.append(0, there, 0, tokens, 0)
    first = tokens - rows
    q, s_q = heads.q[first:], heads.s_q[first:]
    span = attention.Span(cache=kept, start=0, end=rows, position=first)
    got = attention.attend(there.q[first:].contiguous(), there.s_q[first:].contiguous(), [span], layer=0)
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
        if not torch.equal(got.cpu().reshape(rows, 4, 64)[:, head], want):
            return False
    return True


def _activation(device: torch.device) -> bool:
    x = pattern(70, 2 * 192, seed=18, scale=100.0)
    few = activation.swiglu_quantise(x[:3].to(device), 64)
    return _same(few, activation.reference(x[:3], 64)) and _same(
        activation.swiglu_quantise(x.to(device), 64), activation.reference(x, 64)
    )


def _sampler(device: torch.device) -> bool:
    logits = pattern(2, 3000, seed=19, scale=20.0)
    filters = {"top_k": 500, "top_p_20bit": 990_000, "min_p_20bit": 200, "seed": 2**63}
    penalties = {"repetition": ieee.f32(1.2), "presence": 0.5, "frequency": 0.25, "logit_bias": {7: 1.5}}
    params = (
        sampling.SamplerParams(temperature=ieee.f32(0.7), **filters),  # type: ignore[arg-type]
        sampling.SamplerParams(temperature=0.0, **penalties),  # type: ignore[arg-type]
    )
    histories = (sampling.History(), sampling.History(prompt=(1, 2, 2999), output=(2, 5, 5)))
    adjusted = [sampling.adjust(row, p, h) for row, p, h in zip(logits, params, histories, strict=True)]
    want = [sampling.reference(row, p, at) for row, p, at in zip(adjusted, params, (5, 6), strict=True)]
    return sampling.sample(logits.to(device), params, (5, 6), histories) == want


def _fingerprint(device: torch.device) -> bool:
    logits = pattern(2, 1000, seed=20)
    return torch.equal(fingerprint.fingerprint(logits.to(device), 999).cpu(), fingerprint.reference(logits, 999))


def _logprobs(device: torch.device) -> bool:
    logits = ieee.rint(pattern(2, 3000, seed=21, scale=20.0) * 4.0)  # ties
    return logprobs.likely(logits.to(device), 5) == [logprobs.decode(x) for x in logprobs.reference(logits, 5).tolist()]


def _errors(device: torch.device) -> bool:
    """What is not finite is reported."""
    x = pattern(3, 100, seed=22)
    x[1, 99] = float("nan")
    try:
        quantise.quantise(x.to(device))
        if device.type == "cuda":
            gpu("flags").raise_pending(device)
    except ieee.NumericsError as err:
        return err.code == "numerics.not_finite"
    return False


_CASES: dict[str, Callable[[torch.device], bool]] = {
    "norm": _norm,
    "quantise": _quantise,
    "linear": _linear,
    "rope": _rope,
    "attention": _attention,
    "activation": _activation,
    "sampler": _sampler,
    "fingerprint": _fingerprint,
    "logprobs": _logprobs,
    "errors": _errors,
}


def ops_match_references(device: torch.device = CPU) -> list[str]:
    """Returns the ops compared; raises NumericsError `numerics.self_test` with the first that differs.

    On a GPU it waits for the device, and nobody else's work must be under way there.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _compared(device)
    return _compared(device)


def _compared(device: torch.device) -> list[str]:
    for name, matches in _CASES.items():
        ok = matches(device)
        if device.type == "cuda":
            gpu("flags").raise_pending(device)
        if not ok:
            raise ieee.NumericsError(
                f"{name} on {device.type}: expected its reference's bits, got others", code="numerics.self_test"
            )
    return list(_CASES)
