"""The ACPI tables a VMM gives its firmware: their list, and QEMU's loader commands and root pointer made from them.

QEMU hands over three files through fw_cfg: `etc/acpi/tables` (all tables, one after the other, padded with zeros to a
multiple of 128 KiB), `etc/acpi/rsdp` and `etc/table-loader` (commands that say where the firmware puts the files, which
pointers it relocates and which checksums it computes). OVMF measures each as it was handed over (edk2 stable tag
202502, `OvmfPkg/AcpiPlatformDxe/QemuFwCfgAcpi.c`): the commands first, then each file in the order of its ALLOCATE
command; with a TPM also `etc/tpm/log`, 64 KiB of zeros.

The tables depend on QEMU's version, on the launch shape, and on where the firmware put the PCI windows, so they are
captured. The other two follow from them, as `hw/i386/acpi-build.c` and `hw/acpi/bios-linker-loader.c` of QEMU 8.2 to
10.0 write them: one ALLOCATE for each file, the last one allocated first (rsdp, log, tables); then, table by table in
file order, its pointers and its checksum; the RSDT with a pointer for each table it lists; last the RSDP. A command has
128 bytes, and the commands are padded with zeros to a multiple of 4 KiB.

DSDT holds AML, code of the host's that runs in the guest's kernel: `image/shapes/README.md` says what was reviewed.
A table whose name is not in `KNOWN` is refused, so that nothing of the kind comes in unseen.

Not checked here: what the tables say.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError

TABLES_FILE: Final = b"etc/acpi/tables"
RSDP_FILE: Final = b"etc/acpi/rsdp"
TPM_LOG_FILE: Final = b"etc/tpm/log"
TPM_LOG_BYTES: Final = 64 * 1024
TABLES_ALIGNMENT: Final = 128 * 1024
MAX_TABLES_BYTES: Final = 2 * 1024 * 1024
MAX_TABLES: Final = 64
KNOWN: Final = {
    "FACS": "firmware control structure",
    "DSDT": "differentiated system description (AML)",
    "FACP": "fixed description (FADT)",
    "APIC": "interrupt controllers (MADT)",
    "HPET": "event timer",
    "TPM2": "trusted platform module",
    "SRAT": "memory affinity",
    "SLIT": "memory distances",
    "HMAT": "memory attributes",
    "MCFG": "PCI Express configuration space",
    "DMAR": "DMA remapping (Intel)",
    "IVRS": "DMA remapping (AMD)",
    "VIOT": "virtual I/O translation",
    "WAET": "Windows emulated devices",
    "RSDT": "root description",
}
_HEADER_BYTES: Final = 36
_COMMAND_BYTES: Final = 128
_LOADER_ALIGNMENT: Final = 4096
_ZONE_HIGH: Final = 1
_ZONE_FSEG: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table: where it lies in the file, and its OEM id."""

    signature: str
    offset: int
    length: int
    oem_id: bytes  # 6


@dataclass(frozen=True, slots=True, kw_only=True)
class AcpiFiles:
    """What the firmware measures, in this order; `tpm_log` between rsdp and tables, empty without a TPM."""

    loader: bytes
    rsdp: bytes
    tpm_log: bytes
    tables: bytes


