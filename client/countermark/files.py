"""Small files in and out: read whole with a cap, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from countermark.errors import UsageError
from countermark.policy import Policy, parse_policy

MAX_BYTES: Final = 16 * 1024 * 1024


def read_file(path: Path | str) -> bytes:
    """Read a file of at most 16 MiB. Raises `UsageError` (`usage.file`)."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: expected at most {MAX_BYTES} bytes", code="usage.file")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Replace a file with `data`, whole or not at all. Raises `UsageError` (`usage.file`)."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err


def load_policy(path: Path | str) -> Policy:
    """Read and parse a policy file. Raises `UsageError` (`usage.file`) or `PolicyError`."""
    return parse_policy(read_file(path))
