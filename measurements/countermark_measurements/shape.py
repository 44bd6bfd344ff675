"""Launch shapes: how a machine is started, as far as it is measured or decides what is.

A shape is a TOML file (`image/shapes/NAME.toml`) and the ACPI tables captured for it beside it. `image/boot` makes
QEMU's arguments of the same file, so what is predicted is what is started. Keys, none optional but where said:

    name         what manifests call it
    platform     "vtpm" or "tdx"
    firmware     path under the tools root (for image/boot)
    cpus, memory_mib
    [qemu]       version, machine, cpu, accel, devices: `-device` strings in order
    [acpi]       tables: the captured file, its zeros at the end cut off; sha256 of the file as it is measured;
                 names: every table in it, in order; firmware_sha256: the firmware that ran; captured: how and when
    [firmware_image]  only for "vtpm": pei_written: list of {offset, bytes (hex), why}, see `tdvf_volumes`

Devices: only those whose effect on OVMF's boot options is known are taken (`_DEVICES`). Without `addr` QEMU gives a PCI
device the lowest free slot of the root bus; slots 0 and 31 are the chipset's. One virtio disk has `bootindex`.

Not checked here: that QEMU of this version makes these tables; the capture is the evidence.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from countermark.errors import FormatError
from countermark_measurements import acpi

MAX_FILE_BYTES: Final = 1 << 20
MAX_CPUS: Final = 4096
MAX_DEVICES: Final = 31
_DISK: Final = "virtio-blk-pci"
# Which of them sit on the root bus. A network card must bring no option ROM: it would run, and be measured.
_DEVICES: Final = {
    _DISK: True,
    "virtio-net-pci": True,
    "virtio-rng-pci": True,
    "vhost-vsock-pci": True,
    "pcie-root-port": True,
    "vfio-pci": False,  # behind a root port
    "tpm-crb": False,
}
_SLOTS: Final = 32
_CHIPSET: Final = frozenset((0, 31))
_SIZE: Final = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Bytes of the PEI volume that its own modules write before it is measured."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchShape:
    """One launch shape, its captured tables included."""

    name: str
    platform: str
    cpus: int
    memory_bytes: int
    max_below_4g: int
    qemu_version: str
    devices: tuple[str, ...]
    disks: tuple[int, ...]  # PCI device numbers of the virtio disks
    booted: int  # that of the disk with bootindex
    has_tpm: bool
    acpi: acpi.AcpiFiles
    firmware_sha256: bytes
    pei_written: tuple[Written, ...]
    files: tuple[tuple[str, bytes], ...]  # name and SHA-256 of the files it was read from


def read_shape(path: Path) -> LaunchShape:
    """Read a shape and its tables. Raises `FormatError`: `shape.*`, or `acpi.*` for the tables."""
    text = _read(path)
    try:
        value = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise FormatError(f"shape: expected TOML in {path.name}: {err}", code="shape.toml") from err
    keys = {"name": str, "platform": str, "firmware": str, "cpus": int, "memory_mib": int, "qemu": dict, "acpi": dict}
    platform = value.get("platform")
    if platform not in ("vtpm", "tdx"):
        raise FormatError("shape.platform: expected vtpm or tdx", code="shape.member")
    table = _members(value, "shape", keys | ({"firmware_image": dict} if platform == "vtpm" else {}))
    qemu = _members(table["qemu"], "qemu", {"version": str, "machine": str, "cpu": str, "accel": str, "devices": list})
    captured = _members(
        table["acpi"],
        "acpi",
        {"tables": str, "sha256": str, "names": list, "firmware_sha256": str, "captured": str},
    )
    _check_name(table["name"])
    if not 0 < table["cpus"] <= MAX_CPUS:
        raise FormatError(f"shape.cpus: expected 1 to {MAX_CPUS}", code="shape.member")
    stored = _read(path.parent / _file_name(captured["tables"]))
    tables = acpi.pad_tables(stored)
    names = [item.signature for item in acpi.parse_tables(tables)]
    if hashlib.sha256(tables).hexdigest() != captured["sha256"] or names != captured["names"]:
        message = f"shape.acpi: expected the tables that were captured and reviewed, got {' '.join(names)}"
        raise FormatError(message, code="shape.acpi")
    devices = tuple(_text(item) for item in qemu["devices"])
    disks, booted = _disks(devices)
    has_tpm = any(device.split(",")[0] == "tpm-crb" for device in devices)
    files = acpi.acpi_files(tables)
    if has_tpm != bool(files.tpm_log) or has_tpm != (platform == "vtpm"):
        raise FormatError("shape: expected a TPM for vtpm alone, in devices and tables", code="shape.device")
    return LaunchShape(
        name=table["name"],
        platform=platform,
        cpus=table["cpus"],
        memory_bytes=table["memory_mib"] << 20,
        max_below_4g=max_below_4g(qemu["machine"]),
        qemu_version=qemu["version"],
        devices=devices,
        disks=disks,
        booted=booted,
        has_tpm=has_tpm,
        acpi=files,
        firmware_sha256=_hex(captured["firmware_sha256"], 32),
        pei_written=_written(table["firmware_image"]) if platform == "vtpm" else (),
        files=((path.name, hashlib.sha256(text).digest()), (captured["tables"], hashlib.sha256(stored).digest())),
    )


def parse_size(text: str) -> int:
    """Bytes of a QEMU size such as 2048M. Raises `FormatError` `shape.memory`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match[1]) > 15:
        raise FormatError(f"memory: expected a number with K, M, G or T, got {text[:32]!r}", code="shape.memory")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()]


