"""Where a step's time on the GPU goes: kernels by what they do, from torch.profiler, and the time with none running.

A kernel of ours counts to the operation whose module defines it; where modules have a kernel of the same name, to all
of theirs together. Others are known by their names. Overlapping kernels count in full each, so the groups may add up to
more than the time that something ran.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LINEAR, ATTENTION, SAMPLER, FINGERPRINT, ELEMENT_WISE, COPIES, OTHER = (
    "linear layers", "attention", "sampler", "fingerprint", "element-wise", "copies", "other",
)  # fmt: skip
OURS = (
    ("linear", LINEAR),
    ("attention", ATTENTION),
    ("sampler", SAMPLER),
    ("logprobs", SAMPLER),
    ("finger", FINGERPRINT),
)
THEIRS = (
    (r"^mem(cpy|set)", COPIES),
    (r"flash|fmha|sdpa|attention|fprop", ATTENTION),
    (r"gemm|gemv|nvjet|cutlass|xmma|splitk", LINEAR),
    (r"sort|argmax|reduce_kernel.*argm|softmax|scan", SAMPLER),
    (r"^triton_|elementwise|vectorized|reduce|cat|index", ELEMENT_WISE),
)
SHOWN = 12


def steps(step: Callable[[], object], count: int) -> dict[str, Any]:
    """`count` calls of `step`, one after the other, in milliseconds a step.

    `wall`: as the host sees them, unprofiled; `busy`: that some kernel ran; `groups`, `kernels`: time and number of
    launches of each group and of the dearest kernels.
    """
    step()
    _wait()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    _wait()
    wall = (time.perf_counter() - begun) / count * 1e3
    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(count):
            step()
        _wait()
    ran = [
        (event.start_ns(), event.duration_ns(), event.name())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    groups: defaultdict[str, float] = defaultdict(float)
    kernels: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for _, duration, name in ran:
        for into, key in ((groups, group(name)), (kernels, name)):
            into[key] += duration / count / 1e6
        launches[group(name)] += 1
    dearest = sorted(kernels.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "wall_ms": round(wall, 4),
        "busy_ms": round(_covered([(begin, begin + length) for begin, length, _ in ran]) / count / 1e6, 4),
        "groups": {
            name: {"ms": round(ms, 4), "launches": round(launches[name] / count, 1)}
            for name, ms in sorted(groups.items(), key=lambda item: -item[1])
        },
        "kernels": {name[:120]: round(ms, 4) for name, ms in dearest},
    }


def group(kernel: str) -> str:
    """What a kernel does, by its name."""
    found = _named().get(kernel)
    if found:
        return " or ".join(sorted(found))
    return next((to for pattern, to in THEIRS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


@cache
def _named() -> dict[str, set[str]]:
    """The groups of our Triton kernels by their names; empty where there is no Triton."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    try:
        from triton.runtime.jit import JITFunction

        import countermark_kernels.gpu as package
    except ImportError:
        return {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        to = next((to for start, to in OURS if info.name.startswith(start)), ELEMENT_WISE)
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[name].add(to)
    return dict(found)


def _covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    total, end = 0, 0
    for begin, stop in sorted(spans):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return total


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
