"""The initramfs: init.c compiled without libc's shared half, the kernel modules that it loads, and a cpio around them.

The archive is `newc` (Documentation/driver-api/early-userspace/buffer-format.rst), written here, uncompressed: it is
small, its bytes do not hang on a compressor's version, and the kernel measures it as it is.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path

from .errors import BuildError

_ALIGN = 4


def load_order(modules: Path, wanted: list[str]) -> list[Path]:
    """The module files to load for `wanted`, each after what it depends on.

    `modules` is usr/lib/modules/VERSION. The dependencies are those that each file names in its own `.modinfo`
    (`depends=`). Raises `BuildError` for a module that is neither a file nor built in.
    """
    files = {re.sub(r"\.ko(\.xz)?$", "", path.name).replace("-", "_"): path for path in modules.rglob("*.ko*")}
    builtin = (modules / "modules.builtin").read_text().split()
    inside = {Path(line).name.removesuffix(".ko").replace("-", "_") for line in builtin}
    order: list[Path] = []
    done: set[str] = set()

    def add(name: str, why: str) -> None:
        if name in done or name in inside:
            return
        done.add(name)
        if name not in files:
            raise BuildError(f"no kernel module {name} (for {why}) in {modules.name}")
        for needed in depends(read_module(files[name])):
            add(needed, name)
        order.append(files[name])

    for name in wanted:
        add(name.replace("-", "_"), "the list")
    return order


def read_module(path: Path) -> bytes:
    """A module as the kernel takes it: not compressed. Raises `BuildError` when it carries no signature."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    if not data.endswith(b"~Module signature appended~\n"):
        raise BuildError(f"{path.name} is not signed: module.sig_enforce would refuse it")
    return data


def depends(module: bytes) -> list[str]:
    """The modules that this one names in its `.modinfo` section."""
    match = re.search(rb"\0depends=([A-Za-z0-9_,-]*)\0", module)
    if match is None:
        raise BuildError("a kernel module without depends=")
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name]


def cpio(entries: dict[str, bytes | None], executable: set[str]) -> bytes:
    """A newc archive of folders (None) and files, in name order; all zero but names, modes and contents."""
    out = bytearray()
    for inode, name in enumerate([*sorted(entries), "TRAILER!!!"], 1):
        data, number = entries.get(name), inode
        if name == "TRAILER!!!":
            mode, links, number = 0, 1, 0
        elif data is None:
            mode, links = 0o040755, 2
        else:
            mode, links = 0o100755 if name in executable else 0o100644, 1
        raw, content = name.encode() + b"\0", data or b""
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        out += bytes(-len(out) % _ALIGN) + content
        out += bytes(-len(out) % _ALIGN)
    return bytes(out)
