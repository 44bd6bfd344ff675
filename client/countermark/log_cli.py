"""`countermark log`: verify and prove parts of logs, witness them, make keys. Arguments, files and printing.

A SOURCE is a directory or an https URL with a log's published files, or a node's HOST:PORT (with --policy).
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark import cosigned, logsource, terminal
from countermark.errors import LogError, Unavailable, UsageError
from countermark.files import read_file, write_file
from countermark.formats.witnessed import boot_log_keys, parse_sidecar
from countermark.logcheck import Progress, Rules, verify_log
from countermark.logkeys import load_keys, new_keys, read_passphrase, save_keys, verify_signature
from countermark.logsource import Source
from countermark.policy import load_policy
from countermark.session import connect
from countermark.tlog import merkle
from countermark.tlog.checkpoint import (
    MAX_NOTE_BYTES,
    Checkpoint,
    LogKeys,
    Note,
    checkpoint_text,
    encode_note,
    verify_checkpoint,
)
from countermark.tlog.cosignature import VerifierKey, log_keys, parse_vkey, with_lines
from countermark.tlog.tiles import WIDTH
from countermark.witness import boot_keys
from countermark.witnessing import Witness

Command = Callable[..., argparse.ArgumentParser]
_MAX_VKEYS = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source with the origin and keys it is held to. `vouched`: who gave them, for people."""

    source: Source
    origin: str
    keys: LogKeys
    rules: Rules
    vouched: str


def add_commands(commands: Any, command: Command) -> None:
    """Add `log` and its actions. `command(commands, name, run, text, json_=...)` makes one parser."""
    actions = commands.add_parser("log", help="verify logs and proofs, witness operator logs")
    actions = actions.add_subparsers(required=True, metavar="ACTION")

    verify = command(actions, "verify", _verify, "verify a whole log: every leaf, every tile, the head", json_=True)
    _source(verify)
    verify.add_argument("--since", type=Path, metavar="NOTE", help="a checkpoint that the log must pass through")

    inclusion = command(actions, "inclusion", _inclusion, "prove and verify that a leaf stands in a log", json_=True)
    _source(inclusion)
    inclusion.add_argument("index", type=int, help="the leaf's index")

    consistency = command(
        actions, "consistency", _consistency, "prove and verify that a log begins with an older one", json_=True
    )
    _source(consistency)
    consistency.add_argument("old", type=Path, metavar="NOTE", help="the older checkpoint, signed by the same log")

    witness = command(actions, "witness", _witness, "follow a log and cosign what only grows", json_=True)
    witness.add_argument("source", metavar="SOURCE", help="directory or https URL")
    witness.add_argument("--state", type=Path, required=True, metavar="DIR", help="what was cosigned last; keep it")
    witness.add_argument("--key", type=Path, required=True, metavar="FILE", help="of `log keygen`")
    kind = witness.add_mutually_exclusive_group()
    kind.add_argument(
        "--operator",
        action="append",
        default=[],
        metavar="VKEY",
        help="both keys of an operator log, or a file of them; without, SOURCE is a start's log, under its own keys",
    )
    kind.add_argument(
        "--measurements", action="append", default=[], metavar="VKEY", help="likewise, of a measurement log"
    )
    witness.add_argument("--out", type=Path, metavar="FILE", help="write the cosigned checkpoint here, too")
    when = witness.add_mutually_exclusive_group()
    when.add_argument("--once", action="store_true", help="one round (default)")
    when.add_argument("--every", type=_seconds, metavar="S", help="a round every S seconds until SIGTERM or Ctrl-C")
    _passphrase(witness)

    keygen = command(actions, "keygen", _keygen, "make the keys of a witness; prints its verifier keys", json_=True)
    keygen.add_argument("name", help="such as witness.example/1; stands in every cosignature")
    keygen.add_argument("--out", type=Path, required=True, metavar="FILE", help="private keys, mode 0600")
    _passphrase(keygen)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="directory, https URL, or HOST:PORT of a node with --policy")
    parser.add_argument(
        "--key", action="append", default=[], metavar="VKEY", help="both of the log's keys, or a file of them"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--operator", action="store_true", help="it is an operator log, not the log of a start")
    kind.add_argument("--measurements", action="store_true", help="it is a measurement log: the manifests of images")
    parser.add_argument("--policy", type=Path, help="for a node: it is appraised first, and its keys are attested")
    parser.add_argument("--ca-file", type=Path, metavar="PEM", help="authorities for an https URL")


def _passphrase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="the private keys are encrypted with it")


