"""Fixtures of the network tests; what they are made of stands in net_helpers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from net_helpers import Identity, Node, make_identity, start_node


@pytest.fixture(scope="session")
def identity() -> Identity:
    return make_identity()


@pytest.fixture(scope="module")
def node(identity: Identity) -> Iterator[Node]:
    yield from start_node(identity)
