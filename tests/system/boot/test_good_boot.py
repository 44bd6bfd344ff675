"""The CPU test image, booted under QEMU with a software TPM, attested against what was predicted before it booted.

One machine serves all tests here: SmolLM2 on a real weights disk, the whole path from firmware to answer.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from booted import IMAGES, SHAPE, Machine, boot, client, made, run
from operating import MEASURE, Operator, next_release

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def machine(operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("good")
    with boot(operator.disks("real", folder / "log.raw"), folder / "serial") as one:
        yield one


@pytest.fixture(scope="module")
def bundle(machine: Machine, operator: Operator) -> Path:
    """An answer of the real model, verified as it came, with everything an auditor needs."""
    file = operator.folder / "answer.cmk"
    made(
        "countermark.cli", "chat", machine.address, "--policy", operator.policy, "--max-tokens", "24", "--seed", "7",
        "--temperature", "0.4", "--bundle", file, "--manifest", operator.public / "manifests" / "1.json", "--json",
        "Why is the sky blue?",
    )  # fmt: skip
    return file


def test_what_was_predicted_is_what_booted(machine: Machine, operator: Operator) -> None:
    said = client("attest", machine.address, "--policy", operator.policy, "--json")
    assert said.code == 0, said.err
    verdict = said.json()
    found = {name: verdict[name] for name in ("simulated", "platform", "image_id", "launch_shape", "config")}
    assert found == {
        "simulated": True,
        "platform": "vtpm",
        "image_id": json.loads((IMAGES / "test-cpu" / "image.json").read_text())["image_id"],
        "launch_shape": SHAPE.stem,
        "config": hashlib.sha256((operator.folder / "real.toml").read_bytes()).hexdigest(),
    }


def test_an_answer_is_verified_offline_and_runs_again_bit_for_bit(bundle: Path, operator: Operator) -> None:
    """The answer was computed by an emulated processor with Debian's torch; here both are others."""
    verified = client("verify", bundle, "--policy", operator.policy, "--json")
    assert (verified.code, verified.json()["verification"]) == (0, "accept")
    for mode in ("audit", "regenerate"):
        again = ("--weights", operator.smollm2, "--mode", mode, "--json")
        replayed = client("replay", bundle, "--policy", operator.policy, *again)
        assert (replayed.code, replayed.json()["replay"]) == (0, "identical"), replayed.err


def test_the_evidence_is_explained_without_a_difference(bundle: Path, operator: Operator) -> None:
    made(MEASURE, "explain", bundle, operator.public / "manifests" / "1.json")


def test_the_console_says_what_it_is_and_no_prompt(machine: Machine, bundle: Path) -> None:
    text = machine.console()
    assert "countermark: weights: " in text
    assert "SIMULATED" in text
    assert not re.search(r"sky|blue", text)


def test_the_next_release(machine: Machine, operator: Operator, tmp_path: Path) -> None:
    """Rotation: the next image's manifest withdraws this one. A client is refused what it has not pinned."""
    first = operator.public / "manifests" / "1.json"
    image, newer = next_release(tmp_path), tmp_path / "policy.toml"
    old = json.loads((IMAGES / "test-cpu" / "image.json").read_text())["image_id"]
    second = operator.publish(image, "--revoke", old)
    newer.write_bytes(operator.policy.read_bytes())
    made("countermark.cli", *operator.pin_arguments(second, newer))
    rolled_back = run("countermark.cli", *operator.pin_arguments(first, newer))
    assert (rolled_back.code, "manifest.rolled_back" in rolled_back.err) == (12, True), rolled_back.err

    assert attested(machine, operator.policy) == (0, "")
    assert attested(machine, newer) == (12, "measurement.rtmr1")
    disks = replace(operator.disks("small", tmp_path / "log.raw"), root=image / "disk.raw")
    with boot(disks, tmp_path / "serial") as successor:
        assert attested(successor, newer) == (0, "")
        assert attested(successor, operator.policy) == (12, "measurement.rtmr1")


def attested(machine: Machine, policy: Path) -> tuple[int, str]:
    """What `countermark attest` says: exit code and the code of a refusal."""
    said = client("attest", machine.address, "--policy", policy, "--json")
    return said.code, said.json().get("code", "")
