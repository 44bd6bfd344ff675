"""The real model for the engine's tests: built once, kept under build/ and named by all it is made from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from countermark_appliance.engine import weights
from countermark_appliance.engine.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session")
def artefact() -> weights.Artefact:
    from benchlib import built_weights

    return weights.load(built_weights())


@pytest.fixture(scope="session")
def smollm2(artefact: weights.Artefact) -> Iterator[Engine]:
    engine = Engine(artefact, threads=2)
    yield engine
    engine.close()
