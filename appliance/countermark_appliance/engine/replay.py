"""Run recorded answers again on this machine: `audit` by teacher-forced passes, `regenerate` token by token.

`audit_many` packs many answers into its passes (see `audit.py`). `assemble` and `spell` redo what happened before and
after the model: input to ids, ids to text and end, by the code that served them. Satisfies
`countermark.replayer.Runner` structurally; plain types only. Not checked here: that a record is genuine; the caller has
verified it. That it can be run at all is checked: a record may be genuine and absurd.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from countermark.errors import CountermarkError, FormatError, RequestError, Undecidable
from countermark_appliance.engine import weights
from countermark_appliance.engine.assembler import Assembler
from countermark_appliance.engine.audit import Difference, Masks, Outcome, Recording, audit_all, failed
from countermark_appliance.engine.draw import draw
from countermark_appliance.engine.engine import computes_on, cpu_model, engine_version, grammars_of
from countermark_appliance.engine.grammar import Grammar, GrammarError
from countermark_appliance.engine.model import Cache, Chunk, Model
from countermark_appliance.engine.request import Message
from countermark_appliance.engine.sampling import ResolvedSampling
from countermark_appliance.engine.selftest import require_device, self_test
from countermark_appliance.engine.step import Row
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import PROFILE, kernel_digest, launch
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import SamplerParams

STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a step, by device: enough to keep it busy."""

Plain = tuple[Sequence[int], Sequence[int], Sequence[bytes], Mapping[str, object]]
Recorded = Plain | tuple[Sequence[int], Sequence[int], Sequence[bytes], Mapping[str, object], tuple[str, str]]
"""Prompt tokens, output tokens, a fingerprint for each of those, sampling; and a grammar's kind and text, if it had
one."""


def load_runner(weights_dir: Path, device: str = "cpu") -> ExactRunner:
    """Load an artefact, every block verified against its root, onto `cpu` (all cores) or `cuda`.

    Raises `WeightsError` (which block), `FormatError`, `VerificationError` (`engine.self_test`), `Undecidable`
    (`engine.device`).
    """
    require_device(device)
    launch.set_threads(len(os.sched_getaffinity(0)))
    return ExactRunner(weights.load(weights_dir, verify=True), device)


