"""One model served again and again under any conditions, with every raw logit of every drawn row hashed on the host.

What runs is what serves: the scheduler, the loop and the executors, only that the requests are token ids and that all
of them wait before the first step, so that a wave is the same wave every time. The executor's `observe` hook shows the
raw logits. SHA-256 over the bytes of a row, its token and its fingerprint make the digest of a position, and those of
all positions that of a run. The rig also watches what it was that ran (batch sizes, chunk sizes, block tables,
recomputed sequences), because a condition that did not occur was not tested.

A reference is one run alone. That its tokens and fingerprints follow from the logits it was seen with is computed by
the kernels' plain references, so that the hook cannot show one thing and the engine deliver another. That the logits
follow from the tokens is for `Rig.audit` to find.
"""

from __future__ import annotations

import functools
import hashlib
import os
import queue
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from countermark.errors import CountermarkError
from countermark_appliance.engine.audit import Masks, Recording, audit_all
from countermark_appliance.engine.executor import make_executor
from countermark_appliance.engine.grammar import BARRED, Grammar, Grammars, unpacked
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Request, TokenLogprob
from countermark_appliance.engine.sampling import ResolvedSampling
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.engine.step import Executor, Part, Row, Ticket
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import fingerprint, sampler
from countermark_kernels.cache import KvCache

STEP_TOKENS = 8192
LOGPROB_ERROR = 0.02  # the sampler's integer weights lose up to 2^-24 an id
SILENCE_S = 600.0
"""So long without an event means that the engine hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, how many tokens to answer it with, and how to draw them. `number` names it. `grammar`: kind and text
    of one that no answer of that length is the end of."""

    number: int
    prompt: tuple[int, ...]
    tokens: int
    sampling: ResolvedSampling
    logprobs: int = 0
    grammar: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A question to be answered once: the first `tokens` tokens (0: all), cancelled after `cancel` (0: never)."""

    question: Question
    tokens: int = 0
    cancel: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first difference of a run from its question's reference.

    `position`: index into the answer. `logit`: which one, with both values; None where all logits are equal and the
    token or the fingerprint is not, or where an answer did not come.
    """

    question: int
    position: int
    logit: int | None
    expected: str
    got: str
    rows_in_step: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(slots=True, kw_only=True)
class Reference:
    """One run alone. `rows`: raw logits; `digests`: of each row; `positions`: of each row, token and fingerprint."""

    rows: list[Tensor]
    digests: list[bytes]
    positions: list[bytes]
    logprobs: tuple[TokenLogprob, ...]
    tokens: tuple[int, ...]
    fingerprints: tuple[bytes, ...]

    def digest(self, tokens: int) -> bytes:
        return hashlib.sha256(b"".join(self.positions[:tokens])).digest()


@dataclass(slots=True, kw_only=True)
class Run:
    """One job as it was served."""

    job: Job
    reference: Reference | None
    digests: dict[int, bytes] = field(default_factory=dict)  # of the rows seen, by position
    kept: dict[int, Tensor] = field(default_factory=dict)  # the rows, of a reference in the making
    logprobs: list[TokenLogprob] = field(default_factory=list)
    difference: Difference | None = None
    done: DoneEvent | None = None
    positions: list[bytes] = field(default_factory=list)  # digest of each position that was delivered

    @property
    def tokens(self) -> int:
        return self.job.tokens or self.job.question.tokens

    def compare(self) -> None:
        """Find the first position that is not the reference's, where no logits were found to differ before."""
        expected = self.reference.positions if self.reference is not None else self.positions
        at = next((i for i, (a, b) in enumerate(zip(self.positions, expected, strict=False)) if a != b), None)
        if at is not None and self.difference is None:
            self.differs(at, "the token, fingerprint and logits of the reference", "others")

    def differs(self, position: int, expected: str, got: str, rows: int = 0) -> None:
        """Note a difference that is not of one logit."""
        self.difference = Difference(
            question=self.job.question.number,
            position=position,
            logit=None,
            expected=expected,
            got=got,
            rows_in_step=rows,
        )


@dataclass(slots=True, kw_only=True)
class Seen:
    """What ran while a wave was served."""

    rows: set[int] = field(default_factory=set)  # sizes of batches: rows drawn in a step
    chunk: int = 0  # the most tokens of one sequence in a step
    mixed: int = 0  # steps with a piece of a prompt beside a sequence that decodes
    resident: int = 0  # the most sequences that had blocks
    recomputed: int = 0  # sequences that computed again what they had drawn from before
    tables: set[tuple[int, ...]] = field(default_factory=set)  # of parts that drew
    steps: int = 0


