"""The CPU test image, booted under QEMU with a software TPM, attested against what was predicted before it booted.

One machine serves all tests here: SmolLM2 on a real weights disk, the whole path from firmware to answer.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import IMAGES, SHAPE, Machine, boot, client, made, run
from operating import MEASURE, Operator

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("the good boot")]


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


def test_after_a_rotation_the_old_image_is_refused(machine: Machine, operator: Operator, tmp_path: Path) -> None:
    """The publisher's next image withdraws this one: who has pinned it is told; the old policy goes on as it was."""
    old = made("countermark.cli", "attest", machine.address, "--policy", operator.policy, "--json").json()["image_id"]
    newer = operator.publish("production", "--revoke", old)
    policy = tmp_path / "policy.toml"
    policy.write_bytes(operator.policy.read_bytes())
    made("countermark.cli", *operator.pin_arguments(newer, policy))
    refused = client("attest", machine.address, "--policy", policy, "--json")
    assert (refused.code, refused.json()["code"]) == (12, "measurement.rtmr1"), refused.err
    assert client("attest", machine.address, "--policy", operator.policy).code == 0
    older = run("countermark.cli", *operator.pin_arguments(operator.public / "manifests" / "1.json", policy))
    assert (older.code, "manifest.rolled_back" in older.err) == (12, True)


def test_the_console_says_what_it_is_and_no_prompt(machine: Machine, bundle: Path) -> None:
    text = machine.console()
    assert "countermark: weights: " in text
    assert "SIMULATED" in text
    assert not re.search(r"sky|blue", text)
