"""The operator log: every EPOCH of an operator's machines in one long-lived log, under keys no appliance has.

A directory of C2SP tlog-tiles files, `vkeys` (the two public keys, a line each) and `cosigned/`
(`countermark.cosigned`); all of it is public and may be served as it is. An entry is an EPOCH with its salt
(`formats.witnessed`). Before one is appended its boot's own log is verified under the keys that the EPOCH names, and
its leaf 0 must be that EPOCH; then the rule of growth decides. Nothing but the published files is kept, so they are
synced: tiles first, then the head.

Not checked here: the quote behind an EPOCH. Clients do that; an EPOCH of a machine nobody appraised is of no use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark import cosigned
from countermark.checks import rfc3339
from countermark.errors import LogError, UsageError
from countermark.files import read_file, write_file
from countermark.formats.records import encode_record
from countermark.formats.witnessed import (
    SIDECAR_NAME,
    Growth,
    OperatorLeaf,
    Sidecar,
    boot_leaf,
    boot_log_keys,
    encode_operator_leaf,
    parse_operator_leaf,
    parse_sidecar,
)
from countermark.logcheck import Rules, verify_log
from countermark.logkeys import SigningKeys, verify_signature
from countermark.logsource import directory
from countermark.tlog.checkpoint import MAX_NOTE_BYTES, Checkpoint, LogKeys, parse_note, verify_checkpoint
from countermark.tlog.cosignature import log_keys, parse_vkey
from countermark.tlog.merkle import EMPTY_ROOT, Tree, leaf_hash
from countermark.tlog.tiles import WIDTH
from countermark_appliance.records.publish import publish

VKEYS = "vkeys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """What a call appended (boot ids), and the log's size after it."""

    boots: tuple[bytes, ...]
    size: int


def refuse_inside(path: Path, key_file: Path) -> None:
    """Raises `UsageError` (`usage.key_place`): keys below what is published would be, too."""
    if path.resolve() in key_file.resolve().parents:
        message = f"--key: expected a file outside {path}, because all of that is published"
        raise UsageError(message, code="usage.key_place")


def create(path: Path, keys: SigningKeys) -> None:
    """Begin an empty log. Raises `UsageError` (`usage.file`)."""
    if (path / "checkpoint").exists():
        raise UsageError(f"{path}: expected no log yet, found one", code="usage.file")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err
    with cosigned.locked(path):
        write_file(path / VKEYS, "".join(f"{key}\n" for key in keys.as_log).encode(), mode=0o644)
        head = Checkpoint(origin=keys.name, size=0, root=EMPTY_ROOT)
        publish(path, 0, keys.sign_checkpoint(head, int(time.time())), Tree().node, lambda _s, _c: (), since=0)


def append(path: Path, keys: SigningKeys, boots: Path) -> Appended:
    """Append the EPOCHs below an appliance's log directory that are not in the log yet, in their own order.

    What stands before the first one that is refused is kept. Raises `LogError`: `log.boot_twice`, `log.fork`,
    `log.unknown_previous`, `log.leaf`, or as `logcheck.verify_log`; `FormatError`; `UsageError` (`usage.file`).
    """
    with cosigned.locked(path):
        log = _Log.read(path, keys.name, keys.log_keys)
        before = log.tree.size
        try:
            for sidecar, folder in _found(boots):
                if not log.holds(sidecar.epoch.boot_id):
                    log.take(sidecar, folder)
        finally:
            if log.tree.size > before:
                log.publish(keys, since=before)
        return Appended(boots=tuple(leaf.epoch.boot_id for leaf in log.leaves[before:]), size=log.tree.size)


def take_cosigned(path: Path, file: Path) -> dict[str, Any]:
    """Put the lines of a cosigned checkpoint on that head of this log; who wrote them, clients judge.

    Raises `LogError` (`log.origin`, `log.signature*`) unless it is a head that this log signed; `UsageError`.
    """
    note = read_file(file, max_bytes=MAX_NOTE_BYTES)
    verify_checkpoint(note, *_own_keys(path), verify_signature)
    cosigned.add_lines(path, note, parse_note(note).signatures)
    return _head(note)