def parse_tables(data: bytes) -> tuple[Table, ...]:
    """The tables of `etc/acpi/tables`, every byte accounted for. Raises `FormatError` with a code below `acpi.`."""
    if not data or len(data) > MAX_TABLES_BYTES or len(data) % TABLES_ALIGNMENT:
        message = f"acpi.tables: expected a multiple of {TABLES_ALIGNMENT} bytes, got {len(data)}"
        raise FormatError(message, code="acpi.length")
    tables: list[Table] = []
    at = 0
    while data[at : at + 4].strip(b"\0"):
        signature = data[at : at + 4].decode("latin-1")
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if signature not in KNOWN or signature in (table.signature for table in tables):
            message = f"acpi.tables: expected known tables, each once, got {signature!r}"
            raise FormatError(message, code="acpi.unknown_table")
        if length < _HEADER_BYTES or at + length > len(data):
            raise FormatError(f"acpi.{signature}: expected it inside the file, got {length}", code="acpi.length")
        tables.append(Table(signature=signature, offset=at, length=length, oem_id=data[at + 10 : at + 16]))
        at += length
    if data[at:].strip(b"\0"):
        raise FormatError(f"acpi.tables: expected zeros from {at}", code="acpi.trailing")
    names = [table.signature for table in tables]
    # The order of `acpi_build`: another one would give other commands than those made here.
    if names[:4] != ["FACS", "DSDT", "FACP", "APIC"] or names[-1] != "RSDT":
        message = f"acpi.tables: expected FACS, DSDT, FACP, APIC first and RSDT last, got {' '.join(names)}"
        raise FormatError(message, code="acpi.order")
    if (tables[-1].length - _HEADER_BYTES) // 4 != len(tables) - 3 or (tables[-1].length - _HEADER_BYTES) % 4:
        raise FormatError("acpi.RSDT: expected one entry for each table but FACS, DSDT, RSDT", code="acpi.rsdt")
    for table in tables[1:]:
        if data[table.offset + 9]:
            message = f"acpi.{table.signature}: expected its checksum left to the loader"
            raise FormatError(message, code="acpi.checksum")
    return tuple(tables)


def pad_tables(data: bytes) -> bytes:
    """The file from its tables: zeros up to the size that QEMU gives it."""
    return data + bytes(-len(data) % TABLES_ALIGNMENT)


def acpi_files(data: bytes) -> AcpiFiles:
    """All that the firmware measures, from `etc/acpi/tables`. Raises `FormatError` with a code below `acpi.`."""
    tables = parse_tables(data)
    has_tpm = any(table.signature == "TPM2" for table in tables)
    rsdt = tables[-1]
    # The OEM id is the machine's, which every table but a licence's bears; taken from one that always has it.
    rsdp = b"RSD PTR \0" + tables[3].oem_id + b"\0" + rsdt.offset.to_bytes(4, "little")
    log = bytes(TPM_LOG_BYTES) if has_tpm else b""
    return AcpiFiles(loader=_loader(tables, has_tpm=has_tpm), rsdp=rsdp, tpm_log=log, tables=data)


def _loader(tables: tuple[Table, ...], *, has_tpm: bool) -> bytes:
    commands = [_allocate(RSDP_FILE, 16, _ZONE_FSEG)]
    if has_tpm:
        commands.append(_allocate(TPM_LOG_FILE, 1, _ZONE_HIGH))
    commands.append(_allocate(TABLES_FILE, 64, _ZONE_HIGH))
    for table in tables:
        if table.signature == "FACS":  # no checksum
            continue
        for offset, size in _pointers(table):
            commands.append(_pointer(TABLES_FILE, TABLES_FILE, table.offset + offset, size))
        if table.signature == "TPM2":
            commands.append(_pointer(TABLES_FILE, TPM_LOG_FILE, table.offset + table.length - 8, 8))
        commands.append(_checksum(TABLES_FILE, table.offset + 9, table.offset, table.length))
    commands.append(_pointer(RSDP_FILE, TABLES_FILE, 16, 4))
    commands.append(_checksum(RSDP_FILE, 8, 0, 20))
    data = b"".join(commands)
    return data + bytes(-len(data) % _LOADER_ALIGNMENT)


def _pointers(table: Table) -> tuple[tuple[int, int], ...]:
    """Offset and size of the pointers to other tables."""
    if table.signature == "FACP":  # FIRMWARE_CTRL, DSDT, and X_DSDT where the table is of ACPI 2 or later
        return ((36, 4), (40, 4), (140, 8))[: 3 if table.length >= 148 else 2]
    if table.signature == "RSDT":
        return tuple((offset, 4) for offset in range(_HEADER_BYTES, table.length, 4))
    return ()


def _allocate(name: bytes, alignment: int, zone: int) -> bytes:
    return struct.pack("<I56sIB", 1, name, alignment, zone).ljust(_COMMAND_BYTES, b"\0")


def _pointer(holder: bytes, target: bytes, offset: int, size: int) -> bytes:
    return struct.pack("<I56s56sIB", 2, holder, target, offset, size).ljust(_COMMAND_BYTES, b"\0")


def _checksum(name: bytes, result: int, start: int, length: int) -> bytes:
    return struct.pack("<I56sIII", 3, name, result, start, length).ljust(_COMMAND_BYTES, b"\0")
