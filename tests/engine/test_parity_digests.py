"""Digests of whole answers, recorded on one machine, computed again here: alone, in a crowd, on any back end.

`bench/parity.py check` compares all of them on another device; here a few short ones of each model, and what the
comparison is worth: the counts, and mutants that must not pass.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

import parity
import paritymodels
from countermark_appliance.engine import weights
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.weights import parallel
from countermark_kernels import PROFILE, attention, launch, norm
from parity import Digests, run
from paritycases import EDGES, Case, Draw, cases

RECIPES = {recipe.name: recipe for recipe in paritymodels.RECIPES}
SHORT = (0, 1, 4, 7, 9)  # prompts of 1, 2, 17, 65 and 128 tokens
SHORTEST = (0, 6)  # 1 token and 13 more, 64 and 9 more: for the slow torch path
DATA: dict[str, Any] = json.loads(parity.RECORDED.read_text())


def recorded(name: str, indices: tuple[int, ...]) -> list[Digests]:
    return [Digests.parse(DATA["models"][name]["cases"][i]) for i in indices]


def chosen(artefact: weights.Artefact, indices: tuple[int, ...]) -> list[Case]:
    every = cases(vocab=artefact.config.vocab, context=artefact.config.context)
    return [every[i] for i in indices]


@pytest.fixture(scope="module", params=RECIPES)
def generated(request: pytest.FixtureRequest) -> Iterator[weights.Artefact]:
    with paritymodels.built(RECIPES[request.param]) as artefact:
        yield artefact


@pytest.fixture(scope="module")
def small() -> Iterator[weights.Artefact]:
    with paritymodels.built(RECIPES["llama-64"]) as artefact:
        yield artefact


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the torch path: its many small operations are faster on one thread than on several of a busy machine."""
    before = launch.threads()
    launch.set_threads(1)
    yield
    launch.set_threads(before)


def test_the_record_is_of_this_profile_and_complete() -> None:
    assert DATA["profile"] == PROFILE
    assert set(DATA["models"]) == {*RECIPES, parity.STAND_IN}
    for model in DATA["models"].values():
        found = [Digests.parse(line) for line in model["cases"]]
        assert len(found) >= 200
        assert {d.prompt for d in found} >= set(EDGES) | {1, 4000}
        assert len({d.logits for d in found}) == len({d.fingerprints for d in found}) == len(found)
        assert sum(d.tokens for d in found) > 4000


def test_cases_are_varied() -> None:
    every = cases(vocab=5003, context=4096)
    params = [case.params for case in every]
    assert sum(p.temperature == 0.0 for p in params) >= 30
    assert {2.0**-10, 100.0} <= {p.temperature for p in params}
    assert {0, 1, 40, 5003} == {p.top_k for p in params}
    for different in (
        sum(p.top_p_20bit < 1 << 20 for p in params),
        sum(p.min_p_20bit > 0 for p in params),
        sum(p.repetition != 1.0 for p in params),
        sum(p.presence != 0.0 for p in params),
        sum(p.frequency != 0.0 for p in params),
        sum(bool(p.logit_bias) for p in params),
        sum(len(set(case.prompt)) == 1 and len(case.prompt) > 1 for case in every),
    ):
        assert different >= 15
    assert all(len(case.prompt) + case.tokens <= 4096 and 8 <= case.tokens <= 32 for case in every)


def test_generated_models_as_recorded(generated: weights.Artefact) -> None:
    model, name = Model(generated), generated.config.name
    assert DATA["models"][name]["weights_root"] == generated.weights_root.hex()
    every = cases(vocab=generated.config.vocab, context=generated.config.context)
    assert DATA["models"][name]["asked"] == parity.asked_digest(every)
    assert run(model, chosen(generated, SHORT)) == recorded(name, SHORT)
    crowd = (*SHORT, 20, 24)
    assert run(model, chosen(generated, crowd), Draw(2)) == recorded(name, crowd)


def test_other_chunks_batches_and_threads(small: weights.Artefact) -> None:
    model, before = Model(small), launch.threads()
    try:
        for threads, seed in ((1, 3), (3, 4)):
            launch.set_threads(threads)
            assert run(model, chosen(small, SHORT), Draw(seed)) == recorded("llama-64", SHORT)
            assert run(model, chosen(small, SHORT[::-1])) == recorded("llama-64", SHORT[::-1])
    finally:
        launch.set_threads(before)


@pytest.mark.parametrize("name", ["llama-odd", "qwen3"])
@pytest.mark.usefixtures("one_thread")
def test_the_torch_path(name: str) -> None:
    with launch.forced(backend="torch"), paritymodels.built(RECIPES[name]) as artefact:
        assert run(Model(artefact), chosen(artefact, SHORTEST), Draw(6)) == recorded(name, SHORTEST)


def test_the_stand_in_model(artefact: weights.Artefact) -> None:
    every = parity.stand_in_cases(artefact)
    entry = DATA["models"][parity.STAND_IN]
    assert (entry["weights_root"], entry["asked"]) == (artefact.weights_root.hex(), parity.asked_digest(every))
    assert run(Model(artefact), [every[i] for i in SHORT], Draw(5)) == recorded(parity.STAND_IN, SHORT)


def test_same_root_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 5):
        monkeypatch.setattr(parallel, "threads", lambda count=count: count)
        with paritymodels.built(RECIPES["qwen2"]) as artefact:
            assert artefact.weights_root.hex() == DATA["models"]["qwen2"]["weights_root"]


MUTANTS: tuple[tuple[ModuleType, str, str, str], ...] = (
    (norm, "inverse_rms", "(z * z).sum(dim=-1, dtype=torch.int64)", "(z * z).float().flip(-1).sum(dim=-1)"),
    (
        attention,
        "reference",
        "ieee.rint(e * 2.0**22).to(torch.int64).sum(dim=-1, keepdim=True, dtype=torch.int64)",
        "(e * 2.0**22).flip(-1).sum(dim=-1, keepdim=True)",
    ),
)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[1])
def test_a_float_sum_in_another_order_is_caught(
    mutant: tuple[ModuleType, str, str, str], small: weights.Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, exact, reordered = mutant
    source = inspect.getsource(getattr(module, function))
    assert source.count(exact) == 1
    scope: dict[str, Any] = dict(vars(module))
    exec(source.replace(exact, reordered), scope)  # noqa: S102 - the mutant
    monkeypatch.setattr(module, function, scope[function])
    with launch.forced(backend="torch"):
        found = run(Model(small), chosen(small, SHORTEST), Draw(7))
    assert len(parity.compare([d.line() for d in recorded("llama-64", SHORTEST)], found)) == len(SHORTEST)


@pytest.mark.parametrize(("total", "differing"), [(parity.integer_sum, 0), (parity.float_sum, len(SHORT))])
def test_the_mutant_of_the_check(total: Callable[[Tensor], Tensor], differing: int, small: weights.Artefact) -> None:
    with parity.detour(total):
        found = run(Model(small), chosen(small, SHORT))
    assert len(parity.compare([d.line() for d in recorded("llama-64", SHORT)], found)) == differing
