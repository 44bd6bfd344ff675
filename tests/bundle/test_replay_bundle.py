"""Replay through a runner that only remembers: what is compared, what is refused, what the result says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from countermark import cli, replay_cli
from countermark import replayer as module
from countermark.bundle import encode_bundle
from countermark.errors import CountermarkError, FormatError, ReplayDiverged, Undecidable, WeightsError
from countermark.numerics import CURRENT
from countermark.policy import encode_policy
from countermark.replayer import Equivalence, Mode, Recorded, ReplayResult, Runner, load_runner, replay, replay_many
from countermark.verify import Verification, verify_bundle
from one_answer import (
    FINGERPRINTS,
    KERNELS,
    NOW,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SAMPLING,
    STOP_TOKENS,
    TEXT,
    WEIGHTS_ROOT,
    World,
)


class Memory:
    """Answers with fixed tokens and fingerprints."""

    def __init__(self, tokens: tuple[int, ...] = OUTPUT_TOKENS, prints: tuple[bytes, ...] = FINGERPRINTS) -> None:
        self.tokens, self.prints = tokens, prints
        self.profile = CURRENT
        self.weights_root = WEIGHTS_ROOT
        self.environment: dict[str, str] = {"kernel_digest": "00", "cpu": "another"}
        self.given: list[object] = []
        self.refusal: CountermarkError | None = None
        self.asked: object = None
        self.prompt: tuple[int, ...] = PROMPT_TOKENS
        self.spelled: tuple[str, str | None, int] = (TEXT, "eos", 3)
        self.facts: dict[str, object] = {
            "model": "tiny",
            "quantisation": "int8",
            "manifest_digest": bytes(32),
            "tokenizer_digest": bytes(32),
            "chat_template_digest": bytes(32),
            "stop_tokens": STOP_TOKENS,
        }

    @property
    def artefact(self) -> Mapping[str, object]:
        return self.facts

    def assemble(
        self, prompt: str | None, messages: tuple[tuple[str, str], ...] | None, values: Mapping[str, str]
    ) -> tuple[int, ...]:
        self.asked = (prompt, messages)
        return self.prompt

    def spell(
        self, output_tokens: tuple[int, ...], max_tokens: int, stop: tuple[str, ...], ignore_eos: bool
    ) -> tuple[str, str | None, int]:
        assert (output_tokens, max_tokens, stop, ignore_eos) == (OUTPUT_TOKENS, 8, ("\n\n",), False)
        return self.spelled

    def audit_many(
        self, answers: Iterable[Recorded]
    ) -> Iterator[tuple[int, Mapping[str, Any] | CountermarkError | None]]:
        """The last one first, as an engine may."""
        taken = list(enumerate(answers))
        for index, (prompt_tokens, output_tokens, fingerprints, sampling) in reversed(taken):
            self.given = [prompt_tokens, output_tokens, fingerprints, dict(sampling)]
            yield index, self.refusal or self._first_difference(output_tokens, fingerprints)

    def _first_difference(self, output: tuple[int, ...], prints: tuple[bytes, ...]) -> Mapping[str, Any] | None:
        for i, (token, mark) in enumerate(zip(output, prints, strict=True)):
            if (token, mark) != (self.tokens[i], self.prints[i]):
                return {
                    "position": i,
                    "recorded_token": token,
                    "local_token": self.tokens[i],
                    "fingerprint_equal": mark == self.prints[i],
                    "logit_gap": 0.25,
                }
        return None

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        self.given = [prompt_tokens, max_tokens, stop, ignore_eos, dict(sampling)]
        return self.tokens, self.prints


@pytest.fixture(scope="session")
def verified(world: World) -> Verification:
    return verify_bundle(world.bundle(), world.machine.policy, NOW)


def settings() -> dict[str, object]:
    return {name: getattr(SAMPLING, name) for name in SAMPLING.__dataclass_fields__}


def test_a_runner_needs_no_import_of_ours() -> None:
    runner: Runner = Memory()
    assert runner.profile == CURRENT


@pytest.mark.parametrize("mode", list(Mode))
def test_identical(verified: Verification, mode: Mode) -> None:
    runner = Memory()
    result = replay(verified, runner, mode)
    assert result.identical
    result.require_identical()
    assert (result.positions, result.equivalence) == (3, Equivalence.SAME_PROFILE)
    given: list[object] = [PROMPT_TOKENS, OUTPUT_TOKENS, FINGERPRINTS, settings()]
    if mode is Mode.REGENERATE:
        given = [PROMPT_TOKENS, 8, ("\n\n",), False, settings()]
    assert runner.given == given
    assert json.loads(json.dumps(result.as_json()))["replay"] == "identical"


def test_the_same_stack_is_said_only_inside_the_measured_image(verified: Verification) -> None:
    runner = Memory()
    stack = verified.receipt.intent.stack
    runner.environment = {
        "kernel_digest": KERNELS.hex(),
        "engine": stack.engine,
        "torch": stack.torch,
        **dict.fromkeys(("triton", "cuda", "driver"), ""),
        "cpu": stack.cpu,
        "backend": stack.backend,
        "gpus": ", ".join(stack.gpus),
    }
    result = replay(verified, runner)
    assert result.equivalence is Equivalence.SAME_PROFILE
    assert result.differing == {"image_id": (stack.image_id.hex(), None)}
    runner.environment["image_id"] = stack.image_id.hex()
    assert replay(verified, runner).equivalence is Equivalence.SAME_STACK
    assert not replay(verified, runner).differing
    runner.environment["driver"] = "580.1"
    result = replay(verified, runner)
    assert result.equivalence is Equivalence.SAME_PROFILE
    assert result.as_json()["differing"] == {"driver": ["", "580.1"]}


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    ("runner", "where"),
    [
        (Memory(tokens=(12, 6, 2)), (1, 6, True)),
        (Memory(prints=(*FINGERPRINTS[:2], bytes(16))), (2, 2, False)),
    ],
)
def test_divergence(verified: Verification, mode: Mode, runner: Memory, where: tuple[int, int, bool]) -> None:
    position, local, equal = where
    result = replay(verified, runner, mode)
    found = result.divergence
    assert found is not None
    assert (found.position, found.recorded_token, found.local_token) == (position, OUTPUT_TOKENS[position], local)
    assert found.fingerprint_equal is equal
    assert found.logit_gap == (0.25 if mode is Mode.AUDIT else None)
    with pytest.raises(ReplayDiverged) as caught:
        result.require_identical()
    assert caught.value.code == "replay.diverged"
    assert result.as_json()["replay"] == "diverged"


@pytest.mark.parametrize(
    ("runner", "recorded", "local"),
    [
        (Memory(tokens=OUTPUT_TOKENS[:2], prints=FINGERPRINTS[:2]), 2, None),
        (Memory(tokens=(*OUTPUT_TOKENS, 8), prints=(*FINGERPRINTS, bytes(16))), None, 8),
    ],
)
def test_another_length_is_a_divergence(
    verified: Verification, runner: Memory, recorded: int | None, local: int | None
) -> None:
    found = replay(verified, runner, "regenerate").divergence
    assert found is not None
    assert (found.recorded_token, found.local_token) == (recorded, local)


def test_what_surrounds_the_model_is_compared_too(verified: Verification) -> None:
    runner = Memory()
    replay(verified, runner)
    assert runner.asked == (None, (("user", "Which city is the capital of France?"),))
    lies: list[tuple[str, object, str, int]] = [
        ("prompt", (1, 17, 98, 4), "replay.prompt_tokens", 2),  # another prompt than was asked
        ("prompt", PROMPT_TOKENS[:3], "replay.prompt_tokens", 3),  # something appended to it
        ("spelled", ("Lyon..", "eos", 3), "replay.text", 0),
        ("spelled", ("Paris", "eos", 3), "replay.text", 5),
        ("spelled", ("Pari", None, 3), "replay.finish_reason", 2),  # cut short
        ("spelled", (TEXT, "stop", 3), "replay.finish_reason", 2),
        ("spelled", (TEXT, "eos", 2), "replay.finish_reason", 1),  # went on after its end
    ]
    for mode in Mode:
        for name, value, code, position in lies:
            runner = Memory()
            setattr(runner, name, value)
            result = replay(verified, runner, mode)
            assert not result.identical
            with pytest.raises(ReplayDiverged) as caught:
                result.require_identical()
            assert caught.value.code == code
            assert result.divergence is not None
            assert result.divergence.position == position
            assert json.loads(json.dumps(result.as_json()))["divergence"]["part"] == code.removeprefix("replay.")


def test_a_record_that_misdescribes_its_weights(verified: Verification) -> None:
    for name in Memory().facts:
        runner = Memory()
        runner.facts[name] = (3,) if name == "stop_tokens" else None
        with pytest.raises(WeightsError) as caught:
            replay(verified, runner)
        assert caught.value.code == "replay.artefact"
        assert runner.given == []


def test_other_weights_and_other_profiles_are_not_run(verified: Verification) -> None:
    runner = Memory()
    runner.weights_root = bytes(32)
    with pytest.raises(Undecidable) as weights:
        replay(verified, runner)
    assert weights.value.code == "replay.weights_root"
    runner = Memory()
    runner.profile = "bf16-hopper-v1"
    with pytest.raises(Undecidable) as profile:
        replay(verified, runner)
    assert profile.value.code == "replay.profile"
    assert runner.given == []


def test_a_profile_that_nobody_executes_and_a_missing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("exact-v0", "profile.retired"), ("exact-v9", "profile.unknown"), ("", "profile.unknown")):
        with pytest.raises(Undecidable) as refused:
            load_runner(name, Path())
        assert refused.value.code == code
    monkeypatch.setattr(module, "entry_points", lambda **_: ())
    with pytest.raises(Undecidable) as missing:
        load_runner(CURRENT, Path())
    assert missing.value.code == "replay.no_runner"


def test_an_unknown_mode(verified: Verification) -> None:
    with pytest.raises(ValueError, match="guess"):
        replay(verified, Memory(), "guess")


@pytest.mark.parametrize("mode", list(Mode))
def test_many_are_what_each_is_alone(world: World, verified: Verification, mode: Mode) -> None:
    runner = Memory(tokens=(12, 6, 2))
    alone = replay(verified, runner, mode)
    assert not alone.identical
    outcomes = dict(replay_many([verified, world.checked, verified], runner, mode))
    assert outcomes == {0: alone, 1: alone, 2: alone}
    assert dict(replay_many([], runner, mode)) == {}
    runner.weights_root = bytes(32)
    refused = dict(replay_many([verified, verified], runner, mode))
    assert [type(refused[i]) for i in (0, 1)] == [Undecidable, Undecidable]


def test_what_the_runner_refuses_is_that_answers_own_result(verified: Verification) -> None:
    runner = Memory()
    runner.refusal = FormatError("tokens: expected others", code="replay.tokens")
    assert dict(replay_many([verified, verified], runner)) == {0: runner.refusal, 1: runner.refusal}
    with pytest.raises(FormatError) as caught:
        replay(verified, runner)
    assert caught.value.code == "replay.tokens"
    runner.prompt = (1, 17, 98, 4)  # found before the runner is asked
    (outcome,) = dict(replay_many([verified], runner)).values()
    assert isinstance(outcome, ReplayResult)
    assert outcome.divergence is not None


@pytest.fixture
def files(world: World, tmp_path: Path) -> Path:
    """good.cmk and same.cmk, forged.cmk (another text), policy.toml."""
    bundle = world.bundle()
    for name in ("good.cmk", "same.cmk"):
        (tmp_path / name).write_bytes(encode_bundle(bundle))
    forged = dataclasses.replace(bundle, answer=dataclasses.replace(bundle.answer, text="London."))
    (tmp_path / "forged.cmk").write_bytes(encode_bundle(forged))
    (tmp_path / "policy.toml").write_text(encode_policy(world.machine.policy))
    return tmp_path


def replay_files(files: Path, *names: str, runner: Memory, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(replay_cli, "load_runner", lambda _profile, _weights, _device: runner)
    options = ["--policy", str(files / "policy.toml"), "--weights", str(files), "--at", "2027-01-15T08:00:00Z"]
    paths = [name if name.startswith("--") else str(files / name) for name in names]
    return cli.main(["replay", *paths, *options])


def test_several_bundles_on_the_command_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Memory()
    assert replay_files(files, "good.cmk", "same.cmk", runner=runner, monkeypatch=monkeypatch) == 0
    seen = capsys.readouterr()
    assert seen.out.splitlines() == [
        f"{files / 'same.cmk'}: identical (same profile on other hardware)",
        f"{files / 'good.cmk'}: identical (same profile on other hardware)",
        "2 bundles: 2 identical, 0 diverged, 0 refused, 0 undecidable",
    ]
    assert "SIMULATED" in seen.err
    assert replay_files(files, "good.cmk", "same.cmk", "none.cmk", runner=runner, monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 bundles: 2 identical, 0 diverged, 0 refused, 1 undecidable"


def test_the_worst_of_several_is_the_exit_code(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not verified never reaches the runner; a rejection weighs more than what cannot be decided."""
    runner = Memory()
    names = ("forged.cmk", "good.cmk", "none.cmk", "--json")
    assert replay_files(files, *names, runner=runner, monkeypatch=monkeypatch) == 20
    *each, last = map(json.loads, capsys.readouterr().out.splitlines())
    by_name = {Path(item["bundle"]).name: item for item in each}
    assert {name: item["replay"] for name, item in by_name.items()} == {
        "forged.cmk": "refused",
        "good.cmk": "identical",
        "none.cmk": "undecidable",
    }
    assert by_name["forged.cmk"]["code"] == "receipt.output_text"
    assert by_name["good.cmk"]["simulated"] is True
    assert last == {"summary": {"bundles": 3, "identical": 1, "diverged": 0, "refused": 1, "undecidable": 1}}
    assert runner.given[1] == OUTPUT_TOKENS

    other = Memory(tokens=(12, 6, 2))
    assert replay_files(files, "forged.cmk", "good.cmk", "none.cmk", runner=other, monkeypatch=monkeypatch) == 30
    other.given = []
    assert replay_files(files, "forged.cmk", "forged.cmk", runner=other, monkeypatch=monkeypatch) == 20
    assert other.given == []


