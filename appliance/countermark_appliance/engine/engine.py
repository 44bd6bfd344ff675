"""The engine's front: one model served to many requests, and every fact about it that a record states.

Each fact is read from where it lives: digests and roots from the artefact that was loaded, the kernel digest from the
kernels' own files, versions from the packages, the processor's name from the kernel. `prepare` runs on the caller's
thread and resolves everything; `submit` starts the computation, so a record can be made durable between the two.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from countermark.errors import RequestError
from countermark_appliance.engine.assembler import Assembler
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.request import Handle, Prepared, Request, Sink
from countermark_appliance.engine.sampling import resolve_sampling
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.selftest import self_test
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import PROFILE, kernel_digest, launch

DEFAULT_MAX_TOKENS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
STEP_TOKENS = 512
MIXED_STEP_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What executes the requests."""

    model: str
    architecture: str
    profile: str
    quantisation: str
    context: int
    vocab: int
    kernel_digest: bytes
    weights_root: bytes
    manifest_digest: bytes
    tokenizer_digest: bytes
    template_digest: bytes
    engine_version: str
    torch_version: str
    cpu_model: str
    backend: str
    threads: int
    self_test: str  # hex of what the warm-up computed; equal wherever profile and weights are equal


class Engine:
    """Serves one artefact. `prepare`, `submit` and `close` may be called from any thread."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        threads: int,
        max_sequences: int = 16,
        max_waiting: int = 64,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Load, self-test, warm up, start the thread. `threads` 0: one for each core this process may use.

        `on_failure`: called once if that thread ever fails, which ends every request with `error`; see `failed`.

        Raises `FormatError` (tokenizer, template) or `VerificationError` (`engine.self_test`).
        """
        threads = threads or len(os.sched_getaffinity(0))
        launch.set_threads(threads)
        config = artefact.config
        self._config = config
        self._tokenizer = Tokenizer(artefact.tokenizer_json, vocab=config.vocab)
        self._assembler = Assembler(artefact, self._tokenizer)
        self._model = Model(artefact)
        digest = self_test(self._model)
        self.info = EngineInfo(
            model=config.name,
            architecture=config.architecture,
            profile=PROFILE,
            quantisation=self._model.quantisation,
            context=config.context,
            vocab=config.vocab,
            kernel_digest=kernel_digest(),
            weights_root=artefact.weights_root,
            manifest_digest=artefact.manifest_digest,
            tokenizer_digest=artefact.tokenizer_digest,
            template_digest=artefact.template_digest,
            engine_version=engine_version(),
            torch_version=torch.__version__,
            cpu_model=cpu_model(),
            backend=launch.backend(),
            threads=threads,
            self_test=digest.hex(),
        )
        scheduler = Scheduler(max_sequences=max_sequences, step_tokens=STEP_TOKENS, mixed_step_tokens=MIXED_STEP_TOKENS)
        self._loop = Loop(self._model, scheduler, capacity=max_sequences + max_waiting, on_failure=on_failure)

    @property
    def failed(self) -> bool:
        """The engine's thread has ended by a fault; nothing is computed any more."""
        return self._loop.failed

    def prepare(self, request: Request) -> Prepared:
        """Resolve and check everything; compute nothing. Raises `RequestError` with code `request.<field>`."""
        if request.model not in ("", self._config.name):
            raise RequestError(
                f"model: expected {self._config.name!r}, got {request.model!r:.80}", code="request.model"
            )
        sampling = resolve_sampling(
            vocab=self._config.vocab,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            seed=request.seed,
        )
        _check_stop(request.stop)
        tokens = self._assembler.tokens(prompt=request.prompt, messages=request.messages)
        ignore_eos = bool(request.ignore_eos)
        return Prepared(
            request=request,
            model=self._config.name,
            prompt_tokens=tuple(tokens),
            max_tokens=self._max_tokens(request.max_tokens, len(tokens)),
            stop=tuple(request.stop),
            stop_tokens=() if ignore_eos else tuple(self._config.eos_ids),
            sampling=sampling,
            ignore_eos=ignore_eos,
        )

    def submit(self, prepared: Prepared, sink: Sink, deadline_s: float | None = None) -> Handle:
        """Start computing. `sink` gets the events on the engine's thread and must neither block nor raise.

        `deadline_s`: seconds from now. Raises `Unavailable`: `engine.busy`, `engine.stopping`.
        """
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        sequence = Sequence(prepared, sink, self._tokenizer, deadline=deadline)
        self._loop.submit(sequence)
        return sequence

    def close(self) -> None:
        """End every request with `shutdown` and stop the thread. Idempotent."""
        self._loop.close()

    def _max_tokens(self, wanted: int | None, prompt: int) -> int:
        room = self._config.context - prompt
        if wanted is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= room:
            raise RequestError(
                f"max_tokens: expected 1 to {room} beside a prompt of {prompt} tokens, got {wanted!r:.40}",
                code="request.max_tokens",
            )
        return wanted


def engine_version() -> str:
    """The version of the installed distribution; `uninstalled` when run from a source tree."""
    try:
        return importlib.metadata.version("countermark")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return os.uname().machine


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOPS:
        raise RequestError(f"stop: expected at most {MAX_STOPS} strings, got {len(stop)}", code="request.stop")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(f"stop: expected strings of 1 to {MAX_STOP_CHARACTERS} characters", code="request.stop")
