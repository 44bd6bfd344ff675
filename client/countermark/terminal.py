"""What people see: numbered checks, the simulated banner, refusals, progress. Results to stdout, the rest to stderr.

rich draws on terminals only and honours NO_COLOR; text from outside is escaped, and control characters in it are
replaced, so that a server cannot paint over what we print.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from countermark.checks import Check, Status
from countermark.errors import CountermarkError, Unavailable, Undecidable, UsageError
from countermark.explain import explain_check, explain_code

OUT = Console(soft_wrap=True, highlight=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)
_DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{16,}\b")
_INDENT = " " * 12
_STYLE = {Status.PASS: "green", Status.FAIL: "bold red", Status.SKIP: "yellow"}


def printable(text: str) -> str:
    """`text` with control characters other than newline and tab replaced, so that it cannot steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def show_checks(checks: Iterable[Check], *, console: Console | None = None, explain: bool = False) -> None:
    """One line a check: number, PASS, FAIL or SKIP, name, what was seen (digests cut where nothing is wrong).

    `explain`: and below one that did not pass, a line with what that means and what to do.
    """
    console = console or ERR
    for check in checks:
        style = _STYLE[check.status]
        code = f" [red]\\[{escape(check.code)}][/red]" if check.code else ""
        text = _DIGEST.sub(r"\1…", check.detail) if check.status is Status.PASS else check.detail
        head = f"{check.step:>4}  [{style}]{check.status.value}[/{style}]  {escape(check.name)}{code}"
        text, between = printable(text), "  "
        used = len(f"{check.step:>4}  {check.status.value}  {check.name}  {check.code}")
        if console.is_terminal and used + len(text) > console.width:  # under its name instead of around the edge
            between = "\n" + _INDENT
            text = textwrap.fill(text, max(console.width - len(_INDENT), 40), break_long_words=False)
            text = text.replace("\n", between)
        console.print(head + (f"{between}[dim]{escape(text)}[/dim]" if text else ""))
        if explain and (advice := explain_check(check)) is not None:
            console.print(f"{_INDENT}{escape(str(advice))}")


def step(text: str) -> None:
    """The headline of a step."""
    ERR.print(f"[bold]\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {escape(printable(text))}[/bold]")


def note(text: str) -> None:
    """One line of information."""
    ERR.print(escape(printable(text)))


def show_simulated(*, console: Console = ERR) -> None:
    """The banner over everything that rests on the simulated platform."""
    console.print(
        "[black on yellow] SIMULATED [/black on yellow] [yellow]no confidential hardware: this proves the path, not a"
        " machine[/yellow]"
    )


def show_facts(rows: Iterable[tuple[str, str]]) -> None:
    """A table for reading aloud, on stdout: what, and what of it; long values go on below themselves."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(printable(value)))
    OUT.print(table)


def show_error(err: CountermarkError, *, explain: bool = False) -> None:
    """A refusal: the checks made so far, then what differed and the stable code; `explain`: and what to do."""
    *before, last = err.checks or (None,)
    show_checks((check for check in before if check), explain=explain)
    if last is not None:  # what differed stands once, in the last line
        show_checks([replace(last, detail="") if last.detail == str(err) else last])
    words = ((Unavailable, "unavailable"), (Undecidable, "cannot decide"), (UsageError, "error"))
    word = next((word for kind, word in words if isinstance(err, kind)), "refused")
    step = f"step {err.step}, " if err.step else ""
    ERR.print(f"[bold red]{word}[/bold red] ({step}{err.code}): {escape(printable(str(err)))}")
    if explain and (advice := explain_code(err.code)) is not None:
        ERR.print(f"{_INDENT}{escape(str(advice))}")


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A progress display on stderr; silent when stderr is not a terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=ERR,
        transient=True,
        disable=not ERR.is_terminal,
    ) as bar:
        bar.add_task(label, total=None)
        yield bar


def write_text(text: str) -> None:
    """Model text to stdout at once, made safe for a terminal when stdout is one."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
