"""Where the cosignatures of a log's published files stand: on `checkpoint`, and on older heads under `cosigned/<size>`.

A log goes on before its witnesses have seen where it went. So a head that somebody has cosigned is kept when the next
one takes its place, until a later one has as many lines; whoever needs cosignatures takes the head with the most.
Operator and witness may be two processes: both lock the directory while they write.

Not checked here: any signature. A line that nobody asked for costs a kilobyte.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from countermark.errors import FormatError, LogError, UsageError
from countermark.files import read_file, write_file
from countermark.tlog.checkpoint import MAX_NOTE_BYTES, Signature, parse_checkpoint_text, parse_note
from countermark.tlog.cosignature import with_lines

FOLDER: Final = "cosigned"
MAX_HEADS: Final = 64
_PUBLIC: Final = 0o644


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a log's published files for writing; waits. Raises `UsageError` (`usage.file`)."""
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PUBLIC)
    except OSError as err:
        raise UsageError(f"{directory}: {err.strerror}", code="usage.file") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def add_lines(directory: Path, note: bytes, lines: Iterable[Signature]) -> None:
    """Put lines on a head of this log, wherever it stands by now.

    Raises `FormatError` (`tlog.*`), `UsageError` (`usage.file`).
    """
    with locked(directory):
        latest = directory / "checkpoint"
        published = read_file(latest, max_bytes=MAX_NOTE_BYTES)
        if parse_note(published).text == parse_note(note).text:
            write_file(latest, with_lines(published, lines), mode=_PUBLIC)
        else:
            _keep(directory, with_lines(note, lines))


def retire(directory: Path, note: bytes) -> None:
    """Keep a head that has cosignatures before another takes its place; call it while `locked`."""
    if len(parse_note(note).signatures) > 2:  # the log's own two
        _keep(directory, note)


def heads(directory: Path) -> tuple[bytes, ...]:
    """The heads that stand here, the one with the most lines first, and of those the latest.

    Files that are no checkpoints are passed over. Raises `UsageError` (`usage.file`).
    """
    found: list[tuple[int, int, bytes]] = []
    folder = directory / FOLDER
    kept = sorted(folder.iterdir())[-MAX_HEADS:] if folder.is_dir() else []
    for path in (directory / "checkpoint", *kept):
        try:
            data = read_file(path, max_bytes=MAX_NOTE_BYTES)
            note = parse_note(data)
            found.append((len(note.signatures), parse_checkpoint_text(note.text).size, data))
        except (FormatError, UsageError):
            continue
    return tuple(data for _, _, data in sorted(found, reverse=True))


def _keep(directory: Path, note: bytes) -> None:
    parsed = parse_note(note)
    size, lines = parse_checkpoint_text(parsed.text).size, len(parsed.signatures)
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{size:019d}"
    if path.exists():
        if parse_note(path.read_bytes()).text != parsed.text:
            raise LogError(f"{path}: expected one head of {size} leaves, got a second", code="log.fork")
        note = with_lines(path.read_bytes(), parsed.signatures)
        lines = len(parse_note(note).signatures)
    write_file(path, note, mode=_PUBLIC)
    for other in folder.iterdir():
        older = other.name < path.name and other.name.isdigit()
        if older and len(parse_note(other.read_bytes()).signatures) <= lines:
            other.unlink()
