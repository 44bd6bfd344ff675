"""A determinism gate: ask a live node the same thing again and again among random neighbours, and compare everything.

For each setting (greedy, and one that samples) the same seeded request is sent N times, over several attested
connections, so that some find their prompt computed already and some do not. The first run of each setting has no
neighbour of ours; the others run while M streams of random requests, some of which are given up half-way, keep the node
busy. The session verifies every receipt, the neighbours' too. Compared with the setting's first run: prompt tokens,
output tokens, the fingerprint of all logits at each position, end and text.

A busy node is asked again when it says, a lost connection is made and appraised again, all within one deadline. A run
that found none of the neighbours at work proves little, so the gate then says that it is incomplete.

Not checked here: that the answers follow from the weights, which is what `replay` is for; equal answers may be equally
wrong.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, TypeVar

from countermark.errors import CountermarkError, Unavailable, Undecidable
from countermark.gate_report import Difference, Neighbours, Node, Part, Report, Run, Setting
from countermark.policy import Policy
from countermark.session import Answer, Session, connect

SETTINGS: Final = (
    Setting(name="greedy", temperature=0.0),
    Setting(name="sampled", temperature=0.9, top_k=50, top_p=0.95),
)
PROMPT: Final = """A lighthouse keeper counts ships. On Monday she sees three from the north and five from the south, on
Tuesday twice as many from the north and none from the south, and on Wednesday fog hides everything until noon; after
noon she counts seven, of which two turn back. On Thursday the lamp fails, so she writes down what the harbour tells
her: eleven ships, all of them late. How many ships did she count herself, and which day would you trust least? Give
the numbers first, then two sentences of explanation."""
"""Longer than a block of cached tokens, so that some runs find it computed already."""
CONNECTION_STREAMS: Final = 6
"""Of ours at a time on one connection; a node allows eight calls, and gives half of its places to one connection."""
PARALLEL: Final = 4
"""Runs at a time."""
_WORDS: Final = (
    *("the", "of", "and", "to", "in", "that", "was", "with", "for", "on", "as", "at", "by", "this", "from", "they"),
    *("which", "had", "not", "but", "what", "all", "were", "when", "there", "can", "your", "said", "if", "will"),
)
_NEIGHBOUR_WORDS: Final = 48
_NEIGHBOUR_TOKENS: Final = 64
_RETRIES: Final = 3
_RETRY_S: Final = 1.0
_BUSY: Final = ("engine.busy", "service.busy", "attest.rate")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask. `runs` of each setting, at least two; `neighbours`: streams of random requests beside them."""

    address: str
    prompt: str = PROMPT
    runs: int = 8
    neighbours: int = 8
    max_tokens: int = 64
    seed: int
    timeout_s: float = 600.0
    settings: tuple[Setting, ...] = SETTINGS


