"""The public functions that take files: `countermark.verify_bundle` and `countermark.replay`."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_replay_bundle import Memory

import countermark
from countermark.appraise import TimeBasis
from countermark.bundle import encode_bundle
from countermark.errors import CountermarkError, ReplayDiverged, UsageError
from countermark.policy import encode_policy
from one_answer import NOW, OUTPUT_TOKENS, World


def test_files_and_values_give_the_same(world: World, tmp_path: Path) -> None:
    bundle, policy = tmp_path / "a.cmk", tmp_path / "policy.toml"
    bundle.write_bytes(encode_bundle(world.bundle()))
    policy.write_text(encode_policy(world.machine.policy))
    from_files = countermark.verify_bundle(str(bundle), str(policy), NOW)
    from_values = countermark.verify_bundle(world.bundle(), world.machine.policy, at=NOW)
    assert from_files.as_json() == from_values.as_json()
    assert from_files.verdict.time_basis is TimeBasis.ASSUMED


def test_without_a_time_it_is_now(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.offline.time.time", lambda: float(NOW))
    verified = countermark.verify_bundle(world.bundle(), world.machine.policy)
    assert (verified.verdict.time, verified.verdict.time_basis) == (NOW, TimeBasis.NOW)
    monkeypatch.setattr("countermark.offline.time.time", lambda: float(NOW + 400 * 86_400))
    with pytest.raises(CountermarkError) as caught:
        countermark.verify_bundle(world.bundle(), world.machine.policy)
    assert caught.value.code == "policy.expired"


def test_files_that_are_not_there(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        countermark.verify_bundle(tmp_path / "none.cmk", world.machine.policy)
    assert caught.value.code == "usage.file"
    with pytest.raises(UsageError):
        countermark.verify_bundle(world.bundle(), tmp_path / "none.toml")


def test_replay_of_what_was_verified(world: World) -> None:
    verified = countermark.verify_bundle(world.bundle(), world.machine.policy, NOW)
    for mode in ("audit", "regenerate"):
        found = countermark.replay(verified, Memory(), mode=mode)
        assert found.identical
        assert found.mode == mode
    other = countermark.replay(verified, Memory(tokens=(*OUTPUT_TOKENS[:-1], 999)))
    assert not other.identical
    with pytest.raises(ReplayDiverged):
        other.require_identical()
    with pytest.raises(CountermarkError) as caught:
        countermark.replay(verified, "/nowhere")
    assert caught.value.code.startswith("weights.")


def test_the_name_stays_the_function_s_whatever_was_imported() -> None:
    import countermark.replay_cli
    import countermark.replayer

    assert callable(countermark.replay)
    assert not hasattr(countermark, "nonsense")
