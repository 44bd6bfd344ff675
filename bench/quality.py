"""What the exact profile costs in quality: SmolLM2-135M against the same file in fp32, over public-domain prose.

    python bench/quality.py [--windows N]

The fp32 model is transformers' own reading of the GGUF file (de-quantised); beside ours stands the same in bf16, its
products of bf16 matrices summed in binary32 and rounded once, as the hardware for it does (few CPUs have any). Ours is
the artefact of that file on the whole integer path, three times: with its own signs of the rotation and with two
other seeds, because every rotation rounds differently and one draw says little. Windows of 1,024 tokens, each within
one of the texts of bench/data: perplexity, KL(fp32 || other) in nats and top-1 agreement, means over all positions.

What is done lies in build/quality, one file a run: a stopped measurement goes on where it was. At the end the result
is written to bench/results/quality-cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchlib import CACHE, HERE, built_weights, machine, reference_model, say
from countermark_appliance.engine import weights
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights.build import _tensors, open_source
from countermark_appliance.engine.weights.fold import Folder
from countermark_appliance.engine.weights.parallel import single_threaded_torch
from countermark_appliance.engine.weights.rotation import signs
from countermark_kernels import PROFILE, binding, kernel_digest, launch

WINDOW = 1024
ROWS = 128  # logits in double precision held at a time
PROSE = HERE / "data" / "prose.txt"
TEXTS = ("prose", "as-you-like-it", "opticks", "moby-dick", "addresses")
PARTIAL = CACHE.parent / "quality"
OTHER_SEEDS = (1, 2)
T_SEEDS, T_WINDOWS = 4.303, 2.0  # Student's t, 97.5 %: 2 degrees of freedom, and 60 or more

Forward = Callable[[list[int]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What one window adds up to. `scored`: positions whose next token is in the window."""

    tokens: int
    scored: int
    kl: float
    agree: int
    nll: float
    nll_reference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    tokens: int
    perplexity_fp32: float
    perplexity: float
    perplexity_percent: float
    kl: float
    top1: float


def compare(reference: Tensor, logits: Tensor, ids: list[int]) -> Sums:
    """The reference's log-probabilities (binary64) and a model's logits over the window `ids`: [window, vocab]."""
    kl = nll = nll_reference = 0.0
    agree = 0
    for first in range(0, len(ids), ROWS):
        p = reference[first : first + ROWS]
        q = logits[first : first + ROWS].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        following = torch.tensor(ids[first + 1 : first + ROWS + 1])
        rows = torch.arange(len(following))
        nll_reference -= float(p[rows, following].sum())
        nll -= float(q[rows, following].sum())
    return Sums(tokens=len(ids), scored=len(ids) - 1, kl=kl, agree=agree, nll=nll, nll_reference=nll_reference)


def summary(windows: Sequence[Sums]) -> Quality:
    """The means over all windows."""
    tokens, scored = sum(w.tokens for w in windows), sum(w.scored for w in windows)
    nll, nll_reference = sum(w.nll for w in windows) / scored, sum(w.nll_reference for w in windows) / scored
    return Quality(
        tokens=tokens,
        perplexity_fp32=math.exp(nll_reference),
        perplexity=math.exp(nll),
        perplexity_percent=_percent(nll - nll_reference),
        kl=sum(w.kl for w in windows) / tokens,
        top1=sum(w.agree for w in windows) / tokens,
    )


def measure(reference: Any, model: Model, tokens: list[int], *, window: int = WINDOW) -> Quality:
    """Compare next-token distributions over consecutive windows of `tokens`; a last partial window is left out."""
    return summary(
        [compare(log_probabilities(reference, ids), ours(model, ids), ids) for ids in _windows(tokens, window)]
    )


