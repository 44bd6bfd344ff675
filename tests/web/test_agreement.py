"""The page and the command line say the same of every tampered bundle that the page can decide: code, step, checks."""

from __future__ import annotations

import pytest
from judges import Case, Said, page_results, python_says, said
from variants import REDACTED, VARIANTS

from countermark.bundle import encode_bundle
from one_answer import NOW, make_world


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Said, Said]]:
    world = make_world(tmp_path_factory.mktemp("answer"))
    good = encode_bundle(world.bundle())
    cases = {name: Case(make(good), world.machine.policy, NOW) for name, make in VARIANTS.items()}
    results = page_results(list(cases.values()), tmp_path_factory.mktemp("cases"))
    return {
        name: (python_says(case), said(result)) for (name, case), result in zip(cases.items(), results, strict=True)
    }


def test_there_are_enough_of_them() -> None:
    assert len(VARIANTS) >= 250


@pytest.mark.parametrize("name", VARIANTS)
def test_they_agree(judged: dict[str, tuple[Said, Said]], name: str) -> None:
    client, page = judged[name]
    assert page == client
    accepted = ("good", "manifest left out", "output left out by hand", *list(REDACTED)[:3])
    assert (page.verdict == "accept") is (name in accepted)
