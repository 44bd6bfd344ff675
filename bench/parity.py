"""The same bits on every device: digests of whole answers, recorded on a CPU, checked anywhere.

    python bench/parity.py record [MODEL ...]           writes tests/data/parity/exact-v1.json
    python bench/parity.py check [MODEL ...] --device cuda     writes bench/results/parity-<device>.json

Models: SmolLM2-135M and the generated ones of paritymodels.py; cases: paritycases.py. For each case BLAKE3 of every
position's logits (those of the prompt, then those of the generated tokens), of the token ids and of the fingerprints.
`record` runs prompt by prompt on one CPU, in pieces of 512, then token by token; `check` runs ragged batches in which
prompts in pieces of random length and single tokens of other answers share each step. So a match also says that
neither batch nor chunking matters. Both build the artefacts from their sources: a match says that builds agree too.
`check` also runs a mutant, whose norm adds its squares up in binary32 instead of as integers, and beside it the same
detour with the integer sum: the digests must tell the one from the record and not the other. Exit 1 on any difference,
or a mutant that passes.

`record` leaves models that the file already has: to record again, delete it. Nothing is timed to compare: the seconds
include hashing and, on a GPU, compiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from blake3 import blake3
from torch import Tensor

from benchlib import HERE, built_weights, say
from countermark_appliance.engine import weights
from countermark_appliance.engine.draw import Row, draw
from countermark_appliance.engine.engine import cpu_model
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels import PROFILE, decoder, ieee, kernel_digest, launch, norm
from countermark_kernels.attention import Span
from countermark_kernels.fingerprint import encode, fingerprint
from paritycases import Case, Draw, cases
from paritymodels import RECIPES, built

RECORDED = HERE.parent / "tests" / "data" / "parity" / f"{PROFILE}.json"
RESULTS = HERE / "results"
STAND_IN = "smollm2-135m"
DIGEST_BYTES = 16
ALONE_ROWS = 512
SEATS, ROWS, PIECE = 24, 2048, 1500  # answers at a time, rows a step, a prompt's tokens a step
MUTANT_MODEL, MUTANT_CASES = RECIPES[0].name, 40
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What one case came to. The digests are hexadecimal and cut to 16 bytes."""

    prompt: int
    tokens: int
    logits: str
    ids: str
    fingerprints: str

    def line(self) -> str:
        return f"{self.prompt} {self.tokens} {self.logits} {self.ids} {self.fingerprints}"

    @classmethod
    def parse(cls, line: str) -> Digests:
        prompt, tokens, logits, ids, fingerprints = line.split(" ")
        return cls(prompt=int(prompt), tokens=int(tokens), logits=logits, ids=ids, fingerprints=fingerprints)

    def differs(self, other: Digests) -> list[str]:
        """Which of the fields differ."""
        return [name for name in self.__slots__ if getattr(self, name) != getattr(other, name)]


class Answer:
    """One case on its way: the tokens so far, how many of them have been run, and the hash of their logits."""

    def __init__(self, case: Case, model: Model) -> None:
        self.case = case
        self.ids = list(case.prompt)
        self.marks: list[bytes] = []
        self.done = 0
        self._cache = model.new_cache(len(case.prompt) + case.tokens)
        self._hash = blake3(max_threads=blake3.AUTO)

    def chunk(self, most: int) -> Chunk:
        """The next at most `most` tokens, the logits of all of them wanted."""
        tokens = self.ids[self.done : self.done + most]
        return Chunk(cache=self._cache, start=self.done, tokens=tokens, logits=len(tokens))

    def hear(self, logits: Tensor) -> bool:
        """Take the logits of the chunk just run (on the host); whether the next token is to be drawn from the last."""
        self._hash.update(logits.contiguous().numpy().data.cast("B"))
        self.done += logits.shape[0]
        return self.done == len(self.ids)

    @property
    def row(self) -> Row:
        return Row(params=self.case.params, tokens=self.ids, prompt=len(self.case.prompt), length=len(self.ids))

    def push(self, token: int, mark: bytes) -> bool:
        """Take the drawn token; whether the answer is complete."""
        self.ids.append(token)
        self.marks.append(mark)
        return len(self.marks) == self.case.tokens

    def digests(self) -> Digests:
        made = self.ids[len(self.case.prompt) :]
        return Digests(
            prompt=len(self.case.prompt),
            tokens=len(made),
            logits=self._hash.hexdigest()[: 2 * DIGEST_BYTES],
            ids=_digest(b"".join(token.to_bytes(4, "little") for token in made)),
            fingerprints=_digest(b"".join(self.marks)),
        )


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()[: 2 * DIGEST_BYTES]


