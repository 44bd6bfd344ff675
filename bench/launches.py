"""What the launches of one layer cost the host, at the sizes of Qwen3-8B: directly, and as Triton launches.

    python bench/launches.py [--rows 2048] [--out FILE]

On a Hopper GPU: the microseconds until all layers' kernels of a prefill step are in the stream, over the layers, and
beside it what the step takes on the GPU. Without a GPU the same host code runs in front of a driver that does nothing
(stubdriver.py), on tensors that exist once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchlib import say

LAYERS = 36
BLOCKS = 64
TURNS = 15


def stack(device: torch.device) -> tuple[Any, Any]:
    """A decoder whose layers share their weights, and a pool."""
    from countermark_kernels.cache import Pool
    from countermark_kernels.decoder import Decoder, Layer
    from countermark_kernels.linear import Weight

    def weight(outputs: int, inputs: int) -> Any:
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        return Weight(outputs=outputs, inputs=inputs, scale=torch.full((outputs,), 1e-4, device=device), rows=values)

    gain, table = torch.ones(128, device=device), torch.rand(40960, 64, device=device)
    layer = Layer(
        qkv=weight(6144, 4096), o=weight(4096, 4096), gate_up=weight(24576, 4096), down=weight(4096, 12288),
        q_gain=gain, k_gain=gain,
    )  # fmt: skip
    decoder = Decoder(
        layers=(layer,) * LAYERS, head=weight(128, 4096), heads=32, kv_heads=8, head_dim=128, eps=2.0**-20, block=512,
        cos=table, sin=table,
    )  # fmt: skip
    return decoder, Pool(layers=LAYERS, kv_heads=8, head_dim=128, blocks=BLOCKS, device=device, triton=True)


def through_triton() -> Any:
    """A patch: every launch as Triton makes it."""
    from countermark_kernels.gpu.launching import Matrix, Prepared

    def launch(self: Any, grid: tuple[int, ...], *args: Any) -> None:
        given = [arg.descriptor() if isinstance(arg, Matrix) else arg for arg in args]
        self._kernel[grid](*given, **self._given)

    return patch.object(Prepared, "__call__", launch)


def measure(step: Callable[[], object], wait: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds until `step` returns, and until the GPU is done."""
    host, done = [], []
    for turn in range(TURNS + 2):
        begun = time.perf_counter()
        step()
        launched = time.perf_counter() - begun
        wait()
        if turn > 1:
            host.append(launched)
            done.append(time.perf_counter() - begun)
    return {"host_ms": 1e3 * statistics.median(host), "done_ms": 1e3 * statistics.median(done)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    if not on_gpu:
        import stubdriver

        stubdriver.use()
    from countermark_kernels.cache import KvCache
    from countermark_kernels.gpu import attention, batch, decoder, linear, linear_hopper, overlap

    if not on_gpu:  # what a Hopper GPU would do
        for module in (attention, batch, linear):
            patch.object(module, "hopper", lambda _: True).start()
        patch.object(overlap, "early", lambda _: True).start()
        for module in (linear_hopper, attention.gpu("attention_hopper")):
            patch.object(module, "multiprocessors", lambda _: 132).start()
        patch.object(torch, "empty", _kept(torch.empty)).start()
    layers, pool = stack(device)
    cache = KvCache(pool, range(1, BLOCKS))
    x = torch.randn(args.rows, 4096, device=device)
    plan = batch.planned(
        made := batch.cut([(cache, 0, args.rows)], 32, pool),
        32,
        pool,
        {name: torch.from_numpy(getattr(made, name)).to(device) for name in
         ("positions", "slots", "tables", "long", "short", "items")},
    )  # fmt: skip

    def step() -> None:
        decoder.run(layers, x, plan)

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if on_gpu else "none",
        "rows": args.rows, "layers": LAYERS,
        "direct": measure(step, wait),
    }  # fmt: skip
    with through_triton():
        found["triton"] = measure(step, wait)
    found["direct again"] = measure(step, wait)
    for name in ("direct", "triton", "direct again"):
        one = found[name]
        one["host_us_a_layer"] = 1e3 * one["host_ms"] / LAYERS
        say(f"{name}: {one['host_us_a_layer']:.0f} us a layer until launched; {one['done_ms']:.2f} ms until done")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.empty without asking the system for memory, as a GPU's allocator does: one tensor for each shape."""
    found: dict[Any, torch.Tensor] = {}

    def empty(*size: Any, **given: Any) -> torch.Tensor:
        key = (size, *given.items())
        if key not in found:
            found[key] = make(*size, **given)
        return found[key]

    return empty


if __name__ == "__main__":
    raise SystemExit(main())
