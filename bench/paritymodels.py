"""Small checkpoints made of SplitMix64 alone, to compare machines by: one of each architecture and its traits.

A checkpoint is a folder as Hugging Face writes one; the product's own builder makes the artefact from it, so the same
root on two machines says that they build alike. No library's generator is used, because its stream may change.
Together the models have: heads of 64 and 128; one kv head for all query heads, for some, for each; a tied and an untied
head; biases of q, k, v and of the output projection; QK-norm; RoPE scaling; Hadamard blocks of 512, 256 and 32;
hidden widths 64 * 5, 64 * 7, 32 * 9; a prime vocabulary.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from tokenizers import pre_tokenizers

from countermark_appliance.engine import weights
from countermark_appliance.engine.weights.config import (
    ModelConfig,
    SourceInfo,
    binary32,
    hadamard_block,
    rotation_for,
)
from countermark_appliance.engine.weights.source import EMBED, HEAD, expected_tensors
from countermark_kernels import PROFILE

CONTEXT = 4096
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a generated checkpoint is made of; the rest of its shape is the same for all."""

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    bias: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})


RECIPES = (
    Recipe(
        name="llama-64", architecture="llama", hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64,
        intermediate=768, vocab=1024, tied=True,
    ),
    Recipe(
        name="llama-128", architecture="llama", hidden=512, layers=2, heads=4, kv_heads=1, head_dim=128,
        intermediate=1024, vocab=2048, bias=True, rope=_LLAMA3,
    ),
    Recipe(
        name="llama-odd", architecture="llama", hidden=288, layers=3, heads=5, kv_heads=5, head_dim=64,
        intermediate=352, vocab=5003,
    ),
    Recipe(
        name="qwen2", architecture="qwen2", hidden=448, layers=2, heads=7, kv_heads=1, head_dim=64,
        intermediate=1280, vocab=5003, tied=True, bias=True,
    ),
    Recipe(
        name="qwen3", architecture="qwen3", hidden=320, layers=4, heads=4, kv_heads=2, head_dim=128,
        intermediate=1536, vocab=2048,
    ),
)  # fmt: skip


@contextmanager
def built(recipe: Recipe) -> Iterator[weights.Artefact]:
    """The artefact, built and verified in a temporary folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        source, artefact = Path(folder) / recipe.name, Path(folder) / "artefact"
        write(recipe, source)
        weights.build(source, artefact)
        yield weights.load(artefact)


def write(recipe: Recipe, folder: Path) -> None:
    """Write the checkpoint's three files into `folder`."""
    folder.mkdir()
    config = {
        "model_type": recipe.architecture,
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": recipe.intermediate,
        "vocab_size": recipe.vocab,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10_000.0, **recipe.rope},
        "tie_word_embeddings": recipe.tied,
        "attention_bias": recipe.bias,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_bytes_tokenizer()))
    tensors = {name: _values(recipe.name, name, shape) for name, shape in _shapes(recipe).items()}
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.tobytes())


def splitmix64(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first `count` outputs of SplitMix64 from `seed`."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    config = ModelConfig(
        profile=PROFILE,
        name=recipe.name,
        architecture=recipe.architecture,
        hidden=recipe.hidden,
        layers=recipe.layers,
        heads=recipe.heads,
        kv_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate=recipe.intermediate,
        vocab=recipe.vocab,
        context=CONTEXT,
        rms_eps=binary32(1e-6),
        rope_theta=10_000.0,
        rope_scaling=None,
        qk_norm=recipe.architecture == "qwen3",
        attention_bias=recipe.bias,
        hadamard_block=hadamard_block(recipe.intermediate),
        rotation=rotation_for(recipe.hidden),
        bos_id=None,
        eos_ids=(0,),
        add_bos=False,
        source=SourceInfo(format="safetensors", name=recipe.name, sha256=bytes(32)),
    )
    return expected_tensors(config, tied=recipe.tied)


def _values(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Uniform values with the spread a trained model has: gains about 1, outputs of the layers about 1.

    An integer of 24 bits, made exact in binary32, then one product and for gains one sum: the same everywhere.
    """
    seed = int.from_bytes(blake3(f"{model}/{name}".encode()).digest()[:8], "little")
    steps = (splitmix64(seed, math.prod(shape)) >> np.uint64(40)).astype(np.int32) - (1 << 23)
    uniform = steps.astype(np.float32).reshape(shape) * np.float32(2.0**-23)  # -1..1
    if name.endswith("norm.weight"):
        return uniform * np.float32(0.5) + np.float32(1.0)
    if name.endswith("bias"):
        return uniform * np.float32(0.5)
    spread = {EMBED: 1.0, HEAD: 3.0}.get(name, 2.0 if "q_proj" in name else 1.0)
    fan_in = 1 if name == EMBED else shape[-1]
    return uniform * np.float32(spread * math.sqrt(3.0 / fan_in))


def _bytes_tokenizer() -> dict[str, Any]:
    """One token a byte."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
