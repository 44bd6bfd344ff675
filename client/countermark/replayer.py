"""Run a verified answer again and say whether it came out the same.

The client has no engine: whoever can execute a numerics profile registers a loader under the entry-point group
`countermark.runners` (name: the profile id; value: `load_runner(weights_dir: Path, device: str) -> Runner`). `Runner`
uses plain types only, so an engine satisfies it without importing this module.

Only a checked receipt is replayed. Compared, in this order, up to the first difference:

1 what the record says of the weights' own files (tokenizer, chat template, names, stop tokens) with the weights
2 prompt: the recorded input, assembled again, gives the recorded token ids
3 output: token ids, and a fingerprint of all logits at each position
4 end: the answer ends at its last token, for the recorded reason, and not before
5 text: it is what the tokens spell

`replay_many` compares many answers at once: an audit computes them together, and each result is what the answer alone
would have given. Not checked here: that the runner is what it says; a replay shows the result to whoever runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from importlib.metadata import entry_points
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

from countermark.asked import parse_request
from countermark.errors import (
    CountermarkError,
    FormatError,
    ReplayDiverged,
    RequestError,
    Undecidable,
    WeightsError,
)
from countermark.formats.records import Replay, Stack
from countermark.numerics import refuse_retired, require_executable
from countermark.receipt import CheckedReceipt
from countermark.verify import Verification

Plain = tuple[tuple[int, ...], tuple[int, ...], tuple[bytes, ...], Mapping[str, object]]
Recorded = Plain | tuple[tuple[int, ...], tuple[int, ...], tuple[bytes, ...], Mapping[str, object], tuple[str, str]]
"""One answer to audit: prompt tokens, output tokens, a fingerprint for each of those, sampling; and, if its request had
a grammar, kind and text of that."""


class Runner(Protocol):
    """Something that executes one profile with one set of weights.

    `sampling` has exactly the fields of `formats.records.Sampling`: temperature, repetition_penalty, presence_penalty,
    frequency_penalty: float; top_k, top_p_20bit, min_p_20bit, seed: int; logit_bias: tuple of (token id, float) by
    ascending id; seed_origin: str. `stop` holds the stop strings.
    """

    @property
    def profile(self) -> str:
        """The numerics profile id, such as `exact-v1`."""

    @property
    def weights_root(self) -> bytes:
        """The 32-byte dm-verity root of the weights loaded."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What this machine is: `kernel_digest` (hex), `engine`, `torch`, `triton`, `cuda`, `driver` (empty without a
        GPU), `cpu`, `backend`, `gpus`; `image_id` (hex) only where the code runs inside a measured image."""

    @property
    def grammar_library(self) -> tuple[str, str, int]:
        """What reads grammars here: name and version of the library, version of how it is asked."""

    @property
    def artefact(self) -> Mapping[str, object]:
        """What the weights' own files say: `model`, `quantisation`: str; `manifest_digest`, `tokenizer_digest`,
        `chat_template_digest`: bytes; `stop_tokens`: tuple of the end-of-sequence ids."""

    def assemble(
        self, prompt: str | None, messages: tuple[tuple[str, str], ...] | None, values: Mapping[str, str]
    ) -> tuple[int, ...]:
        """The token ids of an input: a raw prompt, or (role, content) pairs under the chat template, with its values.

        Raises `RequestError` on an input that cannot be served.
        """

    def spell(
        self, output_tokens: tuple[int, ...], max_tokens: int, stop: tuple[str, ...], ignore_eos: bool
    ) -> tuple[str, str | None, int]:
        """What an output reads and how it ends: the text, the finish reason (None: it is not over), and after how many
        of the tokens."""

    def audit_many(
        self, answers: Iterable[Recorded]
    ) -> Iterator[tuple[int, Mapping[str, Any] | CountermarkError | None]]:
        """Teacher-forced passes over many answers: each one's index with its result, in the order they are done.

        None when every sampled token and every fingerprint is as recorded. Else the first difference: `position` (index
        into the output), `recorded_token`, `local_token`: int, `fingerprint_equal`: bool, `logit_gap`: float (local
        logit of the local token minus that of the recorded one). An error is the result of the answer that caused it
        and of no other.
        """

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
        grammar: tuple[str, str] | None = None,
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Generate again from the prompt: token ids and one 16-byte fingerprint for each. `grammar`: kind and text."""


_ARTEFACT: Final = ("model", "quantisation", "manifest_digest", "tokenizer_digest", "chat_template_digest")
_RECORDED: Final = (
    *("kernel_digest", "engine", "torch", "triton", "cuda", "driver", "cpu", "backend", "gpus", "image_id"),
)