def read_vkeys(given: Sequence[str]) -> list[VerifierKey]:
    """Verifier keys as arguments, or a file of them, a line each."""
    texts: list[str] = []
    for item in given:
        texts += [item] if "+" in item else read_file(item, max_bytes=_MAX_VKEYS).decode(errors="replace").split()
    return [parse_vkey(text) for text in texts]


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Opened]:
    """The source, and whose word its keys are."""
    rules = Rules.OPERATOR if args.operator else Rules.MEASUREMENTS if args.measurements else Rules.BOOT
    if args.policy is not None:
        if args.key or rules is not Rules.BOOT:
            message = "--policy: expected it alone, because a node's keys are attested and its log is that of a start"
            raise UsageError(message, code="usage.log")
        with connect(args.source, load_policy(args.policy)) as session:
            terminal.show_checks(session.verdict.checks)
            yield Opened(
                source=logsource.NodeSource(session.read_log),
                origin=session.verdict.log_origin,
                keys=boot_keys(session.verdict),
                rules=rules,
                vouched="the node's attested keys",
            )
        return
    source = logsource.static(args.source, args.ca_file)
    if args.key:
        origin, keys = log_keys(read_vkeys(args.key))
        yield Opened(source=source, origin=origin, keys=keys, rules=rules, vouched="the keys given")
        return
    if rules is not Rules.BOOT:
        raise UsageError("--key: expected both of the log's verifier keys, got none", code="usage.log")
    origin, keys = _own_keys(source)
    yield Opened(
        source=source,
        origin=origin,
        keys=keys,
        rules=rules,
        vouched="the keys that lie beside the log, which nobody vouches for",
    )


def _head(opened: Opened) -> Checkpoint:
    return verify_checkpoint(opened.source.checkpoint(), opened.origin, opened.keys, verify_signature)


def _verify(args: argparse.Namespace) -> None:
    with _opened(args) as opened, _bar() as progress:
        since = None
        if args.since is not None:
            note = read_file(args.since, max_bytes=MAX_NOTE_BYTES)
            since = verify_checkpoint(note, opened.origin, opened.keys, verify_signature)
        log = verify_log(opened.source, opened.origin, opened.keys, rules=opened.rules, since=since, progress=progress)
    _print(args, {"verification": "accept", "keys": opened.vouched, **log.as_json()}, f"{log}; under {opened.vouched}")


def _inclusion(args: argparse.Namespace) -> None:
    with _opened(args) as opened:
        head = _head(opened)
        if not 0 <= args.index < head.size:
            message = f"leaf index: expected less than the tree size {head.size}, got {args.index}"
            raise LogError(message, code="log.range")
        tile, inside = divmod(args.index, WIDTH)
        leaf = opened.source.entries(tile, min(WIDTH, head.size - tile * WIDTH))[inside]
        proof = opened.source.inclusion(args.index, head)
    merkle.verify_inclusion(args.index, head.size, merkle.leaf_hash(leaf), proof, head.root)
    value = {
        **_proven(opened, head, proof),
        "index": args.index,
        "leaf": base64.b64encode(leaf).decode(),
        "leaf_hash": merkle.leaf_hash(leaf).hex(),
    }
    text = f"{head.origin}: leaf {args.index} of {head.size} verified by {len(proof)} hashes; under {opened.vouched}"
    _print(args, value, text)


