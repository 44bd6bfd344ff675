"""The plain executor against one sequence at a time; what it keeps between steps; what it does with failures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tinymodel import TinyArtefact

from countermark_appliance.engine import executor as executors
from countermark_appliance.engine.executor import HostExecutor, _likely, make_executor
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.step import Part, Row
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import SamplerParams
from executor_cases import PARAMS, Answer, alone, answers, check, on_the_host


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TinyArtefact("qwen3"))


def test_every_answer_is_the_one_it_has_alone(model: Model) -> None:
    asked = answers(21, model.vocab, longest=80, length=9)
    on_the_host(model, asked)
    for answer in asked:
        check(answer, alone(model, answer))


def test_carried_tokens_without_a_pipeline(model: Model) -> None:
    """The id drawn by the step before, by its place there; penalties have seen it."""
    answer = Answer(params=PARAMS[1], prompt=[5, 9, 9, 30], length=3)
    ids, _, _ = alone(model, answer)
    executor, cache = HostExecutor(model), model.new_cache(8)
    tokens = list(answer.prompt)
    part = Part(cache=cache, start=0, tokens=tokens, row=Row(params=answer.params, tokens=tokens, prompt=4, length=4))
    found = [executor.start([part]).wait()[0].token]
    for length in (5, 6):
        row = Row(params=answer.params, tokens=[*tokens, *found[: length - 5]], prompt=4, length=length)
        step = [Part(cache=cache, start=length - 1, tokens=(), carried=0, row=row)]
        found.append(executor.start(step).wait()[0].token)
    assert found == ids


def test_a_failed_step_counts_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(params=PARAMS[1], prompt=[5, 9, 9, 30], length=2)
    ids, marks, _ = alone(model, answer)
    executor, cache, tokens = HostExecutor(model), model.new_cache(8), list(answer.prompt)

    def part() -> Part:
        row = Row(params=answer.params, tokens=tokens, prompt=4, length=len(tokens), key="one")
        known = len(tokens) - 1 if len(tokens) > 4 else 0
        return Part(cache=cache, start=known, tokens=tokens[known:], row=row)

    tokens.append(executor.start([part()]).wait()[0].token)
    for error in (NumericsError("value", code="numerics.range"), MemoryError("no")):
        with monkeypatch.context() as patch:
            patch.setattr(Model, "forward", lambda *_: (_ for _ in ()).throw(error))  # noqa: B023
            ticket = executor.start([part()])
        with pytest.raises(type(error)):
            ticket.wait()
    (drawn,) = executor.start([part()]).wait()
    assert [tokens[4], drawn.token] == ids
    assert drawn.fingerprint == marks[1]
    executor.forget("one")
    assert executor.start([part()]).wait() == [drawn]


def test_a_draw_without_memory_is_the_steps_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(params=PARAMS[1], prompt=[5, 9, 9, 30], length=1)
    row = Row(params=answer.params, tokens=answer.prompt, prompt=4, length=4, key="one")
    part = Part(cache=model.new_cache(8), start=0, tokens=answer.prompt, row=row)
    executor = HostExecutor(model)
    for text, error in (("DefaultCPUAllocator: can't allocate memory", MemoryError), ("a fault", RuntimeError)):
        with monkeypatch.context() as patch:
            patch.setattr(executors, "draw", lambda *_, text=text: (_ for _ in ()).throw(RuntimeError(text)))
            with pytest.raises(error):
                executor.start([part]).wait()
    assert executor.start([part]).wait()[0].token == alone(model, answer)[0][0]


def test_counts_follow_a_sequence_that_begins_anew(model: Model) -> None:
    """The same key with another past: what was counted is not the row's."""
    executor = HostExecutor(model)
    for prompt in ([1, 2, 3], [7, 7, 7], [1, 2, 3, 4]):
        answer = Answer(params=PARAMS[1], prompt=prompt, length=1)
        row = Row(params=answer.params, tokens=prompt, prompt=len(prompt), length=len(prompt), key="one")
        cache = model.new_cache(len(prompt))
        (drawn,) = executor.start([Part(cache=cache, start=0, tokens=prompt, row=row)]).wait()
        assert drawn.token == alone(model, answer)[0][0]


def test_a_step_that_draws_nothing(model: Model) -> None:
    seen: list[torch.Tensor] = []
    executor = make_executor(model, observe=lambda _, logits: seen.append(logits))
    assert not executor.pipelined
    assert executor.start([Part(cache=model.new_cache(3), start=0, tokens=[1, 2, 3])]).wait() == []
    assert seen == []
    executor.close()
    executor.close()


def test_log_probabilities_of_a_vocabulary_smaller_than_asked_for() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0])
    row = Row(params=SamplerParams(), tokens=[1], prompt=1, length=1, logprobs=20)
    logprob, top = _likely(logits, row, 1)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert logprob == pytest.approx(float(expected[1]), abs=1e-6)
    assert [i for i, _ in top] == [2, 0, 1]
    assert [p for _, p in top] == pytest.approx([float(expected[i]) for i in (2, 0, 1)], abs=1e-6)


def test_the_executor_of_a_gpu_has_rows_for_all_that_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of more rows than it has room for would end the engine's thread."""
    from countermark_appliance.engine import graphs

    made: list[int] = []
    monkeypatch.setattr(graphs, "GraphExecutor", lambda _, *, max_rows, observe: made.append(max_rows))
    there = SimpleNamespace(device=torch.device("cuda"))
    for asked in (1, 256, 300):
        make_executor(there, rows=asked)  # type: ignore[arg-type]
    assert made == [256, 256, 300]


def test_records_differ_where_parameters_do() -> None:
    """Every parameter has its place in what a GPU reads."""
    from countermark_kernels.sampler import cuda_record

    base = SamplerParams()
    changes = {
        "temperature": 0.5, "top_k": 3, "top_p_20bit": 5, "min_p_20bit": 7, "repetition": 2.0, "presence": 0.5,
        "frequency": 0.25, "seed": (1 << 64) - 1,
    }  # fmt: skip
    made = {cuda_record(replace(base, **{name: value}), 100) for name, value in changes.items()}
    assert len({*made, cuda_record(base, 100)}) == len(changes) + 1
