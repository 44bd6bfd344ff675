"""The ways to run the model that bench/gpu_engine.py compares, and the hardware's own speed; see there."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch

import stepprofile
from benchlib import say
from bf16path import Bf16Executor, Weights
from countermark_appliance.engine.audit import Recording, audit_all
from countermark_appliance.engine.blocks import Blocks
from countermark_appliance.engine.engine import STEP_TOKENS
from countermark_appliance.engine.executor import make_executor
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.replay import STEP_TOKENS as AUDIT_STEP_TOKENS
from countermark_appliance.engine.sampling import ResolvedSampling, resolve_sampling
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels.cache import BLOCK, KvCache
from generated import Shape, artefact
from serving import Decoding, Heard, Serving, rates_of, windows

HEAT = {"temperature": 0.8, "top_p": 0.95}
GREEDY: dict[str, float] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much of what is measured."""

    batches: tuple[int, ...]
    prompt: int
    tokens: int
    context: int
    context_batches: tuple[int, ...]
    prefills: int
    audit: tuple[int, int]
    audits: int
    rounds: int
    repeats: int
    square: int  # the products that limits come from


FULL = Amounts(
    batches=(1, 16, 64, 256), prompt=128, tokens=128, context=2048, context_batches=(16, 64), prefills=16,
    audit=(1024, 1024), audits=16, rounds=3, repeats=7, square=8192,
)  # fmt: skip
SMALL = Amounts(
    batches=(1, 3), prompt=40, tokens=40, context=150, context_batches=(3,), prefills=3, audit=(70, 30), audits=3,
    rounds=1, repeats=2, square=256,
)  # fmt: skip


class Way(Protocol):
    """One way to run the model. A part gives its figures for the JSON, or None where the path has no such thing."""

    def part(self, name: str) -> dict[str, Any] | None: ...

    def close(self) -> None: ...


