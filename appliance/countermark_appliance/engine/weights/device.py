"""Weights on a block device that the kernel's dm-verity checks on every read.

Whoever opened the device (in an image `countermark-prepare`) gave it the root it was opened with as a part of its
device-mapper UUID, which only device-mapper itself can set and sysfs shows: /sys/dev/block/MAJOR:MINOR/dm/uuid. So a
device that nobody opened with dm-verity, or with another root, is refused, not read.

Not checked here: that the table behind the name is one of dm-verity; whoever may make such devices is in the image.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from countermark.errors import WeightsError
from countermark_appliance.engine.verityformat import BLOCK, DEVICE_UUID

_CHUNK: Final = 256 * BLOCK
_UUID: Final = re.compile(re.escape(DEVICE_UUID) + r"([0-9a-f]{64})\n?")


def opened_root(path: Path, *, sysfs: Path = Path("/sys")) -> bytes | None:
    """The root that dm-verity has opened a block device with; None for what is no block device.

    Raises `WeightsError`: `weights.missing`, `weights.device` for a device without such a root.
    """
    try:
        found = path.stat()
    except OSError as err:
        raise WeightsError(f"{path}: {err.strerror}", code="weights.missing") from err
    if not stat.S_ISBLK(found.st_mode):
        return None
    return _root(sysfs / f"dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}/dm/uuid", path.name)


def _root(uuid: Path, name: str) -> bytes:
    try:
        with uuid.open("rb") as file:
            text = file.read(256).decode("ascii", "replace")
    except OSError as err:
        message = f"{name}: expected a device that dm-verity has opened, got one without /{'/'.join(uuid.parts[-2:])}"
        raise WeightsError(message, code="weights.device") from err
    match = _UUID.fullmatch(text)
    if match is None:
        message = f"{name}: expected a device opened as {DEVICE_UUID}ROOT, got {text.strip()!r:.80}"
        raise WeightsError(message, code="weights.device")
    return bytes.fromhex(match[1])


def first_unreadable(path: Path, size_bytes: int, progress: Callable[[int], None] = lambda _: None) -> int | None:
    """Read everything once, in order; the first block that the kernel does not hand out, or None."""
    with path.open("rb", buffering=0) as file:
        position = 0
        while position < size_bytes:
            want = min(_CHUNK, size_bytes - position)
            if not _reads(file.fileno(), position, want):
                return next(
                    (at // BLOCK for at in range(position, position + want, BLOCK) if not _reads(file.fileno(), at)),
                    position // BLOCK,
                )
            position += want
            progress(want)
    return None


def _reads(descriptor: int, offset: int, size: int = BLOCK) -> bool:
    try:
        while size:
            part = len(os.pread(descriptor, size, offset))
            if not part:
                return False
            offset, size = offset + part, size - part
    except OSError:
        return False
    return True
