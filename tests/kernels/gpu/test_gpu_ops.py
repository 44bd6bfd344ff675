"""Element-wise ops in Triton: every bit of the CPU's reference, at odd widths and values; errors through the flags."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gpu_cases import CUDA, DEVICE
from kernel_cases import EPS, floats, rope_tables, scales
from torch import Tensor

from countermark_kernels import activation, fingerprint, hadamard, ieee, norm, quantise, rope
from countermark_kernels.gpu import activation as gpu_activation
from countermark_kernels.gpu import cache, flags
from countermark_kernels.gpu import fingerprint as gpu_fingerprint
from countermark_kernels.gpu import norm as gpu_norm
from countermark_kernels.gpu import quantise as gpu_quantise
from countermark_kernels.gpu import rope as gpu_rope

ROWS = 300 if CUDA else 7
WIDTHS = (1, 7, 100, 576, 4096, 5120, 32768) if CUDA else (1, 7, 100, 576)
HALVES = ((12, 4), (16, 16), (96, 32), (1536, 512), (4608, 512))
HALVES = (*HALVES, (12288, 512), (8960, 256), (18944, 512)) if CUDA else HALVES


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


def odd_rows(rows: int, width: int, *, largest: float) -> Tensor:
    """Rows of every kind: zero, below 2^-100, exactly 2^-100, subnormal, alternating, near `largest`."""
    x = floats(max(rows, 7), width, seed=width, scale=3.0)
    x[0] = 0.0
    x[1] = 2.0**-101
    x[2] = 2.0**-100
    x[3] = torch.arange(1, width + 1, dtype=torch.int32).view(torch.float32)
    x[4] = torch.where(torch.arange(width) % 2 == 0, largest, -largest)
    x[5, -1] = -largest
    x[6] = 0.5 * 2.0**20  # every product a tie of the rounding, or next to one
    x[6, 0] = 127.0 * 2.0**20
    return x


@pytest.mark.parametrize("width", WIDTHS)
def test_quantise(width: int) -> None:
    x = odd_rows(ROWS, width, largest=1.5 * 2.0**127)
    same(gpu_quantise.quantise(x.to(DEVICE)), quantise.reference(x))
    same(gpu_quantise.quantise(x[3:4].to(DEVICE)), quantise.reference(x[3:4]))
    flags.raise_pending(DEVICE)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_quantise(width: int) -> None:
    x = odd_rows(ROWS, width, largest=2.0**60)
    same(gpu_norm.norm_quantise(x.to(DEVICE), EPS), norm.reference(x, EPS))
    flags.raise_pending(DEVICE)


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize(("width", "block"), HALVES)
def test_swiglu(width: int, block: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: a program a row, and several."""
    monkeypatch.setattr(gpu_activation, "FEW", few)
    gate_up = floats(60 if CUDA and few else ROWS, 2 * width, seed=width, scale=4.0)
    gate_up[0] = 0.0
    gate_up[1] *= 2.0**-60
    gate_up[2, :3] = torch.tensor([200.0, -200.0, 87.5])
    gate_up[3] *= 2.0**45
    for _ in range(5 if CUDA else 1):
        same(gpu_activation.swiglu_quantise(gate_up.to(DEVICE), block), activation.reference(gate_up, block))
    flags.raise_pending(DEVICE)
    assert not gpu_activation._words(DEVICE).any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 700] if CUDA else [1, 3])
def test_rope(head_dim: int, gained: bool, rows: int) -> None:
    heads, kv_heads = (32, 8) if CUDA else (3, 1)
    qkv = floats(rows, (heads + 2 * kv_heads) * head_dim, seed=head_dim)
    qkv[0, :head_dim] = 0.0
    qkv[-1, head_dim : 2 * head_dim] *= 2.0**-103
    cos, sin = rope_tables(800, head_dim)
    positions = torch.arange(799, 799 - rows, -1, dtype=torch.int32)
    gains = (scales(head_dim, seed=1, scale=1.0), scales(head_dim, seed=2, scale=1.0)) if gained else (None, None)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "eps": EPS}
    want = rope.reference(qkv, positions, cos, sin, q_gain=gains[0], k_gain=gains[1], **shape)
    there = [x if x is None else x.to(DEVICE) for x in (qkv, positions, cos, sin, *gains)]
    got = gpu_rope.dense(*there[:4], q_gain=there[4], k_gain=there[5], **shape)
    same(got, (want.q, want.s_q, want.k, want.s_k, want.v, want.s_v))
    flags.raise_pending(DEVICE)


