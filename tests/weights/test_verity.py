"""dm-verity hash trees against veritysetup itself, where it is installed, and against roots it gave (version 2.6.1)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import verity

VERITYSETUP = shutil.which("veritysetup") or shutil.which("veritysetup", path="/usr/sbin:/sbin")
# data blocks: (root, SHA-256 of the hash device), printed by veritysetup 2.6.1 for `pattern(blocks)`
KNOWN = {
    2: (
        "834dd8c2d314f5bbc8a4884400a7735c5b862aecaeb615fcc63b5bf62c85e33c",
        "35b86e73b713eb805169d83a69363905b101a13858fce9f6001f27754d3b82f7",
    ),
    128: (
        "9f3548a5660b8b8196a072fea8d8be5605b7776df270a5a57009fe4759b27ed1",
        "c55b558f72498ac6ccd2b32e1cf49c2963c131ec066c59ad4c3bbdab5145cd37",
    ),
    129: (
        "4c14a3e02d6c9025c19a9497ee01098143f53dfc12d4a333ed07fd55f98e9092",
        "94c4a5ade9c5746bca990a766fa1fd2b43a85c2e90428e1d3d827e9855975dc4",
    ),
    1025: (
        "9cc91c8a29f8a36834da02379096e7d29e632b35bbe79e76900f94bc9b73b6b4",
        "3117f3783635b65fe7a5a852d9cd2ce6611e4453dc9199fa0d6da0a4e031fed3",
    ),
}


def pattern(blocks: int) -> bytes:
    return b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() * 128 for i in range(blocks))


@pytest.mark.parametrize("blocks", KNOWN)
def test_known_roots(blocks: int) -> None:
    root, tree = verity.build_tree(memoryview(pattern(blocks)))
    assert (root.hex(), hashlib.sha256(tree).hexdigest()) == KNOWN[blocks]


@pytest.mark.parametrize("blocks", [2, 127, 128, 129, 1025, 16_385])
def test_same_as_veritysetup(blocks: int, tmp_path: Path) -> None:
    if VERITYSETUP is None:
        pytest.skip("veritysetup is not installed: the tree is compared with known roots only")
    image, hashes = tmp_path / "image", tmp_path / "hashes"
    image.write_bytes(pattern(blocks))
    parameters = [
        "--format=1", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096",
        f"--salt={verity.SALT.hex()}", f"--uuid={uuid.UUID(bytes=verity.UUID)}",
    ]  # fmt: skip
    command = [VERITYSETUP, "format", *parameters, str(image), str(hashes)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    root, tree = verity.build_tree(memoryview(image.read_bytes()))
    assert f"Root hash:      \t{root.hex()}" in shown
    assert tree == hashes.read_bytes()
    hashes.write_bytes(tree)
    subprocess.run([VERITYSETUP, "verify", str(image), str(hashes), root.hex()], check=True)


@pytest.fixture(scope="module")
def good() -> tuple[bytes, bytes, bytes]:
    image = pattern(16_385)  # three levels
    root, tree = verity.build_tree(memoryview(image))
    return image, root, tree


def test_an_intact_image_has_no_bad_block(good: tuple[bytes, bytes, bytes]) -> None:
    image, root, tree = good
    assert verity.stored_root(memoryview(tree), 16_385) == root
    seen: list[int] = []
    assert verity.first_bad_block(memoryview(image), memoryview(tree), root, seen.append) is None
    assert sum(seen) == len(image)


@pytest.mark.parametrize("block", [0, 1, 127, 128, 1023, 1024, 9999, 16_384])
def test_the_first_bad_data_block_is_named(good: tuple[bytes, bytes, bytes], block: int) -> None:
    image, root, tree = good
    changed = bytearray(image)
    changed[block * 4096 + 17] ^= 1
    changed[-1] ^= 1  # also the very last byte: the first bad one is reported
    found = verity.first_bad_block(memoryview(changed), memoryview(tree), root)
    assert found == verity.BadBlock(level=None, index=block)


def test_bad_tree_blocks_are_named_from_the_top(good: tuple[bytes, bytes, bytes]) -> None:
    image, root, tree = good
    assert verity.level_sizes(16_385) == [129, 2, 1]
    for block, level, index in ((1, 2, 0), (2, 1, 0), (3, 1, 1), (4, 0, 0), (132, 0, 128)):
        changed = bytearray(tree)
        changed[block * 4096 + 5] ^= 0x80
        found = verity.first_bad_block(memoryview(image), memoryview(changed), root)
        assert found == verity.BadBlock(level=level, index=index)


def test_other_roots_fail_at_the_top(good: tuple[bytes, bytes, bytes]) -> None:
    image, _, tree = good
    assert verity.first_bad_block(memoryview(image), memoryview(tree), bytes(32)) == verity.BadBlock(level=2, index=0)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tree: tree[:-1], "weights.truncated"),
        (lambda tree: tree + bytes(4096), "weights.truncated"),
        (lambda tree: b"", "weights.truncated"),
    ],
)
def test_wrong_sizes(good: tuple[bytes, bytes, bytes], change: Callable[[bytes], bytes], code: str) -> None:
    with pytest.raises(WeightsError) as caught:
        verity.stored_root(memoryview(change(good[2])), 16_385)
    assert caught.value.code == code


@pytest.mark.parametrize("byte", [0, 8, 12, 16, 31, 32, 40, 64, 68, 80, 82, 88, 200, 343, 344, 512, 4095])
def test_every_field_of_the_superblock_counts(good: tuple[bytes, bytes, bytes], byte: int) -> None:
    tree = bytearray(good[2])
    tree[byte] ^= 1
    with pytest.raises(WeightsError) as caught:
        verity.stored_root(memoryview(tree), 16_385)
    assert caught.value.code == "weights.superblock"


def test_an_image_of_another_length_is_called_truncated(good: tuple[bytes, bytes, bytes]) -> None:
    for blocks in (16_384, 16_386, 1 << 40):
        with pytest.raises(WeightsError) as caught:
            verity.stored_root(memoryview(good[2]), blocks)
        assert caught.value.code == "weights.truncated"
