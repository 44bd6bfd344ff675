"""Launches described in the JSON of fortanix/tdx-measure, as its users and its test vectors have them.

Format: README of that project (Apache-2.0), "Metadata Field Descriptions". Of `boot_config`, RTMR0 depends on

- `memory` (a number of bytes, also in hex, or with K, M, G, T) and the machine's limit below 4 GiB;
- `acpi_tables`, a capture of `etc/acpi/tables`, which holds all that CPUs, devices and QEMU's version change;
- `rsdp` and `table_loader`, captures too, made from the tables where they are not given;
- in indirect boot (from a disk) `boot_order` and the files Boot####.bin in `path_boot_xxxx`, captured variables; in
  direct boot (`-kernel`) the firmware has made one boot option by then, UiApp.

`cpus` and `qemu` describe the launch that the tables were captured from and say nothing more, but for the machine's
name and its `max-ram-below-4g`. `bios` is the firmware: its TDX metadata and its configuration volume.

Not checked here: that the tables are those of the described launch. `direct` and `indirect` images are not measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from countermark.errors import FormatError
from countermark_measurements import acpi, efivar
from countermark_measurements.acpi import AcpiFiles
from countermark_measurements.efivar import Variable
from countermark_measurements.pcr import Measured
from countermark_measurements.rtmr import rtmr0_events
from countermark_measurements.shape import max_below_4g, parse_size
from countermark_measurements.tdhob import memory_ranges
from countermark_measurements.tdvf import Tdvf

MAX_FILE_BYTES: Final = 4 << 20
MAX_OPTIONS: Final = 256
_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,15}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """One launch: what RTMR0 depends on beside the firmware. `firmware`: where the file says that it is."""

    ranges: tuple[tuple[int, int], ...]
    acpi: AcpiFiles
    boot: tuple[Variable, ...]
    firmware: Path

    def events(self, tdvf: Tdvf) -> tuple[Measured, ...]:
        """RTMR0's events with this firmware. Raises `FormatError` `shape.memory`."""
        return rtmr0_events(tdvf, ranges=self.ranges, acpi=self.acpi, boot=self.boot)


def read_metadata(path: Path) -> Metadata:
    """Read a metadata.json and the files it names. Raises `FormatError`: `metadata.*`, `shape.*`, `acpi.*`."""
    try:
        value = json.loads(_read(path))
    except ValueError as err:
        raise FormatError(f"metadata: expected JSON in {path.name}", code="metadata.json") from err
    config = _object(value, "boot_config")
    if ("direct" in value) == ("indirect" in value):
        raise FormatError("metadata: expected either direct or indirect boot", code="metadata.member")
    qemu = _object(config, "qemu") if config.get("qemu") is not None else {"machine": "q35"}
    folder = path.parent
    files = acpi.acpi_files(_file(folder, config, "acpi_tables"))
    rsdp = _file(folder, config, "rsdp") if config.get("rsdp") else files.rsdp
    loader = _file(folder, config, "table_loader") if config.get("table_loader") else files.loader
    boot = efivar.boot_variables_without_disk() if "direct" in value else _captured_variables(folder, config)
    return Metadata(
        ranges=memory_ranges(_memory(_text(config, "memory")), max_below_4g=max_below_4g(_text(qemu, "machine"))),
        acpi=AcpiFiles(loader=loader, rsdp=rsdp, tpm_log=files.tpm_log, tables=files.tables),
        boot=boot,
        firmware=folder / _text(config, "bios"),
    )


def _captured_variables(folder: Path, config: dict[str, Any]) -> tuple[Variable, ...]:
    """BootOrder, and each option it names whose file is there: firmware measures no option that does not exist."""
    order = _file(folder, config, "boot_order")
    if len(order) % 2 or len(order) > 2 * MAX_OPTIONS:
        raise FormatError(f"metadata.boot_order: expected at most {MAX_OPTIONS} numbers", code="metadata.member")
    options = folder / _text(config, "path_boot_xxxx")
    found = [Variable(name="BootOrder", data=order)]
    for at in range(0, len(order), 2):
        name = f"Boot{int.from_bytes(order[at : at + 2], 'little'):04X}"
        if (options / f"{name}.bin").is_file():
            found.append(Variable(name=name, data=_read(options / f"{name}.bin")))
    return tuple(found)


def _memory(text: str) -> int:
    return int(text, 16) if _NUMBER.fullmatch(text.strip()) else parse_size(text)


def _object(value: object, name: str) -> dict[str, Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise FormatError(f"metadata.{name}: expected an object", code="metadata.member")
    return found


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise FormatError(f"metadata.{name}: expected text", code="metadata.member")
    return found


def _file(folder: Path, config: dict[str, Any], name: str) -> bytes:
    return _read(folder / _text(config, name))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise FormatError(f"metadata: cannot read {path.name}: {err.strerror}", code="metadata.file") from err
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"metadata: expected at most {MAX_FILE_BYTES} bytes in {path.name}", code="metadata.file")
    return data
