"""The tools root: locked packages in a folder, run from there with chroot, so that what builds an image is locked too.

Nothing is mounted: what a tool reads and writes lies below the root, in /build. No maintainer script has run, so tools
are called by their full names, with an empty environment but for SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError
from .fetch import fetch_packages, unpack_packages
from .folders import unpacked
from .locks import DebianLock


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """An unpacked tools root."""

    root: Path
    epoch: int

    def run(self, *command: str | Path, **environment: str) -> str:
        """Run a tool in the root; paths below the root are given as the tool sees them. Returns its output.

        Raises `BuildError` with what the tool said when it fails.
        """
        line = ["/" + str(part.relative_to(self.root)) if isinstance(part, Path) else part for part in command]
        env = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "SOURCE_DATE_EPOCH": str(self.epoch)}
        done = subprocess.run(
            ["chroot", str(self.root), *line],  # noqa: S607
            env=env | environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{' '.join(line[:3])}: {(done.stderr or done.stdout).strip()[-3000:]}")
        return done.stdout


def require_root() -> None:
    """Raises `BuildError` unless this process may chroot."""
    if os.geteuid() != 0:
        raise BuildError("image/build runs its locked tools with chroot, which needs root; run it as root")


def open_tools(lock: DebianLock, cache: Path, debs: Path, saved: Path | None) -> Tools:
    """The tools root of this lock below `cache`, unpacked if it is not there yet."""
    packages = lock.packages("tools")
    content = "\n".join(package.line() for package in packages)
    root = unpacked(cache / "tools", content, lambda target: _unpack(target, fetch_packages(packages, debs, saved)))
    return Tools(root=root, epoch=lock.epoch)


def _unpack(target: Path, debs: list[Path]) -> None:
    unpack_packages(debs, target)
    for name in ("build", "tmp", "dev", "proc"):
        (target / name).mkdir(exist_ok=True)
    os.mknod(target / "dev/null", 0o20666, os.makedev(1, 3))
    (target / "dev/null").chmod(0o666)
    for name in ("random", "urandom"):
        os.mknod(target / "dev" / name, 0o20444, os.makedev(1, {"random": 8, "urandom": 9}[name]))
