"""The determinism suite passes on the engine, and fails on engines that are nearly right."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinymodel import TinyArtefact
from torch import Tensor

from countermark.errors import Undecidable, UsageError, VerificationError
from countermark_appliance import cli
from countermark_appliance.engine import conditions, determinism, executor, rig, weights
from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.conditions import Scale
from countermark_appliance.engine.determinism import Case, Report, Status, run_suite
from countermark_appliance.engine.executor import HostExecutor
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.step import Part, Ticket

SMALL = Scale(runs=12, questions=9, prompt=100, long_prompt=300, tokens=8, resident=(12, 20))
LOAD = functools.partial(TinyArtefact, "qwen3")
NAMES = [
    *("neighbours", "resident-12", "resident-20", "chunks", "prefix-cache", "preemption", "cancel", "graphs"),
    *("unobserved", "pages", "buckets", "processes", "sampling", "grammar", "audit"),
]


def suite(*cases: str, scale: Scale = SMALL, load: Any = LOAD) -> Report:
    return run_suite(load, scale=scale, cases=cases)


def only(name: str) -> Case:
    (case,) = suite(name).cases
    assert case.name == name
    return case


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite without the start-up self-test, which finds some of these engines too."""
    monkeypatch.setattr(determinism, "self_test", lambda _model: b"")


@pytest.fixture(scope="module")
def whole() -> Report:
    told: list[tuple[str, Case | None]] = []
    report = run_suite(LOAD, scale=SMALL, on_case=lambda name, case: told.append((name, case)))
    assert [name for name, case in told if case is None] == NAMES
    assert [case for _, case in told if case is not None] == list(report.cases)
    return report


def test_every_case_passes_or_says_why_not(whole: Report) -> None:
    assert whole.passed
    assert [case.name for case in whole.cases] == NAMES
    for case in whole.cases:
        if case.name == "graphs":
            assert (case.status, case.reason, case.digest) == (Status.SKIP, "CUDA graphs need a GPU", "")
            continue
        assert (case.status, case.distinct, case.difference, case.reason) == (Status.PASS, 1, None, ""), case
        assert case.runs >= 4
        assert len(case.digest) == 64
    by_name = {case.name: case for case in whole.cases}
    for name in ("neighbours", "resident-12", "resident-20"):
        assert by_name[name].facts["copies"] == 12
        assert by_name[name].runs >= 20
    assert by_name["resident-20"].facts["resident"] == 20
    assert by_name["preemption"].facts["computed_again"]
    assert by_name["chunks"].facts["chunks"] == [64, 97, 128, 256, 512]
    assert {1, 2, 3, 15, 16, 17} <= set(by_name["buckets"].facts["batches"])  # type: ignore[call-overload]
    assert whole.environment["weights_root"] == LOAD().weights_root.hex()


