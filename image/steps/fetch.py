"""Packages and wheels into the cache, each checked against its lock before anything reads it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import BuildError
from .locks import Package, Wheel

PYTHON_TAGS = ("--python-version", "3.13", "--implementation", "cp", "--abi", "cp313", "--abi", "abi3", "--abi", "none")
# What trixie's glibc runs: PEP 600 tags up to 2.41, and the older names.
PLATFORM_TAGS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(41, 4, -1)), "manylinux2014_x86_64")
PARALLEL = 8


def fetch_packages(packages: Sequence[Package], cache: Path, saved: Path | None = None) -> list[Path]:
    """Every package as a file whose hash is right: from the cache, from `saved`, or from the pool.

    Raises `BuildError` naming the package when it is nowhere or is not what the lock says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(lambda package: _fetch(package, cache, saved), packages))


def _fetch(package: Package, cache: Path, saved: Path | None) -> Path:
    target = cache / package.filename
    if target.is_file() and _matches(target, package):
        return target
    staged = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        if saved is not None:
            source = saved / package.filename
            if not source.is_file():
                raise BuildError(f"{package.name} {package.version}: {source} is not there")
            shutil.copyfile(source, staged)
        else:
            _download(package, staged)
        if not _matches(staged, package):
            raise BuildError(
                f"{package.name} {package.version}: expected {package.size} bytes with SHA-256 {package.sha256}, "
                f"got {staged.stat().st_size} bytes with {sha256_file(staged)}"
            )
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    return target


def _download(package: Package, target: Path) -> None:
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer, target.open("wb") as out:  # noqa: S310
            left = package.size + 1  # one byte too many is seen by the size check
            while left and (block := answer.read(min(left, 1 << 20))):
                out.write(block)
                left -= len(block)
    except urllib.error.HTTPError as err:
        if err.code == 404:
            raise BuildError(
                f"{package.name} {package.version} is no longer in Debian's pool ({package.url}). "
                "Lock today's versions with image/lock (that is another image), or give a folder with it: --packages"
            ) from err
        raise BuildError(f"{package.name}: {package.url}: {err}") from err
    except OSError as err:
        raise BuildError(f"{package.name}: {package.url}: {err}") from err


def _matches(path: Path, package: Package) -> bool:
    return path.stat().st_size == package.size and sha256_file(path) == package.sha256


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheels(wheels: Sequence[Wheel], cache: Path, saved: Path | None = None) -> list[Path]:
    """Every wheel as a file with the locked hash, by name: from the cache, from `saved`, or by pip from its index."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {sha256_file(path): path for path in cache.glob("*.whl")}
    missing = [wheel for wheel in wheels if wheel.sha256 not in found]
    if missing and saved is not None:
        for path in saved.glob("*.whl"):
            found[sha256_file(path)] = path
        missing = [wheel for wheel in wheels if wheel.sha256 not in found]
        if missing:
            names = ", ".join(f"{wheel.name} {wheel.version}" for wheel in missing)
            raise BuildError(f"{saved} has no wheel with the locked hash of {names}")
    if missing:
        lock = cache / "wanted.txt"
        lock.write_text("".join(wheel.line() + "\n" for wheel in missing), encoding="utf-8")
        pip_download(lock, cache)
        found |= {sha256_file(path): path for path in cache.glob("*.whl")}
    return [found[wheel.sha256] for wheel in wheels]


def pip_download(requirements: Path, target: Path) -> None:
    """The wheels of a requirements file with hashes, for the image's Python, into `target`; raises `BuildError`."""
    tags = [argument for tag in PLATFORM_TAGS for argument in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        *PYTHON_TAGS,
        *tags,
        "--require-hashes",
        "-r",
        str(requirements),
        "-d",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"pip download failed: {done.stderr.strip()[-2000:]}")


def unpack_packages(debs: Sequence[Path], target: Path) -> None:
    """The files of these packages, in this order, with dpkg-deb; no maintainer script runs."""
    target.mkdir(parents=True)
    for deb in debs:
        done = subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], capture_output=True, text=True, check=False)  # noqa: S607
        if done.returncode:
            raise BuildError(f"dpkg-deb -x {deb.name}: {done.stderr.strip()}")


def unpack_wheels(wheels: Sequence[Path], target: Path) -> None:
    """The files of these wheels below `target`; a `.data` tree or a path that leaves it is refused."""
    target.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                parts = Path(info.filename).parts
                if Path(info.filename).is_absolute() or ".." in parts:
                    raise BuildError(f"{wheel.name}: {info.filename!r} leaves the folder")
                if parts[0].endswith(".data"):
                    continue  # scripts and headers, which no image has
                if not info.is_dir():
                    path = target / info.filename
                    data = archive.read(info)
                    if path.exists() and path.read_bytes() != data:
                        raise BuildError(f"{wheel.name}: {info.filename} is another package's too")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                    path.chmod(0o755 if ".so" in path.name else 0o644)
