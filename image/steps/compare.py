"""Two builds of one image: the same, or where they differ first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

_CHUNK = 1 << 20


def first_difference(one: Path, other: Path, outputs: Iterable[str]) -> str | None:
    """The first file of the root in which two build folders differ, else the first output with its offset; or None."""
    lists = [(folder / "files.txt").read_text(encoding="utf-8").splitlines() for folder in (one, other)]
    for left, right in zip_longest(*lists):
        if left != right:
            names = sorted({line.rpartition(" ")[2] for line in (left, right) if line})
            return f"/{names[0]}: {left or 'absent'} | {right or 'absent'}"
    for name in outputs:
        if (offset := first_differing_byte(one / name, other / name)) is not None:
            return f"{name} from byte {offset} on, although every file in the root is the same"
    return None


def first_differing_byte(one: Path, other: Path) -> int | None:
    """Where two files differ first, or None; the end of the shorter one counts."""
    with one.open("rb") as left, other.open("rb") as right:
        at = 0
        while True:
            a, b = left.read(_CHUNK), right.read(_CHUNK)
            if a != b:
                shorter = min(len(a), len(b))
                return at + next((i for i in range(shorter) if a[i] != b[i]), shorter)
            if not a:
                return None
            at += len(a)
