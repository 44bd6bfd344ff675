"""The native library through ctypes: find it, prove it, call it. Argument checks for every op.

The library is loaded on first use and used only when it was built from the C sources beside it and passed its
known-answer self-test for an instruction set this processor has (best first); otherwise `reason` says why and the
torch path runs. Both compute the same bits. ctypes releases the interpreter lock during a call. Tensors on CUDA go to
the Triton kernels of gpu/ instead, which compute the same bits again.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from countermark_kernels import ieee

LIBRARY = "_native.so"
CPU = torch.device("cpu")

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CWeight(ctypes.Structure):
    """struct cm_weight."""

    _fields_ = (("n", _I64), ("k", _I64), ("packed", _PTR), ("sums", _PTR), ("scale", _PTR))


class CSpan(ctypes.Structure):
    """struct cm_span."""

    _fields_ = (
        *((name, _I64) for name in ("start", "end", "position", "stride")),
        *((name, _PTR) for name in ("table", "k", "v", "s_k", "s_v")),
    )


class CRope(ctypes.Structure):
    """struct cm_rope."""

    _fields_ = (
        *((name, _PTR) for name in ("positions", "cos", "sin", "q_gain", "k_gain")),
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", _F32),
    )


class CLayer(ctypes.Structure):
    """struct cm_layer."""

    _fields_ = (
        *((name, CWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _PTR) for name in ("qkv_bias", "o_bias", "q_gain", "k_gain")),
    )


class CDecoder(ctypes.Structure):
    """struct cm_decoder."""

    _fields_ = (
        ("layers", _PTR),
        *((name, _I64) for name in ("layer_count", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "block")),
        ("cos", _PTR),
        ("sin", _PTR),
        ("eps", _F32),
        ("score_constant", _F32),
    )


class CSampling(ctypes.Structure):
    """struct cm_sampling."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_uint32),
        ("top_p", ctypes.c_uint32),
        ("min_p", ctypes.c_uint32),
        ("top_k", ctypes.c_int32),
        ("temperature", _F32),
    )


_SIGNATURES = {
    "cm_pack": (_PTR, _I64, _I64, _PTR, _PTR),
    "cm_quantise": (_PTR, _I64, _I64, _PTR, _PTR),
    "cm_norm_quantise": (_PTR, _I64, _I64, _F32, _PTR, _PTR),
    "cm_linear": (_PTR, _PTR, _PTR, _I64, _PTR, _PTR, _PTR),
    "cm_rope_quantise": (_PTR, _PTR, _I64, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR),
    "cm_append": (_PTR, _I64, _I64, _PTR, _PTR, _PTR, _PTR),
    "cm_attend": (_PTR, _I64, _I64, _I64, _I64, _F32, _PTR, _PTR, _PTR),
    "cm_swiglu_quantise": (_PTR, _I64, _I64, _I64, _PTR, _PTR),
    "cm_silu": (_PTR, _I64, _PTR),
    "cm_sample": (_PTR, _I64, _I64, _PTR, _PTR),
    "cm_fingerprint": (_PTR, _I64, _I64, _I64, _PTR, _PTR),
    "cm_decode": (_PTR, _PTR, _I64, _PTR, _PTR, _I64),
    "cm_use_isa": (ctypes.c_char_p,),
    "cm_set_thread_count": (ctypes.c_int,),
    "cm_thread_count": (),
    "cm_self_test": (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t),
}


class Native:
    """The loaded library. `call` runs a function that returns a cm_status; `isas` passed the self-test, best first."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        for name in ("cm_source_digest", "cm_isa", "cm_isa_name"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._functions = {name: getattr(self._library, name) for name in _SIGNATURES}
        self.isas: tuple[str, ...] = ()

    def source_digest(self) -> str:
        """The digest of the C sources the library was built from."""
        return _text(self._library.cm_source_digest())

    def supported(self) -> tuple[str, ...]:
        """Instruction sets that are built in and that this processor has, best first."""
        names: list[str] = []
        index = 0
        while (name := self._library.cm_isa_name(index)) is not None:
            names.append(_text(name))
            index += 1
        return tuple(name for name in names if name)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return _text(self._library.cm_isa())

    def use_isa(self, name: str) -> None:
        """Switch to `name`, which must have passed the self-test."""
        if name not in self.isas or self._functions["cm_use_isa"](name.encode()):
            raise ValueError(f"isa: expected one of {', '.join(self.isas)}, got {name}")

    def self_test(self, isa: str) -> str | None:
        """Known answers of `isa` on every thread of the pool. None, or what failed."""
        message = ctypes.create_string_buffer(64)
        digests = (ieee.EXP2_DIGEST & (1 << 64) - 1, ieee.EXP2_SHORT_DIGEST & (1 << 64) - 1)
        failed: int = self._functions["cm_self_test"](isa.encode(), *digests, message, len(message))
        return message.value.decode() if failed else None

    @property
    def threads(self) -> int:
        """Threads of the pool, the caller's included."""
        count: int = self._functions["cm_thread_count"]()
        return count

    def set_threads(self, threads: int) -> None:
        """Resize the pool."""
        if self._functions["cm_set_thread_count"](threads):
            raise ValueError(f"threads: expected 1..256, got {threads}")

    def call(self, name: str, *arguments: object) -> None:
        """Run an op. Pointers are integers, None or ctypes references. Raises NumericsError or MemoryError."""
        status: int = self._functions[name](*arguments)
        if status:
            raise _error(name, status)


