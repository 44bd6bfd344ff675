"""The tree of an image: selected files of the packages, our code, the overlay, and what no package brings.

Every file is root's, 0644 or 0755; nothing is setuid, nothing is a device. Byte code is compiled here, by the image's own
Python and tied to no time stamp, because the image cannot write any and start-up must not compile.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BuildError
from .fetch import fetch_packages, fetch_wheels, unpack_packages, unpack_wheels
from .folders import link_or_copy, unpacked, write
from .locks import DebianLock, Wheel
from .select import close, parse_keep, select, walk
from .tools import Tools

SITE: Final = "usr/lib/python3/dist-packages"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
# What Debian's maintainer scripts would choose with update-alternatives: the reference BLAS. No answer depends on it.
ALTERNATIVES: Final = {
    f"{LIBRARIES}/libblas.so.3": "blas/libblas.so.3",
    f"{LIBRARIES}/liblapack.so.3": "lapack/liblapack.so.3",
}
FOLDERS: Final = ("dev", "proc", "run", "sys", "tmp", "var", "root")
# Not in a production image, and of no use to any but test: a simulated platform that would sign whatever it is told.
SIMULATION: Final = ("countermark_appliance/platform/sim/", "countermark_appliance/platform/vtpm/")
SYSTEMD_PACKAGES: Final = ("systemd", "libsystemd-shared", "systemd-resolved", "mount", "e2fsprogs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Which of the images: `production`, `test` or `development`, for `cpu` or `gpu`."""

    name: str
    variant: str

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of debian.lock that its files come from."""
        extra = (["rootfs-gpu"] if self.variant == "gpu" else []) + (
            ["rootfs-development"] if self.name == "development" else []
        )
        return ("rootfs", *extra)

    @property
    def simulated(self) -> bool:
        """Whether the code of the simulated platforms is in it."""
        return self.name == "test"


def unpack_base(
    kind: Kind, lock: DebianLock, wheels: tuple[Wheel, ...], cache: Path, debs: Path, saved: Path | None
) -> Path:
    """Everything that an image of this kind may take files from, unpacked below `cache`."""
    packages = lock.packages(*kind.sets)
    content = "\n".join([package.line() for package in packages] + [wheel.line() for wheel in wheels])

    def make(target: Path) -> None:
        unpack_packages(fetch_packages(packages, debs, saved), target)
        unpack_wheels(fetch_wheels(wheels, debs, saved), target / SITE)
        for link, text in ALTERNATIVES.items():
            (target / link).symlink_to(text)
        for folder, names, files in os.walk(target):
            for name in [folder, *(os.path.join(folder, name) for name in names + files)]:
                if not os.path.islink(name):
                    mode = os.stat(name).st_mode
                    os.chmod(name, 0o755 if stat.S_ISDIR(mode) or mode & 0o111 else 0o644)

    return unpacked(cache / f"base-{'-'.join(kind.sets)}", content, make)


def keep_rules(image: Path, kind: Kind) -> str:
    """keep.txt, and after it rootfs/systemd.keep: of systemd's packages that list alone."""
    lines = (image / "keep.txt").read_text(encoding="utf-8").splitlines() + ["[all]"]
    for line in (image / "rootfs" / "systemd.keep").read_text(encoding="utf-8").splitlines():
        variant, _, path = line.rpartition(" ")
        if line.startswith("#"):
            continue
        if not variant or variant == kind.variant:
            lines.append(path)
    return "\n".join(lines)


def build_rootfs(repository: Path, kind: Kind, base: Path, target: Path, tools: Tools, sim_state: Path | None) -> None:
    """Fill the new folder `target` with the tree of an image."""
    image = repository / "image"
    rules = parse_keep(keep_rules(image, kind), (kind.name, kind.variant))
    kept, _ = close(base, select(base, rules, "keep.txt"))
    for path in kept:
        link_or_copy(base / path, target / path)
    for name in FOLDERS:
        (target / name).mkdir(mode=0o755, exist_ok=True)
    install_code(repository, kind, target, tools)
    authorities = sorted((base / "usr/share/ca-certificates").rglob("*.crt"))
    write(target / "usr/lib/ssl/cert.pem", b"".join(path.read_bytes() for path in authorities))
    for overlay in ("common", *(["gpu"] if kind.variant == "gpu" else []), kind.name):
        lay_over(image / "rootfs" / overlay, target)
    if kind.simulated:
        if sim_state is None:
            raise BuildError("a test image needs the state of its simulated machine")
        for path in walk(sim_state):
            write(target / "usr/lib/countermark/sim" / path, (sim_state / path).read_bytes())
    compile_python(target, tools)
    check_rootfs(target, kind)


