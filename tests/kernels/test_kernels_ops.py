"""Each op: close to an independent binary64 computation, and the same bits on every back end."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BACKENDS, EPS, floats, hadamard_matrix, int8s, on, rope_tables, scales
from torch import Tensor

from countermark_kernels import activation, attention, hadamard, ieee, linear, norm, quantise, rope
from countermark_kernels.cache import alone

backends = pytest.mark.parametrize("backend", BACKENDS)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("width", [1, 7, 8, 64, 100, 576, 1536])
def test_quantise(backend: str, width: int) -> None:
    x = floats(9, width, seed=width)
    x[3] = 0.0
    x[4] *= 2.0**-120
    x[5] *= 2.0**90
    with on(backend):
        q, s = quantise.quantise(x)
    same((q, s), quantise.reference(x))
    error = (q.to(torch.float64) * s.to(torch.float64).unsqueeze(1) - x.to(torch.float64)).abs()
    amax = x.abs().amax(dim=1, keepdim=True).to(torch.float64)
    assert bool((error <= amax / 254 * 1.0001 + 2.0**-100).all())
    assert q.min() >= -127
    assert s[3] == 0.0 == s[4]


@backends
@pytest.mark.parametrize("width", [8, 100, 576, 4096])
def test_norm_quantise(backend: str, width: int) -> None:
    x = floats(9, width, seed=width, scale=3.0)
    x[3] = 0.0
    x[5] *= 2.0**-60
    x[6] *= 2.0**50
    with on(backend):
        q, s = norm.norm_quantise(x, EPS)
    same((q, s), norm.reference(x, EPS))
    wide = x.to(torch.float64)
    want = wide / torch.sqrt((wide * wide).mean(dim=1, keepdim=True) + EPS)
    got = q.to(torch.float64) * s.to(torch.float64).unsqueeze(1)
    assert bool(((got - want).abs() <= want.abs().amax(dim=1, keepdim=True) / 250 + 1e-30).all())


@backends
def test_norm_out_of_range(backend: str) -> None:
    x = torch.full((2, 64), 2.0**70)
    with on(backend), pytest.raises(ieee.NumericsError) as caught:
        norm.norm_quantise(x, EPS)
    assert caught.value.code == "numerics.range"


@backends
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4), (37, 67), (70, 1500), (33, 2049)])
def test_linear(backend: str, rows: int, outputs: int, inputs: int) -> None:
    q, w = int8s(rows, inputs, seed=1), int8s(outputs, inputs, seed=2)
    s, ws = scales(rows, seed=3), scales(outputs, seed=4)
    bias, residual = floats(outputs, seed=5), floats(rows, outputs, seed=6)
    with on(backend):
        weight = linear.prepare(w, ws)
        plain = linear.linear(q, s, weight)
        full = linear.linear(q, s, weight, bias=bias, residual=residual)
    assert torch.equal(plain, linear.reference(q, s, w, ws))
    assert torch.equal(full, linear.reference(q, s, w, ws, bias=bias, residual=residual))
    exact = (q.to(torch.float64) * s.to(torch.float64).unsqueeze(1)) @ (w.to(torch.float64) * ws.unsqueeze(1)).T
    assert torch.allclose(full.to(torch.float64), exact + bias + residual, rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("signs", [(127, 127), (127, -127), (-127, -127)])
def test_linear_at_the_extremes(backend: str, signs: tuple[int, int]) -> None:
    inputs = 32768
    q = torch.full((4, inputs), signs[0], dtype=torch.int8)
    w = torch.full((16, inputs), signs[1], dtype=torch.int8)
    one = torch.ones(16)
    with on(backend):
        y = linear.linear(q, one[:4].contiguous(), linear.prepare(w, one))
    assert bool((y == float(inputs * signs[0] * signs[1])).all())


def test_linear_through_int_mm() -> None:
    q, w, s, ws = int8s(3, 64, seed=1), int8s(20, 64, seed=2), scales(3, seed=3), scales(20, seed=4)
    assert linear._int_mm_is_exact(20, 64)
    weight = linear.Weight(outputs=20, inputs=64, scale=ws, transposed=w.T.clone())
    assert torch.equal(linear.linear(q, s, weight), linear.reference(q, s, w, ws))


def test_prepare_refuses_minus_128() -> None:
    w = int8s(16, 16, seed=1)
    w[3, 4] = -128
    with pytest.raises(ValueError, match="-128"):
        linear.prepare(w, scales(16, seed=2))


def test_hadamard_is_the_matrix() -> None:
    for block in (1, 2, 8, 64, 512):
        x = floats(3, 512, seed=block).to(torch.float64)
        want = (x.reshape(3, -1, block) @ hadamard_matrix(block)).reshape(3, 512)
        assert torch.allclose(hadamard.reference(x, block), want)
    sizes = {1536: 512, 9728: 512, 12288: 512, 14336: 512, 18944: 512, 4864: 256, 8960: 256, 11008: 256}
    assert {width: hadamard.block_size(width) for width in sizes} == sizes


@backends
@pytest.mark.parametrize(("width", "block"), [(12, 4), (16, 16), (96, 32), (320, 64), (384, 128), (1536, 512)])
def test_swiglu(backend: str, width: int, block: int) -> None:
    gate_up = floats(7, 2 * width, seed=width, scale=4.0)
    gate_up[0, 0], gate_up[0, 1] = 200.0, -200.0
    with on(backend):
        q, s = activation.swiglu_quantise(gate_up, block)
    same((q, s), activation.reference(gate_up, block))
    gate, up = gate_up.to(torch.float64).chunk(2, dim=1)
    product = gate / (1 + torch.exp(-gate)) * up
    want = (product.reshape(7, -1, block) @ hadamard_matrix(block)).reshape(7, width)
    got = q.to(torch.float64) * s.to(torch.float64).unsqueeze(1)
    bound = want.abs().amax(dim=1, keepdim=True) / 250 + want.abs() * 2.0**-8  # int8 and bfloat16
    assert bool(((got - want).abs() <= bound).all())


@backends
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("gained", [False, True])
def test_rope(backend: str, head_dim: int, gained: bool) -> None:
    heads, kv_heads, rows = 4, 2, 11
    qkv = floats(rows, (heads + 2 * kv_heads) * head_dim, seed=head_dim)
    qkv[2, :head_dim] = 0.0
    cos, sin = rope_tables(500, head_dim)
    positions = torch.arange(490, 490 - rows, -1, dtype=torch.int32)
    gains = {"q_gain": scales(head_dim, seed=1, scale=1.0), "k_gain": scales(head_dim, seed=2, scale=1.0)}
    chosen = {**(gains if gained else {"q_gain": None, "k_gain": None}), "eps": EPS}
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    with on(backend):
        got = rope.rope_quantise(qkv, positions, cos, sin, **shape, **chosen)
    want = rope.reference(qkv, positions, cos, sin, **shape, **chosen)
    for name in ("q", "s_q", "k", "s_k", "v", "s_v"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    x = qkv.to(torch.float64).reshape(rows, -1, head_dim)
    for part, gain, q, s in (
        (x[:, :heads], gains["q_gain"], got.q, got.s_q),
        (x[:, heads : heads + kv_heads], gains["k_gain"], got.k, got.s_k),
    ):
        y = part / torch.sqrt((part * part).mean(dim=-1, keepdim=True) + EPS) * gain if gained else part
        turned = torch.complex(*y.chunk(2, dim=-1)) * torch.polar(
            torch.ones(rows, 1, 1, dtype=torch.float64), _angles(positions, head_dim)
        )
        y = torch.cat((turned.real, turned.imag), dim=-1) @ hadamard_matrix(head_dim)
        error = (q.to(torch.float64) * s.to(torch.float64).unsqueeze(-1) - y).abs()
        assert bool((error <= y.abs().amax(dim=-1, keepdim=True) / 250 + 1e-9).all())


def _angles(positions: Tensor, head_dim: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (positions.to(torch.float64).unsqueeze(1) * frequency).unsqueeze(1)


@backends
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (128, 8, 1), (64, 2, 2)])
def test_attention(backend: str, head_dim: int, heads: int, kv_heads: int) -> None:
    tokens = 75
    made = _heads(tokens, heads, kv_heads, head_dim)
    with on(backend):
        cache = alone(layers=2, kv_heads=kv_heads, head_dim=head_dim, capacity=tokens)
        cache.append(1, made, 0, tokens, 0)
        span = attention.Span(cache=cache, start=0, end=tokens, position=0)
        got = attention.attend(made.q, made.s_q, [span], layer=1).reshape(tokens, heads, head_dim)
    assert torch.equal(cache.keys(1, 0, tokens), made.k[:, 0])
    assert torch.equal(cache.values(1, 0, tokens), made.v[:, 0])
    for head in range(heads):
        kv = head * kv_heads // heads
        arguments = {"k": made.k[:, kv], "s_k": made.s_k[:, kv], "v": made.v[:, kv], "s_v": made.s_v[:, kv]}
        want = attention.reference(made.q[:, head], made.s_q[:, head], torch.arange(tokens), **arguments)
        assert torch.equal(got[:, head], want)
        q, k, v = (
            x[:, i].to(torch.float64) * s[:, i].to(torch.float64).unsqueeze(1)
            for x, s, i in ((made.q, made.s_q, head), (made.k, made.s_k, kv), (made.v, made.s_v, kv))
        )
        score = (q @ k.T) / (head_dim * math.sqrt(head_dim))
        score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        soft = torch.softmax(score, dim=1) @ v
        assert torch.allclose(want.to(torch.float64), soft, atol=float(v.abs().max()) * 1e-3)


def _heads(tokens: int, heads: int, kv_heads: int, head_dim: int) -> rope.Heads:
    return rope.Heads(
        q=int8s(tokens, heads, head_dim, seed=1),
        s_q=scales(tokens, heads, seed=2, scale=0.5),
        k=int8s(tokens, kv_heads, head_dim, seed=3),
        s_k=scales(tokens, kv_heads, seed=4, scale=0.5),
        v=int8s(tokens, kv_heads, head_dim, seed=5),
        s_v=scales(tokens, kv_heads, seed=6),
    )


@backends
def test_attention_with_uneven_and_zero_values(backend: str) -> None:
    """Scales over forty powers of two, tokens whose value or key is zero, and all weight on one extreme value."""
    tokens = 2100
    made = _heads(tokens, 2, 1, 64)
    spread = 2.0 ** (torch.arange(tokens) % 41 - 20).to(torch.float32)
    s_v = (made.s_v * spread.unsqueeze(1)).contiguous()
    s_v[5], s_v[6] = 0.0, 2.0**-100
    v = made.v.clone()
    v[1000:] = 127
    made = rope.Heads(q=made.q, s_q=made.s_q, k=made.k, s_k=made.s_k, v=v, s_v=s_v)
    for s_k in (made.s_k, torch.zeros_like(made.s_k)):
        with on(backend):
            cache = alone(layers=1, kv_heads=1, head_dim=64, capacity=tokens)
            filled = rope.Heads(q=made.q, s_q=made.s_q, k=made.k, s_k=s_k, v=v, s_v=s_v)
            cache.append(0, filled, 0, tokens, 0)
            last = slice(tokens - 3, tokens)
            span = attention.Span(cache=cache, start=0, end=3, position=tokens - 3)
            got = attention.attend(made.q[last].contiguous(), made.s_q[last].contiguous(), [span], layer=0)
        for head in range(2):
            want = attention.reference(
                made.q[last, head],
                made.s_q[last, head],
                torch.arange(tokens - 3, tokens),
                k=made.k[:, 0],
                s_k=s_k[:, 0],
                v=v[:, 0],
                s_v=s_v[:, 0],
            )
            assert torch.equal(got.reshape(3, 2, 64)[:, head], want)


@backends
def test_attention_refuses_overflow(backend: str) -> None:
    made = _heads(4, 2, 1, 64)
    huge = rope.Heads(q=made.q, s_q=made.s_q * 2.0**100, k=made.k, s_k=made.s_k * 2.0**100, v=made.v, s_v=made.s_v)
    with on(backend):
        cache = alone(layers=1, kv_heads=1, head_dim=64, capacity=4)
        cache.append(0, huge, 0, 4, 0)
        span = attention.Span(cache=cache, start=0, end=4, position=0)
        with pytest.raises(ieee.NumericsError) as caught:
            attention.attend(huge.q, huge.s_q, [span], layer=0)
    assert caught.value.code == "numerics.range"


@backends
@pytest.mark.parametrize("part", [0, 4, 6])
@pytest.mark.parametrize(("magnitude", "refused"), [(2.0**30, True), (2.0**30 - 64.0, False)])
def test_heads_are_bounded(backend: str, part: int, magnitude: float, refused: bool) -> None:
    """One query head, key head and value head, at position 0: no rotation, and H_64 of equal values sums them."""
    qkv = torch.zeros(1, 8 * 64)
    qkv[0, part * 64 : part * 64 + 64] = magnitude if part == 6 else magnitude / 64
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    with on(backend):
        code = ""
        try:
            rope.rope_quantise(qkv, torch.zeros(1, dtype=torch.int32), cos, sin, heads=4, kv_heads=2, head_dim=64)
        except ieee.NumericsError as err:
            code = err.code
    assert code == ("numerics.range" if refused else "")


def test_score_constants() -> None:
    for head_dim, constant in attention.SCORE_CONSTANTS.items():
        assert constant == ieee.f32(math.log2(math.e) / (head_dim * math.sqrt(head_dim)))


@backends
def test_swiglu_sees_every_nan(backend: str) -> None:
    """The pattern that rounding to bfloat16 carries over into a zero."""
    x = floats(2, 16, seed=1)
    x.view(torch.int32)[1, 9] = 0x7FFFFFFF
    with on(backend), pytest.raises(ieee.NumericsError) as caught:
        activation.swiglu_quantise(x, 1)
    assert caught.value.code == "numerics.not_finite"


@backends
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_not_finite_is_an_error_everywhere(backend: str, bad: float) -> None:
    cos, sin = rope_tables(4, 64)
    x = floats(3, 256, seed=1)
    x[1, 77] = bad
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64}
    positions = torch.zeros(3, dtype=torch.int32)
    gain = {"q_gain": torch.ones(64), "k_gain": torch.ones(64), "eps": EPS}
    calls = (
        lambda: quantise.quantise(x),
        lambda: norm.norm_quantise(x, EPS),
        lambda: activation.swiglu_quantise(x, 128),
        lambda: activation.swiglu_quantise(x, 1),
        lambda: rope.rope_quantise(x, positions, cos, sin, **shape),
        lambda: rope.rope_quantise(x, positions, cos, sin, **shape, **gain),
    )
    with on(backend):
        for call in calls:
            with pytest.raises(ieee.NumericsError) as caught:
                call()
            assert caught.value.code == "numerics.not_finite"


def test_wrong_arguments_are_refused() -> None:
    x = floats(4, 64, seed=1)
    for wrong in (x.to(torch.float64), x.T, x[0], x.to(torch.int32)):
        with pytest.raises(ValueError, match="x: expected"):
            quantise.quantise(wrong)
    cos, sin = rope_tables(4, 64)
    with pytest.raises(ValueError, match="positions"):
        rope.rope_quantise(
            floats(1, 256, seed=1), torch.tensor([4], dtype=torch.int32), cos, sin, heads=2, kv_heads=1, head_dim=64
        )
    with pytest.raises(ValueError, match="head_dim"):
        rope.rope_quantise(
            floats(1, 384, seed=1), torch.tensor([0], dtype=torch.int32), cos, sin, heads=2, kv_heads=1, head_dim=96
        )