class Mode(StrEnum):
    """`AUDIT`: one teacher-forced pass over what was recorded. `REGENERATE`: generate it again."""

    AUDIT = "audit"
    REGENERATE = "regenerate"


class Equivalence(StrEnum):
    """What a replay is evidence for."""

    SAME_STACK = "same measured stack"
    SAME_PROFILE = "same profile on other hardware"


class Part(StrEnum):
    """Of an answer, what came out differently; the value is the last part of the error's code."""

    PROMPT = "prompt_tokens"
    OUTPUT = "diverged"
    END = "finish_reason"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first difference. `position`: index of the token (of the prompt or the output), or of the character in TEXT.

    A token is None where one side had ended, and in END and TEXT; the gap is None where it is not known.
    """

    part: Part
    position: int
    recorded_token: int | None
    local_token: int | None
    fingerprint_equal: bool
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What came out. `equivalence` says between which two the comparison was; it holds if `divergence` is None."""

    mode: Mode
    profile: str
    positions: int
    equivalence: Equivalence
    divergence: Divergence | None
    recorded: Mapping[str, str]
    local: Mapping[str, str]

    @property
    def identical(self) -> bool:
        """Prompt, tokens, fingerprints, end and text are as recorded."""
        return self.divergence is None

    @property
    def differing(self) -> Mapping[str, tuple[str, str | None]]:
        """Of the environment, what was recorded and what is so here, where the two differ; None: not known here."""
        return {
            name: (value, self.local.get(name))
            for name, value in self.recorded.items()
            if self.local.get(name) != value
        }

    @property
    def difference(self) -> ReplayDiverged | None:
        """What `require_identical` would raise."""
        if (at := self.divergence) is None:
            return None
        expected = f"expected {at.recorded_token}, as recorded, got {at.local_token}"
        messages = {
            Part.PROMPT: f"prompt token {at.position}: {expected}",
            Part.OUTPUT: f"token {at.position}: {expected}",
            Part.END: f"token {at.position}: expected the recorded end, got another one",
            Part.TEXT: f"text: expected what the tokens spell, got another character at {at.position}",
        }
        if at.part is Part.OUTPUT and at.logit_gap is not None:
            messages[Part.OUTPUT] += f", whose logit is {at.logit_gap:g} above"
        if at.part is Part.OUTPUT and at.recorded_token == at.local_token:
            messages[Part.OUTPUT] = f"token {at.position}: same token, other logits (fingerprints differ)"
        return ReplayDiverged(messages[at.part], code=f"replay.{at.part.value}")

    def require_identical(self) -> None:
        """Raises `ReplayDiverged`, saying where: `replay.prompt_tokens`, `replay.diverged` (output tokens or
        fingerprints), `replay.finish_reason`, `replay.text`."""
        if (difference := self.difference) is not None:
            raise difference

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys."""
        return {
            "replay": "identical" if self.identical else "diverged",
            "mode": self.mode.value,
            "profile": self.profile,
            "positions": self.positions,
            "equivalence": self.equivalence.value,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "differing": {name: list(pair) for name, pair in self.differing.items()},
            "recorded": dict(self.recorded),
            "local": dict(self.local),
        }


def load_runner(profile: str, weights_dir: Path, device: str = "cpu") -> Runner:
    """Find what can execute a profile on this machine and load the weights into it. `device`: `cpu` or `cuda`.

    Raises `Undecidable`: `profile.retired`, `profile.unknown` (to this version) or `replay.no_runner` (no engine is
    installed); and what the engine raises on bad weights.
    """
    require_executable(profile)
    found = tuple(entry_points(group="countermark.runners", name=profile))
    try:
        if not found:
            raise ImportError(f"nothing is registered for {profile}")
        load = found[0].load()
    except ImportError as err:  # registered by this very distribution, but its extra is not installed
        message = f"profile {profile}: no engine is installed ({err}); pip install 'countermark[appliance]'"
        raise Undecidable(message, code="replay.no_runner") from err
    runner: Runner = load(weights_dir, device)
    return runner


def replay(verified: Verification | CheckedReceipt, runner: Runner, mode: Mode | str = Mode.AUDIT) -> ReplayResult:
    """Run a verified answer again and compare, up to the first difference; in the order the module's docstring gives.

    Raises `WeightsError` (`replay.weights_root`: the runner has other weights; `replay.artefact`: the record says of
    these weights what is not so), `Undecidable`: `profile.retired`, `replay.redacted` (prompt or output were left out),
    `replay.profile` (the runner executes another profile), `replay.hardware` (the profile promises nothing across
    machines), `replay.grammar` (the runner reads grammars otherwise); `FormatError` on a record that cannot be run.
    """
    ((_, outcome),) = replay_many([verified], runner, mode)
    if isinstance(outcome, CountermarkError):
        raise outcome
    return outcome


def replay_many(
    answers: Iterable[Verification | CheckedReceipt], runner: Runner, mode: Mode | str = Mode.AUDIT
) -> Iterator[tuple[int, ReplayResult | CountermarkError]]:
    """`replay` for many: the index of each with its result, or with what `replay` would have raised; as they are done.

    One that cannot be run or that diverges changes nothing for the others.
    """
    mode = Mode(mode)
    waiting: list[tuple[int, CheckedReceipt, Mapping[str, str]]] = []
    settled: set[int] = set()
    for number, verified in enumerate(answers):
        try:
            receipt = verified.whole if isinstance(verified, Verification) else verified
            local = _runnable_on(receipt, runner)
            divergence = _prompt(receipt, runner)
            if divergence is None and mode is Mode.AUDIT:
                waiting.append((number, receipt, local))
                continue
            divergence = divergence or _regenerate(receipt, runner) or _spelled(receipt, runner)
        except CountermarkError as err:
            yield number, err
        else:
            yield number, _result(receipt, mode, local, divergence)
    if not waiting:
        return
    for index, found in runner.audit_many(_recorded_answer(receipt) for _, receipt, _ in waiting):
        number, receipt, local = waiting[index]
        settled.add(index)
        try:
            if isinstance(found, CountermarkError):
                raise found
            divergence = _spelled(receipt, runner) if found is None else _differs(found)
        except CountermarkError as err:
            yield number, err
        else:
            yield number, _result(receipt, mode, local, divergence)
    for index, (number, _, _) in enumerate(waiting):
        if index not in settled:
            message = "audit: expected a result for every answer, got none for this one"
            yield number, Undecidable(message, code="replay.no_result")


def _runnable_on(receipt: CheckedReceipt, runner: Runner) -> Mapping[str, str]:
    """The runner's environment, once it is certain that it may run this answer."""
    stack = receipt.intent.stack
    refuse_retired(stack.profile)
    if runner.profile != stack.profile:
        message = f"profile: expected {stack.profile}, got a runner of {runner.profile}"
        raise Undecidable(message, code="replay.profile")
    if runner.weights_root != stack.weights_root:
        message = f"weights root: expected {stack.weights_root.hex()}, got {runner.weights_root.hex()}"
        raise Undecidable(message, code="replay.weights_root")
    local = dict(runner.environment)
    if "hardware" not in stack.claims and not _same_stack(stack, local):
        message = f"profile {stack.profile}: promises the same bits on the same stack only, and this is another"
        raise Undecidable(message, code="replay.hardware")
    _check_artefact(receipt, runner)
    _check_grammar(receipt, runner)
    return local


