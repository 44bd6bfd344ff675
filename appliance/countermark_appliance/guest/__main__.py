"""The two programs of the image: `prepare` and `serve`. What an operator may read goes to stdout, which is the console.

Nobody logs in to this machine, so the console is all there is: our own log lines and a refusal with its stable code
stand there. Of other libraries' log lines only name and level do, because a text that is not ours might quote a prompt.
Exit codes are those of `countermark`; whatever the code, the unit that runs this ends the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from countermark.errors import CountermarkError
from countermark_appliance.faults import describe

FAULT: Final = 70  # an exception that is not ours
_OURS: Final = ("countermark.", "countermark_appliance.", "countermark_kernels.")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line; no trace, and no text but our own."""
        text = record.getMessage() if record.name.startswith(_OURS) else "(text withheld)"
        return f"countermark: {record.levelname.lower()} {record.name}: {' '.join(text.split())}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit code."""
    parser = argparse.ArgumentParser(prog="countermark-guest", description="What an appliance image runs.")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("prepare").set_defaults(run=_prepare)
    serve = commands.add_parser("serve")
    serve.add_argument("--config", type=Path, required=True)
    serve.set_defaults(run=_serve)
    args = parser.parse_args(argv)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return ended(lambda: args.run(args))


def ended(run: Callable[[], None]) -> int:
    """The exit code of `run`, after a line on the console where it failed."""
    try:
        run()
    except CountermarkError as err:
        _say(f"refused {err.code}: {err}")
        return err.exit_code
    except Exception as err:  # noqa: BLE001  the last place where it can be told
        _say(f"failed: {describe(err)}")
        return FAULT
    return 0


def _prepare(_args: argparse.Namespace) -> None:
    from countermark_appliance.guest import prepare  # noqa: PLC0415

    prepare.prepare(say=_say)


def _serve(args: argparse.Namespace) -> None:
    _say("loading the service")
    from countermark_appliance import main as appliance  # noqa: PLC0415  seconds, so after the line above

    appliance.serve(args.config, ready=lambda facts: print(json.dumps(facts), flush=True))


def _say(text: str) -> None:
    print(f"countermark: {' '.join(text.split())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
