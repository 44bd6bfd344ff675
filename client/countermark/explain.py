"""What a check that failed or was skipped means, and what to do: `countermark verify --explain`.

The texts are those of docs/codes.md, which is carried along in this package (`codes.md` here is a link to it): a table
row for each code, and one for each step that can end as SKIP. Not here: what differed, which the check's detail says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from countermark.checks import Check, Status

_ROW = re.compile(r"^\| (.+) \|$", re.MULTILINE)
_NAME = re.compile(r"`([^`]+)`")
_STEP = re.compile(r"\d+b?")
_CODE_CELLS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Both lower case and without a full stop."""

    meaning: str
    todo: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.meaning}. To do: {self.todo}."


def explain_code(code: str) -> Advice | None:
    """The row of a stable code; None for a code of another version."""
    return _tables()[0].get(code)


def explain_skip(step: str) -> Advice | None:
    """The row of a step that was skipped, or of which a part was left out."""
    return _tables()[1].get(step)


def explain_check(check: Check) -> Advice | None:
    """What there is to say of a check; nothing of one that passed."""
    match check.status:
        case Status.FAIL:
            return explain_code(check.code)
        case Status.SKIP:
            return explain_skip(check.step)
    return None


def as_json(checks: Iterable[Check], code: str = "") -> dict[str, list[dict[str, str]]]:
    """{"explanations": [...]}: step, code, meaning and advice of every check that did not pass, in their order.

    `code`: of the refusal; it stands alone where no step failed.
    """
    made = [(check.step, check.code, advice) for check in checks if (advice := explain_check(check)) is not None]
    if (advice := explain_code(code)) is not None and code not in (known for _, known, _ in made):
        made.append(("", code, advice))
    return {
        "explanations": [
            {"step": step, "code": known, "meaning": advice.meaning, "todo": advice.todo}
            for step, known, advice in made
        ]
    }


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, Advice], dict[str, Advice]]:
    """By code, and by step."""
    codes: dict[str, Advice] = {}
    skips: dict[str, Advice] = {}
    page = (files("countermark") / "codes.md").read_text(encoding="utf-8")
    for row in _ROW.findall(page):
        first, *_, meaning, todo = cells = [cell.strip() for cell in row.split(" | ")]
        names = _NAME.findall(first) if len(cells) == _CODE_CELLS else _STEP.findall(first)
        meanings = meaning.split("; ")  # one for each, or one for all
        if len(meanings) != len(names):
            meanings = [meaning] * len(names)
        for name, text in zip(names, meanings, strict=True):
            table = codes if len(cells) == _CODE_CELLS else skips
            table[name] = Advice(meaning=text.replace("`", ""), todo=todo.replace("`", ""))
    return codes, skips
