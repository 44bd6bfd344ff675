"""From a booted kernel to what the service needs: a config that is measured, weights that are checked, a log disk.

 1 refuse what the host may not say (`host`)
 2 the config: the bytes of the disk with the serial `cm-config` up to their zero padding, which is what RTMR3 gets the
   hash of, written to /run/countermark/node.toml. Parsed here, so that a mistake is told before anything is measured
 3 the weights: partitions `countermark-weights` and `countermark-weights-verity`, opened by the kernel's dm-verity with
   the root that the config names; /run/countermark/weights/weights.img is a link to that device
 4 the log disk, serial `cm-log`: its file system is repaired if a crash left it unclean; a unit mounts it, without
   programs and devices, at /run/countermark/log
 5 the module loader is closed until power-off

In the config, paths are relative to /run/countermark: `weights.dir = "weights"`, the rest on the log disk below `log`.
Not done here: measuring (`platform.attester`), mounting, and any judgement of what the log disk holds.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from countermark.errors import ConfigError, WeightsError
from countermark_appliance.config import MAX_BYTES, Config, parse_config
from countermark_appliance.engine.verityformat import BLOCK, stated_blocks
from countermark_appliance.guest.disks import Disk, Disks
from countermark_appliance.guest.dm import open_verity
from countermark_appliance.guest.host import check_host
from countermark_appliance.platform.sysfs import Sysfs

RUN: Final = "run/countermark"
CONFIG_SERIAL: Final = "cm-config"
LOG_SERIAL: Final = "cm-log"
WEIGHTS: Final = "countermark-weights"
TREE: Final = "countermark-weights-verity"
MODULES: Final = "proc/sys/kernel/modules_disabled"
FSCK: Final = ("/usr/sbin/e2fsck", "-p")
_FSCK_CLEAN: Final = (0, 1)  # e2fsck(8): no errors; errors, all corrected
_PADDING: Final = 4096
_MAX_DISK: Final = MAX_BYTES + _PADDING

Check = Callable[[str], int]


def prepare(
    *, say: Callable[[str], None], sysfs: Sysfs | None = None, disks: Disks | None = None, check: Check | None = None
) -> Config:
    """The five steps above. `say` gets a line for each; `check` runs a file system check on a device's path.

    Raises what `check_host` and `parse_config` raise; `ConfigError`: `guest.disk_missing`, `guest.disk_twice`,
    `guest.config_disk`, `guest.config_path`, `guest.weights_size`, `guest.device_mapper`, `guest.log_disk`,
    `guest.modules`; `WeightsError` `weights.superblock`.
    """
    sysfs = sysfs or Sysfs()
    disks = disks or Disks(sysfs)
    check_host(sysfs)  # 1
    say("host: nothing but the image and its disks")
    config = _config(sysfs, disks.with_serial(CONFIG_SERIAL))  # 2
    say(f"config: sha256 {config.digest.hex()}")
    blocks = _weights(sysfs, disks, config.weights_root)  # 3
    say(f"weights: {blocks} blocks under {config.weights_root.hex()}")
    _log_disk(sysfs, disks.with_serial(LOG_SERIAL), check or _fsck)  # 4
    say("log disk: file system checked")
    _close_modules(sysfs)  # 5
    return config


def strip_padding(data: bytes) -> bytes:
    """The config's bytes: all before the zero padding, of which there is less than 4096 bytes.

    Raises `ConfigError` `guest.config_disk`: nothing in it, more padding, a zero byte inside.
    """
    text = data.rstrip(b"\0")
    if not text or b"\0" in text or len(data) != -(-len(text) // _PADDING) * _PADDING:
        message = f"config disk: expected a TOML file and zeros up to the next {_PADDING} bytes, got something else"
        raise ConfigError(message, code="guest.config_disk")
    return text


def _config(sysfs: Sysfs, disk: Disk) -> Config:
    try:
        data = sysfs.read(disk.node, max_bytes=_MAX_DISK)
    except OSError as err:
        message = f"config disk: expected at most {_MAX_DISK} bytes that can be read, got {err.strerror}"
        raise ConfigError(message, code="guest.config_disk") from err
    text = strip_padding(data)
    folder = sysfs.root / RUN
    config = parse_config(text, base=folder)
    for key, path, wanted in _paths(config):
        inside = path.parts[: len(folder.parts) + 1] == (*folder.parts, wanted) and ".." not in path.parts
        if not inside or (wanted == "weights" and path != folder / wanted):
            message = f"{key}: expected {wanted!r}, where an image has it, got {str(path)!r:.80}"
            raise ConfigError(message, code="guest.config_path")
    _write_once(folder / "node.toml", text)
    return config


def _paths(config: Config) -> list[tuple[str, Path, str]]:
    """Key, path, and the place it must lie in. A host may choose among its own files, never among the machine's.

    Not `platform.state`: only a test image has use for it, and its keys are public.
    """
    named = (
        ("weights.dir", config.weights_dir, "weights"),
        ("log.dir", config.log_dir, "log"),
        ("log.operator_dir", config.log_operator_dir, "log"),  # what lies there is handed to clients
        ("endorsements.dir", config.endorsements_dir, "log"),
        ("endorsements.gpu_dir", config.endorsements_gpu_dir, "log"),
        ("endorsements.ca_file", config.endorsements_ca_file, "log"),
    )
    return [(key, path, place) for key, path, place in named if path is not None]


def _weights(sysfs: Sysfs, disks: Disks, root: bytes) -> int:
    data, tree = disks.partition(WEIGHTS), disks.partition(TREE)
    try:
        with (sysfs.root / tree.node).open("rb") as file:
            first = file.read(BLOCK)
    except OSError as err:
        raise WeightsError(
            f"{TREE}: expected it to be readable, got {err.strerror}", code="weights.superblock"
        ) from err
    blocks = stated_blocks(first)
    node = open_verity(WEIGHTS, data, tree, blocks=blocks, root=root, base=sysfs.root)
    folder = sysfs.root / RUN / "weights"
    folder.mkdir(mode=0o700)
    (folder / "weights.img").symlink_to(f"/{node}")
    return blocks


def _log_disk(sysfs: Sysfs, disk: Disk, check: Check) -> None:
    code = check(f"/{disk.node}")
    if code not in _FSCK_CLEAN:
        message = f"log disk: expected an ext4 file system that is clean or can be repaired, got e2fsck's code {code}"
        raise ConfigError(message, code="guest.log_disk")
    for folder in ("devices", "log"):
        (sysfs.root / RUN / folder).mkdir(mode=0o700)
    (sysfs.root / RUN / "devices" / "log").symlink_to(f"/{disk.node}")


def _fsck(device: str) -> int:
    return subprocess.run([*FSCK, device], check=False, stdin=subprocess.DEVNULL, env={}).returncode


def _close_modules(sysfs: Sysfs) -> None:
    try:
        sysfs.write(MODULES, b"1")
        found = sysfs.read(MODULES, max_bytes=16).strip()
    except OSError as err:
        raise ConfigError(f"modules: expected to close the loader, got {err.strerror}", code="guest.modules") from err
    if found != b"1":
        raise ConfigError(f"modules: expected 1 in /{MODULES}, got {found!r}", code="guest.modules")


def _write_once(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