def _check_grammar(receipt: CheckedReceipt, runner: Runner) -> None:
    """The masks an answer was made under are only known to be those of the same library, asked in the same way."""
    grammar = receipt.intent.grammar
    if grammar is None:
        return
    recorded = (grammar.library, grammar.version, grammar.rules)
    local = runner.grammar_library
    if recorded != local:
        names = [f"{library} {version} (rules {rules})" for library, version, rules in (recorded, local)]
        raise Undecidable(f"grammar: expected {names[0]}, as recorded, got {names[1]}", code="replay.grammar")


def _same_stack(stack: Stack, local: Mapping[str, str]) -> bool:
    recorded = _recorded(stack)
    return all(local.get(name) == recorded[name] for name in _RECORDED)


def _result(
    receipt: CheckedReceipt, mode: Mode, local: Mapping[str, str], divergence: Divergence | None
) -> ReplayResult:
    stack = receipt.intent.stack
    return ReplayResult(
        mode=mode,
        profile=stack.profile,
        positions=len(receipt.answer.tokens),
        equivalence=Equivalence.SAME_STACK if _same_stack(stack, local) else Equivalence.SAME_PROFILE,
        divergence=divergence,
        recorded=_recorded(stack),
        local=local,
    )


def result_on_node(receipt: CheckedReceipt, record: Replay) -> ReplayResult:
    """What a REPLAY says of an answer. The caller has checked that it is about this one, and who says so."""
    stack, found = receipt.intent.stack, record.divergence
    local = _recorded(record.stack)
    divergence = None
    if found is not None:
        values = {item.name: getattr(found, item.name) for item in fields(found)}
        divergence = Divergence(**{**values, "part": Part(found.part)})
    return ReplayResult(
        mode=Mode(record.mode),
        profile=stack.profile,
        positions=record.positions,
        equivalence=Equivalence.SAME_STACK if _same_stack(stack, local) else Equivalence.SAME_PROFILE,
        divergence=divergence,
        recorded=_recorded(stack),
        local=local,
    )


