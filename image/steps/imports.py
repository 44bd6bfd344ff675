"""Which modules our code imports, read from its source: so that an image holds of the client what the appliance uses.

An `import` anywhere in a module counts, also in a function; one below `if TYPE_CHECKING:` does not. A module that is
imported in a `try` that catches ImportError may be absent.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Every module named by an import in `source`, as (dotted name, may it be absent).

    `from a import b` yields `a` and `a.b`, which may be a name in `a`.
    """
    yield from _visit(ast.parse(source).body, module if is_package else module.rpartition(".")[0], False)


def _visit(nodes: Iterable[ast.AST], package: str, optional: bool) -> Iterator[tuple[str, bool]]:
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _visit(node.orelse, package, optional)
        elif isinstance(node, ast.Try):
            caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
            tolerant = "ImportError" in caught or "ModuleNotFoundError" in caught
            yield from _visit(node.body, package, optional or tolerant)
            yield from _visit([*node.handlers, *node.orelse, *node.finalbody], package, optional)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            name = ".".join(part for part in (start, node.module or "") if part)
            yield name, optional
            yield from ((f"{name}.{alias.name}", True) for alias in node.names)
        else:
            yield from _visit(ast.iter_child_nodes(node), package, optional)


def source_of(folder: Path, module: str) -> Path | None:
    """The source of a module below `folder`, or None."""
    base = folder.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def reach(
    folders: dict[str, Path], roots: Iterable[str], without: tuple[str, ...] = ()
) -> tuple[set[str], dict[str, str]]:
    """What `roots` import, again and again: our modules, and the top-level names of all others with one that asks.

    `folders` says where a top-level package of ours lies (`countermark` -> client/). Others that may be absent are left
    out, and so is whatever begins with a name in `without`.
    """
    ours: set[str] = set()
    others: dict[str, str] = {}
    todo = list(roots)
    while todo:
        module = todo.pop()
        top = module.split(".", 1)[0]
        source = source_of(folders[top], module) if top in folders else None
        if source is None or module in ours or module.startswith(without or ("-",)):
            continue
        ours.add(module)
        if "." in module:
            todo.append(module.rpartition(".")[0])
        for name, optional in imported(source.read_text(encoding="utf-8"), module, source.name == "__init__.py"):
            if name.split(".", 1)[0] in folders:
                todo.append(name)
            elif not optional:
                others.setdefault(name.split(".", 1)[0], module)
    return ours, others


def modules_below(folder: Path, package: str) -> list[str]:
    """Every module of a package, dotted."""
    return [
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((folder / package).rglob("*.py"))
    ]