def _text(value: bytes) -> str:
    return value.decode()


def _error(name: str, status: int) -> Exception:
    if status == 1:
        return ieee.not_finite()
    if status == 2:
        return ieee.NumericsError(
            f"{name}: expected values within the profile's range, got more", code="numerics.range"
        )
    if status == 3:
        return MemoryError(f"{name}: no memory for scratch")
    return ValueError(f"{name}: arguments out of range")


class _State:
    """What was loaded: `native` when usable, else `reason`. `enabled` is False where the torch path is forced."""

    def __init__(self) -> None:
        self.tried = False
        self.lock = threading.Lock()
        self.enabled = True
        self.native: Native | None = None
        self.reason = ""


_state = _State()


def native() -> Native | None:
    """The proven native library, or None: then the torch path runs."""
    if not _state.tried:
        with _state.lock:
            if not _state.tried:
                _load()
                _state.tried = True
    return _state.native if _state.enabled else None


def reason() -> str:
    """Why the native library is not used, or which instruction set failed; empty when all is well."""
    native()
    return _state.reason if _state.enabled else "switched off"


def enable(on: bool) -> None:
    """Switch the native path off or on again (for comparisons and tests)."""
    _state.enabled = on


def _load() -> None:
    resource = files(__package__).joinpath(LIBRARY)
    if not resource.is_file():
        _state.reason = "not built: run `python kernels/build_native.py` (needs a C compiler)"
        return
    try:
        with as_file(resource) as path:
            library = Native(path)
    except (OSError, AttributeError) as err:
        _state.reason = f"cannot be loaded: {err}"
        return
    if library.source_digest() != source_digest():
        _state.reason = "built from other sources: run `python kernels/build_native.py` again"
        return
    library.set_threads(torch.get_num_threads())
    failures = {isa: library.self_test(isa) for isa in library.supported()}
    library.isas = tuple(isa for isa, failed in failures.items() if failed is None)
    _state.reason = "; ".join(f"{isa}: self-test failed: {failed}" for isa, failed in failures.items() if failed)
    if library.isas:
        library.use_isa(library.isas[0])
        _state.native = library


def source_digest() -> str:
    """SHA-256 over the C sources of this package, hexadecimal; kernels/build_native.py compiles the same in."""
    digest = hashlib.sha256()
    sources = [p for p in files(__package__).joinpath("native").iterdir() if p.name.endswith((".c", ".h"))]
    for path in sorted(sources, key=lambda p: p.name):
        name, data = path.name.encode(), path.read_bytes()
        digest.update(len(name).to_bytes(4, "big") + name + len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device = CPU) -> None:
    """Raise ValueError unless x is a contiguous tensor of this dtype and shape (None: any size) on `device`.

    An op passes its first tensor's own device for that tensor, which must be a CPU or CUDA, and for all others.
    """
    have = x.shape
    there = x.device == device and device.type in {"cpu", "cuda"}
    if x.dtype != dtype or len(have) != len(shape) or not x.is_contiguous() or not there:
        raise ValueError(
            f"{name}: expected a contiguous {device.type} tensor {dtype} of {len(shape)} dimensions, got {_describe(x)}"
        )
    for size, want in zip(have, shape, strict=True):
        if want is not None and size != want:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(have)}")


def gpu(name: str) -> ModuleType:
    """countermark_kernels.gpu.`name`: imported when a tensor on CUDA first needs it, because triton is optional."""
    return import_module(f"countermark_kernels.gpu.{name}")


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's first element, or None."""
    return None if x is None else x.data_ptr()


def _describe(x: Tensor) -> str:
    return f"{x.device.type} {x.dtype} {tuple(x.shape)}{'' if x.is_contiguous() else ' strided'}"
