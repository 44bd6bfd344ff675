"""countermark: the commands. Argparse, printing and exit codes; no logic.

stdout carries the result (with `--json` one object, with stable keys), stderr the numbered checks and progress.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from countermark import (
    arguments,
    bundle_cli,
    chat_cli,
    doctor_cli,
    endorsements_cli,
    evidence_cli,
    explain,
    gate_cli,
    log_cli,
    policy_cli,
    replay_cli,
    terminal,
)
from countermark.anchors import verify_headers
from countermark.appraise import TimeBasis
from countermark.bundle import read_bundle
from countermark.demo import DemoResult, run_demo
from countermark.errors import (
    CountermarkError,
    UsageError,
)
from countermark.files import read_file
from countermark.formats.ots import MAX_HEADERS_BYTES
from countermark.policy import Policy, load_policy
from countermark.proxy import cli as proxy_cli
from countermark.session import connect
from countermark.summary import summary
from countermark.verify import Verification, verify_bundle

EXIT_CODES = """exit codes:
  0 verified   1 usage, policy or request   10 quote   11 TCB or freshness   12 measurement   13 weights   14 GPU
  15 channel   20 receipt or bundle   21 log   30 replay diverged   40 cannot be decided   50 unavailable"""


class _Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong call."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


class _Command(_Parser):
    """A command whose optional positional argument may stand after the options, which argparse alone refuses."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        worst: CountermarkError | None = args.run(args)
    except CountermarkError as err:
        explained = getattr(args, "explain", False)
        terminal.show_error(err, explain=explained)
        if getattr(args, "json", False):
            _print_json(replay_cli.refusal(err) | (explain.as_json(err.checks, err.code) if explained else {}))
        return err.exit_code
    except KeyboardInterrupt:
        terminal.note("\nstopped before the end: nothing was verified to the end, nothing was saved")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0 if worst is None else worst.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="countermark",
        description="Ask models that prove themselves; verify and replay their answers.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('countermark')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    demo = _command(
        commands, "demo", _demo, "the whole path on this machine: SIMULATED platform, real model", json_=True
    )
    demo.add_argument("--dir", type=Path, default=Path("demo-out"), help="where to work (default: %(default)s)")
    demo.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    demo.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where the node listens")
    demo.add_argument("--keep-serving", action="store_true", help="leave the appliance running until Ctrl-C")

    attest = _command(commands, "attest", _attest, "appraise a node and print the verdict", json_=True)
    attest.add_argument("address", metavar="HOST:PORT")
    attest.add_argument("--policy", type=Path, required=True)

    endorsements_cli.add_options(attest)
    chat_cli.add_command(commands, _command)

    verify = _command(commands, "verify", _verify, "verify a bundle offline", json_=True)
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--policy", type=Path, required=True)
    verify.add_argument(
        "--at", type=arguments.moment, help="RFC 3339 time or 'now' (default: that of a time stamp in it, else now)"
    )
    verify.add_argument("--endorsements", type=Path, metavar="JSON", help="use these of Intel's, not the bundle's")
    verify.add_argument(
        "--bitcoin-headers",
        type=Path,
        metavar="F",
        help="block headers for OpenTimestamps anchors",
    )

    bundle_cli.add_commands(commands, _command)
    evidence_cli.add_commands(commands, _command)
    endorsements_cli.add_command(commands, _command)
    log_cli.add_commands(commands, _command)
    gate_cli.add_command(commands, _command)
    proxy_cli.add_command(commands, _command)
    replay_cli.add_command(commands, _command)
    doctor_cli.add_commands(commands, _command, _parser)

    policy_cli.add_commands(commands, _command)
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], CountermarkError | None],
    text: str,
    *,
    json_: bool = False,
    examples: str = "",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[:1].upper() + text[1:] + ".",
        epilog=f"{examples}\n\n{EXIT_CODES}" if examples else EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--explain", action="store_true", help="say what a failed or skipped check means, and what to do"
    )
    if json_:
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _demo(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its node must not outlive it

    def show(result: DemoResult) -> None:
        if args.json:
            _print_json(result.as_json())
        else:
            print(f"answer: {terminal.printable(result.answer)}")
            print(f"bundle: {result.bundle}")
            print(f"replay: {result.replay}", flush=True)

    run_demo(args.dir, args.prompt, say=terminal.step, show=show, listen=args.listen, keep_serving=args.keep_serving)


def _attest(args: argparse.Namespace) -> None:
    with connect(args.address, load_policy(args.policy), endorsements=endorsements_cli.chosen(args)) as session:
        chat_cli.show_session(session)
        if args.json:
            _print_json(session.verdict.as_json() | {"witnesses": str(session.witnessed)})
        else:
            terminal.show_facts(summary(session.verdict, session.witnessed))


def _verify(args: argparse.Namespace) -> None:
    verified = _verified(args, load_policy(args.policy))
    if args.json:
        _print_json(verified.as_json() | (explain.as_json(verified.checks) if args.explain else {}))
    else:
        print(verified)


def _verified(args: argparse.Namespace, policy: Policy) -> Verification:
    at, basis = (int(time.time()), TimeBasis.NOW) if args.at is None else (args.at, TimeBasis.ASSUMED)
    own, headers = (
        None if path is None else read_file(path, max_bytes=MAX_HEADERS_BYTES)
        for path in (args.endorsements, args.bitcoin_headers)
    )
    verified = verify_bundle(
        read_bundle(args.bundle),
        policy,
        at,
        time_basis=basis,
        endorsements=own,
        headers=None if headers is None else verify_headers(headers),
    )
    if verified.verdict.simulated:
        terminal.show_simulated()
    terminal.show_checks(verified.checks, explain=getattr(args, "explain", False))
    return verified


def _print_json(value: object) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
