"""Triton's own launcher in front of a driver that does nothing: what a launch costs the host, and what it passes on.

For a machine without a GPU. `use` comes before anything is launched, in a process that does not interpret.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

HERE = Path(__file__).resolve().parent


class Driver:
    """A Hopper GPU that computes nothing. `device`, `stream`: the current ones."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.device = 0
        self.stream = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def expect(self, compiled: Any) -> None:
        """The launches to come are of this kernel: keep what they pass. None: of any, keep nothing."""
        sizes = []
        for kind in compiled.src.signature.values() if compiled else ():
            if kind.startswith("tensordesc"):
                sizes += [128, 4, 4, 8, 8]
            elif kind != "constexpr":
                sizes.append(8 if kind[0] == "*" or kind.endswith("64") else 4)
        sizes += [8, 8] if compiled else []  # scratch memory
        self.library.stub_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def seen(self) -> bytes:
        """Function, stream, sizes, options and arguments of the last launch since the last call."""
        found = ctypes.create_string_buffer(1 << 14)
        length = self.library.stub_seen(found)
        self.library.stub_clear()
        return found.raw[:length]


def use() -> Driver:
    """Make the stub Triton's driver in this process."""
    if torch.cuda.is_available():
        raise RuntimeError("driver: expected no GPU, found one")
    folder = Path(tempfile.mkdtemp())
    to, include = folder / "libcuda.so.1", Path(triton.__file__).parent / "backends/nvidia/include"
    names = ["-Wl,-soname,libcuda.so.1", f"-I{include}", str(HERE / "stubdriver.c"), "-o", str(to)]
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-w", *names], check=True)  # noqa: S607
    library = ctypes.CDLL(str(to), mode=ctypes.RTLD_GLOBAL)
    library.stub_seen.restype = ctypes.c_size_t
    knobs.nvidia.libcuda_path = str(folder)
    found = Driver(library)
    driver.set_active(found)  # type: ignore[arg-type]
    return found