def test_one_step_in_flight_gives_the_same_digests(
    whole: Report, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host plans a step before it knows the draws of the one before."""
    monkeypatch.setattr(HostExecutor, "pipelined", True)
    names = ("neighbours", "resident-20", "chunks", "prefix-cache", "preemption", "cancel", "unobserved", "buckets")
    names += ("grammar",)
    report = suite(*names)
    assert {case.name: (case.status, case.reason) for case in report.cases} == dict.fromkeys(names, (Status.PASS, ""))
    assert {case.name: case.digest for case in report.cases} == {
        case.name: case.digest for case in whole.cases if case.name in names
    }


def test_the_report_is_json(whole: Report) -> None:
    body = json.loads(json.dumps(whole.as_json()))
    assert body["passed"] is True
    assert [case["name"] for case in body["cases"]] == NAMES
    assert {"device", "driver", "torch", "kernel_digest", "profile", "weights_root", "date"} <= body[
        "environment"
    ].keys()


def test_a_case_alone_has_the_digest_it_has_in_the_suite(whole: Report, unproven: None) -> None:
    names = ("pages", "neighbours")
    alone = {case.name: case.digest for case in suite(*names).cases}
    assert alone == {case.name: case.digest for case in whole.cases if case.name in names}


def test_other_weights_have_other_digests(whole: Report, unproven: None) -> None:
    (case,) = suite("cancel", load=functools.partial(TinyArtefact, "qwen3", seed=2)).cases
    assert case.status is Status.PASS
    assert case.digest not in {other.digest for other in whole.cases}


# Engines that are nearly right.


def split_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """One logit is a float sum, cut in two where the batch has more than one row, as a split-K kernel would."""
    logits = Model.logits

    def reordered(self: Model, hidden: Tensor) -> Tensor:
        out = logits(self, hidden)
        for i, row in enumerate(hidden.numpy()):
            parts = np.split(row, 2) if len(hidden) > 1 else (row,)
            out[i, 33] = float(sum((np.add.accumulate(part)[-1] for part in parts), np.float32(0)))
        return out

    monkeypatch.setattr(Model, "logits", reordered)


def last_bit(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """The last bit of one logit changes where `wrong` says so of the step's chunks."""
    forward = Model.forward

    def perturbed(self: Model, chunks: Sequence[Chunk]) -> Tensor:
        out = forward(self, chunks)
        if out.shape[0] and wrong(chunks):
            out[-1, 7] = out[-1, 7].nextafter(torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(Model, "forward", perturbed)


def drawing(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.logits for chunk in chunks)


@pytest.mark.parametrize("case", ["neighbours", "resident-12", "buckets", "pages", "cancel", "preemption", "sampling"])
def test_a_reordered_float_sum_is_found(case: str, unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split_k(monkeypatch)
    found = only(case)
    assert found.status is Status.FAIL
    assert found.difference is not None
    assert found.difference.logit == 33
    assert found.difference.rows_in_step > 1
    expected, got = float.fromhex(found.difference.expected), float.fromhex(found.difference.got)
    assert 0 < abs(expected - got) < 1e-3
    assert found.distinct > 1


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("buckets", lambda chunks: drawing(chunks) == 16),
        ("buckets", lambda chunks: drawing(chunks) == 9),
        ("resident-20", lambda chunks: drawing(chunks) > 13),
        ("chunks", lambda chunks: any(len(chunk.tokens) == 44 for chunk in chunks)),  # 300 = 4 * 64 + 44
        ("chunks", lambda chunks: any(len(chunk.tokens) > 1 and chunk.start % 64 for chunk in chunks)),
        ("prefix-cache", lambda chunks: any(chunk.start == 128 and len(chunk.tokens) > 1 for chunk in chunks)),
        ("preemption", lambda chunks: any(len(c.tokens) > 1 and c.start + len(c.tokens) > 64 for c in chunks)),
        ("pages", lambda chunks: any(c.cache.blocks != sorted(c.cache.blocks) for c in chunks)),
    ],
)
def test_one_bit_under_one_condition_is_found_by_its_case(
    case: str, wrong: Any, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_bit(monkeypatch, wrong)
    found = only(case)
    assert (found.status, found.distinct) == (Status.FAIL, 2)
    assert found.difference is not None
    assert found.difference.logit == 7


def test_the_start_up_test_finds_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    split_k(monkeypatch)
    with pytest.raises(VerificationError) as differs:
        suite("graphs")
    assert differs.value.code == "engine.self_test"


def test_one_that_is_wrong_alone_as_in_company(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decodes otherwise than it reads, or feeds itself another token than it drew, whoever is beside it: every run
    equals its reference, and every token follows from its logits. An audit neither decodes nor carries."""

    def both() -> None:
        cancel, audit = suite("cancel", "audit").cases
        assert cancel.status is Status.PASS
        assert (audit.status, audit.distinct) == (Status.FAIL, 2)
        assert audit.difference is not None
        assert audit.difference.position == 1  # the first one after a token of its own

    forward, start = Model.forward, HostExecutor.start

    def decodes_otherwise(self: Model, chunks: Sequence[Chunk]) -> Tensor:
        out = forward(self, chunks)
        drawing = [chunk for chunk in chunks if chunk.logits]
        out[[len(chunk.tokens) == 1 and chunk.start > 0 for chunk in drawing], 7] += 0.25
        return out

    with monkeypatch.context() as decoding:
        decoding.setattr(Model, "forward", decodes_otherwise)
        both()

    def stale(self: HostExecutor, parts: Sequence[Part]) -> Ticket:
        ticket = start(self, parts)
        self._ids = [token ^ 1 for token in self._ids]
        return ticket

    monkeypatch.setattr(HostExecutor, "pipelined", True)
    monkeypatch.setattr(HostExecutor, "start", stale)
    both()


def test_a_prefix_cache_that_forgets_what_was_before_a_block(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    match, publish = Blocks.match, Blocks.publish
    found: dict[bytes, int] = {}

    def published(self: Blocks, scope: bytes, tokens: Any, numbers: Any, first: int, end: int) -> int:
        found.update({str(tokens[i * 64 : i * 64 + 64]).encode(): numbers[i] for i in range(first, end // 64)})
        return publish(self, scope, tokens, numbers, first, end)

    def matched(self: Blocks, scope: bytes, tokens: Any) -> list[int]:
        blocks = match(self, scope, tokens)
        other = found.get(str(tokens[64:128]).encode())
        if len(blocks) == 1 and other in self._kept:  # the second block of another prompt
            del self._kept[other]
            self._references[other] += 1
            blocks.append(other)
        return blocks

    monkeypatch.setattr(Blocks, "publish", published)
    monkeypatch.setattr(Blocks, "match", matched)
    assert only("prefix-cache").status is Status.FAIL


def test_an_engine_that_shows_other_logits_than_it_draws_from(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook sees constant logits: every digest of logits is equal, and none says anything."""
    start = HostExecutor.start

    def lying(self: HostExecutor, parts: Sequence[Part]) -> Ticket:
        observe = self._observe
        self._observe = lambda rows, logits: observe(rows, torch.zeros_like(logits)) if observe else None
        try:
            return start(self, parts)
        finally:
            self._observe = observe

    monkeypatch.setattr(HostExecutor, "start", lying)
    found = only("cancel")
    assert found.status is Status.FAIL
    assert "not the one these logits give" in found.reason or "not that of these logits" in found.reason


def test_a_hook_that_sees_nothing(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.Rig, "_observe", lambda *_: None)
    found = only("cancel")
    assert found.status is Status.FAIL
    assert "logits shown to the hook" in found.reason


def test_a_condition_that_does_not_occur_fails_its_case(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without a prefix cache, and one that never lets as many run as it may, prove nothing."""
    monkeypatch.setattr(Blocks, "match", lambda *_: [])
    found = only("prefix-cache")
    assert found.status is Status.FAIL
    assert found.difference is None
    assert found.reason.startswith("not tested:")
    assert found.distinct == 1
    monkeypatch.undo()

    monkeypatch.setattr(conditions.Rig, "arrange_blocks", lambda *_: None)
    assert only("pages").reason.startswith("not tested:")
    monkeypatch.undo()

    init = Scheduler.__init__

    def few(self: Scheduler, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "max_sequences": 3})

    monkeypatch.setattr(Scheduler, "__init__", few)
    for name in ("resident-12", "buckets", "sampling"):
        assert only(name).status is Status.FAIL
    monkeypatch.setattr(
        Scheduler, "__init__", lambda self, *args, **options: init(self, *args, **{**options, "max_sequences": 1})
    )
    for name in ("neighbours", "chunks", "cancel", "unobserved"):
        assert only(name).reason.startswith("not tested:")


def test_graphs_that_are_not_used_prove_nothing(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that could record graphs and had no room for any; one that replays them is told apart."""

    class Recording(HostExecutor):
        replayed, counted = 0, 1

        def start(self, parts: Sequence[Part]) -> Ticket:
            self.replayed += self.counted
            return super().start(parts)

    def made(model: Model, *, graphs: bool, observe: Any) -> HostExecutor:
        return (Recording if graphs else HostExecutor)(model, observe=observe)

    monkeypatch.setattr(rig, "make_executor", made)
    cases = conditions.Conditions(LOAD, device="cpu", scale=SMALL, threads=1)
    cases._device = "cuda"
    for counted in (1, 0):
        Recording.counted = counted
        facts: conditions.Facts = {}
        runs, unmet = cases.graphs(conditions.generator("graphs"), facts)
        assert len(runs) == 240
        assert not unmet if counted else unmet.startswith("expected steps that are CUDA graphs")
        assert bool(facts["replayed"]) is bool(counted)
    _, unmet = cases.unobserved(conditions.generator("unobserved"), {})
    assert unmet == "expected one step in flight while the next is planned"
    cases.rig.close()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda logprob, top: (None, ()), "log probabilities of every token"),
        (lambda logprob, top: (logprob - 0.5, top), "log probability 0"),
        (lambda logprob, top: (logprob, top[::-1]), "likeliest of token 0"),
    ],
)
def test_log_probabilities_are_there_and_follow_from_the_logits(
    unproven: None, monkeypatch: pytest.MonkeyPatch, wrong: Any, reason: str
) -> None:
    likely = executor._likely
    monkeypatch.setattr(
        executor,
        "_likely",
        lambda logits, row, token: wrong(*likely(logits, row, token)) if row.logprobs else (None, ()),
    )
    found = only("sampling")
    assert found.status is Status.FAIL
    assert reason in found.reason


def test_an_engine_that_breaks_is_a_failure_and_the_others_still_run(
    unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Model, chunks: Sequence[Chunk]) -> Tensor:
        if len(chunks) > 1:
            raise RuntimeError("driver")
        return self.logits(self.hidden(chunks))

    monkeypatch.setattr(Model, "forward", broken)
    report = suite("cancel", "graphs", "chunks")
    assert {case.name: case.status for case in report.cases} == {
        "chunks": Status.FAIL,
        "cancel": Status.FAIL,
        "graphs": Status.SKIP,
    }
    assert not report.passed


def test_without_the_hook_fingerprints_stand_for_the_logits(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split_k(monkeypatch)
    found = only("unobserved")
    assert (found.status, found.distinct) == (Status.FAIL, 2)
    assert found.difference is not None
    assert found.difference.logit is None


def test_nothing_tested_is_not_a_pass(unproven: None) -> None:
    report = suite("graphs")
    assert [case.status for case in report.cases] == [Status.SKIP]
    assert not report.passed


def test_the_other_process_is_compared(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is perturbed, there is not."""
    last_bit(monkeypatch, lambda chunks: drawing(chunks) == 1 and chunks[-1].start > 20)
    found = only("processes")
    assert found.status is Status.FAIL
    assert found.difference is not None


def test_wrong_calls() -> None:
    with pytest.raises(UsageError) as wrong:
        suite("neighbours", "nonsense")
    assert wrong.value.code == "selftest.case"
    with pytest.raises(Undecidable) as large:
        suite(scale=Scale(resident=(1 << 40,)))
    assert large.value.code == "selftest.memory"


@pytest.fixture
def tiny(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load", lambda _path, **_options: LOAD())
    monkeypatch.setattr(conditions, "multiprocessing", None)  # a patched `load` does not reach another process
    monkeypatch.setattr(Scale, "full", lambda _device, **_: SMALL)


def test_the_command(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["selftest", "--weights", str(tmp_path)]
    assert cli.main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["selftest"], said["profile"]) == ("pass", "exact-v1")
    assert len(said["self_test"]) == 64
    assert said["checks"]

    assert cli.main([*argv, "--runs", "3"]) == 1  # not without --full
    assert cli.main([*argv, "--full", "--cases", "nonsense"]) == 1
    capsys.readouterr()


def test_the_command_in_full(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["selftest", "--weights", str(tmp_path), "--full", "--cases", "cancel,graphs,pages"]
    assert cli.main([*argv, "--report", str(tmp_path / "report.json")]) == 0
    seen = capsys.readouterr()
    brief = json.loads(seen.out)
    assert brief == {"passed": True, "cases": {"cancel": "PASS", "graphs": "SKIP", "pages": "PASS"}}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert "CUDA graphs need a GPU" in seen.err

    for nowhere in (tmp_path, tmp_path / "absent" / "report.json"):  # said at once, not after minutes
        monkeypatch.setattr(determinism, "run_suite", lambda *_, **__: pytest.fail("it ran"))
        assert cli.main([*argv, "--report", str(nowhere)]) == 1
        assert "usage.file" in capsys.readouterr().err
    monkeypatch.setattr(determinism, "run_suite", run_suite)

    last_bit(monkeypatch, lambda chunks: 2 < drawing(chunks) < 40)
    assert cli.main([*argv, "--json"]) == 1
    seen = capsys.readouterr()
    body = json.loads(seen.out)
    assert body["passed"] is False
    assert {case["name"]: case["status"] for case in body["cases"]}["pages"] == "FAIL"
    assert "logit 7" in seen.err
    assert "selftest.failed" in seen.err
