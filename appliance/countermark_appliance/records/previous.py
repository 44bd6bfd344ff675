"""The log of the boot before: found, verified under the keys of its EPOCH, completed, and carried forward.

A boot's directory holds `epoch` (its EPOCH record, that record's salt, and the keys) and `journal`. Verified here, in
this order: 1 the sidecar parses and its keys are the ones the EPOCH names · 2 every leaf parses, stands at its own
index and names this boot · 3 leaf 0 commits to the EPOCH · 4 the last checkpoint is signed by both log keys and is the
head of exactly these leaves · 5 no published checkpoint is signed by them for a larger log. An incomplete last frame is
cut; it was never acknowledged.

Not checked here: the quote behind the EPOCH's keys. The disk is the host's, who may present an older log or none; what
this finds is damage, and what it carries forward lets whoever holds a later receipt prove the rest.
"""

from __future__ import annotations

import logging
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from countermark.errors import FormatError, LogError
from countermark.formats.records import Epoch, Kind, Leaf, encode_record, parse_leaf
from countermark.formats.witnessed import (
    MAX_SIDECAR_BYTES,
    SIDECAR_NAME,
    Sidecar,
    boot_leaf,
    boot_log_keys,
    encode_sidecar,
    parse_sidecar,
)
from countermark.logkeys import verify_signature
from countermark.tlog.checkpoint import LogKeys, verify_checkpoint
from countermark.tlog.merkle import Tree, leaf_hash
from countermark_appliance.records.journal import Tail, cut, leaf_at, leaf_offsets, read_journal, sync_directory
from countermark_appliance.records.publish import publish

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousLog:
    """A verified log that no one appends to any more."""

    epoch: Epoch
    size: int
    root: bytes
    epoch_leaf: bytes
    open_intents: tuple[bytes, ...]  # leaf hashes of INTENTs that have no end, in log order
    torn_bytes: int


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Write it whole and durably."""
    aside = directory / f"{SIDECAR_NAME}.new"
    with aside.open("xb") as file:
        file.write(encode_sidecar(sidecar))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(directory / SIDECAR_NAME)
    sync_directory(directory)


def read_sidecar(directory: Path) -> Sidecar:
    """Step 1. Raises `LogError` (`log.previous`)."""
    with (directory / SIDECAR_NAME).open("rb") as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    try:
        return parse_sidecar(data)
    except FormatError as err:
        raise _bad(directory, str(err)) from err


def find_previous(root: Path) -> PreviousLog | None:
    """The newest log below `root`, verified and completed; None when there is none.

    Directories of starts that never got as far as a durable EPOCH are passed over. Raises `LogError` (`log.previous`,
    `log.damaged`, `log.lost`): move the directory away to start without a predecessor, which the EPOCH then states.
    """
    found: list[tuple[Sidecar, Path]] = []
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        if not (directory / SIDECAR_NAME).exists():
            _log.warning("log: %s: a start that did not complete; passed over", directory.name)
            continue
        found.append((read_sidecar(directory), directory))
    for sidecar, directory in sorted(found, key=lambda item: item[0].epoch.epoch, reverse=True):
        if directory.name != sidecar.epoch.boot_id.hex():
            raise _bad(directory, "the name is not the boot id of its EPOCH")
        if (previous := _read(sidecar, directory)) is not None:
            return previous
        _log.warning("log: %s: a start that did not complete; passed over", directory.name)
    return None


def _read(sidecar: Sidecar, directory: Path) -> PreviousLog | None:
    """Steps 2 to 5; None when the log holds nothing, and never published anything."""
    epoch, keys = sidecar.epoch, boot_log_keys(sidecar.keys)
    journal = directory / "journal"
    tree, offsets = Tree(), array("Q")
    first = b""
    open_intents: dict[bytes, None] = {}
    checkpoint, tail = b"", Tail(end=0, torn_bytes=0)
    for item in read_journal(journal) if journal.exists() else ():
        if isinstance(item, Tail):
            tail = item
            continue
        for data in item.leaves:
            leaf = _leaf(directory, data, tree.size, epoch)
            hashed = leaf_hash(data)
            if leaf.kind is Kind.INTENT:
                open_intents[hashed] = None
            elif leaf.intent_leaf is not None:
                open_intents.pop(leaf.intent_leaf, None)
            first = first or data
            tree.append(hashed)
        offsets.extend(leaf_offsets(item))
        checkpoint = item.checkpoint
    if not tree.size:
        _check_nothing_lost(directory, epoch, keys, 0)
        return None
    if first != boot_leaf(encode_record(epoch), sidecar.salt):
        raise _bad(directory, "leaf 0 does not commit to the EPOCH")
    try:
        head = verify_checkpoint(checkpoint, epoch.origin, keys, verify_signature)
    except (FormatError, LogError) as err:
        raise _bad(directory, str(err)) from err
    if (head.size, head.root) != (tree.size, tree.root()):
        raise _bad(directory, "the last checkpoint is not the head of the leaves")
    _check_nothing_lost(directory, epoch, keys, head.size)
    if tail.torn_bytes:
        _log.warning("log: %s: cut an incomplete record of %d bytes", directory.name, tail.torn_bytes)
    cut(journal, tail.end)
    _complete(directory, tree, offsets, checkpoint)
    return PreviousLog(
        epoch=epoch,
        size=tree.size,
        root=tree.root(),
        epoch_leaf=tree.node(0, 0),
        open_intents=tuple(open_intents),
        torn_bytes=tail.torn_bytes,
    )


def _complete(directory: Path, tree: Tree, offsets: array[int], checkpoint: bytes) -> None:
    """Write every published file again: they were never synced."""
    with (directory / "journal").open("rb") as file:
        fd = file.fileno()

        def leaves(start: int, count: int) -> tuple[bytes, ...]:
            return tuple(leaf_at(fd, offset) for offset in offsets[start : start + count])

        publish(directory, tree.size, checkpoint, tree.node, leaves, since=0)


def _leaf(directory: Path, data: bytes, index: int, epoch: Epoch) -> Leaf:
    try:
        leaf = parse_leaf(data)
    except FormatError as err:
        raise _bad(directory, str(err)) from err
    if leaf.sequence != index or leaf.boot_id != epoch.boot_id:
        raise _bad(directory, f"leaf {index} names another place or boot")
    return leaf


def _check_nothing_lost(directory: Path, epoch: Epoch, keys: LogKeys, size: int) -> None:
    """Step 5: a published checkpoint was acknowledged before, so the journal must reach as far."""
    try:
        published = verify_checkpoint((directory / "checkpoint").read_bytes(), epoch.origin, keys, verify_signature)
    except (OSError, FormatError, LogError):
        return  # absent, or not by these keys: it proves nothing
    if published.size > size:
        message = f"log: {directory.name}: {published.size} leaves were published, the journal has {size}"
        raise LogError(message, code="log.lost")


def _bad(directory: Path, why: str) -> LogError:
    message = f"log: {directory.name}: the previous log does not verify: {why}; move it away to start without it"
    return LogError(message, code="log.previous")
