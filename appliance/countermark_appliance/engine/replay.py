"""Run a recorded answer again on this machine: `audit` in one teacher-forced pass, `regenerate` token by token.

Audit works because prefill equals decode in the exact profile: the logits of every position come out of one pass over
prompt and output, and at each position the profile's own sampler must pick the recorded token and the fingerprint must
be the recorded one. `assemble` and `spell` redo what happened before and after the model: input to ids, ids to text and
end, by the code that served them. Satisfies `countermark.replay.Runner` structurally; plain types only. Not checked
here: that the record is genuine; the caller has verified it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countermark.errors import FormatError
from countermark_appliance.engine import weights
from countermark_appliance.engine.assembler import Assembler
from countermark_appliance.engine.draw import Row, draw
from countermark_appliance.engine.engine import cpu_model, engine_version
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.request import Message
from countermark_appliance.engine.sampling import ResolvedSampling
from countermark_appliance.engine.selftest import self_test
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import PROFILE, kernel_digest, launch
from countermark_kernels.sampler import SamplerParams

PROMPT_STEP = 512
OUTPUT_STEP = 128  # rows of logits held at a time


def load_runner(weights_dir: Path) -> ExactRunner:
    """Load an artefact, every block verified against its root, on all cores.

    Raises `WeightsError` (which block), `FormatError`, `VerificationError` (`engine.self_test`).
    """
    launch.set_threads(len(os.sched_getaffinity(0)))
    return ExactRunner(weights.load(weights_dir, verify=True))


class ExactRunner:
    """Executes profile `exact-v1` with one set of weights."""

    def __init__(self, artefact: Artefact) -> None:
        self._artefact = artefact
        self._tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
        self._assembler = Assembler(artefact, self._tokenizer)
        self._model = Model(artefact)
        self_test(self._model)

    @property
    def profile(self) -> str:
        return PROFILE

    @property
    def weights_root(self) -> bytes:
        return self._artefact.weights_root

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "kernel_digest": kernel_digest().hex(),
            "engine": engine_version(),
            "torch": torch.__version__,
            "cpu": cpu_model(),
            "backend": launch.backend(),
            "gpus": "",
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

    def assemble(self, prompt: str | None, messages: tuple[tuple[str, str], ...] | None) -> tuple[int, ...]:
        """The prompt's token ids. Raises `RequestError` with code `request.<field>` on an input nobody would serve."""
        turns = None if messages is None else tuple(Message(role=role, content=text) for role, text in messages)
        return tuple(self._assembler.tokens(prompt=prompt, messages=turns))

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

    def audit(
        self,
        prompt_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
        fingerprints: tuple[bytes, ...],
        sampling: Mapping[str, object],
    ) -> Mapping[str, object] | None:
        """None when every token and every fingerprint is as recorded; else the first difference.

        The difference: `position` (index into the output), `recorded_token`, `local_token`, `fingerprint_equal`,
        `logit_gap` (raw logit of the local token minus that of the recorded one), `recorded_fingerprint`,
        `local_fingerprint`. Raises `FormatError` (`replay.tokens`, `replay.sampling`).
        """
        tokens = self._checked(prompt_tokens, output_tokens)
        if len(fingerprints) != len(output_tokens):
            raise FormatError(
                f"fingerprints: expected {len(output_tokens)}, got {len(fingerprints)}", code="replay.tokens"
            )
        params = kernel_params(sampling, self._model.vocab)
        prompt = len(prompt_tokens)
        for first, logits in self._teacher_forced(tokens, prompt):
            rows = [Row(params=params, tokens=tokens, prompt=prompt, length=first + i) for i in range(logits.shape[0])]
            ids, marks = draw(logits, rows)
            for i, local in enumerate(zip(ids, marks, strict=True)):
                at = first + i - prompt
                recorded = (output_tokens[at], fingerprints[at])
                if local != recorded:
                    return _difference(at, logits[i], recorded=recorded, local=local)
        return None

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Generate again from the prompt: token ids and one 16-byte fingerprint for each."""
        tokens = self._checked(prompt_tokens, ())
        params = kernel_params(sampling, self._model.vocab)
        limit = min(max_tokens, self._model.context - len(tokens))
        output = self._output(limit, stop, ignore_eos)
        cache, done = self._model.new_cache(len(tokens) + limit), 0
        marks: list[bytes] = []
        while output.end is None:
            end = min(done + PROMPT_STEP, len(tokens))
            chunk = Chunk(cache=cache, start=done, tokens=tokens[done:end], logits=int(end == len(tokens)))
            logits = self._model.forward([chunk])
            done = end
            if not chunk.logits:
                continue
            rows = [Row(params=params, tokens=tokens, prompt=len(prompt_tokens), length=len(tokens))]
            (token,), (mark,) = draw(logits, rows)
            tokens.append(token)
            marks.append(mark)
            output.push(token)
        return tuple(tokens[len(prompt_tokens) :]), tuple(marks)

    def _teacher_forced(self, tokens: list[int], prompt: int) -> Iterator[tuple[int, Tensor]]:
        """Logits [rows, vocab] of every position before an output token, in steps; with the first one's length."""
        end = len(tokens) - 1
        cache, done = self._model.new_cache(end), 0
        while done < end:
            stop = min(end, done + PROMPT_STEP) if done < prompt - 1 else min(end, done + OUTPUT_STEP)
            if done < prompt - 1 < stop:
                stop = min(stop, prompt - 1 + OUTPUT_STEP)
            wanted = max(0, stop - max(done, prompt - 1))
            logits = self._model.forward([Chunk(cache=cache, start=done, tokens=tokens[done:stop], logits=wanted)])
            done = stop
            if wanted:
                yield done - wanted + 1, logits

    def _checked(self, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
        tokens = [*prompt, *output]
        room = self._model.context
        if not prompt or len(tokens) > room:
            raise FormatError(f"tokens: expected a prompt and at most {room} tokens", code="replay.tokens")
        self._check_ids(tokens)
        return tokens

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if not all(0 <= token < self._model.vocab for token in tokens):
            raise FormatError(f"tokens: expected ids below {self._model.vocab}", code="replay.tokens")

    def _output(self, max_tokens: int, stop: tuple[str, ...], ignore_eos: bool) -> Output:
        stop_tokens = () if ignore_eos else self._artefact.config.eos_ids
        return Output(self._tokenizer, stop=stop, stop_tokens=stop_tokens, max_tokens=max_tokens)


def kernel_params(sampling: Mapping[str, Any], vocab: int) -> SamplerParams:
    """The recorded settings as the kernel takes them. Raises `FormatError` (`replay.sampling`)."""
    try:
        params = ResolvedSampling(**sampling).kernel_params()
        biased = all(0 <= token < vocab for token in params.logit_bias)
    except (TypeError, ValueError, OverflowError) as err:
        raise FormatError(f"sampling: {err!s:.200}", code="replay.sampling") from err
    if not biased:
        raise FormatError(f"sampling.logit_bias: expected ids below {vocab}", code="replay.sampling")
    return params


def _difference(
    position: int, logits: Tensor, *, recorded: tuple[int, bytes], local: tuple[int, bytes]
) -> Mapping[str, object]:
    return {
        "position": position,
        "recorded_token": recorded[0],
        "local_token": local[0],
        "fingerprint_equal": recorded[1] == local[1],
        "logit_gap": float(logits[local[0]]) - float(logits[recorded[0]]),
        "recorded_fingerprint": recorded[1].hex(),
        "local_fingerprint": local[1].hex(),
    }
