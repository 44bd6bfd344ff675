"""Many answers audited together: each outcome is that of the answer alone, whatever it is packed with."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tinymodel import TinyArtefact
from torch import Tensor

from countermark.errors import CountermarkError, FormatError, ReplayDiverged, Undecidable
from countermark_appliance.engine import audit
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.replay import ExactRunner, Recorded
from countermark_appliance.engine.sampling import resolve_sampling
from countermark_appliance.engine.step import Row
from countermark_kernels.ieee import NumericsError


@pytest.fixture(scope="module")
def runner() -> ExactRunner:
    return ExactRunner(TinyArtefact("qwen3"))


@pytest.fixture
def model(runner: ExactRunner) -> Model:
    return runner._model


def settings(rng: random.Random, vocab: int) -> dict[str, object]:
    sampling = resolve_sampling(
        vocab=vocab,
        temperature=rng.choice([0.0, 0.5, 1.3]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([{}, {7: 3.0, 9: -1.5}]),
        seed=rng.getrandbits(64),
    )
    return dataclasses.asdict(sampling)


@pytest.fixture(scope="module")
def answers(runner: ExactRunner) -> list[Recorded]:
    """Generated token by token: short and long, one of them of no token, with every sampling setting."""
    rng = random.Random(11)
    vocab = runner._model.vocab
    made: list[Recorded] = []
    for prompt, output in [(1, 0), (1, 1), (3, 9), (70, 1), (64, 30), (130, 12), (5, 90), (200, 2), (40, 40)]:
        tokens = tuple(rng.randrange(vocab) for _ in range(prompt))
        sampling = settings(rng, vocab)
        ids, marks = runner.regenerate(tokens, output, (), True, sampling) if output else ((), ())
        assert len(ids) == output
        made.append((tokens, ids, marks, sampling))
    return made


def tampered(rng: random.Random, answer: Recorded, vocab: int) -> Recorded:
    """One thing changed, somewhere; of an empty answer the prompt, which nobody can notice."""
    prompt, output, marks, sampling = answer
    at = rng.randrange(len(output)) if output else 0
    kind = rng.choice(["token", "fingerprint", "seed", "temperature", "prompt"]) if output else "prompt"
    if kind == "token":
        return prompt, (*output[:at], (output[at] + 1) % vocab, *output[at + 1 :]), marks, sampling
    if kind == "fingerprint":
        other = bytes([marks[at][0] ^ 1]) + marks[at][1:]
        return prompt, output, (*marks[:at], other, *marks[at + 1 :]), sampling
    if kind == "prompt":
        return ((prompt[0] + 1) % vocab, *prompt[1:]), output, marks, sampling
    return prompt, output, marks, {**sampling, kind: 77 if kind == "seed" else 0.75}


def key(outcome: audit.Outcome) -> object:
    return (type(outcome), outcome.code) if isinstance(outcome, CountermarkError) else outcome


def alone(runner: ExactRunner, answer: Recorded) -> object:
    ((index, outcome),) = runner.audit_many([answer])
    assert index == 0
    return key(outcome)


def together(runner: ExactRunner, answers: Sequence[Recorded]) -> list[object]:
    outcomes = list(runner.audit_many(iter(answers)))
    assert sorted(index for index, _ in outcomes) == list(range(len(answers)))
    return [key(outcome) for _, outcome in sorted(outcomes, key=lambda item: item[0])]


def in_use(model: Model) -> int:
    return model.blocks.count - 1 - model.blocks.available


def test_what_was_generated_holds(runner: ExactRunner, answers: list[Recorded], model: Model) -> None:
    before = in_use(model)
    assert together(runner, answers) == [None] * len(answers)
    assert [runner.audit(*answer) for answer in answers] == [None] * len(answers)
    assert in_use(model) == before


@pytest.mark.parametrize("step_tokens", [1, 7, 64, 512])
@pytest.mark.parametrize("logits_rows", [1, 50, 10_000])
def test_any_mix_gives_each_answers_own_outcome(
    runner: ExactRunner,
    answers: list[Recorded],
    monkeypatch: pytest.MonkeyPatch,
    step_tokens: int,
    logits_rows: int,
) -> None:
    rng = random.Random(step_tokens * 31 + logits_rows)
    vocab = runner._model.vocab
    mix = [rng.choice(answers) for _ in range(14)]
    mix = [tampered(rng, answer, vocab) if rng.random() < 0.5 else answer for answer in mix]
    hostile = (mix[0][0], (1 << 40,), (bytes(16),), mix[0][3])
    mix.insert(rng.randrange(len(mix)), hostile)
    expected = [alone(runner, answer) for answer in mix]
    assert expected.count(None) < len(mix) - 1
    monkeypatch.setattr(runner, "_step_tokens", step_tokens)
    monkeypatch.setattr(audit, "LOGITS_BYTES", 4 * vocab * logits_rows)
    assert together(runner, mix) == expected


def test_the_first_difference_is_the_one_that_was_made(runner: ExactRunner, answers: list[Recorded]) -> None:
    """Not only equal to each other: the position and the values are known."""
    prompt, output, marks, sampling = answers[4]
    vocab = runner._model.vocab
    for at in (0, 13, len(output) - 1):
        wrong = (output[at] + 1) % vocab
        changed = (prompt, (*output[:at], wrong, *output[at + 1 :]), marks, sampling)
        found = dict(runner.audit_many([answers[2], changed, answers[6]]))
        assert found[0] is None
        assert found[2] is None
        difference: Any = found[1]
        assert (difference["position"], difference["recorded_token"]) == (at, wrong)
        assert (difference["local_token"], difference["fingerprint_equal"]) == (output[at], True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({0: ()}, "replay.tokens"),
        ({1: (1 << 40,), 2: (bytes(16),)}, "replay.tokens"),
        ({1: (-1,), 2: (bytes(16),)}, "replay.tokens"),
        ({1: (1.5,), 2: (bytes(16),)}, "replay.tokens"),
        ({0: (1,) * 600}, "replay.tokens"),
        ({2: ()}, "replay.tokens"),
        ({2: ("x",) * 9}, "replay.tokens"),
        ({"temperature": float("nan")}, "replay.sampling"),
        ({"temperature": 1}, "replay.sampling"),
        ({"top_k": 2.5}, "replay.sampling"),
        ({"top_k": -1}, "replay.sampling"),
        ({"seed": True}, "replay.sampling"),
        ({"logit_bias": ((1 << 40, 1.0),)}, "replay.sampling"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "replay.sampling"),
        ({"logit_bias": ((1, "x"),)}, "replay.sampling"),
        ({"logit_bias": 3}, "replay.sampling"),
        ({"nonsense": 3}, "replay.sampling"),
    ],
)
def test_a_record_that_cannot_be_is_refused_alone(
    runner: ExactRunner, answers: list[Recorded], change: dict[Any, Any], code: str
) -> None:
    fields: list[Any] = list(answers[2])
    for name, value in change.items():
        if isinstance(name, str):
            fields[3] = {**fields[3], name: value}
        else:
            fields[name] = value
    bad: Any = tuple(fields)
    good = answers[3]
    found = dict(runner.audit_many([good, bad, bad, good]))
    assert found[0] is found[3] is None
    for index in (1, 2):
        refused = found[index]
        assert isinstance(refused, FormatError)
        assert refused.code == code
    with pytest.raises(FormatError):
        runner.audit(*bad)


def test_logits_are_made_for_output_positions_only_and_in_blocks(
    runner: ExactRunner, answers: list[Recorded], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    chunks: list[Chunk] = []
    logits, hidden = model.logits, model.hidden

    def counted(rows: Tensor) -> Tensor:
        sizes.append(rows.shape[0])
        return logits(rows)

    def seen(parts: Sequence[Chunk]) -> Tensor:
        chunks.extend(parts)
        return hidden(parts)

    monkeypatch.setattr(model, "logits", counted)
    monkeypatch.setattr(model, "hidden", seen)
    monkeypatch.setattr(audit, "LOGITS_BYTES", 4 * model.vocab * 20)
    assert together(runner, answers) == [None] * len(answers)
    assert max(sizes) == 20
    assert sum(sizes) == sum(len(output) for _, output, _, _ in answers)
    assert sum(len(c.tokens) for c in chunks) == sum(len(p) + len(o) - 1 for p, o, _, _ in answers if o)


class Fragile:
    """A model whose pass fails wherever the token 123 stands at a position, or where a step has too many tokens."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, most: int = 1 << 30) -> None:
        self.calls = 0
        hidden = model.hidden

        def broken(chunks: Sequence[Chunk]) -> Tensor:
            self.calls += 1
            if any(123 in c.tokens for c in chunks):
                raise NumericsError("linear: expected finite values, got others", code="numerics.not_finite")
            if sum(len(c.tokens) for c in chunks) > most:
                raise MemoryError
            return hidden(chunks)

        monkeypatch.setattr(model, "hidden", broken)


