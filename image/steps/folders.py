"""Folders that are made once for what they hold, and files written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def unpacked(target: Path, content: str, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make` unless it was made before for the same `content`; half of one is never left there."""
    stamp = target.with_name(target.name + ".made-of")
    digest = hashlib.sha256(content.encode()).hexdigest()
    if target.is_dir() and stamp.is_file() and stamp.read_text() == digest:
        return target
    stamp.unlink(missing_ok=True)
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    make(target)
    stamp.write_text(digest)
    return target


def remove(target: Path) -> None:
    """A folder and what is in it, if it is there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the bytes and mode of `source`; a link to the same file where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def write(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """A new file with these bytes; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)
