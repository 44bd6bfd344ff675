"""Where a log is read: a directory, a URL of its static C2SP tlog-tiles files, or a node over an attested connection.

A source gives a signed checkpoint, level tiles and entry bundles, or a node's leaves and proofs; all of it is a
stranger's word until `logcheck` or `tlog.merkle` has verified it. A tile asked for at some width may be cut from a
wider one: a log that has grown keeps no narrower ones. Every read is capped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from countermark.errors import FormatError, LogError, Unavailable, UsageError
from countermark.fetch.https import Service, request
from countermark.files import read_file
from countermark.formats.witnessed import MAX_SIDECAR_BYTES, SIDECAR_NAME
from countermark.tlog import merkle, tiles
from countermark.tlog.checkpoint import MAX_NOTE_BYTES, Checkpoint
from countermark.tlog.merkle import HASH_BYTES
from countermark.tlog.tiles import HEIGHT, MAX_ENTRY_BYTES, WIDTH, Tile
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb

MAX_BUNDLE_BYTES: Final = WIDTH * (MAX_ENTRY_BYTES + 2)
_CACHED_TILES: Final = 64
M = TypeVar("M", bound=Message)


class Source(Protocol):
    """A log as somebody shows it."""

    def checkpoint(self) -> bytes:
        """The latest signed checkpoint."""

    def entries(self, index: int, width: int) -> tuple[bytes, ...]:
        """`width` leaves from leaf `256 * index`."""

    def tile(self, tile: Tile) -> tuple[bytes, ...] | None:
        """The hashes of a tile; None where a source has no tiles."""

    def inclusion(self, index: int, head: Checkpoint) -> tuple[bytes, ...]:
        """An inclusion proof, not verified."""

    def consistency(self, old: int, head: Checkpoint) -> tuple[bytes, ...]:
        """A consistency proof from `old` leaves, not verified."""


class TileSource:
    """A log by its published files. `read(path, most)`: a file below its prefix, or None where there is none."""

    def __init__(self, read: Callable[[str, int], bytes | None]) -> None:
        self._read = read
        self._cached = functools.lru_cache(_CACHED_TILES)(self._hashes)

    def checkpoint(self) -> bytes:
        data = self._read("checkpoint", MAX_NOTE_BYTES)
        if data is None:
            raise LogError("checkpoint: expected a published log, found none", code="log.missing")
        return data

    def sidecar(self) -> bytes | None:
        """The EPOCH, its salt and the keys that a boot's log lies beside; None for other logs."""
        return self._read(SIDECAR_NAME, MAX_SIDECAR_BYTES)

    def entries(self, index: int, width: int) -> tuple[bytes, ...]:
        data, have = self._widest(functools.partial(tiles.entries_path, index), width, MAX_BUNDLE_BYTES)
        return tiles.parse_entries(data, have)[:width]

    def tile(self, tile: Tile) -> tuple[bytes, ...]:
        def path(width: int) -> str:
            return tiles.tile_path(Tile(level=tile.level, index=tile.index, width=width))

        data, have = self._widest(path, tile.width, WIDTH * HASH_BYTES)
        return tiles.parse_tile(data, have)[: tile.width]

    def inclusion(self, index: int, head: Checkpoint) -> tuple[bytes, ...]:
        return merkle.inclusion_proof(index, head.size, self._node(head.size))

    def consistency(self, old: int, head: Checkpoint) -> tuple[bytes, ...]:
        return merkle.consistency_proof(old, head.size, self._node(head.size)) if old else ()

    def _widest(self, path: Callable[[int], str], width: int, most: int) -> tuple[bytes, int]:
        """The file of this width, else the full one that has taken its place, and its width."""
        for have in dict.fromkeys((width, WIDTH)):
            if (data := self._read(path(have), most)) is not None:
                return data, have
        raise LogError(f"{path(width)}: expected a published file, found none", code="log.missing")

    def _hashes(self, level: int, index: int, width: int) -> tuple[bytes, ...]:
        return self.tile(Tile(level=level, index=index, width=width))

    def _node(self, size: int) -> merkle.NodeReader:
        """Hashes of complete subtrees in a tree of `size` leaves, from its tiles."""

        def node(level: int, index: int) -> bytes:
            high, inside = divmod(level, HEIGHT)
            tile_index, first = divmod(index << inside, WIDTH)
            width = min(WIDTH, (size >> (high * HEIGHT)) - tile_index * WIDTH)
            hashes = self._cached(high, tile_index, width)[first : first + (1 << inside)]
            return merkle.Tree(hashes).root() if inside else hashes[0]

        return node


class NodeSource:
    """A log as its node answers for it. `call(method, request)`: the answer's bytes, or an error of ours."""

    def __init__(self, call: Callable[[str, bytes], bytes]) -> None:
        self._call = call

    def checkpoint(self) -> bytes:
        return self._ask("GetCheckpoint", pb.GetCheckpointRequest(), pb.GetCheckpointResponse).checkpoint

    def entries(self, index: int, width: int) -> tuple[bytes, ...]:
        asked = pb.GetLeavesRequest(start=index * WIDTH, count=width)
        leaves = tuple(self._ask("GetLeaves", asked, pb.GetLeavesResponse).leaves)
        if len(leaves) != width:
            raise FormatError(f"leaves: expected {width}, got {len(leaves)}", code="tlog.entries")
        return leaves

    def tile(self, tile: Tile) -> tuple[bytes, ...] | None:
        return None

    def inclusion(self, index: int, head: Checkpoint) -> tuple[bytes, ...]:
        asked = pb.GetInclusionProofRequest(leaf_index=index, tree_size=head.size)
        return tuple(self._ask("GetInclusionProof", asked, pb.GetInclusionProofResponse).proof)

    def consistency(self, old: int, head: Checkpoint) -> tuple[bytes, ...]:
        asked = pb.GetConsistencyProofRequest(old_size=old, new_size=head.size)
        return tuple(self._ask("GetConsistencyProof", asked, pb.GetConsistencyProofResponse).proof)

    def _ask(self, method: str, asked: Message, kind: type[M]) -> M:
        data = self._call(f"/{codec.LOG_SERVICE}/{method}", asked.SerializeToString())
        try:
            return kind.FromString(data)
        except DecodeError as err:
            raise FormatError(f"{method}: expected {kind.__name__}", code="log.malformed") from err


def directory(path: Path) -> TileSource:
    """The log in a directory."""
    if not path.is_dir():
        raise UsageError(f"{path}: expected a directory with a log, found none", code="usage.file")

    def read(name: str, most: int) -> bytes | None:
        file = path / name
        return read_file(file, max_bytes=most) if file.is_file() else None

    return TileSource(read)


def website(service: Service) -> TileSource:
    """The log at a URL. A status other than 200 counts as no file, but for the checkpoint."""

    def read(name: str, most: int) -> bytes | None:
        try:
            return request(service, f"/{name}", max_bytes=most).body
        except Unavailable as err:
            reason = err.code.rpartition(".")[2]
            if reason == "status" and name != "checkpoint":
                return None
            raise Unavailable(str(err), code=f"log.fetch.{reason}", retry_after_s=err.retry_after_s) from err

    return TileSource(read)


def static(text: str, ca_file: Path | None = None) -> TileSource:
    """The log in a directory or at an https URL. `ca_file`: PEM, authorities for the URL."""
    return website(Service(url=text, ca_file=ca_file)) if "://" in text else directory(Path(text))
