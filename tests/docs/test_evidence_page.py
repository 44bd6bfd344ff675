"""docs/evidence.md does what it says: its commands run, in order, in one folder, and print what stands under them.

A line that ends in `…` is cut there on the page. Of times that are not part of the files, only the form is compared.
The files are the genuine ones of `vectors`; without them the test skips.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import vectors
from countermark.cli import _parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
_THIS_YEAR = re.compile(r"202[6-9]-(?!01-12)\d\d-\d\dT\d\d:\d\d:\d\dZ(?= now|;|$)")
FILES = {
    "quote.bin": "tdx/dstack-90c06f/quote.bin",
    "collateral.json": "tdx/dstack-90c06f/collateral.json",
    "events.json": "tdx/dstack-90c06f/quote-report.json",
    "report.txt": "nvidia/h100-535/hopperAttestationReport.txt",
    "chain.pem": "nvidia/h100-535/hopperCertChain.txt",
    "vbios.swidtag": "nvidia/rim/1010_0200_882_96005E0001_PROD.swidtag",
}


def commands() -> list[tuple[str, list[str]]]:
    """(command, the lines under it) of every block."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(BLOCKS).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def test_the_walk_prints_what_the_page_shows(tmp_path: Path) -> None:
    for name, source in FILES.items():
        (tmp_path / name).write_bytes(vectors.read(source))
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "200"}
    assert len(commands()) >= 8
    for command, expected in commands():
        done = subprocess.run(
            ("/bin/sh", "-c", command),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        printed = done.stdout.splitlines()
        assert len(printed) == len(expected), (command, done.stdout)
        for got, wanted in zip(map(_timeless, printed), map(_timeless, expected), strict=True):
            if wanted.endswith("…") and not got.endswith("…"):
                assert got.startswith(wanted[:-1]), (command, got)
            else:
                assert got == wanted, command


def _timeless(line: str) -> str:
    return _THIS_YEAR.sub("<now>", line)


def test_every_option_is_on_the_page() -> None:
    """The synopsis names every option of every kind of evidence."""
    kinds = choices(choices(_parser())["evidence"])
    assert set(kinds) == {"tdx", "eventlog", "gpu"}
    for parser in kinds.values():
        for action in parser._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or option in PAGE, option


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return found
