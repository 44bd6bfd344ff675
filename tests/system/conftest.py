"""A whole node as a process, for tests that talk to it as users do."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node_files import Node, write_node


@contextmanager
def running(directory: Path, weights: Path) -> Iterator[Node]:
    """Make a simulated machine in `directory`, boot the appliance on it, stop it at the end."""
    policy = write_node(directory, weights)
    with (directory / "appliance.log").open("w") as log:
        process = subprocess.Popen(
            (sys.executable, "-m", "countermark_appliance.cli", "serve", "--config", "node.toml"),
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (directory / "appliance.log").read_text()
        yield Node(address=json.loads(line)["listening"], policy=policy, directory=directory, process=process)
    finally:
        process.terminate()
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def node(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), smollm2) as one:
        yield one