class Rig:
    """Serves waves of jobs with one model. Not thread-safe."""

    def __init__(self, artefact: Artefact, device: str, blocks: int) -> None:
        """`blocks`: of the pool of keys and values. Raises MemoryError."""
        self.model = Model(artefact, device)
        self.model.size_pool(blocks)
        self._tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
        tokens = [self._tokenizer.token_bytes(token) for token in range(artefact.config.vocab)]
        self._grammars = Grammars(tokens, ())
        self._compiled: dict[tuple[str, str], Grammar] = {}
        self._executors: dict[bool, Executor] = {}
        self._observed = True
        self._runs: dict[int, Run] = {}
        self._references: dict[int, Reference] = {}
        self._pool = ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0))))

    def close(self) -> None:
        for executor in self._executors.values():
            executor.close()
        self._pool.shutdown()
        self._grammars.close()

    def executor(self, graphs: bool) -> Executor:
        """The executor with or without CUDA graphs; made once."""
        if graphs not in self._executors:
            self._executors[graphs] = make_executor(self.model, graphs=graphs, observe=self._observe)
        return self._executors[graphs]

    def reference(self, question: Question) -> Reference:
        """The question answered alone, on first use. Raises ValueError where the engine contradicts its own logits."""
        if question.number not in self._references:
            self.forget_prefixes()
            ((run,), _) = self.serve([Job(question=question)], together=1, step_tokens=STEP_TOKENS)
            self._references[question.number] = _as_reference(run, self._grammar(question))
        return self._references[question.number]

    def audit(self, questions: Seq[Question], step_tokens: int) -> list[Run]:
        """The references' tokens and fingerprints again, by the passes that check recorded answers.

        Teacher-forced and not by an executor: nothing is decoded, carried from step to step or found computed, so that
        what goes wrong alone exactly as it does in company is found.
        """
        runs = [Run(job=Job(question=question), reference=self.reference(question)) for question in questions]
        recordings = [_recording(i, run, self._grammar(run.job.question)) for i, run in enumerate(runs)]
        for found in audit_all(self.model, recordings, step_tokens):
            run, outcome = runs[found.index], found.outcome
            assert run.reference is not None
            if outcome is None:
                run.positions = run.reference.positions
            elif isinstance(outcome, CountermarkError):
                run.differs(0, "an audit without an error", str(outcome))
            else:
                local, recorded = (
                    f"token {outcome[f'{side}_token']}, fingerprint {outcome[f'{side}_fingerprint']}"
                    for side in ("local", "recorded")
                )
                run.differs(int(str(outcome["position"])), recorded, local)
        return runs

    def forget_prefixes(self) -> None:
        """Every block of the pool becomes free, and they are handed out in ascending order."""
        self.arrange_blocks(lambda numbers: numbers.sort())

    def arrange_blocks(self, arrange: Callable[[list[int]], None]) -> None:
        """Every block of the pool becomes free, and they are handed out in the order that `arrange` puts them into."""
        blocks = self.model.blocks
        numbers = blocks.take(blocks.available)
        arrange(numbers)
        blocks.give(numbers)  # the last given back, the first of these, is the first taken

    def serve(
        self,
        jobs: Seq[Job],
        *,
        together: int,
        step_tokens: int,
        mixed_tokens: int = 0,
        graphs: bool = True,
        observed: bool = True,
    ) -> tuple[list[Run], Seen]:
        """Serve all, at most `together` at a time; prompts share `step_tokens` a step, `mixed_tokens` beside decoding.

        Not `observed`: no logits are copied out, which would wait for the device at every step; the fingerprints then
        stand for them. Raises TimeoutError where the engine says nothing any more.
        """
        executor, seen = self.executor(graphs), Seen()
        scheduler = Scheduler(
            self.model.blocks,
            functools.partial(KvCache, self.model.pool),
            max_sequences=together,
            step_tokens=step_tokens,
            mixed_step_tokens=mixed_tokens or step_tokens,
            forget=executor.forget,
        )
        over: queue.SimpleQueue[None] = queue.SimpleQueue()
        runs = [Run(job=job, reference=self._references.get(job.question.number)) for job in jobs]
        sequences = []
        for run in runs:
            sink = _Sink(run, over)
            prepared = _prepared(run, self._grammar(run.job.question))
            sink.sequence = Sequence(prepared, sink, self._tokenizer, deadline=None)
            self._runs[id(sink.sequence)] = run
            scheduler.add(sink.sequence)
            sequences.append(sink.sequence)
        self._observed = observed
        loop = Loop(_Watched(executor, scheduler, seen), scheduler)
        try:
            for _ in runs:
                over.get(timeout=SILENCE_S)
        except queue.Empty:
            raise TimeoutError(f"engine: expected an event within {SILENCE_S:.0f} s, got none") from None
        finally:
            loop.close()
            for sequence in sequences:  # those that ended last, or all if the loop's thread failed
                self.model.blocks.give(sequence.displace())
            self._runs.clear()
        for run in runs:
            if not observed and run.reference is not None:
                run.digests = dict(enumerate(run.reference.digests))
            _deliver(run)
        return runs, seen

    def _grammar(self, question: Question) -> Grammar | None:
        """Compiled once."""
        if question.grammar is None:
            return None
        if question.grammar not in self._compiled:
            self._compiled[question.grammar] = self._grammars.compile(*question.grammar)
        return self._compiled[question.grammar]

    def _observe(self, rows: Seq[Row], logits: Tensor) -> None:
        """Called by the executor with the raw logits of every drawn row."""
        if not self._observed:
            return
        host = logits.detach().to("cpu").contiguous()
        digests = self._pool.map(_digest, host) if len(rows) > 1 else map(_digest, host)
        for row, values, digest in zip(rows, host, digests, strict=True):
            run = self._runs[id(row.key)]
            position = row.length - row.prompt
            if position >= run.tokens:  # drawn ahead of the answer's end, and dropped
                continue
            reference = run.reference
            if reference is None:
                run.kept[position] = values.clone()
            elif digest != reference.digests[position] and run.difference is None:
                run.difference = _difference(run, position, reference.rows[position], values, len(rows))
            if run.digests.setdefault(position, digest) != digest and run.difference is None:
                before, now = run.digests[position].hex()[:16], digest.hex()[:16]
                run.differs(position, f"logits {before}, as before", f"{now} when computed again", len(rows))


