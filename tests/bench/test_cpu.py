"""The CPU benchmark measures whole answers that are computed anew each time, and audits what it generated."""

from collections.abc import Iterator

import pytest

import cpu
from benchlib import built_weights
from countermark_appliance.engine import weights
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.replay import ExactRunner


@pytest.fixture(scope="module")
def ours() -> Iterator[cpu.Ours]:
    engine = Engine(weights.load(built_weights()), threads=0)
    yield cpu.Ours(engine)
    engine.close()


def test_a_prompt_asked_again_is_computed_again(ours: cpu.Ours) -> None:
    (prompt,) = cpu.prompts(1, 130)
    for _ in range(2):  # `run` asserts that no token came out of the cache
        first, rest, (answer,) = ours.run([prompt], 3)
        assert first > 0 and rest > 0
        assert len(answer.output_tokens) == 3 and answer.cached_tokens == 0


def test_audit_covers_what_was_generated(ours: cpu.Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ANSWER", 8)
    monkeypatch.setattr(cpu, "ANSWERS", 2)
    runner = ExactRunner(weights.load(built_weights()))
    found = cpu.audit(ours, runner)
    assert found["tokens_per_second"] == pytest.approx(2 * (cpu.DECODE_PROMPT + 8) / found["answers_s"])

    other = cpu.prompts(3, cpu.DECODE_PROMPT)[2]
    monkeypatch.setattr(cpu, "prompts", lambda *_: [other, other])
    monkeypatch.setattr(runner, "audit_many", lambda answers: [(i, {"position": 0}) for i, _ in enumerate(answers)])
    with pytest.raises(AssertionError):
        cpu.audit(ours, runner)
