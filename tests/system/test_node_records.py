"""What a real node records, against the facts themselves; and its answer run again on a node, as users do it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from countermark.bundle import read_bundle
from countermark.formats.receipt import Acceptance, parse_replay_receipt
from countermark.formats.records import parse_intent, parse_replay
from countermark_kernels import PROFILE, kernel_digest, launch
from node_files import Node

pytestmark = pytest.mark.system


def run(node: Node, *args: str, code: int) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "countermark.cli", *args, "--policy", "policy.toml")
    done = subprocess.run(command, cwd=node.directory, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def bundle(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "answer.cmk"
    run(node, "chat", node.address, "Name three colours.", "--max-tokens", "12", "--bundle", str(path), code=0)
    return path


def test_every_fact_is_the_machines_own(node: Node, bundle: Path, smollm2: Path) -> None:
    acceptance = read_bundle(bundle).acceptance
    intent = parse_intent(acceptance.record)
    stack, weights = intent.stack, json.loads((smollm2 / "weights.json").read_text())
    assert stack.torch == importlib.metadata.version("torch")
    assert stack.engine == importlib.metadata.version("countermark")
    assert (stack.profile, stack.kernel_digest, stack.backend) == (PROFILE, kernel_digest(), launch.backend())
    assert stack.weights_root.hex() == weights["root"]
    cpu = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    }
    assert stack.cpu in cpu or not cpu
    assert (stack.triton, stack.cuda, stack.driver, stack.vbios, stack.gpus) == (None, None, None, None, ())
    sampling = intent.sampling
    assert (sampling.temperature, sampling.seed_origin) == (0.0, "server")  # nothing was asked: greedy, and said so
    assert (sampling.top_k, sampling.top_p_20bit, sampling.repetition_penalty) == (0, 1 << 20, 1.0)
    assert intent.stop_tokens and intent.max_tokens == 12
    assert intent.retrieval is None
    assert isinstance(acceptance, Acceptance)


def test_run_again_on_a_node(node: Node, bundle: Path) -> None:
    receipt = bundle.parent / "replay.cose"
    done = run(node, "replay", str(bundle), "--node", node.address, "--receipt", str(receipt), "--json", code=0)
    found = json.loads(done.stdout)
    assert (found["replay"], found["mode"], found["positions"]) == ("identical", "regenerate", 12)
    assert (found["simulated"], found["equivalence"], found["differing"]) == (True, "same measured stack", {})
    record = parse_replay(parse_replay_receipt(receipt.read_bytes()).payload.replay.record)
    assert record.boot_id.hex() == found["node"]["boot_id"]
    assert record.result == "identical"
    twice = run(node, "replay", str(bundle), str(bundle), "--node", node.address, code=0).stdout.splitlines()
    assert twice[-1] == "2 bundles: 2 identical, 0 diverged, 0 refused, 0 undecidable"
    assert "leaf" in twice[0]


def test_a_node_that_is_not_there_decides_nothing(node: Node, bundle: Path) -> None:
    done = run(node, "replay", str(bundle), "--node", "127.0.0.1:9", "--json", code=50)
    assert json.loads(done.stdout)["replay"] == "undecidable"
