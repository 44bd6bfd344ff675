"""Audit and regenerate: what the engine produced holds, and any change to it is found at its place."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping

import pytest
from driver import run, some_request
from tinymodel import TinyArtefact

from countermark.errors import FormatError
from countermark.numerics import CURRENT
from countermark.replayer import Runner
from countermark_appliance.engine import replay as replay_module
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.replay import ExactRunner
from countermark_appliance.engine.request import DoneEvent, Prepared, Request
from countermark_kernels import PROFILE


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(TinyArtefact("qwen3"), threads=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def runner() -> ExactRunner:
    return ExactRunner(TinyArtefact("qwen3"))


def generated(engine: Engine, request: Request) -> tuple[Prepared, DoneEvent, Mapping[str, object]]:
    prepared = engine.prepare(request)
    (done,) = run(engine, [request])
    return prepared, done, dataclasses.asdict(prepared.sampling)


def test_what_was_generated_is_confirmed_both_ways(
    engine: Engine, runner: ExactRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    for step in (1, 3, 512):
        monkeypatch.setattr(runner, "_step_tokens", step)
        for _ in range(6):
            request = some_request(rng)
            prepared, done, sampling = generated(engine, request)
            assert runner.audit(prepared.prompt_tokens, done.output_tokens, done.fingerprints, sampling) is None
            again = runner.regenerate(
                prepared.prompt_tokens, prepared.max_tokens, prepared.stop, prepared.ignore_eos, sampling
            )
            assert again == (done.output_tokens, done.fingerprints)


def test_regenerate_stops_at_the_stop_string(engine: Engine, runner: ExactRunner) -> None:
    free = generated(engine, Request(prompt="dog", max_tokens=30, seed=4, temperature=1.0, ignore_eos=True))[1]
    request = Request(prompt="dog", max_tokens=30, seed=4, temperature=1.0, ignore_eos=True, stop=(free.text[5:7],))
    prepared, done, sampling = generated(engine, request)
    assert done.reason == "stop"
    tokens, marks = runner.regenerate(prepared.prompt_tokens, 30, prepared.stop, True, sampling)
    assert (tokens, marks) == (done.output_tokens, done.fingerprints)


def test_the_first_difference_is_named(engine: Engine, runner: ExactRunner) -> None:
    request = Request(prompt="the lazy dog", max_tokens=12, temperature=0.7, seed=3, ignore_eos=True)
    prepared, done, sampling = generated(engine, request)
    prompt, output, marks = prepared.prompt_tokens, done.output_tokens, done.fingerprints

    changed = (*output[:5], (output[5] + 1) % engine.info.vocab, *output[6:])
    found = runner.audit(prompt, changed, marks, sampling)
    assert found is not None
    assert (found["position"], found["recorded_token"], found["local_token"]) == (5, changed[5], output[5])
    assert found["fingerprint_equal"] is True
    assert isinstance(found["logit_gap"], float)

    other = bytes([marks[7][0] ^ 1]) + marks[7][1:]
    found = runner.audit(prompt, output, (*marks[:7], other, *marks[8:]), sampling)
    assert found is not None
    assert (found["position"], found["fingerprint_equal"], found["logit_gap"]) == (7, False, 0.0)
    assert found["recorded_token"] == found["local_token"] == output[7]

    found = runner.audit((prompt[0] + 1, *prompt[1:]), output, marks, sampling)
    assert found is not None
    assert (found["position"], found["fingerprint_equal"]) == (0, False)

    found = runner.audit(prompt, output, marks, {**sampling, "seed": 4})
    assert found is not None
    assert found["fingerprint_equal"] is True


def test_other_weights_are_found_out(engine: Engine) -> None:
    prepared, done, sampling = generated(engine, Request(prompt="the lazy dog", max_tokens=4))
    artefact = TinyArtefact("qwen3")
    artefact.tensor("layers.1.down")[3, 5] ^= 1
    found = ExactRunner(artefact).audit(prepared.prompt_tokens, done.output_tokens, done.fingerprints, sampling)
    assert found is not None
    assert (found["position"], found["fingerprint_equal"]) == (0, False)


SAMPLING = dataclasses.asdict(replay_module.ResolvedSampling(
    temperature=0.0, top_k=0, top_p_20bit=1 << 20, min_p_20bit=0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, logit_bias=(), seed=0, seed_origin="client",
))  # fmt: skip


MARK = bytes(16)


@pytest.mark.parametrize(
    ("tokens", "marks", "change", "code"),
    [
        (((), (1,)), (MARK,), {}, "replay.tokens"),
        (((5,), (1 << 40,)), (MARK,), {}, "replay.tokens"),
        (((-1,), (1,)), (MARK,), {}, "replay.tokens"),
        (((5,), (1, 2)), (MARK,), {}, "replay.tokens"),
        (((5,) * 500, (1,) * 13), (MARK,) * 13, {}, "replay.tokens"),
        *[
            (((5,), (1,)), (MARK,), change, "replay.sampling")
            for change in (
                {"temperature": 0.1},  # not a binary32 value
                {"temperature": float("nan")},
                {"temperature": 1e300},
                {"top_p_20bit": 0},
                {"seed": -1},
                {"unknown": 1},
                {"logit_bias": 3},
                {"logit_bias": ((1 << 40, 1.0),)},
            )
        ],
    ],
)
def test_records_that_cannot_be_are_refused(
    runner: ExactRunner,
    tokens: tuple[tuple[int, ...], tuple[int, ...]],
    marks: tuple[bytes, ...],
    change: dict[str, object],
    code: str,
) -> None:
    with pytest.raises(FormatError) as err:
        runner.audit(*tokens, marks, SAMPLING | change)
    assert err.value.code == code


def test_an_empty_answer_audits(runner: ExactRunner) -> None:
    assert runner.audit((5,), (), (), SAMPLING) is None


def test_the_client_can_use_it(runner: ExactRunner) -> None:
    client: Runner = runner
    assert list(client.audit_many([((5,), (), (), SAMPLING)])) == [(0, None)]


def test_environment_is_plain_text(runner: ExactRunner) -> None:
    assert runner.profile == PROFILE == CURRENT
    assert len(runner.weights_root) == 32
    assert {"kernel_digest", "engine", "torch", "cpu", "backend", "gpus"} <= runner.environment.keys()
    assert all(isinstance(v, str) for v in runner.environment.values())
