"""The whole appliance on platform `tdx`, over files that behave as Linux documents: what ends it, and how."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from countermark.errors import QuoteError
from countermark.policy import Profile, new_policy
from countermark.session import connect
from countermark_appliance.platform.tdx import reports
from countermark_appliance.platform.tdx.registers import MEASUREMENTS

pytestmark = pytest.mark.system
NODE = """[node]
operator = "test.example"
[platform]
name = "tdx"
[endorsements]
dir = "endorsements"
[weights]
dir = "{weights}"
root = "{root}"
[log]
dir = "log"
[engine]
device = "{device}"
"""


def write_config(directory: Path, weights: Path, device: str = "cpu") -> Path:
    root = json.loads((weights / "weights.json").read_text())["root"]
    file = directory / "node.toml"
    file.write_text(NODE.format(weights=weights, root=root, device=device))
    return file


@pytest.fixture
def node(smollm2: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """(process, address, the machine's files)"""
    script = Path(__file__).with_name("tdx_node.py")
    command = (sys.executable, str(script), str(write_config(tmp_path, smollm2)), str(tmp_path / "root"))
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests / 'platform'}"}
    with (tmp_path / "appliance.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / "appliance.log").read_text()
        facts = json.loads(line)
        assert facts["simulated"] is False  # what the node says of itself; a verifier does not believe it
        yield process, facts["listening"], tmp_path / "root"
    finally:
        process.kill()
        process.wait()


def test_no_client_takes_it_for_hardware_and_a_change_ends_it(node, tmp_path):
    process, address, root = node
    simulated = new_policy(
        Profile.DEVELOPMENT, now=int(time.time()), simulated_tdx_root=b"r" * 32, simulated_gpu_root=b"g" * 32
    )
    for policy in (simulated, new_policy(Profile.PRODUCTION, now=int(time.time()))):
        with pytest.raises(QuoteError) as refused, connect(address, policy):
            pass
        assert refused.value.code == "quote.root"
    assert list((root / reports.REPORTS).iterdir()) == []
    assert process.poll() is None
    register = root / MEASUREMENTS / "rtmr3:sha384"
    register.write_bytes(hashlib.sha384(register.read_bytes() + bytes(48)).digest())
    assert process.wait(30) == 12
    assert "platform.rtmr3_foreign" in (tmp_path / "appliance.log").read_text()


def test_private_keys_are_on_no_disk(node, tmp_path):
    """The process itself searches every file of the node, its log and its records included, for what it holds."""
    process, _, _ = node
    process.terminate()
    out, _ = process.communicate(timeout=60)
    found = json.loads(out.splitlines()[-1])
    assert process.returncode == 0
    assert (found["secrets"], found["held"]) == (5, [])
    assert found["files"] > 5
    assert any((tmp_path / "log").iterdir())