class _Sink:
    """Takes one run's events, on the engine's thread."""

    sequence: Sequence

    def __init__(self, run: Run, over: queue.SimpleQueue[None]) -> None:
        self._run = run
        self._over = over
        self._count = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, DoneEvent):
            self._run.done = event
            self._over.put(None)
            return
        self._run.logprobs += event.logprobs
        self._count += len(event.ids)
        if self._run.job.cancel and self._count >= self._run.job.cancel:
            self.sequence.cancel()


class _Watched:
    """An executor that notes what it is given."""

    def __init__(self, inner: Executor, scheduler: Scheduler, seen: Seen) -> None:
        self.pipelined = inner.pipelined
        self._inner = inner
        self._scheduler = scheduler
        self._seen = seen

    def start(self, parts: Seq[Part]) -> Ticket:
        seen = self._seen
        drawn = [part for part in parts if part.row is not None]
        seen.steps += 1
        seen.rows.add(len(drawn))
        seen.chunk = max(seen.chunk, *(part.count for part in parts))
        seen.mixed += len({part.count > 1 for part in parts}) > 1
        seen.resident = max(seen.resident, self._scheduler.running)
        for part in drawn:
            assert part.row is not None
            seen.tables.add(tuple(part.cache.blocks))
            seen.recomputed += part.row.length > part.row.prompt and part.count > 1
        return self._inner.start(parts)

    def forget(self, key: object) -> None:
        self._inner.forget(key)

    def close(self) -> None:
        """The rig closes its executors."""


def _prepared(run: Run, grammar: Grammar | None) -> Prepared:
    question = run.job.question
    return Prepared(
        request=Request(),
        model="",
        prompt_tokens=question.prompt,
        max_tokens=run.tokens,
        stop=(),
        stop_tokens=(),
        sampling=question.sampling,
        ignore_eos=True,
        logprobs=question.logprobs,
        grammar=grammar,
    )


