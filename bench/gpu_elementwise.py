"""What the element-wise kernels reach of memory bandwidth on a GPU, at Qwen3-8B's widths.

    python bench/gpu_elementwise.py OUT.json

Bytes: each input read once, each output written once. Times: medians with the L2 cache flushed before each run; for few
rows a CUDA graph's replays, whose inputs stay in the cache. `copy` is a device-to-device copy of 1 GiB.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from countermark_kernels import sampler
from countermark_kernels.gpu import activation, fingerprint, norm, quantise, rope
from countermark_kernels.gpu import sampler as gpu_sampler
from countermark_kernels.sampler import SamplerParams

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, D, VOCAB, PAGE = 4096, 12288, 32, 8, 128, 151_936, 64
ROWS = (1, 16, 64, 256, 2048, 16384)
SAMPLED = (1, 64, 256)


def median_us(run: Callable[[], object], *, graph: bool) -> float:
    if graph:
        return 1000.0 * float(triton.testing.do_bench_cudagraph(run, rep=50, return_mode="median"))
    return 1000.0 * float(triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median"))


def cases(rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Each op at `rows` rows, and the bytes it must move."""
    made = torch.Generator("cuda").manual_seed(1)

    def floats(width: int) -> torch.Tensor:
        return torch.randn(rows, width, device="cuda", generator=made)

    hidden, gate_up = floats(HIDDEN), floats(2 * INTERMEDIATE)
    qkv = floats((HEADS + 2 * KV_HEADS) * D)
    pages = rows // PAGE + 1
    pool = tuple(
        torch.zeros(pages, KV_HEADS, *shape, dtype=dtype, device="cuda")
        for shape, dtype in (
            ((PAGE, D), torch.int8),
            ((PAGE,), torch.float32),
            ((D, PAGE), torch.int8),
            ((PAGE,), torch.float32),
        )
    )
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    tables = torch.rand(2, 40960, D // 2, device="cuda", generator=made)
    gains = torch.rand(2, D, device="cuda", generator=made)
    settings: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D, "eps": 2.0**-20}
    settings |= {"q_gain": gains[0], "k_gain": gains[1], "slots": slots, "pool": pool, "page": PAGE}
    head_bytes = (HEADS + 2 * KV_HEADS) * (5 * D + 4) + 4 * D + 8
    return {
        "quantise": (lambda: quantise.quantise(hidden), rows * (5 * HIDDEN + 4)),
        "norm": (lambda: norm.norm_quantise(hidden, 2.0**-20), rows * (5 * HIDDEN + 4)),
        "swiglu": (lambda: activation.swiglu_quantise(gate_up, 512), rows * (9 * INTERMEDIATE + 4)),
        "rope": (lambda: rope.rope_quantise(qkv, slots, tables[0], tables[1], **settings), rows * head_bytes),
    }


def sampling(rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    logits = 2.5 * torch.randn(rows, VOCAB, device="cuda", generator=torch.Generator("cuda").manual_seed(2))

    def draw(params: SamplerParams) -> Callable[[], object]:
        settings = sampler.cuda_settings([params] * rows, range(rows), VOCAB).cuda()
        return lambda: gpu_sampler.sample(logits, settings)

    size = rows * 4 * VOCAB
    return {
        "fingerprint": (lambda: fingerprint.fingerprint(logits, VOCAB), size),
        "greedy": (draw(SamplerParams(temperature=0.0)), size),
        "temperature": (draw(SamplerParams(temperature=1.0, seed=1)), size),
        "top-k, top-p": (draw(SamplerParams(temperature=1.0, top_k=50, top_p_20bit=1_000_000, seed=1)), size),
        "top-p": (draw(SamplerParams(temperature=1.0, top_p_20bit=1_000_000, seed=1)), size),
    }


def main() -> None:
    """Measure every op, print a table, write the JSON."""
    one = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    other = torch.empty_like(one)
    copy = (2 << 30) / median_us(lambda: other.copy_(one), graph=False) / 1e6
    found: list[dict[str, Any]] = []
    for rows, make in ((r, make) for counts, make in ((ROWS, cases), (SAMPLED, sampling)) for r in counts):
        for name, (run, size) in make(rows).items():
            graph = rows <= 256
            took = median_us(run, graph=graph)
            found.append(
                {"op": name, "rows": rows, "us": round(took, 2), "tb_s": round(size / took / 1e6, 3), "graph": graph}
            )
            print(f"{name:14} {rows:6} {took:9.2f} us {size / took / 1e6:6.2f} TB/s")
    print(f"copy {copy:.2f} TB/s")
    device = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    Path(sys.argv[1]).write_text(json.dumps(device | {"copy_tb_s": round(copy, 3), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
