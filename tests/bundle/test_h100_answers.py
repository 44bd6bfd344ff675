"""Answers that a node computed on an H100, verified from their files and run again here, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from countermark.bundle import read_bundle
from countermark.policy import load_policy
from countermark.replayer import Equivalence, Mode, load_runner, replay
from countermark.verify import Verification, verify_bundle

FOLDER = Path(__file__).parents[1] / "data" / "h100"
AT = 1_795_367_460  # 2026-11-22, within the hour
NAMES = ("answer-1", "answer-2", "answer-3")


def verified(name: str) -> Verification:
    return verify_bundle(read_bundle(FOLDER / f"{name}.cmk"), load_policy(FOLDER / "policy.toml"), AT)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_h100_answered_comes_out_here(name: str, smollm2: Path) -> None:
    found = verified(name)
    stack = found.receipt.intent.stack
    assert (stack.backend, stack.gpus) == ("triton", ("NVIDIA H100 80GB HBM3",))
    assert found.verdict.simulated
    runner = load_runner(stack.profile, smollm2)
    for mode in Mode:
        result = replay(found, runner, mode)
        assert result.identical, result
        assert result.equivalence is Equivalence.SAME_PROFILE
        assert result.positions == len(found.receipt.answer.tokens) > 30


def test_the_gate_saw_one_answer_for_each_setting() -> None:
    report = json.loads((FOLDER / "gate.json").read_text())
    assert report["gate"] == "identical"
    assert report["difference"] is None
    for setting in report["settings"]:
        assert setting["runs"] == setting["wanted"] == 20
        assert len(setting["digests"]) == 1
    assert report["receipts_verified"] >= 40
    assert report["simulated"] is True