def show(path: Path) -> dict[str, Any]:
    """What a log holds, verified under the keys in its own `vkeys`. JSON-ready."""
    origin, keys = _own_keys(path)
    log = _Log.read(path, origin, keys)
    return {
        "origin": origin,
        "size": log.tree.size,
        "root": log.tree.root().hex(),
        "vkeys": _vkeys(path),
        "cosigned": [_head(note) for note in cosigned.heads(path)],
        "epochs": [_epoch(leaf) for leaf in log.leaves],
    }


def _vkeys(path: Path) -> list[str]:
    return read_file(path / VKEYS, max_bytes=16 * 1024).decode("ascii", errors="replace").split()


def _own_keys(path: Path) -> tuple[str, LogKeys]:
    return log_keys(map(parse_vkey, _vkeys(path)))


class _Log:
    """A verified operator log in memory: some kilobytes an entry."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        self.tree = Tree()
        self.leaves: list[OperatorLeaf] = []
        self._growth = Growth()

    @classmethod
    def read(cls, path: Path, origin: str, keys: LogKeys) -> _Log:
        """Verify the published files and take what they hold."""
        source = directory(path)
        checked = verify_log(source, origin, keys, rules=Rules.OPERATOR)
        log = cls(path, origin)
        size = checked.checkpoint.size
        for start in range(0, size, WIDTH):
            for data in source.entries(start // WIDTH, min(WIDTH, size - start)):
                log.add(parse_operator_leaf(data), data)
        return log

    def holds(self, boot_id: bytes) -> bool:
        return any(leaf.epoch.boot_id == boot_id for leaf in self.leaves)

    def add(self, leaf: OperatorLeaf, data: bytes) -> None:
        self._growth.add(leaf.epoch)
        self.tree.append(leaf_hash(data))
        self.leaves.append(leaf)

    def take(self, sidecar: Sidecar, folder: Path) -> None:
        """Verify a boot's own log, then append its EPOCH."""
        epoch, source = sidecar.epoch, directory(folder)
        checked = verify_log(source, epoch.origin, boot_log_keys(sidecar.keys), rules=Rules.BOOT)
        record = encode_record(epoch)
        first = source.entries(0, min(WIDTH, checked.checkpoint.size))[0]
        if epoch.boot_id.hex() != folder.name or first != boot_leaf(record, sidecar.salt):
            message = f"{folder.name}: expected a log that begins with the EPOCH beside it"
            raise LogError(message, code="log.leaf")
        data = encode_operator_leaf(record, sidecar.salt)
        self.add(parse_operator_leaf(data), data)

    def publish(self, keys: SigningKeys, *, since: int) -> None:
        head = Checkpoint(origin=self.origin, size=self.tree.size, root=self.tree.root())
        cosigned.retire(self.path, read_file(self.path / "checkpoint"))

        def entries(start: int, count: int) -> Sequence[bytes]:
            return [encode_operator_leaf(leaf.record, leaf.salt) for leaf in self.leaves[start : start + count]]

        note = keys.sign_checkpoint(head, int(time.time()))
        publish(self.path, head.size, note, self.tree.node, entries, since=since, durable=True)


def _found(boots: Path) -> list[tuple[Sidecar, Path]]:
    """The boots of an appliance's log directory, oldest first."""
    if not boots.is_dir():
        raise UsageError(f"{boots}: expected an appliance's log directory, found none", code="usage.file")
    found = []
    for folder in sorted(boots.iterdir()):
        if (folder / SIDECAR_NAME).is_file() and (folder / "checkpoint").is_file():
            data = directory(folder).sidecar()
            assert data is not None
            found.append((parse_sidecar(data), folder))
    return sorted(found, key=lambda item: (item[0].epoch.epoch, item[0].epoch.started_us))


def _head(note: bytes) -> dict[str, Any]:
    parsed = parse_note(note)
    names = [line.name for line in parsed.signatures]
    return {"size": int(parsed.text.split("\n")[1]), "signed_by": list(dict.fromkeys(names))}


def _epoch(leaf: OperatorLeaf) -> dict[str, Any]:
    epoch = leaf.epoch
    return {
        "boot_id": epoch.boot_id.hex(),
        "epoch": epoch.epoch,
        "started": rfc3339(epoch.started_us // 1_000_000),
        "previous": None if epoch.previous is None else epoch.previous.boot_id.hex(),
        "crashed": 0 if epoch.previous is None else epoch.previous.crashed,
        "model": epoch.stack.model,
    }
