"""A small model with random integer weights, in memory: the shape of an artefact without its files.

It says nothing about quality; it has every mechanism (grouped heads, QK-norm, biases, several layers) at a size that
runs in milliseconds. The tokenizer is a byte-level BPE of 256 bytes and a few merges, made by `tokenizers` itself.
"""

from __future__ import annotations

import functools
import hashlib
import math

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from countermark_appliance.engine.weights.config import (
    ModelConfig,
    SourceInfo,
    hadamard_block,
    rotation_for,
    tensor_specs,
)
from countermark_kernels import PROFILE

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def tokenizer_json() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the quick brown fox jumps over the lazy dog and then the other thing there in the meantime"
    tokenizer.train_from_iterator([words] * 20, trainer)
    return tokenizer.to_str().encode()


class TinyArtefact:
    """Has the attributes of `weights.Artefact` that the engine uses. `vocab` 0: the tokenizer's own."""

    def __init__(
        self, architecture: str = "llama", *, seed: int = 1, layers: int = 2, context: int = 512, vocab: int = 0
    ) -> None:
        vocab = vocab or tokenizers.Tokenizer.from_str(tokenizer_json().decode()).get_vocab_size()
        self.config = ModelConfig(
            profile=PROFILE,
            name=f"tiny-{architecture}",
            architecture=architecture,
            hidden=96,
            layers=layers,
            heads=2,
            kv_heads=1,
            head_dim=64,
            intermediate=192,
            vocab=vocab,
            context=context,
            rms_eps=0.0009765625,
            rope_theta=10000.0,
            rope_scaling=None,
            qk_norm=architecture == "qwen3",
            attention_bias=architecture == "qwen2",
            hadamard_block=hadamard_block(192),
            rotation=rotation_for(96),
            bos_id=0,
            eos_ids=(2,),
            add_bos=False,
            source=SourceInfo(format="safetensors", name="random", sha256=bytes(32)),
        )
        self.tokenizer_json = tokenizer_json()
        self.chat_template = TEMPLATE
        self.tokenizer_digest = hashlib.sha256(self.tokenizer_json).digest()
        self.template_digest = hashlib.sha256(TEMPLATE.encode()).digest()
        self.weights_root = hashlib.sha256(b"root").digest()
        self.manifest_digest = hashlib.sha256(b"manifest").digest()
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {s.name: self._random(s.name, s.dtype, s.shape, generator) for s in tensor_specs(self.config)}
        angles = torch.outer(
            torch.arange(context, dtype=torch.float64), 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        )
        self._tensors["rope.cos"], self._tensors["rope.sin"] = angles.cos().float(), angles.sin().float()

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @staticmethod
    def _random(name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if dtype == "int8":
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        if name.endswith(".scale"):
            width = {"qkv": 96, "gate_up": 96, "o": 128, "down": 192, "head": 96}[name.split(".")[-2]]
            spread = 1.2 if "qkv" in name else 3.0  # larger scores would make attention a coin toss between two tokens
            return (0.5 + torch.rand(shape, generator=generator)) * (spread / (73.0 * math.sqrt(width)))
        if name.endswith("_norm"):
            return 0.5 + torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator)
