"""Files in and out: read whole with a cap, written whole or not at all, readable by their owner only (or `mode`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from countermark.errors import UsageError

MAX_BYTES: Final = 16 * 1024 * 1024


def read_file(path: Path | str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file. Raises `UsageError`: `usage.file` (the system's reason), `usage.too_long`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err
    if len(data) > max_bytes:
        raise UsageError(f"{path}: expected at most {max_bytes} bytes", code="usage.too_long")
    return data


def write_new_file(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, durably, with mode 0600. Raises `UsageError` (`usage.file`)."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_names(path.parent)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file with `data`, durably, whole or not at all. Raises `UsageError` (`usage.file`)."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_names(path.parent)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err


def _sync_names(path: Path) -> None:
    """A name is to be as durable as what it names."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
