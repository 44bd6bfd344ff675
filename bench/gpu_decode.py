"""Decoding steps of Qwen3-8B's shapes through the executor of a GPU: milliseconds, and where they go.

    python bench/gpu_decode.py [FILE [WAIT]]     timing begins when the file WAIT exists, after all kernels are compiled
    python bench/gpu_decode.py targets           steps by what batch.TARGET is (programs wanted of a split of attention)

Weights are generated on the device (generated.py). For each number of rows: a step as the engine sees it, one in
flight; what the host spends in it; the graph alone; sampler, fingerprint and results alone; and kernels by name. The
caches hold what prompts of 256 random tokens left there. One run says little: compare medians of the same process.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from countermark_appliance.engine.graphs import GraphExecutor, plan_memory
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.step import Part, Row
from countermark_kernels import fingerprint, ieee
from countermark_kernels.cache import KvCache
from countermark_kernels.gpu import batch as batching
from countermark_kernels.gpu import flags, sampler
from countermark_kernels.sampler import SamplerParams, cuda_settings
from generated import QWEN3_8B, artefact

PROMPT = 256
STEPS = 48
BATCHES = (1, 16, 64, 256)
SAMPLED = SamplerParams(temperature=ieee.f32(0.8), top_p_20bit=996_147, seed=5)  # 0.95
KINDS = {
    "greedy": SamplerParams(temperature=0.0),
    "top-p": SAMPLED,
    "temperature 1": SamplerParams(temperature=1.0, seed=5),
    "top-k 20, top-p": SamplerParams(temperature=ieee.f32(0.6), top_k=20, top_p_20bit=996_147, seed=5),
    "penalties": SamplerParams(temperature=0.0, repetition=ieee.f32(1.1)),
}


class Batch:
    """Sequences that decode, one step in flight."""

    def __init__(self, executor: GraphExecutor, model: Model, count: int, params: SamplerParams) -> None:
        self.executor = executor
        self.marks: list[list[bytes]] = [[] for _ in range(count)]
        self.tokens = [torch.randint(model.vocab, (PROMPT,)).tolist() for _ in range(count)]
        self.params = [params] * count
        self.blocks = [model.blocks.take((PROMPT + 4 * STEPS) // 64 + 1) for _ in range(count)]
        self.caches = [KvCache(model.pool, blocks) for blocks in self.blocks]
        self.length = PROMPT
        self.start_s: list[float] = []
        self.wait_s: list[float] = []
        for first in range(0, count, 8192 // PROMPT):
            ticket = executor.start([self._part(i, 0) for i in range(first, min(count, first + 8192 // PROMPT))])
            self.keep(ticket.wait(), first)

    def keep(self, drawn: list[Any], first: int = 0) -> None:
        for place, one in enumerate(drawn):
            self.tokens[first + place].append(one.token)
            self.marks[first + place].append(one.fingerprint)

    def _part(self, i: int, start: int, carried: int | None = None) -> Part:
        row = Row(params=self.params[i], tokens=self.tokens[i], prompt=PROMPT, length=self.length, key=i)
        tokens = self.tokens[i][start:] if carried is None else ()
        return Part(cache=self.caches[i], start=start, tokens=tokens, carried=carried, row=row)

    def run(self, steps: int) -> float:
        """Seconds a step."""
        self.start_s, self.wait_s = [], []
        torch.cuda.synchronize()
        begun, ticket = time.perf_counter(), None
        for step in range(steps):
            self.length += 1
            parts = [self._part(i, self.length - 1, i if step else None) for i in range(len(self.caches))]
            before, at = ticket, time.perf_counter()
            ticket = self.executor.start(parts)
            self.start_s.append(time.perf_counter() - at)
            if before is not None:
                self.keep(before.wait())
                self.wait_s.append(time.perf_counter() - at - self.start_s[-1])
        assert ticket is not None
        self.keep(ticket.wait())
        return (time.perf_counter() - begun) / steps

    def check(self, model: Model) -> bool:
        """Whether some sequences, computed in one pass each without graphs, have the same fingerprints."""
        for i in {0, len(self.tokens) // 2, len(self.tokens) - 1}:
            tokens = self.tokens[i][:-1]
            cache = model.new_cache(len(tokens))
            logits = model.forward([Chunk(cache=cache, start=0, tokens=tokens, logits=len(self.marks[i]))])
            if fingerprint.encode(fingerprint.fingerprint(logits, model.vocab)) != self.marks[i]:
                return False
        return True

    def close(self, model: Model) -> None:
        for i, blocks in enumerate(self.blocks):
            self.executor.forget(i)
            model.blocks.give(blocks)


def milliseconds(work: Callable[[], object], count: int = 20) -> float:
    """Median over `count` calls, timed by events."""
    work()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def kernels(work: Callable[[], object], count: int = 3) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each kernel in one call, the dearest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            work()
        torch.cuda.synchronize()
    found = {
        event.key: (event.count // count, event.device_time_total / count / 1e3) for event in recorded.key_averages()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:14])


def targets(model: Model) -> None:
    """Decoding steps for several values of batch.TARGET and contexts, each with graphs of its own."""
    for target in (128, 256, 512, 1024, 2048):
        batching.TARGET = target
        executor = GraphExecutor(model, warm=False)
        for count, steps in ((1, 24), (16, 24), (64, 24), (256, 16)):
            batch = Batch(executor, model, count, KINDS["greedy"])
            batch.run(4)
            step = batch.run(steps)
            keys = [key for key in executor._graphs if key[0] == count]
            print(
                f"target {target} rows {count} context {batch.length}: {step * 1e3:.3f} ms, graphs {keys}", flush=True
            )
            batch.close(model)
        executor.close()
        del executor, batch
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    device = torch.device("cuda", 0)
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begun:5.1f}] {text}", flush=True)

    model = Model(artefact(QWEN3_8B, device), "cuda:0")
    say(f"model: {torch.cuda.memory_allocated() >> 20} MiB")
    blocks = plan_memory(model)
    say(f"plan_memory: {blocks} blocks, {blocks * model.block_bytes >> 20} MiB")
    model.size_pool(blocks)
    if sys.argv[1:] == ["targets"]:
        targets(model)
        return
    executor = GraphExecutor(model, warm=False)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "blocks": blocks, "steps": {}}
    for count in BATCHES:
        for params in KINDS.values() if count == BATCHES[-1] else [KINDS["greedy"]]:
            batch = Batch(executor, model, count, params)
            batch.run(3)
            batch.close(model)
        say(f"compiled for {count}")
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists() and time.perf_counter() - begun < 60:
        time.sleep(0.2)
    for count in BATCHES:
        for kind, params in KINDS.items():
            if count != BATCHES[-1] and kind != "greedy":
                continue
            batch = Batch(executor, model, count, params)
            batch.run(STEPS // 2)
            batch.run(STEPS // 2)
            step = batch.run(STEPS)
            figures = found["steps"][f"{count} {kind}"] = {
                "step_ms": step * 1e3,
                "start_ms": median(batch.start_s) * 1e3,
                "wait_ms": median(batch.wait_s) * 1e3,
            }
            say(f"{count} {kind}: {figures}")
            if kind in ("greedy", "penalties"):
                say(f"the same in one pass: {batch.check(model)}")
            batch.close(model)
        _parts_of_a_step(executor, model, count, found)
    say(f"graphs {sorted(executor._graphs)} memory {torch.cuda.mem_get_info()[0] >> 20} MiB free")
    begun_warm = time.perf_counter()
    executor.warm()
    say(f"warm: {time.perf_counter() - begun_warm:.1f} s, {torch.cuda.mem_get_info()[0] >> 20} MiB free")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["steps"].items():
        print(f"{name:24s}", *(f"{key[:-3]} {value:6.3f}" for key, value in row.items()))
    for count in BATCHES:
        print(count, {k: round(v, 3) for k, v in found[f"parts {count}"].items()})
    for name, (launches, ms) in found["kernels 256"].items():
        print(f"{launches:4d} {ms:7.3f} {name[:90]}")


def _parts_of_a_step(executor: GraphExecutor, model: Model, count: int, found: dict[str, Any]) -> None:
    """The graph that served the last steps, and everything behind it, alone; on whatever the buffers hold."""
    shape = max((key for key in executor._graphs if key[0] >= count), key=lambda key: (-key[0], key[1]))
    graph = executor._graphs[shape].graph
    assert graph is not None
    logits, scratch = executor._logits[:count], executor._scratch
    parts = found[f"parts {count}"] = {"graph": milliseconds(graph.replay)}
    with flags.using(executor._word):
        for kind, params in KINDS.items():
            fields = cuda_settings([params] * count, range(count), model.vocab).cuda()
            greedy = params.temperature == 0.0

            def tail(fields: torch.Tensor = fields, greedy: bool = greedy) -> None:
                sampler.draw(logits, fields, None, None, scratch, greedy=greedy)

            parts[kind] = milliseconds(tail)
        found[f"kernels {count}"] = kernels(lambda: (graph.replay(), tail()))


if __name__ == "__main__":
    main()
