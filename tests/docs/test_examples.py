"""The developer's page and the notebook as a reader would run them, beside the node that they name."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "developer.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((DOCS / "walkthrough.ipynb").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Demo:
    folder: Path
    port: str

    def run(self, program: str) -> str:
        (self.folder / "example.py").write_text(program.replace("9443", self.port))
        done = subprocess.run(
            (sys.executable, "example.py"), cwd=self.folder, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def demo(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The node of the page's first lines, on a port of its own."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo-out").mkdir()
    (folder / "demo-out" / "weights").symlink_to(smollm2)
    (command,) = re.findall(r"^`countermark (demo --keep-serving .*?)`", PAGE, re.M)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    argv = [sys.executable, "-m", "countermark.cli", *command.replace("9443", port).split()]
    with subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as node:
        try:
            assert node.stderr is not None
            assert any("serving on" in line for line in node.stderr), "the demo node did not come up"
            yield Demo(folder, port)
        finally:
            node.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 30
            while node.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            node.kill()


@pytest.mark.system
def test_the_developer_s_page_runs(demo: Demo) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) >= 6
    said = demo.run("\n".join(blocks))
    assert said.startswith("SIMULATED")
    assert (demo.folder / "answer.cmk").exists()


@pytest.mark.system
def test_the_notebook_runs(demo: Demo) -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # a reader's own, not ours
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    said = demo.run("\n".join("".join(cell["source"]) for cell in cells))
    assert "identical: True" in said
    assert "bundle." in said  # the code of the changed file's refusal