def _check_logprob(given: TokenLogprob, row: Tensor, token: int, whose: str, at: int) -> None:
    """Against torch's softmax, and its stable sort. Raises ValueError."""
    expected = row.double().log_softmax(0)
    if abs(given.logprob - float(expected[token])) > LOGPROB_ERROR:
        raise ValueError(f"reference: {whose}: log probability {at} is not that of the token under these logits")
    order = row.sort(descending=True, stable=True).indices[: len(given.top)].tolist()
    if [i for i, _ in given.top] != order or not given.top:
        raise ValueError(f"reference: {whose}: the likeliest of token {at} are not those of these logits")


def _recording(index: int, run: Run, grammar: Grammar | None) -> Recording:
    question, reference = run.job.question, run.reference
    assert reference is not None
    return Recording(
        index=index,
        tokens=[*question.prompt, *reference.tokens],
        prompt=len(question.prompt),
        fingerprints=reference.fingerprints,
        params=question.sampling.kernel_params(),
        masks=None if grammar is None else Masks(grammar, reference.tokens),
    )


def _digest(row: Tensor) -> bytes:
    return hashlib.sha256(row.numpy().data).digest()


def _difference(run: Run, position: int, expected: Tensor, got: Tensor, rows: int) -> Difference:
    at = int((expected.view(torch.int32) != got.view(torch.int32)).nonzero()[0])
    return Difference(
        question=run.job.question.number,
        position=position,
        logit=at,
        expected=float(expected[at]).hex(),
        got=float(got[at]).hex(),
        rows_in_step=rows,
    )


def _deliver(run: Run) -> None:
    """Digest what was delivered and compare it; the logits were compared when they were seen."""
    done = run.done
    assert done is not None
    count = len(done.output_tokens)
    whole = Finish.CANCELLED if run.job.cancel else Finish.LENGTH
    missing = [i for i in range(count) if i not in run.digests]
    if run.difference is not None:
        return
    if done.reason is not whole or (whole is Finish.LENGTH and count != run.tokens):
        run.differs(count, f"{whole.value} of {run.tokens}", f"{done.reason.value} {done.detail}".rstrip())
        return
    if missing:
        run.differs(missing[0], "logits shown to the hook", "none")
        return
    if run.job.question.logprobs and len(run.logprobs) != count:
        run.differs(len(run.logprobs), "log probabilities of every token", "none")
        return
    drawn = zip(done.output_tokens, done.fingerprints, strict=True)
    run.positions = [
        hashlib.sha256(token.to_bytes(4, "little") + mark + run.digests[i]).digest()
        for i, (token, mark) in enumerate(drawn)
    ]
    run.compare()
    if run.reference is not None and run.job.question.logprobs:
        expected = run.reference.logprobs[: len(run.logprobs)]
        at = next((i for i, pair in enumerate(zip(run.logprobs, expected, strict=True)) if pair[0] != pair[1]), None)
        if at is not None and run.difference is None:
            run.differs(at, f"log probabilities {expected[at]}", str(run.logprobs[at]))


def _as_reference(run: Run, grammar: Grammar | None) -> Reference:
    if run.difference is not None or run.done is None:
        raise ValueError(f"reference: expected a run alone to end, got {run.difference}")
    question, done = run.job.question, run.done
    rows = [run.kept[i] for i in range(len(done.output_tokens))]
    params = question.sampling.kernel_params()
    walk = None if grammar is None else grammar.walk()
    for i, (row, token, mark) in enumerate(zip(rows, done.output_tokens, done.fingerprints, strict=True)):
        history = sampler.History(prompt=question.prompt, output=done.output_tokens[:i])
        adjusted = sampler.adjust(row, params, history)
        if walk is not None:  # here as no id at all; the engine has it as a bias
            adjusted = torch.where(torch.from_numpy(unpacked(walk.mask, len(row))), adjusted, BARRED)
            walk.step(token)
        if sampler.reference(adjusted, params, len(question.prompt) + i) != token:
            raise ValueError(f"reference: question {question.number}: token {i} is not the one these logits give")
        if fingerprint.encode(fingerprint.reference(row.unsqueeze(0), row.shape[0])) != [mark]:
            raise ValueError(f"reference: question {question.number}: fingerprint {i} is not that of these logits")
        if question.logprobs:
            _check_logprob(run.logprobs[i], row, token, f"question {question.number}", i)
    return Reference(
        rows=rows,
        digests=[run.digests[i] for i in range(len(rows))],
        positions=run.positions,
        logprobs=tuple(run.logprobs),
        tokens=done.output_tokens,
        fingerprints=done.fingerprints,
    )
