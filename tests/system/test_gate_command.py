"""`countermark gate` as an operator runs it, against a whole node with the real model."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from node_files import Node

pytestmark = pytest.mark.system


def gate(node: Node, *args: str, code: int) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "countermark.cli", "gate", node.address, "--policy", "policy.toml", *args)
    done = subprocess.run(command, cwd=node.directory, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def test_the_node_passes_and_the_report_is_signed(node: Node, tmp_path: Path) -> None:
    key, report = tmp_path / "key.pem", tmp_path / "gate.json"
    private = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    options = ("--runs", "3", "--neighbours", "3", "--max-tokens", "16", "--key", str(key), "--report", str(report))
    done = gate(node, *options, "--json", code=0)
    found = json.loads(done.stdout)
    assert found["gate"] == "identical"
    assert found["simulated"] is True
    assert found["receipts_verified"] >= 6
    assert [len(series["digests"]) for series in found["settings"]] == [1, 1]
    assert any(run["tokens"]["cached"] for run in found["runs"])
    assert not all(run["tokens"]["cached"] for run in found["runs"])
    payload = json.loads(report.read_text())["payload"]
    assert json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))) == found
    assert report.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "options",
    [
        ("--runs", "1"),
        ("--neighbours", "-1"),
        ("--timeout", "0"),
        ("--seed", "-1"),
        ("--key", "policy.toml"),
        ("--report", "."),
        ("--key", "policy.toml", "--report", "r.json"),
    ],
)
def test_wrong_calls_say_so_before_anything_is_asked(node: Node, options: tuple[str, ...]) -> None:
    assert "usage." in gate(node, *options, code=1).stderr
