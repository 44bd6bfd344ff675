"""What the proxy remembers: the latest answers without a word of them, and the bundles it was asked to keep.

Entries are for the status page and hold facts about an answer, never text of a prompt, an answer or an error. Bundles
hold everything, so their folder is its owner's alone; the oldest are removed when there are too many or too much.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from countermark.bundle import SUFFIX
from countermark.checks import Check, Status
from countermark.errors import RequestError, UsageError
from countermark.proxy.settings import Bundles
from countermark.session import Answer

_KEPT: Final = 200
_NAME: Final = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8,64}" + re.escape(SUFFIX))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request that a node committed to. `state`: verified, withheld, ended (not finished), left (by the client)."""

    receipt: str
    at: float
    route: str
    node: str
    model: str
    simulated: bool
    state: str
    code: str = ""
    step: str = ""
    checks: tuple[dict[str, str], ...] = ()
    """Number, name and status of each."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    seconds: float = 0.0
    first_s: float | None = None
    bundle: str | None = None


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The latest entries and sums over all."""

    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=_KEPT))
    sums: dict[str, int] = field(
        default_factory=lambda: {"verified": 0, "withheld": 0, "ended": 0, "left": 0, "refused": 0}
    )

    def add(self, entry: Entry) -> None:
        self.entries.appendleft(entry)
        self.sums[entry.state] += 1

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]


def outline(checks: tuple[Check, ...]) -> tuple[dict[str, str], ...]:
    """Checks without what was seen: a failed one can quote the request."""
    return tuple({"step": one.step, "name": one.name, "status": one.status.value, "code": one.code} for one in checks)


def counted(checks: tuple[Check, ...]) -> str:
    """A few words: how many held, how many were not made."""
    skipped = sum(check.status is Status.SKIP for check in checks)
    passed = sum(check.status is Status.PASS for check in checks)
    return f"{passed} passed" + (f", {skipped} skipped" if skipped else "")


class Keeper:
    """The folder of bundles. Thread-safe."""

    def __init__(self, bundles: Bundles) -> None:
        """Makes the folder. Raises `UsageError` (`usage.file`)."""
        self._bundles = bundles
        self._lock = threading.Lock()
        try:
            bundles.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise UsageError(f"{bundles.folder}: {err.strerror}", code="usage.file") from err

    def save(self, answer: Answer, receipt: str) -> str:
        """Write the bundle, make room; its file name. Raises `UsageError` (`usage.file`), `BundleError`."""
        when = datetime.fromtimestamp(time.time(), UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        name = f"{when}-{receipt}{SUFFIX}"
        answer.save(self._bundles.folder / name, manifest=self._bundles.manifest)
        with self._lock:
            self._rotate(name)
        return name

    def find(self, name: str) -> Path:
        """The file of a bundle that was saved here, by name or receipt. Raises `RequestError` (`proxy.bundle`)."""
        if re.fullmatch(r"[0-9a-f]{8,64}", name):
            found = next(iter(self._bundles.folder.glob(f"*-{name}{SUFFIX}")), None)
        else:
            found = self._bundles.folder / name if _NAME.fullmatch(name) else None  # a name, not a path
        if found is None or not found.is_file():
            raise RequestError("bundle: no such bundle is kept here", code="proxy.bundle")
        return found

    def sizes(self) -> tuple[int, int]:
        """How many there are, and their bytes."""
        files = self._files()
        return len(files), sum(size for _, size in files)

    def _files(self) -> list[tuple[Path, int]]:
        """Ours, oldest first; other files in the folder are not touched."""
        found = []
        with contextlib.suppress(OSError):  # the folder was taken away: saving says so
            for path in sorted(self._bundles.folder.iterdir()):
                if _NAME.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((path, path.stat().st_size))
        return found

    def _rotate(self, newest: str) -> None:
        files = self._files()
        count, size = len(files), sum(one for _, one in files)
        for path, one in files:
            if count <= self._bundles.keep and size <= self._bundles.keep_bytes:
                return
            if path.name == newest:
                continue
            path.unlink(missing_ok=True)
            count, size = count - 1, size - one
