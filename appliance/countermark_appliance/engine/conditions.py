"""The cases of the determinism suite: conditions under which the same questions are served (see `determinism.py`).

Each case is a method that returns its runs and what of its condition did not occur, or raises `Skipped` where this
machine cannot make it. Every choice is drawn from a generator seeded by the case's name, so that a case alone is the
same as the case within the suite. Not here: what a result is judged by.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from countermark_appliance.engine.rig import SILENCE_S, STEP_TOKENS, Job, Question, Rig, Run, Seen
from countermark_appliance.engine.sampling import ResolvedSampling, resolve_sampling
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import launch
from countermark_kernels.cache import BLOCK

SEED = "countermark determinism suite, 1"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHUNKS = (64, 97, 128, 256, 512, 1024, 2048, 4096, 8192)
PROBE = 0
GRAMMARS = (
    ("regex", "[a-z ]{400,}"),
    ("regex", r"(\d{4}-\d\d-\d\d, |[^\x00-\x1f]{3};){400,}"),
    ("json_schema", '{"type": "array", "items": {"type": "object"}, "minItems": 400}'),
)
"""None is over after an answer of the suite."""

Load = Callable[[], Artefact]
"""Makes the artefact, here and in another process: it must pickle, such as `functools.partial(weights.load, dir)`."""

Facts = dict[str, object]
Found = tuple[list[Run], str]
"""The runs, and what was not tested: empty if the condition occurred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is run. `runs`: of the one prompt, in `neighbours` and each `resident`; `questions`: different ones;
    `prompt`, `long_prompt`, `tokens`: the most tokens of a prompt, of the one that is cut up, of an answer;
    `resident`: sequences at a time."""

    runs: int = 1000
    questions: int = 48
    prompt: int = 192
    long_prompt: int = 8192
    tokens: int = 16
    resident: tuple[int, ...] = (44, 256)

    @staticmethod
    def full(device: str, runs: int = 1000) -> Scale:
        """What an operator runs. A CPU takes minutes to read 8,192 tokens, nine times."""
        return Scale(runs=runs, long_prompt=8192 if device != "cpu" else 1024)


class Skipped(Exception):
    """This machine cannot make the case's condition."""


def generator(name: str) -> random.Random:
    """The suite's random choices are always the same ones."""
    return random.Random(f"{SEED}: {name}")  # noqa: S311  chance, not secrets


