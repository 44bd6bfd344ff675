"""Verify a whole log, streaming: every leaf parsed, every tile hashed again, the root compared with a signed head.

In order: 1 the checkpoint is the named log's, under both of its keys · 2 of every 256 leaves the hashes are those of
their level-0 tile, and of every full tile the hash stands in the tile above · 3 the leaves keep the rules of their kind
of log · 4 the root over them all is the checkpoint's. Where an older head is given, the log passes through it.

Rules of a boot's log: leaf 0 is its EPOCH and no other leaf is, `sequence` is the index, every leaf names one boot, an
OUTCOME or ABORT ends an INTENT of this log that has no end yet. Rules of an operator log: `formats.witnessed.Growth`.
Rules of a measurement log: `formats.measured.Releases`.

Memory: 8 KiB a level, the INTENTs without an end; for an operator log its boot ids, for a measurement log the images it
revokes. Not checked here: what a commitment hides; cosignatures; the manifests that a measurement log names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from countermark.checks import rfc3339
from countermark.errors import LogError
from countermark.formats.measured import MEASUREMENT, Releases, parse_measured
from countermark.formats.records import Kind, Leaf, parse_leaf
from countermark.formats.witnessed import Growth, OperatorLeaf, parse_operator_leaf
from countermark.logkeys import verify_signature
from countermark.logsource import Source
from countermark.tlog.checkpoint import Checkpoint, LogKeys, verify_checkpoint
from countermark.tlog.merkle import CompactRange, Tree, leaf_hash
from countermark.tlog.tiles import WIDTH, Tile

Progress = Callable[[int, int], None]
"""`(leaves verified, leaves in all)`."""


class Rules(Enum):
    """What the entries of a log are."""

    BOOT = "boot"
    OPERATOR = "operator"
    MEASUREMENTS = "measurements"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedLog:
    """A verified log. `counts`: leaves by type. `open_intents`: how many have no end. `tiles`: how many were hashed."""

    checkpoint: Checkpoint
    note: bytes
    rules: Rules
    counts: dict[str, int]
    open_intents: int
    tiles: int
    last_epoch_us: int | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys."""
        return {
            "origin": self.checkpoint.origin,
            "size": self.checkpoint.size,
            "root": self.checkpoint.root.hex(),
            "log": self.rules.value,
            "leaves": self.counts,
            "open_intents": self.open_intents,
            "tiles": self.tiles,
        }

    def __str__(self) -> str:
        """One line for people."""
        leaves = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        last = "" if self.last_epoch_us is None else f"; last start {rfc3339(self.last_epoch_us // 1_000_000)}"
        return f"{self.checkpoint.origin}: {self.checkpoint.size} leaves verified ({leaves}){last}"


class _Entries(Protocol):
    """The rules of one kind of log, fed leaf by leaf."""

    def add(self, index: int, data: bytes, hashed: bytes) -> str:
        """Check the next leaf; returns its type."""


class _BootLog:
    def __init__(self) -> None:
        self.open: set[bytes] = set()
        self._boot_id = b""

    def add(self, index: int, data: bytes, hashed: bytes) -> str:
        leaf = parse_leaf(data)
        self._boot_id = self._boot_id or leaf.boot_id
        if leaf.sequence != index or leaf.boot_id != self._boot_id or (leaf.kind is Kind.EPOCH) != (index == 0):
            message = f"leaf {index}: expected its own index, one boot, and an EPOCH first and only there"
            raise LogError(message, code="log.leaf")
        if leaf.kind is Kind.INTENT:
            self.open.add(hashed)
        elif leaf.kind in (Kind.OUTCOME, Kind.ABORT):
            self._end(index, leaf)
        return leaf.kind.value

    def _end(self, index: int, leaf: Leaf) -> None:
        assert leaf.intent_leaf is not None
        if leaf.intent_leaf not in self.open:
            message = f"leaf {index}: expected to end an open INTENT, got {leaf.intent_leaf.hex()}"
            raise LogError(message, code="log.leaf")
        self.open.remove(leaf.intent_leaf)


class _OperatorLog:
    def __init__(self) -> None:
        self.last: OperatorLeaf | None = None
        self._growth = Growth()

    def add(self, index: int, data: bytes, hashed: bytes) -> str:
        self.last = parse_operator_leaf(data)
        self._growth.add(self.last.epoch)
        return "epoch"


