"""A GGUF checkpoint against transformers loading the same file, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tinymodels import TEMPLATE, config_of, write_folder, write_gguf
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import build, load
from countermark_appliance.engine.weights.config import LinearScaling, Llama3Scaling, RopeScaling
from countermark_appliance.engine.weights.ggufsource import GgufSource

Q = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", Q.Q8_0), ("llama", Q.Q4_1), ("qwen2", Q.F32), ("qwen3", Q.F16)]
)
def test_tensors_are_those_transformers_loads(architecture: str, kind: Q, tmp_path: Path) -> None:
    changes = {"attention_bias": False} if architecture == "llama" else {}
    written = write_gguf(tmp_path / "t.gguf", architecture, kind=kind, **changes)
    expected = load_gguf_checkpoint(str(tmp_path / "t.gguf"), return_tensors=True, model_to_load=written)["tensors"]
    source = GgufSource(tmp_path / "t.gguf")
    assert len(expected) >= 2 * 9 + 2
    for name, tensor in expected.items():
        assert torch.equal(source.rows(name, 0, tensor.shape[0]), tensor), name
        if tensor.dim() == 2:
            assert torch.equal(source.rows(name, 3, 17), tensor[3:17])
    if architecture == "qwen2":  # tied
        embed = expected["model.embed_tokens.weight"]
        assert torch.equal(source.rows("lm_head.weight", 0, embed.shape[0]), embed)


def test_llama_biases_are_put_back_in_order_too(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "t.gguf", "llama", attention_bias=True)
    source = GgufSource(tmp_path / "t.gguf")
    for name, tensor in written.state_dict().items():
        assert torch.equal(source.rows(name, 0, tensor.shape[0]), tensor), name


def test_configuration(tmp_path: Path) -> None:
    write_gguf(tmp_path / "Tiny-Model.Q4_1.gguf", "llama", extra={"tokenizer.ggml.eot_token_id": 0})
    source = GgufSource(tmp_path / "Tiny-Model.Q4_1.gguf")
    assert source.name == "Tiny-Model" and source.chat_template == TEMPLATE
    config = source.config(name="n", sha256=bytes(32), context=None)
    assert (config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim) == (192, 2, 4, 2, 64)
    assert (config.intermediate, config.vocab, config.context, config.hadamard_block) == (320, 320, 96, 64)
    assert config.attention_bias and config.output_bias and not config.qk_norm and not config.add_bos
    assert (config.bos_id, config.eos_ids) == (1, (2, 0))
    assert source.config(name="n", sha256=bytes(32), context=17).context == 17


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        *[({"general.architecture": name}, "weights.unsupported_architecture") for name in
          ("gemma", "gemma2", "gemma3", "mistral3", "phi2", "phi3", "qwen2moe", "qwen2vl", "qwen3moe", "qwen3next",
           "gpt2", "gptneox", "gpt-oss", "falcon", "mpt", "bloom", "olmo2", "command-r", "deepseek2", "granite",
           "smollm3", "stablelm", "glm4", "llama4", "mamba", "bert", "t5", "LLAMA")],
        *[({"llama.attention.key_length": size, "llama.attention.value_length": size,
            "llama.rope.dimension_count": size}, "weights.unsupported_head_dim") for size in (32, 80, 112, 192, 256)],
        *[({"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}, "weights.unsupported_rope_scaling")
          for kind in ("yarn", "longrope", "su", "none", "linear2", "")],
        ({"llama.rope.scaling.factor": 4.0}, "weights.unsupported_rope_scaling"),
        ({"llama.rope.scaling.type": "linear"}, "weights.unsupported_rope_scaling"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "weights.unsupported_rope_scaling"),
        *[({f"llama.rope.{key}": 1.0}, "weights.unsupported_rope_scaling") for key in
          ("scale_linear", "scaling.attn_factor", "scaling.original_context_length", "scaling.yarn_beta_fast")],
        ({"llama.attn_logit_softcapping": 50.0}, "weights.unsupported_softcap"),
        ({"llama.final_logit_softcapping": 30.0}, "weights.unsupported_softcap"),
        *[({f"llama.{key}": 0.5}, "weights.unsupported_field") for key in
          ("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "residual_scale", "embedding_scale",
           "rope.freq_base_swa", "attention.sliding_window_pattern", "attention.causal")],
        ({"llama.rope.freq_base": 0.0}, "weights.unsupported_rope_theta"),
        ({"llama.rope.freq_base": 10_000}, "weights.gguf"),
        ({"llama.expert_count": 8}, "weights.unsupported_moe"),
        ({"llama.attention.sliding_window": 4096}, "weights.unsupported_sliding_window"),
        ({"llama.rope.dimension_count": 32}, "weights.unsupported_rope_partial"),
        ({"llama.attention.key_length": 96, "llama.attention.value_length": 96, "llama.rope.dimension_count": 96},
         "weights.unsupported_head_dim"),
        ({"llama.attention.value_length": 32}, "weights.unsupported_rope_partial"),
        ({"llama.logit_scale": 2.0}, "weights.unsupported_field"),
        ({"llama.embedding_length": "x"}, "weights.gguf"),
        ({"llama.attention.head_count": 0}, "weights.unsupported_heads"),
        ({"llama.attention.head_count_kv": 3}, "weights.unsupported_heads"),
        ({"llama.vocab_size": 300}, "weights.unsupported_vocab"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "weights.unsupported_rms_eps"),
        ({"llama.block_count": 3}, "weights.tensor_missing"),
        ({"llama.block_count": 1}, "weights.unsupported_tensor"),
        ({"llama.feed_forward_length": 352}, "weights.tensor_shape"),
        ({"llama.feed_forward_length": 321}, "weights.unsupported_width"),
        ({"tokenizer.ggml.model": "llama"}, "weights.unsupported_tokenizer"),
        ({"tokenizer.ggml.eos_token_id": None}, "weights.unsupported_tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 4000}, "weights.unsupported_tokenizer"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "weights.unsupported_tokenizer"),
        ({"tokenizer.chat_template": 5}, "weights.unsupported_tokenizer"),
    ],
)  # fmt: skip
def test_refused_by_name(extra: dict[str, object], code: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "llama", extra=extra)
    with pytest.raises(WeightsError) as caught:
        GgufSource(tmp_path / "t.gguf").config(name="n", sha256=bytes(32), context=None)
    assert caught.value.code == code


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_and_folder_of_one_model_give_the_same_tensors(architecture: str, head_dim: int, tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", architecture, head_dim=head_dim)
    write_gguf(tmp_path / "tiny.gguf", architecture, head_dim=head_dim)
    a, b = (tmp_path / "a", tmp_path / "b")
    build(tmp_path / "folder", a)
    build(tmp_path / "tiny.gguf", b)
    left, right = load(a), load(b)
    assert left.config.rms_eps == right.config.rms_eps
    assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in left.tensors)


def scaling_of(path: Path) -> RopeScaling | None:
    return GgufSource(path).config(name="n", sha256=bytes(32), context=None).rope_scaling


def test_linear_rope_scaling(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    write_gguf(tmp_path / "t.gguf", "llama", extra=keys)
    assert scaling_of(tmp_path / "t.gguf") == LinearScaling(factor=2.5)
    write_gguf(tmp_path / "none.gguf", "llama", extra={"llama.rope.scaling.type": "none"})
    assert scaling_of(tmp_path / "none.gguf") is None


def divisors(head_dim: int, **changes: object) -> np.ndarray:
    """What the converter stores: the plain frequencies over the scaled ones, both as transformers has them."""
    values = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = {"rope_type": "llama3", "rope_theta": 500_000.0} | values | changes
    plain = {"rope_type": "default", "rope_theta": 500_000.0}
    frequencies = [
        LlamaRotaryEmbedding(config_of("llama", head_dim=head_dim, rope_parameters=rope)).inv_freq.numpy()
        for rope in (plain, scaled)
    ]
    return frequencies[0] / frequencies[1]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised(factor: float, head_dim: int, tmp_path: Path) -> None:
    more = {"rope_freqs.weight": divisors(head_dim, factor=factor)}
    theta = {"llama.rope.freq_base": 500_000.0}
    write_gguf(tmp_path / "t.gguf", "llama", extra=theta, more=more, head_dim=head_dim)
    expected = Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    assert scaling_of(tmp_path / "t.gguf") == expected


@pytest.mark.parametrize(
    "factors",
    [
        divisors(64, low_freq_factor=2.0),
        divisors(64, original_max_position_embeddings=4096),
        divisors(128),
        divisors(64)[::-1].copy(),
        np.full(32, np.nan, dtype=np.float32),
        np.full(32, np.inf, dtype=np.float32),
        np.zeros(32, dtype=np.float32),
        np.full(32, 2.0, dtype=np.float32),
    ],
)
def test_other_rope_divisors_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    theta = {"llama.rope.freq_base": 500_000.0}
    write_gguf(tmp_path / "t.gguf", "llama", extra=theta, more={"rope_freqs.weight": factors})
    with pytest.raises(WeightsError) as caught:
        scaling_of(tmp_path / "t.gguf")
    assert caught.value.code == "weights.unsupported_rope_scaling"


def test_divisors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "llama.rope.freq_base": 500_000.0}
    write_gguf(tmp_path / "t.gguf", "llama", extra=keys, more={"rope_freqs.weight": divisors(64)})
    with pytest.raises(WeightsError) as caught:
        scaling_of(tmp_path / "t.gguf")
    assert caught.value.code == "weights.unsupported_rope_scaling"


@pytest.mark.parametrize("name", ["blk.0.ffn_gate.bias", "blk.1.attn_output_norm.weight", "rope_factors_long.weight"])
def test_a_tensor_that_would_be_left_out_is_refused(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "llama", more={name: np.ones(64, dtype=np.float32)})
    with pytest.raises(WeightsError) as caught:
        GgufSource(tmp_path / "t.gguf")
    assert caught.value.code == "weights.unsupported_tensor"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "llama", drop=("blk.1.attn_k.weight",))
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.k_proj") as caught:
        GgufSource(tmp_path / "t.gguf")
    assert caught.value.code == "weights.tensor_missing"