class Engined(ABC):
    """What the two paths through the engine have in common."""

    def __init__(self, shape: Shape, device: torch.device, size: Amounts) -> None:
        self.shape, self.device, self.size = shape, device, size
        self.tokenizer = Tokenizer(artefact(shape, device).tokenizer_json, vocab=shape.vocab)

    @abstractmethod
    def serving(
        self, sequences: int, tokens: int, sampling: ResolvedSampling
    ) -> contextlib.AbstractContextManager[Serving]:
        """A context: a `Serving` with room for so many sequences of so many tokens."""

    @abstractmethod
    def caches(self, sequences: int, tokens: int) -> contextlib.AbstractContextManager[list[KvCache]]:
        """A context: caches for the executor alone."""

    def part(self, name: str) -> dict[str, Any] | None:
        z = self.size
        match name:
            case "decode":
                return self._decode(z.batches, z.prompt, GREEDY)
            case "sampled":
                return self._decode(z.batches, z.prompt, HEAT)
            case "context":
                return self._decode(z.context_batches, z.context, GREEDY)
            case "prefill":
                return self._prefill()
            case "ttft":
                return self._ttft()
            case "audit":
                return self._audit()
            case "profile":
                return self._profile()
        return None

    def sampling(self, heat: dict[str, float]) -> ResolvedSampling:
        return resolve_sampling(vocab=self.shape.vocab, seed=11, **heat)  # type: ignore[arg-type]

    def _decode(self, batches: Sequence[int], prompt: int, heat: dict[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        z, sampling = self.size, self.sampling(heat)
        for batch in batches:
            with self.serving(batch, prompt + z.tokens, sampling) as serving:
                rates = []
                for turn in range(z.rounds + 1):  # the first makes what the others find made
                    _, heard = serving.run(serving.prompts(batch, prompt, self.shape.vocab), z.tokens, sampling)
                    rates += windows(heard) if turn else []
            found[str(batch)] = rates_of(rates)
            say(f"    batch {batch}: {found[str(batch)]['tokens_per_second']:.0f} tokens/s")
        return found

    def _first_tokens(self, count: int) -> float:
        """Median seconds from the first `submit` to the last first token of `count` prompts."""
        z, sampling = self.size, self.sampling(GREEDY)
        with self.serving(count, z.context + 1, sampling) as serving:
            seconds = []
            for turn in range(z.repeats + 1):
                begun, heard = serving.run(serving.prompts(count, z.context, self.shape.vocab), 1, sampling)
                seconds += [max(h.times[0] for h in heard) - begun] if turn else []
        return statistics.median(seconds)

    def _prefill(self) -> dict[str, Any]:
        count, seconds = self.size.prefills, self._first_tokens(self.size.prefills)
        return {"tokens_per_second": count * self.size.context / seconds, "seconds": seconds}

    def _ttft(self) -> dict[str, Any]:
        return {"ms": 1e3 * self._first_tokens(1)}

    def _audit(self) -> dict[str, Any] | None:
        return None

    def _profile(self) -> dict[str, Any]:
        z, sampling = self.size, self.sampling(GREEDY)
        count = min(10, z.tokens // 3)
        found: dict[str, Any] = {}
        for batch in z.batches:
            tokens = z.prompt + z.tokens
            with self.serving(batch, tokens, sampling) as serving, self.caches(batch, tokens) as caches:
                prompts = serving.prompts(batch, z.prompt, self.shape.vocab)
                decoding = Decoding(serving, caches, prompts, sampling)
                found[f"decode {batch}"] = stepprofile.steps(decoding.step, count)
                decoding.settle()
        for batch in (1, min(z.prefills, STEP_TOKENS[self.device.type][0] // z.context)):
            tokens = z.context + 1
            with self.serving(batch, tokens, sampling) as serving, self.caches(batch, tokens) as caches:
                prompts = serving.prompts(batch, z.context, self.shape.vocab)
                make = partial(Decoding, serving, caches, prompts, sampling)
                found[f"prefill {batch} x {z.context}"] = stepprofile.steps(make, 3)
        return found

    @abstractmethod
    def close(self) -> None:
        """Let go of the device's memory."""


class Exact(Engined):
    """Ours. One executor for all parts: what it serves is not known beforehand."""

    def __init__(self, shape: Shape, device: torch.device, size: Amounts) -> None:
        super().__init__(shape, device, size)
        self.model = Model(artefact(shape, device), str(device))
        needs = [(n, size.prompt + size.tokens) for n in size.batches]
        needs += [(n, size.context + size.tokens) for n in (*size.context_batches, size.prefills)]
        needs += [(size.audits, sum(size.audit))]
        blocks = max(n * (-(-tokens // BLOCK) + 1) for n, tokens in needs)
        self.model.size_pool(1 + blocks + blocks // 8)
        self._serving: Serving | None = None

    @contextlib.contextmanager
    def serving(self, sequences: int, tokens: int, sampling: ResolvedSampling) -> Iterator[Serving]:
        if self._serving is None:
            begun = time.perf_counter()
            self._serving = Serving(
                make_executor(self.model),
                self.model.blocks,
                lambda numbers: KvCache(self.model.pool, numbers),
                self.tokenizer,
                sequences=max(*self.size.batches, self.size.prefills, self.size.audits),
                device=self.device.type,
            )
            say(f"    executor made in {time.perf_counter() - begun:.1f} s")
        try:
            yield self._serving
        except Exception:
            if self._serving.executor.trouble:  # its state is nobody's to know: the next part begins with another
                broken, self._serving = self._serving, None
                threading.Thread(target=broken.close, daemon=True).start()
            raise

    @contextlib.contextmanager
    def caches(self, sequences: int, tokens: int) -> Iterator[list[KvCache]]:
        made = [self.model.new_cache(tokens) for _ in range(sequences)]
        try:
            yield list(made)
        finally:
            for cache in made:
                cache.close()

    def _audit(self) -> dict[str, Any]:
        z, sampling = self.size, self.sampling(HEAT)
        prompt, tokens = z.audit
        step_tokens = AUDIT_STEP_TOKENS[self.device.type]
        with self.serving(z.audits, prompt + tokens, sampling) as serving:
            alone = serving.prompts(1, prompt, self.shape.vocab)
            generate = float("inf")
            for _ in range(2):  # the first may find something to make
                begun, (answer,) = serving.run(alone, tokens, sampling)
                generate = min(generate, answer.times[-1] - begun)
            many = serving.prompts(z.audits, prompt, self.shape.vocab)
            begun, answers = serving.run(many, tokens, sampling)
            generate_many = max(h.times[-1] for h in answers) - begun
            seconds = [self._audited(alone, [answer], sampling, step_tokens) for _ in range(4)][1:]
            seconds_many = [self._audited(many, answers, sampling, step_tokens) for _ in range(2)]
            step = stepprofile.steps(partial(self._audited, alone, [answer], sampling, step_tokens), 1)
        one, batch = statistics.median(seconds), min(seconds_many)
        return {
            "prompt": prompt,
            "tokens": tokens,
            "generate_s": generate,
            "audit_s": one,
            "times_faster": generate / one,
            "answers": z.audits,
            "answers_generate_s": generate_many,
            "answers_s": batch,
            "answers_per_second": z.audits / batch,
            "tokens_per_second": z.audits * (prompt + tokens) / batch,
            "differences": 0,
            "one": step,
        }

    def _audited(
        self, prompts: Sequence[list[int]], answers: Sequence[Heard], sampling: ResolvedSampling, step_tokens: int
    ) -> float:
        """Seconds to check these answers, each as it was generated. Raises RuntimeError for any difference."""
        recordings = []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            done = answer.done
            assert done is not None
            recordings.append(
                Recording(
                    index=index,
                    tokens=[*prompt, *done.output_tokens],
                    prompt=len(prompt),
                    fingerprints=done.fingerprints,
                    params=sampling.kernel_params(),
                )
            )
        begun = time.perf_counter()
        outcomes = [(r.index, r.outcome) for r in audit_all(self.model, recordings, step_tokens)]
        seconds = time.perf_counter() - begun
        wrong = [(index, outcome) for index, outcome in sorted(outcomes) if outcome is not None]
        if wrong or len(outcomes) != len(answers):
            raise RuntimeError(f"audit: {len(wrong)} of {len(answers)} answers differ, first {wrong[:1]}")
        return seconds

    def close(self) -> None:
        if self._serving is not None:
            self._serving.close()


class Bf16(Engined):
    """The peer of bf16path.py, with an executor of the right size for each measurement, as it keeps fixed places."""

    def __init__(self, shape: Shape, device: torch.device, size: Amounts) -> None:
        super().__init__(shape, device, size)
        begun = time.perf_counter()
        self.weights = Weights(shape, device, compiled=device.type == "cuda")
        say(f"    weights and compilation in {time.perf_counter() - begun:.1f} s, compiled: {self.weights.compiled}")

    @contextlib.contextmanager
    def serving(self, sequences: int, tokens: int, sampling: ResolvedSampling) -> Iterator[Serving]:
        executor = Bf16Executor(self.weights, slots=sequences, tokens=tokens, params=sampling.kernel_params())
        blocks = Blocks(1 + 2 * sequences * (-(-tokens // BLOCK) + 1))  # numbers only: the executor has its own places
        serving = Serving(executor, blocks, _numbers, self.tokenizer, sequences=sequences, device=self.device.type)
        try:
            yield serving
        except Exception:
            threading.Thread(target=serving.close, daemon=True).start()
            raise
        say(f"    attention by length of the keys: {executor.backends or 'torch chooses'}")
        serving.close()

    @contextlib.contextmanager
    def caches(self, sequences: int, tokens: int) -> Iterator[list[KvCache]]:
        yield [_numbers(()) for _ in range(sequences)]

    def close(self) -> None:
        del self.weights


def _numbers(blocks: Sequence[int]) -> KvCache:
    """A table without a pool: the scheduler keeps its numbers in it, and nobody reads them."""
    return KvCache(cast(Any, None), blocks)


class Transformers:
    """`generate` of transformers with SDPA in bfloat16: what most people run."""

    def __init__(self, shape: Shape, device: torch.device, size: Amounts) -> None:
        import transformers

        self.shape, self.device, self.size = shape, device, size
        config = transformers.Qwen3Config(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, max_position_embeddings=shape.context, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self.model: Any = transformers.Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self._criteria = transformers.StoppingCriteriaList

    def part(self, name: str) -> dict[str, Any] | None:
        z = self.size
        match name:
            case "decode":
                return {str(batch): self._rate(batch, z.prompt) for batch in z.batches}
            case "context":
                return {str(batch): self._rate(batch, z.context) for batch in z.context_batches}
            case "prefill":
                seconds = self._first(z.prefills)
                return {"tokens_per_second": z.prefills * z.context / seconds, "seconds": seconds}
            case "ttft":
                return {"ms": 1e3 * self._first(1)}
        return None

    def _generate(self, batch: int, prompt: int, tokens: int) -> tuple[float, list[float]]:
        """When it was asked, and when each step's tokens had been drawn."""
        ids = torch.randint(self.shape.vocab, (batch, prompt), device=self.device)
        times: list[float] = []

        def note(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            ids[0, -1].item()  # the tokens are there
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=self._criteria([note]),
            )
        return begun, times

    def _rate(self, batch: int, prompt: int) -> dict[str, Any]:
        self._generate(batch, prompt, 4)
        _, times = self._generate(batch, prompt, self.size.tokens)
        found = rates_of([batch * rate for rate in windows([Heard(times)])])
        say(f"    batch {batch}: {found['tokens_per_second']:.0f} tokens/s")
        return found

    def _first(self, count: int) -> float:
        seconds = []
        for turn in range(4):
            begun, times = self._generate(count, self.size.context, 1)
            seconds += [times[0] - begun] if turn else []
        return statistics.median(seconds)

    def close(self) -> None:
        pass


class Machine:
    """What the hardware does by itself."""

    def __init__(self, shape: Shape, device: torch.device, size: Amounts) -> None:
        self.device, self.size = device, size

    def part(self, name: str) -> dict[str, Any] | None:
        if name != "limits":
            return None
        n = self.size.square
        generator = torch.Generator(self.device).manual_seed(3)
        a = torch.randn(n, n, device=self.device, generator=generator)
        q = (a * 32).round().clamp(-127, 127).to(torch.int8)
        w = torch.randn(n, n, device=self.device, generator=generator).to(torch.bfloat16)
        source = torch.zeros(4 * n * n, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        a16, operations = a.to(torch.bfloat16), 2 * n**3
        return {
            "copy_bytes_per_second": 2 * source.nbytes / self._seconds(lambda: target.copy_(source)),
            "int8_ops_per_second": operations / self._seconds(lambda: torch._int_mm(q, q.T)),
            "bf16_flops_per_second": operations / self._seconds(lambda: torch.mm(a16, w)),
        }

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of one call: the median of five stretches of calls."""
        cuda = self.device.type == "cuda"
        calls, found = (20 if cuda else 2), []
        for turn in range(6):
            begun = time.perf_counter()
            for _ in range(calls):
                work()
            if cuda:
                torch.cuda.synchronize()
            found += [(time.perf_counter() - begun) / calls] if turn else []
        return statistics.median(found)

    def close(self) -> None:
        pass
