"""Tiny random checkpoints of each architecture, written by transformers and by the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

VOCAB = 320
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_SHAPE = {
    "hidden_size": 192,  # 64 * 3: the Householder factor is in use
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,  # Hadamard blocks of 64
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def config_of(architecture: str, **changes: object) -> PreTrainedConfig:
    """`llama` has biases here and an untied head; `qwen2` ties it; `qwen3` has head norms."""
    values = _SHAPE | changes
    if architecture == "llama":
        return LlamaConfig(**({"attention_bias": True, "tie_word_embeddings": False} | values))
    if architecture == "qwen2":
        return Qwen2Config(**({"tie_word_embeddings": True} | values))
    return Qwen3Config(**({"tie_word_embeddings": False} | values))


def random_model(config: PreTrainedConfig, *, seed: int = 0) -> torch.nn.Module:
    """A model with weights, gains and biases all random and not small."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def byte_alphabet() -> list[str]:
    """GPT-2's stand-ins for the 256 bytes."""
    return list(gguf_bytes_to_unicode().values())


def gguf_bytes_to_unicode() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    found: dict[int, str] = bytes_to_unicode()
    return found


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a toy byte-level vocabulary of VOCAB tokens."""
    merges = ["Ġ Ġ", "h e", "Ġ t", "Ġt he", "ĠĠ ĠĠ", "1 2", "i n", "Ċ Ċ", "' s", "l l", "Ġ 1", "12 3"]
    tokens = [*SPECIALS, *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    kinds = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
    tokens.append("<tool_call>")
    kinds.append(4)
    while len(tokens) < VOCAB:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(5)
    return tokens, kinds, merges


def write_folder(
    path: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    seed: int = 0,
    **changes: object,
) -> torch.nn.Module:
    """Save a random checkpoint with a tokenizer and return the model that was saved."""
    model = random_model(config_of(architecture, **changes), seed=seed).to(dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    tokens, kinds, merges = vocabulary()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if kinds[i] == 3],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [m.split(" ") for m in merges],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return model


def whole(jobs: Iterable[Callable[[], torch.Tensor]]) -> torch.Tensor:
    """A matrix from its blocks of rows."""
    return torch.cat([job() for job in jobs])


def edit_config(path: Path, **changes: object) -> None:
    """Change fields of a folder's config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The converter's reordering of q and k rows: rotate-half pairs (j, j + d/2) become neighbours."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers tensor."""
    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        return {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}.get(
            name, "output"
        ) + ".weight"
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(middle)]}.{kind}"


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "smollm",
    extra: dict[str, object] | None = None,
    drop: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
    **changes: object,
) -> torch.nn.Module:
    """Write a random checkpoint as llama.cpp's converter would; `extra` adds or replaces keys, `drop` leaves out.

    `more`: further tensors.
    """
    config = config_of(architecture, **changes)
    model = random_model(config)
    writer = gguf.GGUFWriter(str(path), architecture)
    tokens, kinds, merges = vocabulary()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    metadata: dict[str, object] = {
        "general.name": "tiny",
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.value_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{architecture}.rope.freq_base": 10_000.0,
        f"{architecture}.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in (metadata | (extra or {})).items():
        if key in drop or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in model.state_dict().items():
        if gguf_name(name) in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        data = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            data = permute(data, heads if "q_proj" in name else kv_heads)
        data = np.ascontiguousarray(data)
        if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), data)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
