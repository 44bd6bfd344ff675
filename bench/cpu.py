"""Tokens a second on this processor: our engine, transformers in fp32 and bf16, llama.cpp where it is installed.

    python bench/cpu.py [--rounds 5] [--out FILE]

SmolLM2-135M, the same file for all; every peer uses all cores. Decode: prompts of 32 tokens, then 64 tokens each, timed
from the first to the last; ours is the whole engine (scheduler, fingerprint, sampler, text), the others are bare
forward loops with argmax. Prefill: 512 tokens up to the first new token. No prompt is found in our cache. Audit:
teacher-forced passes over an answer of 256 tokens against the time its generation took, and over 8 such answers
together. Peers take turns within each round, so that a busy machine slows all
alike; best and median are given. Writes bench/results/cpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from benchlib import HERE, built_weights, machine, reference_model, say
from countermark_appliance.engine import weights
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.replay import ExactRunner
from countermark_appliance.engine.request import DoneEvent, Event, Prepared, Request
from countermark_kernels import PROFILE

DECODE_PROMPT, DECODE_TOKENS, PREFILL, ANSWER, ANSWERS = 32, 64, 512, 256, 8
OURS = f"countermark {PROFILE}"
CELLS = ("decode b1", "decode b8", "prefill 512")


class Peer(Protocol):
    """Something that runs the model."""

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens a second of all prompts together, from each one's first new token on."""

    def prefill(self, prompt: list[int]) -> float:
        """Tokens a second up to the first new token."""


class Ours:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked = 0

    def prepared(self, prompt: list[int], tokens: int) -> Prepared:
        """Each request in a scope of its own, so that the same prompt is computed again every time."""
        self.asked += 1
        scope = self.asked.to_bytes(8, "big")
        request = self.engine.prepare(Request(prompt="x", max_tokens=tokens, ignore_eos=True, seed=1, scope=scope))
        return dataclasses.replace(request, prompt_tokens=tuple(prompt))

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, list[DoneEvent]]:
        """Seconds to the last prompt's first token; seconds from there to the end; the answers."""
        events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        begun = time.perf_counter()
        for prompt in prompts:
            self.engine.submit(self.prepared(prompt, tokens), lambda event: events.put((time.perf_counter(), event)))
        times: list[float] = []
        done: list[DoneEvent] = []
        while len(done) < len(prompts):
            at, event = events.get(timeout=600)
            if isinstance(event, DoneEvent):
                assert not event.cached_tokens, event
                done.append(event)
            else:
                times.append(at)
        first = times[len(prompts) - 1]
        return first - begun, times[-1] - first, done

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        _, seconds, done = self.run(prompts, tokens)
        assert all(len(d.output_tokens) == tokens for d in done)
        return len(prompts) * (tokens - 1) / seconds

    def prefill(self, prompt: list[int]) -> float:
        return len(prompt) / self.run([prompt], 1)[0]


class Transformers:
    def __init__(self, dtype: torch.dtype) -> None:
        self.model = reference_model(dtype)

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        with torch.inference_mode():
            out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            begun = time.perf_counter()
            for _ in range(tokens - 1):
                out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)
            return len(prompts) * (tokens - 1) / (time.perf_counter() - begun)

    def prefill(self, prompt: list[int]) -> float:
        with torch.inference_mode():
            begun = time.perf_counter()
            out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            out.logits[:, -1:].argmax(-1).item()
            return len(prompt) / (time.perf_counter() - begun)


class LlamaCpp:
    """Through the C interface, so that no Python wrapper is timed."""

    def __init__(self, threads: int) -> None:
        import llama_cpp as lib

        self.lib: Any = lib
        self.log = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(weights.stand_in_gguf()).encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 4096, 512, 512, 8
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, settings)
        self.batch = lib.llama_batch_init(512, 0, 1)

    def _eval(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted)."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, sequence, logits
        assert self.lib.llama_decode(self.context, b) == 0

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        self._clear()
        for n, prompt in enumerate(prompts):
            self._eval([(t, i, n, i == len(prompt) - 1) for i, t in enumerate(prompt)])
        begun = time.perf_counter()
        for step in range(tokens - 1):
            self._eval([(100 + step + n, len(p) + step, n, True) for n, p in enumerate(prompts)])
            self.lib.llama_get_logits(self.context)
        return len(prompts) * (tokens - 1) / (time.perf_counter() - begun)

    def prefill(self, prompt: list[int]) -> float:
        self._clear()
        begun = time.perf_counter()
        self._eval([(t, i, 0, i == len(prompt) - 1) for i, t in enumerate(prompt)])
        self.lib.llama_get_logits(self.context)
        return len(prompt) / (time.perf_counter() - begun)


