"""The profile's claim at the engine: tokens and fingerprints do not depend on batch, chunking or neighbours.

On a small random model, which has every mechanism; the same on the real model in test_smollm2.py. The last tests break
the claim on purpose: a float sum whose order follows the batch must be caught.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from driver import run, some_prompt, some_request, start
from tinymodel import TinyArtefact

from countermark.errors import VerificationError
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.request import DoneEvent, Request
from countermark_appliance.engine.selftest import self_test
from countermark_kernels import decoder
from countermark_kernels.fingerprint import encode, fingerprint

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(TinyArtefact(request.param), threads=2)
    yield engine
    engine.close()


def same(one: DoneEvent, other: DoneEvent) -> None:
    assert one.output_tokens == other.output_tokens
    assert one.fingerprints == other.fingerprints
    assert (one.text, one.reason) == (other.text, other.reason)


@pytest.mark.parametrize("sampled", [False, True])
def test_alone_and_among_fifteen_others(engine: Engine, sampled: bool) -> None:
    rng = random.Random(sampled)
    for _ in range(4):
        request = Request(
            prompt=some_prompt(rng, 20), max_tokens=12, temperature=0.9 * sampled, seed=rng.getrandbits(64)
        )
        (alone,) = run(engine, [request])
        neighbours = [some_request(rng) for _ in range(15)]
        at = rng.randrange(16)
        crowd = run(engine, [*neighbours[:at], request, *neighbours[at:]])
        same(alone, crowd[at])


def test_more_requests_than_places(engine: Engine) -> None:
    rng = random.Random(7)
    requests = [some_request(rng, tokens=8) for _ in range(40)]
    for one, other in zip(run(engine, requests), [run(engine, [r])[0] for r in requests[:12]], strict=False):
        same(one, other)


def test_cancelling_a_neighbour_changes_nothing(engine: Engine) -> None:
    rng = random.Random(3)
    request = Request(prompt=some_prompt(rng, 30), max_tokens=24, temperature=1.0, seed=11, ignore_eos=True)
    (alone,) = run(engine, [request])
    others = [start(engine, Request(prompt=some_prompt(rng, n), max_tokens=200, ignore_eos=True)) for n in (5, 50, 90)]
    mine = start(engine, request)
    mine.skipped = True  # type: ignore[attr-defined]
    mine.next()
    for other in others:
        assert other.handle is not None
        other.handle.cancel()
    same(alone, mine.done())
    assert {other.done().reason for other in others} == {"cancelled"}


def chunked(model: Model, tokens: list[int], cuts: list[int], *, neighbour: bool) -> list[bytes]:
    cache, other = model.new_cache(len(tokens)), model.new_cache(len(tokens))
    marks: list[bytes] = []
    for start_, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        chunks = [Chunk(cache=cache, start=start_, tokens=tokens[start_:end], logits=end - start_)]
        if neighbour:
            chunks.insert(start_ % 2, Chunk(cache=other, start=start_, tokens=tokens[start_:end][::-1], logits=0))
        logits = model.forward(chunks)
        marks += encode(fingerprint(logits, logits.shape[1]))
    return marks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_chunking_and_token_by_token_give_the_same_logits(architecture: str) -> None:
    model = Model(TinyArtefact(architecture))
    rng = random.Random(5)
    tokens = [rng.randrange(model.vocab) for _ in range(300)]  # several blocks
    whole = chunked(model, tokens, [], neighbour=False)
    assert len(set(whole)) == len(tokens)
    assert chunked(model, tokens, list(range(1, 300)), neighbour=False) == whole
    for _ in range(3):
        cuts = sorted(rng.sample(range(1, 300), 7))
        assert chunked(model, tokens, cuts, neighbour=True) == whole


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2):
            engine = Engine(TinyArtefact(), threads=threads)
            found.add(engine.info.self_test)
            engine.close()
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)


def test_a_float_sum_that_follows_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: RMSNorm's sum of squares in float, in parts that follow the number of rows."""
    real = decoder.norm_quantise

    def mutant(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        q, _ = real(x, eps)
        parts = (x * x).split(1 if x.shape[0] % 2 else 7, dim=-1)
        total = torch.zeros(x.shape[0])
        for part in parts:
            total = total + part.sum(dim=-1)
        return q, x.abs().amax(dim=-1) / 127 * torch.rsqrt(total / x.shape[1] + eps)

    monkeypatch.setattr(decoder, "native", lambda: None)  # op by op, so that one can be replaced
    monkeypatch.setattr(decoder, "norm_quantise", mutant)
    model = Model(TinyArtefact())
    with pytest.raises(VerificationError) as err:
        self_test(model)
    assert err.value.code == "engine.self_test"


def test_a_position_that_follows_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: rows numbered by their place in the batch instead of their place in the sequence."""
    real = decoder.rope_quantise

    def mutant(qkv: torch.Tensor, positions: torch.Tensor, *rest: object, **named: object) -> object:
        return real(qkv, torch.arange(positions.shape[0], dtype=torch.int32), *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "native", lambda: None)
    monkeypatch.setattr(decoder, "rope_quantise", mutant)
    with pytest.raises(VerificationError):
        self_test(Model(TinyArtefact()))


def test_answers_are_not_all_alike(engine: Engine) -> None:
    """So that the tests above compare something."""
    rng = random.Random(1)
    requests = [Request(prompt=some_prompt(rng, 9), max_tokens=8, temperature=1.0, seed=s) for s in range(8)]
    assert len({a.output_tokens for a in run(engine, requests)}) == 8
