"""The demo as a newcomer runs it: whole processes, the real model, every step, and what it leaves behind."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.system


def run(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        (sys.executable, "-m", "countermark.cli", *args), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def demo(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    """Run the demo once; its directory, its JSON, its stderr."""
    directory = tmp_path_factory.mktemp("demo")
    (directory / "weights").symlink_to(smollm2)
    done = run(
        "demo", "--json", "--dir", ".", "--prompt", "Name the capital of France, planted-secret-7431.", cwd=directory
    )
    return directory, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_json_says_what_happened(demo: tuple[Path, dict[str, object], str]) -> None:
    directory, result, _ = demo
    assert result["simulated"] is True
    assert result["verdict"] == "accept"
    assert result["replay"] == "identical"
    assert isinstance(result["answer"], str)
    assert result["answer"]
    assert Path(str(result["bundle"])).samefile(directory / "answer.cmk")


def test_people_are_told_that_it_is_simulated(demo: tuple[Path, dict[str, object], str]) -> None:
    assert "SIMULATED" in demo[2]


def test_prompt_reaches_neither_the_log_lines_nor_the_log(demo: tuple[Path, dict[str, object], str]) -> None:
    directory, result, _ = demo
    answer = str(result["answer"]).encode()
    files = [directory / "appliance.log", *(path for path in (directory / "log").rglob("*") if path.is_file())]
    assert len(files) > 3
    for path in files:
        data = path.read_bytes()
        assert b"planted-secret-7431" not in data
        assert answer not in data


def test_verify_and_replay_from_the_file(demo: tuple[Path, dict[str, object], str]) -> None:
    directory, _, _ = demo
    checked = json.loads(run("verify", "answer.cmk", "--policy", "policy.toml", "--json", cwd=directory).stdout)
    assert checked["simulated"] is True
    again = run("replay", "answer.cmk", "--policy", "policy.toml", "--weights", "weights", "--json", cwd=directory)
    assert json.loads(again.stdout)["replay"] == "identical"


def test_a_changed_bundle_is_refused_with_its_code(demo: tuple[Path, dict[str, object], str], tmp_path: Path) -> None:
    directory, _, _ = demo
    data = bytearray((directory / "answer.cmk").read_bytes())
    with zipfile.ZipFile(directory / "answer.cmk") as archive:
        at = archive.getinfo("receipt.cose").header_offset + 30 + len("receipt.cose") + 100
    data[at] ^= 1
    bad = tmp_path / "bad.cmk"
    bad.write_bytes(data)
    done = run("verify", str(bad), "--policy", str(directory / "policy.toml"), "--json", cwd=tmp_path, code=20)
    refused = json.loads(done.stdout)
    assert refused["verdict"] == "reject"
    assert refused["code"].startswith("bundle.")


def test_production_policy_refuses_the_simulated_bundle(
    demo: tuple[Path, dict[str, object], str], tmp_path: Path
) -> None:
    directory, _, _ = demo
    policy = tmp_path / "production.toml"
    policy.write_text(run("policy", "new", cwd=tmp_path).stdout)
    bundle = str(directory / "answer.cmk")
    done = run("verify", bundle, "--policy", str(policy), "--json", cwd=tmp_path, code=10)
    refused = json.loads(done.stdout)
    assert (refused["verdict"], refused["code"]) == ("reject", "quote.root")


def test_wrong_time_is_refused(demo: tuple[Path, dict[str, object], str]) -> None:
    directory, _, _ = demo
    args = ("verify", "answer.cmk", "--policy", "policy.toml", "--json", "--at", "2020-01-01T00:00:00Z")
    done = subprocess.run(
        (sys.executable, "-m", "countermark.cli", *args), cwd=directory, capture_output=True, check=False
    )
    assert done.returncode != 0
    assert json.loads(done.stdout)["verdict"] == "reject"