def prompts(count: int, length: int, vocab: int = 49152) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    drawn: list[list[int]] = torch.randint(100, vocab, (count, length), generator=generator).tolist()
    return drawn


def measure(peers: dict[str, Peer], rounds: int) -> dict[str, dict[str, list[float]]]:
    """peer -> cell -> one figure for each round; a first round warms up and is dropped."""
    runs: dict[str, Callable[[Peer], float]] = {
        "decode b1": lambda p: p.decode(prompts(1, DECODE_PROMPT), DECODE_TOKENS),
        "decode b8": lambda p: p.decode(prompts(8, DECODE_PROMPT), DECODE_TOKENS),
        "prefill 512": lambda p: p.prefill(prompts(1, PREFILL)[0]),
    }
    found: dict[str, dict[str, list[float]]] = {name: {cell: [] for cell in runs} for name in peers}
    for turn in range(rounds + 1):
        for cell, run in runs.items():
            for name, peer in peers.items():
                figure = run(peer)
                if turn:
                    found[name][cell].append(figure)
        say(
            f"round {turn} of {rounds}: " + ", ".join(f"{n} {f['decode b1'][-1]:.0f}" for n, f in found.items() if turn)
        )
    return found


def audit(ours: Ours, runner: ExactRunner) -> dict[str, float]:
    """One answer generated at batch 1 and audited, and several audited together: seconds of each."""
    asked = prompts(ANSWERS, DECODE_PROMPT)
    sampling = dataclasses.asdict(ours.prepared(asked[0], ANSWER).sampling)
    generate, audits, done = [], [], []
    for prompt in asked:
        first, rest, (answer,) = ours.run([prompt], ANSWER)
        begun = time.perf_counter()
        assert runner.audit(prompt, answer.output_tokens, answer.fingerprints, sampling) is None
        audits.append(time.perf_counter() - begun)
        generate.append(first + rest)
        done.append(answer)
    recorded = [(p, d.output_tokens, d.fingerprints, sampling) for p, d in zip(asked, done, strict=True)]
    begun = time.perf_counter()
    assert dict(runner.audit_many(recorded)) == dict.fromkeys(range(ANSWERS))
    together = time.perf_counter() - begun
    one, alone = statistics.median(audits), statistics.median(generate)
    return {
        "tokens": ANSWER,
        "generate_s": alone,
        "audit_s": one,
        "times_faster": alone / one,
        "answers": ANSWERS,
        "answers_s": together,
        "answers_per_second": ANSWERS / together,
        "tokens_per_second": ANSWERS * (DECODE_PROMPT + ANSWER) / together,
    }


def table(found: dict[str, dict[str, list[float]]]) -> Table:
    shown = Table(title="SmolLM2-135M, tokens/s: best (median); in brackets ours / theirs by best")
    shown.add_column("")
    for cell in CELLS:
        shown.add_column(cell, justify="right")
    ours = {cell: max(found[OURS][cell]) for cell in CELLS}
    for name, cells in found.items():
        shown.add_row(
            name,
            *(f"{max(v):.0f} ({statistics.median(v):.0f}) [{ours[c] / max(v):.2f}]" for c, v in cells.items()),
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    artefact = weights.load(built_weights())
    engine = Engine(artefact, threads=0)
    threads = engine.info.threads
    peers: dict[str, Peer] = {
        OURS: Ours(engine),
        "transformers fp32": Transformers(torch.float32),
        "transformers bf16": Transformers(torch.bfloat16),
    }
    try:
        peers["llama.cpp Q4_1"] = LlamaCpp(threads)
    except ImportError:
        say("llama_cpp is not installed: left out")
    found = measure(peers, args.rounds)
    replay = audit(Ours(engine), ExactRunner(artefact))
    Console().print(table(found))
    print(f"audit of {replay['tokens']} tokens: {replay['times_faster']:.1f} times faster than their generation;")
    print(
        f"{ANSWERS} answers together: {replay['answers_per_second']:.1f}/s, {replay['tokens_per_second']:.0f} tokens/s"
    )
    figures = {
        name: {cell: {"best": max(v), "median": statistics.median(v)} for cell, v in cells.items()}
        for name, cells in found.items()
    }
    args.out.parent.mkdir(exist_ok=True)
    result = {"tokens_per_second": figures, "audit": replay, "rounds": args.rounds, "machine": machine()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
