"""A GGUF file as a `Source`: llama, qwen2 and qwen3, metadata keys as llama.cpp's `convert_hf_to_gguf.py` writes them.

The converter reorders the rows of q and k of the llama architecture from rotate-half order (row j and j + d/2 turn
together) to interleaved order (rows 2j and 2j + 1); `rows` undoes it. A key of the architecture that is not listed here
could change the arithmetic, so it is refused by name.

RoPE scaling `linear` is metadata. `llama3` is a tensor of divisors, one a frequency, without the four numbers they come
from: those of Llama 3.1 and later are recognised, others refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.config import (
    ARCHITECTURES,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    SourceInfo,
    binary32,
    hadamard_block,
    rotation_for,
)
from countermark_appliance.engine.weights.gguf import GgufFile
from countermark_appliance.engine.weights.ropetable import inverse_frequencies
from countermark_appliance.engine.weights.source import EMBED, FINAL_NORM, HEAD, check_tensors, expected_tensors
from countermark_appliance.engine.weights.tokenizerjson import tokenizer_json
from countermark_kernels import PROFILE
from countermark_kernels.rope import HEAD_SIZES

_TOP = {"token_embd.weight": EMBED, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KNOWN_KEYS = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count"),
        *("rope.scaling.type", "rope.scaling.factor"),
    )
)
# keys that are harmless with this value only, and the code when it is another
_NEUTRAL_KEYS: Mapping[str, tuple[object, str]] = {
    "expert_count": (0, "weights.unsupported_moe"),
    "expert_used_count": (0, "weights.unsupported_moe"),
    "attention.sliding_window": (0, "weights.unsupported_sliding_window"),
    "attn_logit_softcapping": (0.0, "weights.unsupported_softcap"),
    "final_logit_softcapping": (0.0, "weights.unsupported_softcap"),
}
_ROPE_FACTORS = "rope_freqs.weight"
_FACTOR_ERROR = 1e-5  # relative; the converter computes in binary32
_QUANTISATION_SUFFIX = re.compile(r"[.-](?:[QI]Q?\d\w*|B?F16|F32)$", re.IGNORECASE)


class GgufSource:
    """One opened GGUF checkpoint."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        self.name = _QUANTISATION_SUFFIX.sub("", path.name.removesuffix(".gguf"))
        self._file = GgufFile(path)
        self._meta = self._file.metadata
        architecture = self._meta.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise WeightsError(
                f"general.architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}",
                code="weights.unsupported_architecture",
            )
        self._architecture = architecture
        self._check_keys()
        known = self._file.tensors.keys() - {_ROPE_FACTORS}
        self._names = {_canonical(name): name for name in known}
        if len(self._names) != len(known):
            raise WeightsError("gguf: two names for one tensor", code="weights.unsupported_tensor")
        config = self.config(name="check", sha256=bytes(32), context=1)
        shapes = {ours: self._file.tensors[theirs].shape for ours, theirs in self._names.items()}
        check_tensors(shapes, expected_tensors(config, tied=HEAD not in self._names))
        self._heads = {"q_proj": config.heads, "k_proj": config.kv_heads} if architecture == "llama" else {}
        self._head_dim = config.head_dim
        self.tokenizer_json = tokenizer_json(self._meta)
        template = self._meta.get("tokenizer.chat_template", "")
        if not isinstance(template, str):
            raise WeightsError("tokenizer.chat_template: expected text", code="weights.unsupported_tokenizer")
        self.chat_template = template

    def config(self, *, name: str, sha256: bytes, context: int | None) -> ModelConfig:
        """The model's configuration; `context` replaces the file's own context length."""
        heads, hidden = self._integer("attention.head_count"), self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", default=hidden // heads if heads else 0)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, default=head_dim) != head_dim:
                raise WeightsError(f"{key}: expected {head_dim}, got another", code="weights.unsupported_rope_partial")
        tokens = self._meta.get("tokenizer.ggml.tokens")
        vocab = len(tokens) if isinstance(tokens, tuple) else 0
        if self._integer("vocab_size", default=vocab) != vocab:
            raise WeightsError(f"vocab_size: expected {vocab} tokens", code="weights.unsupported_vocab")
        eos = [self._id("eos_token_id"), self._id("eot_token_id")]
        intermediate = self._integer("feed_forward_length")
        theta = binary32(self._number("rope.freq_base", default=10_000.0))
        return ModelConfig(
            profile=PROFILE,
            name=name,
            architecture=self._architecture,
            hidden=hidden,
            layers=self._integer("block_count"),
            heads=heads,
            kv_heads=self._integer("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=vocab,
            context=self._integer("context_length") if context is None else context,
            rms_eps=binary32(self._number("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_scaling=self._scaling(head_dim, theta),
            qk_norm=self._architecture == "qwen3",
            attention_bias="blk.0.attn_q.bias" in self._file.tensors,
            hadamard_block=hadamard_block(intermediate),
            rotation=rotation_for(hidden),
            bos_id=self._id("bos_token_id"),
            eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
            add_bos=bool(self._meta.get("tokenizer.ggml.add_bos_token", False)),
            source=SourceInfo(format=self.format, name=self.files[0].name, sha256=sha256),
        )

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows start to stop as float32, q and k of llama back in rotate-half order."""
        name = self._names.get(tensor) or self._names[EMBED]  # a tied head is the embedding
        heads = self._heads.get(tensor.split(".")[-2])
        if heads is None:
            return self._file.rows(name, start, stop)
        whole = self._file.rows(name, 0, heads * self._head_dim)
        halves = whole.view(heads, self._head_dim // 2, 2, -1).transpose(1, 2)
        ordered = halves.reshape(heads * self._head_dim, -1)
        return ordered.view(-1) if whole.dim() == 1 else ordered[start:stop]

    def _check_keys(self) -> None:
        prefix = f"{self._architecture}."
        for key in self._meta:
            field = key.removeprefix(prefix)
            if field == key or field in _KNOWN_KEYS:
                continue
            value, code = _NEUTRAL_KEYS.get(field, (None, "weights.unsupported_field"))
            if field.startswith("rope.scal"):
                code = "weights.unsupported_rope_scaling"
            if field not in _NEUTRAL_KEYS or self._meta[key] != value:
                raise WeightsError(f"{key[:64]}: not supported", code=code)

    def _scaling(self, head_dim: int, theta: float) -> RopeScaling | None:
        kind, factor = (self._meta.get(f"{self._architecture}.rope.scaling.{x}") for x in ("type", "factor"))
        scaled = _ROPE_FACTORS in self._file.tensors
        if kind == "linear" and isinstance(factor, float) and not scaled:
            return LinearScaling(factor=factor)
        if kind not in (None, "none") or factor is not None:
            message = f"rope.scaling: expected none or linear with a factor alone, got {kind!r:.40}"
            raise WeightsError(message, code="weights.unsupported_rope_scaling")
        return self._llama3(head_dim, theta) if scaled else None

    def _llama3(self, head_dim: int, theta: float) -> Llama3Scaling:
        found = self._file.rows(_ROPE_FACTORS, 0, 1).view(-1)
        highest = float(found.max())
        if head_dim in HEAD_SIZES and 2 * len(found) == head_dim and theta > 0 and 1 <= highest <= 1e6:
            scaling = Llama3Scaling(factor=highest, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
            plain, scaled = (inverse_frequencies(head_dim, theta, x).double() for x in (None, scaling))
            if bool(((plain / scaled / found - 1).abs() < _FACTOR_ERROR).all()):
                return scaling
        message = f"{_ROPE_FACTORS}: expected the divisors of Llama 3 (low 1, high 4, context 8192), got others"
        raise WeightsError(message, code="weights.unsupported_rope_scaling")

    def _integer(self, field: str, *, default: int | None = None) -> int:
        found = self._meta.get(f"{self._architecture}.{field}", default)
        if not isinstance(found, int) or isinstance(found, bool):
            raise WeightsError(f"{field}: expected an integer, got {found!r}"[:200], code="weights.gguf")
        return found

    def _number(self, field: str, *, default: float | None = None) -> float:
        found = self._meta.get(f"{self._architecture}.{field}", default)
        if not isinstance(found, float):
            raise WeightsError(f"{field}: expected a number, got {found!r}"[:200], code="weights.gguf")
        return found

    def _id(self, field: str) -> int | None:
        found = self._meta.get(f"tokenizer.ggml.{field}")
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise WeightsError(f"{field}: expected a token id, got {found!r}"[:200], code="weights.gguf")
        return found


def _canonical(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name outside the table stays as it is (and is refused as unknown)."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d{1,3})\.(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None or match[2] not in _LAYER or str(int(match[1])) != match[1]:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
