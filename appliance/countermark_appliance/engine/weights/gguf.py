"""The GGUF container, version 3, little-endian: metadata, tensor table, and rows of tensors as float32.

Layout: ggml's `docs/gguf.md`. Every count and length is capped before it is used, every byte of the file is accounted
for (tensors in file order, gaps only for alignment, nothing after the last), duplicate keys and names are refused.
Tensor types F32, F16, BF16, Q8_0, Q4_0 and Q4_1 (block layouts: ggml's `ggml-common.h`); others are refused by name.
Dequantised as ggml does, in binary32; only Q4_1's last addition rounds.

Not checked here: what keys and tensors mean (`ggufsource`).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from countermark.errors import WeightsError

TYPE_NAMES: Final = MappingProxyType(
    {
        0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
        10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16",
    }
)  # fmt: skip
# type: (weights a block, bytes a block)
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS, _MAX_STRING = 4096, 65_536, 1 << 22, 1 << 20

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor: `shape` outermost first (GGUF stores it reversed), `offset` from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class GgufFile:
    """An opened GGUF file: `metadata` and `tensors` are complete, tensor data stays on disk (mapped)."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _malformed(f"expected at least 24 bytes, got {size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._map)
        if (magic := bytes(cursor.take(4))) != b"GGUF":
            raise _malformed(f"expected a file that begins with GGUF, got {magic!r} in {path.name!r}")
        version = cursor.number("<I")
        if version != 3:
            raise WeightsError(f"gguf: expected version 3, got {version}", code="weights.unsupported_gguf")
        tensor_count = cursor.count("tensors", _MAX_TENSORS)
        key_count = cursor.count("keys", _MAX_KEYS)
        self.metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in self.metadata:
                raise _malformed(f"duplicate key {key[:64]!r}")
            self.metadata[key] = cursor.value()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise _malformed(f"alignment: expected a power of two, got {alignment!r}")
        table = [cursor.tensor() for _ in range(tensor_count)]
        self.tensors = _placed(table, start=_align(cursor.position, alignment), alignment=alignment, size=size)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a matrix, or the whole of a vector, as float32."""
        entry = self.tensors[name]
        weights, block_bytes = _BLOCKS[entry.kind]
        columns = entry.shape[-1]
        if len(entry.shape) == 1:
            start, stop = 0, 1
        row_bytes = columns // weights * block_bytes
        data = self._map[entry.offset + start * row_bytes : entry.offset + stop * row_bytes]
        flat = _dequantise(entry.kind, np.frombuffer(data, dtype=np.uint8))
        return torch.from_numpy(flat).view(-1) if len(entry.shape) == 1 else torch.from_numpy(flat).view(-1, columns)


class _Cursor:
    """Reads forward through the mapped file; running past the end is `weights.gguf`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise _malformed("expected more bytes, got the end of the file")
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str, limit: int) -> int:
        found = self.number("<Q")
        if found > limit:
            raise _malformed(f"{what}: expected at most {limit}, got {found}")
        return found

    def string(self) -> str:
        raw = self.take(self.count("string bytes", _MAX_STRING))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as err:
            raise _malformed("expected UTF-8 text") from err

    def scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.string()
        form = _SCALARS.get(kind)
        if form is None:
            raise _malformed(f"value type: expected 0 to 12, got {kind}")
        raw = self.take(struct.calcsize(form))
        if kind == 7 and raw not in (b"\0", b"\1"):
            raise _malformed("bool: expected 0 or 1")
        found: Scalar = struct.unpack(form, raw)[0]
        return found

    def value(self) -> Value:
        kind = self.number("<I")
        if kind != _ARRAY:
            return self.scalar(kind)
        inner = self.number("<I")
        if inner == _ARRAY:
            raise _malformed("expected no arrays of arrays")
        return tuple(self.scalar(inner) for _ in range(self.count("array items", _MAX_ITEMS)))

    def tensor(self) -> TensorEntry:
        """One row of the tensor table, its offset still relative to the data's start."""
        name = self.string()
        axes = self.number("<I")
        if not 1 <= axes <= 2:
            raise WeightsError(f"{name[:64]}: expected 1 or 2 axes, got {axes}", code="weights.unsupported_tensor")
        shape = tuple(reversed([self.count("axis", 1 << 32) for _ in range(axes)]))
        number = self.number("<I")
        kind = TYPE_NAMES.get(number, f"type {number}")
        offset = self.number("<Q")
        if kind not in _BLOCKS:
            raise WeightsError(
                f"{name[:64]}: expected one of {', '.join(_BLOCKS)}, got {kind}",
                code="weights.unsupported_quantisation",
            )
        weights, block_bytes = _BLOCKS[kind]
        if shape[-1] % weights or not all(shape):
            raise _malformed(f"{name[:64]}: expected rows of whole {kind} blocks, got shape {shape}")
        size_bytes = math.prod(shape) // weights * block_bytes
        return TensorEntry(name=name, kind=kind, shape=shape, offset=offset, size_bytes=size_bytes)


def _placed(table: list[TensorEntry], *, start: int, alignment: int, size: int) -> dict[str, TensorEntry]:
    """Tensors by name with file offsets; they must follow each other with only alignment between them."""
    tensors: dict[str, TensorEntry] = {}
    end = start
    for entry in table:
        if entry.name in tensors:
            raise _malformed(f"duplicate tensor {entry.name[:64]!r}")
        if start + entry.offset != _align(end, alignment):
            raise _malformed(f"{entry.name[:64]}: expected offset {_align(end, alignment) - start}, got {entry.offset}")
        end = start + entry.offset + entry.size_bytes
        tensors[entry.name] = replace(entry, offset=start + entry.offset)
    if not end <= size <= _align(end, alignment):
        raise _malformed(f"expected the file to end at {end}, got {size} bytes")
    return tensors


def _dequantise(
    kind: str, raw: np.ndarray[tuple[int], np.dtype[np.uint8]]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    if kind == "F32":
        return raw.view("<f4").astype(np.float32)
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, _BLOCKS[kind][1])
    delta = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return (delta * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(-1)
    # 4 bits: the low halves of 16 bytes are weights 0 to 15 of the block, the high halves 16 to 31
    packed = blocks[:, -16:]
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        return (delta * (nibbles - np.float32(8))).reshape(-1)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    return (delta * nibbles + minimum).reshape(-1)


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _malformed(problem: str) -> WeightsError:
    return WeightsError(f"gguf: {problem}", code="weights.gguf")
