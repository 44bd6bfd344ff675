"""debian.lock and wheels.lock: what an image is made from, to the last byte.

A line of debian.lock is `NAME VERSION ARCH SHA256 SIZE PATH`, PATH below the archive's host (`debian/pool/...` or
`debian-security/pool/...`), under a `[set]` header; sets and their lines are sorted, and `epoch = N` is the one time
stamp that gets into an image. wheels.lock is pip's own format with exactly one hash for each wheel, a subset of
requirements/appliance.lock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BuildError

HOSTS: Final = {
    "debian": "http://deb.debian.org/",
    "debian-security": "http://security.debian.org/",
}
MAX_PACKAGE_BYTES: Final = 2 * 2**30
_LINE: Final = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]*) (?P<version>[A-Za-z0-9.+:~-]+) (?P<arch>amd64|all) (?P<sha256>[0-9a-f]{64})"
    r" (?P<size>[1-9][0-9]{0,10}) (?P<path>(?:debian|debian-security)/pool/[A-Za-z0-9/_.+:~%-]+\.deb)"
)
_WHEEL: Final = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[A-Za-z0-9.+!]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One locked .deb."""

    name: str
    version: str
    arch: str
    sha256: str
    size: int
    path: str

    @property
    def url(self) -> str:
        """Where the pool keeps it, as long as it does."""
        return HOSTS[self.path.split("/", 1)[0]] + self.path

    @property
    def filename(self) -> str:
        """The last part of its path, as a saved package directory holds it."""
        return self.path.rsplit("/", 1)[1]

    def line(self) -> str:
        """Its line in the lock."""
        return f"{self.name} {self.version} {self.arch} {self.sha256} {self.size} {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianLock:
    """The parsed debian.lock."""

    epoch: int
    sets: dict[str, tuple[Package, ...]]

    def packages(self, *names: str) -> tuple[Package, ...]:
        """The packages of these sets, each once, by name. Raises `BuildError` for a set that the lock lacks."""
        found: dict[str, Package] = {}
        for name in names:
            if name not in self.sets:
                raise BuildError(f"debian.lock has no set [{name}]: run image/lock")
            found |= {package.name: package for package in self.sets[name]}
        return tuple(found[name] for name in sorted(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One locked wheel."""

    name: str
    version: str
    sha256: str

    def line(self) -> str:
        """Its line in the lock, as pip reads it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def parse_debian_lock(text: str) -> DebianLock:
    """debian.lock as a value.

    Raises `BuildError` naming the line for anything that is not of the form above: an unknown line, a package twice in
    one set, sets or packages out of order, no epoch.
    """
    epoch: int | None = None
    sets: dict[str, list[Package]] = {}
    current: list[Package] | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"epoch = ([1-9][0-9]{8,9})", line):
            if epoch is not None or sets:
                raise BuildError(f"debian.lock line {number}: one epoch, before the first set")
            epoch = int(match[1])
        elif match := re.fullmatch(r"\[([a-z][a-z-]*)\]", line):
            if sets and match[1] <= max(sets):
                raise BuildError(f"debian.lock line {number}: set [{match[1]}] is out of order or there twice")
            current = sets.setdefault(match[1], [])
        elif (match := _LINE.fullmatch(line)) and current is not None:
            values = match.groupdict()
            package = Package(**{**values, "size": int(values["size"])})
            if package.size > MAX_PACKAGE_BYTES or ".." in package.path:
                raise BuildError(f"debian.lock line {number}: {package.name} has an impossible size or path")
            if current and package.name <= current[-1].name:
                raise BuildError(f"debian.lock line {number}: {package.name} is out of order or there twice")
            current.append(package)
        else:
            raise BuildError(f"debian.lock line {number}: expected NAME VERSION ARCH SHA256 SIZE PATH, got {line!r}")
    if epoch is None or not sets:
        raise BuildError("debian.lock: no epoch or no set")
    return DebianLock(epoch=epoch, sets={name: tuple(packages) for name, packages in sets.items()})


def encode_debian_lock(lock: DebianLock) -> str:
    """The text that `parse_debian_lock` reads."""
    lines = ["# Made by image/lock from packages.toml. NAME VERSION ARCH SHA256 SIZE PATH", f"epoch = {lock.epoch}"]
    for name in sorted(lock.sets):
        lines += ["", f"[{name}]", *(package.line() for package in sorted(lock.sets[name], key=lambda p: p.name))]
    return "\n".join(lines) + "\n"


def parse_wheels_lock(text: str) -> tuple[Wheel, ...]:
    """wheels.lock as values, sorted by name. Raises `BuildError` naming the line for anything else."""
    wheels: list[Wheel] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        match = _WHEEL.fullmatch(line)
        if match is None:
            raise BuildError(f"wheels.lock line {number}: expected NAME==VERSION --hash=sha256:HEX, got {line!r}")
        wheel = Wheel(**match.groupdict())
        if wheels and wheel.name <= wheels[-1].name:
            raise BuildError(f"wheels.lock line {number}: {wheel.name} is out of order or there twice")
        wheels.append(wheel)
    if not wheels:
        raise BuildError("wheels.lock: no wheel")
    return tuple(wheels)


def read_locks(folder: Path) -> tuple[DebianLock, tuple[Wheel, ...]]:
    """Both locks of a folder. Raises `BuildError` when one is absent or malformed."""
    try:
        debian = (folder / "debian.lock").read_text(encoding="utf-8")
        wheels = (folder / "wheels.lock").read_text(encoding="utf-8")
    except OSError as err:
        raise BuildError(f"{err.filename}: {err.strerror}; image/lock writes the locks") from err
    return parse_debian_lock(debian), parse_wheels_lock(wheels)
