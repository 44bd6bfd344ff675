"""C2SP tlog-tiles: where the tiles and entry bundles of a log stand, and what is in them.

A tile holds 256 hashes of one level; level l, index n, position i is the hash over leaves
[(256n + i) * 256**l, (256n + i + 1) * 256**l). The last tile of a level may be partial (1 to 255 hashes). An entry
bundle holds the leaves of one level-0 tile, each after its length as a big-endian uint16. Not checked here: that the
hashes belong to any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from countermark.errors import FormatError
from countermark.tlog.merkle import HASH_BYTES, NodeReader

WIDTH = 256
HEIGHT = 8
MAX_LEVEL = 63
MAX_ENTRY_BYTES = 0xFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Coordinates of one tile: `width` is 1 to 256."""

    level: int
    index: int
    width: int


def tile_path(tile: Tile) -> str:
    """Path below the log's prefix, such as `tile/0/x001/x234/067` or `tile/1/000.p/17`."""
    return f"tile/{tile.level}/{_number(tile.index)}{_suffix(tile.width)}"


def entries_path(index: int, width: int) -> str:
    """Path of the entry bundle that belongs to level-0 tile `index`."""
    return f"tile/entries/{_number(index)}{_suffix(width)}"


def parse_tile_path(path: str) -> tuple[Tile, bool]:
    """Inverse of `tile_path` and `entries_path`: the tile, and whether it is an entry bundle.

    Raises `FormatError` (`tlog.tile_path`).
    """
    try:
        head, _, rest = path.removeprefix("tile/").partition("/")
        name, _, width_text = rest.partition(".p/")
        digits = [part.removeprefix("x") for part in name.split("/")]
        if not all(part.isascii() and part.isdigit() and len(part) == 3 for part in digits) or len(digits) > 6:
            raise ValueError(path)
        tile = Tile(
            level=0 if head == "entries" else int(head),
            index=int("".join(digits)),
            width=int(width_text) if width_text else WIDTH,
        )
    except ValueError as err:
        raise FormatError("tile path: expected C2SP tlog-tiles form", code="tlog.tile_path") from err
    bundle = head == "entries"
    canonical = entries_path(tile.index, tile.width) if bundle else tile_path(tile)
    if canonical != path or tile.level > MAX_LEVEL or not 1 <= tile.width <= WIDTH:
        raise FormatError("tile path: expected C2SP tlog-tiles form", code="tlog.tile_path")
    return tile, bundle


def tiles_for(size: int, *, since: int = 0) -> Iterator[Tile]:
    """The tiles a tree of `size` leaves has, except those already full in the tree of `since` leaves."""
    level = 0
    while size >> (level * HEIGHT):
        count, done = size >> (level * HEIGHT), since >> (level * HEIGHT)
        for index in range(done // WIDTH, -(-count // WIDTH)):
            yield Tile(level=level, index=index, width=min(WIDTH, count - index * WIDTH))
        level += 1


def encode_tile(tile: Tile, node: NodeReader) -> bytes:
    """The tile's hashes, concatenated."""
    first = tile.index * WIDTH
    return b"".join(node(tile.level * HEIGHT, first + i) for i in range(tile.width))


def parse_tile(data: bytes, width: int) -> tuple[bytes, ...]:
    """The hashes of a tile of the given width. Raises `FormatError` (`tlog.tile`)."""
    if not 1 <= width <= WIDTH or len(data) != width * HASH_BYTES:
        raise FormatError(f"tile: expected {width * HASH_BYTES} bytes, got {len(data)}", code="tlog.tile")
    return tuple(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))


def encode_entries(entries: Sequence[bytes]) -> bytes:
    """An entry bundle. Raises `FormatError` (`tlog.entries`) if an entry is longer than 65535 bytes."""
    if any(len(entry) > MAX_ENTRY_BYTES for entry in entries):
        raise FormatError(f"entry: expected at most {MAX_ENTRY_BYTES} bytes", code="tlog.entries")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def parse_entries(data: bytes, width: int) -> tuple[bytes, ...]:
    """The `width` entries of a bundle; every byte is accounted for. Raises `FormatError` (`tlog.entries`)."""
    entries: list[bytes] = []
    at = 0
    while at < len(data) and len(entries) < width:
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if at + 2 > len(data) or end > len(data):
            raise FormatError("entry bundle: ends inside an entry", code="tlog.entries")
        entries.append(data[at + 2 : end])
        at = end
    if at != len(data) or len(entries) != width or not 1 <= width <= WIDTH:
        raise FormatError(f"entry bundle: expected exactly {width} entries", code="tlog.entries")
    return tuple(entries)


def _number(index: int) -> str:
    """1234067 -> `x001/x234/067`."""
    groups = [f"{index % 1000:03d}"]
    while index := index // 1000:
        groups.append(f"x{index % 1000:03d}")
    return "/".join(reversed(groups))


def _suffix(width: int) -> str:
    return "" if width == WIDTH else f".p/{width}"
