"""countermark-measure: the commands. Argparse, files, printing and exit codes; no logic."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _parser().parse_args(argv)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="countermark-measure", description="Predict, publish and explain what an image measures to."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('countermark')}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