class ExactRunner:
    """Executes profile `exact-v1` with one set of weights."""

    def __init__(self, artefact: Artefact, device: str = "cpu") -> None:
        """Raises `FormatError` (tokenizer, template), `VerificationError` (`engine.self_test`)."""
        self._artefact = artefact
        self._tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
        self._assembler = Assembler(artefact, self._tokenizer)
        self._model = Model(artefact, device)
        self._step_tokens = STEP_TOKENS[self._model.device.type]
        self._grammars = grammars_of(artefact, self._tokenizer)
        self_test(self._model)

    @property
    def profile(self) -> str:
        return PROFILE

    @property
    def weights_root(self) -> bytes:
        return self._artefact.weights_root

    @property
    def grammar_library(self) -> tuple[str, str, int]:
        """What reads grammars: name, version, version of how it is asked."""
        by = self._grammars.library
        return by.library, by.version, by.rules

    @property
    def environment(self) -> Mapping[str, str]:
        device = computes_on(self._model.device)
        return {
            "kernel_digest": kernel_digest().hex(),
            "engine": engine_version(),
            "torch": torch.__version__,
            "triton": device["triton_version"] or "",
            "cuda": device["cuda_version"] or "",
            "driver": device["driver_version"] or "",
            "cpu": cpu_model(),
            "backend": device["backend"],
            "gpus": ", ".join(device["gpus"]),
        }

    @property
    def artefact(self) -> Mapping[str, object]:
        return {
            "model": self._artefact.config.name,
            "quantisation": self._model.quantisation,
            "manifest_digest": self._artefact.manifest_digest,
            "tokenizer_digest": self._artefact.tokenizer_digest,
            "chat_template_digest": self._artefact.template_digest,
            "stop_tokens": tuple(self._artefact.config.eos_ids),
        }

    def assemble(
        self, prompt: str | None, messages: tuple[tuple[str, str], ...] | None, values: Mapping[str, str]
    ) -> tuple[int, ...]:
        """The prompt's token ids. Raises `RequestError` with code `request.<field>` on an input nobody would serve."""
        turns = None if messages is None else tuple(Message(role=role, content=text) for role, text in messages)
        return tuple(self._assembler.tokens(prompt=prompt, messages=turns, values=values))

    def spell(
        self, output_tokens: tuple[int, ...], max_tokens: int, stop: tuple[str, ...], ignore_eos: bool
    ) -> tuple[str, str | None, int]:
        """Text, finish reason (None: not over) and how many of the tokens belong to the answer."""
        self._check_ids(output_tokens)
        output = self._output(max_tokens, stop, ignore_eos)
        text: list[str] = []
        for token in output_tokens:
            text.append(output.push(token))
            if output.end is not None:
                break
        else:
            text.append(output.finish())
        return "".join(text), output.end, output.count

    def audit_many(self, answers: Iterable[Recorded]) -> Iterator[tuple[int, Outcome]]:
        """Check many answers by teacher-forced passes; each one's index and outcome, in the order they are done.

        None when every token and every fingerprint is as recorded; else the first difference (`audit.Difference`), or
        the error that this answer alone would raise: `FormatError` (`replay.tokens`, `replay.sampling`: it cannot have
        been served), `ReplayDiverged` (`replay.numerics`: a value outside the profile's range on the way),
        `Undecidable` (`replay.memory`, `replay.grammar`). `answers` is read as there is room.
        """
        refused: list[tuple[int, CountermarkError]] = []

        def recordings() -> Iterator[Recording]:
            for index, answer in enumerate(answers):
                try:
                    recording = self._recording(index, *answer)
                except (FormatError, Undecidable) as err:
                    refused.append((index, err))
                else:
                    yield recording

        for recording in audit_all(self._model, recordings(), self._step_tokens):
            yield recording.index, recording.outcome
            while refused:
                yield refused.pop()
        yield from refused

    def audit(
        self,
        prompt_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
        fingerprints: tuple[bytes, ...],
        sampling: Mapping[str, object],
        grammar: tuple[str, str] | None = None,
    ) -> Difference | None:
        """`audit_many` of one. Raises what that gives as an outcome."""
        plain = (prompt_tokens, output_tokens, fingerprints, sampling)
        ((_, outcome),) = self.audit_many([plain if grammar is None else (*plain, grammar)])
        if isinstance(outcome, CountermarkError):
            raise outcome
        return outcome

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
        grammar: tuple[str, str] | None = None,
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Generate again from the prompt: token ids and one 16-byte fingerprint for each. `grammar`: kind and text.

        Raises `FormatError`, `ReplayDiverged`, `Undecidable` as `audit_many` gives them.
        """
        tokens = self._checked(prompt_tokens, ())
        params = kernel_params(sampling, self._model.vocab)
        limit = min(max_tokens, self._model.context - len(tokens))
        output = self._output(limit, stop, ignore_eos)
        compiled = None if grammar is None else self._compiled(*grammar)
        try:
            marks = self._generate(tokens, params, output, self._model.new_cache(len(tokens) + limit), compiled)
        except GrammarError as err:
            raise Undecidable(str(err), code="replay.grammar") from err
        except (NumericsError, MemoryError, torch.OutOfMemoryError) as err:
            raise failed(err) from err
        return tuple(tokens[len(prompt_tokens) :]), tuple(marks)

    def _generate(
        self, tokens: list[int], params: SamplerParams, output: Output, cache: Cache, grammar: Grammar | None
    ) -> list[bytes]:
        """Append to `tokens` until `output` ends; the fingerprints."""
        prompt, done = len(tokens), 0
        walk = None if grammar is None else grammar.walk()
        marks: list[bytes] = []
        while output.end is None:
            end = min(done + self._step_tokens, len(tokens))
            chunk = Chunk(cache=cache, start=done, tokens=tokens[done:end], logits=int(end == len(tokens)))
            logits = self._model.forward([chunk])
            done = end
            if not chunk.logits:
                continue
            mask = None if walk is None else walk.mask
            rows = [Row(params=params, tokens=tokens, prompt=prompt, length=len(tokens), mask=mask)]
            (token,), (mark,) = draw(logits, rows)
            tokens.append(token)
            marks.append(mark)
            output.push(token)
            if walk is not None and output.end is None:
                walk.step(token)
        return marks

    def _compiled(self, kind: str, text: str) -> Grammar:
        try:
            return self._grammars.compile(kind, text)
        except RequestError as err:
            raise Undecidable(f"grammar: expected one that is served: {err}", code="replay.grammar") from err

    def _recording(
        self,
        index: int,
        prompt: Sequence[int],
        output: Sequence[int],
        marks: Sequence[bytes],
        sampling: Any,
        grammar: tuple[str, str] | None = None,
    ) -> Recording:
        tokens = self._checked(prompt, output)
        if len(marks) != len(output) or not all(isinstance(mark, bytes) for mark in marks):
            message = f"fingerprints: expected {len(output)} of bytes, got {len(marks)}"
            raise FormatError(message, code="replay.tokens")
        params = kernel_params(sampling, self._model.vocab)
        masks = None if grammar is None else Masks(self._compiled(*grammar), output)
        return Recording(index=index, tokens=tokens, prompt=len(prompt), fingerprints=marks, params=params, masks=masks)

    def _checked(self, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
        tokens = [*prompt, *output]
        room = self._model.context
        if not prompt or len(tokens) > room:
            raise FormatError(f"tokens: expected a prompt and at most {room} tokens", code="replay.tokens")
        self._check_ids(tokens)
        return tokens

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if not all(type(token) is int and 0 <= token < self._model.vocab for token in tokens):
            raise FormatError(f"tokens: expected ids below {self._model.vocab}", code="replay.tokens")

    def _output(self, max_tokens: int, stop: tuple[str, ...], ignore_eos: bool) -> Output:
        stop_tokens = () if ignore_eos else self._artefact.config.eos_ids
        return Output(self._tokenizer, stop=stop, stop_tokens=stop_tokens, max_tokens=max_tokens)


def kernel_params(sampling: Mapping[str, Any], vocab: int) -> SamplerParams:
    """The recorded settings as the kernel takes them. Raises `FormatError` (`replay.sampling`)."""
    try:
        settings = ResolvedSampling(**sampling)
        _check_types(settings)
        params = settings.kernel_params()
    except (TypeError, ValueError, OverflowError) as err:
        raise FormatError(f"sampling: {err!s:.200}", code="replay.sampling") from err
    if len(params.logit_bias) != len(settings.logit_bias) or not all(0 <= i < vocab for i in params.logit_bias):
        raise FormatError(f"sampling.logit_bias: expected different ids below {vocab}", code="replay.sampling")
    return params


def _check_types(s: ResolvedSampling) -> None:
    """Raises TypeError: the kernel's own checks are of ranges."""
    integers = (s.top_k, s.top_p_20bit, s.min_p_20bit, s.seed, *(i for i, _ in s.logit_bias))
    reals = (
        s.temperature,
        s.repetition_penalty,
        s.presence_penalty,
        s.frequency_penalty,
        *(b for _, b in s.logit_bias),
    )
    if not all(type(x) is int for x in integers) or not all(type(x) is float for x in reals):
        raise TypeError("expected integers and floats, got another type")
