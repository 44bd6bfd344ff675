"""The engine's front: one model served to many requests, and every fact about it that a record states.

Each fact is read from where it lives: digests and roots from the artefact that was loaded, the kernel digest from the
kernels' own files, versions from the packages, the processor's name from the kernel. `prepare` runs on the caller's
thread and resolves everything; `submit` starts the computation, so a record can be made durable between the two.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from countermark.errors import RequestError
from countermark_appliance.engine.assembler import Assembler
from countermark_appliance.engine.executor import make_executor
from countermark_appliance.engine.grammar import Grammar, GrammarError, GrammarLibrary, Grammars
from countermark_appliance.engine.loop import Loop
from countermark_appliance.engine.model import Model, available_bytes
from countermark_appliance.engine.places import Places
from countermark_appliance.engine.request import Handle, Place, Prepared, Request, Sink
from countermark_appliance.engine.sampling import resolve_logprobs, resolve_sampling
from countermark_appliance.engine.scheduler import Scheduler
from countermark_appliance.engine.selftest import require_device, self_test
from countermark_appliance.engine.sequence import Sequence
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact
from countermark_kernels import PROFILE, kernel_digest, launch
from countermark_kernels.cache import BLOCK, KvCache

DEFAULT_MAX_TOKENS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
STEP_TOKENS = {"cpu": (512, 128), "cuda": (8192, 2048)}
"""Tokens of prompts in a step: while nobody decodes, and while somebody does."""
POOL_CONTEXT = 8192
"""Unless told otherwise the pool has room for every sequence that runs, of the whole context or of so many tokens."""


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
    backend: str  # native or torch on a CPU, triton on a GPU
    triton_version: str | None  # these three, and `gpus`: None and empty where no GPU computes
    cuda_version: str | None
    driver_version: str | None
    gpus: tuple[str, ...]
    threads: int
    self_test: str  # hex of what the warm-up computed; equal wherever profile and weights are equal


class DeviceFacts(TypedDict):
    """The part of `EngineInfo` that is read from the device."""

    backend: str
    triton_version: str | None
    cuda_version: str | None
    driver_version: str | None
    gpus: tuple[str, ...]


class Engine:
    """Serves one artefact. `prepare`, `reserve`, `submit` and `close` may be called from any thread."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        threads: int,
        max_sequences: int = 16,
        max_waiting: int = 64,
        device: str = "cpu",
        blocks: int | None = None,
        step_tokens: int | None = None,
        mixed_step_tokens: int | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Load, size the pool, self-test, warm up, start the thread.

        `threads` 0: one for each core this process may use. `blocks`: of the pool of keys and values, by default after
        the memory that is free; `step_tokens`, `mixed_step_tokens`: see `Scheduler`, by default after the device. No
        result depends on any of them. `on_failure`: called once if the thread ever fails, which ends every request with
        `error`; see `failed`.

        Raises `FormatError` (tokenizer, template), `VerificationError` (`engine.self_test`), `Undecidable`
        (`engine.device`) or MemoryError.
        """
        require_device(device)
        threads = threads or len(os.sched_getaffinity(0))
        launch.set_threads(threads)
        config = artefact.config
        self._config = config
        self._tokenizer = Tokenizer(artefact.tokenizer_json, vocab=config.vocab)
        self._assembler = Assembler(artefact, self._tokenizer)
        self._grammars = grammars_of(artefact, self._tokenizer)
        self._model = Model(artefact, device)
        step, mixed = STEP_TOKENS[self._model.device.type]
        step, mixed = step_tokens or step, mixed_step_tokens or mixed
        self._model.size_pool(blocks or _pool_blocks(self._model, max_sequences, step))
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
            **computes_on(self._model.device),
            threads=threads,
            self_test=digest.hex(),
        )
        self._executor = make_executor(self._model, rows=max_sequences)
        scheduler = Scheduler(
            self._model.blocks,
            functools.partial(KvCache, self._model.pool),
            max_sequences=max_sequences,
            step_tokens=step,
            mixed_step_tokens=mixed,
            forget=self._executor.forget,
        )
        self._loop = Loop(self._executor, scheduler, on_failure=on_failure)
        self._places = Places(max_sequences + max_waiting, lambda: self._loop.wait_s)

    @property
    def failed(self) -> bool:
        """The engine's thread has ended by a fault; nothing is computed any more."""
        return self._loop.failed

    def prepare(self, request: Request) -> Prepared:
        """Resolve and check everything; compute nothing. Raises `RequestError` with code `request.<field>`.

        With a grammar this takes milliseconds, and seconds for one that is then refused (`request.grammar_cost`).
        """
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
        logprobs = resolve_logprobs(request.logprobs)
        tokens = self._assembler.tokens(prompt=request.prompt, messages=request.messages, values=request.values)
        ignore_eos = bool(request.ignore_eos)
        grammar = None if request.grammar is None else self._grammar(*request.grammar, ends=not ignore_eos)
        return Prepared(
            request=request,
            model=self._config.name,
            prompt_tokens=tuple(tokens),
            max_tokens=self._max_tokens(request.max_tokens, len(tokens)),
            stop=tuple(request.stop),
            stop_tokens=() if ignore_eos else tuple(self._config.eos_ids),
            sampling=sampling,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            grammar=grammar,
        )

    @property
    def grammar_library(self) -> GrammarLibrary:
        """What reads grammars; a record of a constrained answer names it."""
        return self._grammars.library

    def reserve(self, client: bytes = b"") -> Place:
        """A place in the queue, for `submit`; `release` it if the request goes no further. `client`: whose it is.

        Raises `Unavailable` (`engine.busy`, with `retry_after_s`): all are taken, or half of them by this client.
        """
        return self._places.take(client)

    def submit(
        self, prepared: Prepared, sink: Sink, deadline_s: float | None = None, place: Place | None = None
    ) -> Handle:
        """Start computing. `sink` gets the events on the engine's thread and must neither block nor raise.

        `deadline_s`: seconds from now. `place`: one that was reserved, which is the request's from now on, also if this
        raises. Raises `Unavailable`: `engine.busy` (without a place only), `engine.stopping`; `RequestError`
        (`generation.grammar`).
        """
        place = place or self.reserve()
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            sequence = Sequence(prepared, sink, self._tokenizer, deadline=deadline, release=place.release)
            self._loop.submit(sequence)
        except BaseException as err:
            place.release()
            if isinstance(err, GrammarError):
                raise RequestError(str(err), code="generation.grammar") from err
            raise
        return sequence

    def close(self) -> None:
        """End every request with `shutdown` and stop the thread. Idempotent."""
        self._loop.close()
        self._executor.close()
        self._grammars.close()

    def _grammar(self, kind: str, text: str, *, ends: bool) -> Grammar:
        if not ends or not self._config.eos_ids:
            message = "grammar: expected an answer that an end-of-sequence token may end, got ignore_eos or none such"
            raise RequestError(message, code="request.grammar")
        return self._grammars.compile(kind, text)

    def _max_tokens(self, wanted: int | None, prompt: int) -> int:
        pool = (self._model.blocks.count - 1) * BLOCK  # the last token of an answer is never computed
        if prompt > pool:
            raise RequestError(f"prompt: expected at most {pool} tokens, got {prompt}", code="request.prompt")
        room = min(self._config.context - prompt, pool + 1 - prompt)
        if wanted is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= room:
            raise RequestError(
                f"max_tokens: expected 1 to {room} beside a prompt of {prompt} tokens, got {wanted!r:.40}",
                code="request.max_tokens",
            )
        return wanted


