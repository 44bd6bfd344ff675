"""exact-v1 against a second implementation: `second_opinion.c`, plain C written from NUMERICS.md and nothing else.

First that implementation alone, against the page's check values, published vectors and cases worked out by hand; then
every logit of the product, its draws, its fingerprints and its errors against it, bit for bit. Closeness to float
models is tested elsewhere.
"""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import byref, c_float, c_int8, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from countermark_appliance.engine import weights
from countermark_appliance.engine.model import Chunk, Model
from countermark_kernels import ieee
from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.sampler import History, SamplerParams, sample

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "weights"), str(HERE.parent / "engine")]

from tinymodel import TinyArtefact  # noqa: E402
from tinymodels import write_folder  # noqa: E402

CODES = {1: "numerics.not_finite", 2: "numerics.range", 3: "numerics.context", 4: "memory"}
FLAGS = ("-std=c11", "-O2", "-ffp-contract=off", "-fno-fast-math", "-Wall", "-Wextra", "-shared", "-fPIC")
NONE = History()


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p)]


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    ]


_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "context")


class _Model(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int64) for name in _SIZES),
        ("eps", c_float),
        ("embed", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", _Linear),
    ]


class _Settings(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_float) for name in ("temperature", "repetition", "presence", "frequency")),
        *((name, c_int64) for name in ("top_k", "top_p", "min_p")),
        ("seed", c_uint64),
        ("biased", c_int64),
        ("bias_id", c_void_p),
        ("bias", c_void_p),
    ]


def ints(values: Sequence[int]) -> Any:
    return (c_int32 * max(len(values), 1))(*values)


def floats(values: Sequence[float]) -> Any:
    return (c_float * max(len(values), 1))(*values)


def pattern(value: float) -> int:
    """bits(x) of the page."""
    return c_uint32.from_buffer_copy(c_float(value)).value


