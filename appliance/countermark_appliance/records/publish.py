"""Write a log's C2SP tlog-tiles files beside its journal: `checkpoint`, `tile/<L>/<N>`, `tile/entries/<N>`.

Readers may rely on this order: tiles first, then the checkpoint that needs them; every file appears whole (written
aside, then renamed). Partial tiles are removed when the full one stands. Checkpoints are coalesced: not every one that
a client was given is published, the latest always is. A full disk only delays publication.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from countermark.tlog import tiles
from countermark.tlog.merkle import NodeReader
from countermark_appliance.records.journal import sync_directory

ReadLeaves = Callable[[int, int], Sequence[bytes]]
INTERVAL_S = 0.2
_log = logging.getLogger(__name__)


def publish(
    directory: Path,
    size: int,
    checkpoint: bytes,
    node: NodeReader,
    leaves: ReadLeaves,
    *,
    since: int,
    durable: bool = False,
) -> None:
    """Write the files of a tree of `size` leaves; those of a tree of `since` leaves stand already.

    `durable`: for a log that has nothing else; the tiles are synced before the checkpoint appears, then it is.
    """
    for tile in tiles.tiles_for(size, since=since):
        _write(directory / tiles.tile_path(tile), tiles.encode_tile(tile, node), durable)
        if tile.level == 0:
            entries = tiles.encode_entries(leaves(tile.index * tiles.WIDTH, tile.width))
            _write(directory / tiles.entries_path(tile.index, tile.width), entries, durable)
        if tile.width == tiles.WIDTH:
            for path in (tiles.tile_path(tile), tiles.entries_path(tile.index, tile.width)):
                shutil.rmtree(directory / f"{path}.p", ignore_errors=True)
    _write(directory / "checkpoint", checkpoint, durable)


class Publisher:
    """Publishes the latest checkpoint it was told of, from a thread of its own."""

    def __init__(self, directory: Path, node: NodeReader, leaves: ReadLeaves) -> None:
        self._directory = directory
        self._node = node
        self._leaves = leaves
        self._wanted: tuple[int, bytes] = (0, b"")
        self._published = 0
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="countermark-publish", daemon=True)
        self._thread.start()

    def publish(self, size: int, checkpoint: bytes) -> None:
        """Publish this checkpoint soon, unless a later one comes first."""
        self._wanted = (size, checkpoint)
        self._changed.set()

    def close(self) -> None:
        """Publish the last checkpoint and stop."""
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closing.is_set()
            size, checkpoint = self._wanted
            if size > self._published:
                self._try(size, checkpoint)
            if closing:
                return
            self._closing.wait(INTERVAL_S)

    def _try(self, size: int, checkpoint: bytes) -> None:
        try:
            publish(self._directory, size, checkpoint, self._node, self._leaves, since=self._published)
        except OSError as err:
            _log.warning("log: could not publish size %d: %s", size, errno.errorcode.get(err.errno or 0, "?"))
        else:
            self._published = size


def _write(path: Path, data: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    aside.replace(path)
    if durable:
        for folder in (path.parent, *path.parent.parents[:4]):  # the names down to a tile are new at most so deep
            sync_directory(folder)
