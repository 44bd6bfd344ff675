"""An artefact of a given shape whose tensors are made on the device when they are asked for; nothing is read or sent.

Shapes: Qwen3-8B, and a tiny one that runs anywhere. The int8 rows are rounded normal values with the largest near 127,
the scales such that a unit input gives a unit output, as in a trained model whose norms are folded; the head's logits
have a standard deviation of 4, so that at temperature 0.8 a few tokens share most of the probability. The answers mean
nothing. Speed does not depend on the values: every kernel does the same work for all.

The artefact has no root and was not verified: it exists for measuring only.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from countermark_appliance.engine.weights import Artefact
from countermark_appliance.engine.weights.config import (
    ModelConfig,
    SourceInfo,
    TensorSpec,
    binary32,
    hadamard_block,
    rotation_for,
    tensor_specs,
)
from countermark_appliance.engine.weights.ropetable import table_rows
from countermark_kernels import PROFILE

INT8_SPREAD = 32.0
LOGIT_SPREAD = 4.0
ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 model's sizes."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int

    @property
    def linear_values(self) -> int:
        """Entries of all matrices but the head, and so the products of one token's pass through them."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (qkv + self.heads * self.head_dim + 3 * self.intermediate)

    @property
    def head_values(self) -> int:
        return self.vocab * self.hidden

    def kv_bytes(self, value_bytes: int, scale_bytes: int) -> int:
        """Keys and values of one token: `value_bytes` an entry, `scale_bytes` for each head's k and each head's v."""
        return 2 * self.layers * self.kv_heads * (self.head_dim * value_bytes + scale_bytes)


QWEN3_8B = Shape(
    name="qwen3-8b", layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=12288, vocab=151936,
    context=40960,
)  # fmt: skip
TINY = Shape(
    name="tiny", layers=2, hidden=128, heads=4, kv_heads=2, head_dim=64, intermediate=256, vocab=1024, context=2048
)
SHAPES = {shape.name: shape for shape in (QWEN3_8B, TINY)}


def config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        profile=PROFILE,
        name=f"{shape.name} (generated weights)",
        architecture="qwen3",
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        context=shape.context,
        rms_eps=binary32(1e-6),
        rope_theta=1_000_000.0,
        rope_scaling=None,
        qk_norm=True,
        attention_bias=False,
        hadamard_block=hadamard_block(shape.intermediate),
        rotation=rotation_for(shape.hidden),
        bos_id=None,
        eos_ids=(0,),
        add_bos=False,
        source=SourceInfo(format="safetensors", name="generated", sha256=bytes(32)),
    )


def artefact(shape: Shape, device: torch.device) -> Artefact:
    """The artefact; its tensors lie on `device`."""
    described = config(shape)
    return Artefact(
        config=described,
        weights_root=bytes(32),
        manifest_digest=bytes(32),
        tokenizer_json=_tokenizer(shape.vocab),
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        tokenizer_digest=bytes(32),
        template_digest=bytes(32),
        tensors=_Generated(described, device),
    )


class _Generated(Mapping[str, Tensor]):
    """Every tensor by its name, made anew each time, from the name as seed: a model then holds the only copy."""

    def __init__(self, described: ModelConfig, device: torch.device) -> None:
        self._config = described
        self._device = device
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in tensor_specs(described)}

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        random = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if name.startswith("rope."):
            return torch.cat(list(table_rows(self._config, name.removeprefix("rope.")))).to(self._device)
        if name.endswith("_norm"):
            return torch.ones(spec.shape, device=self._device)
        if name.endswith(".scale"):
            return torch.full(spec.shape, self._scale(name.removesuffix(".scale")), device=self._device)
        if spec.dtype == "f32":
            return torch.randn(spec.shape, device=self._device, generator=random)
        made = torch.empty(spec.shape, dtype=torch.int8, device=self._device)
        for part in made.split(ROWS_AT_ONCE):
            drawn = torch.randn(part.shape, device=self._device, generator=random)
            part.copy_(drawn.mul_(INT8_SPREAD).round_().clamp_(-127, 127))
        return made

    def _scale(self, matrix: str) -> float:
        inputs = self._specs[matrix].shape[1]
        scale = 1.0 / (INT8_SPREAD * math.sqrt(inputs))
        if matrix == "head":
            return LOGIT_SPREAD * scale
        # the block transform before `down` is not normalised; a real artefact has its factor in this matrix too
        return scale / math.sqrt(self._config.hadamard_block) if matrix.endswith(".down") else scale


def _tokenizer(vocab: int) -> bytes:
    """Byte-level BPE without merges: each letter of the alphabet, then words that no text encodes to."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters[:vocab] + [f"w{i:06d}" for i in range(len(letters), vocab)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []},
    }  # fmt: skip
    return json.dumps(document).encode()
