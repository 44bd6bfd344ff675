"""Launches: every kernel of this package is started here, a compiled one without asking Triton again.

Triton's own launch finds the compiled form of a kernel in 20 to 60 us of Python, more than most kernels of a prefill
step take. Here the form is kept by what Triton distinguishes, and the launcher that Triton made for it is called at
once. A key may be finer than Triton's, never coarser: the device; of a tensor its type and whether it begins at a
multiple of 16 bytes; of an integer whether it is 1, a multiple of 16 or neither, and its width; which arguments are
floats, and which None; of a matrix for bulk copies the type and the block. What is new to it goes to Triton, whose
answer is kept. Names that a kernel finds outside itself must keep their values: Triton would look at each launch.

`ieee.EXACT` is part of every launch. Tensors are on the current device: nobody looks again. Triton 3.6.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from countermark_kernels.gpu import ieee

INT32 = 1 << 31


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What one bulk copy moves, and how it lies in shared memory. One object for each, because it is its own key."""

    rows: int
    columns: int
    layout: NVMMASharedLayout


class Matrix:
    """A matrix [rows, columns] that a kernel copies in blocks."""

    __slots__ = ("block", "tensor")

    def __init__(self, tensor: Tensor, block: Block) -> None:
        self.tensor = tensor
        self.block = block

    def descriptor(self) -> TensorDescriptor:
        """The same for Triton. Raises AssertionError where bulk copies cannot reach it."""
        return TensorDescriptor.from_tensor(self.tensor, [self.block.rows, self.block.columns], self.block.layout)


class Prepared:
    """A kernel with its compile-time arguments; see `prepared`."""

    __slots__ = ("_given", "_kernel", "_ready", "_rest")

    def __init__(self, kernel: Any, given: dict[str, Any]) -> None:
        self._kernel = kernel
        self._given = given | ieee.EXACT
        self._ready: dict[tuple[Any, ...], _Ready] | None = None
        self._rest: tuple[None, ...] = ()
        if isinstance(kernel, JITFunction):  # else the interpreter's
            constant = [param.is_constexpr for param in kernel.params]
            if constant != sorted(constant):
                raise TypeError(f"{kernel}: expected compile-time arguments behind all others")
            self._ready = {}
            self._rest = (None,) * sum(constant)  # the launcher counts them, and reads none

    def __call__(self, grid: tuple[int, ...], *args: Tensor | Matrix | int | float | None) -> None:
        """Launch on the current stream. `args`: the others, in their order."""
        if self._ready is None:
            self._kernel[grid](*args, **self._given)
            return
        active = driver.active
        device = active.get_current_device()
        key: list[Any] = [device]
        values: list[Any] = []
        matrices = False
        for arg in args:
            if type(arg) is int:
                values.append(arg)
                key.append((arg == 1) | (arg & 15 == 0) << 1 if -INT32 <= arg < INT32 else _wide(arg))
            elif arg is None or type(arg) is float:
                values.append(arg)
                key.append(type(arg))
            elif isinstance(arg, Matrix):
                values.append(arg)
                key.append((arg.tensor.dtype, arg.block))
                matrices = True
            elif isinstance(arg, Tensor):
                address = arg.data_ptr()
                values.append(address)
                key.append((arg.dtype,) if address & 15 else arg.dtype)
            else:
                raise TypeError(f"{self._kernel}: expected tensors, integers, floats or None, got {type(arg)}")
        found = self._ready.get(tuple(key))
        if found is None:
            given = [arg.descriptor() if isinstance(arg, Matrix) else arg for arg in args]
            self._ready[tuple(key)] = _ready(self._kernel[grid](*given, **self._given), args)
            return
        if matrices:
            values = found.expanded(values)
        x, y, z = (*grid, 1, 1)[:3]
        found.launch(x, y, z, active.get_current_stream(device), *found.fixed, *values, *self._rest)


@lru_cache(maxsize=None, typed=True)
def prepared(kernel: Any, **given: Any) -> Prepared:
    """`kernel` with its compile-time arguments and launch options, the same object for the same ones."""
    return Prepared(kernel, given)


def _wide(value: int) -> int:
    """The key of an integer beyond 32 bits: not one of the narrow ones', and another beyond 63."""
    return 4 | (value & 15 == 0) << 1 | (value >= 1 << 63) << 3


@dataclass(frozen=True, slots=True)
class _Ready:
    """A compiled kernel. maps: of each matrix among its arguments, how its blocks lie."""

    launch: Callable[..., None]
    fixed: tuple[Any, ...]
    maps: tuple[tuple[Any, ...], ...]

    def expanded(self, values: list[Any]) -> list[Any]:
        """Each matrix as its map, shape and strides, which is what the launcher takes."""
        found: list[Any] = []
        maps = iter(self.maps)
        for value in values:
            if isinstance(value, Matrix):
                tensor = value.tensor
                found += _map(tensor.data_ptr(), *tensor.shape, *tensor.stride(), *next(maps))
            else:
                found.append(value)
        return found


def _ready(compiled: Any, args: tuple[Any, ...]) -> _Ready:
    """From what Triton compiled for `args`, which it has just launched."""
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        raise RuntimeError(f"{compiled.name}: expected no scratch memory, got a kernel that wants some")
    launch, maps = launcher.launch, []
    if any(isinstance(arg, Matrix) for arg in args):
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]  # without what encodes the maps each time
        for meta in compiled.metadata.tensordesc_meta:
            kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
            maps.append((meta["swizzle"], meta["elem_size"], kind, tuple(meta["block_size"])))
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    fixed = (compiled.function, *options, None, None, compiled.packed_metadata, None, None, None)
    return _Ready(launch, fixed, tuple(maps))


@lru_cache(maxsize=4096)
def _map(
    address: int, rows: int, columns: int, stride: int, one: int, swizzle: int, size: int, kind: int,
    block: tuple[int, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """A matrix for bulk copies, which depends on nothing but these, as the launcher takes it."""
    if address % 16 or stride * size % 16 or one != 1 or rows < 1 or columns < 1:
        raise ValueError(f"matrix: expected rows at multiples of 16 bytes, got {address}, {stride} x {size}")
    shape, strides = (rows, columns), (stride, one)
    made = driver.active.utils.fill_tma_descriptor(address, swizzle, size, kind, block, shape, strides, 0)
    return (made, *shape, *strides)
