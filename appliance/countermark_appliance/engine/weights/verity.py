"""dm-verity hash trees, as `veritysetup format` writes them, computed and checked in Python.

Format: Linux `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's on-disk format (version 1, hash
type 1, SHA-256, data and hash blocks of 4096 bytes): one superblock block, then the levels from the root's block down
to the leaves; a digest is SHA-256(salt || block), 128 digests a hash block, the last one of a level padded with zeros.
The root is the digest of the top block. Salt and UUID are fixed: the same data has the same tree, bit for bit.

hashlib releases the interpreter lock for each 4096-byte block, so leaves are hashed on a few threads in parallel.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.parallel import ordered

BLOCK = 4096
DIGEST = 32
FANOUT = BLOCK // DIGEST
SALT = hashlib.sha256(b"countermark/weights/verity/salt/v1").digest()
UUID = hashlib.sha256(b"countermark/weights/verity/uuid/v1").digest()[:16]
_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6s256s168s")
_DATA_BLOCKS = 7  # index of that field
_MAX_BLOCKS = 1 << 40
_CHUNK_BLOCKS = 1024

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBlock:
    """The first block that does not hash to its parent's digest. `level` None: a data block; else a tree block."""

    level: int | None
    index: int


def superblock(data_blocks: int) -> bytes:
    """The first block of the hash device."""
    packed = _SUPERBLOCK.pack(
        b"verity\0\0",
        1,  # version
        1,  # hash type: salt first
        UUID,
        b"sha256",
        BLOCK,
        BLOCK,
        data_blocks,
        len(SALT),
        bytes(6),
        SALT,
        bytes(168),
    )
    return packed.ljust(BLOCK, b"\0")


def digest(block: bytes | memoryview) -> bytes:
    """SHA-256(salt || block)."""
    return hashlib.sha256(SALT + block).digest()


def level_sizes(data_blocks: int) -> list[int]:
    """Hash blocks of each level, leaves first, the last one 1. Empty for one data block: the root is its digest."""
    sizes: list[int] = []
    count = data_blocks
    while count > 1:
        count = -(-count // FANOUT)
        sizes.append(count)
    return sizes


def tree_bytes(data_blocks: int) -> int:
    """Size of the hash device, superblock included."""
    return BLOCK * (1 + sum(level_sizes(data_blocks)))


def leaf_chunks(image: memoryview, progress: Progress) -> Iterator[bytes]:
    """Digests of the image's blocks, in order, `_CHUNK_BLOCKS` at a time (the last chunk may be shorter)."""
    step = _CHUNK_BLOCKS * BLOCK

    def chunk(start: int) -> bytes:
        out = bytearray()
        base = hashlib.sha256(SALT)
        for position in range(start, min(start + step, len(image)), BLOCK):
            state = base.copy()
            state.update(image[position : position + BLOCK])
            out += state.digest()
        return bytes(out)

    for found in ordered(chunk, range(0, len(image), step)):
        yield found
        progress(len(found) // DIGEST * BLOCK)


def build_tree(image: memoryview, progress: Progress = lambda _: None) -> tuple[bytes, bytes]:
    """The root and the whole content of the hash device for an image of whole blocks."""
    assert len(image) % BLOCK == 0 and len(image) > BLOCK
    levels = [_padded(b"".join(leaf_chunks(image, progress)))]
    while len(levels[-1]) > BLOCK:
        below = memoryview(levels[-1])
        levels.append(_padded(b"".join(digest(below[i : i + BLOCK]) for i in range(0, len(below), BLOCK))))
    tree = b"".join([superblock(len(image) // BLOCK), *reversed(levels)])
    return digest(levels[-1]), tree


def stored_root(tree: memoryview, data_blocks: int) -> bytes:
    """The root that this hash device has, checking only its size and superblock.

    Raises `WeightsError`: `weights.truncated`, `weights.superblock`.
    """
    if len(tree) < 2 * BLOCK:
        raise WeightsError(f"hash tree: expected at least two blocks, got {len(tree)} bytes", code="weights.truncated")
    stated = int(_SUPERBLOCK.unpack(tree[: _SUPERBLOCK.size])[_DATA_BLOCKS])
    if tree[:BLOCK] != superblock(stated) or not 2 <= stated <= _MAX_BLOCKS:
        raise WeightsError("hash tree: expected the superblock of our parameters", code="weights.superblock")
    for what, expected, got in (("image", stated, data_blocks), ("hash tree", tree_bytes(stated), len(tree))):
        if expected != got:
            unit = "blocks" if what == "image" else "bytes"
            raise WeightsError(f"{what}: expected {expected} {unit}, got {got}", code="weights.truncated")
    return digest(tree[BLOCK : 2 * BLOCK])


def first_bad_block(
    image: memoryview, tree: memoryview, root: bytes, progress: Progress = lambda _: None
) -> BadBlock | None:
    """Check from the root down, as the kernel does: tree blocks level by level, then every data block in order.

    `tree` must have passed `stored_root`. A root that differs shows as tree block 0 of the top level.
    """
    sizes = level_sizes(len(image) // BLOCK)
    expected = root
    position = BLOCK
    for level in reversed(range(len(sizes))):
        blocks = tree[position : position + sizes[level] * BLOCK]
        for i in range(sizes[level]):
            if digest(blocks[i * BLOCK : (i + 1) * BLOCK]) != expected[i * DIGEST : (i + 1) * DIGEST]:
                return BadBlock(level=level, index=i)
        below = sizes[level - 1] if level else len(image) // BLOCK
        if any(blocks[below * DIGEST :]):
            return BadBlock(level=level, index=sizes[level] - 1)
        expected = bytes(blocks[: below * DIGEST])
        position += len(blocks)
    start = 0
    for found in leaf_chunks(image, progress):
        if found != expected[start : start + len(found)]:
            for i in range(0, len(found), DIGEST):
                if found[i : i + DIGEST] != expected[start + i : start + i + DIGEST]:
                    return BadBlock(level=None, index=(start + i) // DIGEST)
        start += len(found)
    return None


def _padded(level: bytes) -> bytes:
    return level + bytes(-len(level) % BLOCK)
