"""A genuine bundle of a retired profile: checked to the end, then undecidable; a live node is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from countermark import numerics
from countermark.appraise import Scope, appraise
from countermark.bundle import Bundle, encode_bundle
from countermark.checks import Status
from countermark.cli import main
from countermark.errors import CountermarkError, MeasurementError, Undecidable
from countermark.formats.records import EXACT_CLAIMS
from countermark.policy import encode_policy
from countermark.receipt import verify_accepted, verify_receipt
from countermark.replayer import Runner, replay
from countermark.verify import verify_bundle
from countermark_kernels import PROFILE
from one_answer import NOW, REQUEST, Machine, answer, start

RETIRED = "exact-v0"


def old_node(directory: Path, **changes: object) -> Machine:
    """A simulated machine that measures, offers and signs the retired profile."""
    (directory / "code").mkdir()
    (directory / "code" / "code.py").write_text("x = 1\n")
    return start(directory / "log", directory / "code", measured_profile=RETIRED, **changes)


def old_bundle(machine: Machine) -> Bundle:
    """A whole answer of that machine, every part signed by it."""
    evidence = machine.evidence()
    committed = machine.intent(appraise(evidence, machine.policy, now=NOW, scope=Scope.BUNDLE))
    completed = machine.outcome(committed)
    return Bundle(
        request=REQUEST,
        acceptance=committed.acceptance,
        answer=answer(completed),
        receipt=machine.recorder.receipt(completed),
        evidence=evidence,
        manifest=machine.manifest,
    )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return old_node(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def bundle(machine: Machine) -> Bundle:
    return old_bundle(machine)


def test_the_table_names_what_the_kernels_compute() -> None:
    assert numerics.CURRENT == PROFILE
    assert [name for name in numerics.PROFILES if not numerics.is_retired(name)] == [PROFILE]


@pytest.mark.parametrize("listed", [(), (RETIRED,)])
def test_everything_is_checked_and_then_it_is_undecidable(
    machine: Machine, bundle: Bundle, listed: tuple[str, ...]
) -> None:
    policy = replace(machine.policy, numerics=(*machine.policy.numerics, *listed))
    with pytest.raises(Undecidable) as caught:
        verify_bundle(bundle, policy, NOW)
    assert (caught.value.code, caught.value.exit_code) == ("profile.retired", 40)
    assert RETIRED in str(caught.value)
    assert [check.step for check in caught.value.checks][-9:] == [str(step) for step in range(12, 21)]
    assert all(check.status is not Status.FAIL for check in caught.value.checks)


def test_what_is_forged_is_refused_all_the_same(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    forged = replace(bundle, answer=replace(bundle.answer, text="London."))
    less = old_node(tmp_path, claims=EXACT_CLAIMS[:-1])
    for policy, item, code in (
        (machine.policy, forged, "receipt.output_text"),
        (machine.policy, replace(bundle, receipt=bundle.receipt[:-1] + b"\0"), "receipt.ml_dsa_65"),
        (less.policy, old_bundle(less), "receipt.profile"),
    ):
        with pytest.raises(CountermarkError) as caught:
            verify_bundle(item, policy, NOW)
        assert caught.value.code == code


def test_no_live_node_may_offer_it(machine: Machine) -> None:
    machine.policy = replace(machine.policy, numerics=(*machine.policy.numerics, RETIRED))
    with pytest.raises(MeasurementError) as caught:
        machine.verdict(machine.evidence())
    assert (caught.value.code, caught.value.step) == ("numerics.profile", "10")


def test_it_is_not_replayed_whoever_offers_to(machine: Machine, bundle: Bundle) -> None:
    verdict = appraise(bundle.evidence, machine.policy, now=NOW, scope=Scope.BUNDLE)
    accepted = verify_accepted(bundle.acceptance, verdict, REQUEST)
    receipt = verify_receipt(bundle.receipt, verdict, request=REQUEST, accepted=accepted, answer=bundle.answer)
    runner: Runner = object()  # type: ignore[assignment]  # never asked for anything
    with pytest.raises(Undecidable) as caught:
        replay(receipt, runner)
    assert caught.value.code == "profile.retired"


@pytest.mark.parametrize("command", ["verify", "replay"])
def test_the_command_line_says_undecidable(
    command: str, machine: Machine, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.cmk").write_bytes(encode_bundle(bundle))
    (tmp_path / "policy.toml").write_text(encode_policy(machine.policy))
    weights = ["--weights", str(tmp_path)] if command == "replay" else []
    at = ["--at", "2027-01-15T08:00:00Z"]
    options = [str(tmp_path / "old.cmk"), "--policy", str(tmp_path / "policy.toml"), *at, *weights, "--json"]
    assert main([command, *options]) == 40
    said = json.loads(capsys.readouterr().out)
    assert (said["verification"], said["code"]) == ("undecidable", "profile.retired")
    assert len(said["checks"]) == 20
