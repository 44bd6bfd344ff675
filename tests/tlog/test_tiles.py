"""C2SP tlog-tiles: the paths and counts of the specification's own examples; contents round trip strictly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.tlog import merkle, tiles
from countermark.tlog.tiles import Tile


def test_paths_of_the_specification() -> None:
    assert tiles.tile_path(Tile(level=0, index=1234067, width=256)) == "tile/0/x001/x234/067"
    assert tiles.tile_path(Tile(level=1, index=0, width=17)) == "tile/1/000.p/17"
    assert tiles.entries_path(273, 112) == "tile/entries/273.p/112"


def test_tiles_of_the_specification() -> None:
    def partials(size: int) -> list[tuple[int, int, int]]:
        return [(t.level, t.index, t.width) for t in tiles.tiles_for(size) if t.width < 256]

    assert partials(70_000) == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert sum(1 for t in tiles.tiles_for(70_000) if t.level == 0 and t.width == 256) == 273
    assert [(t.level, t.width) for t in tiles.tiles_for(256)] == [(0, 256), (1, 1)]
    assert list(tiles.tiles_for(0)) == []


@pytest.mark.parametrize(("since", "size"), [(0, 1), (255, 256), (256, 257), (300, 70_000), (70_000, 70_001)])
def test_tiles_since_cover_what_changed(since: int, size: int) -> None:
    def full(count: int) -> set[Tile]:
        return {t for t in tiles.tiles_for(count) if t.width == 256}

    assert set(tiles.tiles_for(size, since=since)) | full(since) >= set(tiles.tiles_for(size))
    assert not set(tiles.tiles_for(size, since=since)) & full(since)


def test_tile_hashes_are_merkle_tree_hashes() -> None:
    leaves = [i.to_bytes(2, "big") for i in range(600)]
    tree = merkle.Tree(map(merkle.leaf_hash, leaves))
    upper = tiles.parse_tile(tiles.encode_tile(Tile(level=1, index=0, width=2), tree.node), 2)
    assert upper[1] == merkle.Tree(map(merkle.leaf_hash, leaves[256:512])).root()
    lower = tiles.parse_tile(tiles.encode_tile(Tile(level=0, index=2, width=88), tree.node), 88)
    assert lower[87] == merkle.leaf_hash(leaves[599])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=20))
def test_entries_round_trip(entries: list[bytes]) -> None:
    data = tiles.encode_entries(entries)
    assert tiles.parse_entries(data, len(entries)) == tuple(entries)
    for width in (len(entries) - 1, len(entries) + 1):
        with pytest.raises(FormatError):
            tiles.parse_entries(data, width)
    for bad in (data[:-1], data + b"\0"):
        with pytest.raises(FormatError) as caught:
            tiles.parse_entries(bad, len(entries))
        assert caught.value.code == "tlog.entries"


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60), st.integers(-1, 260))
def test_arbitrary_bundles_are_refused_or_round_trip(data: bytes, width: int) -> None:
    try:
        entries = tiles.parse_entries(data, width)
    except FormatError:
        return
    assert tiles.encode_entries(entries) == data


def test_sizes_are_exact() -> None:
    for data, width in ((b"", 0), (b"", 1), (bytes(31), 1), (bytes(64), 1), (bytes(257 * 32), 257)):
        with pytest.raises(FormatError) as caught:
            tiles.parse_tile(data, width)
        assert caught.value.code == "tlog.tile"
    with pytest.raises(FormatError):
        tiles.encode_entries([bytes(65536)])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 63), st.integers(0, 10**12), st.integers(1, 256))
def test_paths_round_trip(level: int, index: int, width: int) -> None:
    tile = Tile(level=level, index=index, width=width)
    assert tiles.parse_tile_path(tiles.tile_path(tile)) == (tile, False)
    entry = Tile(level=0, index=index, width=width)
    assert tiles.parse_tile_path(tiles.entries_path(index, width)) == (entry, True)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile",
        "tile/0/1",
        "tile/00/001",
        "tile/64/001",
        "tile/0/x000/001",
        "tile/0/001.p/0",
        "tile/0/001.p/256",
        "tile/0/001.p/01",
        "tile/0/../001",
        "tile/entries/x001/1",
        "tile/0/001/002",
        "tile/+0/001",
        "tile/0/٠٠١",
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(FormatError) as caught:
        tiles.parse_tile_path(path)
    assert caught.value.code == "tlog.tile_path"
