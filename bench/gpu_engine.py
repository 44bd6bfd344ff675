"""The serving engine at the sizes of Qwen3-8B on one GPU, a bf16 path behind the same scheduler, and transformers.

    python bench/gpu_engine.py [--paths exact-v1,bf16,transformers] [--parts decode,prefill,...] [--out FILE]
    python bench/gpu_engine.py --shape tiny --device cpu --out FILE         the same anywhere, to see that it runs

Weights are generated where they are used (generated.py). What is served is the engine itself: requests through its
scheduler and its loop, tokens back as events. Each request's prompt is drawn anew, so that none is found in the cache.

    decode      prompts of 128 tokens, 128 new tokens each, greedy: tokens a second from the moment every answer has
                begun until the first one ends, the median over windows of 16 steps of several runs
    sampled     the same at temperature 0.8 and top-p 0.95
    context     the same as decode behind prompts of 2,048 tokens
    prefill     16 prompts of 2,048 tokens: prompt tokens a second until every first token is out, median
    ttft        one prompt of 2,048 tokens: from `submit` to its first token, median
    audit       1,024 + 1,024 tokens (temperature 0.8, top-p 0.95) checked by teacher-forced passes: against generating
                them at batch 1, the better of two, and the rate over 16 of them; every token and fingerprint has to be
                as generated
    profile     time on the GPU by kind of kernel, of a decode step at each batch and of prefill steps

`limits` is what this GPU's memory and matrix units would allow, by a copy measured in the same run and by the products
of the data sheet (libraries' products, measured too, are slower than some of ours): for decode the bytes of weights,
keys and values, or the products if they take longer; for prefill the products of the linear layers alone. vLLM's
figures come from another run on another GPU of the same kind, which was not equally fast.

A path runs in a process of its own, and a part that fails is reported and left out, so the others go on; FILE is
written after each part, and parts that are asked for are added to what it has of the same device and kernels.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import readme_tables
from benchlib import HERE, say
from countermark_appliance.engine.engine import STEP_TOKENS, cpu_model
from countermark_kernels import PROFILE, kernel_digest
from generated import SHAPES, TINY, Shape
from gpu_paths import FULL, SMALL, Amounts, Bf16, Exact, Machine, Transformers, Way
from serving import Stuck

VLLM = {
    "vLLM fp8": {"decode": {"1": 224, "16": 3433, "64": 11557, "256": 25622}, "prefill": 64860, "ttft_ms": 35},
    "vLLM bf16": {"decode": {"1": 146, "16": 2264, "64": 8000, "256": 20790}, "prefill": 42300, "ttft_ms": 52},
    "vLLM bf16, batch-invariant": {
        "decode": {"1": 65, "16": 832, "64": 3854, "256": 15671}, "prefill": 32770, "ttft_ms": 67,
    },
}  # fmt: skip
VLLM_RUN = {"what": "vLLM 0.20.0, Qwen3-8B shapes, an H100 80GB, 2026-11-22", "bf16_flops_per_second": 759e12}
HOPPER = {"int8": 1979e12, "bf16": 989e12}  # dense products a second, of the data sheet
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": HOPPER, "NVIDIA H200": HOPPER}
PATH_S = 420


PATHS: dict[str, Callable[[Shape, torch.device, Amounts], Way]] = {
    "machine": Machine,
    PROFILE: Exact,
    "bf16": Bf16,
    "transformers": Transformers,
}
PARTS = ("limits", "decode", "sampled", "context", "prefill", "ttft", "audit", "profile")


def limits(shape: Shape, size: Amounts, machine: dict[str, float], device: str) -> dict[str, Any]:
    """What memory and matrix units alone would allow the exact path and the bf16 path.

    A `device` whose data sheet is not here is taken at the measured products.
    """
    measured = {"int8": machine["int8_ops_per_second"], "bf16": machine["bf16_flops_per_second"]}
    products = DATA_SHEETS.get(device, measured)
    memory, values = machine["copy_bytes_per_second"], shape.linear_values + shape.head_values
    found = {}
    for name, value_bytes, scale_bytes, rate in (
        (PROFILE, 1, 4, products["int8"]),
        ("bf16", 2, 0, products["bf16"]),
    ):
        kv_bytes, half, seconds = (
            shape.kv_bytes(value_bytes, scale_bytes),
            size.tokens / 2,
            2 * shape.linear_values / rate,
        )
        rates = {
            (prompt, n): n
            / max((values * value_bytes + n * (prompt + half) * kv_bytes) / memory, 2 * n * values / rate)
            for prompt, batches in ((size.prompt, size.batches), (size.context, size.context_batches))
            for n in batches
        }
        found[name] = {
            "decode": {str(n): rates[size.prompt, n] for n in size.batches},
            "context": {str(n): rates[size.context, n] for n in size.context_batches},
            "prefill": 1 / seconds,
            "products_per_second": rate,
            "ttft_ms": 1e3 * size.context * seconds,
        }
    return found


def sizes(args: argparse.Namespace) -> tuple[Shape, Amounts]:
    return SHAPES[args.shape], SMALL if args.shape == TINY.name else FULL


def measure(path: str, parts: Sequence[str], args: argparse.Namespace, book: Book) -> None:
    """Every part of one path, in this process."""
    begun = time.perf_counter()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    shape, size = sizes(args)
    for gone in ("start", "process"):
        book.begin(path, gone)
    try:
        running = PATHS[path](shape, device, size)
    except ModuleNotFoundError as err:
        if err.name != path:
            raise
        say(f"{path}: left out, not installed")
        return
    except Exception:  # noqa: BLE001  reported, and the others go on
        book.failed(path, "start", traceback.format_exc())
        return
    say(f"{path}: ready after {time.perf_counter() - begun:.1f} s")
    for part in parts:
        begun = time.perf_counter()
        book.begin(path, part)
        try:
            found = running.part(part)
        except Exception as err:  # noqa: BLE001  reported, and the others go on
            book.failed(path, part, traceback.format_exc())
            if isinstance(err, Stuck):  # nor would this process end in peace
                os._exit(1)
            continue
        if found is not None:
            seconds = time.perf_counter() - begun
            book.found(path, part, found)
            say(f"{path}: {part} in {seconds:.1f} s")
    running.close()


class Book:
    """The result file: what has been found and what has failed, written after every part."""

    def __init__(self, file: Path, args: argparse.Namespace, *, fresh: bool) -> None:
        self._file = file
        self._shape, self._size = shape, size = sizes(args)
        self.result: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            **_device(args.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                **{name: _version(name) for name in ("triton", "transformers")},
            },
            "profile": PROFILE,
            "kernel_digest": kernel_digest().hex(),
            "shape": {"name": shape.name, **{k: getattr(shape, k) for k in shape.__slots__ if k != "name"}},
            "protocol": {k: getattr(size, k) for k in size.__slots__} | {"step_tokens": STEP_TOKENS[args.device]},
            "found": {},
            "failed": {},
            "another_run": {**VLLM_RUN, "rows": VLLM},
        }
        same = ("device", "kernel_digest", "versions", "shape", "protocol")
        if not fresh and file.exists():
            before = json.loads(file.read_text())
            other = [key for key in same if before[key] != json.loads(json.dumps(self.result[key]))]
            if other:
                say(f"{file}: has another {', '.join(other)}: begun anew")
            else:
                self.result["found"], self.result["failed"] = before["found"], before["failed"]
        self._limit()

    def begin(self, path: str, part: str) -> None:
        """Forget what an earlier run said of it."""
        self.result["failed"].pop(f"{path} {part}", None)
        self.result["found"].get(path, {}).pop(part, None)

    def found(self, path: str, part: str, figures: dict[str, Any]) -> None:
        self.result["found"].setdefault(path, {})[part] = figures
        self.write()

    def failed(self, path: str, part: str, why: str) -> None:
        say(f"{path}: {part} FAILED\n{why}")
        self.result["failed"][f"{path} {part}"] = why[-6000:]
        self.write()

    def write(self) -> None:
        self._limit()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.result, indent=1) + "\n")

    def _limit(self) -> None:
        machine = self.result["found"].get("machine", {}).get("limits")
        self.result["limits"] = limits(self._shape, self._size, machine, self.result["device"]) if machine else {}


def _device(device: str) -> dict[str, str]:
    if device != "cuda":
        return {"device": cpu_model(), "driver": ""}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": torch.cuda.get_device_name(0), "driver": driver}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--paths", default=",".join(PATHS), help=f"of {', '.join(PATHS)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu-engine.json")
    parser.add_argument("--here", action="store_true", help="all paths in this process")
    args = parser.parse_args(argv)
    paths, parts = args.paths.split(","), args.parts.split(",")
    if not (set(paths) <= set(PATHS) and set(parts) <= set(PARTS)):
        parser.error(f"paths: of {', '.join(PATHS)}; parts: of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: expected a GPU, found none; --shape tiny --device cpu shows that it runs")
    everything = set(paths) == set(PATHS) and set(parts) == set(PARTS)
    book = Book(args.out, args, fresh=everything)
    if args.here or len(paths) == 1:
        for path in paths:
            measure(path, parts, args, book)
    else:
        book.write()
        for path in paths:  # each with the whole GPU, and none with another's broken state
            own = ["--paths", path, "--parts", args.parts, "--out", str(args.out)]
            command = [sys.executable, __file__, "--shape", args.shape, "--device", args.device, *own, "--here"]
            try:
                code = subprocess.run(command, check=False, timeout=PATH_S, stdout=subprocess.DEVNULL).returncode
                ended = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                ended = f"not done after {PATH_S} s"
            book = Book(args.out, args, fresh=False)
            if ended and not any(what.startswith(f"{path} ") for what in book.result["failed"]):
                book.failed(path, "process", ended)
    print(readme_tables.engine_table(book.result))
    for what in book.result["failed"]:
        say(f"failed: {what}")
    return 1 if book.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
