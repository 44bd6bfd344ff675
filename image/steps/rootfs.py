"""The tree of an image: selected files of the packages, our code, the overlay, and what no package brings.

Every file is root's, 0644 or 0755; nothing is setuid, nothing is a device. Byte code is compiled here, by the image's
own Python and tied to no time stamp, because the image cannot write any and start-up must not compile.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BuildError
from .fetch import fetch_packages, unpack_packages, unpack_wheels
from .folders import link_or_copy, remove, unpacked, write
from .imports import modules_below, reach
from .locks import DebianLock
from .select import below, close, parse_keep, resolve_links, select, walk
from .tools import Tools

SITE: Final = "usr/lib/python3/dist-packages"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
# What Debian's maintainer scripts would choose with update-alternatives: the reference BLAS. No answer depends on it.
ALTERNATIVES: Final = {
    f"{LIBRARIES}/libblas.so.3": "blas/libblas.so.3",
    f"{LIBRARIES}/liblapack.so.3": "lapack/liblapack.so.3",
}
FOLDERS: Final = ("dev", "proc", "run", "sys", "tmp", "var/tmp", "root")
# Not in a production image, and of no use to any but test: a simulated platform that would sign whatever it is told.
SIMULATION: Final = ("countermark_appliance.platform.sim", "countermark_appliance.platform.vtpm")
CODE: Final = {"countermark": "client", "countermark_appliance": "appliance", "countermark_kernels": "kernels"}
CODE_SUFFIXES: Final = (".py", ".c", ".h")  # the C sources are what the numerics' digest is made of
NATIVE: Final = "kernels/countermark_kernels/native"
COMPILERS: Final = 2
GPU_ONLY: Final = ("triton", "pynvml")
SYSTEMD_PACKAGES: Final = ("systemd", "libsystemd-shared", "systemd-resolved", "mount", "e2fsprogs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Which of the images: `production`, `test` or `development`, for `cpu` or `gpu`."""

    name: str
    variant: str

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of debian.lock that its files come from."""
        return ("rootfs", f"rootfs-{self.variant}", *(["rootfs-development"] if self.name == "development" else []))

    @property
    def simulated(self) -> bool:
        """Whether the code of the simulated platforms is in it."""
        return self.name == "test"


def unpack_base(kind: Kind, lock: DebianLock, cache: Path, debs: Path, saved: Path | None) -> Path:
    """The packages that an image of this kind may take files from, unpacked below `cache`, with modes set right."""
    packages = lock.packages(*kind.sets)

    def make(target: Path) -> None:
        unpack_packages(fetch_packages(packages, debs, saved), target)
        for link, text in ALTERNATIVES.items():
            if (target / link).parent.is_dir():
                (target / link).symlink_to(text)
        set_modes(target)

    content = "\n".join(package.line() for package in packages)
    return unpacked(cache / f"base-{'-'.join(kind.sets)}", content, make)


def add_wheels(base: Path, wheels: list[Path], target: Path) -> None:
    """A new tree of links to everything in `base`, with these wheels unpacked into it."""
    for path in walk(base):
        link_or_copy(base / path, target / path)
    unpack_wheels(wheels, target / SITE)


def set_modes(root: Path) -> None:
    """Every file 0644, or 0755 if anyone may execute it: no setuid, nothing that group or others may write."""
    for folder, names, files in os.walk(root):
        for path in [Path(folder), *(Path(folder) / name for name in names + files)]:
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(0o755 if stat.S_ISDIR(mode) or mode & 0o111 else 0o644)


def keep_rules(image: Path, kind: Kind) -> str:
    """keep.txt, and after it rootfs/systemd.keep: of systemd's packages that list alone."""
    lines = (image / "keep.txt").read_text(encoding="utf-8").splitlines()
    lines.append("[all]")
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
        (target / name).mkdir(mode=0o755, parents=True, exist_ok=True)
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
    try_rootfs(target, () if kind.variant == "gpu" else GPU_ONLY)


