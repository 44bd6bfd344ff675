"""Digests of every op's bits on inputs made without a library generator: a changed bit means a new profile id.

The digests lie in tests/data/golden, one file a profile. A new profile gets a new file; a file is never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import BACKENDS, EPS, on
from torch import Tensor

from countermark_kernels import PROFILE, activation, attention, fingerprint, ieee, linear, norm, quantise, rope, sampler
from countermark_kernels.cache import alone
from countermark_kernels.selftest import pattern


def _int8(*shape: int, seed: int) -> Tensor:
    return ieee.rint(pattern(*shape, seed=seed, scale=127.0)).to(torch.int8)


def _rope() -> tuple[Tensor, ...]:
    angle = pattern(8, 64, seed=30)
    positions = torch.tensor([7, 0, 3], dtype=torch.int32)
    gain = pattern(128, seed=31)
    heads = rope.rope_quantise(
        pattern(3, 4 * 128, seed=32),
        positions,
        angle,
        -angle,
        heads=2,
        kv_heads=1,
        head_dim=128,
        q_gain=gain,
        k_gain=gain,
        eps=EPS,
    )
    return heads.q, heads.s_q, heads.k, heads.s_k, heads.v, heads.s_v


def _attention() -> tuple[Tensor, ...]:
    heads = rope.Heads(
        q=_int8(41, 4, 64, seed=33),
        s_q=pattern(41, 4, seed=34).abs(),
        k=_int8(41, 2, 64, seed=35),
        s_k=pattern(41, 2, seed=36).abs(),
        v=_int8(41, 2, 64, seed=37),
        s_v=pattern(41, 2, seed=38).abs(),
    )
    cache = alone(layers=1, kv_heads=2, head_dim=64, capacity=41)
    cache.append(0, heads, 0, 41, 0)
    return (attention.attend(heads.q, heads.s_q, [attention.Span(cache=cache, start=0, end=41, position=0)], layer=0),)


def _long_attention() -> tuple[Tensor, ...]:
    """The last rows of 1,500 tokens: enough weights that one rounding more or less shows."""
    tokens, rows = 1500, 16
    heads = rope.Heads(
        q=_int8(tokens, 2, 128, seed=50),
        s_q=pattern(tokens, 2, seed=51).abs(),
        k=_int8(tokens, 1, 128, seed=52),
        s_k=pattern(tokens, 1, seed=53, scale=1.0).abs(),
        v=_int8(tokens, 1, 128, seed=54),
        s_v=pattern(tokens, 1, seed=55).abs(),
    )
    cache = alone(layers=1, kv_heads=1, head_dim=128, capacity=tokens)
    cache.append(0, heads, 0, tokens, 0)
    first = tokens - rows
    span = attention.Span(cache=cache, start=0, end=rows, position=first)
    return (attention.attend(heads.q[first:].contiguous(), heads.s_q[first:].contiguous(), [span], layer=0),)


def _linear() -> tuple[Tensor, ...]:
    weight = linear.prepare(_int8(50, 1100, seed=39), pattern(50, seed=40))
    q, s = _int8(9, 1100, seed=41), pattern(9, seed=42)
    return (linear.linear(q, s, weight, bias=pattern(50, seed=43), residual=pattern(9, 50, seed=44)),)


def _sampler() -> tuple[Tensor, ...]:
    logits = pattern(64, 2000, seed=45, scale=30.0)
    params = [
        sampler.SamplerParams(
            temperature=ieee.f32(0.25 + 0.125 * (i % 8)), top_k=(i % 3) * 40, top_p_20bit=(1 << 20) - i * 9000, seed=i
        )
        for i in range(64)
    ]
    return (torch.tensor(sampler.sample(logits, params, list(range(64)), [sampler.History()] * 64)),)


OPS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "quantise": lambda: quantise.quantise(pattern(9, 333, seed=46)),
    "norm": lambda: norm.norm_quantise(pattern(9, 333, seed=47), EPS),
    "linear": _linear,
    "rope": _rope,
    "attention": _attention,
    "attention over many tokens": _long_attention,
    "activation": lambda: activation.swiglu_quantise(pattern(9, 768, seed=48, scale=90.0), 128),
    "sampler": _sampler,
    "fingerprint": lambda: (fingerprint.fingerprint(pattern(3, 999, seed=49), 998),),
}
DIGESTS = json.loads((Path(__file__).parents[1] / "data" / "golden" / f"{PROFILE}.json").read_text())


def test_every_op_has_a_digest() -> None:
    assert DIGESTS["profile"] == PROFILE
    assert set(DIGESTS["ops"]) == set(OPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_bits_have_not_changed(name: str, backend: str) -> None:
    digest = hashlib.sha256()
    with on(backend):
        for tensor in OPS[name]():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:32] == DIGESTS["ops"][name]
