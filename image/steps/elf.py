"""What an ELF file needs at run time: DT_NEEDED, DT_SONAME, DT_RUNPATH (System V gABI, "Dynamic Section"; x86-64)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 14, 15, 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """The dynamic linking facts of one file."""

    needed: tuple[str, ...]
    run_path: tuple[str, ...]
    interpreter: str | None


def read_dynamic(path: Path) -> Dynamic | None:
    """These facts of a 64-bit little-endian x86 ELF file; None for any other. Raises `BuildError` when cut short."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        data = b"\x7fELF" + file.read()
    try:
        return _parse(data)
    except (struct.error, ValueError) as err:
        raise BuildError(f"{path}: not a whole ELF file: {err}") from err


def _parse(data: bytes) -> Dynamic | None:
    kind, machine = struct.unpack_from("<HH", data, 16)
    if data[4:6] != b"\x02\x01" or machine != 62 or kind not in (2, 3):
        return None
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + index * size) for index in range(count)]

    def file_offset(address: int) -> int:
        for kind, _, start, virtual, _, length, _, _ in headers:
            if kind == _PT_LOAD and virtual <= address < virtual + length:
                return int(start + address - virtual)
        raise ValueError(f"address {address:#x} is in no segment")

    entries: list[tuple[int, int]] = []
    interpreter = None
    for kind, _, start, _, _, length, _, _ in headers:
        if kind == _PT_INTERP:
            interpreter = data[start : start + length].rstrip(b"\0").decode()
        if kind == _PT_DYNAMIC:
            for at in range(start, start + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == 0:
                    break
                entries.append((tag, value))
    if not entries:
        return Dynamic(needed=(), run_path=(), interpreter=interpreter)
    strings = file_offset(next(value for tag, value in entries if tag == _DT_STRTAB))

    def text(value: int) -> str:
        return data[strings + value : data.index(b"\0", strings + value)].decode()

    run_path = [part for tag, value in entries if tag in (_DT_RPATH, _DT_RUNPATH) for part in text(value).split(":")]
    return Dynamic(
        needed=tuple(text(value) for tag, value in entries if tag == _DT_NEEDED),
        run_path=tuple(part for part in run_path if part),
        interpreter=interpreter,
    )
