"""exp2 and SiLU at every binary32 input, all 2^32, on whatever device.

    python bench/sweep.py cpu      torch and the native library; writes bench/results/sweep.json
    python bench/sweep.py cuda     Triton; compares with that file and adds itself to it

For each of 256 blocks of 2^24 patterns: the sum over the block of bits(y_i) * (2 i + 1), modulo 2^64, i the place in
the block. Infinities and NaNs, which are refused before they get here, count as 0. Minutes on a core, milliseconds on a
GPU. Exit 1 where a sum differs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countermark_kernels import PROFILE, activation, binding, ieee, launch

RESULT = Path(__file__).resolve().parent / "results" / "sweep.json"
BLOCK = 1 << 24
PIECE = 1 << 16  # fits the cache, on one thread: ten times faster than large pieces on two
OPS: dict[str, Callable[[Tensor], Tensor]] = {"exp2": ieee.exp2, "silu": activation.silu}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def inputs(first: int, count: int) -> Tensor:
    """The binary32 values of patterns first, first + 1, ..."""
    x = torch.arange(first, first + count, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))


def weighted(y: Tensor, place: int) -> int:
    """The sum of the docstring over consecutive y whose first has this place in its block."""
    weights = torch.arange(place, place + y.numel(), dtype=torch.int64) * 2 + 1
    return int((y.view(torch.int32).to(torch.int64) * weights).sum(dtype=torch.int64))


def on_cpu(op: Callable[[Tensor], Tensor], block: int) -> int:
    total = 0
    for place in range(0, BLOCK, PIECE):
        total += weighted(op(inputs(block * BLOCK + place, PIECE)), place)
    return total % (1 << 64)


def native_silu(x: Tensor) -> Tensor:
    library = binding.native()
    assert library is not None
    y = torch.empty_like(x)
    library.call("cm_silu", x.data_ptr(), x.numel(), y.data_ptr())
    return y


def entry(sums: Iterable[int]) -> dict[str, Any]:
    """How sums are kept: each in hexadecimal, and SHA-256 over all of them as little-endian 64-bit words."""
    sums = list(sums)
    digest = hashlib.sha256(b"".join(s.to_bytes(8, "little") for s in sums)).hexdigest()
    return {"digest": digest, "sums": [f"{s:016x}" for s in sums]}


def sweep_cpu() -> bool:
    """Every op through torch; SiLU through each instruction set of the native library as well."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"profile": PROFILE, "ops": {}, "devices": {}}
    seconds: dict[str, float] = {}
    equal = True
    for name, op in OPS.items():
        start = time.perf_counter()
        found["ops"][name] = entry(on_cpu(op, block) for block in range(256))
        seconds[f"{name} torch"] = round(time.perf_counter() - start, 1)
    for isa in launch.isas():
        start = time.perf_counter()
        with launch.forced(isa=isa):
            equal &= entry(on_cpu(native_silu, block) for block in range(256)) == found["ops"]["silu"]
        seconds[f"silu {isa}"] = round(time.perf_counter() - start, 1)
    found["devices"]["cpu"] = {"equal": equal, "seconds": seconds, **_versions()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return equal


def sweep_cuda() -> bool:
    from sweepkernel import block_sums

    found = json.loads(RESULT.read_text())
    assert found["profile"] == PROFILE
    seconds: dict[str, float] = {}
    equal = True
    for name in OPS:
        block_sums(name, 0, 1)  # compiles
        start = time.perf_counter()
        sums = block_sums(name, 0, 256)
        seconds[name] = round(time.perf_counter() - start, 3)
        same = entry(sums) == found["ops"][name]
        print(name, "equal" if same else "DIFFERENT", f"{seconds[name]} s")
        equal &= same
    name = torch.cuda.get_device_name()
    found["devices"][name] = {"equal": equal, "seconds": seconds, **_versions()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda"))
    sys.exit(0 if (sweep_cpu() if parser.parse_args().device == "cpu" else sweep_cuda()) else 1)