def test_a_value_out_of_range_ends_its_own_answer(
    runner: ExactRunner, answers: list[Recorded], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an earlier difference of that answer is found first, whatever step both are in."""
    clean = [a for a in answers if 123 not in (*a[0], *a[1])]
    prompt, output, marks, sampling = next(a for a in clean if len(a[1]) >= 30)
    spoilt = (prompt, (*output[:20], 123, *output[21:]), marks, sampling)  # 123 is computed after it was compared
    early = (prompt, (output[0], (output[1] + 1) % 120, *output[2:20], 123, *output[21:]), marks, sampling)
    poison = ((123, *prompt), output, marks, sampling)
    Fragile(model, monkeypatch)
    mix = [clean[0], spoilt, clean[1], poison, early, clean[2]]
    found = dict(runner.audit_many(mix))
    assert [found[i] for i in (0, 2, 5)] == [None] * 3
    assert key(found[3]) == (ReplayDiverged, "replay.numerics")
    for index, position in ((1, 20), (4, 1)):
        difference: Any = found[index]
        assert difference["position"] == position
    assert [key(found[i]) for i in range(6)] == [alone(runner, a) for a in mix]


def test_too_little_memory_for_a_step_makes_smaller_steps(
    runner: ExactRunner, answers: list[Recorded], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragile = Fragile(model, monkeypatch, most=10)
    assert together(runner, [a for a in answers if 123 not in (*a[0], *a[1])])
    assert fragile.calls > 20
    monkeypatch.undo()
    Fragile(model, monkeypatch, most=0)
    found = dict(runner.audit_many(answers[:3]))
    assert found[0] is None  # of no token
    assert [key(found[i]) for i in (1, 2)] == [(Undecidable, "replay.memory")] * 2


def test_too_little_memory_for_the_draws_too(
    runner: ExactRunner, answers: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch says so in its own way, and a whole audit of others must not end with it."""
    draw = audit.draw

    def scarce(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bytes]]:
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return draw(logits, rows)

    monkeypatch.setattr(audit, "draw", scarce)
    most = 5
    assert together(runner, answers) == [None] * len(answers)
    most = 0
    found = dict(runner.audit_many(answers[:3]))
    assert found[0] is None  # of no token
    assert [key(found[i]) for i in (1, 2)] == [(Undecidable, "replay.memory")] * 2


