"""UEFI variables as a measurement sees them, and the boot options that OVMF makes.

- UEFI_VARIABLE_DATA (TCG PC Client Platform Firmware Profile 1.05, section 10.2.6): GUID, name length in characters and
  data length as u64, the name in UTF-16LE without NUL, the data. Secure Boot variables are measured as this structure,
  also when the variable does not exist (no data). Of boot variables the data alone is measured (edk2 stable tag 202502,
  `Tcg2Dxe.c` and `TdTcg2Dxe.c`, MeasureVariable).
- EFI_LOAD_OPTION (UEFI 2.10, section 3.1.3): attributes, length of the device path, description in UTF-16LE with NUL,
  device path, optional data.

OVMF's boot options in a machine whose variables are new (`BdsPlatform.c` PlatformBootManagerAfterConsole, `BmBoot.c`,
`BmBootDescription.c`, `QemuBootOrderLib.c`): first UiApp, Boot0000. Then one for each disk, in order of PCI address,
with optional data that marks it as made by the boot manager; a virtio disk has no bus that the boot manager knows, so
it is a "UEFI Misc Device", and the second and later ones "UEFI Misc Device 2" and so on. Then the shell. QEMU's list of
boot devices (`bootindex`) comes first in BootOrder; other disks are taken out of it, what is not a device of QEMU's
stays. Seen so with QEMU 10.0.13 and OVMF 2025.02-8+deb13u1 with one, three and four disks, the booted one first or not.

Not covered, and refused where a shape asks for it: other boot devices than virtio disks on the root bus.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

GLOBAL_VARIABLE: Final = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY_DATABASE: Final = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
# Measured in this order (PFP 1.05, section 3.3.4.8). Debian's OVMF.fd has no keys, so each one has no data.
SECURE_BOOT: Final = (
    (GLOBAL_VARIABLE, "SecureBoot"),
    (GLOBAL_VARIABLE, "PK"),
    (GLOBAL_VARIABLE, "KEK"),
    (IMAGE_SECURITY_DATABASE, "db"),
    (IMAGE_SECURITY_DATABASE, "dbx"),
)
_FIRMWARE_VOLUME: Final = UUID("7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1")  # gFvMainCompact... of OVMF.dsc: the DXE volume
_UI_APP: Final = UUID("462caa21-7614-4503-836e-8ab6f4662331")
_SHELL: Final = UUID("7c04a583-9e3e-4f1c-ad65-e05268d0b4d1")
_MADE_BY_BOOT_MANAGER: Final = UUID("8108ac4e-9f11-4d59-850e-e21a522c59b2")  # mBmAutoCreateBootOptionGuid
_ACTIVE: Final = 1
_HIDDEN_APPLICATION: Final = 0x109  # active, hidden, category application
_END: Final = b"\x7f\xff\x04\x00"
_PCI_ROOT: Final = struct.pack("<BBHII", 2, 1, 12, 0x0A0341D0, 0)  # ACPI device path, PNP0A03, UID 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A variable by its name, and the data that is measured."""

    name: str
    data: bytes


def variable_data(vendor: UUID, name: str, data: bytes = b"") -> bytes:
    """UEFI_VARIABLE_DATA."""
    return vendor.bytes_le + struct.pack("<QQ", len(name), len(data)) + name.encode("utf-16-le") + data


def load_option(attributes: int, description: str, path: bytes, optional: bytes = b"") -> bytes:
    """EFI_LOAD_OPTION. `path`: the device path with its end node."""
    return struct.pack("<IH", attributes, len(path)) + description.encode("utf-16-le") + b"\0\0" + path + optional


def pci_path(device: int, function: int = 0) -> bytes:
    """The device path of a device on the root bus, with its end node."""
    return _PCI_ROOT + struct.pack("<BBHBB", 1, 1, 6, function, device) + _END


def firmware_file_path(file: UUID) -> bytes:
    """The device path of a file in the firmware's own volume."""
    nodes = struct.pack("<BBH", 4, 7, 20) + _FIRMWARE_VOLUME.bytes_le + struct.pack("<BBH", 4, 6, 20) + file.bytes_le
    return nodes + _END


def boot_variables(disks: Sequence[int], booted: int) -> tuple[Variable, ...]:
    """BootOrder and the Boot#### it names, in the order of measurement, of a machine with new variables.

    `disks`: the PCI device number of every virtio disk on the root bus, in any order; `booted`: which of them has
    QEMU's bootindex.
    """
    ordered = sorted(disks)
    place = ordered.index(booted)
    number, shell = place + 1, len(ordered) + 1
    description = "UEFI Misc Device" if place == 0 else f"UEFI Misc Device {place + 1}"
    options = {
        number: load_option(_ACTIVE, description, pci_path(booted), _MADE_BY_BOOT_MANAGER.bytes_le),
        0: load_option(_HIDDEN_APPLICATION, "UiApp", firmware_file_path(_UI_APP)),
        shell: load_option(_ACTIVE, "EFI Internal Shell", firmware_file_path(_SHELL)),
    }
    return _measured(options)


def boot_variables_without_disk() -> tuple[Variable, ...]:
    """The same where the VMM loads the kernel itself and nothing else was enumerated before: UiApp alone."""
    return _measured({0: load_option(_HIDDEN_APPLICATION, "UiApp", firmware_file_path(_UI_APP))})


def _measured(options: dict[int, bytes]) -> tuple[Variable, ...]:
    order = Variable(name="BootOrder", data=struct.pack(f"<{len(options)}H", *options))
    return (order, *(Variable(name=f"Boot{number:04X}", data=data) for number, data in options.items()))