Drawing = Callable[[Tensor, Sequence[Row]], tuple[list[int], list[bytes]]]


def draw_on_host(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bytes]]:
    """engine.draw with the tokens drawn by the CPU's sampler; the fingerprints stay on the logits' device."""
    return draw(logits.cpu(), rows)[0], encode(fingerprint(logits, logits.shape[1]))


DRAWING: dict[str, Drawing] = {"device": draw, "host": draw_on_host}


def run(model: Model, asked: Sequence[Case], crowd: Draw | None = None, drawing_by: Drawing = draw) -> list[Digests]:
    """All cases, one after the other; or many at a time, prompts in pieces of lengths that `crowd` draws."""
    seats, rows = (1, ALONE_ROWS) if crowd is None else (SEATS, ROWS)
    found: dict[int, Digests] = {}
    waiting = list(enumerate(asked))[::-1]
    active: list[tuple[int, Answer]] = []
    while waiting or active:
        while waiting and len(active) < seats:
            index, case = waiting.pop()
            active.append((index, Answer(case, model)))
        active = active[1:] + active[:1]  # everyone is first at some time, so nobody starves
        room, step, chunks = rows, [], []
        for index, answer in active:
            piece = room if crowd is None else min(room, crowd.octave(PIECE))
            if piece:
                chunk = answer.chunk(piece)
                room -= len(chunk.tokens)
                step.append((index, answer))
                chunks.append(chunk)
        logits = model.forward(chunks)
        host = logits.cpu()
        at, drawing, last = 0, [], []
        for (index, answer), chunk in zip(step, chunks, strict=True):
            if answer.hear(host[at : at + chunk.logits]):
                drawing.append((index, answer))
                last.append(at + chunk.logits - 1)
            at += chunk.logits
        if not drawing:
            continue
        wanted = logits[torch.tensor(last, device=logits.device)]
        for (index, answer), token, mark in zip(drawing, *drawing_by(wanted, [a.row for _, a in drawing]), strict=True):
            if answer.push(token, mark):
                found[index] = answer.digests()
                active.remove((index, answer))
    return [found[i] for i in range(len(asked))]


def stand_in_cases(artefact: weights.Artefact) -> list[Case]:
    text = (HERE / "data" / "prose.txt").read_text()
    ids = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab).encode(text)
    return cases(vocab=artefact.config.vocab, context=artefact.config.context, text=ids)


@contextmanager
def opened(name: str) -> Iterator[tuple[weights.Artefact, list[Case]]]:
    """A model by its name, built from its source, and its cases."""
    if name == STAND_IN:
        artefact = weights.load(built_weights())
        yield artefact, stand_in_cases(artefact)
        return
    (recipe,) = (r for r in RECIPES if r.name == name)
    with built(recipe) as artefact:
        yield artefact, cases(vocab=artefact.config.vocab, context=artefact.config.context)


def asked_digest(asked: Sequence[Case]) -> str:
    """Of prompts, lengths and settings: says that two machines asked the same."""
    return _digest(json.dumps([dataclasses.asdict(case) for case in asked], sort_keys=True).encode())


def integer_sum(z: Tensor) -> Tensor:
    """Of the squares, as the profile has it."""
    z = z.to(torch.int64)
    return ieee.to_f32((z * z).sum(dim=-1, dtype=torch.int64))


def float_sum(z: Tensor) -> Tensor:
    """The mutant: of the squares, in binary32 and therefore in some order."""
    return (z * z).sum(dim=-1)


