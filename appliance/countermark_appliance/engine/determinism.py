"""The determinism suite: an operator's proof, on their own machine, that an answer depends on its question alone.

Each case serves the same questions under conditions of its own (`conditions.py`) and demands of every run the digest
that the question has alone: over all raw logits of every drawn row, the tokens and the fingerprints (`rig.py`). A case
also demands that its condition occurred (a cache was hit, a sequence preempted, a batch of that size run): otherwise it
fails, or is skipped with a reason where this machine cannot make it. Everything random is seeded, so the digests of two
machines with one set of weights, one scale and one version of Python can be compared.

    neighbours     one prompt again and again, in batches of random company and size
    resident-N     the same with N sequences holding blocks, of mixed lengths, every one sampled another way
    chunks         a long prompt in pieces of 64 to 8192 tokens, beside a sequence that decodes
    prefix-cache   computed, then found computed; then a prompt with a part in common
    preemption     too few blocks: sequences lose theirs and are computed again
    cancel         neighbours end in the middle of the batch
    graphs         with CUDA graphs and without
    unobserved     at full speed, no logits copied out: tokens and fingerprints stand for them
    pages          key/value blocks handed out in random order
    buckets        batches of one less, as many and one more than each power of two and each bucket of the executor
    processes      another process, with another number of threads
    sampling       greedy and sampled, with penalties and biases, log probabilities asked for and not
    grammar        answers that must fit an expression or a JSON schema, beside others that need not
    audit          the answers once more by teacher-forced passes: nothing decoded, carried or cached

Not checked here: that the answers are right; the kernels' own tests compare with references that are not ours.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch

from countermark.errors import Undecidable, UsageError
from countermark_appliance.engine.conditions import SEED, Conditions, Facts, Load, Scale, Skipped, generator
from countermark_appliance.engine.engine import computes_on, cpu_model, engine_version
from countermark_appliance.engine.rig import Difference, Run
from countermark_appliance.engine.selftest import require_device, self_test
from countermark_appliance.faults import describe
from countermark_kernels import PROFILE, kernel_digest, launch


class Status(StrEnum):
    """SKIP is never success: the condition was not made."""

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What came of one case. `distinct`: the most different results that one question had; must be 1.

    `digest`: over the numbers of the questions and the digests of their references. `facts`: what ran; `reason`: why it
    failed or was skipped.
    """

    name: str
    status: Status
    runs: int
    questions: int
    distinct: int
    digest: str
    facts: Mapping[str, object]
    seconds: float
    reason: str
    difference: Difference | None

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"status": self.status.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran where, and what came of it."""

    environment: Mapping[str, object]
    scale: Scale
    cases: tuple[Case, ...]

    @property
    def passed(self) -> bool:
        """Something was tested and nothing failed."""
        statuses = {case.status for case in self.cases}
        return Status.PASS in statuses and Status.FAIL not in statuses

    def as_json(self) -> dict[str, object]:
        return {
            "suite": SEED,
            "passed": self.passed,
            "environment": dict(self.environment),
            "scale": asdict(self.scale),
            "cases": [case.as_json() for case in self.cases],
        }


def run_suite(
    load: Load,
    *,
    device: str = "cpu",
    scale: Scale | None = None,
    cases: Sequence[str] = (),
    threads: int = 0,
    on_case: Callable[[str, Case | None], None] = lambda _name, _case: None,
) -> Report:
    """Run the named cases, or all. `on_case`: told a case's name before it runs, and its result after.

    Raises `UsageError` (`selftest.case`), `Undecidable` (`engine.device`, `selftest.memory`), `VerificationError`
    (`engine.self_test`), and what `load` raises.
    """
    require_device(device)
    scale = scale or Scale.full(device)
    threads = threads or len(os.sched_getaffinity(0))
    launch.set_threads(threads)
    try:
        conditions = Conditions(load, device=device, scale=scale, threads=threads)
    except MemoryError as err:
        raise Undecidable("self-test: expected memory for the pool of keys and values", code="selftest.memory") from err
    known = conditions.cases()
    if unknown := sorted(set(cases) - known.keys()):
        raise UsageError(f"cases: expected of {', '.join(known)}, got {', '.join(unknown)}", code="selftest.case")
    try:
        environment = _environment(conditions, threads)
        results = []
        for name in (name for name in known if not cases or name in cases):
            on_case(name, None)
            results.append(_run(conditions, name))
            on_case(name, results[-1])
    finally:
        conditions.rig.close()
    return Report(environment=environment, scale=scale, cases=tuple(results))


def _run(conditions: Conditions, name: str) -> Case:
    start = time.monotonic()
    facts: Facts = {}
    runs: list[Run] = []
    status, reason, digest = Status.PASS, "", ""
    try:
        runs, unmet = conditions.cases()[name](generator(name), facts)
        digest = _digest(conditions, runs)
        if unmet:
            status, reason = Status.FAIL, f"not tested: {unmet}"
    except Skipped as err:
        status, reason = Status.SKIP, str(err)
    except Exception as err:  # noqa: BLE001  the other cases shall run, and the report shall say so
        status, reason = Status.FAIL, f"{describe(err)}: {err!s:.300}"
    difference = next((run.difference for run in runs if run.difference is not None), None)
    if difference is not None:
        status, reason = Status.FAIL, "a run differs from its question's reference"
    return Case(
        name=name,
        status=status,
        runs=len(runs),
        questions=len({run.job.question.number for run in runs}),
        distinct=_distinct(runs),
        digest=digest,
        facts=facts,
        seconds=round(time.monotonic() - start, 2),
        reason=reason,
        difference=difference,
    )


def _distinct(runs: Sequence[Run]) -> int:
    """The most results of one question among runs of one length, its reference counted; one that broke off is one."""
    found: defaultdict[tuple[int, int], set[bytes]] = defaultdict(set)
    for run in runs:
        assert run.reference is not None
        length = len(run.positions)
        digest = hashlib.sha256(b"".join(run.positions)).digest() if length else b"broke off"
        found[run.job.question.number, length] |= {digest, run.reference.digest(length)}
    return max(map(len, found.values()), default=0)


def _digest(conditions: Conditions, runs: Sequence[Run]) -> str:
    digest = hashlib.sha256()
    for number, question in sorted({run.job.question.number: run.job.question for run in runs}.items()):
        digest.update(number.to_bytes(4, "little") + conditions.rig.reference(question).digest(question.tokens))
    return digest.hexdigest()


def _environment(conditions: Conditions, threads: int) -> dict[str, object]:
    model, artefact = conditions.rig.model, conditions.artefact
    facts = computes_on(model.device)
    return {
        "device": ", ".join(facts["gpus"]) or cpu_model(),
        "driver": facts["driver_version"],
        "cuda": facts["cuda_version"],
        "triton": facts["triton_version"],
        "backend": facts["backend"],
        "instruction_sets": list(launch.isas()),
        "threads": threads,
        "profile": PROFILE,
        "kernel_digest": kernel_digest().hex(),
        "model": artefact.config.name,
        "weights_root": artefact.weights_root.hex(),
        "self_test": self_test(model).hex(),
        "engine": engine_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
