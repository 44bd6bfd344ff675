"""`countermark bundle`: what a file holds, leaving out prompt or output, adding proofs that were made later.

Arguments, files and printing; `bundle` does the rest. Nothing here verifies anything, and says so. No file is written
over: a new one is made beside the old.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from countermark import later, logsource, terminal
from countermark.bundle import ENTRIES, SUFFIX, Bundle, encode_bundle, entries_of, read_bundle, redact
from countermark.checks import rfc3339
from countermark.errors import UsageError
from countermark.files import read_file, write_new_file
from countermark.formats.evidence import parse_evidence
from countermark.formats.manifest import parse_envelope
from countermark.formats.receipt import Redaction, parse_receipt
from countermark.formats.records import parse_intent, parse_outcome

Command = Callable[..., argparse.ArgumentParser]
UNVERIFIED: Final = "not verified: this is what the file says of itself"
_ADDED: Final = {  # option -> what it adds
    "manifest": "the signed measurement manifest",
    "epoch": "the node's EPOCH in its operator's log, with cosignatures",
    "witness": "a cosigned checkpoint of the node's log, no older than the receipt",
    "anchor": "a timestamp of such a checkpoint; may be repeated",
}
_TELLS: Final = {
    Redaction.OUTPUT: "the output is still in it, and with it all that the output tells of the prompt (--output)",
    Redaction.PROMPT: "the prompt is still in it: whoever has the weights can compute the output again (--prompt)",
}


def add_commands(commands: Any, command: Command) -> None:
    """Add `bundle` and its actions. `command(commands, name, run, text, json_=...)` makes one parser."""
    actions = commands.add_parser("bundle", help="look into a bundle, leave prompt or output out, add later proofs")
    actions = actions.add_subparsers(required=True, metavar="ACTION")

    show = command(actions, "show", _show, "what is in a bundle, without verifying it", json_=True)
    show.add_argument("bundle", type=Path)

    less = command(actions, "redact", _redact, "make a bundle that leaves out prompt or output and still verifies")
    less.add_argument("bundle", type=Path)
    less.add_argument("--prompt", action="store_true", help="leave out the prompt, its tokens and the fingerprints")
    less.add_argument("--output", action="store_true", help="leave out the output, its tokens and the fingerprints")

    add = command(actions, "add", _add, "make a bundle that also carries proofs made later")
    add.add_argument("bundle", type=Path)
    for option, text in _ADDED.items():
        action = "append" if option == "anchor" else "store"
        add.add_argument(f"--{option}", type=Path, action=action, metavar="F", help=text)
    add.add_argument("--log", metavar="SOURCE", help="directory or https URL of the node's log: makes missing proofs")
    add.add_argument("--ca-file", type=Path, metavar="PEM", help="authorities for an https URL")
    for parser, suffix in ((less, "redacted"), (add, "added")):
        parser.add_argument(
            "--out", type=Path, metavar="F", help=f"new file (default: BUNDLE's name .{suffix}{SUFFIX})"
        )


def _show(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    facts, sizes = _facts(bundle), {name: len(data) for name, data in entries_of(bundle).items()}
    if args.json:
        print(json.dumps({"verified": False, "entries": sizes, **facts}))
        return
    terminal.note(UNVERIFIED)
    for name, size in sizes.items():
        print(f"{name:<18}{size:>11,} bytes")
    for name, value in facts.items():
        print(f"{name:<18}{terminal.printable(_words(value))}")


def _facts(bundle: Bundle) -> dict[str, Any]:
    """What the records say, JSON-ready: neither prompt nor output."""
    intent = parse_intent(bundle.acceptance.record)
    outcome = parse_outcome(parse_receipt(bundle.receipt).payload.outcome.record)
    stack, sampling = intent.stack, intent.sampling
    return {
        "redacted": [part.value for part in bundle.redacted],
        "platform": parse_evidence(bundle.evidence).platform.value,
        "request_id": intent.request_id.hex(),
        "boot_id": intent.boot_id.hex(),
        "accepted": rfc3339(intent.accepted_us // 1_000_000),
        "ended": rfc3339(outcome.ended_us // 1_000_000),
        "model": stack.model,
        "weights_root": stack.weights_root.hex(),
        "profile": stack.profile,
        "image_id": stack.image_id.hex(),
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "seed_origin": sampling.seed_origin,
        "tokens": {"prompt": outcome.prompt_count, "cached": outcome.cached_count, "output": outcome.output_count},
        "finish_reason": outcome.finish_reason,
    }


def _words(value: object) -> str:
    match value:
        case list():
            return ", ".join(map(str, value)) or "nothing"
        case Mapping():
            return ", ".join(f"{count} {name}" for name, count in value.items())
    return " ".join(str(value).split())


def _redact(args: argparse.Namespace) -> None:
    if not (args.prompt or args.output):
        raise UsageError("bundle redact: expected --prompt or --output, or both, got neither", code="usage.redact")
    bundle = redact(read_bundle(args.bundle), prompt=args.prompt, output=args.output)
    _write(args, bundle, "redacted")
    for part, text in _TELLS.items():
        if part not in bundle.redacted:
            terminal.note(text)


def _add(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    if not any(getattr(args, option) for option in _ADDED):
        options = ", ".join(f"--{option}" for option in _ADDED)
        raise UsageError(f"bundle add: expected something to add ({options}), got nothing", code="usage.bundle")
    log = None if args.log is None else logsource.static(args.log, args.ca_file)
    if args.manifest is not None:
        data = read_file(args.manifest, max_bytes=ENTRIES["measurements.json"])
        parse_envelope(data)
        bundle = replace(_new(bundle, "manifest"), manifest=data)
    if args.epoch is not None:
        bundle = later.add_epoch(_new(bundle, "epoch"), read_file(args.epoch, max_bytes=ENTRIES["epoch.cbor"]))
    if args.witness is not None:
        data = read_file(args.witness, max_bytes=ENTRIES["witness.cbor"])
        bundle = later.add_witness(_new(bundle, "witness"), data, log)
    for path in args.anchor or ():
        bundle = later.add_anchors(bundle, read_file(path, max_bytes=ENTRIES["anchors.cbor"]), log)
    _write(args, bundle, "added")


def _new(bundle: Bundle, part: str) -> Bundle:
    """The bundle, which has none of it yet: what is there is not replaced, but added to the bundle without it."""
    if getattr(bundle, part) is not None:
        raise UsageError(f"--{part}: expected a bundle without one, got one that has it", code="usage.bundle")
    return bundle


def _write(args: argparse.Namespace, bundle: Bundle, suffix: str) -> None:
    path = args.out or args.bundle.with_name(f"{args.bundle.name.removesuffix(SUFFIX)}.{suffix}{SUFFIX}")
    write_new_file(path, encode_bundle(bundle))
    terminal.note(f"bundle: {path} ({UNVERIFIED.partition(':')[0]})")
