"""What clients are handed about this boot's EPOCH: its place in the operator log, with whatever witnesses signed.

Read from the published files of the operator log, which lie on the host's disk and may be absent, old or wrong at any
time: the client checks all of it, and nothing here can make a client accept more. Of the heads that are there the one
with the most cosignatures that holds our EPOCH is taken. Read again when the directory changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from countermark import cosigned
from countermark.errors import CountermarkError
from countermark.formats.records import encode_record
from countermark.formats.witnessed import Sidecar, Witnessed, encode_operator_leaf, encode_witnessed
from countermark.logsource import TileSource, directory
from countermark.tlog.checkpoint import Checkpoint, parse_checkpoint_text, parse_note
from countermark.tlog.merkle import leaf_hash, verify_inclusion
from countermark.tlog.tiles import WIDTH, Tile

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootProof:
    """Leaf 0 of the running log under one of its checkpoints."""

    proof: tuple[bytes, ...]
    checkpoint: bytes


class WitnessedEpoch:
    """This boot's EPOCH as the operator log at `path` shows it. Thread-safe."""

    def __init__(self, path: Path, sidecar: Sidecar, boot: Callable[[], BootProof]) -> None:
        """`boot`: proves leaf 0 of our own log."""
        self._path = path
        self._record, self._salt = encode_record(sidecar.epoch), sidecar.salt
        self._leaf = leaf_hash(encode_operator_leaf(self._record, self._salt))
        self._boot = boot
        self._lock = threading.Lock()
        self._seen: object = None
        self._index: int | None = None
        self._encoded = b""

    def encoded(self) -> bytes:
        """`formats.witnessed.encode_witnessed`, or nothing while the operator log does not hold our EPOCH."""
        with self._lock:
            try:
                state = self._state()
                if state != self._seen:
                    self._encoded = self._read()
                    self._seen = state
            except (CountermarkError, OSError) as err:
                _log.warning("operator log: %s", err)
                self._encoded, self._seen = b"", None
            return self._encoded

    def _state(self) -> tuple[int, ...]:
        paths = (self._path / "checkpoint", self._path / cosigned.FOLDER)
        return tuple(path.stat().st_mtime_ns for path in paths if path.exists())

    def _read(self) -> bytes:
        source = directory(self._path)
        for note in cosigned.heads(self._path):
            head = parse_checkpoint_text(parse_note(note).text)
            if self._index is None:
                self._index = self._find(source, head)
            if self._index is None or self._index >= head.size:
                continue
            proof = source.inclusion(self._index, head)
            verify_inclusion(self._index, head.size, self._leaf, proof, head.root)
            boot = self._boot()
            return encode_witnessed(
                Witnessed(
                    record=self._record,
                    salt=self._salt,
                    index=self._index,
                    proof=proof,
                    checkpoint=note,
                    boot_proof=boot.proof,
                    boot_checkpoint=boot.checkpoint,
                )
            )
        return b""

    def _find(self, source: TileSource, head: Checkpoint) -> int | None:
        """Where our EPOCH stands: among the last ones, most likely."""
        for tile in range(-(-head.size // WIDTH) - 1, -1, -1):
            hashes = source.tile(Tile(level=0, index=tile, width=min(WIDTH, head.size - tile * WIDTH)))
            if self._leaf in hashes:
                return tile * WIDTH + hashes.index(self._leaf)
        return None
