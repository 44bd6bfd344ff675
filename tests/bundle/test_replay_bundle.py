"""Replay through a runner that only remembers: what is compared, what is refused, what the result says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from countermark import replay as module
from countermark.errors import CountermarkError, ReplayDiverged, Undecidable, WeightsError
from countermark.numerics import CURRENT
from countermark.replay import Equivalence, Mode, Runner, load_runner, replay
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

    def assemble(self, prompt: str | None, messages: tuple[tuple[str, str], ...] | None) -> tuple[int, ...]:
        self.asked = (prompt, messages)
        return self.prompt

    def spell(
        self, output_tokens: tuple[int, ...], max_tokens: int, stop: tuple[str, ...], ignore_eos: bool
    ) -> tuple[str, str | None, int]:
        assert (output_tokens, max_tokens, stop, ignore_eos) == (OUTPUT_TOKENS, 8, ("\n\n",), False)
        return self.spelled

    def audit(
        self,
        prompt_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
        fingerprints: tuple[bytes, ...],
        sampling: Mapping[str, object],
    ) -> Mapping[str, Any] | None:
        self.given = [prompt_tokens, output_tokens, fingerprints, dict(sampling)]
        for i, (token, mark) in enumerate(zip(output_tokens, fingerprints, strict=True)):
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
        "cpu": stack.cpu,
        "backend": stack.backend,
        "gpus": ", ".join(stack.gpus),
    }
    assert replay(verified, runner).equivalence is Equivalence.SAME_PROFILE
    runner.environment["image_id"] = stack.image_id.hex()
    assert replay(verified, runner).equivalence is Equivalence.SAME_STACK


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
    with pytest.raises(WeightsError) as weights:
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


def test_nothing_unverified_is_replayed(world: World) -> None:
    with pytest.raises((AttributeError, TypeError, CountermarkError)):
        replay(world.bundle(), Memory())  # type: ignore[arg-type]
