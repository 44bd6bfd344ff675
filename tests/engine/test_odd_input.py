"""Input at the edges, through the model and the sampler: every back end gives the same bits, and those expected.

Expectations are plain Python: what is left of the forward pass when an embedding is zero, or so large that no layer
adds to it, is one line of the specification, and the sampler over equal logits is integers and Philox (here the
builder's own, checked against Random123's vectors).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

import pytest
import torch
from driver import run
from tinymodel import TinyArtefact
from torch import Tensor

from countermark_appliance.engine.draw import Row, draw
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.replay import ExactRunner
from countermark_appliance.engine.request import Request
from countermark_appliance.engine.sampling import resolve_sampling
from countermark_appliance.engine.weights.rotation import philox4x32
from countermark_kernels import launch
from countermark_kernels.ieee import NumericsError

VOCAB = 331  # a prime
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ODD = 7  # the token whose embedding is unusual
PROMPT = (3, 19, 300, 330, 8)
UNIFORM = 1 << 24  # the sampler's weight of the highest logit


def on_every_back_end(compute: Callable[[], Tensor]) -> Tensor:
    """The result of the torch path and of each instruction set, which must be one. Prepare weights inside."""
    with launch.forced(backend="torch"):
        expected = compute()
    for isa in launch.isas():
        with launch.forced(isa=isa):
            found = compute()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), isa
    return expected


def logits_of(artefact: TinyArtefact, *prompts: tuple[int, ...]) -> Tensor:
    """The logits behind every token of some prompts, one after the other in one batch."""

    def compute() -> Tensor:
        model = Model(artefact)
        chunks = [Chunk(cache=model.new_cache(len(p)), start=0, tokens=p, logits=len(p)) for p in prompts]
        return model.forward(chunks)

    return on_every_back_end(compute)


def with_embedding(architecture: str, change: Callable[[Tensor], Tensor]) -> TinyArtefact:
    """A model in which the row of ODD is another."""
    artefact = TinyArtefact(architecture, vocab=VOCAB)
    artefact.tensor("embed")[ODD] = change(artefact.tensor("embed")[ODD])
    return artefact


def uniform_draw(count: int, *, position: int, seed: int) -> int:
    """Which of `count` equally likely entries the sampler takes (steps 9 and 10)."""
    word = philox4x32((position, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]
    return (word * count * UNIFORM >> 32) // UNIFORM


def sampled(logits: Tensor, *, position: int = 5, **settings: float) -> int:
    """One draw of the first row of `logits`."""
    params = resolve_sampling(vocab=logits.shape[1], **settings).kernel_params()  # type: ignore[arg-type]
    row = Row(params=params, tokens=[1] * position, prompt=position, length=position)
    ids = on_every_back_end(lambda: torch.tensor(draw(logits[:1], [row])[0], dtype=torch.int32))
    return int(ids[0])


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [3, 17, 127, 257, VOCAB])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_vocabulary_that_fits_no_tile(architecture: str, vocab: int) -> None:
    artefact = TinyArtefact(architecture, vocab=vocab)
    tokens = tuple((7 * i + 1) % artefact.config.vocab for i in range(9))
    logits = logits_of(artefact, tokens, tokens[:1])
    assert logits.shape == (10, artefact.config.vocab)
    assert torch.equal(logits[9], logits[0])  # the one-token prompt beside the long one
    last = artefact.config.vocab - 1  # nothing is lost at the end: the last id can win
    logits[:, last] = 2 * logits.abs().max()
    assert sampled(logits) == last


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_of_one_token(architecture: str) -> None:
    runner = ExactRunner(TinyArtefact(architecture, context=8))  # type: ignore[arg-type]
    for heat in (0.0, 100.0):
        settings = resolve_sampling(vocab=runner._model.vocab, temperature=heat, seed=1)
        recorded = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
        for limit in (1, 7):  # up to the end of the context
            tokens, marks = runner.regenerate((5,), limit, (), True, recorded)
            assert len(tokens) == len(marks) == limit
            assert runner.audit((5,), tokens, marks, recorded) is None


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(TinyArtefact(request.param, context=32), threads=2)
    yield engine
    engine.close()


def test_one_token_in_one_token_out(engine: Engine) -> None:
    prepared = engine.prepare(Request(prompt="a", max_tokens=1))
    assert len(prepared.prompt_tokens) == 1
    alone = run(engine, [Request(prompt="a", max_tokens=1)])[0]
    crowd = run(engine, [Request(prompt="a" * n, max_tokens=1) for n in range(1, 9)])
    assert (crowd[0].output_tokens, crowd[0].fingerprints) == (alone.output_tokens, alone.fingerprints)


# --- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, -(2.0**-101)])
def test_a_zero_embedding_gives_zero_logits(zero: float) -> None:
    """Without biases nothing is added to it, in any layer. Below 2^-100 a row counts as zero."""
    artefact = with_embedding("llama", lambda row: torch.full_like(row, zero))
    logits = logits_of(artefact, (ODD,), (ODD, ODD, ODD))
    assert not logits.view(torch.int32).any()  # +0 everywhere
    assert sampled(logits) == 0
    for seed in range(6):
        assert sampled(logits, temperature=0.7, seed=seed) == uniform_draw(VOCAB, position=5, seed=seed)
    model = Model(artefact)
    chunk = Chunk(cache=model.new_cache(1), start=0, tokens=(ODD,), logits=1)
    greedy = Row(params=resolve_sampling(vocab=VOCAB, seed=0).kernel_params(), tokens=[ODD], prompt=1, length=1)
    assert draw(model.forward([chunk]), [greedy]) == ([0], [bytes(16)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_zero_embedding_among_others(architecture: str) -> None:
    """The tokens before it do not change, those behind it do, and alone it shows what the biases make of it."""
    artefact = with_embedding(architecture, torch.zeros_like)
    logits = logits_of(artefact, (*PROMPT, ODD, *PROMPT), PROMPT, (ODD,))
    assert torch.equal(logits[:5], logits[11:16])
    assert not torch.equal(logits[6:11], logits[:5])
    assert bool(logits[16].any()) == (architecture == "qwen2")
    assert bool(torch.isfinite(logits).all())


# --- magnitudes -----------------------------------------------------------------------------------------------------


def head_of(artefact: TinyArtefact, x: Tensor) -> Tensor:
    """The logits of a residual x in float64: normalised, in codes of 1/127, through the head."""
    wide, head = x.double(), artefact.tensor("head").double() * artefact.tensor("head.scale").double()[:, None]
    amax = wide.abs().max()
    codes = (wide * 127 / amax).round()
    return head @ codes * (amax / 127 / (wide.square().mean() + artefact.config.rms_eps).sqrt())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_embedding_so_large_that_no_layer_adds_to_it(architecture: str) -> None:
    """From 2^40 on the residual stays what it was; a power of two then changes no bit of the logits."""
    found = []
    for power in (40, 41, 50, 60):
        artefact = with_embedding(architecture, lambda row, power=power: row * 2.0**power)
        found.append(logits_of(artefact, (ODD,)))
        expected = head_of(artefact, artefact.tensor("embed")[ODD])
        assert float((found[-1][0] - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert all(torch.equal(one, found[0]) for one in found)


def mean_square_fits(x: Tensor) -> bool:
    """Whether inverse_rms's m is finite (section 3), in integers: m = (S / n) 2^p, below 2^128 after rounding."""
    exponent = math.frexp(float(x.abs().max()))[1] - 1
    z = [round(value * 2.0 ** (14 - exponent)) for value in x.double().tolist()]
    power = min(max(2 * exponent - 28, -126), 127)
    return sum(i * i for i in z) / len(z) * 2.0**power < 2.0**128 * (1 - 2.0**-25)


