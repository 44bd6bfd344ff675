"""The README against reality: its Python example runs, its commands parse, its folders exist."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from countermark.cli import _parser
from countermark_appliance.cli import _parser as _appliance_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


@pytest.mark.system
def test_python_example_runs_against_the_demo_node(smollm2: Path, tmp_path: Path) -> None:
    """Exactly the block of the README, on another port, beside a node started by the README's command."""
    (example,) = blocks("python")
    assert example.count("\n") <= 12
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "demo-out").mkdir()
    (tmp_path / "demo-out" / "weights").symlink_to(smollm2)
    (command,) = re.findall(r"`\.venv/bin/countermark (demo --keep-serving .*?)`", README)
    argv = [sys.executable, "-m", "countermark.cli", *command.replace("9443", port).split()]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as node:
        try:
            assert node.stderr is not None
            assert any("serving on" in line for line in node.stderr), "the demo node did not come up"
            (tmp_path / "example.py").write_text(example.replace("9443", port))
            done = subprocess.run(
                (sys.executable, "example.py"), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
            verdict, _, answer = done.stdout.partition("\n")
            assert verdict.startswith("SIMULATED")
            assert len(answer.split()) > 10, "the example printed no answer"
            assert (tmp_path / "answer.cmk").stat().st_size > 10_000
        finally:
            node.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 30
            while node.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            node.kill()


def test_commands_in_the_readme_parse() -> None:
    digest = "ab" * 32
    seen = 0
    for block in blocks(""):
        for line in block.splitlines():
            words = re.sub(r"\s+#.*$", "", line).split(" > ")[0].replace("SHA256", digest).replace("ROOT", digest)
            if words.startswith(("countermark ", "countermark-appliance ")):
                name, *argv = re.findall(r'"[^"]*"|\S+', words)
                parser = _parser() if name == "countermark" else _appliance_parser()
                parser.parse_args(argv)
                seen += 1
    assert seen >= 10


def test_folder_map_and_links_exist() -> None:
    folders = re.findall(r"^\| `([\w./]+)` \|", README.split("## Folders")[1], re.M)
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(folders) >= 6
    assert len(links) >= 4
    for name in (*folders, *links):
        assert (ROOT / name).exists(), name


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