def theirs(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    return theirs(model, ids).double().log_softmax(-1)


def bf16_model() -> Any:
    """transformers in bf16, each linear layer as on a GPU: torch's own on a CPU without bf16 is ten times slower."""
    model = reference_model(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = partial(_bf16_linear, layer.weight.float())  # type: ignore[method-assign]
    return model


def _bf16_linear(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight).to(torch.bfloat16)


def ours(model: Model, ids: list[int]) -> Tensor:
    return model.forward([Chunk(cache=model.new_cache(len(ids)), start=0, tokens=ids, logits=len(ids))])


def with_seed(artefact: weights.Artefact, seed: int) -> weights.Artefact:
    """The same checkpoint under other signs. Only the benchmark does this: an artefact has one rotation."""
    diagonal = signs(replace(artefact.config.rotation, seed=seed))
    with single_threaded_torch():
        folder = Folder(open_source(weights.stand_in_gguf()), artefact.config, diagonal=diagonal)
        tensors = {name: torch.cat(list(blocks)) for name, blocks in _tensors(folder, artefact.config)}
    return replace(artefact, tensors=tensors)


def intervals(seeds: Sequence[Sequence[Sums]]) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % intervals of the mean over seeds: from the scatter of the seeds, and of the windows (seeds averaged)."""
    found = [summary(windows) for windows in seeds]
    by_window = list(zip(*seeds, strict=True))
    loss = [statistics.fmean((w.nll - w.nll_reference) / w.scored for w in same) for same in by_window]
    kl = [statistics.fmean(w.kl / w.tokens for w in same) for same in by_window]
    low, high = _interval(loss, T_WINDOWS)
    return {
        "seeds": {
            "perplexity_percent": _interval([q.perplexity_percent for q in found], T_SEEDS),
            "kl": _interval([q.kl for q in found], T_SEEDS),
        },
        "windows": {"perplexity_percent": (_percent(low), _percent(high)), "kl": _interval(kl, T_WINDOWS)},
    }


def _interval(values: Sequence[float], t: float) -> tuple[float, float]:
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _percent(loss: float) -> float:
    return 100 * math.expm1(loss)


def _windows(tokens: list[int], window: int) -> list[list[int]]:
    return [tokens[start : start + window] for start in range(0, len(tokens) - window + 1, window)]


class Run:
    """One model and what it has been measured on so far, in a file named by all that decides the numbers."""

    def __init__(self, name: str, load: Callable[[], Forward], *decided_by: str) -> None:
        self.name = name
        digest = hashlib.sha256("\n".join((name, *decided_by)).encode()).hexdigest()
        self._path = PARTIAL / f"{digest[:16]}.json"
        self._load = load
        self._forward: Forward | None = None
        self.windows: list[Sums] = []
        if self._path.exists():
            self.windows = [Sums(**window) for window in json.loads(self._path.read_text())]

    def add(self, reference: Tensor, ids: list[int]) -> None:
        """Measure the next window."""
        if self._forward is None:
            self._forward = self._load()
        self.windows.append(compare(reference, self._forward(ids), ids))
        staged = self._path.with_suffix(".new")
        staged.write_text(json.dumps([asdict(window) for window in self.windows]))
        staged.replace(self._path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, help="stop after so many windows, without a result")
    args = parser.parse_args()
    launch.set_threads(torch.get_num_threads())
    launch.self_test()
    PARTIAL.mkdir(parents=True, exist_ok=True)
    directory = built_weights()
    artefact = weights.load(directory)
    tokenizer = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab)
    texts = {name: (HERE / "data" / f"{name}.txt").read_bytes() for name in TEXTS}
    sha256 = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    cut = [(name, ids) for name, text in texts.items() for ids in _windows(tokenizer.encode(text.decode()), WINDOW)]

    def bf16() -> Forward:
        return partial(theirs, bf16_model())

    def exact(seed: int) -> Forward:
        own = seed == artefact.config.rotation.seed
        return partial(ours, Model(artefact if own else with_seed(artefact, seed)))

    source = artefact.config.source.sha256.hex()
    peers = (source, torch.__version__, importlib.metadata.version("transformers"), *sha256.values())
    engine = (directory.name, PROFILE, binding.source_digest(), *sha256.values())
    beside = Run("bf16", bf16, *peers)
    seeds = [artefact.config.rotation.seed, *OTHER_SEEDS]
    exacts = [Run(f"{PROFILE}, seed {seed:#x}", partial(exact, seed), *engine) for seed in seeds]
    fp32: Any = None
    for index, (name, ids) in enumerate(cut[: args.windows]):
        wanted = [run for run in (beside, *exacts) if len(run.windows) == index]
        if wanted:
            fp32 = fp32 or reference_model()
            reference = log_probabilities(fp32, ids)
            for run in wanted:
                run.add(reference, ids)
            sofar = summary(exacts[0].windows)
            say(f"{index + 1}/{len(cut)} {name}: KL {sofar.kl:.5f}, perplexity {sofar.perplexity_percent:+.2f} %")
    if args.windows is not None:
        return 0

    found = [summary(run.windows) for run in exacts]
    where = {name: [i for i, (text, _) in enumerate(cut) if text == name] for name in TEXTS}
    result = {
        "model": artefact.config.name,
        "profile": PROFILE,
        "kernel_digest": kernel_digest().hex(),
        "weights_root": artefact.weights_root.hex(),
        "window": WINDOW,
        "tokens": found[0].tokens,
        "perplexity_fp32": found[0].perplexity_fp32,
        "bf16": _row(summary(beside.windows)),
        "seeds": [{"seed": f"{seed:#x}", **_row(quality)} for seed, quality in zip(seeds, found, strict=True)],
        "mean": _mean(found),
        "interval95": intervals([run.windows for run in exacts]),
        "texts": {
            name: {
                "sha256": sha256[name],
                "tokens": WINDOW * len(at),
                "perplexity_fp32": summary([beside.windows[i] for i in at]).perplexity_fp32,
                "bf16": _row(summary([beside.windows[i] for i in at])),
                "mean": _mean([summary([run.windows[i] for i in at]) for run in exacts]),
            }
            for name, at in where.items()
        },
        "machine": machine(),
    }
    _print(result)
    out = HERE / "results" / "quality-cpu.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _row(quality: Quality) -> dict[str, float]:
    return {name: getattr(quality, name) for name in ("perplexity", "perplexity_percent", "kl", "top1")}


def _mean(found: Sequence[Quality]) -> dict[str, float]:
    rows = [_row(quality) for quality in found]
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _print(result: dict[str, Any]) -> None:
    rows = [("bf16", result["bf16"])]
    rows += [(f"seed {row['seed']}", row) for row in result["seeds"]] + [("mean of the seeds", result["mean"])]
    rows += [(f"bf16, {name}", text["bf16"]) for name, text in result["texts"].items()]
    rows += [(f"mean, {name}", text["mean"]) for name, text in result["texts"].items()]
    print(f"{result['model']}, {result['tokens']} tokens, fp32 perplexity {result['perplexity_fp32']:.3f}")
    for name, row in rows:
        print(f"{name:28s} {row['perplexity_percent']:+.2f} %   KL {row['kl']:.5f}   top-1 {row['top1']:.4f}")
    for name, bounds in result["interval95"].items():
        (low, high), (kl_low, kl_high) = bounds["perplexity_percent"], bounds["kl"]
        print(f"95 % over {name}: perplexity {low:+.2f} to {high:+.2f} %, KL {kl_low:.5f} to {kl_high:.5f}")


if __name__ == "__main__":
    sys.exit(main())