class _MeasurementLog:
    def __init__(self) -> None:
        self._releases = Releases()

    def add(self, index: int, data: bytes, hashed: bytes) -> str:
        self._releases.add(parse_measured(data))
        return MEASUREMENT


class _Tiles:
    """Tiles built again, level by level, each compared with the published one once it is full or the log ends."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size
        self._levels: list[list[bytes]] = []
        self._done: list[int] = []
        self.count = 0

    def add(self, level: int, hashes: list[bytes]) -> None:
        """The next hashes of a level; at most to the end of its current tile."""
        if level == len(self._levels):
            self._levels.append([])
            self._done.append(0)
        row = self._levels[level]
        row += hashes
        if len(row) == WIDTH:
            self._compare(level)
            self._levels[level] = []
            self.add(level + 1, [Tree(row).root()])

    def end(self) -> None:
        """Compare the partial tiles of every level."""
        for level, row in enumerate(self._levels):
            if row:
                self._compare(level)

    def _compare(self, level: int) -> None:
        row, index = self._levels[level], self._done[level]
        self._done[level] += 1
        published = self._source.tile(Tile(level=level, index=index, width=len(row)))
        if published is None:
            return
        self.count += 1
        if published != tuple(row):
            first = next(i for i, (a, b) in enumerate(itertools.zip_longest(row, published)) if a != b)
            message = f"tile {level}/{index}: expected the hashes of the entries, got another at {first}"
            raise LogError(message, code="log.tile")


def verify_log(
    source: Source,
    origin: str,
    keys: LogKeys,
    *,
    rules: Rules,
    since: Checkpoint | None = None,
    note: bytes | None = None,
    progress: Progress = lambda _done, _all: None,
) -> CheckedLog:
    """Verify a log from its first leaf to its head.

    `note`: the head to use instead of the source's latest. `since`: a head seen before. Raises `FormatError`,
    `Unavailable` (`log.fetch.*`), `LogError`: `log.missing`, `log.origin`, `log.signature*`, `log.tile`, `log.leaf`,
    `log.root`, `log.consistency` (not through `since`), `log.rolled_back` (shorter than it), and those of the rules.
    """
    note = source.checkpoint() if note is None else note
    head = verify_checkpoint(note, origin, keys, verify_signature)
    if since is not None and head.size < since.size:
        message = f"checkpoint: expected at least the {since.size} leaves seen before, got {head.size}"
        raise LogError(message, code="log.rolled_back")
    boot, operator = _BootLog(), _OperatorLog()
    every: dict[Rules, _Entries] = {
        Rules.BOOT: boot,
        Rules.OPERATOR: operator,
        Rules.MEASUREMENTS: _MeasurementLog(),
    }
    entries = every[rules]
    rebuilt, whole, counts = _Tiles(source, head.size), CompactRange(), dict[str, int]()
    _compare_since(whole, since)
    for start in range(0, head.size, WIDTH):
        leaves = source.entries(start // WIDTH, min(WIDTH, head.size - start))
        hashes = [leaf_hash(leaf) for leaf in leaves]
        rebuilt.add(0, hashes)
        for index, (data, hashed) in enumerate(zip(leaves, hashes, strict=True), start):
            kind = entries.add(index, data, hashed)
            counts[kind] = counts.get(kind, 0) + 1
            whole.append(hashed)
            _compare_since(whole, since)
        progress(whole.size, head.size)
    rebuilt.end()
    if whole.root() != head.root:
        message = f"root: expected the checkpoint's {head.root.hex()}, got {whole.root().hex()}"
        raise LogError(message, code="log.root")
    return CheckedLog(
        checkpoint=head,
        note=note,
        rules=rules,
        counts=counts,
        open_intents=len(boot.open),
        tiles=rebuilt.count,
        last_epoch_us=None if operator.last is None else operator.last.epoch.started_us,
    )


def _compare_since(whole: CompactRange, since: Checkpoint | None) -> None:
    if since is not None and whole.size == since.size and whole.root() != since.root:
        message = f"root at size {since.size}: expected {since.root.hex()}, seen before, got {whole.root().hex()}"
        raise LogError(message, code="log.consistency")
