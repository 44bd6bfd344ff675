"""From everything that was unpacked, the files of an image: what keep.txt names, and the libraries those files need.

keep.txt has one pattern a line, below `/`: `*` and `?` stay in one path part, `**` crosses them, and a pattern names
files and links, never folders. `!` takes away again; the last pattern that matches a path decides. A pattern that
matches nothing is an error, so that the list cannot rot. `[test]`, `[gpu]` and so on open lines for a kind or variant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from .elf import read_dynamic
from .errors import BuildError

LIBRARY_PATH: Final = ("usr/lib/x86_64-linux-gnu", "usr/lib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of keep.txt."""

    line: str
    keep: bool
    begin: str  # up to its first wildcard: rules most paths out, and fast
    whole: re.Pattern[str]

    def matches(self, path: str) -> bool:
        """Whether the pattern names this path."""
        return path.startswith(self.begin) and self.whole.fullmatch(path) is not None


def parse_keep(text: str, kinds: Iterable[str]) -> list[Rule]:
    """The lines that hold for these kinds, in order."""
    wanted, rules, active = set(kinds), [], True
    for full in text.splitlines():
        line = full.split("#", 1)[0].strip()
        if not line:
            continue
        if line.startswith("["):
            active = line == "[all]" or line[1:-1] in wanted
        elif active:
            pattern = line.removeprefix("!")
            begin = re.split(r"[*?]", pattern, maxsplit=1)[0]
            rules.append(Rule(line=line, keep=line == pattern, begin=begin, whole=re.compile(_regex(pattern))))
    return rules


def _regex(pattern: str) -> str:
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern):
        out += {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token)
    return out


def walk(root: Path) -> list[str]:
    """Every file and link below `root`, as sorted relative paths; links to folders are links."""
    found = []
    for folder, names, files in os.walk(root):
        base = Path(folder)
        found += [str((base / name).relative_to(root)) for name in files]
        found += [str((base / name).relative_to(root)) for name in names if (base / name).is_symlink()]
    return sorted(found)


def select(root: Path, rules: list[Rule], what: str) -> list[str]:
    """The paths below `root` that the rules keep. Raises `BuildError` for rules that match nothing."""
    matched: set[str] = set()
    kept = []
    for path in walk(root):
        decision = False
        for rule in rules:
            if rule.matches(path):
                decision = rule.keep
                matched.add(rule.line)
        if decision:
            kept.append(path)
    if idle := [rule.line for rule in rules if rule.line not in matched]:
        raise BuildError(f"{what}: no file matches {', '.join(idle)}")
    return kept


def close(root: Path, kept: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """`kept`, and every library below `root` that a kept ELF file needs, links followed.

    Returns the paths, sorted, and for each that was added the file that asked for it first. Raises `BuildError` when a
    library or a link's target is nowhere below `root`.
    """
    added: dict[str, str] = {}
    todo = list(kept)
    seen = set(todo)

    def take(path: str, why: str) -> None:
        if path not in seen:
            seen.add(path)
            added[path] = why
            todo.append(path)

    while todo:
        path = todo.pop()
        full = root / path
        if full.is_symlink():
            if target := link_target(root, path):
                take(target, path)
            continue
        dynamic = read_dynamic(full)
        if dynamic is None:
            continue
        if dynamic.interpreter:
            take(resolve_links(root, dynamic.interpreter.lstrip("/")), path)
        origin = str(PurePosixPath(path).parent)
        folders = [
            os.path.normpath(part.replace("$ORIGIN", "/" + origin).replace("${ORIGIN}", "/" + origin)).lstrip("/")
            for part in dynamic.run_path
        ]
        for name in dynamic.needed:
            # Last, beside the file: systemd's own library, which the program that loads this one has loaded before.
            search = (*folders, *LIBRARY_PATH, origin)
            place = next((f"{folder}/{name}" for folder in search if (root / folder / name).exists()), None)
            if place is None:
                raise BuildError(f"{path} needs {name}, which no locked package has")
            take(place, path)
    return sorted(seen), added


def link_target(root: Path, path: str) -> str | None:
    """The file that a link points to, as a path below `root`; None when that is a folder or out of the packages."""
    text = str((root / path).readlink())
    target = resolve_links(root, below(str(PurePosixPath(path).parent), text))
    full = root / target
    if full.is_file() or full.is_symlink():
        return target
    return None


def below(folder: str, text: str) -> str:
    """Where a link in `folder` leads, as a path below the root: `..` does not lead out of it, as in a chroot."""
    return os.path.normpath("/" + (text if text.startswith("/") else f"{folder}/{text}")).lstrip("/")


def resolve_links(root: Path, path: str) -> str:
    """`path` with links to folders on the way followed (`lib64/x` is `usr/lib64/x`); its last part stays a link."""
    done: list[str] = []
    for part in PurePosixPath(path).parent.parts:
        here = "/".join([*done, part])
        if (root / here).is_symlink():
            text = str((root / here).readlink())
            done = list(PurePosixPath(below("/".join(done), text)).parts)
        else:
            done.append(part)
    return "/".join([*done, PurePosixPath(path).name])