def install_code(repository: Path, kind: Kind, target: Path, tools: Tools) -> None:
    """Our three packages as they stand in git's index, without simulated platforms unless this is a test image."""
    listed = subprocess.run(
        [
            "git",
            "-C",
            str(repository),
            "ls-files",
            "-z",
            "--",
            "client/countermark",
            "appliance/countermark_appliance",
            "kernels/countermark_kernels",
        ],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise BuildError(f"git ls-files: {listed.stderr.strip()}")
    for name in sorted(listed.stdout.split("\0")):
        path = name.partition("/")[2]
        if not path or path.endswith(".pyi") or not (repository / name).is_file():
            continue
        if not kind.simulated and path.startswith(SIMULATION):
            continue
        write(target / SITE / path, (repository / name).read_bytes())
    version = next(
        line.split('"')[1]
        for line in (repository / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        if line.startswith("version = ")
    )
    metadata = f"Metadata-Version: 2.1\nName: countermark\nVersion: {version}\n"
    write(target / SITE / f"countermark-{version}.dist-info" / "METADATA", metadata)
    build_native(repository, target / SITE / "countermark_kernels" / "_native.so", tools)


def build_native(repository: Path, target: Path, tools: Tools) -> None:
    """The native kernels with the tools root's compiler, as kernels/build_native.py calls any other."""
    place = tools.root / "build" / "native"
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(repository / "kernels/countermark_kernels/native", place / "countermark_kernels/native")
    shutil.copy(repository / "kernels/build_native.py", place)
    tools.run("/usr/bin/python3.13", "-I", place / "build_native.py")
    library = place / "countermark_kernels/_native.so"
    if not library.is_file():
        raise BuildError("the native kernels were not built")
    write(target, library.read_bytes(), 0o755)
    shutil.rmtree(place)


def lay_over(overlay: Path, target: Path) -> None:
    """The files and links of one overlay folder, over what is there."""
    if not overlay.is_dir():
        return
    for path in walk(overlay):
        place, source = target / path, overlay / path
        if place.exists() or place.is_symlink():
            place.unlink()
        if source.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.readlink(source))
        else:
            write(place, source.read_bytes(), 0o755 if source.stat().st_mode & 0o100 else 0o644)


def compile_python(target: Path, tools: Tools) -> None:
    """Byte code beside every module, valid whatever the source's time stamp (PEP 552, unchecked hash)."""
    for folder in ("usr/lib/python3.13", SITE):
        tools.run("/usr/bin/python3.13", "-I", "-c", _COMPILE, target / folder, "/" + folder, PYTHONHASHSEED="0")


# One process and one order, so that what one module leaves interned is there for the next in every build alike.
_COMPILE: Final = """
import os, py_compile, sys
root, shown = sys.argv[1:]
for folder, names, files in os.walk(root):
    names.sort()
    for name in sorted(files):
        if name.endswith(".py"):
            path = os.path.join(folder, name)
            py_compile.compile(path, dfile=shown + path[len(root):], doraise=True,
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""

_SHELLS: Final = (
    "sh",
    "bash",
    "dash",
    "busybox",
    "perl",
    "ssh",
    "sshd",
    "agetty",
    "login",
    "su",
    "sudo",
    "apt",
    "dpkg",
)


def check_rootfs(target: Path, kind: Kind) -> None:
    """Raises `BuildError` for what no image may hold: setuid files, devices, dangling libraries, shells, simulations."""
    for path in walk(target):
        full = target / path
        mode = full.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise BuildError(f"{path} is neither a file nor a link")
        if stat.S_ISREG(mode) and mode & 0o7022:
            raise BuildError(f"{path} has mode {mode & 0o7777:o}")
        if kind.name != "development" and full.name in _SHELLS:
            raise BuildError(f"{path} in a {kind.name} image")
        if not kind.simulated and any(part in f"/{path}" for part in ("/platform/sim/", "/platform/vtpm/")):
            raise BuildError(f"{path}: a simulated platform in a {kind.name} image")


def file_list(target: Path) -> str:
    """files.txt: a line `SHA256 SIZE MODE PATH` for each file, `-> TEXT` in the digest's place for links, sorted."""
    lines = []
    for path in walk(target):
        full = target / path
        if full.is_symlink():
            lines.append(f"{'-> ' + os.readlink(full)} 0 0777 {path}\n")
        else:
            data = full.read_bytes()
            lines.append(f"{hashlib.sha256(data).hexdigest()} {len(data)} {full.stat().st_mode & 0o7777:04o} {path}\n")
    return "".join(lines)
