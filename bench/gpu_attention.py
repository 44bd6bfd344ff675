"""Exact attention against torch's scaled dot product attention in bfloat16, at Qwen3-8B's shapes, on one GPU.

    python bench/gpu_attention.py OUT.json

Every time is of one layer, the median of replays of a CUDA graph that holds enough layers (or launches) to matter;
decode walks over distinct layers, so nothing is left in the L2 cache from the time before. torch is asked three ways:
by default, and with its flash and its cuDNN kernels forced; keys and values are given as they are (`enable_gqa`).
One row of each shape is first compared with the CPU's attention, every bit.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from countermark_kernels import attention
from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK, KvCache, Pool, alone
from countermark_kernels.gpu import attention as gpu_attention
from countermark_kernels.gpu import flags
from countermark_kernels.rope import Heads

HEADS, KV_HEADS, D = 32, 8, 128
PREFILL = tuple((batch, length) for length in (2048, 8192) for batch in (1, 4))
DECODE = tuple((batch, length) for length in (2048, 8192) for batch in (1, 16, 64))
BACKENDS: dict[str, SDPBackend | None] = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DEVICE = torch.device("cuda", 0)


def microseconds(layer: Callable[[int], Any], layers: int) -> float:
    """The time of one layer."""
    for index in range(2):
        layer(index % layers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(layers):
            layer(index)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / layers)
    return float(statistics.median(times[2:]))


def sdpa(batch: int, queries: int, length: int, layers: int) -> dict[str, float | None]:
    """Microseconds of each back end; None where it refuses."""
    q = torch.randn(batch, HEADS, queries, D, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(layers, batch, KV_HEADS, length, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    causal = queries > 1

    def layer(index: int) -> Tensor:
        return scaled_dot_product_attention(q, k[index], v[index], is_causal=causal, enable_gqa=True)

    found: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        try:
            if backend is None:
                found[name] = microseconds(layer, layers)
            else:
                with sdpa_kernel(backend):
                    found[name] = microseconds(layer, layers)
        except RuntimeError:
            found[name] = None
    return found


def caches_of(batch: int, length: int, layers: int) -> list[KvCache]:
    """Caches full of random tokens."""
    per = math.ceil(length / BLOCK)
    pool = Pool(layers=layers, kv_heads=KV_HEADS, head_dim=D, blocks=batch * per, device=DEVICE)
    for x in (pool.k, pool.v):
        x.random_(-127, 128)
    pool.s_k.uniform_(0.01, 0.03)
    pool.s_v.uniform_(0.01, 0.02)
    return [KvCache(pool, blocks) for blocks in torch.randperm(batch * per).reshape(batch, per).tolist()]


def queries_of(rows: int) -> tuple[Tensor, Tensor]:
    """Random q and s_q."""
    q = torch.randint(-127, 128, (rows, HEADS, D), dtype=torch.int8, device=DEVICE)
    return q, torch.rand(rows, HEADS, device=DEVICE) * 0.02 + 0.01


def exact(q: Tensor, s_q: Tensor, cache: KvCache, position: int, got: Tensor) -> bool:
    """Whether one row, the token at `position`, is the CPU's."""
    count = position + 1
    k, v = (
        torch.stack([part(0, head, count) for head in range(KV_HEADS)], 1).cpu() for part in (cache.keys, cache.values)
    )
    scales = [cache.scales(0, head, count) for head in range(KV_HEADS)]
    s_k, s_v = (torch.stack(parts, 1).cpu() for parts in zip(*scales, strict=True))
    on_cpu = alone(layers=1, kv_heads=KV_HEADS, head_dim=D, capacity=count)
    on_cpu.append(0, Heads(q=k, s_q=s_k, k=k, s_k=s_k, v=v, s_v=s_v), 0, count, 0)
    span = Span(cache=on_cpu, start=0, end=1, position=position)
    return torch.equal(attention.attend(q[None].cpu(), s_q[None].cpu(), [span], layer=0)[0], got.cpu())


def ours(batch: int, queries: int, length: int, layers: int) -> tuple[float, bool]:
    """Microseconds, and whether the last row of the last sequence has every bit of the CPU's."""
    caches = caches_of(batch, length, layers)
    q, s_q = queries_of(batch * queries)
    spans = [
        Span(cache=cache, start=i * queries, end=(i + 1) * queries, position=length - queries)
        for i, cache in enumerate(caches)
    ]
    plan = gpu_attention.plan(spans, HEADS)
    out = gpu_attention.attend(q, s_q, plan, layer=0)
    flags.raise_pending(DEVICE)
    same = exact(q[-1], s_q[-1], caches[-1], length - 1, out[-1])
    return microseconds(lambda index: gpu_attention.attend(q, s_q, plan, layer=index), layers), same


def driver() -> str:
    """The GPU driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    """Measure every shape, print a table, write the JSON."""
    rows = []
    for kind, shapes in (("prefill", PREFILL), ("decode", DECODE)):
        for batch, length in shapes:
            queries = length if kind == "prefill" else 1
            held = batch * length * KV_HEADS * D * 2
            layers = max(2, min(36, math.ceil(2**28 / held))) if kind == "decode" else 2
            time, same = ours(batch, queries, length, layers)
            torch.cuda.empty_cache()
            torch_times = sdpa(batch, queries, length, layers)
            torch.cuda.empty_cache()
            default = torch_times["default"]
            row = {"kind": kind, "batch": batch, "context": length, "exact_us": round(time, 1), "same_bits": same}
            row |= {f"sdpa_{name}_us": x and round(x, 1) for name, x in torch_times.items()}
            row["ratio"] = default and round(time / default, 3)
            rows.append(row)
            print(row, flush=True)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(DEVICE),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D},
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
    if not all(row["same_bits"] for row in rows):
        sys.exit("a row differs from the CPU's")


if __name__ == "__main__":
    main()
