"""`countermark replay`: bundles verified and run again, on this machine or on another attested node.

One form for one bundle and for many: a line (with --json an object) for each as it is settled; of several a summary
follows. `undecidable`: nothing was found wrong, and nothing was shown either.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark import arguments, terminal
from countermark.appraise import TimeBasis
from countermark.bundle import read_bundle
from countermark.errors import (
    CountermarkError,
    FormatError,
    ReplayDiverged,
    Undecidable,
    UsageError,
    VerificationError,
    WeightsError,
)
from countermark.files import write_file
from countermark.policy import Policy, load_policy
from countermark.receipt import CheckedReceipt
from countermark.replayed import NodeReplay
from countermark.replayer import Equivalence, Mode, ReplayResult, Runner, load_runner, replay_many
from countermark.session import connect
from countermark.verify import Verification, verify_bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A verified bundle with everything it takes to run it again."""

    path: Path
    verified: Verification
    receipt: CheckedReceipt


def add_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `replay`. `command(commands, name, run, text, json_=...)` makes one parser."""
    again = command(commands, "replay", _replay, "verify bundles and run their answers again", json_=True)
    again.add_argument(
        "bundle", type=Path, nargs="+", help="a line each (--json: an object a line); of several a summary, too"
    )
    again.add_argument("--policy", type=Path, required=True)
    again.add_argument("--at", type=arguments.moment, help="RFC 3339 time or 'now' (default: now)")
    where = again.add_mutually_exclusive_group(required=True)
    where.add_argument("--weights", type=Path, help="here: the weights artefact's directory")
    where.add_argument("--node", metavar="HOST:PORT", help="on a node, which is appraised under the policy first")
    again.add_argument("--mode", choices=[mode.value for mode in Mode], help="here (default: audit)")
    again.add_argument("--device", choices=["cpu", "cuda"], help="here (default: cpu)")
    again.add_argument("--receipt", type=Path, metavar="FILE", help="of --node: write its signed REPLAY here")


def _replay(args: argparse.Namespace) -> CountermarkError | None:
    """Returns the worst of what was found, having said it."""
    if args.node is not None and (args.mode or args.device):
        raise UsageError("--node: expected neither --mode nor --device, which are the node's", code="usage.replay")
    if args.receipt is not None and (args.node is None or len(args.bundle) != 1):
        raise UsageError("--receipt: expected --node and one bundle beside it", code="usage.replay")
    settle = _Settled(json_=args.json, several=len(args.bundle) > 1)
    policy = load_policy(args.policy)
    wholes = list(_verified(args, policy, settle))
    if settle.several and any(one.verified.verdict.simulated for one in wholes):
        terminal.show_simulated()
    if args.node is not None:
        _on_node(args, policy, wholes, settle)
    else:
        _here(args, wholes, settle)
    settle.end()
    return settle.worst


def _verified(args: argparse.Namespace, policy: Policy, settle: _Settled) -> Iterator[_Whole]:
    at, basis = (int(time.time()), TimeBasis.NOW) if args.at is None else (args.at, TimeBasis.ASSUMED)
    for path in args.bundle:
        simulated = None
        try:
            verified = verify_bundle(read_bundle(path), policy, at, time_basis=basis)
            simulated = verified.verdict.simulated
            if not settle.several:
                if simulated:
                    terminal.show_simulated()
                terminal.show_checks(verified.checks)
            whole = verified.whole
        except CountermarkError as err:
            settle(path, err, simulated)
        else:
            yield _Whole(path=path, verified=verified, receipt=whole)


def _here(args: argparse.Namespace, wholes: Sequence[_Whole], settle: _Settled) -> None:
    """All answers of one profile together."""
    by_profile: dict[str, list[_Whole]] = {}
    for one in wholes:
        by_profile.setdefault(one.receipt.intent.stack.profile, []).append(one)
    for profile, group in by_profile.items():
        try:
            with terminal.progress("loading the weights"):
                runner = _runner(profile, args)
        except CountermarkError as err:
            for one in group:
                settle(one.path, err, one.verified.verdict.simulated)
            continue
        for index, outcome in replay_many([one.verified for one in group], runner, args.mode or Mode.AUDIT):
            settle(group[index].path, outcome, group[index].verified.verdict.simulated)


def _runner(profile: str, args: argparse.Namespace) -> Runner:
    try:
        return load_runner(profile, args.weights, args.device or "cpu")
    except WeightsError as err:  # of the artefact here, not of the bundle: nothing can be said of that
        raise Undecidable(str(err), code=err.code) from err


def _on_node(args: argparse.Namespace, policy: Policy, wholes: Sequence[_Whole], settle: _Settled) -> None:
    """One after the other on one connection, and on a new one where that ended."""
    session = None
    try:
        for one in wholes:
            simulated = one.verified.verdict.simulated
            try:
                if session is None or session.is_over:
                    session = connect(args.node, policy)
                    terminal.show_checks(session.verdict.checks)
                with terminal.progress("the node runs it again"):
                    found = session.replay(one.receipt)
            except CountermarkError as err:
                settle(one.path, err, simulated)
                continue
            terminal.show_checks(found.checks[len(session.verdict.checks) :])
            if args.receipt is not None:
                write_file(args.receipt, found.receipt)
                terminal.note(f"receipt: {args.receipt}")
            settle(one.path, found.result, simulated or found.verdict.simulated, found)
    finally:
        if session is not None:
            session.close()


class _Settled:
    """Says what came of each bundle as it is known, and keeps the worst."""

    def __init__(self, *, json_: bool, several: bool) -> None:
        self.several = several
        self._json = json_
        self._found: list[CountermarkError] = []
        self._counts = dict.fromkeys(("identical", "diverged", "refused", "undecidable"), 0)

    def __call__(
        self,
        path: Path,
        outcome: ReplayResult | CountermarkError,
        simulated: bool | None = None,
        node: NodeReplay | None = None,
    ) -> None:
        err = outcome.difference if isinstance(outcome, ReplayResult) else outcome
        word = "identical"
        if err is not None:
            word = "diverged" if isinstance(err, ReplayDiverged) else "refused" if rejects(err) else "undecidable"
            self._found.append(err)
        self._counts[word] += 1
        if self._json:
            body = outcome.as_json() if isinstance(outcome, ReplayResult) else {**refusal(outcome), "replay": word}
            where = {} if node is None else {"node": node.as_json()}
            print(json.dumps({"bundle": str(path), "simulated": simulated, **body, **where}), flush=True)
        else:
            why = "" if err is None else f" ({err.code}): {_one_line(err)}"
            kind = f" ({outcome.equivalence.value})" if isinstance(outcome, ReplayResult) and err is None else ""
            at = "" if node is None else f"; leaf {node.leaf_index} of {_one_line(node.checkpoint.origin)}"
            print(f"{_one_line(path)}: {word}{kind}{why}{at}", flush=True)
        if not self.several:
            if isinstance(outcome, ReplayResult):
                _show_environment(outcome)
            if err is not None:
                terminal.show_error(err)

    def end(self) -> None:
        """The summary, where there is something to sum up."""
        total = sum(self._counts.values())
        if self.several and self._json:
            print(json.dumps({"summary": {"bundles": total, **self._counts}}))
        elif self.several:
            print(f"{total} bundles: " + ", ".join(f"{count} {word}" for word, count in self._counts.items()))

    @property
    def worst(self) -> CountermarkError | None:
        """What was checked and is wrong outweighs what could not be decided, then the higher exit code."""
        return max(self._found, key=lambda err: (rejects(err), err.exit_code), default=None)


def rejects(err: CountermarkError) -> bool:
    """Something was checked and is wrong; otherwise it could not be decided, which is the lesser exit code of two."""
    return isinstance(err, VerificationError | FormatError)


def refusal(err: CountermarkError) -> dict[str, Any]:
    """What `--json` prints of an error."""
    word = "reject" if rejects(err) else "undecidable"
    return {
        "verdict": word,
        "verification": word,
        "code": err.code,
        "step": err.step,
        "message": str(err),
        "checks": [check.as_json() for check in err.checks],
    }


def _show_environment(result: ReplayResult) -> None:
    for name, (recorded, local) in result.differing.items():
        there = "not known" if local is None else local or "none"
        terminal.note(f"{name}: recorded {recorded or 'none'}, where it ran {there}")
    if result.equivalence is Equivalence.SAME_PROFILE:
        terminal.note("other hardware: where it ran does not show that it runs the recorded image")


def _one_line(text: object) -> str:
    """For a line that a file's name or contents must not add another one to."""
    return " ".join(terminal.printable(str(text)).split())
