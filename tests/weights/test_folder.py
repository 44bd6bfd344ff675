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


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_type": "mixtral"}, "weights.unsupported_architecture"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "weights.unsupported_architecture"),
        ({"hidden_act": "gelu"}, "weights.unsupported_activation"),
        ({"mlp_bias": True}, "weights.unsupported_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights.unsupported_quantisation"),
        ({"use_sliding_window": True}, "weights.unsupported_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "weights.unsupported_sliding_window"),
        ({"num_experts": 8}, "weights.unsupported_moe"),
        ({"rope_parameters": YARN}, "weights.unsupported_rope_scaling"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
         "weights.unsupported_rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "weights.unsupported_rope_partial"),
        ({"partial_rotary_factor": 0.25}, "weights.unsupported_rope_partial"),
        ({"head_dim": 80}, "weights.unsupported_head_dim"),
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


def test_older_config_fields_mean_the_same(folder: Path) -> None:
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(folder, rope_parameters=None, rope_theta=500_000.0, rope_scaling=rope | {"rope_type": "llama3"})
    old = FolderSource(folder).config(name="n", sha256=bytes(32), context=None)
    edit_config(folder, rope_parameters=rope | {"rope_type": "llama3", "rope_theta": 500_000.0}, rope_scaling=None)
    assert FolderSource(folder).config(name="n", sha256=bytes(32), context=None) == old
    assert old.rope_scaling is not None and old.rope_theta == 500_000.0


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
