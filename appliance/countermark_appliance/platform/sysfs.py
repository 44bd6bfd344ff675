"""The files of the kernel that the `tdx` back end reads and writes, each whole and with a cap.

Attributes of sysfs and configfs take a value in one write and give it in reads up to its end; their size is not known
before. `Sysfs(root)` stands for the machine whose files lie below `root`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

_CHUNK: Final = 64 * 1024


class Sysfs:
    """Every access of this back end to the machine goes through here."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def read(self, path: str, *, max_bytes: int) -> bytes:
        """The whole file. Raises `OSError`; EFBIG when it has more than `max_bytes`."""
        handle = os.open(self.root / path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts: list[bytes] = []
            left = max_bytes + 1
            while left and (part := os.read(handle, min(left, _CHUNK))):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(handle)
        if not left:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", path)
        return b"".join(parts)

    def write(self, path: str, data: bytes) -> None:
        """One write of all of `data`. Raises `OSError`; EIO when the kernel took a part of it."""
        handle = os.open(self.root / path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(handle, data)
        finally:
            os.close(handle)
        if written != len(data):
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes written", path)

    def make(self, path: str) -> None:
        """mkdir. Raises `OSError`."""
        (self.root / path).mkdir()

    def remove(self, path: str) -> None:
        """rmdir. Raises `OSError`."""
        (self.root / path).rmdir()
