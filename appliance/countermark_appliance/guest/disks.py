"""The host's disks, found in sysfs: by virtio serial, or by the name of a partition.

Linux: /sys/block/NAME/serial (drivers/block/virtio_blk.c), /sys/class/block/NAME/uevent with DEVNAME, MAJOR, MINOR and
PARTNAME (block/genhd.c, block/partitions/core.c), `size` in sectors of 512 bytes. Each name must be there exactly once:
of two disks a host could show one to a check and the other to its use. Drivers may still be looking for disks when this
starts, so what is missing is waited for.

Not checked here: anything on a disk. All of it is the host's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from countermark.errors import ConfigError
from countermark_appliance.platform.sysfs import Sysfs

WAIT_S: Final = 30.0
SECTOR: Final = 512
_POLL_S: Final = 0.2
_MAX_TEXT: Final = 4096
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A block device. `device`: MAJOR:MINOR, as device-mapper wants it."""

    name: str
    device: str
    size_bytes: int

    @property
    def node(self) -> str:
        """Its path below the root."""
        return f"dev/{self.name}"


class Disks:
    """The disks of one machine."""

    def __init__(
        self,
        sysfs: Sysfs,
        *,
        wait_s: float = WAIT_S,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sysfs = sysfs
        self._until = now() + wait_s
        self._now = now
        self._sleep = sleep

    def with_serial(self, serial: str) -> Disk:
        """Raises `ConfigError` `guest.disk_missing` or `guest.disk_twice`."""
        return self._one(
            lambda: self._named("sys/block", lambda name: self._serial(name) == serial), f"serial {serial}"
        )

    def partition(self, label: str) -> Disk:
        """Raises `ConfigError` `guest.disk_missing` or `guest.disk_twice`."""
        return self._one(
            lambda: self._named("sys/class/block", lambda name: self._uevent(name).get("PARTNAME") == label),
            f"partition {label}",
        )

    def _one(self, find: Callable[[], list[str]], what: str) -> Disk:
        while not (names := find()):
            if self._now() >= self._until:
                message = f"disks: expected one with {what}, got none: attach it to the machine"
                raise ConfigError(message, code="guest.disk_missing")
            self._sleep(_POLL_S)
        if len(names) > 1:
            message = f"disks: expected one with {what}, got {len(names)}: {', '.join(names)}"
            raise ConfigError(message, code="guest.disk_twice")
        return self._disk(names[0])

    def _named(self, folder: str, wanted: Callable[[str], bool]) -> list[str]:
        path = self._sysfs.root / folder
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        return [name for name in names if _NAME.fullmatch(name) and wanted(name)]

    def _disk(self, name: str) -> Disk:
        facts = self._uevent(name)
        size = int(self._text(f"sys/class/block/{name}/size") or "0")
        return Disk(name=name, device=f"{facts.get('MAJOR')}:{facts.get('MINOR')}", size_bytes=size * SECTOR)

    def _serial(self, name: str) -> str:
        return self._text(f"sys/block/{name}/serial")

    def _uevent(self, name: str) -> dict[str, str]:
        lines = self._text(f"sys/class/block/{name}/uevent").splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}

    def _text(self, path: str) -> str:
        try:
            return self._sysfs.read(path, max_bytes=_MAX_TEXT).decode("ascii", "replace").strip()
        except OSError:  # no such attribute, or a device that has just gone
            return ""
