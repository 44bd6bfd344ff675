"""docs/measurements.md: every command on it exists with its options, and every command is on it."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from countermark import cli as client_cli
from countermark_measurements import cli

PAGE = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text(encoding="utf-8")
PARSERS = {"countermark-measure": cli._parser, "countermark": client_cli._parser}


def calls() -> list[list[str]]:
    """The words of every call of our commands in a console block or between backticks."""
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in blocks.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    lines += re.findall(r"`((?:countermark|countermark-measure) [^`]*)`", prose.replace("\n", " "))
    words = [shlex.split(line.partition(" > ")[0]) for line in lines]
    return [call for call in words if call[0] in PARSERS]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def test_every_call_names_a_command_and_its_options() -> None:
    assert len(calls()) > 15
    for name, *words in calls():
        parser = PARSERS[name]()
        while words and (inner := subparsers(parser)):
            assert words[0] in inner, (name, words)
            parser = inner[words.pop(0)]
        options = {option for action in parser._actions for option in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= options, (name, words)


@pytest.mark.parametrize("command", sorted(subparsers(cli._parser())))
def test_every_command_is_on_the_page(command: str) -> None:
    assert f"countermark-measure {command}" in PAGE


def test_every_option_is_on_the_page() -> None:
    """But for those that choose where or how to print, and the time of signing."""
    common = {"--help", "-h", "--json", "--out", "--at", "--firmware", "--numerics", "--kernels", "--image"}
    for name, parser in subparsers(cli._parser()).items():
        options = {option for action in parser._actions for option in action.option_strings} - common
        missing = {option for option in options if option not in PAGE}
        assert not missing, (name, missing)
