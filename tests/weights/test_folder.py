"""Safetensors folders: what is read is what transformers saved, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tinymodels import TEMPLATE, edit_config, write_folder

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.build import open_source
from countermark_appliance.engine.weights.folder import FolderSource


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_sharded_tensors_are_those_saved(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_folder(tmp_path, architecture, dtype=dtype, shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    source = FolderSource(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.rows(name, 0, tensor.shape[0]), tensor.float()), name
        if tensor.dim() == 2:
            assert torch.equal(source.rows(name, 3, 9), tensor[3:9].float())
    assert {path.name for path in source.files} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert source.chat_template == TEMPLATE


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    write_folder(path, "llama")
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_source(path).config(name="n", sha256=bytes(32), context=None)
    return caught.value.code


def rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **values}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
# `model_type` and the class that real checkpoints of other architectures carry
OTHERS = [
    ("mistral", "MistralForCausalLM"), ("ministral", "MinistralForCausalLM"), ("mixtral", "MixtralForCausalLM"),
    ("gemma", "GemmaForCausalLM"), ("gemma2", "Gemma2ForCausalLM"), ("gemma3_text", "Gemma3ForCausalLM"),
    ("phi", "PhiForCausalLM"), ("phi3", "Phi3ForCausalLM"), ("qwen2_moe", "Qwen2MoeForCausalLM"),
    ("qwen3_moe", "Qwen3MoeForCausalLM"), ("qwen3_next", "Qwen3NextForCausalLM"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel"), ("gpt_neox", "GPTNeoXForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"), ("falcon", "FalconForCausalLM"), ("mpt", "MptForCausalLM"),
    ("opt", "OPTForCausalLM"), ("bloom", "BloomForCausalLM"), ("olmo2", "Olmo2ForCausalLM"),
    ("cohere", "CohereForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM"), ("granite", "GraniteForCausalLM"),
    ("smollm3", "SmolLM3ForCausalLM"), ("stablelm", "StableLmForCausalLM"), ("glm4", "Glm4ForCausalLM"),
    ("llama4_text", "Llama4ForCausalLM"), ("mamba", "MambaForCausalLM"), ("t5", "T5ForConditionalGeneration"),
    ("bert", "BertForMaskedLM"), ("Llama", "LlamaForCausalLM"), ("", "LlamaForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "name"), OTHERS)
def test_other_architectures_are_refused_by_name(model_type: str, name: str, folder: Path) -> None:
    edit_config(folder, model_type=model_type, architectures=[name])
    assert refusal(folder) == "weights.unsupported_architecture"
    edit_config(folder, model_type="llama")
    if name != "LlamaForCausalLM":  # one that calls itself llama, with another class
        assert refusal(folder) == "weights.unsupported_architecture"


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "su", "mrope", "proportional", "ntk", "default3", ""])
@pytest.mark.parametrize("older", [False, True])
def test_other_rope_scalings_are_refused_by_name(kind: str, older: bool, folder: Path) -> None:
    if older:
        edit_config(folder, rope_parameters=None, rope_theta=10_000.0, rope_scaling={"type": kind, "factor": 4.0})
    else:
        edit_config(folder, rope_parameters=rope(kind, factor=4.0))
    assert refusal(folder) == "weights.unsupported_rope_scaling"


@pytest.mark.parametrize("head_dim", [16, 32, 48, 80, 96, 112, 160, 192, 256, 512])
def test_other_head_sizes_are_refused_by_name(head_dim: int, folder: Path) -> None:
    edit_config(folder, head_dim=head_dim)
    assert refusal(folder) == "weights.unsupported_head_dim"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "weights.unsupported_architecture"),
        *[({"hidden_act": name}, "weights.unsupported_activation")
          for name in ("gelu", "gelu_pytorch_tanh", "relu", "relu2", "swish", None)],
        ({"mlp_bias": True}, "weights.unsupported_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights.unsupported_quantisation"),
        ({"use_sliding_window": True}, "weights.unsupported_sliding_window"),
        ({"sliding_window": 4096}, "weights.unsupported_sliding_window"),
        ({"attn_logit_softcapping": 50.0}, "weights.unsupported_softcap"),
        ({"final_logit_softcapping": 30.0}, "weights.unsupported_softcap"),
        *[({name: 0.5}, "weights.unsupported_field") for name in
          ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
           "clip_qkv")],
        ({"no_rope_layers": [1, 0]}, "weights.unsupported_field"),
        ({"num_local_experts": 8}, "weights.unsupported_moe"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "weights.unsupported_sliding_window"),
        ({"num_experts": 8}, "weights.unsupported_moe"),
        *[({"rope_parameters": value}, "weights.unsupported_rope_scaling") for value in (
            {"full_attention": rope("default"), "sliding_attention": rope("default")},
            rope("default", mrope_section=[16, 24, 24]), rope("default", factor=2.0),
            LLAMA3 | {"attention_factor": 2.0}, LLAMA3 | {"high_freq_factor": 1.0},
            rope("linear", factor=0.0), rope("linear", factor=-2.0),
            rope("linear", factor=1e9))],
        *[({"rope_parameters": value}, "weights.json") for value in (
            rope("linear"), rope("linear", factor="2"), rope("default", rope_theta="10000"),
            {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, [], "linear")],
        *[({"rope_parameters": rope("default", rope_theta=value)}, "weights.unsupported_rope_theta")
          for value in (0.0, -1.0, 1e31)],
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 96}, "weights.unsupported_rope_scaling"),
        ({"rope_scaling": rope("linear", factor=2.0)}, "weights.unsupported_rope_scaling"),  # beside rope_parameters
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "weights.unsupported_rope_partial"),
        ({"partial_rotary_factor": 0.25}, "weights.unsupported_rope_partial"),
        ({"hidden_size": 200}, "weights.unsupported_width"),
        ({"hidden_size": 224}, "weights.tensor_shape"),
        ({"num_hidden_layers": 3}, "weights.tensor_missing"),
        ({"num_hidden_layers": 1}, "weights.unsupported_tensor"),
        ({"attention_bias": False}, "weights.unsupported_tensor"),
        ({"max_position_embeddings": 1_000_000}, "weights.unsupported_context"),
        ({"eos_token_id": "2"}, "weights.unsupported_tokenizer"),
        ({"vocab_size": True}, "weights.json"),
        ({"rms_norm_eps": "1e-5"}, "weights.json"),
    ],
)  # fmt: skip
def test_refused_by_name(changes: dict[str, object], code: str, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, **changes)
    assert refusal(folder) == code


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("values", [LLAMA3, rope("linear", factor=2.5)])
def test_older_config_fields_mean_the_same(values: dict[str, object], key: str, folder: Path) -> None:
    older = {key: values["rope_type"]} | {k: v for k, v in values.items() if k not in ("rope_type", "rope_theta")}
    edit_config(folder, rope_parameters=None, rope_theta=500_000.0, rope_scaling=older)
    old = FolderSource(folder).config(name="n", sha256=bytes(32), context=None)
    edit_config(folder, rope_parameters=values | {"rope_theta": 500_000}, rope_scaling=None)
    assert FolderSource(folder).config(name="n", sha256=bytes(32), context=None) == old
    assert old.rope_scaling is not None and old.rope_theta == 500_000.0


def test_windows_and_defaults_that_are_not_active_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """As Qwen's and Meta's own configurations have them."""
    write_folder(tmp_path, "qwen2")
    plain = FolderSource(tmp_path).config(name="n", sha256=bytes(32), context=None)
    edit_config(tmp_path, sliding_window=32768, use_sliding_window=False, max_window_layers=28, attention_dropout=0.0)
    edit_config(tmp_path, layer_types=["full_attention"] * 2, mlp_bias=False, partial_rotary_factor=1, num_experts=0)
    edit_config(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=10_000, architectures=None)
    assert FolderSource(tmp_path).config(name="n", sha256=bytes(32), context=None) == plain


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert refusal(folder) == "weights.missing"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == "weights.missing"
    assert refusal(tmp_path) == "weights.missing"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_malformed_config_is_refused(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert refusal(folder) == "weights.json"


def test_index_must_stay_in_the_folder_and_tell_the_truth(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "a/model.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert refusal(folder) == "weights.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert refusal(folder) == "weights.safetensors"


def test_damaged_safetensors_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for changed in (data[:100], data[:-1], b"\xff" * 8 + data[8:], b""):
        file.write_bytes(changed)
        assert refusal(folder) == "weights.safetensors"


def test_other_tensor_types_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, folder / "model.safetensors")
    assert refusal(folder) == "weights.unsupported_quantisation"


def test_a_tied_head_may_be_there_if_it_is_the_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=True)
    assert refusal(folder) == "weights.unsupported_tensor"
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    source = FolderSource(folder)
    assert torch.equal(source.rows("lm_head.weight", 2, 5), tensors["model.embed_tokens.weight"][2:5])


def test_an_untied_head_must_be_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert refusal(folder) == "weights.tensor_missing"


@pytest.mark.parametrize("name", ["mlp.gate_proj.bias", "mlp.down_proj.bias", "self_attn.q_norm.weight"])
def test_a_tensor_that_would_be_left_out_is_refused(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{name}"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors")
    assert refusal(folder) == "weights.unsupported_tensor"


def test_ids_come_from_the_generation_config_first(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 2], "bos_token_id": None}))
    config = FolderSource(folder).config(name="n", sha256=bytes(32), context=None)
    assert (config.bos_id, config.eos_ids, config.add_bos) == (1, (2, 0), False)


def test_add_bos_follows_the_post_processor(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())

    def processor(token: str, token_id: int) -> dict[str, object]:
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
        }

    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": processor("<|im_start|>", 1)}))
    assert FolderSource(folder).config(name="n", sha256=bytes(32), context=None).add_bos
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": processor("<|im_end|>", 2)}))
    assert refusal(folder) == "weights.unsupported_tokenizer"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{{ x }}", "{{ x }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], ""),
        (None, ""),
    ],
)
def test_chat_template_in_tokenizer_config(value: object, expected: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert FolderSource(folder).chat_template == expected
