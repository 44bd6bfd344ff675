"""model.json: one encoding a configuration, and nothing else gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    SourceInfo,
    TensorSpec,
    binary32,
    hadamard_block,
    rotation_for,
    tensor_specs,
)
from countermark_appliance.engine.weights.modeljson import encode_model, parse_model
from countermark_appliance.engine.weights.strictjson import encode_object
from countermark_kernels import PROFILE

SMOLLM2 = ModelConfig(
    profile=PROFILE, name="SmolLM2", architecture="llama", hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64,
    intermediate=1536, vocab=49_152, context=8192, rms_eps=binary32(1e-5), rope_theta=100_000.0, rope_scaling=None,
    qk_norm=False, attention_bias=False, hadamard_block=512, rotation=rotation_for(576), bos_id=1, eos_ids=(2,),
    add_bos=False, source=SourceInfo(format="gguf", name="f.gguf", sha256=bytes(range(32))),
)  # fmt: skip
QWEN3 = replace(
    SMOLLM2, architecture="qwen3", hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=12_288, qk_norm=True,
    rotation=rotation_for(4096), bos_id=None, eos_ids=(5, 3), source=replace(SMOLLM2.source, format="safetensors"),
)  # fmt: skip
LLAMA3 = replace(
    SMOLLM2,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    attention_bias=True,
    add_bos=True,
)
LINEAR = replace(SMOLLM2, rope_scaling=LinearScaling(factor=2.5))


@pytest.mark.parametrize("config", [SMOLLM2, QWEN3, LLAMA3, LINEAR])
def test_round_trip(config: ModelConfig) -> None:
    assert parse_model(encode_model(config)) == config


@pytest.mark.parametrize(
    ("width", "block"), [(1536, 512), (9728, 512), (12_288, 512), (18_944, 512), (4864, 256), (8960, 256), (320, 64)]
)
def test_hadamard_blocks(width: int, block: int) -> None:
    assert hadamard_block(width) == block


def test_tensor_list() -> None:
    specs = {spec.name: spec for spec in tensor_specs(QWEN3)}
    assert specs["embed"] == TensorSpec(name="embed", dtype="f32", shape=(49_152, 4096))
    assert specs["layers.29.qkv"].shape == (48 * 128, 4096) and specs["layers.29.qkv"].dtype == "int8"
    assert specs["layers.0.q_norm"].shape == (128,) and specs["rope.sin"].shape == (8192, 64)
    assert specs["layers.0.down"].member == "tensors/layers.0.down.int8"
    assert specs["layers.0.gate_up.scale"].size_bytes == 4 * 24_576
    assert "layers.0.qkv.bias" not in specs and "layers.0.o.bias" not in specs
    biased = {spec.name for spec in tensor_specs(LLAMA3)}
    assert {"layers.0.qkv.bias", "layers.0.o.bias"} <= biased
    assert list(specs)[:3] == ["embed", "rope.cos", "rope.sin"] and list(specs)[-2:] == ["head", "head.scale"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"profile": "exact-v9"}, "weights.unsupported_profile"),
        ({"architecture": "gpt2"}, "weights.unsupported_architecture"),
        ({"qk_norm": True}, "weights.unsupported_architecture"),
        ({"architecture": "qwen2"}, "weights.unsupported_architecture"),
        ({"name": ""}, "weights.name"),
        ({"name": "a\nb"}, "weights.name"),
        ({"head_dim": 96}, "weights.unsupported_head_dim"),
        ({"layers": 0}, "weights.unsupported_layers"),
        ({"heads": 0}, "weights.unsupported_heads"),
        ({"kv_heads": 0}, "weights.unsupported_heads"),
        ({"kv_heads": 2}, "weights.unsupported_heads"),
        ({"hidden": 577}, "weights.unsupported_width"),
        ({"hidden": 1 << 16}, "weights.unsupported_width"),
        ({"intermediate": 0}, "weights.unsupported_width"),
        ({"vocab": (1 << 18) + 1}, "weights.unsupported_vocab"),
        ({"context": 133_145}, "weights.unsupported_context"),
        ({"context": 0}, "weights.unsupported_context"),
        ({"rms_eps": 1e-5}, "weights.unsupported_rms_eps"),
        ({"rms_eps": 0.0}, "weights.unsupported_rms_eps"),
        ({"rms_eps": 2.0**-41}, "weights.unsupported_rms_eps"),
        ({"rms_eps": 2.0}, "weights.unsupported_rms_eps"),
        ({"rope_theta": -1.0}, "weights.unsupported_rope_theta"),
        ({"rope_theta": 1e300}, "weights.unsupported_rope_theta"),
        ({"hadamard_block": 256}, "weights.unsupported_rotation"),
        ({"rotation": rotation_for(64)}, "weights.unsupported_rotation"),
        ({"rotation": replace(rotation_for(576), seed=1)}, "weights.unsupported_rotation"),
        ({"eos_ids": ()}, "weights.unsupported_tokenizer"),
        ({"eos_ids": (2, 2)}, "weights.unsupported_tokenizer"),
        ({"eos_ids": (-1,)}, "weights.unsupported_tokenizer"),
        ({"bos_id": 49_152}, "weights.unsupported_tokenizer"),
        ({"bos_id": None, "add_bos": True}, "weights.unsupported_tokenizer"),
        ({"source": SourceInfo(format="zip", name="f", sha256=bytes(32))}, "weights.source"),
        ({"source": SourceInfo(format="gguf", name="f", sha256=bytes(31))}, "weights.source"),
    ],
)
def test_configurations_that_cannot_be_run_cannot_be_made(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(WeightsError) as caught:
        replace(SMOLLM2, **changes)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 4.0), (8.0, 4.0, 4.0), (float("inf"), 1.0, 4.0), (float("nan"), 1.0, 4.0)]
)
def test_scaling_must_make_sense(values: tuple[float, float, float]) -> None:
    with pytest.raises(WeightsError) as caught:
        Llama3Scaling(factor=values[0], low_freq_factor=values[1], high_freq_factor=values[2], original_context=8192)
    assert caught.value.code == "weights.unsupported_rope_scaling"


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    value = json.loads(encode_model(LLAMA3))
    change(value)
    return encode_object(value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda v: v.pop("layers"), "weights.json"),
        (lambda v: v.update(extra=1), "weights.json"),
        (lambda v: v["rope_scaling"].update(extra=1), "weights.json"),
        (lambda v: v["rope_scaling"].pop("type"), "weights.json"),
        (lambda v: v["rope_scaling"].update(type="yarn"), "weights.unsupported_rope_scaling"),
        (lambda v: v["rope_scaling"].update(type="linear"), "weights.json"),
        (lambda v: v.update(rope_scaling={"type": "linear", "factor": 0.1}), "weights.unsupported_rope_scaling"),
        (lambda v: v["rotation"].pop("seed"), "weights.json"),
        (lambda v: v["source"].update(sha256="AB" * 32), "weights.json"),
        (lambda v: v.update(layers="30"), "weights.json"),
        (lambda v: v.update(layers=True), "weights.json"),
        (lambda v: v.update(qk_norm=0), "weights.json"),
        (lambda v: v.update(eos_ids=2), "weights.json"),
        (lambda v: v.update(eos_ids=[True]), "weights.json"),
        (lambda v: v.update(source=None), "weights.json"),
        (lambda v: v.update(rope_theta=10**400), "weights.json"),
        (lambda v: v.update(rope_theta=100_000), "weights.model_json"),
        (lambda v: v["tensors"].pop("head"), "weights.model_json"),
        (lambda v: v["tensors"]["embed"].update(shape=[1, 1]), "weights.model_json"),
        (lambda v: v["tensors"].update(more={}), "weights.model_json"),
    ],
)
def test_edited_files_are_refused(change: Callable[[dict[str, Any]], object], code: str) -> None:
    with pytest.raises(WeightsError) as caught:
        parse_model(edited(change))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "data",
    [
        encode_model(SMOLLM2).rstrip(),
        encode_model(SMOLLM2).replace(b"\n ", b"\n  ", 1),
        encode_model(SMOLLM2).replace(b"{\n", b'{\n "layers": 30,\n', 1),
        encode_model(SMOLLM2).replace(b"100000.0", b"1e5", 1),
        encode_model(SMOLLM2).replace(b"100000.0", b"NaN", 1),
        b" " * (4 * 1024 * 1024 + 1),
        b"[" * 100_000,
        b"\xff",
        b"null",
    ],
)
def test_other_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsError) as caught:
        parse_model(data)
    assert caught.value.code in ("weights.json", "weights.model_json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(encode_model(LLAMA3)))), json_values)
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_is_refused_or_kept_exactly(field: str, value: object) -> None:
    try:
        data = edited(lambda v: v.update({field: value}))
    except ValueError:  # an infinity: not JSON
        return
    try:
        config = parse_model(data)
    except WeightsError as err:
        assert err.code.startswith("weights.")
    else:
        assert encode_model(config) == data