@pytest.mark.parametrize(
    "power", [-149, -127, -126, -104, -101, -100, -99, -50, 0, 30, 60, 61, 62, 63, 64, 65, 100, 125]
)
def test_every_magnitude_is_computed_or_refused_alike(power: int) -> None:
    artefact = with_embedding("qwen2", lambda row: (row / row.abs().max() * 1.5) * torch.tensor(2.0).double() ** power)
    row = artefact.tensor("embed")[ODD]
    if mean_square_fits(row):
        logits = logits_of(artefact, (ODD, *PROMPT), PROMPT)
        assert bool(torch.isfinite(logits).all())
        return
    assert power > 60
    for backend in ("torch", *launch.isas()):
        with launch.forced(backend="torch") if backend == "torch" else launch.forced(isa=backend):
            model = Model(artefact)
            with pytest.raises(NumericsError) as caught:
                model.forward([Chunk(cache=model.new_cache(1), start=0, tokens=(ODD,), logits=1)])
            assert caught.value.code == "numerics.range"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    def spoilt(row: Tensor) -> Tensor:
        row[-1] = bad
        return row

    artefact = with_embedding("qwen3", spoilt)
    for backend in ("torch", *launch.isas()):
        with launch.forced(backend="torch") if backend == "torch" else launch.forced(isa=backend):
            model = Model(artefact)
            with pytest.raises(NumericsError) as caught:
                model.forward([Chunk(cache=model.new_cache(2), start=0, tokens=(3, ODD), logits=1)])
            assert caught.value.code == "numerics.not_finite"