def install_code(repository: Path, kind: Kind, target: Path, tools: Tools) -> None:
    """The appliance, the kernels, and of the client the modules that those import; no simulated platform but in `test`.

    Only what git knows is taken, as it lies in the working tree. Raises `BuildError` for an import that the tree lacks.
    """
    listed = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z", "--", *(f"{folder}/{name}" for name, folder in CODE.items())],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise BuildError(f"git ls-files: {listed.stderr.strip()}")
    folders = {name: repository / folder for name, folder in CODE.items()}
    roots = [m for name in CODE if name != "countermark" for m in modules_below(folders[name], name)]
    ours, others = reach(folders, [m for m in roots if kind.simulated or not m.startswith(SIMULATION)], _absent(kind))
    for name in sorted(listed.stdout.split("\0")):
        path = name.partition("/")[2]
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        source = repository / name
        if not path or not source.is_file() or (source.suffix == ".py" and module not in ours):
            continue
        if source.suffix in CODE_SUFFIXES:
            write(target / SITE / path, source.read_bytes())
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    write(target / SITE / f"{project['name']}-{project['version']}.dist-info" / "METADATA", metadata)
    for name, why in sorted(others.items()):
        absent = name in GPU_ONLY and kind.variant == "cpu"
        places = (target / SITE / name, target / SITE / f"{name}.py")
        if name not in sys.stdlib_module_names and not absent and not any(place.exists() for place in places):
            raise BuildError(f"{why} imports {name}, which the image lacks: packages.toml [wheels] and keep.txt")
    build_native(repository, target / SITE / "countermark_kernels" / "_native.so", tools)


def _absent(kind: Kind) -> tuple[str, ...]:
    return () if kind.simulated else SIMULATION


def build_native(repository: Path, target: Path, tools: Tools) -> None:
    """The native kernels with the tools root's compiler, as kernels/build_native.py calls any other; kept by source."""
    sources = [repository / "kernels/build_native.py", *sorted((repository / NATIVE).iterdir())]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources)).hexdigest()
    kept = tools.root / "build" / "native" / f"{digest}.so"
    if not kept.is_file():
        place = tools.root / "build" / "compile"
        remove(place)
        shutil.copytree(repository / NATIVE, place / "countermark_kernels/native")
        shutil.copy(repository / "kernels/build_native.py", place)
        tools.run("/usr/bin/python3.13", "-I", place / "build_native.py")
        kept.parent.mkdir(exist_ok=True)
        (place / "countermark_kernels/_native.so").replace(kept)
        remove(place)
    write(target, kept.read_bytes(), 0o755)


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
            place.symlink_to(source.readlink())
        else:
            write(place, source.read_bytes(), 0o755 if source.stat().st_mode & 0o100 else 0o644)


def compile_python(target: Path, tools: Tools) -> None:
    """Byte code beside every module, valid whatever the source's time stamp (PEP 552, unchecked hash).

    What was compiled before is taken from a store by what it was made of; a module's byte code hangs on nothing else,
    in particular not on what the same process has compiled before (tests/image holds that).
    """
    store = tools.root / "build" / "pyc"
    store.mkdir(exist_ok=True)
    wanted, missing = [], []
    for path in walk(target):
        if path.endswith(".py"):
            key = hashlib.sha256(path.encode() + b"\0" + (target / path).read_bytes()).hexdigest()
            wanted.append((path, store / key))
            if not (store / key).exists():
                missing.append(f"{path}\0{key}")
    halves = [missing[part::COMPILERS] for part in range(COMPILERS)]

    def compile_some(number: int) -> None:
        jobs = store / f"jobs-{number}"
        write(jobs, "\n".join(halves[number]))
        tools.run("/usr/bin/python3.13", "-I", "-c", _COMPILE, jobs, target, store, PYTHONHASHSEED="0")
        jobs.unlink()

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(compile_some, range(COMPILERS)))
    for path, compiled in wanted:
        place = target / Path(path).parent / "__pycache__" / f"{Path(path).stem}.cpython-313.pyc"
        link_or_copy(compiled, place)


