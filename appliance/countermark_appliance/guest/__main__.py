"""The two programs of the image: `prepare` and `serve`. What an operator may read goes to stdout, which is the console.

Nobody logs in to this machine, so the console is all there is: log lines (`operations.logs`, our own words only) and a
refusal with its stable code stand there. Exit codes are those of `countermark`; whatever the code, the unit that runs
this ends the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from countermark.errors import CountermarkError
from countermark_appliance.faults import describe
from countermark_appliance.operations import logs

FAULT: Final = 70  # an exception that is not ours


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit code."""
    parser = argparse.ArgumentParser(prog="countermark-guest", description="What an appliance image runs.")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("prepare").set_defaults(run=_prepare)
    serve = commands.add_parser("serve")
    serve.add_argument("--config", type=Path, required=True)
    serve.set_defaults(run=_serve)
    args = parser.parse_args(argv)
    logs.configure("text", stream=sys.stdout)
    return ended(lambda: args.run(args))


def ended(run: Callable[[], None]) -> int:
    """The exit code of `run`, after a line on the console where it failed."""
    try:
        run()
    except CountermarkError as err:
        _say(f"refused {err.code}: {err}")
        return err.exit_code
    except ModuleNotFoundError as err:
        _say(f"failed: the image has no module {err.name!r}")
        return FAULT
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
