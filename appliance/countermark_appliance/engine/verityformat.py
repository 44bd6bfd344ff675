"""The form of our dm-verity hash devices: parameters, superblock, sizes. What the kernel is told, and what we compute.

Linux `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's on-disk format (version 1, hash type 1,
SHA-256, data and hash blocks of 4096 bytes): one superblock block, then the levels from the root's block down to the
leaves; a digest is SHA-256(salt || block), 128 digests a hash block, the last one of a level padded with zeros. Salt
and UUID are fixed: the same data has the same tree, bit for bit. Not here: hashing (`engine.weights.verity`).
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

from countermark.errors import WeightsError

BLOCK: Final = 4096
DIGEST: Final = 32
FANOUT: Final = BLOCK // DIGEST
SALT: Final = hashlib.sha256(b"countermark/weights/verity/salt/v1").digest()
UUID: Final = hashlib.sha256(b"countermark/weights/verity/uuid/v1").digest()[:16]
DEVICE_UUID: Final = "countermark-verity-"  # of a mapped device: this and the root in hex, so that sysfs names the root
_SUPERBLOCK: Final = struct.Struct("<8sII16s32sIIQH6s256s168s")
_DATA_BLOCKS: Final = 7  # index of that field
_MAX_BLOCKS: Final = 1 << 40


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


def stated_blocks(block: bytes | memoryview) -> int:
    """How many data blocks a hash device's first block states. Raises `WeightsError` `weights.superblock`."""
    stated = int(_SUPERBLOCK.unpack(block[: _SUPERBLOCK.size])[_DATA_BLOCKS]) if len(block) == BLOCK else 0
    if not 2 <= stated <= _MAX_BLOCKS or bytes(block) != superblock(stated):
        raise WeightsError("hash tree: expected the superblock of our parameters", code="weights.superblock")
    return stated


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
