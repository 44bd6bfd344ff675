"""Intel's endorsements on the command line: fetched for a quote, or used instead of those that evidence carries."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from countermark import terminal
from countermark.errors import UsageError
from countermark.fetch.https import Service
from countermark.fetch.intel import Source, fetch_collateral, intel, pccs
from countermark.files import read_file, write_file
from countermark.formats.quote import MAX_QUOTE_BYTES
from countermark.genuine import hex_or_binary
from countermark.tdx.endorsements import MAX_BYTES

FETCH = "fetch"


def add_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `endorsements`. `command(commands, name, run, text)` makes one parser."""
    parser = command(commands, "endorsements", _endorsements, "fetch what Intel has signed about a quote's platform")
    parser.add_argument("quote", type=Path, metavar="QUOTE", help="binary or hex text")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="QuoteCollateralV3, for --collateral")
    _add_source(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--endorsements` and where to fetch from; `chosen` reads them."""
    parser.add_argument(
        "--endorsements",
        metavar=f"{FETCH}|JSON",
        help=f"use these of Intel's, not those the node sends: '{FETCH}', or a file of `countermark endorsements`",
    )
    _add_source(parser)


def chosen(args: argparse.Namespace) -> bytes | Callable[[bytes], bytes] | None:
    """What `session.connect` takes. Raises `UsageError` (`usage.file`, `usage.url`, `usage.endorsements`)."""
    if args.endorsements == FETCH:
        return functools.partial(fetch_collateral, source=_source(args))
    if args.pccs or args.ca_file or args.update is not None:
        message = f"--pccs, --ca-file, --update: expected '--endorsements {FETCH}' beside them"
        raise UsageError(message, code="usage.endorsements")
    return None if args.endorsements is None else read_file(args.endorsements, max_bytes=MAX_BYTES)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pccs", metavar="URL", help="fetch from this cache (default: Intel's own service)")
    parser.add_argument("--ca-file", type=Path, metavar="PEM", help="authorities for --pccs, or its own certificate")
    parser.add_argument(
        "--update", type=_update, metavar="WHICH", help="standard (default), early, or a tcbEvaluationDataNumber"
    )


def _source(args: argparse.Namespace) -> Source:
    update = "standard" if args.update is None else args.update
    if args.pccs is not None:
        return pccs(Service(url=args.pccs, ca_file=args.ca_file), update)
    if args.ca_file is not None:
        raise UsageError("--ca-file: expected --pccs beside it, got none", code="usage.endorsements")
    return intel(update)


def _update(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text


def _endorsements(args: argparse.Namespace) -> None:
    quote = hex_or_binary(read_file(args.quote, max_bytes=4 * MAX_QUOTE_BYTES))
    data = fetch_collateral(quote, _source(args))
    write_file(args.out, data)
    terminal.note(f"{args.out}: {len(data)} bytes; not verified yet: evidence tdx {args.quote} --collateral {args.out}")
