"""A checkpoint as the build sees it: a configuration, tensors by their Hugging Face names, a tokenizer and a template.

Two forms implement it: `ggufsource` (one GGUF file) and `folder` (config.json + safetensors). Both hand out rows of
float32 in the layout of transformers' Llama, Qwen2 and Qwen3 modules, q and k in the rotate-half order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.config import ModelConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class Source(Protocol):
    """One checkpoint, opened and checked: every tensor that `expected_tensors` lists is there, and no other."""

    @property
    def format(self) -> str: ...

    @property
    def name(self) -> str:
        """The default model name."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the artefact."""
        ...

    @property
    def tokenizer_json(self) -> bytes: ...

    @property
    def chat_template(self) -> str:
        """Jinja source; empty when the checkpoint has none."""
        ...

    def config(self, *, name: str, sha256: bytes, context: int | None) -> ModelConfig: ...

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a matrix (or the whole of a vector) as float32."""
        ...


def expected_tensors(config: ModelConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the source tensors of this configuration. `tied`: the head is the embedding."""
    hidden, inter = config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab, hidden), FINAL_NORM: (hidden,)}
    if not tied:
        shapes[HEAD] = (config.vocab, hidden)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (config.q_rows, hidden),
            f"{layer}.self_attn.k_proj.weight": (config.kv_rows, hidden),
            f"{layer}.self_attn.v_proj.weight": (config.kv_rows, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, config.q_rows),
            f"{layer}.mlp.gate_proj.weight": (inter, hidden),
            f"{layer}.mlp.up_proj.weight": (inter, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inter),
        }
        if config.attention_bias:
            rows = {"q": config.q_rows, "k": config.kv_rows, "v": config.kv_rows}
            shapes |= {f"{layer}.self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
        if config.output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (config.head_dim,) for x in ("q", "k")}
    return shapes


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `WeightsError` unless names and shapes agree exactly.

    `weights.tensor_missing`, `weights.unsupported_tensor` (one we would have to leave out), `weights.tensor_shape`.
    """
    for name, shape in expected.items():
        if name not in found:
            raise WeightsError(f"{name}: expected in the checkpoint, not found", code="weights.tensor_missing")
        if found[name] != shape:
            raise WeightsError(f"{name}: expected shape {shape}, got {found[name]}", code="weights.tensor_shape")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise WeightsError(
            f"{extra[0]}: a tensor this architecture does not have (and {len(extra) - 1} more)",
            code="weights.unsupported_tensor",
        )