@pytest.mark.parametrize("few", [0, 32])
def test_rope_writes_into_a_paged_pool(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two sequences land in the pages their slots name; no other byte of the pool changes."""
    monkeypatch.setattr(gpu_rope, "FEW", few)
    heads, kv_heads, d, page, pages = 2, 2, 64, cache.BLOCK, 3
    qkv = floats(20, (heads + 2 * kv_heads) * d, seed=8)
    cos, sin = rope_tables(64, d)
    positions = torch.arange(20, dtype=torch.int32)
    slots = torch.cat((torch.arange(13) + 2 * page - 5, torch.arange(7) + 1)).to(torch.int64)
    pool = [
        torch.full((pages, kv_heads, page, d), 99, dtype=torch.int8),
        torch.full((pages, kv_heads, page), 9.0),
        torch.full((pages, kv_heads, d, page), 99, dtype=torch.int8),
        torch.full((pages, kv_heads, page), 9.0),
    ]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, "q_gain": None, "k_gain": None, "eps": 0.0}
    want = rope.reference(qkv, positions, cos, sin, **shape)
    expected = [x.clone() for x in pool]
    block, token = slots.long() // page, slots.long() % page
    expected[0][block, :, token], expected[1][block, :, token] = want.k, want.s_k
    column = token.clone()
    for i in range(20):  # cache.value_slot: of the last four bits wttb, ttwb
        last = int(token[i]) % 16
        column[i] += (last & 6) * 2 + (last >> 3) * 2 + (last & 1) - last
    expected[2][block, :, :, column], expected[3][block, :, token] = want.v, want.s_v
    there = tuple(x.to(DEVICE) for x in pool)
    inputs = (x.to(DEVICE) for x in (qkv, positions, cos, sin))
    q = gpu_rope.rope_quantise(*inputs, **shape, slots=slots.to(DEVICE), pool=there, page=page)
    same((*q, *there), (want.q, want.s_q, *expected))


@pytest.mark.parametrize(("width", "vocab"), [(1, 1), (5003, 5003), (5003, 5000), (2048, 2048)])
def test_fingerprint(width: int, vocab: int) -> None:
    logits = floats(3, width, seed=width)
    logits[1] = -0.0
    got = gpu_fingerprint.fingerprint(logits.to(DEVICE), vocab)
    assert torch.equal(got.cpu(), fingerprint.reference(logits, vocab))


def _heads(x: Tensor) -> None:
    cos, sin = rope_tables(8, 64)
    positions = torch.zeros(x.shape[0], dtype=torch.int32)
    there = (t.to(DEVICE) for t in (x, positions, cos, sin))
    gpu_rope.dense(*there, heads=1, kv_heads=1, head_dim=64, q_gain=None, k_gain=None, eps=0.0)


OPS: dict[str, Callable[[Tensor], object]] = {
    "quantise": lambda x: gpu_quantise.quantise(x.to(DEVICE)),
    "norm": lambda x: gpu_norm.norm_quantise(x.to(DEVICE), EPS),
    "swiglu": lambda x: gpu_activation.swiglu_quantise(x.to(DEVICE), 32),
    "rope": _heads,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, "all ones"])
@pytest.mark.parametrize("place", [3, 64 + 7, 2 * 64 + 63])
def test_what_is_not_finite_is_reported(op: str, bad: float | str, place: int) -> None:
    x = floats(4, 192, seed=1)
    x[2, place] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32) if isinstance(bad, str) else bad
    OPS[op](x)
    with pytest.raises(ieee.NumericsError) as caught:
        flags.raise_pending(DEVICE)
    assert caught.value.code == "numerics.not_finite"
    OPS[op](floats(4, 192, seed=1))
    flags.raise_pending(DEVICE)


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_error_leaves_finite_scales(bad: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's next sequence multiplies what lies past its own tokens by zero."""
    monkeypatch.setattr(gpu_rope, "FEW", few)
    cos, sin = rope_tables(8, 64)
    positions = torch.zeros(2, dtype=torch.int32)
    there = (t.to(DEVICE) for t in (torch.full((2, 192), bad), positions, cos, sin))
    found = gpu_rope.dense(*there, heads=1, kv_heads=1, head_dim=64, q_gain=None, k_gain=None, eps=0.0)
    with pytest.raises(ieee.NumericsError):
        flags.raise_pending(DEVICE)
    assert all(torch.isfinite(scale).all() for scale in found[1::2])


def _beyond_bfloat16() -> Tensor:
    """silu(64) = 64, so that the product is a binary32 number that rounds to infinity."""
    x = torch.zeros(2, 192)
    x[1, 0], x[1, 96] = 64.0, (2.0 - 2.0**-10) * 2.0**121
    return x


@pytest.mark.parametrize(
    ("op", "x", "code"),
    [
        ("norm", torch.full((2, 192), 2.0**70), "range"),
        ("swiglu", torch.full((2, 192), 2.0**90), "not_finite"),
        ("swiglu", _beyond_bfloat16(), "not_finite"),
        ("rope", torch.full((2, 192), 2.0**127), "not_finite"),
        ("rope", torch.full((2, 192), 1.0).index_fill(1, torch.tensor([130]), 2.0**30), "range"),
        ("rope", torch.full((2, 192), 1.0).index_fill(1, torch.tensor([70]), 2.0**30), "range"),
    ],
    ids=range(6),
)
def test_out_of_range_is_reported(op: str, x: Tensor, code: str) -> None:
    OPS[op](x)
    with pytest.raises(ieee.NumericsError) as caught:
        flags.raise_pending(DEVICE)
    assert caught.value.code == f"numerics.{code}"


def test_a_position_outside_the_tables_is_reported() -> None:
    cos, sin = (x.to(DEVICE) for x in rope_tables(8, 64))
    for position in (-1, 8):
        positions = torch.full((2,), position, dtype=torch.int32, device=DEVICE)
        shape = {"heads": 1, "kv_heads": 1, "head_dim": 64, "q_gain": None, "k_gain": None, "eps": 0.0}
        gpu_rope.dense(floats(2, 192, seed=1).to(DEVICE), positions, cos, sin, **shape)
        with pytest.raises(ieee.NumericsError) as caught:
            flags.raise_pending(DEVICE)
        assert caught.value.code == "numerics.range"


def test_no_rows() -> None:
    none = torch.empty(0, 64, device=DEVICE)
    assert gpu_quantise.quantise(none)[0].shape == (0, 64)
    assert gpu_norm.norm_quantise(none, EPS)[1].shape == (0,)
    assert gpu_activation.swiglu_quantise(none, 32)[0].shape == (0, 32)
    assert gpu_fingerprint.fingerprint(none, 60).shape == (0, 2)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_wrappers_take_cuda_tensors() -> None:
    x = floats(5, 256, seed=1)
    there = x.to(DEVICE)
    same(quantise.quantise(there), quantise.reference(x))
    same(norm.norm_quantise(there, EPS), norm.reference(x, EPS))
    same(activation.swiglu_quantise(there, hadamard.block_size(128)), activation.reference(x, 128))
    assert torch.equal(fingerprint.fingerprint(there, 250).cpu(), fingerprint.reference(x, 250))
    with pytest.raises(ValueError, match="cos"):
        rope.rope_quantise(
            there,
            torch.zeros(5, dtype=torch.int32, device=DEVICE),
            *rope_tables(8, 64),
            heads=2,
            kv_heads=1,
            head_dim=64,
        )