class SecondOpinion:
    """The C functions with Python's types. A numerics error is returned as its code."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        for name, arguments in (("so_exp2", 1), ("so_bf16", 1), ("so_exp2_short", 2), ("so_fma", 3)):
            getattr(self.c, name).restype, getattr(self.c, name).argtypes = c_float, [c_float] * arguments
        for name in ("so_check_value", "so_splitmix64"):
            getattr(self.c, name).restype = c_uint64
        self.c.so_splitmix64.argtypes = [c_uint64]
        self.c.so_inverse_rms.argtypes = [c_void_p, c_int64, c_float, c_void_p]
        self.c.so_fingerprint.argtypes = [c_void_p, c_int64, c_void_p]

    def forward(self, artefact: Any, tokens: Sequence[int]) -> tuple[Tensor, str | None]:
        """Every position's logits, [tokens, vocab], up to the first error, and that error's code."""
        config = artefact.config
        held: list[Tensor] = []

        def at(name: str, present: bool = True) -> int | None:
            if not present:
                return None
            held.append(artefact.tensor(name).contiguous())
            return held[-1].data_ptr()

        def linear(name: str, bias: bool = False) -> _Linear:
            return _Linear(at(name), at(f"{name}.scale"), at(f"{name}.bias", bias))

        layers = (_Layer * config.layers)()
        for i in range(config.layers):
            layers[i] = _Layer(
                linear(f"layers.{i}.qkv", config.attention_bias),
                linear(f"layers.{i}.o", config.output_bias),
                linear(f"layers.{i}.gate_up"),
                linear(f"layers.{i}.down"),
                at(f"layers.{i}.q_norm", config.qk_norm),
                at(f"layers.{i}.k_norm", config.qk_norm),
            )
        model = _Model(*(getattr(config, name) for name in _SIZES), config.rms_eps)
        model.embed, model.cos, model.sin = at("embed"), at("rope.cos"), at("rope.sin")
        model.layer, model.head = layers, linear("head")
        logits = torch.zeros(len(tokens), config.vocab)
        done = c_int64()
        code = self.c.so_forward(
            byref(model), ints(tokens), c_int64(len(tokens)), c_void_p(logits.data_ptr()), byref(done)
        )
        return logits[: done.value], CODES.get(code)

    def sample(self, logits: Tensor, p: SamplerParams, position: int, history: History = NONE) -> int | str:
        settings = _Settings(
            *(p.temperature, p.repetition, p.presence, p.frequency),
            *(p.top_k, p.top_p_20bit, p.min_p_20bit, p.seed, len(p.logit_bias)),
            ctypes.cast(ints(list(p.logit_bias)), c_void_p),
            ctypes.cast(floats(list(p.logit_bias.values())), c_void_p),
        )
        token = c_int32(-1)
        code = self.c.so_sample(
            c_void_p(logits.data_ptr()),
            c_int64(logits.numel()),
            byref(settings),
            c_uint32(position),
            *(ints(history.prompt), c_int64(len(history.prompt))),
            *(ints(history.output), c_int64(len(history.output))),
            byref(token),
        )
        return CODES[code] if code else token.value

    def fingerprint(self, logits: Tensor) -> bytes:
        out = (c_uint8 * 16)()
        self.c.so_fingerprint(logits.data_ptr(), logits.numel(), out)
        return bytes(out)


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> SecondOpinion:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("NO C COMPILER (cc, gcc or clang): exact-v1 is not compared with its second implementation")
    library = tmp_path_factory.mktemp("second_opinion") / "second_opinion.so"
    command = [compiler, *FLAGS, "-o", str(library), str(HERE / "second_opinion.c"), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return SecondOpinion(library)


# The second implementation alone.


def test_check_values(second: SecondOpinion) -> None:
    assert second.c.so_check_value(0) == 3676592844379889996
    assert second.c.so_check_value(1) == 13735630857509458880


def test_exp2_at_its_ends(second: SecondOpinion) -> None:
    assert [second.c.so_exp2(x) for x in (0.0, -0.0, 1.0, -126.0, -1e9, 126.0, 1e9)] == [
        *(1.0, 1.0, 2.0, 2.0**-126, 2.0**-126, 2.0**126, 2.0**126)
    ]
    assert [second.c.so_exp2_short(k, 0.0) for k in (0.0, 1.0, -97.0)] == [1.0, 2.0, 2.0**-97]
    assert abs(second.c.so_exp2(0.5) / math.sqrt(2) - 1) < 2e-7
    assert 1e-6 < abs(second.c.so_exp2_short(0.0, 0.5) / math.sqrt(2) - 1) < 1e-3


def test_fma(second: SecondOpinion) -> None:
    """Each case would differ if the product or a binary64 sum were rounded first."""
    tiny = 2.0**-149
    assert second.c.so_fma(1 + 2.0**-23, 1 + 2.0**-23, -1 - 2.0**-22) == 2.0**-46
    assert second.c.so_fma(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80) == 1 + 2.0**-11 + 2.0**-23  # just over a tie
    assert second.c.so_fma(1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80)) == 1 + 2.0**-11
    assert second.c.so_fma(2.0**-75, 2.0**-75, tiny) == 2 * tiny  # a tie between subnormals, to even
    assert second.c.so_fma(2.0**-75, -(2.0**-75), tiny) == 0.0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123 1.14.0, tests/kat_vectors, philox4x32 10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(second: SecondOpinion, counter: Sequence[int], key: Sequence[int], expected: Sequence[int]) -> None:
    words = (c_uint32 * 4)(*counter)
    second.c.so_philox(words, c_uint32(key[0]), c_uint32(key[1]))
    assert tuple(words) == tuple(expected)


def test_splitmix64(second: SecondOpinion) -> None:
    assert second.c.so_splitmix64(0) == 0xE220A8397B1DCDAF
    assert second.c.so_splitmix64(1234567) == 6457827717110365317


def test_fingerprint_against_big_integers(second: SecondOpinion) -> None:
    values = [1.5, -0.0, 0.0, -3e38, 2.0**-149]
    lanes = [
        sum(pattern(v) * (second.c.so_splitmix64(2 * i + lane) | 1) for i, v in enumerate(values)) % 2**64
        for lane in (0, 1)
    ]
    expected = b"".join(lane.to_bytes(8, "little") for lane in lanes)
    assert second.fingerprint(torch.tensor(values)) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0x3F800000, 0x3F800000),
        (0x3F808000, 0x3F800000),  # a tie goes to the even neighbour: down
        (0x3F818000, 0x3F820000),  # and up
        (0x3F808001, 0x3F810000),
        (0xBFFFFFFF, 0xC0000000),  # carries into the exponent
        (0x00000001, 0x00000000),
        (0x80018000, 0x80020000),
        (0x7F7FFFFF, 0x7F800000),  # the next amax reports it
    ],
)
def test_bf16(second: SecondOpinion, before: int, after: int) -> None:
    assert pattern(second.c.so_bf16(c_float.from_buffer_copy(c_uint32(before)))) == after


def test_quantise(second: SecondOpinion) -> None:
    q, s = (c_int8 * 4)(), c_float()

    def quantise(*row: float) -> tuple[int, list[int], float]:
        code = second.c.so_quantise(floats(row), c_int64(len(row)), q, byref(s))
        return code, list(q), s.value

    assert quantise(127.0, 2.5, -3.5, 0.49) == (0, [127, 2, -4, 0], 1.0)
    assert quantise(-254.0, 254.0, 1.0, 3.0) == (0, [-127, 127, 0, 2], 2.0)
    assert quantise(2.0**-100, 0.0, 0.0, -(2.0**-101)) == (0, [127, 0, 0, -64], ieee.f32(2.0**-100 / 127))
    assert quantise(2.0**-100 * (1 - 2.0**-24), 0.0, 0.0, 0.0) == (0, [0, 0, 0, 0], 0.0)
    assert quantise(0.0, math.inf, 0.0, 0.0)[0] == quantise(math.nan, 0.0, 0.0, 0.0)[0] == 1


@pytest.mark.parametrize(
    ("row", "eps", "expected"),
    [
        ((2.0, -2.0, 2.0, -2.0), 0.0, (0, 0.5)),
        ((3.0, 1.0, 1.0, 1.0), 1.0, (0, 0.5)),
        ((2.0**-99,), 2.0**-40, (0, 2.0**20)),
        ((2.0**63,), 2.0**-40, (0, 2.0**-63)),
        ((2.0**64,), 2.0**-40, (2, 0.0)),  # the mean of squares leaves binary32
        ((math.nan,), 1.0, (1, 0.0)),
    ],
)
def test_inverse_rms(second: SecondOpinion, row: Sequence[float], eps: float, expected: tuple[int, float]) -> None:
    r = c_float()
    code = second.c.so_inverse_rms(floats(row), len(row), eps, byref(r))
    assert (code, r.value) == expected


def test_hadamard(second: SecondOpinion) -> None:
    x = floats([1.0, 2.0, 4.0, 8.0])
    second.c.so_hadamard(x, c_int64(4))
    assert list(x) == [15.0, -5.0, -9.0, 3.0]


# The product against it: the model.


def product(model: Model, tokens: Sequence[int]) -> Tensor:
    chunk = Chunk(cache=model.new_cache(len(tokens)), start=0, tokens=list(tokens), logits=len(tokens))
    return model.forward([chunk])


def agree(second: SecondOpinion, artefact: Any, tokens: Sequence[int]) -> Tensor:
    """Both run the whole sequence, with the same bits and the same fingerprints."""
    ours = product(Model(artefact), tokens)
    theirs, error = second.forward(artefact, tokens)
    assert error is None
    differ = (ours.view(torch.int32) != theirs.view(torch.int32)).any(dim=1)
    assert ours.shape == theirs.shape and not differ.any(), f"first at position {int(differ.int().argmax())}"
    assert encode(fingerprint(ours, ours.shape[1])) == [second.fingerprint(row) for row in theirs]
    return ours


def some_tokens(vocab: int, count: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randrange(vocab) for _ in range(count)]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": False}),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 288}),  # biases, also of o
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 1024}),
    ],
    ids=("llama", "llama-biased", "qwen2", "qwen3", "qwen3-64"),
)
def test_built_models(second: SecondOpinion, tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    write_folder(tmp_path / "tiny", architecture, max_position_embeddings=256, **changes)
    weights.build(tmp_path / "tiny", tmp_path / "out")
    artefact = weights.load(tmp_path / "out")
    logits = agree(second, artefact, some_tokens(artefact.config.vocab, 160))
    assert torch.unique(logits, dim=0).shape[0] == 160


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_random_integer_weights(second: SecondOpinion, architecture: str) -> None:
    artefact = TinyArtefact(architecture, layers=3)
    agree(second, artefact, some_tokens(artefact.config.vocab, 300))


# A seed; then powers of two: the least and greatest embedding row; factors of layer 0's queries, values and output, of
# the biases of queries and keys, of layer 0's QK-norm gains.
WILD = {
    "almost-nothing": (1, -104, -92, -6, 85, 0, 0, 86),
    "hardly-a-query": (2, -20, 20, -90, 5, 0, -90, -80),
    "large-values": (3, -60, 60, 0, 26, -26, 2, 1),
    "small-values": (4, -90, -30, 0, 0, 0, 2, 1),
    "far-scores": (7, -70, 20, 0, 24, -20, 3, 3),
    "powers-of-two": (6, -20, 20, 5, 3, 0, -2, 0),
}


@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_wild_magnitudes(second: SecondOpinion, architecture: str, kind: str) -> None:
    """Rows from next to nothing to huge, one in eight of them and one channel in ten zero: clamps, floors and TINY."""
    seed, low, high, queries, values, output, biases, gains = WILD[kind]
    artefact = TinyArtefact(architecture, seed=seed, layers=3)
    t, rng = artefact.tensor, torch.Generator().manual_seed(seed)
    embed = t("embed")
    place = (torch.rand(embed.shape[0], 1, generator=rng) * 2 - 0.9).clamp(0, 1)  # half at the low end
    embed *= 2.0 ** (low + place * (high - low)).round()
    embed *= torch.rand(embed.shape[0], 1, generator=rng) >= 0.125
    for name in ("qkv", "o", "gate_up", "down"):
        scale = t(f"layers.0.{name}.scale")
        scale *= torch.rand(scale.shape, generator=rng) >= 0.1
    t("layers.0.qkv.scale")[:128] *= 2.0**queries
    t("layers.0.qkv.scale")[-64:] *= 2.0**values
    t("layers.0.o.scale").mul_(2.0**output)
    for i in range(3):
        if architecture == "qwen2":
            bias = t(f"layers.{i}.qkv.bias")
            bias[:-64] *= 2.0**biases
            bias[-64:] = 0  # it would hide the small rows
    if architecture == "qwen3":
        t("layers.0.q_norm").mul_(2.0**gains)
        t("layers.0.k_norm").mul_(2.0**gains)
    if kind == "powers-of-two" and architecture == "qwen2":  # the values' scales: 8, and the next number after it
        for i, value in ((1, 127 * 8), (2, (127 + 2.0**-16) * 8)):
            t(f"layers.{i}.qkv.scale")[-64:] = 0
            t(f"layers.{i}.qkv.bias")[-64] = value
    agree(second, artefact, some_tokens(artefact.config.vocab, 150))


@pytest.mark.parametrize("gate", [70.0, 90.0, 130.0])
def test_gates_where_exp_is_clamped(second: SecondOpinion, gate: float) -> None:
    """Every gate near -`gate`, and a down projection that makes what is left of them visible."""
    artefact = TinyArtefact(layers=1)
    artefact.tensor("embed").abs_()
    artefact.tensor("layers.0.o.scale").zero_()
    gates = artefact.tensor("layers.0.gate_up")[:192]
    gates.copy_(-gates.abs().clamp(min=1))
    scale = artefact.tensor("layers.0.gate_up.scale")
    scale[:192] = gate / 4900
    scale[192:] *= 2.0**60
    artefact.tensor("layers.0.down.scale").mul_(2.0**60)
    agree(second, artefact, some_tokens(artefact.config.vocab, 20))


def agree_on_error(second: SecondOpinion, artefact: Any, tokens: Sequence[int], code: str) -> None:
    theirs, error = second.forward(artefact, tokens)
    assert error == code
    model, fine = Model(artefact), len(theirs)
    assert fine < len(tokens)
    if fine:
        ours = product(model, tokens[:fine])
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    with pytest.raises(ieee.NumericsError) as caught:
        product(model, tokens[: fine + 1])
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("architecture", "name", "first_row", "power", "code"),
    [
        ("llama", "embed", 300, 70, "range"),
        ("llama", "layers.0.qkv.scale", 0, 6, "range"),  # a score
        ("llama", "layers.0.qkv.scale", 192, 27.8, "range"),  # a head of values
        ("llama", "layers.0.qkv.scale", 0, 126, "not_finite"),
        ("qwen3", "layers.0.qkv.scale", 0, 61, "range"),  # an inverse_rms
        ("llama", "layers.0.o.scale", 0, 61.85, "range"),
        ("llama", "layers.0.gate_up.scale", 0, 56, "not_finite"),
        ("llama", "layers.1.down.scale", 0, 56, "range"),
        ("llama", "layers.1.down.scale", 0, 127, "not_finite"),
    ],
)
def test_errors_come_at_the_same_token(
    second: SecondOpinion, architecture: str, name: str, first_row: int, power: float, code: str
) -> None:
    artefact = TinyArtefact(architecture)
    artefact.tensor(name)[first_row:] *= 2.0**power
    agree_on_error(second, artefact, some_tokens(artefact.config.vocab, 40), f"numerics.{code}")


@pytest.mark.parametrize("seed", [7, 13, 24])
def test_scores_below_the_range(second: SecondOpinion, seed: int) -> None:
    """The first token sees itself only, here with a score under -2^14 in one head."""
    artefact = TinyArtefact(seed=seed)
    artefact.tensor("layers.0.qkv.scale").mul_(2.0**6.5)
    agree_on_error(second, artefact, some_tokens(artefact.config.vocab, 40), "numerics.range")


def test_context_ends_both(second: SecondOpinion) -> None:
    artefact = TinyArtefact(context=16)
    agree(second, artefact, some_tokens(artefact.config.vocab, 16))
    assert second.forward(artefact, some_tokens(artefact.config.vocab, 17))[1] == "numerics.context"


def test_smollm2(second: SecondOpinion, smollm2: Path) -> None:
    artefact = weights.load(smollm2)
    agree(second, artefact, some_tokens(artefact.config.vocab, 24))


# The product against it: the sampler.


def some_logits(rng: random.Random) -> Tensor:
    size = rng.choice([1, 2, 17, 320, 1500])
    logits = torch.randn(size, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    kind = rng.randrange(6)
    if kind == 0:
        return torch.full((size,), rng.choice([0.0, -0.0, 3.5, -7.25]))  # all equal
    if kind == 1:
        return torch.round(logits * 4) * 0.25  # many ties
    if kind == 2:
        return logits * 2.0 ** rng.randint(-140, 90)
    return logits * rng.choice([1.0, 4.0, 12.0])


def some_params(rng: random.Random, vocab: int) -> SamplerParams:
    def now_and_then(usual: Any, *others: Any) -> Any:
        return rng.choice(others) if rng.random() < 0.4 else usual

    ids = rng.sample(range(vocab), min(vocab, rng.randrange(6)))
    return SamplerParams(
        temperature=ieee.f32(rng.choice([0.0, 2.0**-14, 1e-3, 0.3, 0.7, 1.0, 1.0, 1.5, 4.0, 100.0, 2.0**14])),
        top_k=now_and_then(0, 1, 2, 40, vocab, vocab + 5),
        top_p_20bit=now_and_then(1 << 20, 1, 1 << 19, 943_718, rng.randint(1, 1 << 20), (1 << 20) - 1),
        min_p_20bit=now_and_then(0, 1, 52_429, rng.randint(0, 1 << 20), 1 << 20),
        repetition=ieee.f32(now_and_then(1.0, 1.1, 1.3, 0.5, 2.0**-14, 3.0)),
        presence=ieee.f32(now_and_then(0.0, 0.5, -0.7, 2.0)),
        frequency=ieee.f32(now_and_then(0.0, 0.1, -0.25, 1.9)),
        logit_bias={i: ieee.f32(rng.choice([-100.0, 100.0, 0.1, -3.3, 0.0])) for i in ids},
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("block", range(4))
def test_sampled_tokens(second: SecondOpinion, block: int) -> None:
    rng = random.Random(block)
    tokens: list[int | str] = []
    for _ in range(250):
        logits = some_logits(rng)
        params = some_params(rng, logits.numel())
        prompt, output = (rng.choices(range(logits.numel()), k=rng.randrange(60)) for _ in range(2))
        history = History(prompt=prompt, output=output)
        position = rng.choice([0, 1, rng.randrange(1 << 17), (1 << 32) - 1])
        tokens.append(second.sample(logits, params, position, history))
        try:
            ours: int | str = sample(logits.reshape(1, -1), [params], [position], [history])[0]
        except ieee.NumericsError as err:
            ours = err.code
        assert ours == tokens[-1], (logits, params, position, history)
    assert len(set(tokens)) > 80


def test_penalties_to_the_last_bit(second: SecondOpinion) -> None:
    """Token 0 is penalised to exactly token 1's logit, and wins the tie; one bit more, and token 1 wins."""
    rng = random.Random(9)
    for _ in range(200):
        first, count = ieee.f32(rng.uniform(-20, 20)), rng.randint(1, 9)
        presence, frequency, repetition, bias = (ieee.f32(rng.uniform(0.3, 2)) for _ in range(4))
        value = ieee.f32(first + bias)
        value = ieee.f32(value / repetition if value > 0 else value * repetition)
        value = ieee.f32(ieee.f32(value - presence) - ieee.f32(count * frequency))
        above = torch.nextafter(torch.tensor(value), torch.tensor(math.inf)).item()
        params = SamplerParams(
            temperature=0.0, repetition=repetition, presence=presence, frequency=frequency, logit_bias={0: bias}
        )
        history = History(output=[0] * count)
        for other, winner in ((value, 0), (above, 1)):
            logits = torch.tensor([first, other])
            assert second.sample(logits, params, 1, history) == winner
            assert sample(logits.reshape(1, -1), [params], [1], [history]) == [winner]


