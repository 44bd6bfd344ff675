"""Write docs/api.md from the docstrings of the public names: `python docs/make_api.py`. A test writes it again."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import countermark

PAGE = Path(__file__).resolve().parent / "api.md"
INTRODUCTION = """# API reference

Made from the docstrings by `docs/make_api.py`; how the pieces fit together is in [developer.md](developer.md). Bytes
are raw, times are Unix seconds, and every error carries a stable code ([codes.md](codes.md)). What is not listed here
is not public.
"""
CLASSES = (
    ("countermark.session", ("Session", "Stream", "Answer", "TokenLogprob")),
    ("countermark.options", ("GenerateOptions",)),
    ("countermark.retrying", ("Retry",)),
    ("countermark.aio", ("connect", "AsyncSession", "AsyncStream")),
    ("countermark.appraise", ("Verdict", "Scope", "TimeBasis")),
    ("countermark.receipt", ("CheckedReceipt", "Accepted")),
    ("countermark.verify", ("Verification",)),
    ("countermark.replayer", ("ReplayResult", "Divergence", "Equivalence", "Runner", "load_runner")),
    ("countermark.checks", ("Check", "Status")),
)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## `countermark`\n"]
    for name in sorted(countermark.__all__):
        value = getattr(countermark, name)
        if inspect.isfunction(value):
            parts += entry(name, value)
    for module, names in CLASSES:
        parts.append(f"## `{module}`\n")
        found = importlib.import_module(module)
        for name in names:
            parts += entry(name, getattr(found, name))
    parts.append("## `countermark.errors`\n")
    parts += errors(importlib.import_module("countermark.errors"))
    return "\n".join(parts)


def entry(name: str, value: object) -> list[str]:
    """One function, or a class with its public members."""
    if not inspect.isclass(value):
        return [f"### {name}\n", f"```python\n{name}{signature(value)}\n```\n", text(value)]
    lines = [f"### {name}\n", text(value)]
    if issubclass(value, enum.Enum):
        members = "\n".join(f"- `{member.name}` = `{member.value!r}`" for member in value)
        return [*lines, f"{members}\n"]
    fields = [
        f"- `{field}`: `{kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}`"
        for field, kind in inspect.get_annotations(value).items()
        if not field.startswith("_") and field != "seal"
    ]
    if fields:
        lines.append("\n".join(fields) + "\n")
    for member, found in vars(value).items():
        if member.startswith("_") or not (inspect.isfunction(found) or isinstance(found, property)):
            continue
        getter = found.fget if isinstance(found, property) else found
        doc = inspect.getdoc(getter)
        if doc is None:
            continue
        shown = f"`{member}`" if isinstance(found, property) else f"`{member}{signature(found)}`"
        lines.append(f"**{shown}**\n\n{text(getter)}")
    return lines


def errors(module: ModuleType) -> list[str]:
    """The tree, indented, with exit codes."""
    lines: list[str] = []

    def below(kind: type, depth: int) -> None:
        first = text(kind).split("\n\n")[0].replace("\n", " ").strip() if kind.__doc__ else ""
        lines.append(f"{'  ' * depth}- `{kind.__name__}` (exit code {kind.exit_code}) {first}".rstrip())  # type: ignore[attr-defined]
        for child in kind.__subclasses__():
            if child.__module__ == module.__name__:
                below(child, depth + 1)

    below(module.CountermarkError, 0)
    return ["\n".join(lines) + "\n", *entry("Recorded", module.Recorded)]


def signature(value: object) -> str:
    """With strings for annotations as they are written, and no addresses."""
    shown = str(inspect.signature(value)).replace("self, ", "").replace("(self)", "()")  # type: ignore[arg-type]
    return re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", shown.replace("'", ""))


def text(value: object) -> str:
    """The docstring."""
    return f"{inspect.getdoc(value) or ''}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
