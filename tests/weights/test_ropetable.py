"""RoPE tables against mpmath, and against what transformers computes."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from tinymodels import config_of
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from countermark_appliance.engine.weights import ropetable
from countermark_appliance.engine.weights.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    SourceInfo,
    rotation_for,
)
from countermark_kernels import PROFILE

CONFIG = ModelConfig(
    profile=PROFILE, name="t", architecture="llama", hidden=64, layers=1, heads=1, kv_heads=1, head_dim=128,
    intermediate=64, vocab=8, context=5000, rms_eps=2.0**-20, rope_theta=500_000.0, rope_scaling=None, qk_norm=False,
    attention_bias=False, hadamard_block=64, rotation=rotation_for(64), bos_id=None, eos_ids=(2,), add_bos=False,
    source=SourceInfo(format="gguf", name="t", sha256=bytes(32)),
)  # fmt: skip
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=1024)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in binary32 steps between tensors of equal signs."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", [None, SCALING, LinearScaling(factor=2.5)])
def test_frequencies_are_those_of_transformers_within_rounding(scaling: RopeScaling | None, head_dim: int) -> None:
    rope = {"rope_type": "default", "rope_theta": CONFIG.rope_theta}
    if isinstance(scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    theirs = LlamaRotaryEmbedding(config_of("llama", head_dim=head_dim, rope_parameters=rope)).inv_freq
    ours = ropetable.inverse_frequencies(head_dim, CONFIG.rope_theta, scaling)
    assert ulps(ours, theirs) <= (8 if isinstance(scaling, Llama3Scaling) else 2)
    changed = ours != ropetable.inverse_frequencies(head_dim, CONFIG.rope_theta, None)
    assert bool(changed.any()) == (scaling is not None)
    assert bool(changed.all()) == isinstance(scaling, LinearScaling)


def true_frequencies(head_dim: int, scaling: RopeScaling | None) -> list[mpmath.mpf]:
    """In 200 bits, from the definitions: linear interpolation, and Llama 3's between wavelengths."""
    plain = [mpmath.mpf(CONFIG.rope_theta) ** (mpmath.mpf(-2 * i) / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return [f / mpmath.mpf(scaling.factor) for f in plain]
    found = []
    for f in plain:
        turns = scaling.original_context * f / (2 * mpmath.pi)  # over the original context
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = min(max((turns - scaling.low_freq_factor) / span, 0), 1)
        found.append(kept * f + (1 - kept) * f / scaling.factor)
    return found


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", [None, SCALING, LinearScaling(factor=2.5), LinearScaling(factor=8.0)])
def test_frequencies_are_the_true_ones_within_rounding(scaling: RopeScaling | None, head_dim: int) -> None:
    """RN32(theta^e), its reciprocal and the scaling: two roundings, with `linear` three, with `llama3` up to nine."""
    ours = ropetable.inverse_frequencies(head_dim, CONFIG.rope_theta, scaling)
    with mpmath.workprec(200):
        for found, true in zip(ours.tolist(), true_frequencies(head_dim, scaling), strict=True):
            assert abs(mpmath.mpf(found) / true - 1) < (9 if isinstance(scaling, Llama3Scaling) else 3) * 2.0**-24


def test_frequencies_are_correctly_rounded_step_by_step() -> None:
    found = ropetable.inverse_frequencies(64, 100_000.0, None)
    with mpmath.workprec(200):
        powers = [np.float32(mpmath.nstr(mpmath.mpf(100_000) ** (mpmath.mpf(i) / 32), 30)) for i in range(32)]
    assert found.tolist() == [float(np.float32(1) / p) for p in powers]


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_entries_are_the_nearest_binary32(which: str) -> None:
    table = torch.cat(list(ropetable.table_rows(CONFIG, which, rows=999)))
    assert table.shape == (5000, 64) and table.dtype == torch.float32
    angle = ropetable.angles(CONFIG, 0, 5000)
    exact = mpmath.cos if which == "cos" else mpmath.sin
    rng = np.random.default_rng(0)
    for position, column in zip(rng.integers(0, 5000, 300), rng.integers(0, 64, 300), strict=True):
        with mpmath.workprec(200):
            true = exact(mpmath.mpf(float(angle[position, column])))
            found = np.float32(table[position, column])
            for side in (-np.inf, np.inf):
                other = float(np.nextafter(found, np.float32(side)))
                assert abs(true - float(found)) <= abs(true - other)


def test_angle_is_one_rounded_product() -> None:
    angle = ropetable.angles(CONFIG, 0, 5000)
    frequencies = ropetable.inverse_frequencies(128, CONFIG.rope_theta, None).double()
    exact = torch.arange(5000).double()[:, None] * frequencies  # 24 + 13 bits: exact in float64
    assert torch.equal(angle, exact.float())


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_the_mpmath_path_gives_the_same_values(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    angle = ropetable.angles(replace(CONFIG, context=40), 0, 40)
    usual = ropetable.rounded(angle, which)
    monkeypatch.setattr(ropetable, "_NEAR_ULP", 1 << 40)
    assert torch.equal(ropetable.rounded(angle, which), usual)
