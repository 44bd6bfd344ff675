"""What an artefact describes: the model's shape, its rotation and the exact list of its tensors.

A `ModelConfig` that exists is one the `exact-v1` profile can run: every limit is checked when it is made, whether the
values come from a checkpoint being built or from an untrusted `model.json` (see `modeljson`). The list of tensors is a
function of the configuration alone, so a reader knows every name, type, shape and offset before it reads a tensor.

Not checked here: the tensors' values (`artefact`), and whether tokenizer and vocabulary fit (`build`).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from countermark.errors import WeightsError
from countermark_kernels import PROFILE
from countermark_kernels.attention import CONTEXT_MAX
from countermark_kernels.linear import K_MAX
from countermark_kernels.norm import EPS_MIN
from countermark_kernels.rope import HEAD_SIZES
from countermark_kernels.sampler import VOCAB_MAX

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MAX_HADAMARD_BLOCK = 512
WIDTH_STEP = 32  # hidden and intermediate sizes are multiples of this
ROTATION_SEED = 0x636F756E7465726D  # "counterm"; any constant does, it is part of the artefact


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """The `linear` RoPE scaling (position interpolation): every frequency divided by `factor`, a binary32 value."""

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1e6 or binary32(self.factor) != self.factor:
            raise WeightsError(
                f"rope_scaling.factor: expected a binary32 value above 0 and up to 1e6, got {self.factor}",
                code="weights.unsupported_rope_scaling",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """The `llama3` RoPE scaling of Llama 3.1 and later, as transformers names its four numbers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        values = (self.factor, self.low_freq_factor, self.high_freq_factor)
        if not all(math.isfinite(v) and 0 < v <= 1e6 for v in values) or self.high_freq_factor <= self.low_freq_factor:
            raise WeightsError(
                f"rope_scaling: expected finite factors, low below high, got {values}",
                code="weights.unsupported_rope_scaling",
            )
        _within("rope_scaling.original_context", self.original_context, 1, 1 << 24, "rope_scaling")


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """R = diag(signs) (Q_odd (x) H_power) over the residual stream, width = odd * power, signs from Philox(seed)."""

    seed: int
    odd: int
    power: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """Where the weights came from. `sha256`: of the GGUF file, or of the folder's sorted `sha256sum` listing."""

    format: str
    name: str
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One member of the artefact: `dtype` is `f32` or `int8`, data little-endian and row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def member(self) -> str:
        """The member's path inside the image."""
        return f"tensors/{self.name}.{self.dtype}"

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "f32" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the engine needs besides tensors. `rms_eps` and `rope_theta` are binary32 values.

    Raises `WeightsError` (`weights.unsupported_*`) when made with values the profile cannot run.
    """

    profile: str
    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qk_norm: bool
    attention_bias: bool
    hadamard_block: int
    rotation: Rotation
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    source: SourceInfo

    def __post_init__(self) -> None:
        if self.profile != PROFILE:
            raise WeightsError(f"profile: expected {PROFILE}, got {self.profile!r}", code="weights.unsupported_profile")
        if self.architecture not in ARCHITECTURES:
            raise WeightsError(
                f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}",
                code="weights.unsupported_architecture",
            )
        if not 1 <= len(self.name) <= 128 or not self.name.isprintable():
            raise WeightsError(f"name: expected 1 to 128 printable characters, got {self.name!r}", code="weights.name")
        if self.head_dim not in HEAD_SIZES:
            raise WeightsError(
                f"head_dim: expected {' or '.join(map(str, HEAD_SIZES))}, got {self.head_dim}",
                code="weights.unsupported_head_dim",
            )
        _within("layers", self.layers, 1, 512, "layers")
        _within("heads", self.heads, 1, 512, "heads")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise WeightsError(
                f"kv_heads: expected a divisor of {self.heads}, got {self.kv_heads}", code="weights.unsupported_heads"
            )
        for field, width in (
            ("hidden", self.hidden),
            ("intermediate", self.intermediate),
            ("heads * head_dim", self.heads * self.head_dim),
        ):
            if width % WIDTH_STEP or not WIDTH_STEP <= width <= K_MAX:
                raise WeightsError(
                    f"{field}: expected a multiple of {WIDTH_STEP} up to {K_MAX}, got {width}",
                    code="weights.unsupported_width",
                )
        _within("vocab", self.vocab, 2, VOCAB_MAX, "vocab")
        _within("context", self.context, 1, CONTEXT_MAX, "context")
        for field, value, low, high in (
            ("rms_eps", self.rms_eps, EPS_MIN, 1.0),
            ("rope_theta", self.rope_theta, 2.0**-100, 1e30),
        ):
            if not low <= value <= high or binary32(value) != value:
                raise WeightsError(
                    f"{field}: expected a binary32 value from {low} to {high}, got {value}",
                    code=f"weights.unsupported_{field}",
                )
        if self.qk_norm != (self.architecture == "qwen3") or (self.architecture == "qwen2" and not self.attention_bias):
            raise WeightsError(
                f"qk_norm, attention_bias: not those of {self.architecture}", code="weights.unsupported_architecture"
            )
        if self.hadamard_block != hadamard_block(self.intermediate):
            raise WeightsError(
                f"hadamard_block: expected {hadamard_block(self.intermediate)}, got {self.hadamard_block}",
                code="weights.unsupported_rotation",
            )
        if self.rotation != rotation_for(self.hidden):
            raise WeightsError(
                f"rotation: expected {rotation_for(self.hidden)}, got {self.rotation}",
                code="weights.unsupported_rotation",
            )
        ids = self.eos_ids if self.bos_id is None else (self.bos_id, *self.eos_ids)
        if not 1 <= len(self.eos_ids) <= 16 or len(set(self.eos_ids)) != len(self.eos_ids):
            raise WeightsError("eos_ids: expected 1 to 16 distinct ids", code="weights.unsupported_tokenizer")
        if not all(0 <= i < self.vocab for i in ids) or (self.add_bos and self.bos_id is None):
            raise WeightsError("bos_id, eos_ids: expected ids of the vocabulary", code="weights.unsupported_tokenizer")
        if (
            self.source.format not in ("gguf", "safetensors")
            or len(self.source.sha256) != 32
            or not 1 <= len(self.source.name) <= 255
            or not self.source.name.isprintable()
        ):
            raise WeightsError("source: expected a format, a name and a SHA-256", code="weights.source")

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused projection: all q, then all k, then all v."""
        return self.q_rows + 2 * self.kv_rows

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias: Llama and Qwen3 with attention_bias do, Qwen2 never does."""
        return self.attention_bias and self.architecture != "qwen2"


def binary32(value: float) -> float:
    """The binary32 value nearest to `value` (ties to even); infinity when it does not fit."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def hadamard_block(width: int) -> int:
    """Largest power of two that divides `width`, at most 512: the block of the online rotation before down_proj."""
    return min(width & -width, MAX_HADAMARD_BLOCK)