@contextmanager
def detour(sum_of_squares: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, every model runs op by op, the norm with this sum."""

    def norm_quantise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, _ = norm.norm_quantise(x, eps)
        amax = ieee.amax(x)
        e = ieee.exponent(amax)
        z = ieee.rint(x * ieee.pow2(14 - e).unsqueeze(-1))
        mean = ieee.div(sum_of_squares(z), ieee.constant(float(x.shape[-1]), x)) * ieee.pow2(2 * e - 28)
        r = ieee.div(ieee.constant(1.0, x), ieee.sqrt(mean + eps))
        return q, ieee.div(amax, ieee.constant(127.0, x)) * r

    def forward(self: decoder.Decoder, x: Tensor, spans: Sequence[Span]) -> Tensor:
        positions = [torch.arange(s.position, s.position + s.end - s.start, dtype=torch.int32) for s in spans]
        return self.stepwise(x, spans, torch.cat(positions).to(x.device))

    with patch.object(decoder, "norm_quantise", norm_quantise), patch.object(decoder.Decoder, "forward", forward):
        yield


def environment(device: str) -> dict[str, object]:
    """What computed."""
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kernel_digest": kernel_digest().hex(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cpu":
        report = launch.self_test()
        return {"device": cpu_model(), "backend": report.backend, "isa": report.isa, "threads": report.threads} | found
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    } | found


def record(names: Sequence[str]) -> None:
    """Run the models that the file does not have yet; write it after each."""
    data: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"profile": PROFILE, "models": {}}
    if data["profile"] != PROFILE:
        raise SystemExit(f"{RECORDED.name}: expected profile {PROFILE}, got {data['profile']}")
    launch.set_threads(len(os.sched_getaffinity(0)))
    for name in names:
        if name in data["models"]:
            say(f"{name}: recorded already")
            continue
        begun = time.perf_counter()
        with opened(name) as (artefact, asked):
            found = run(Model(artefact), asked)
            data["models"][name] = {
                "weights_root": artefact.weights_root.hex(),
                "asked": asked_digest(asked),
                "recorded": environment("cpu"),
                "cases": [digests.line() for digests in found],
            }
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        RECORDED.write_text(json.dumps(data, indent=1) + "\n")
        say(f"{name}: {len(found)} cases in {time.perf_counter() - begun:.0f} s")


def compare(recorded: Sequence[str], found: Sequence[Digests]) -> list[dict[str, object]]:
    """The cases that are not as recorded: which, how long, and what of them differs."""
    pairs = ((Digests.parse(line), digests) for line, digests in zip(recorded, found, strict=True))
    return [
        {"case": i, "prompt": new.prompt, "differs": old.differs(new)}
        for i, (old, new) in enumerate(pairs)
        if old != new
    ]


def check(names: Sequence[str], device: str, drawn_on: str = "device") -> bool:
    """Compare this machine with the file; write what was found after each model. Whether all is as it should be.

    Where only some models are asked for, what this machine wrote about the others, by the same kernels, stays.
    """
    data = json.loads(RECORDED.read_text())
    if data["profile"] != PROFILE:
        raise SystemExit(f"{RECORDED.name}: expected profile {PROFILE}, got {data['profile']}")
    where = environment(device)
    out = RESULTS / f"parity-{str(where['device']).lower().replace(' ', '-')}.json"
    made: dict[str, Any] = {"profile": PROFILE, "environment": where, "drawn_on": drawn_on}
    result: dict[str, Any] = {**made, "models": {}, "mutant": {}}
    if out.exists() and len(names) < len(data["models"]):
        before = json.loads(out.read_text())
        result = before if all(before[key] == made[key] for key in made) else result
    good = True
    for name in names:
        recorded = data["models"][name]
        with opened(name) as (artefact, asked):
            begun = time.perf_counter()
            model = Model(artefact, device)
            found = run(model, asked, Draw(1), DRAWING[drawn_on])
            different = compare(recorded["cases"], found)
            result["models"][name] = entry = {
                "weights_root": artefact.weights_root.hex(),
                "weights_root_equal": recorded["weights_root"] == artefact.weights_root.hex(),
                "asked_equal": recorded["asked"] == asked_digest(asked),
                "prompts": len(found),
                "positions": sum(d.prompt + d.tokens - 1 for d in found),
                "tokens_generated": sum(d.tokens for d in found),
                "mismatches": len(different),
                "different": different[:SHOWN],
                "seconds": round(time.perf_counter() - begun),
            }
            good = good and entry["weights_root_equal"] and entry["asked_equal"] and not different
            if name == MUTANT_MODEL:
                mutant: dict[str, Any] = {"model": name, "cases": MUTANT_CASES}
                result["mutant"] = mutant
                for total in (integer_sum, float_sum):
                    with detour(total):
                        found = run(model, asked[:MUTANT_CASES], Draw(1), DRAWING[drawn_on])
                    mutant[f"differ_with_{total.__name__}"] = len(compare(recorded["cases"][:MUTANT_CASES], found))
                good = good and mutant["differ_with_integer_sum"] == 0 < mutant["differ_with_float_sum"]
        out.write_text(json.dumps(result, indent=1) + "\n")
        say(f"{name}: {entry}")
    print(out.read_text())
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [*(recipe.name for recipe in RECIPES), STAND_IN]
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"some of: {', '.join(every)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--draw", choices=tuple(DRAWING), default="device", help="where the tokens are drawn from the device's logits"
    )
    args = parser.parse_args()
    names = [name for name in every if name in (args.models or every)]
    if args.what == "record":
        record(names)
        return 0
    return 0 if check(names, args.device, args.draw) else 1


if __name__ == "__main__":
    sys.exit(main())
