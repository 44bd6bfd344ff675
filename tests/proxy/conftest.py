"""Fixtures of the proxy's tests; what they are made of stands in proxy_helpers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "net"))

from net_appliance import Appliance, running
from proxy_helpers import Node, Proxy, real_node


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """A whole node whose model alone is scripted."""
    with running(tmp_path_factory.mktemp("appliance")) as one:
        yield one


@pytest.fixture(scope="module")
def proxy(appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy.of(appliance, bundles=tmp_path_factory.mktemp("proxy") / "bundles") as one:
        yield one


@pytest.fixture(scope="session")
def node(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node as a process, with a real model."""
    with real_node(tmp_path_factory.mktemp("node"), smollm2) as one:
        yield one


@pytest.fixture(scope="session")
def served(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy before that node."""
    with Proxy.before(node, bundles=tmp_path_factory.mktemp("served") / "bundles") as one:
        yield one
