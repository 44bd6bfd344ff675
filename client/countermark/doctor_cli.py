"""`countermark doctor`, and `countermark completion`: what helps before the first answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import shtab

from countermark import terminal
from countermark.checks import Status
from countermark.doctor import examine
from countermark.errors import CountermarkError, Undecidable
from countermark.policy import load_policy

_DOCTOR: Final = """examples:
  countermark doctor
  countermark doctor --policy policy.toml --weights weights     and do these fit this machine, and each other?"""
_COMPLETION: Final = """examples:
  countermark completion bash > ~/.local/share/bash-completion/completions/countermark
  countermark completion zsh > ~/.zfunc/_countermark     with fpath+=~/.zfunc before compinit in ~/.zshrc"""


def add_commands(
    commands: Any, command: Callable[..., argparse.ArgumentParser], parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add `doctor` and `completion`. `parser` makes the whole command line's parser anew, to be completed."""
    text = "what this machine can verify and replay"
    doctor = command(commands, "doctor", _doctor, text, json_=True, examples=_DOCTOR)
    doctor.add_argument("--policy", type=Path, help="is it usable now?")
    doctor.add_argument("--weights", type=Path, metavar="DIR", help="a weights artefact: every block is checked")
    completion = command(
        commands,
        "completion",
        lambda args: print(shtab.complete(parser(), args.shell)),
        "print the completion script of a shell",
        examples=_COMPLETION,
    )
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def _doctor(args: argparse.Namespace) -> CountermarkError | None:
    policy = None if args.policy is None else load_policy(args.policy)
    with terminal.progress("examining"):
        found = examine(policy=policy, weights=args.weights)
    terminal.show_checks(found.checks, explain=args.explain)
    if args.json:
        print(json.dumps(found.as_json()))
    else:
        print(f"verify: {'yes' if found.can_verify else 'NO'}")
        for profile, devices in found.replays.items():
            print(f"replay {profile}: {', on '.join(['yes', *devices]) if devices else 'no'}")
    if not found.failed:
        return None
    parts = ", ".join(check.name for check in found.checks if check.status is Status.FAIL)
    err = Undecidable(f"expected all that was asked of this machine, got no {parts}", code="doctor.missing")
    terminal.show_error(err, explain=args.explain)
    return err