def max_below_4g(machine: str) -> int:
    """The limit of memory below 4 GiB that a `-machine` string sets; 4 GiB without one.

    Raises `FormatError` `shape.machine` for another machine than q35, whose memory lies otherwise.
    """
    kind, *options = machine.split(",")
    kind = kind.removeprefix("type=")
    if kind != "q35" and not kind.startswith("pc-q35-"):
        raise FormatError(f"machine: expected q35, got {kind[:32]!r}", code="shape.machine")
    found = [option.partition("=")[2] for option in options if option.startswith("max-ram-below-4g=")]
    limit = parse_size(found[-1]) if found else 1 << 32
    if not 1 << 20 <= limit <= 1 << 32:
        raise FormatError("machine: expected max-ram-below-4g from 1M to 4G", code="shape.machine")
    return limit


def _disks(devices: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """The slots of the virtio disks, and that of the one with bootindex."""
    if len(devices) > MAX_DEVICES:
        raise FormatError(f"shape.devices: expected at most {MAX_DEVICES}", code="shape.device")
    taken = set(_CHIPSET)
    disks: list[int] = []
    booted: list[int] = []
    for device in devices:
        driver, *rest = device.split(",")
        options = dict(option.partition("=")[::2] for option in rest)
        if driver not in _DEVICES:
            message = f"shape.devices: expected one of {', '.join(sorted(_DEVICES))}, got {driver[:32]!r}"
            raise FormatError(message, code="shape.device")
        on_root = _DEVICES[driver]
        if (
            "multifunction" in options
            or (on_root and "bus" in options)
            or (driver == "vfio-pci" and "bus" not in options)
        ):
            raise FormatError(f"shape.devices: expected {driver} on a bus we know", code="shape.device")
        no_rom = options.get("romfile") == "" or options.get("rombar") == "0"
        if driver in ("virtio-net-pci", "vfio-pci") and not no_rom:
            raise FormatError(f"shape.devices: expected no option ROM of {driver}", code="shape.device")
        if not on_root:
            continue
        slot = _slot(options["addr"]) if "addr" in options else min(set(range(_SLOTS)) - taken)
        if slot in taken:
            raise FormatError(f"shape.devices: expected slot {slot:#x} to be free", code="shape.device")
        taken.add(slot)
        if driver == _DISK:
            disks.append(slot)
        if "bootindex" in options:
            booted.append(slot)
    if len(booted) != 1 or booted[0] not in disks:
        raise FormatError("shape.devices: expected bootindex for one virtio disk alone", code="shape.device")
    return tuple(disks), booted[0]


def _slot(text: str) -> int:
    if re.fullmatch(r"0x[0-9a-f]{1,2}|[0-9a-f]{1,2}", text) is None or int(text, 16) >= _SLOTS:
        raise FormatError(f"shape.devices: expected a PCI slot, got {text[:16]!r}", code="shape.device")
    return int(text, 16)


def _written(value: Mapping[str, Any]) -> tuple[Written, ...]:
    table = _members(value, "firmware_image", {"pei_written": list})
    found = []
    for item in table["pei_written"]:
        entry = _members(item, "pei_written", {"offset": int, "bytes": str, "why": str})
        found.append(Written(offset=entry["offset"], data=_hex(entry["bytes"], len(entry["bytes"]) // 2)))
    return tuple(found)


def _members(value: object, name: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise FormatError(f"{name}: expected exactly {', '.join(sorted(kinds))}", code="shape.member")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:
            raise FormatError(f"{name}.{key}: expected {kind.__name__}", code="shape.member")
    return value


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name) is None:
        raise FormatError("shape.name: expected 1 to 64 of a-z, 0-9, '.' and '-'", code="shape.member")


def _file_name(name: str) -> str:
    if "/" in name or name in ("", ".", ".."):
        raise FormatError("acpi.tables: expected a file beside the shape", code="shape.member")
    return name


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FormatError("shape: expected text", code="shape.member")
    return value


def _hex(value: str, size: int) -> bytes:
    try:
        data = bytes.fromhex(value)
    except ValueError:
        data = b""
    if len(data) != size or data.hex() != value or not size:
        raise FormatError(f"shape: expected {2 * size} lower-case hex digits", code="shape.member")
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise FormatError(f"shape: cannot read {path.name}: {err.strerror}", code="shape.file") from err
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"shape: expected at most {MAX_FILE_BYTES} bytes in {path.name}", code="shape.file")
    return data
