"""`pip install countermark` is a verifier: no torch, no numpy, nothing of the appliance, in the lock or in memory."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEVER = {"torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "gguf"}


def test_base_requirements_name_no_engine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[; ]", item)[0] for item in project["dependencies"]}
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements" / "base.lock").read_text(), re.M))
    assert declared <= locked
    assert not NEVER & (declared | locked)


def test_lock_files_hold_hashes_of_everything() -> None:
    for name in ("base", "appliance", "dev", "model"):
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        entries = re.split(r"\n(?=[a-z0-9])", text.strip())
        assert entries
        for entry in entries:
            assert re.match(r"[a-z0-9._-]+==\S+", entry), entry[:80]
            assert "--hash=sha256:" in entry, entry[:80]


def test_importing_the_client_loads_no_engine() -> None:
    code = (
        "import sys, countermark, countermark.cli, countermark.demo\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = set(
        subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True).stdout.split()
    )
    assert "countermark" in loaded
    assert not (NEVER | {"countermark_appliance", "countermark_kernels"}) & loaded
