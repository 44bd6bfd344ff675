"""`model.json`: a `ModelConfig` and its list of tensors as one JSON object with one possible encoding.

The reader refuses unknown and missing fields, re-encodes what it understood and compares: a file with other spacing,
another key order, or a tensor list that does not follow from the configuration is refused.
"""

from __future__ import annotations

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    Rotation,
    SourceInfo,
    tensor_specs,
)
from countermark_appliance.engine.weights.strictjson import (
    Json,
    boolean,
    digest,
    encode_object,
    exact_keys,
    integer,
    mapping,
    number,
    parse_object,
    text,
)

MAX_BYTES = 4 * 1024 * 1024
_INTEGERS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "context", "hadamard_block")
_SCALINGS = {
    "linear": ("type", "factor"),
    "llama3": ("type", "factor", "low_freq_factor", "high_freq_factor", "original_context"),
}
_KEYS = (
    *_INTEGERS,
    *("profile", "name", "architecture", "rms_eps", "rope_theta", "rope_scaling", "qk_norm", "attention_bias"),
    *("rotation", "bos_id", "eos_ids", "add_bos", "source", "tensors"),
)


def encode_model(config: ModelConfig) -> bytes:
    """Encode the configuration and its tensor list."""
    value: dict[str, Json] = {key: getattr(config, key) for key in _INTEGERS}
    value |= {
        "profile": config.profile,
        "name": config.name,
        "architecture": config.architecture,
        "rms_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _scaling_value(config.rope_scaling),
        "qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
        "rotation": {"seed": config.rotation.seed, "odd": config.rotation.odd, "power": config.rotation.power},
        "bos_id": config.bos_id,
        "eos_ids": list(config.eos_ids),
        "add_bos": config.add_bos,
        "source": {
            "format": config.source.format,
            "name": config.source.name,
            "sha256": config.source.sha256.hex(),
        },
        "tensors": {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in tensor_specs(config)},
    }
    return encode_object(value)


def parse_model(data: bytes) -> ModelConfig:
    """Parse `model.json`. Raises `WeightsError`: `weights.json`, `weights.model_json`, or `weights.unsupported_*`."""
    what = "model.json"
    value = parse_object(data, what=what, max_bytes=MAX_BYTES)
    exact_keys(value, _KEYS, what=what)
    eos_ids = value["eos_ids"]
    if not isinstance(eos_ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in eos_ids):
        raise WeightsError("model.json.eos_ids: expected a list of integers", code="weights.json")
    config = ModelConfig(
        **{key: integer(value, key, what=what) for key in _INTEGERS},
        profile=text(value, "profile", what=what),
        name=text(value, "name", what=what),
        architecture=text(value, "architecture", what=what),
        rms_eps=number(value, "rms_eps", what=what),
        rope_theta=number(value, "rope_theta", what=what),
        rope_scaling=None if value["rope_scaling"] is None else _scaling(mapping(value, "rope_scaling", what=what)),
        qk_norm=boolean(value, "qk_norm", what=what),
        attention_bias=boolean(value, "attention_bias", what=what),
        rotation=_rotation(mapping(value, "rotation", what=what)),
        bos_id=None if value["bos_id"] is None else integer(value, "bos_id", what=what),
        eos_ids=tuple(i for i in eos_ids if isinstance(i, int)),
        add_bos=boolean(value, "add_bos", what=what),
        source=_source(mapping(value, "source", what=what)),
    )
    if encode_model(config) != data:
        raise WeightsError(
            "model.json: expected the one encoding of its configuration, with the tensors that follow from it",
            code="weights.model_json",
        )
    return config


def _scaling_value(scaling: RopeScaling) -> dict[str, Json]:
    kind = "linear" if isinstance(scaling, LinearScaling) else "llama3"
    return {"type": kind} | {key: getattr(scaling, key) for key in _SCALINGS[kind][1:]}


def _scaling(value: dict[str, Json]) -> RopeScaling:
    what = "model.json.rope_scaling"
    kind = text(value, "type", what=what)
    if kind not in _SCALINGS:
        message = f"{what}.type: expected one of {', '.join(_SCALINGS)}, got {kind[:32]!r}"
        raise WeightsError(message, code="weights.unsupported_rope_scaling")
    exact_keys(value, _SCALINGS[kind], what=what)
    if kind == "linear":
        return LinearScaling(factor=number(value, "factor", what=what))
    return Llama3Scaling(
        factor=number(value, "factor", what=what),
        low_freq_factor=number(value, "low_freq_factor", what=what),
        high_freq_factor=number(value, "high_freq_factor", what=what),
        original_context=integer(value, "original_context", what=what),
    )


def _rotation(value: dict[str, Json]) -> Rotation:
    what = "model.json.rotation"
    exact_keys(value, ("seed", "odd", "power"), what=what)
    return Rotation(
        seed=integer(value, "seed", what=what),
        odd=integer(value, "odd", what=what),
        power=integer(value, "power", what=what),
    )


def _source(value: dict[str, Json]) -> SourceInfo:
    what = "model.json.source"
    exact_keys(value, ("format", "name", "sha256"), what=what)
    return SourceInfo(
        format=text(value, "format", what=what),
        name=text(value, "name", what=what),
        sha256=digest(value, "sha256", what=what),
    )