# --- sampling -------------------------------------------------------------------------------------------------------

EQUAL = [torch.full((1, VOCAB), value) for value in (0.0, 3.25, -1e-45, -(2.0**99), 2.0**99)]


@pytest.mark.parametrize("logits", EQUAL, ids=lambda t: f"{float(t[0, 0]):g}")
@pytest.mark.parametrize("heat", [0.001, 1.0, 100.0])
def test_equal_logits(logits: Tensor, heat: float) -> None:
    """Nothing but the filters' counts and Philox decides; ties are in the order of ids."""
    assert sampled(logits) == 0
    for seed in (0, 1, (1 << 64) - 1):
        kept = {
            VOCAB: ({}, {"top_k": 0}, {"top_k": VOCAB}, {"min_p": 1.0}, {"top_p": 1.0}),
            1: ({"top_k": 1}, {"top_p": 1e-6}),
            50: ({"top_k": 50}, {"top_k": 50, "min_p": 1.0}, {"top_k": 100, "top_p": 0.5}),
            math.ceil(round(0.9 * 2**20) * VOCAB / 2**20): ({"top_p": 0.9},),
        }
        for count, several in kept.items():
            for settings in several:
                wanted = uniform_draw(count, position=5, seed=seed)
                assert sampled(logits, temperature=heat, seed=seed, **settings) == wanted, settings


def test_temperatures_at_the_ends() -> None:
    """0 takes the highest logit, whatever the filters; so does 0.001 where the gap is wide; 100 nearly flattens."""
    logits = torch.linspace(-3, 3, VOCAB).roll(100)[None]
    best = int(logits.argmax())
    for settings in ({}, {"top_k": 1}, {"top_k": VOCAB}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert sampled(logits, temperature=0.0, seed=4, **settings) == best
    gap = logits.clone()
    gap[0, best] += 1.0
    assert {sampled(gap, temperature=0.001, seed=seed) for seed in range(8)} == {best}
    hot = {sampled(logits, temperature=100.0, seed=seed) for seed in range(40)}
    assert len(hot) > 30
    for seed in range(8):
        assert sampled(logits, temperature=100.0, seed=seed, top_k=1) == best
        assert sampled(logits, temperature=100.0, seed=seed, top_k=VOCAB) == sampled(
            logits, temperature=100.0, seed=seed
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ends_through_whole_answers(architecture: str) -> None:
    """Temperature 0, and 100 with top-k of one, are one answer; top-k of the whole vocabulary is none at all."""
    artefact = TinyArtefact(architecture, context=64)

    def answer(**settings: float) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        values = resolve_sampling(vocab=artefact.config.vocab, seed=9, **settings)  # type: ignore[arg-type]
        recorded = {name: getattr(values, name) for name in values.__dataclass_fields__}
        runner = ExactRunner(artefact)  # type: ignore[arg-type]
        found = runner.regenerate((3, 9, 27), 24, (), True, recorded)
        assert runner.audit((3, 9, 27), *found, recorded) is None
        return found

    def everywhere(**settings: float) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        with launch.forced(backend="torch"):
            expected = answer(**settings)
        if launch.isas():
            assert answer(**settings) == expected
        return expected

    greedy = everywhere(temperature=0.0)
    assert everywhere(temperature=100.0, top_k=1) == greedy
    hot = everywhere(temperature=100.0)
    assert everywhere(temperature=100.0, top_k=artefact.config.vocab) == hot
    assert hot[0] != greedy[0] and len(set(hot[0])) > 12


@pytest.mark.parametrize("heat", [0.0, 0.001, 100.0])
def test_temperatures_are_accepted_up_to_the_ends(engine: Engine, heat: float) -> None:
    done = run(engine, [Request(prompt="the fox", max_tokens=4, temperature=heat, seed=1, ignore_eos=True)])[0]
    assert len(done.output_tokens) == 4
    assert (
        engine.prepare(Request(prompt="x", temperature=heat)).sampling.temperature
        == struct.unpack("<f", struct.pack("<f", heat))[0]
    )
