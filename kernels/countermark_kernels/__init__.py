"""Exact kernels: one operation a file, each with its specification, its reference and its fast path.

The arithmetic of profile `exact-v1` is written down in kernels/NUMERICS.md.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

PROFILE = "exact-v1"


def kernel_digest() -> bytes:
    """SHA-256 over this package's own sources: for each .py, .c and .h file in order of its name within the package,

    u32 length of the name, the name in UTF-8, u64 length of the contents, the contents (big endian).
    """
    digest = hashlib.sha256()
    root = files(__name__)
    found = {path.name: path for path in root.iterdir() if path.name.endswith(".py")}
    found |= {f"gpu/{p.name}": p for p in root.joinpath("gpu").iterdir() if p.name.endswith(".py")}
    found |= {f"native/{p.name}": p for p in root.joinpath("native").iterdir() if p.name.endswith((".c", ".h"))}
    for name, path in sorted(found.items()):
        data = path.read_bytes()
        digest.update(len(name.encode()).to_bytes(4, "big") + name.encode() + len(data).to_bytes(8, "big") + data)
    return digest.digest()
