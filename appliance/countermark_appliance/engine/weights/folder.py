"""A Hugging Face folder as a `Source`: config.json, *.safetensors (with an index when sharded), tokenizer files.

What transformers 5 reads of `LlamaConfig`, `Qwen2Config` and `Qwen3Config` is read here with the same defaults; a value
the profile cannot honour is refused by name, fields those classes do not read are ignored. File names come from the
index and stay inside the folder. The safetensors container is parsed by the safetensors library (bf16, f16, f32).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from countermark_appliance.engine.weights.source import EMBED, HEAD, check_tensors, expected_tensors
from countermark_appliance.engine.weights.strictjson import (
    Json,
    boolean,
    integer,
    mapping,
    number,
    parse_object,
    text,
)
from countermark_appliance.engine.weights.tokenizerjson import load_tokenizer
from countermark_kernels import PROFILE

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULT_THETA = 10_000.0
_CONFIG_BYTES, _INDEX_BYTES, _TOKENIZER_BYTES = 1 << 20, 64 << 20, 64 << 20
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_DTYPES = ("BF16", "F16", "F32")
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # a buffer old versions saved
_WHAT = "config.json"
# Fields that are harmless when absent or with these values only, and the code when they have another. Some belong to
# other architectures' classes; a checkpoint that carries one was not trained for the arithmetic of its `model_type`.
_NEUTRAL: Mapping[str, tuple[tuple[Json, ...], str]] = {
    "hidden_act": (("silu",), "activation"),
    "mlp_bias": ((None, False), "bias"),
    "quantization_config": ((None,), "quantisation"),
    "use_sliding_window": ((None, False), "sliding_window"),
    "partial_rotary_factor": ((None, 1.0), "rope_partial"),
    "original_max_position_embeddings": ((None,), "rope_scaling"),
    "attn_logit_softcapping": ((None,), "softcap"),
    "final_logit_softcapping": ((None,), "softcap"),
    "num_experts": ((None, 0), "moe"),
    "num_local_experts": ((None, 0), "moe"),
    "no_rope_layers": ((None,), "field"),
    "clip_qkv": ((None,), "field"),
    "logit_scale": ((None, 1.0), "field"),
    "logits_scaling": ((None, 1.0), "field"),
    "embedding_multiplier": ((None, 1.0), "field"),
    "residual_multiplier": ((None, 1.0), "field"),
    "attention_multiplier": ((None,), "field"),
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_SCALING_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class FolderSource:
    """One opened checkpoint folder."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.resolve().name
        self._config = parse_object(self._read("config.json", _CONFIG_BYTES), what=_WHAT, max_bytes=_CONFIG_BYTES)
        self._architecture = _architecture(self._config)
        _refuse(self._config)
        self._files = ["config.json", "tokenizer.json"]
        self.tokenizer_json = self._read("tokenizer.json", _TOKENIZER_BYTES)
        self._tokens = load_tokenizer(self.tokenizer_json)
        self._settings = self._optional("tokenizer_config.json")
        self._generation = self._optional("generation_config.json")
        self.chat_template = self._chat_template()
        self._shards = self._open_shards()
        self._tied = boolean(self._config, "tie_word_embeddings", what=_WHAT, default=False)
        self._check_inventory()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file read."""
        return tuple(self._path / name for name in sorted(self._files))

    def config(self, *, name: str, sha256: bytes, context: int | None) -> ModelConfig:
        """The model's configuration; `context` replaces max_position_embeddings."""
        raw = self._config
        heads, hidden = integer(raw, "num_attention_heads", what=_WHAT), integer(raw, "hidden_size", what=_WHAT)
        head_dim = integer(raw, "head_dim", what=_WHAT, default=128 if self._architecture == "qwen3" else 0)
        intermediate = integer(raw, "intermediate_size", what=_WHAT)
        bias = boolean(raw, "attention_bias", what=_WHAT, default=False)
        theta, scaling = _rope(raw)
        bos, eos = self._ids()
        return ModelConfig(
            profile=PROFILE,
            name=name,
            architecture=self._architecture,
            hidden=hidden,
            layers=integer(raw, "num_hidden_layers", what=_WHAT),
            heads=heads,
            kv_heads=integer(raw, "num_key_value_heads", what=_WHAT, default=heads),
            head_dim=head_dim or (hidden // heads if heads else 0),
            intermediate=intermediate,
            vocab=integer(raw, "vocab_size", what=_WHAT),
            context=integer(raw, "max_position_embeddings", what=_WHAT) if context is None else context,
            rms_eps=binary32(number(raw, "rms_norm_eps", what=_WHAT, default=1e-6)),
            rope_theta=binary32(theta),
            rope_scaling=scaling,
            qk_norm=self._architecture == "qwen3",
            attention_bias=True if self._architecture == "qwen2" else bias,
            hadamard_block=hadamard_block(intermediate),
            rotation=rotation_for(hidden),
            bos_id=bos,
            eos_ids=eos,
            add_bos=self._adds_bos(bos),
            source=SourceInfo(format=self.format, name=self.name, sha256=sha256),
        )

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a matrix, or the whole of a vector, as float32."""
        name = EMBED if tensor == HEAD and self._tied else tensor
        piece = _slice(self._shards[name], name)
        whole: Tensor = piece[:] if len(piece.get_shape()) == 1 else piece[start:stop]
        return whole.to(torch.float32)

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with (self._path / name).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as err:
            raise WeightsError(f"{self._path / name}: {err.strerror}", code="weights.missing") from err
        if len(data) > limit:
            raise WeightsError(f"{name}: expected at most {limit} bytes", code="weights.json")
        return data

    def _optional(self, name: str) -> dict[str, Json]:
        if not (self._path / name).is_file():
            return {}
        self._files.append(name)
        return parse_object(self._read(name, _TOKENIZER_BYTES), what=name, max_bytes=_TOKENIZER_BYTES)

    def _chat_template(self) -> str:
        """chat_template.jinja, else tokenizer_config.json's own, of several the one named `default`; else none."""
        if (self._path / "chat_template.jinja").is_file():
            self._files.append("chat_template.jinja")
            try:
                return self._read("chat_template.jinja", 1 << 20).decode("utf-8")
            except UnicodeDecodeError as err:
                raise WeightsError("chat_template.jinja: expected UTF-8", code="weights.text") from err
        found = self._settings.get("chat_template")
        if isinstance(found, list):
            named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
            found = named[0].get("template") if named else None
        if found is not None and not isinstance(found, str):
            raise WeightsError("chat_template: expected text", code="weights.unsupported_tokenizer")
        return found or ""

    def _open_shards(self) -> dict[str, safe_open]:
        """The opened file of every tensor. The index, where there is one, must agree with the files."""
        index_name = "model.safetensors.index.json"
        claimed: dict[str, Json] | None = None
        if (self._path / index_name).is_file():
            self._files.append(index_name)
            index = parse_object(self._read(index_name, _INDEX_BYTES), what=index_name, max_bytes=_INDEX_BYTES)
            claimed = mapping(index, "weight_map", what=index_name)
            names = sorted({str(value) for value in claimed.values()})
        else:
            names = ["model.safetensors"]
        shards: dict[str, safe_open] = {}
        for name in names:
            if not _SHARD.fullmatch(name):
                raise WeightsError(f"{index_name}: expected plain file names, got {name[:64]!r}", code="weights.json")
            if not (self._path / name).is_file():
                raise WeightsError(f"{name}: expected in the folder, not found", code="weights.missing")
            self._files.append(name)
            try:
                shard = safe_open(self._path / name, framework="pt")
            except SafetensorError as err:
                raise WeightsError(f"{name}: {str(err)[:200]}", code="weights.safetensors") from err
            for tensor in _names(shard):
                if tensor in shards or (claimed is not None and claimed.get(tensor) != name):
                    raise WeightsError(f"{tensor[:64]}: not where the index says", code="weights.safetensors")
                shards[tensor] = shard
        return shards

    def _check_inventory(self) -> None:
        config = self.config(name="check", sha256=bytes(32), context=1)
        found: dict[str, tuple[int, ...]] = {}
        for name, shard in self._shards.items():
            if _IGNORED.fullmatch(name):
                continue
            piece = _slice(shard, name)
            if piece.get_dtype() not in _DTYPES:
                raise WeightsError(
                    f"{name[:64]}: expected {', '.join(_DTYPES)}, got {piece.get_dtype()}",
                    code="weights.unsupported_quantisation",
                )
            found[name] = tuple(piece.get_shape())
        expected = expected_tensors(config, tied=self._tied)
        if self._tied and found.get(HEAD) == found.get(EMBED):
            self._check_same_head(config.vocab)
            del found[HEAD]
        check_tensors(found, expected)

    def _check_same_head(self, vocab: int) -> None:
        """A tied checkpoint may carry the head as well; it must then be the embedding."""
        for start in range(0, vocab, 4096):
            stop = min(start + 4096, vocab)
            head, embed = (_slice(self._shards[name], name)[start:stop] for name in (HEAD, EMBED))
            if not torch.equal(head, embed):
                raise WeightsError("lm_head.weight: expected the embedding (tied)", code="weights.unsupported_tensor")

    def _ids(self) -> tuple[int | None, tuple[int, ...]]:
        """bos and eos ids: generation_config.json's where it has them, else config.json's."""

        def first(key: str) -> Json:
            found = self._generation.get(key)
            return self._config.get(key) if found is None else found

        bos, eos = first("bos_token_id"), first("eos_token_id")
        several = eos if isinstance(eos, list) else [eos]
        if (bos is not None and not isinstance(bos, int)) or not all(isinstance(i, int) for i in several):
            raise WeightsError("bos_token_id, eos_token_id: expected token ids", code="weights.unsupported_tokenizer")
        return bos, tuple(dict.fromkeys(i for i in several if isinstance(i, int)))

    def _adds_bos(self, bos: int | None) -> bool:
        """Whether tokenizer.json's post-processor puts bos, and nothing else, before a text."""
        added = self._tokens.encode("", add_special_tokens=True).ids
        if added not in ([], [bos]):
            raise WeightsError(
                f"tokenizer.json: expected bos or nothing to be added to a text, got {added[:8]}",
                code="weights.unsupported_tokenizer",
            )
        return bool(added)


def _slice(shard: Any, name: str) -> Any:  # the library has no types
    return shard.get_slice(name)


def _names(shard: Any) -> list[str]:
    return list(shard.keys())


def _architecture(raw: dict[str, Json]) -> str:
    found = text(raw, "model_type", what=_WHAT)
    if found not in ARCHITECTURES:
        raise WeightsError(
            f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {found[:64]!r}",
            code="weights.unsupported_architecture",
        )
    classes = raw.get("architectures")
    if classes is not None and classes != [_CLASSES[found]]:
        raise WeightsError(
            f"architectures: expected {_CLASSES[found]}, got {str(classes)[:64]}",
            code="weights.unsupported_architecture",
        )
    return found


def _refuse(raw: dict[str, Json]) -> None:
    """Refuse by name what the profile cannot honour."""
    for field, (neutral, what) in _NEUTRAL.items():
        if field in raw and raw[field] not in neutral:
            raise _unsupported(field, raw[field], what, neutral)
    layer_types = raw.get("layer_types")
    if layer_types is not None and set(map(str, _list(layer_types))) - {"full_attention"}:
        raise _unsupported("layer_types", layer_types, "sliding_window", ("full_attention",))
    if raw["model_type"] == "llama" and raw.get("sliding_window") is not None:  # the others need use_sliding_window
        raise _unsupported("sliding_window", raw["sliding_window"], "sliding_window", (None,))


def _unsupported(field: str, value: Json, what: str, neutral: tuple[Json, ...]) -> WeightsError:
    expected = " or ".join("nothing" if known is None else str(known).lower() for known in neutral)
    return WeightsError(f"{field}: expected {expected}, got {str(value)[:64]}", code=f"weights.unsupported_{what}")


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value]


