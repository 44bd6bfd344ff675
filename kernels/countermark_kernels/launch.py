"""Which back end runs, on how many threads, and the proof at start-up that it computes the profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from countermark_kernels import binding, ieee, selftest


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """What `self_test` found. `isa`: instruction set, or `torch`; `reason`: what is not used and why, or empty."""

    backend: str
    isa: str
    threads: int
    checks: tuple[str, ...]
    reason: str


def backend() -> str:
    """`native` when the native library was built and passed its self-test, else `torch`."""
    return "torch" if binding.native() is None else "native"


def isas() -> tuple[str, ...]:
    """The native instruction sets that passed the self-test here, best first."""
    library = binding.native()
    return () if library is None else library.isas


def threads() -> int:
    """Threads in use."""
    library = binding.native()
    return torch.get_num_threads() if library is None else library.threads


def set_threads(count: int) -> None:
    """Use `count` threads from now on, in torch and in the native library. Changes no bit."""
    if not 1 <= count <= 256:
        raise ValueError(f"threads: expected 1..256, got {count}")
    torch.set_num_threads(count)
    library = binding.native()
    if library is not None:
        library.set_threads(count)


@contextmanager
def forced(*, backend: str = "native", isa: str | None = None) -> Iterator[None]:
    """Run a block on one back end or instruction set: for comparisons. Weights must be prepared inside the block.

    Raises ValueError where it is not to be had.
    """
    if backend not in {"native", "torch"}:
        raise ValueError(f"backend: expected native or torch, got {backend}")
    library = binding.native()
    if backend == "native" and library is None:
        raise ValueError(f"backend: expected the native library, got none ({binding.reason()})")
    before = library.isa if library is not None else ""
    binding.enable(backend == "native")
    try:
        if library is not None and isa is not None:
            library.use_isa(isa)
        yield
    finally:
        binding.enable(True)
        if library is not None:
            library.use_isa(before)


def self_test(device: torch.device = binding.CPU) -> SelfTestReport:
    """Run the known-answer tests: torch's arithmetic on its worker threads, the native library on its own.

    Then every op once on the back end in use against its reference, and again on `device` where that is a GPU.
    Raises NumericsError `numerics.self_test`.
    """
    checks = list(ieee.self_test())
    library = binding.native()
    if library is not None:
        failed = library.self_test(library.isa)
        if failed:
            raise ieee.NumericsError(f"{library.isa}: expected a pass, got {failed}", code="numerics.self_test")
        checks += [f"native {library.isa}: arithmetic, exp2, int8 product on every thread"]
    checks += selftest.ops_match_references()
    if device.type == "cuda":
        checks += [f"{op} on {torch.cuda.get_device_name(device)}" for op in selftest.ops_match_references(device)]
    return SelfTestReport(
        backend=backend(),
        isa="torch" if library is None else library.isa,
        threads=threads(),
        checks=tuple(checks),
        reason=binding.reason(),
    )