_COMPILE: Final = """
import os, py_compile, sys
jobs, root, store = sys.argv[1:]
for line in filter(None, open(jobs).read().split("\\n")):
    path, key = line.split("\\0")
    staged = f"{store}/{key}.{os.getpid()}"
    py_compile.compile(f"{root}/{path}", cfile=staged, dfile=f"/{path}", doraise=True,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    os.chmod(staged, 0o644)
    os.rename(staged, f"{store}/{key}")
"""

_NEVER: Final = frozenset(
    ["agetty", "apt", "bash", "busybox", "dash", "dpkg", "getty", "login", "perl", "sh", "ssh", "sshd", "su", "sudo"]
)


def check_rootfs(target: Path, kind: Kind) -> None:
    """Raises `BuildError` for what no image may hold: setuid files, devices, dangling links, shells, simulations."""
    for path in walk(target):
        full = target / path
        mode = full.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise BuildError(f"{path} is neither a file nor a link")
        if stat.S_ISLNK(mode) and not _leads_somewhere(target, path):
            raise BuildError(f"{path} is a link to {full.readlink()}, which is not there")
        if stat.S_ISREG(mode) and mode & 0o7022:
            raise BuildError(f"{path} has mode {mode & 0o7777:o}")
        if kind.name != "development" and full.name in _NEVER:
            raise BuildError(f"{path} in a {kind.name} image")
        if not kind.simulated and any(part in f"/{path}" for part in ("/platform/sim/", "/platform/vtpm/")):
            raise BuildError(f"{path}: a simulated platform in a {kind.name} image")


_TRY: Final = """
import importlib, pathlib, sys
site = pathlib.Path("/usr/lib/python3/dist-packages")
for path in sorted((site / "countermark_appliance").rglob("*.py")):
    name = ".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
    try:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name not in sys.argv[1:]:
            raise
import countermark_kernels, torch
assert (torch.ones(3, 3) @ torch.ones(3, 3)).sum() == 27
countermark_kernels.kernel_digest()
"""


def try_rootfs(target: Path, absent: tuple[str, ...]) -> None:
    """Import all of the appliance in the tree, as a user who can change nothing; raises `BuildError` if that fails.

    `absent`: packages that this variant may lack. /dev/urandom and /dev/null are there meanwhile.
    """
    nodes = [(target / "dev/null", 3), (target / "dev/urandom", 9)]
    try:
        for path, minor in nodes:
            os.mknod(path, 0o20666, os.makedev(1, minor))
            path.chmod(0o666)
        command = ["chroot", "--userspec=65534:65534", str(target), "/usr/bin/python3", "-I", "-B", "-c", _TRY, *absent]
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    finally:
        for path, _ in nodes:
            path.unlink(missing_ok=True)
    if done.returncode:
        raise BuildError(f"the service does not load in the image: {done.stderr.strip()[-2000:]}")


def _leads_somewhere(target: Path, path: str) -> bool:
    text = str((target / path).readlink())
    joined = below(str(Path(path).parent), text)
    full = target / resolve_links(target, joined)
    return joined.startswith("run/") or full.exists() or full.is_symlink()


def file_list(target: Path) -> str:
    """files.txt: a line `SHA256 SIZE MODE PATH` for each file, `-> TEXT` in the digest's place for links, sorted."""
    lines = []
    for path in walk(target):
        full = target / path
        if full.is_symlink():
            lines.append(f"-> {full.readlink()} 0 0777 {path}\n")
        else:
            data = full.read_bytes()
            lines.append(f"{hashlib.sha256(data).hexdigest()} {len(data)} {full.stat().st_mode & 0o7777:04o} {path}\n")
    return "".join(lines)
