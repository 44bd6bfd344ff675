"""dm-verity devices through the kernel's device-mapper interface, without a tool or library between.

Linux include/uapi/linux/dm-ioctl.h (interface version 4): struct dm_ioctl is 312 bytes, struct dm_target_spec 40, its
parameters a string behind it; a device is made (DM_DEV_CREATE), its table loaded (DM_TABLE_LOAD) and made live
(DM_DEV_SUSPEND without the suspend flag). Table line: Documentation/admin-guide/device-mapper/verity.rst, version 1.
The device's UUID names the root it was opened with (`engine.verityformat.DEVICE_UUID`).

Corruption gives EIO to whoever reads: the service then ends, and with it this boot.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from countermark.errors import ConfigError
from countermark_appliance.engine.verityformat import BLOCK, DEVICE_UUID, SALT, tree_bytes
from countermark_appliance.guest.disks import SECTOR, Disk

CONTROL: Final = "dev/mapper/control"
_VERSION: Final = (4, 0, 0)
_HEADER: Final = struct.Struct("=3I I I I i I I I Q 128s 129s 7x")
_TARGET: Final = struct.Struct("=Q Q i I 16s")
_CREATE, _SUSPEND, _LOAD = 3, 6, 9
_READ_ONLY: Final = 1
_DEV: Final = 10  # index of that field

Ioctl = Callable[[int, int, bytearray], object]


def request_number(command: int) -> int:
    """_IOWR(0xfd, command, struct dm_ioctl), as asm-generic/ioctl.h numbers it."""
    return 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command


def header(size: int, *, name: str, uuid: str = "", targets: int = 0, flags: int = 0) -> bytes:
    """struct dm_ioctl for a request of `size` bytes in all."""
    return _HEADER.pack(*_VERSION, size, _HEADER.size, targets, 0, flags, 0, 0, 0, name.encode(), uuid.encode())


def verity_target(data: Disk, tree: Disk, *, blocks: int, root: bytes) -> bytes:
    """The one target of a table: `blocks` of `data` under the tree that begins behind `tree`'s superblock."""
    words = ("1", data.device, tree.device, BLOCK, BLOCK, blocks, 1, "sha256", root.hex(), SALT.hex())
    parameters = " ".join(map(str, words)).encode() + b"\0"
    parameters += bytes(-(_TARGET.size + len(parameters)) % 8)
    return _TARGET.pack(0, blocks * BLOCK // SECTOR, 0, _TARGET.size + len(parameters), b"verity") + parameters


def open_verity(
    name: str, data: Disk, tree: Disk, *, blocks: int, root: bytes, base: Path = Path("/"), ioctl: Ioctl = fcntl.ioctl
) -> str:
    """Make the device and return its node's path below `base`. `blocks`: as the superblock states.

    Raises `ConfigError`: `guest.weights_size` where a partition is too small, `guest.device_mapper`.
    """
    for disk, wanted in ((data, blocks * BLOCK), (tree, tree_bytes(blocks))):
        if disk.size_bytes < wanted:
            message = f"{disk.name}: expected at least {wanted} bytes for {blocks} blocks, got {disk.size_bytes}"
            raise ConfigError(message, code="guest.weights_size")
    target = verity_target(data, tree, blocks=blocks, root=root)
    size = _HEADER.size + len(target)
    create = bytearray(header(_HEADER.size, name=name, uuid=DEVICE_UUID + root.hex()))
    load = bytearray(header(size, name=name, targets=1, flags=_READ_ONLY) + target)
    resume = bytearray(header(_HEADER.size, name=name))
    try:
        control = os.open(base / CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            for command, request in ((_CREATE, create), (_LOAD, load), (_SUSPEND, resume)):
                ioctl(control, request_number(command), request)
        finally:
            os.close(control)
    except OSError as err:
        message = f"weights: expected device-mapper to open them with dm-verity, got {err.strerror}"
        raise ConfigError(message, code="guest.device_mapper") from err
    number = int(_HEADER.unpack_from(create)[_DEV])  # huge_encode_dev: 12 bits of major above 8 of minor
    return f"dev/dm-{number & 0xFF | number >> 12 & 0xFFF00}"