def run_gate(
    plan: Plan,
    policy: Policy,
    *,
    now: int | None = None,
    endorsements: bytes | Callable[[bytes], bytes] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the plan; a report whatever happens, with what was refused or missing in it. `now`, `endorsements`: see
    `session.connect`; `say` is told what begins."""
    return _Gate(plan, policy, now, endorsements, say).run()


def compare(setting: str, runs: tuple[int, int], first: Answer, other: Answer) -> Difference | None:
    """The first difference of two answers to the same request; `runs` are their numbers."""
    prompts = (answer.receipt.accepted.acceptance.prompt_tokens for answer in (first, other))
    for position, (one, two) in enumerate(zip_longest(*prompts)):
        if one != two:
            return _difference(setting, runs, Part.PROMPT, position, (one, two))
    outputs = (zip(answer.tokens, answer.receipt.answer.fingerprints, strict=True) for answer in (first, other))
    for position, (ours, theirs) in enumerate(zip_longest(*outputs, fillvalue=(None, None))):
        if ours != theirs:
            tokens = ours[0], theirs[0]
            return _difference(setting, runs, Part.OUTPUT, position, tokens, marks_equal=ours[1] == theirs[1])
    if first.receipt.outcome.finish_reason != other.receipt.outcome.finish_reason:
        return _difference(setting, runs, Part.END, max(0, len(first.tokens) - 1))
    for position, (a, b) in enumerate(zip_longest(first.text, other.text)):
        if a != b:
            return _difference(setting, runs, Part.TEXT, position)
    return None


class _Gate:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        policy: Policy,
        now: int | None,
        endorsements: bytes | Callable[[bytes], bytes] | None,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._policy, self._now, self._endorsements, self._say = plan, policy, now, endorsements, say
        self._deadline = time.monotonic() + plan.timeout_s
        self._over = threading.Event()
        self._lock = threading.Lock()  # over everything below
        self._sessions: dict[int, tuple[int, Session]] = {}  # by place: its index among the nodes, the connection
        self._connecting: dict[int, threading.Lock] = {}
        self._nodes: list[Node] = []
        self._active = self._answers = self._left = self._tokens = 0
        self._busy = threading.Semaphore(0)  # released by each neighbour once it is first answered

    def run(self) -> Report:
        plan, started = self._plan, int(time.time())
        runs: list[Run] = []
        failure: CountermarkError | None = None
        finished = False
        workers = ThreadPoolExecutor(plan.neighbours + PARALLEL, "countermark-gate")
        try:
            self._say("each setting once, without neighbours")
            runs += [self._ask(setting, 0) for setting in plan.settings]
            streams = [workers.submit(self._neighbour, number) for number in range(plan.neighbours)]
            self._await_neighbours(streams)
            self._say(f"{plan.runs - 1} times more, among {plan.neighbours} neighbours")
            places = [(setting, 1 + at % self._run_places) for at in range(plan.runs - 1) for setting in plan.settings]
            asked = [workers.submit(self._ask, *place) for place in places]
            self._watch(asked, streams, runs)
            self._require_company(runs)
            finished = True
        except CountermarkError as err:
            failure = err
        finally:
            self._over.set()
            if not finished:  # else the neighbours' last answers are waited for, and verified
                self._hang_up()
            workers.shutdown(cancel_futures=True)
            self._hang_up()
        return Report(
            address=plan.address,
            prompt=plan.prompt,
            seed=plan.seed,
            max_tokens=plan.max_tokens,
            wanted=plan.runs,
            settings=plan.settings,
            started=started,
            ended=int(time.time()),
            nodes=tuple(self._nodes),
            runs=tuple(runs),
            neighbours=Neighbours(wanted=plan.neighbours, answers=self._answers, left=self._left, tokens=self._tokens),
            difference=_first_difference(plan.settings, runs),
            failure=failure,
        )

    @property
    def _run_places(self) -> int:
        """Connections that the runs among neighbours share; the first run has one to itself."""
        return max(1, min(PARALLEL, self._plan.runs - 1))

    def _watch(self, asked: list[Future[Run]], streams: list[Future[None]], runs: list[Run]) -> None:
        """Collect the runs in their order, as far as they come. Raises what any of them or a neighbour raised."""
        left: set[Future[Run]] = set(asked)
        try:
            while left:
                everything: list[Future[Any]] = [*left, *streams]
                done, _ = wait(everything, return_when=FIRST_COMPLETED)
                left -= done
                for one in done:
                    one.result()
        finally:
            runs += [run.result() for run in asked if run.done() and not run.cancelled() and run.exception() is None]

    def _await_neighbours(self, streams: list[Future[None]]) -> None:
        """Until each neighbour has been answered something, or the time is up."""
        for _ in streams:
            while not self._busy.acquire(timeout=0.1):
                for stream in streams:
                    if stream.done():
                        stream.result()
                self._left_s()

    def _hang_up(self) -> None:
        with self._lock:
            sessions = [session for _, session in self._sessions.values()]
        for session in sessions:
            session.close()

    def _require_company(self, runs: list[Run]) -> None:
        alone = self._plan.neighbours and not any(run.beside for run in runs)
        if alone:
            message = f"neighbours: expected some of {self._plan.neighbours} at work beside a run, got none"
            raise Undecidable(message, code="gate.neighbours")

    def _ask(self, setting: Setting, place: int) -> Run:
        plan = self._plan

        def once() -> Run:
            connection, session = self._session(place)
            with self._lock:
                beside = self._active
            stream = session.generate(
                messages=[("user", plan.prompt)],
                max_tokens=plan.max_tokens,
                temperature=setting.temperature,
                top_k=setting.top_k,
                top_p=setting.top_p,
                seed=plan.seed,
                timeout_s=self._left_s(),
            )
            return Run(setting=setting.name, connection=connection, beside=beside, answer=stream.result())

        return self._patiently(once)

    def _neighbour(self, number: int) -> None:
        """Random requests, one after the other, until the runs are over."""
        chance = random.Random(f"{self._plan.seed}/{number}")  # noqa: S311  traffic, not secrets
        place = 1 + self._run_places + number // CONNECTION_STREAMS
        first = True
        while not self._over.is_set():
            self._patiently(lambda: self._chat(chance, place))
            if first:
                self._busy.release()
                first = False

    def _chat(self, chance: random.Random, place: int) -> None:
        words = chance.choices(_WORDS, k=chance.randint(1, _NEIGHBOUR_WORDS))
        leave_after = chance.randint(0, _NEIGHBOUR_TOKENS // 2) if chance.random() < 1 / 8 else _NEIGHBOUR_TOKENS
        _, session = self._session(place)
        stream = session.generate(
            messages=[("user", " ".join(words))],
            max_tokens=chance.randint(1, _NEIGHBOUR_TOKENS),
            temperature=chance.choice((0.0, 0.7, 1.3)),
            top_k=chance.choice((0, 5, 50)),
            seed=chance.getrandbits(64),
            timeout_s=self._left_s(),
        )
        with self._lock:
            self._active += 1
        left = False
        try:
            for _ in stream:
                if len(stream.tokens) > leave_after:
                    stream.cancel()
                    left = True
                    break
        finally:
            with self._lock:
                self._active -= 1
                self._tokens += len(stream.tokens)
                self._left += left
        if not left:
            stream.result()
            with self._lock:
                self._answers += 1

    def _session(self, place: int) -> tuple[int, Session]:
        """The connection of a place: made and appraised if there is none that lives."""
        with self._lock:
            own = self._connecting.setdefault(place, threading.Lock())
        with own:
            with self._lock:
                held = self._sessions.get(place)
            if held is not None and not held[1].is_over:
                return held
            left_s = self._left_s()
            session = connect(
                self._plan.address,
                self._policy,
                now=self._now,
                timeout_s=min(30.0, left_s),
                endorsements=self._endorsements,
            )
            return self._admit(place, session)

    def _admit(self, place: int, session: Session) -> tuple[int, Session]:
        verdict = session.verdict
        node = Node(
            boot_id=verdict.boot_id,
            quote_digest=verdict.quote_digest,
            image_id=verdict.image_id,
            weights_root=verdict.weights_root,
            profile=verdict.profile,
            simulated=verdict.simulated,
        )
        with self._lock:
            self._nodes.append(node)
            self._sessions[place] = held = len(self._nodes) - 1, session
            first = self._nodes[0]
        if (node.weights_root, node.profile) != (first.weights_root, first.profile):
            message = f"weights and profile: expected {first.weights_root.hex()} under {first.profile}"
            message += f" behind every connection, got {node.weights_root.hex()} under {node.profile}"
            raise Undecidable(message, code="gate.nodes")
        return held

    def _patiently(self, call: Callable[[], T]) -> T:
        """The call's value; again after `Unavailable`: as often as the node asks for it, a few times otherwise."""
        failures = 0
        while True:
            try:
                return call()
            except Unavailable as err:
                failures += err.retry_after_s is None and err.code not in _BUSY
                wait_s = err.retry_after_s or _RETRY_S
                if failures > _RETRIES or wait_s >= self._deadline - time.monotonic() or self._over.wait(wait_s):
                    raise

    def _left_s(self) -> float:
        """Seconds to the deadline. Raises `Unavailable` (`gate.deadline`) when there are none."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise Unavailable(f"gate: not done after {self._plan.timeout_s:g} s", code="gate.deadline")
        return left_s


def _first_difference(settings: tuple[Setting, ...], runs: list[Run]) -> Difference | None:
    for setting in settings:
        series = [(number, run) for number, run in enumerate(runs) if run.setting == setting.name]
        for number, run in series[1:]:
            if run.digest == series[0][1].digest:
                continue
            found = compare(setting.name, (series[0][0], number), series[0][1].answer, run.answer)
            if found is not None:
                return found
    return None


def _difference(
    setting: str,
    runs: tuple[int, int],
    part: Part,
    position: int,
    tokens: tuple[int | None, int | None] = (None, None),
    *,
    marks_equal: bool = True,
) -> Difference:
    return Difference(
        setting=setting,
        runs=runs,
        part=part,
        position=position,
        tokens=tokens,
        fingerprint_equal=marks_equal,
    )
