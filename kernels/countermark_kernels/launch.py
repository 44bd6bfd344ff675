"""Which back end runs, on how many threads, and the proof at start-up that it computes the profile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from countermark_kernels import ieee


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """What `self_test` found. `backend`: native or torch; `reason`: why not native, or empty."""

    backend: str
    isa: str
    threads: int
    checks: tuple[str, ...]
    reason: str


def backend() -> str:
    """`native` when the native library was built and passed its self-test, else `torch`."""
    return "torch"


def set_threads(threads: int) -> None:
    """Use `threads` threads from now on, in torch and in the native library."""
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)


def self_test() -> SelfTestReport:
    """Run the known-answer tests. Raises NumericsError `numerics.self_test` where torch itself fails one."""
    checks = ieee.self_test()
    return SelfTestReport(
        backend=backend(), isa="torch", threads=torch.get_num_threads(), checks=checks, reason="not built"
    )
