"""docs/codes.md is a table that can be acted on: step, exit code and advice for every code, the exit code its class's.

That every code of the sources stands there, and nothing else, is in `test_formats_page`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from countermark import errors

ROOT = Path(__file__).parents[2]
PAGE, _, SKIPS = (ROOT / "docs" / "codes.md").read_text().partition("## Steps that end as SKIP")
HEAD = ["code", "class", "exit", "step", "meaning", "what to do"]
STEP = re.compile(r"-|(\d+|pinning)(, (\d+|pinning))*")
# A parse error takes the class of what it stands in: a quote, a log, a GPU's file, a record.
FORMAT_EXITS = {10, 12, 14, errors.FormatError.exit_code}


def rows(page: str = PAGE) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_row_has_its_step_exit_code_and_advice() -> None:
    found = [row for row in rows() if row != HEAD]
    assert len(found) > 130
    for row in found:
        assert len(row) == len(HEAD), row
        _, classes, exits, step, meaning, advice = row
        named = [getattr(errors, name) for name in re.split(r", | or ", classes)]
        allowed = {kind.exit_code for kind in named} | (FORMAT_EXITS if errors.FormatError in named else set())
        assert {int(value) for value in exits.split(", ")} <= allowed, row
        for kind in named:
            assert kind is errors.FormatError or str(kind.exit_code) in exits.split(", "), row
        assert STEP.fullmatch(step), row
        assert meaning, row
        assert len(advice) > 15, row


def test_the_readme_links_it() -> None:
    assert "(docs/codes.md)" in (ROOT / "README.md").read_text()


def test_every_step_that_can_be_skipped_has_a_row() -> None:
    """The steps whose number stands in a call that makes a SKIP, in the sources."""
    made = set()
    for name in ("appraise", "receipt", "verify", "witness"):
        for node in ast.walk(ast.parse((ROOT / "client" / "countermark" / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                partly = any(keyword.arg == "without" for keyword in node.keywords)
                if node.func.attr == "skip" or (node.func.attr == "step" and partly):
                    made |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    listed = [step for row in rows(SKIPS)[1:] for step in row[0].split(", ")]
    assert len(made) > 5
    assert sorted(listed) == sorted(made)
    assert all(len(row) == 3 and all(len(cell) > 15 for cell in row[1:]) for row in rows(SKIPS)[1:])