def _consistency(args: argparse.Namespace) -> None:
    with _opened(args) as opened:
        note = read_file(args.old, max_bytes=MAX_NOTE_BYTES)
        old = verify_checkpoint(note, opened.origin, opened.keys, verify_signature)
        head = _head(opened)
        if old.size > head.size:
            message = f"checkpoint: expected at least the {old.size} leaves of {args.old}, got {head.size}"
            raise LogError(message, code="log.rolled_back")
        proof = opened.source.consistency(old.size, head)
    if old.size:
        merkle.verify_consistency(old.size, head.size, old.root, head.root, proof)
    value = {**_proven(opened, head, proof), "old_size": old.size, "old_root": old.root.hex()}
    text = f"{head.origin}: {head.size} leaves begin with those {old.size}; under {opened.vouched}"
    _print(args, value, text)


def _proven(opened: Opened, head: Checkpoint, proof: tuple[bytes, ...]) -> dict[str, Any]:
    return {
        "verification": "accept",
        "keys": opened.vouched,
        "origin": head.origin,
        "size": head.size,
        "root": head.root.hex(),
        "proof": [item.hex() for item in proof],
    }


def _witness(args: argparse.Namespace) -> None:
    keys = load_keys(args.key, passphrase=read_passphrase(args.passphrase_file))
    source = logsource.static(args.source)
    if args.operator or args.measurements:
        rules = Rules.OPERATOR if args.operator else Rules.MEASUREMENTS
        witness = Witness(args.state, keys, *log_keys(read_vkeys(args.operator or args.measurements)), rules=rules)
    else:
        witness = Witness(args.state, keys, *_own_keys(source), rules=Rules.BOOT)
    stop = threading.Event()
    if args.every is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    try:
        while True:
            try:
                _round(args, witness, source)
            except Unavailable as err:
                if args.every is None:
                    raise
                terminal.note(f"{err.code}: {err}")  # the next round may be luckier
            if args.every is None or stop.wait(args.every):
                return
    finally:
        witness.close()


def _round(args: argparse.Namespace, witness: Witness, source: Source) -> None:
    signed = witness.round(source, time.time)
    if signed is None:
        seen = witness.seen()
        size = 0 if seen is None else seen.size
        return _print(args, {"cosigned": None, "size": size}, f"nothing new: {size} leaves")
    head = signed.log.checkpoint
    published = args.operator or args.measurements
    if published and (folder := Path(args.source)).is_dir():  # a start's checkpoint is its node's to write
        cosigned.add_lines(folder, signed.log.note, signed.lines)
    text = encode_note(Note(text=checkpoint_text(head), signatures=signed.lines))
    if args.out is not None:
        write_file(args.out, with_lines(signed.log.note, signed.lines), mode=0o644)
    value = {"cosigned": text.decode(), "size": head.size, "root": head.root.hex()}
    return _print(args, value, f"cosigned {head.origin}: {head.size} leaves, root {head.root.hex()}")


def _own_keys(source: logsource.TileSource) -> tuple[str, LogKeys]:
    """Origin and keys that lie beside a start's log. Raises `UsageError` (`usage.log`)."""
    data = source.sidecar()
    if data is None:
        message = "log: expected that of a start, with its EPOCH beside it, or both of its verifier keys"
        raise UsageError(message, code="usage.log")
    sidecar = parse_sidecar(data)
    return sidecar.epoch.origin, boot_log_keys(sidecar.keys)


def _keygen(args: argparse.Namespace) -> None:
    keys = new_keys(args.name)
    save_keys(keys, args.out, passphrase=read_passphrase(args.passphrase_file))
    shown = [str(key) for key in keys.as_witness]
    _print(args, {"name": keys.name, "vkeys": shown}, "\n".join(shown))


def _print(args: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value) if args.json else terminal.printable(text), flush=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    with terminal.progress("verifying") as bar:
        task = bar.task_ids[0]
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 86400 seconds, got {text!r}")
    return value
