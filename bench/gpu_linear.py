"""The exact int8 linear layers on one GPU against cuBLAS in bfloat16 and torch._int_mm, at the sizes of Qwen3-8B.

    PYTHONPATH=kernels python bench/gpu_linear.py [--out FILE]

Ours is the whole layer: int8 in, scaled binary32 out; `residual` adds the residual of o and down. bfloat16 is the bare
product into bfloat16, _int_mm the bare product into int32 (it needs more than 16 rows). Two figures for each, medians
in microseconds: `alone`, with other data in the L2 cache; `in_a_row`, 36 layers of distinct weights in one CUDA graph,
divided by 36 (the head: 2). `decode` is all of one step's linear layers in one graph, milliseconds. Weights are
rounded normal values with the largest near 127. Every product is first compared with its integers, scaled by torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from countermark_kernels.gpu import linear, linear_hopper

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "head": (151936, 4096),
}
LAYERS = 36
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
IN_A_ROW = 512
BEHIND = 5_000_000  # cycles that the GPU sleeps before work timed alone, so that the host is ahead of it
DECODE = (1, 16, 64, 256)
HERE = Path(__file__).resolve().parent
Work = Callable[[], object]


class Machine:
    """Inputs and weights on the device, and its clock."""

    def __init__(self) -> None:
        self.random = torch.Generator("cuda").manual_seed(1)
        self.other = torch.zeros(1 << 27, dtype=torch.int32, device="cuda")

    def int8s(self, rows: int, width: int) -> Tensor:
        x = torch.empty(rows, width, dtype=torch.int8, device="cuda")
        for part in x.split(1 << 14):
            part.copy_((torch.randn(part.shape, device="cuda", generator=self.random) * 32).round().clamp(-127, 127))
        return x

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=self.random)

    def alone(self, work: Work, times: int = 11) -> float:
        work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        torch.cuda._sleep(BEHIND)  # type: ignore[no-untyped-call]
        for start, end in pairs:
            self.other.amax()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3

    def graph(self, work: Sequence[Work], times: int = 15) -> float:
        """Microseconds of all of `work`, in order, in one CUDA graph."""
        for one in work[:4]:
            one()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for one in work:
                one()
        graph.replay()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def kernel_of(rows: int, outputs: int) -> str:
    """What linear.product chooses."""
    if rows <= linear.ROWS_MAX:
        return "rows"
    if linear.few(rows, outputs):
        return "tiles"
    tile = linear_hopper.choose(rows, outputs, 132)
    return f"hopper {tile.m}x{tile.n}x{tile.k}"


def equal(q: Tensor, s: Tensor, w: Tensor, ws: Tensor) -> bool:
    """product against torch._int_mm (rows padded to 32) and torch's products of two tensors, by columns."""
    y = linear.product(q, s, w, ws)
    padded = torch.nn.functional.pad(q, (0, 0, 0, max(0, 32 - q.shape[0])))
    for at in range(0, w.shape[0], 1 << 14):
        total = torch._int_mm(padded, w[at : at + (1 << 14)].T)[: q.shape[0]].to(torch.float32)
        if not torch.equal(total * s[:, None] * ws[at : at + (1 << 14)], y[:, at : at + (1 << 14)]):
            return False
    return True


def shapes(m: Machine, w8: dict[str, list[Tensor]], w16: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    found = []
    for name, (outputs, inputs) in SHAPES.items():
        ws = torch.rand(outputs, device="cuda", generator=m.random) * 0.01
        for rows in ROWS:
            q, s = m.int8s(rows, inputs), torch.rand(rows, device="cuda", generator=m.random) * 0.01
            x = q.to(torch.bfloat16)
            extra = m.floats(rows, outputs) if name in {"o", "down"} else None
            work: dict[str, Callable[[int], object]] = {
                "ours": lambda i, q=q, s=s, n=name, ws=ws: linear.product(q, s, w8[n][i], ws),
                "bf16": lambda i, x=x, n=name: torch.mm(x, w16[n][i].T),
            }
            if rows > 16:
                work["int_mm"] = lambda i, q=q, n=name: torch._int_mm(q, w8[n][i].T)
            if extra is not None:
                work["residual"] = lambda i, q=q, s=s, n=name, ws=ws, e=extra: linear.product(
                    q, s, w8[n][i], ws, None, e
                )
            row: dict[str, Any] = {"shape": name, "rows": rows, "kernel": kernel_of(rows, outputs)}
            row["equal"] = equal(q, s, w8[name][0], ws)
            row["alone"] = {k: round(m.alone(partial(f, 0)), 2) for k, f in work.items()}
            if rows <= IN_A_ROW:
                count = LAYERS if name != "head" else 2
                row["in_a_row"] = {
                    k: round(m.graph([partial(f, i % len(w8[name])) for i in range(count)]) / count, 2)
                    for k, f in work.items()
                }
            for metric in ("alone", "in_a_row"):
                if metric in row:
                    row[metric]["ratio"] = round(row[metric]["ours"] / row[metric]["bf16"], 3)
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def decode(m: Machine, w8: dict[str, list[Tensor]], w16: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    found = []
    names = [*("qkv", "o", "gate_up", "down")] * LAYERS + ["head"]
    for rows in DECODE:
        ours: list[Work] = []
        bf16: list[Work] = []
        inputs: dict[str, tuple[Tensor, ...]] = {}
        for name, (n, k) in SHAPES.items():
            q = m.int8s(rows, k)
            inputs[name] = (q, m.floats(rows).abs(), m.floats(n).abs(), m.floats(rows, n), q.to(torch.bfloat16))
        for i, name in enumerate(names):
            q, s, ws, residual, x = inputs[name]
            extra = residual if name in {"o", "down"} else None
            layer = i // 4 if name != "head" else 0
            ours.append(lambda a=(q, s, w8[name][layer], ws, None, extra): linear.product(*a))
            bf16.append(lambda x=x, w=w16[name][layer]: torch.mm(x, w.T))
        row = {"rows": rows, "ours_ms": m.graph(ours) / 1e3, "bf16_ms": m.graph(bf16) / 1e3}
        row["ratio"] = row["ours_ms"] / row["bf16_ms"]
        found.append({k: round(v, 3) for k, v in row.items()})
        print(json.dumps(found[-1]), flush=True)
    return found


def model(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """36 layers and the head from the figures above: milliseconds and the ratio."""
    totals = []
    for metric in ("alone", "in_a_row"):
        for rows in ROWS:
            part = [r for r in found if r["rows"] == rows and metric in r]
            if part:
                ours, bf16 = (
                    sum(r[metric][k] * (1 if r["shape"] == "head" else LAYERS) for r in part) / 1e3
                    for k in ("ours", "bf16")
                )
                total = {"metric": metric, "rows": rows, "ours_ms": round(ours, 3), "bf16_ms": round(bf16, 3)}
                totals.append(total | {"ratio": round(ours / bf16, 3)})
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu-linear.json")
    out = parser.parse_args().out
    m = Machine()
    w8 = {name: [m.int8s(n, k) for _ in range(1 if name == "head" else LAYERS)] for name, (n, k) in SHAPES.items()}
    w16 = {name: [w.to(torch.bfloat16) for w in ws] for name, ws in w8.items()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "shapes": shapes(m, w8, w16),
        "decode": decode(m, w8, w16),
    }
    result["model"] = model(result["shapes"])
    if not all(row["equal"] for row in result["shapes"]):
        sys.exit("a product differs from its integers")
    out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["model"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