def _pool_blocks(model: Model, sequences: int, step_tokens: int) -> int:
    """Blocks for what may run at a time, as far as memory is free; on a GPU all that a step leaves free."""
    if model.device.type == "cuda":
        from countermark_appliance.engine.graphs import plan_memory  # noqa: PLC0415  triton is only there with a GPU

        return plan_memory(model, step_tokens=step_tokens + sequences, max_rows=sequences)
    tokens = max(model.context, sequences * min(model.context, POOL_CONTEXT))
    room = available_bytes() // 4
    return 1 + max(1, min((tokens + BLOCK - 1) // BLOCK, room // model.block_bytes))


def grammars_of(artefact: Artefact, tokenizer: Tokenizer) -> Grammars:
    """What compiles grammars for an artefact."""
    config = artefact.config
    return Grammars([tokenizer.token_bytes(token) for token in range(config.vocab)], config.eos_ids)


def computes_on(device: torch.device) -> DeviceFacts:
    """What a record says of the device that computes."""
    if device.type == "cpu":
        return DeviceFacts(
            backend=launch.backend(), triton_version=None, cuda_version=None, driver_version=None, gpus=()
        )
    driver = Path("/sys/module/nvidia/version")
    return DeviceFacts(
        backend="triton",
        triton_version=importlib.metadata.version("triton"),
        cuda_version=torch.version.cuda,
        driver_version=driver.read_text(encoding="ascii").strip() if driver.exists() else None,
        gpus=(torch.cuda.get_device_name(device),),
    )


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