class Conditions:
    """The cases over one rig, by their names."""

    def __init__(self, load: Load, *, device: str, scale: Scale, threads: int) -> None:
        """Raises MemoryError, and what `load` raises."""
        self._load, self._device, self._scale, self._threads = load, device, scale, threads
        self.artefact = load()
        config = self.artefact.config
        each = _blocks(scale.prompt + scale.tokens) + 1  # the scheduler leaves one to grow into
        together = max(*scale.resident, BATCHES[-1] + 1 if max(scale.resident) >= BATCHES[-1] else 0)
        self.rig = Rig(self.artefact, device, 2 + max(together * each, 2 * _blocks(config.context)))
        self._vocab = config.vocab
        self._long = min(scale.long_prompt, config.context - scale.tokens)
        rng = generator("questions")
        self._probe = Question(
            number=PROBE,
            prompt=self._tokens(rng, scale.prompt * 3 // 4),
            tokens=scale.tokens,
            sampling=self._sampling(rng, temperature=0.8),
        )
        self._others = [self._other(number, rng) for number in range(1, scale.questions)]

    def cases(self) -> dict[str, Callable[[random.Random, Facts], Found]]:
        """In the order in which they run."""
        return {
            "neighbours": self.neighbours,
            **{f"resident-{n}": functools.partial(self.resident, together=n) for n in self._scale.resident},
            "chunks": self.chunks,
            "prefix-cache": self.prefix_cache,
            "preemption": self.preemption,
            "cancel": self.cancel,
            "graphs": self.graphs,
            "unobserved": self.unobserved,
            "pages": self.pages,
            "buckets": self.buckets,
            "processes": self.processes,
            "sampling": self.sampling,
            "grammar": self.grammar,
            "audit": self.audit,
        }

    def neighbours(self, rng: random.Random, facts: Facts) -> Found:
        """Waves of random company; every wave with its own batch size and budget, some with an empty prefix cache."""
        jobs = self._crowd(rng, self._scale.runs, self._scale.runs)
        runs: list[Run] = []
        batches: set[int] = set()
        while jobs:
            wave, jobs = jobs[: (size := rng.randint(20, 120))], jobs[size:]
            if rng.random() < 0.2:
                self.rig.forget_prefixes()
            served, seen = self._serve(
                wave,
                together=rng.randint(2, 32),
                step_tokens=rng.choice((64, 128, 512, 2048)),
                mixed_tokens=rng.choice((16, 64, 128, 512)),
            )
            runs += served
            batches |= seen.rows
        facts |= {"copies": self._scale.runs, "batches": _sizes(batches)}
        return runs, "" if max(batches) > 1 else "expected batches of more than one"

    def resident(self, rng: random.Random, facts: Facts, together: int) -> Found:
        """`together` sequences at a time, as many of them copies of the probe as not."""
        self.rig.forget_prefixes()
        jobs = self._crowd(rng, self._scale.runs, max(self._scale.runs, together - self._scale.runs))
        runs, seen = self._serve(jobs, together=together, step_tokens=STEP_TOKENS)
        facts |= {"copies": self._scale.runs, "resident": seen.resident, "batches": _sizes(seen.rows)}
        return runs, "" if seen.resident == together else f"expected {together} sequences with blocks"

    def chunks(self, rng: random.Random, facts: Facts) -> Found:
        """The long prompt alone in its first step of each size; another sequence decodes from the first step on."""
        long, decoder = self._long_question(), self._special(1001, 1, self._scale.tokens)
        sizes = [size for size in CHUNKS if size < self._long]
        sizes += [size for size in CHUNKS if size >= self._long][:1]
        self._references([Job(question=long), Job(question=decoder)])
        runs: list[Run] = []
        unmet = ""
        for size in rng.sample(sizes, len(sizes)):
            self.rig.forget_prefixes()
            jobs = [Job(question=decoder), Job(question=long)]
            served, seen = self._serve(jobs, together=2, step_tokens=size)
            runs += served
            if seen.chunk != min(size, self._long):
                unmet = f"expected chunks of {size}, got at most {seen.chunk}"
            if not seen.mixed:
                unmet = f"expected a sequence that decodes beside chunks of {size}"
        facts |= {"prompt": self._long, "chunks": sizes}
        return runs, unmet

    def prefix_cache(self, _rng: random.Random, facts: Facts) -> Found:
        """Cold, then hot; then a prompt that goes another way behind the first block, and one that goes there on as a
        third does behind another first block; then all beside each other."""
        first = self._special(1002, 2 * BLOCK + 10, self._scale.tokens)
        second = self._special(1003, 2 * BLOCK + 5, self._scale.tokens, begins=first.prompt[: BLOCK + 9])
        third = self._special(1004, 2 * BLOCK + 7, self._scale.tokens)
        crossed = self._special(
            1005, 2 * BLOCK + 7, self._scale.tokens, begins=(*first.prompt[:BLOCK], *third.prompt[BLOCK:])
        )
        together = [first, second, crossed, first, third, second, first]
        self._references([Job(question=question) for question in together])
        self.rig.forget_prefixes()
        waves = ([first], [first], [second], [third], [crossed], together)
        runs: list[Run] = []
        cached: list[list[int]] = []
        for wave in waves:
            served, _ = self._serve([Job(question=q) for q in wave], together=len(wave), step_tokens=STEP_TOKENS)
            runs += served
            cached.append([run.done.cached_tokens for run in served if run.done is not None])
        facts |= {"cached_tokens": cached}
        expected = [[0], [2 * BLOCK], [BLOCK], [0], [BLOCK], [2 * BLOCK] * len(together)]
        return runs, "" if cached == expected else f"expected cached tokens {expected}, got {cached}"

    def preemption(self, rng: random.Random, facts: Facts) -> Found:
        """Answers of more than a block each, in a pool of ten blocks."""
        questions = [self._special(1010 + i, BLOCK - 4, BLOCK + 8) for i in range(3)]
        jobs = [Job(question=questions[i % 3]) for i in range(8)]
        rng.shuffle(jobs)
        self._references(jobs)
        self.rig.forget_prefixes()
        blocks = self.rig.model.blocks
        taken = blocks.take(blocks.available - 10)
        try:
            runs, seen = self._serve(jobs, together=len(jobs), step_tokens=STEP_TOKENS)
        finally:
            blocks.give(taken)
        facts |= {"blocks": 10, "computed_again": seen.recomputed}
        return runs, "" if seen.recomputed else "expected a sequence to lose its blocks and be computed again"

    def cancel(self, rng: random.Random, facts: Facts) -> Found:
        """Sequences that are cancelled after a few tokens, between others that are not."""
        victims = [self._special(1020 + i, 20, 40) for i in range(3)]
        jobs = [Job(question=rng.choice(victims), cancel=rng.randint(1, 9)) for _ in range(12)]
        jobs += self._crowd(rng, 8, 8)
        rng.shuffle(jobs)
        runs, seen = self._serve(jobs, together=16, step_tokens=256)
        cut = [len(run.positions) for run in runs if run.job.cancel]
        facts |= {"cancelled_after": cut, "batches": _sizes(seen.rows)}
        if not all(0 < n < 40 for n in cut):
            return runs, "expected every cancelled answer to be cut"
        return runs, "" if max(seen.rows) > 1 else "expected batches of more than one"

    def graphs(self, rng: random.Random, facts: Facts) -> Found:
        """The same crowd with CUDA graphs and without."""
        if self._device == "cpu":
            raise Skipped("CUDA graphs need a GPU")
        runs: list[Run] = []
        replayed: dict[bool, int] = {}
        for graphs in (True, False, True):
            jobs = self._crowd(rng, 40, 40)
            self.rig.forget_prefixes()
            self._references(jobs)
            executor = self.rig.executor(graphs)
            before = getattr(executor, "replayed", 0)
            served, seen = self._serve(jobs, together=40, step_tokens=1024, graphs=graphs)
            runs += served
            replayed[graphs] = getattr(executor, "replayed", 0) - before
            facts[f"executor {'with' if graphs else 'without'}"] = type(executor).__name__
        facts |= {"batches": _sizes(seen.rows), "replayed": replayed[True]}
        if replayed[True] and not replayed[False]:
            return runs, ""
        return runs, f"expected steps that are CUDA graphs, then none, got {replayed[True]} and {replayed[False]}"

    def unobserved(self, rng: random.Random, facts: Facts) -> Found:
        """At full speed: nobody waits for the device between two steps, so that a race between them could show."""
        jobs = self._crowd(rng, self._scale.runs, self._scale.runs)
        self._references(jobs)
        self.rig.forget_prefixes()
        runs, seen = self._serve(jobs, together=max(self._scale.resident), step_tokens=512, observed=False)
        pipelined = self.rig.executor(True).pipelined
        facts |= {"copies": self._scale.runs, "batches": _sizes(seen.rows), "pipelined": pipelined}
        if self._device != "cpu" and not pipelined:
            return runs, "expected one step in flight while the next is planned"
        return runs, "" if max(seen.rows) > 1 else "expected batches of more than one"

    def pages(self, rng: random.Random, facts: Facts) -> Found:
        """Blocks handed out in random order, four times another one."""
        runs: list[Run] = []
        tables: set[tuple[int, ...]] = set()
        jobs = self._crowd(rng, 4, 12)
        self._references(jobs)
        for _ in range(4):
            self.rig.arrange_blocks(rng.shuffle)
            served, seen = self._serve(jobs, together=len(jobs), step_tokens=STEP_TOKENS)
            runs += served
            tables |= seen.tables
        permuted = sum(list(table) != sorted(table) for table in tables)
        facts |= {"tables": len(tables), "out_of_order": permuted}
        return runs, "" if permuted > 4 else "expected tables out of order"

    def buckets(self, _rng: random.Random, facts: Facts) -> Found:
        """One wave that shrinks through every batch size wanted, two steps of each."""
        known, most = self._buckets(), max(self._scale.resident)
        edges = {size for size in (*BATCHES, *known) if size <= most}
        sizes = sorted({size + i for size in edges for i in (-1, 0, 1)} - {0}, reverse=True)
        if known:
            sizes = [size for size in sizes if size <= known[-1]]  # the executor takes no more
        question = self._special(1030, 3, 2 * len(sizes))
        jobs = [Job(question=question, tokens=2 * sum(j < size for size in sizes)) for j in range(sizes[0])]
        self._references(jobs)
        self.rig.forget_prefixes()
        runs, seen = self._serve(jobs, together=len(jobs), step_tokens=STEP_TOKENS)
        missed = sorted(set(sizes) - seen.rows)
        facts |= {"batches": sorted(sizes), "executor_buckets": sorted(known)}
        return runs, f"no batch of {missed}" if missed else ""

    def processes(self, _rng: random.Random, facts: Facts) -> Found:
        """All questions at once in another process, which loads everything again."""
        jobs = self._everything()
        self._references(jobs)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        threads = self._threads - 1 or 2
        process = context.Process(target=_elsewhere, args=(self._load, self._device, self._scale, threads, there))
        process.start()
        there.close()
        try:
            if not here.poll(SILENCE_S):
                raise TimeoutError("the other process says nothing")
            answers: list[list[bytes]] = here.recv()
        finally:
            process.kill()
            process.join()
        runs = []
        for job, positions in zip(jobs, answers, strict=True):
            runs.append(Run(job=job, reference=self.rig.reference(job.question), positions=positions))
            runs[-1].compare()
        facts |= {"processes": 2, "threads": [self._threads, threads]}
        complete = all(len(run.positions) == run.tokens for run in runs)
        return runs, "" if complete else "expected whole answers of the other process"

    def everything(self) -> list[list[bytes]]:
        """What `processes` compares: of each question, the digests of its positions."""
        runs, _ = self.rig.serve(self._everything(), together=self._scale.questions, step_tokens=96)
        if broken := [run.difference for run in runs if run.difference is not None]:
            raise ValueError(f"the other process: {broken[0]}")
        return [run.positions for run in runs]

    def sampling(self, rng: random.Random, facts: Facts) -> Found:
        """Each kind of drawing with log probabilities asked for and not, all beside each other."""
        kinds: dict[str, dict[str, object]] = {
            "greedy": {"temperature": 0.0},
            "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            "sampled": {"temperature": 1.0},
            "sampled, filters": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
            "sampled, penalties, bias": {
                "temperature": 1.2,
                "repetition_penalty": 1.2,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.25,
                "logit_bias": {5: 3.0, 7: -100.0},
            },
        }
        pairs = []
        for i, settings in enumerate(kinds.values()):
            prompt, seed = self._tokens(rng, 40), rng.getrandbits(64)
            drawn = resolve_sampling(vocab=self._vocab, seed=seed, **settings)  # type: ignore[arg-type]
            pairs.append(
                [
                    Question(
                        number=1040 + 2 * i + j, prompt=prompt, tokens=self._scale.tokens, sampling=drawn, logprobs=n
                    )
                    for j, n in enumerate((0, 5))
                ]
            )
        jobs = [Job(question=question) for pair in pairs for question in pair] * 3
        rng.shuffle(jobs)
        runs, seen = self._serve(jobs, together=len(jobs), step_tokens=512)
        unequal = [
            kind
            for kind, pair in zip(kinds, pairs, strict=True)
            if len({tuple(self.rig.reference(question).positions) for question in pair}) > 1
        ]
        facts |= {"kinds": list(kinds), "batches": _sizes(seen.rows)}
        if unequal:
            return runs, f"log probabilities change {unequal}"
        return runs, "" if max(seen.rows) > len(kinds) else "expected all kinds in one batch"

    def grammar(self, rng: random.Random, facts: Facts) -> Found:
        """Answers that must fit something beside others that need not, each drawn in each way: in one batch, in small
        pieces, and in a pool too small for all; then audited."""
        short = [
            self._constrained(1060 + 10 * i + j, grammar, heat, BLOCK + 5, self._scale.tokens)
            for i, grammar in enumerate(GRAMMARS)
            for j, heat in enumerate((0.0, 0.8, 1.5))
        ]
        long = [self._constrained(1090 + i, GRAMMARS[i % 3], 0.8, BLOCK - 4, BLOCK + 8) for i in range(5)]
        jobs = [Job(question=question) for question in short] * 2 + self._crowd(rng, 9, 9)
        rng.shuffle(jobs)
        crowded = [Job(question=question) for question in long] * 2
        self._references([*jobs, *crowded])
        self.rig.forget_prefixes()
        runs, seen = self._serve(jobs, together=len(jobs), step_tokens=512)
        runs += self._serve(jobs, together=6, step_tokens=96, mixed_tokens=16)[0]
        self.rig.forget_prefixes()
        blocks = self.rig.model.blocks
        taken = blocks.take(blocks.available - 10)
        try:
            narrow, few = self._serve(crowded, together=len(crowded), step_tokens=STEP_TOKENS)
        finally:
            blocks.give(taken)
        runs += [*narrow, *self.rig.audit([*short, *long], 100)]
        facts |= {"grammars": len(GRAMMARS), "batches": _sizes(seen.rows), "computed_again": few.recomputed}
        if not few.recomputed:
            return runs, "expected a sequence to lose its blocks and be computed again"
        return runs, "" if max(seen.rows) > len(short) else "expected them in one batch with others"

    def audit(self, _rng: random.Random, facts: Facts) -> Found:
        """Every question's answer, a long prompt's and one over several blocks; packed into few passes, then many."""
        questions = [self._probe, *self._others, self._long_question(), self._special(1050, BLOCK - 4, 2 * BLOCK)]
        sizes = (STEP_TOKENS, 100)
        runs = [run for size in sizes for run in self.rig.audit(questions, size)]
        facts |= {"step_tokens": list(sizes), "positions": sum(question.tokens for question in questions)}
        return runs, ""

    def _long_question(self) -> Question:
        return self._special(1000, self._long, 4)

    def _buckets(self) -> tuple[int, ...]:
        """Numbers of rows that CUDA graphs are made for."""
        if self._device == "cpu":
            return ()
        from countermark_appliance.engine.graphs import ROWS  # noqa: PLC0415  triton is only there with a GPU

        return ROWS

    def _everything(self) -> list[Job]:
        return [Job(question=question) for question in (self._probe, *self._others)]

    def _crowd(self, rng: random.Random, copies: int, others: int) -> list[Job]:
        """Copies of the probe between others, in random order."""
        jobs = [Job(question=self._probe)] * copies + [Job(question=rng.choice(self._others)) for _ in range(others)]
        rng.shuffle(jobs)
        return jobs

    def _references(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.rig.reference(job.question)

    def _serve(self, jobs: Sequence[Job], **how: Any) -> tuple[list[Run], Seen]:
        """`Rig.serve`, with the references made before."""
        self._references(jobs)
        return self.rig.serve(jobs, **how)

    def _other(self, number: int, rng: random.Random) -> Question:
        """Any length, any sampling; some begin like the probe."""
        scale = self._scale
        prompt = self._tokens(rng, rng.randint(1, scale.prompt))
        if rng.random() < 0.3:
            kept = rng.randint(1, len(self._probe.prompt))
            prompt = (*self._probe.prompt[:kept], *prompt[: scale.prompt - kept])
        return Question(
            number=number,
            prompt=prompt,
            tokens=rng.randint(2, scale.tokens),
            sampling=self._sampling(rng),
            logprobs=rng.choice((0, 0, 3)),
        )

    def _special(self, number: int, prompt: int, tokens: int, *, begins: tuple[int, ...] = ()) -> Question:
        """A question of one case only."""
        rng = generator(str(number))
        rest = self._tokens(rng, prompt - len(begins))
        return Question(number=number, prompt=(*begins, *rest), tokens=tokens, sampling=self._sampling(rng))

    def _constrained(
        self, number: int, grammar: tuple[str, str], temperature: float, prompt: int, tokens: int
    ) -> Question:
        """A question whose answer must fit."""
        rng = generator(str(number))
        return Question(
            number=number,
            prompt=self._tokens(rng, prompt),
            tokens=tokens,
            sampling=self._sampling(rng, temperature),
            logprobs=rng.choice((0, 3)),
            grammar=grammar,
        )

    def _tokens(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(self._vocab) for _ in range(count))

    def _sampling(self, rng: random.Random, temperature: float | None = None) -> ResolvedSampling:
        return resolve_sampling(
            vocab=self._vocab,
            temperature=rng.choice((0.0, 0.3, 0.8, 1.5)) if temperature is None else temperature,
            top_k=rng.choice((0, 5, 40)),
            top_p=rng.choice((1.0, 0.95, 0.5)),
            min_p=rng.choice((0.0, 0.02, 0.2)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            presence_penalty=rng.choice((0.0, 0.5)),
            frequency_penalty=rng.choice((0.0, 0.25)),
            logit_bias={rng.randrange(self._vocab): rng.choice((-5.0, 2.5)) for _ in range(rng.choice((0, 4)))},
            seed=rng.getrandbits(64),
        )


def _elsewhere(load: Load, device: str, scale: Scale, threads: int, answer: Connection) -> None:
    """What the other process runs."""
    launch.set_threads(threads)
    conditions = Conditions(load, device=device, scale=scale, threads=threads)
    answer.send(conditions.everything())
    answer.close()


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _sizes(found: set[int]) -> str:
    sizes = sorted(found - {0})
    return f"{sizes[0]}..{sizes[-1]}, {len(sizes)} sizes" if sizes else "none"
