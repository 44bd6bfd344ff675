"""dm-verity hash trees, as `veritysetup format` writes them, computed and checked in Python; form: `verityformat`.

The root is the digest of the top block. hashlib releases the interpreter lock for each 4096-byte block, so leaves are
hashed on a few threads in parallel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from countermark.errors import WeightsError
from countermark_appliance.engine.verityformat import (
    BLOCK,
    DIGEST,
    SALT,
    UUID,
    level_sizes,
    stated_blocks,
    superblock,
    tree_bytes,
)
from countermark_appliance.engine.weights.parallel import ordered

__all__ = [
    "BLOCK",
    "DIGEST",
    "SALT",
    "UUID",
    "BadBlock",
    "build_tree",
    "digest",
    "first_bad_block",
    "leaf_chunks",
    "level_sizes",
    "stored_root",
    "superblock",
    "tree_bytes",
]
_CHUNK_BLOCKS = 1024

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBlock:
    """The first block that does not hash to its parent's digest. `level` None: a data block; else a tree block."""

    level: int | None
    index: int


def digest(block: bytes | memoryview) -> bytes:
    """SHA-256(salt || block)."""
    return hashlib.sha256(SALT + block).digest()


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
    stated = stated_blocks(tree[:BLOCK])
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