def test_a_file_name_adds_no_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it steer the terminal, nor need it be text."""
    names = ("a.cmk: identical\nb.cmk", "\x1b[2Kc.cmk", os.fsdecode(b"\xff.cmk"))
    for name in names:
        (files / name).write_bytes((files / "forged.cmk").read_bytes())
    assert replay_files(files, *names, runner=Memory(), monkeypatch=monkeypatch) == 20
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(" refused (receipt.output_text): " in line for line in lines[:3])
    "".join(lines).encode()  # fails on what is no character
    assert all(c.isprintable() for line in lines for c in line)


def test_a_runner_that_leaves_one_out(verified: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is known of that one, which is not that it is identical."""
    runner, honest = Memory(), Memory()
    monkeypatch.setattr(runner, "audit_many", lambda answers: list(honest.audit_many(answers))[:-1])
    outcomes = dict(replay_many([verified, verified], runner))
    assert isinstance(outcomes[1], ReplayResult)
    assert isinstance(outcomes[0], Undecidable) and outcomes[0].code == "replay.no_result"


def test_one_bundle_prints_one_object(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The object that stands in a line of several."""
    runner = Memory(tokens=(12, 6, 2))
    for name, one, code, word in (
        ("good.cmk", Memory(), 0, "identical"),
        ("good.cmk", runner, 30, "diverged"),
        ("forged.cmk", runner, 20, "refused"),
        ("none.cmk", runner, 1, "undecidable"),
    ):
        assert replay_files(files, name, "--json", runner=one, monkeypatch=monkeypatch) == code
        found = json.loads(capsys.readouterr().out)
        assert found["replay"] == word
        assert found["bundle"] == str(files / name)
        assert replay_files(files, name, name, "--json", runner=one, monkeypatch=monkeypatch) == code
        assert json.loads(capsys.readouterr().out.splitlines()[0]) == found


def test_a_divergence_says_where_it_was_and_what_differs_around_it(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay_files(files, "good.cmk", runner=Memory(tokens=(12, 6, 2)), monkeypatch=monkeypatch) == 30
    seen = capsys.readouterr()
    assert "diverged (replay.diverged): token 1: expected 5, as recorded, got 6, whose logit is" in seen.out
    assert "cpu: recorded test cpu, where it ran another" in seen.err
    assert "image_id: recorded" in seen.err and "not known" in seen.err


def test_other_or_broken_weights_decide_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Memory()
    other.weights_root = bytes(32)
    assert replay_files(files, "good.cmk", "--json", runner=other, monkeypatch=monkeypatch) == 40
    found = json.loads(capsys.readouterr().out)
    assert (found["replay"], found["code"]) == ("undecidable", "replay.weights_root")

    def broken(*_: object) -> Memory:
        raise WeightsError("weights: a block differs", code="weights.block")

    monkeypatch.setattr(replay_cli, "load_runner", broken)
    options = ["--policy", str(files / "policy.toml"), "--weights", str(files), "--at", "2027-01-15T08:00:00Z"]
    assert cli.main(["replay", str(files / "good.cmk"), "--json", *options]) == 40
    found = json.loads(capsys.readouterr().out)
    assert (found["replay"], found["code"]) == ("undecidable", "weights.block")


@pytest.mark.parametrize(
    "options",
    [
        ("--node", "127.0.0.1:1", "--mode", "audit"),
        ("--node", "127.0.0.1:1", "--device", "cpu"),
        ("--weights", ".", "--receipt", "x"),
    ],
)
def test_options_that_do_not_go_together(files: Path, options: tuple[str, ...]) -> None:
    assert cli.main(["replay", str(files / "good.cmk"), "--policy", str(files / "policy.toml"), *options]) == 1


def test_nothing_unverified_is_replayed(world: World) -> None:
    with pytest.raises((AttributeError, TypeError, CountermarkError)):
        replay(world.bundle(), Memory())  # type: ignore[arg-type]