@pytest.mark.parametrize(
    ("params", "value", "code"),
    [
        (SamplerParams(), math.nan, "not_finite"),
        (SamplerParams(temperature=0.0), -math.inf, "not_finite"),
        (SamplerParams(temperature=0.0), -(2.0**100), "range"),
        (SamplerParams(repetition=2.0**14), 2.0**113, None),
        (SamplerParams(repetition=2.0**14), -(2.0**86), "range"),
        (SamplerParams(repetition=2.0**14), -(2.0**120), "not_finite"),  # the product is infinite
        (SamplerParams(logit_bias={2: 1.0}), math.inf, "not_finite"),
        (SamplerParams(temperature=2.0**-14), 2.0**100 * (1 - 2.0**-24), None),
    ],
)
def test_sampler_errors(second: SecondOpinion, params: SamplerParams, value: float, code: str | None) -> None:
    logits = torch.tensor([1.0, 0.5, value, -1.0])
    history = History(prompt=(2,), output=(2,))
    theirs = second.sample(logits, params, 1, history)
    if code is None:
        assert theirs == sample(logits.reshape(1, -1), [params], [1], [history])[0]
        return
    assert theirs == f"numerics.{code}"
    with pytest.raises(ieee.NumericsError) as caught:
        sample(logits.reshape(1, -1), [params], [1], [history])
    assert caught.value.code == theirs