def _check_artefact(receipt: CheckedReceipt, runner: Runner) -> None:
    intent, facts = receipt.intent, runner.artefact
    recorded = {name: getattr(intent.stack, name) for name in _ARTEFACT}
    recorded["stop_tokens"] = intent.stop_tokens
    for name, value in recorded.items():
        local = () if name == "stop_tokens" and intent.ignore_eos else facts[name]
        if value != local:
            raise WeightsError(
                f"{name}: expected {local!r:.100} of these weights, got {value!r:.100} in the record",
                code="replay.artefact",
            )


def _prompt(receipt: CheckedReceipt, runner: Runner) -> Divergence | None:
    asked = parse_request(receipt.accepted.request)
    try:
        local = runner.assemble(asked.text, asked.messages, asked.values)
    except RequestError as err:
        raise FormatError(f"prompt: expected one that can be served: {err}", code="replay.prompt") from err
    for position, (theirs, ours) in enumerate(zip_longest(receipt.accepted.acceptance.prompt_tokens, local)):
        if theirs != ours:
            return _elsewhere(Part.PROMPT, position, theirs, ours)
    return None


def _spelled(receipt: CheckedReceipt, runner: Runner) -> Divergence | None:
    intent, answer = receipt.intent, receipt.answer
    text, reason, count = runner.spell(answer.tokens, intent.max_tokens, intent.stop, intent.ignore_eos)
    if (reason, count) != (receipt.outcome.finish_reason, len(answer.tokens)):
        return _elsewhere(Part.END, count - 1)
    if text != answer.text:
        pairs = enumerate(zip_longest(text, answer.text))
        return _elsewhere(Part.TEXT, next(i for i, (ours, theirs) in pairs if ours != theirs))
    return None


def _elsewhere(part: Part, position: int, recorded: int | None = None, local: int | None = None) -> Divergence:
    """A difference outside the model's own output."""
    return Divergence(
        part=part,
        position=position,
        recorded_token=recorded,
        local_token=local,
        fingerprint_equal=True,
        logit_gap=None,
    )


def _recorded(stack: Stack) -> dict[str, str]:
    return {
        "kernel_digest": stack.kernel_digest.hex(),
        "engine": stack.engine,
        "torch": stack.torch,
        "triton": stack.triton or "",
        "cuda": stack.cuda or "",
        "driver": stack.driver or "",
        "cpu": stack.cpu,
        "backend": stack.backend,
        "gpus": ", ".join(stack.gpus),
        "image_id": stack.image_id.hex(),
    }


def _sampling(receipt: CheckedReceipt) -> Mapping[str, object]:
    sampling = receipt.intent.sampling
    return {item.name: getattr(sampling, item.name) for item in fields(sampling)}


def _recorded_answer(receipt: CheckedReceipt) -> Recorded:
    answer, prompt = receipt.answer, receipt.accepted.acceptance.prompt_tokens
    plain = (prompt, answer.tokens, answer.fingerprints, _sampling(receipt))
    grammar = parse_request(receipt.accepted.request).grammar
    return plain if grammar is None else (*plain, grammar)


def _differs(found: Mapping[str, Any]) -> Divergence:
    return Divergence(
        part=Part.OUTPUT,
        position=int(found["position"]),
        recorded_token=int(found["recorded_token"]),
        local_token=int(found["local_token"]),
        fingerprint_equal=bool(found["fingerprint_equal"]),
        logit_gap=float(found["logit_gap"]),
    )


def _regenerate(receipt: CheckedReceipt, runner: Runner) -> Divergence | None:
    intent, answer = receipt.intent, receipt.answer
    prompt = receipt.accepted.acceptance.prompt_tokens
    asked = (prompt, intent.max_tokens, intent.stop, intent.ignore_eos, _sampling(receipt))
    grammar = parse_request(receipt.accepted.request).grammar
    tokens, fingerprints = runner.regenerate(*asked) if grammar is None else runner.regenerate(*asked, grammar)
    recorded = zip_longest(answer.tokens, answer.fingerprints)
    local = zip_longest(tokens, fingerprints)
    for position, (theirs, ours) in enumerate(zip_longest(recorded, local, fillvalue=(None, None))):
        if theirs != ours:
            return Divergence(
                part=Part.OUTPUT,
                position=position,
                recorded_token=theirs[0],
                local_token=ours[0],
                fingerprint_equal=theirs[1] == ours[1],
                logit_gap=None,
            )
    return None