def _rope(raw: dict[str, Json]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None]
    if len(given) == 2 and raw[given[0]] != raw[given[1]]:
        raise _unsupported(
            "rope_parameters, rope_scaling",
            "both, and they differ",
            "rope_scaling",
            ("one of them", "the same in both"),
        )
    key = given[0] if given else "rope_parameters"
    rope: dict[str, Json] = mapping(raw, key, what=_WHAT) if given else {}
    theta = number(rope, "rope_theta", what=key, default=number(raw, "rope_theta", what=_WHAT, default=_DEFAULT_THETA))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _unsupported(f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "rope_partial", (None, 1.0))
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in _SCALING_KEYS:
        raise WeightsError(
            f"{key}.rope_type: expected one of {', '.join(_SCALING_KEYS)}, got {kind[:32]!r}",
            code="weights.unsupported_rope_scaling",
        )
    if odd := sorted(rope.keys() - {*_ROPE_KEYS, *_SCALING_KEYS[kind]}):  # also one set of values a layer type
        raise _unsupported(f"{key}.{odd[0][:64]}", rope[odd[0]], "rope_scaling", (None,))
    if kind == "default":
        return theta, None
    factor = number(rope, "factor", what=key)
    if kind == "linear":
        return theta, LinearScaling(factor=binary32(factor))
    return theta, Llama3Scaling(
        factor=factor,
        low_freq_factor=number(rope, "low_freq_factor", what=key),
        high_freq_factor=number(rope, "high_freq_factor", what=key),
        original_context=integer(rope, "original_max_position_embeddings", what=key),
    )