def rotation_for(hidden: int) -> Rotation:
    """The residual rotation of a model of this width: as much Hadamard as divides it, Householder over the rest."""
    power = hidden & -hidden
    return Rotation(seed=ROTATION_SEED, odd=hidden // power, power=power)


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the artefact, in the order of the image: as the forward pass meets them."""
    hidden, inter, vocab, dim = config.hidden, config.intermediate, config.vocab, config.head_dim
    specs = [TensorSpec(name="embed", dtype="f32", shape=(vocab, hidden))]
    specs += [TensorSpec(name=f"rope.{t}", dtype="f32", shape=(config.context, dim // 2)) for t in ("cos", "sin")]

    def linear(name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        specs.append(TensorSpec(name=name, dtype="int8", shape=(rows, columns)))
        specs.append(TensorSpec(name=f"{name}.scale", dtype="f32", shape=(rows,)))
        if bias:
            specs.append(TensorSpec(name=f"{name}.bias", dtype="f32", shape=(rows,)))

    for i in range(config.layers):
        linear(f"layers.{i}.qkv", config.qkv_rows, hidden, bias=config.attention_bias)
        if config.qk_norm:
            specs += [TensorSpec(name=f"layers.{i}.{x}_norm", dtype="f32", shape=(dim,)) for x in ("q", "k")]
        linear(f"layers.{i}.o", hidden, config.q_rows, bias=config.output_bias)
        linear(f"layers.{i}.gate_up", 2 * inter, hidden)
        linear(f"layers.{i}.down", hidden, inter)
    linear("head", vocab, hidden)
    return tuple(specs)


def _within(field: str, value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        raise WeightsError(f"{field}: expected {low} to {high}, got {value}", code=f"weights.unsupported_{what}")
