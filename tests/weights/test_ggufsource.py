"""A GGUF checkpoint against transformers loading the same file, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tinymodels import TEMPLATE, write_gguf
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from countermark.errors import WeightsError
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
        ({"general.architecture": "gemma"}, "weights.unsupported_architecture"),
        ({"llama.expert_count": 8}, "weights.unsupported_moe"),
        ({"llama.attention.sliding_window": 4096}, "weights.unsupported_sliding_window"),
        ({"llama.rope.scaling.type": "yarn"}, "weights.unsupported_rope_scaling"),
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


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "llama", drop=("blk.1.attn_k.weight",))
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.k_proj") as caught:
        GgufSource(tmp_path / "t.gguf")
    assert caught.value.code == "weights.tensor_missing"
