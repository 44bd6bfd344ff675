"""`countermark gate`: arguments, the report's file, a summary."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from countermark import endorsements_cli, terminal
from countermark.errors import UsageError
from countermark.files import read_file, write_file
from countermark.gate import PROMPT, Plan, run_gate
from countermark.gate_report import Report, encode_report, load_key
from countermark.policy import load_policy

MAX_RUNS = 10_000
MAX_NEIGHBOURS = 256
_MAX_KEY_BYTES = 64 * 1024


def add_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `gate`. `command(commands, name, run, text, json_=...)` makes one parser."""
    gate = command(commands, "gate", _gate, "ask a node the same thing many times among neighbours", json_=True)
    gate.add_argument("address", metavar="HOST:PORT")
    gate.add_argument("--policy", type=Path, required=True)
    gate.add_argument("--runs", type=int, default=8, help="of each setting, greedy and sampled (default: %(default)s)")
    gate.add_argument("--neighbours", type=int, default=8, help="streams of random requests (default: %(default)s)")
    gate.add_argument("--prompt", default=PROMPT)
    gate.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    gate.add_argument("--seed", type=int, help="of requests and neighbours (default: drawn, and in the report)")
    gate.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for all of it (default: %(default)g)")
    gate.add_argument("--report", type=Path, metavar="FILE", help="write the report here")
    gate.add_argument("--key", type=Path, metavar="PEM", help="sign the report (ES256, a JWS)")
    endorsements_cli.add_options(gate)


def _gate(args: argparse.Namespace) -> None:
    if args.key is not None and args.report is None:
        raise UsageError("--key: expected --report beside it, got none", code="usage.gate")
    _in_range("--runs", args.runs, 2, MAX_RUNS)
    _in_range("--neighbours", args.neighbours, 0, MAX_NEIGHBOURS)
    _in_range("--timeout", args.timeout, 1, 86_400)
    if args.seed is not None:
        _in_range("--seed", args.seed, 0, (1 << 64) - 1)
    if args.report is not None and (args.report.is_dir() or not os.access(args.report.absolute().parent, os.W_OK)):
        message = f"--report: expected a file in a folder we may write to, got {args.report}"
        raise UsageError(message, code="usage.file")
    key = None if args.key is None else load_key(read_file(args.key, max_bytes=_MAX_KEY_BYTES))
    plan = Plan(
        address=args.address,
        prompt=args.prompt,
        runs=args.runs,
        neighbours=args.neighbours,
        max_tokens=args.max_tokens,
        seed=secrets.randbits(63) if args.seed is None else args.seed,
        timeout_s=args.timeout,
    )
    report = run_gate(plan, load_policy(args.policy), endorsements=endorsements_cli.chosen(args), say=terminal.step)
    if args.report is not None:
        write_file(args.report, encode_report(report, key))
        terminal.note(f"report: {args.report} ({'UNSIGNED' if key is None else 'signed'})")
    if report.simulated:
        terminal.show_simulated()
    if args.json:
        print(json.dumps(report.as_json(signed=key is not None)))
        args.json = False  # one object, also when the next line raises
    else:
        print(_summary(report))
    report.require_identical()


def _summary(report: Report) -> str:
    beside, cached = report.neighbours, sum(run.answer.receipt.outcome.cached_count > 0 for run in report.runs)
    return (
        f"gate: {report.result}: {len(report.runs)} answers in {len(report.settings)} settings over"
        f" {len(report.nodes)} attested connections, {cached} from a cached prompt; {beside.wanted} neighbours had"
        f" {beside.answers} answers and left {beside.left}, {beside.tokens} tokens;"
        f" {len(report.runs) + beside.answers} receipts verified"
    )


def _in_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name}: expected {least:g} to {most:g}, got {value:g}", code="usage.gate")
