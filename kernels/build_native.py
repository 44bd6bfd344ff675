"""Compile the native kernels into countermark_kernels/_native.so.

Three ways in: `python kernels/build_native.py` builds in place; hatchling runs `CustomBuildHook` for wheels and for
editable installs. Without a C compiler the wheel is pure Python, a message says so, and the torch path computes the
same bits. The flags are part of the numerics: no contraction, no fast-math; one object per instruction set, chosen at
run time. The digest of the C sources is compiled in, and a library built from other sources is not loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent / "countermark_kernels"
LIBRARY = "_native.so"
FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-overflow",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512vnni": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}


def source_digest() -> str:
    """SHA-256 over the native sources as countermark_kernels.kernel_digest frames them, hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (PACKAGE / "native").iterdir() if p.suffix in (".c", ".h")):
        name, data = path.name.encode(), path.read_bytes()
        digest.update(len(name).to_bytes(4, "big") + name + len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def compiler() -> str | None:
    """The C compiler: the first of cc, gcc, clang on the path."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(target: Path) -> str | None:
    """Compile into `target`. Returns None, or why there is no library."""
    cc = compiler()
    if cc is None:
        return "no C compiler (cc, gcc or clang) on the path"
    if os.name != "posix" or sys.maxsize < 2**32:
        return "needs a 64-bit POSIX system"
    sources = PACKAGE / "native"
    isas = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {}
    with tempfile.TemporaryDirectory() as folder:
        objects = {isa: Path(folder) / f"ops_{isa}.o" for isa in ("portable", *isas)}

        def compile_isa(isa: str) -> str | None:
            command = [cc, *FLAGS, *isas.get(isa, []), f"-DCM_ISA={isa}", "-c", str(sources / "ops.c"), "-o"]
            return _run([*command, str(objects[isa])])

        with ThreadPoolExecutor() as pool:
            errors = dict(zip(objects, pool.map(compile_isa, objects), strict=True))
        if errors["portable"]:
            return errors["portable"]
        built = [isa for isa, error in errors.items() if error is None]
        library = Path(folder) / LIBRARY
        error = _run(
            [cc, *FLAGS, "-shared", f'-DCM_SOURCE_DIGEST="{source_digest()}"']
            + [f"-DCM_HAVE_{isa}" for isa in built]
            + [str(sources / name) for name in ("api.c", "decoder.c", "pool.c")]
            + [str(objects[isa]) for isa in built]
            + ["-lm", "-o", str(library)]
        )
        if error:
            return error
        staged = target.with_suffix(".new")
        shutil.copyfile(library, staged)
        staged.chmod(0o755)
        staged.replace(target)  # a running process keeps the file it has mapped
    return None


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{command[0]} failed: {done.stderr.strip()[-2000:]}"


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class CustomBuildHook(BuildHookInterface[Any]):
        """Adds the library to the wheel, or builds it in place for an editable install."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            target = PACKAGE / LIBRARY
            problem = build(target)
            if problem:
                self.app.display_warning(f"native kernels not built: {problem}; the torch path will be used")
                return
            if version != "editable":
                build_data["force_include"][str(target)] = f"countermark_kernels/{LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    reason = build(PACKAGE / LIBRARY)
    print(f"native kernels not built: {reason}" if reason else f"built {LIBRARY}")
    sys.exit(1 if reason else 0)
