"""The events of a boot under a TPM: what OVMF, systemd-stub and Linux measure, in the order of the log.

Of one image, in one launch shape, with one firmware. Every event is made from artefacts; of the launch, the ACPI tables
are captured (`acpi`) and the bytes that the PEI modules write to their own volume (`tdvf_volumes`).

Sources: edk2 stable tag 202502 (`Tcg2Pei.c`, `Tcg2Dxe.c`, `DxeTpm2MeasureBootLib.c`), systemd 257.13 (`stub.c`),
Linux's EFI stub (`efi-stub-helper.c`, since 5.17; PCR 9). Compared event by event with real logs of QEMU 10.0.13, swtpm
0.7.1, OVMF 2025.02-8+deb13u1, Debian's kernel 7.3.4: tests/measurements/predict.

Not predicted, because our images have none: anything in PCR 8, 10, 12 to 15 (10 is Linux's own, see `formats.tpm_log`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from countermark.formats import eventlog
from countermark.formats.tpm_log import register_of
from countermark_measurements import efivar, tdvf_volumes
from countermark_measurements.acpi import AcpiFiles
from countermark_measurements.efivar import Variable
from countermark_measurements.gpt import Gpt
from countermark_measurements.shape import LaunchShape
from countermark_measurements.tdvf_volumes import Volumes
from countermark_measurements.uki import Uki

EV_PLATFORM_CONFIG_FLAGS: Final = 0x0000000A
EV_EFI_PLATFORM_FIRMWARE_BLOB: Final = 0x80000008
CALLING: Final = b"Calling EFI Application from Boot Option"
EXIT: Final = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
SEPARATOR: Final = bytes(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One predicted event. `source`: image, firmware or launch. `note`: what was hashed, for people."""

    pcr: int
    event_type: int
    digest: bytes  # 48
    source: str
    note: str

    @property
    def register(self) -> int:
        """0 for what stands for MRTD, 1 to 3 for RTMR0 to RTMR2."""
        return register_of(self.pcr)


def measured(pcr: int, event_type: int, data: bytes, source: str, note: str) -> Measured:
    """The event of hashing `data`."""
    return Measured(pcr=pcr, event_type=event_type, digest=hashlib.sha384(data).digest(), source=source, note=note)


def separator(pcr: int, note: str = "separator") -> Measured:
    """The line between what firmware does and what it starts."""
    return measured(pcr, eventlog.EV_SEPARATOR, SEPARATOR, "firmware", note)


def firmware_events(volumes: Volumes, shape: LaunchShape) -> tuple[Measured, ...]:
    """PCR 0 before the separator. Raises `FormatError` `volumes.written`."""
    changes = tuple((item.offset, item.data) for item in shape.pei_written)
    pei = tdvf_volumes.written(volumes.pei, changes)
    blob = EV_EFI_PLATFORM_FIRMWARE_BLOB
    return (
        measured(0, eventlog.EV_S_CRTM_VERSION, volumes.version, "firmware", "firmware version"),
        measured(0, blob, pei, "firmware", "PEI firmware volume in memory"),
        measured(0, blob, volumes.dxe, "firmware", "DXE firmware volume in memory"),
    )


def secure_boot_events() -> tuple[Measured, ...]:
    """PCR 7: the Secure Boot variables, none of which has a value, and the separator."""
    kind = eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG
    variables = (
        measured(7, kind, efivar.variable_data(vendor, name), "firmware", f"variable {name}, not set")
        for vendor, name in efivar.SECURE_BOOT
    )
    return (*variables, separator(7, "separator after the Secure Boot variables"))


def acpi_events(acpi: AcpiFiles, qemu: str = "") -> tuple[Measured, ...]:
    """PCR 1: the ACPI files, as QEMU hands them over. `qemu`: the version they were captured with."""
    files = (
        (acpi.loader, "ACPI loader commands (made from the captured tables)"),
        (acpi.rsdp, "ACPI root pointer (made from the captured tables)"),
        (acpi.tpm_log, "ACPI: the TPM's empty log area"),
        (acpi.tables, f"ACPI tables (captured{', QEMU ' + qemu if qemu else ''})"),
    )
    return tuple(measured(1, EV_PLATFORM_CONFIG_FLAGS, data, "launch", note) for data, note in files if data)


def boot_variable_events(variables: tuple[Variable, ...]) -> tuple[Measured, ...]:
    """PCR 1: BootOrder and what it names."""
    kind = eventlog.EV_EFI_VARIABLE_BOOT
    return tuple(measured(1, kind, item.data, "launch", f"variable {item.name}") for item in variables)


def loading_events(gpt: Gpt, uki: Uki) -> tuple[Measured, ...]:
    """PCR 5, 4, 11, 4, 9: from the disk's partition table to the kernel's initrd."""
    application = eventlog.EV_EFI_BOOT_SERVICES_APPLICATION
    events = [
        measured(5, eventlog.EV_EFI_GPT_EVENT, gpt.event, "image", "partition table of the root disk"),
        Measured(pcr=4, event_type=application, digest=uki.authenticode, source="image", note="unified kernel image"),
    ]
    for name, content in uki.sections:
        events += (
            measured(11, eventlog.EV_IPL, name.encode() + b"\0", "image", f"name of section {name}"),
            measured(11, eventlog.EV_IPL, content, "image", f"section {name}"),
        )
    events += (
        Measured(pcr=4, event_type=application, digest=uki.kernel_authenticode, source="image", note="kernel"),
        measured(9, eventlog.EV_EVENT_TAG, uki.load_options, "image", "kernel command line"),
        measured(9, eventlog.EV_EVENT_TAG, uki.initrd, "image", "initrd with the archive that systemd-stub appends"),
    )
    return tuple(events)


def exit_events() -> tuple[Measured, ...]:
    """PCR 5: the end of boot services."""
    return tuple(action(5, text) for text in EXIT)


def action(pcr: int, text: bytes) -> Measured:
    """An EFI action."""
    return measured(pcr, eventlog.EV_EFI_ACTION, text, "firmware", text.decode())


def tpm_events(volumes: Volumes, shape: LaunchShape, gpt: Gpt, uki: Uki) -> tuple[Measured, ...]:
    """Every event of a boot, in the order of the log. Raises `FormatError` `volumes.written`."""
    return (
        *firmware_events(volumes, shape),
        *secure_boot_events(),
        *acpi_events(shape.acpi, shape.qemu_version),
        *boot_variable_events(efivar.boot_variables(shape.disks, shape.booted)),
        action(4, CALLING),
        *(separator(pcr) for pcr in range(7)),
        *loading_events(gpt, uki),
        *exit_events(),
    )