def test_answers_wait_for_blocks(answers: list[Recorded]) -> None:
    """A pool of 4 blocks: they go through it one or two at a time, and what never fits is refused alone."""
    runner = ExactRunner.__new__(ExactRunner)
    artefact = TinyArtefact("qwen3")
    runner._artefact, runner._model, runner._step_tokens = artefact, Model(artefact), 512
    runner._model.size_pool(5)
    small = [a for a in answers if len(a[0]) + len(a[1]) <= 256]
    large = ((1,) * 300, small[2][1], small[2][2], small[2][3])
    outcomes = together(runner, [*small, large, *small])
    assert outcomes == [*[None] * len(small), (Undecidable, "replay.memory"), *[None] * len(small)]
    assert in_use(runner._model) == 0


def test_answers_are_read_as_there_is_room(runner: ExactRunner, answers: list[Recorded], model: Model) -> None:
    """An endless stream is audited, and leaving it gives the blocks back."""
    taken = 0

    def endless() -> Iterator[Recorded]:
        nonlocal taken
        for answer in itertools.cycle(answers):
            taken += 1
            yield answer

    before = in_use(model)
    results = runner.audit_many(endless())
    first = list(itertools.islice(results, 40))
    assert all(outcome is None for _, outcome in first)
    assert taken < 120
    results.close()  # type: ignore[attr-defined]
    assert in_use(model) == before


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from countermark_appliance.engine.replay import load_runner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Undecidable) as caught:
        load_runner(None, "cuda")  # type: ignore[arg-type]
    assert caught.value.code == "engine.device"
