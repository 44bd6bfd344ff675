"""What a host could tell this machine beside its measured image, refused before any key exists.

The verifier refuses most of this already, because it is in a register: the command line and what the stub takes from
the boot partition (RTMR2), ACPI tables and variables (RTMR0). But a register is compared only where somebody attests,
and some of these ways were found to be measured by one firmware and not by another. So the machine refuses them itself:

 1 kernel command line: words other than those of the image, in their order, and one `roothash=`
 2 boot configuration: parameters from the end of the initrd
 3 credentials of systemd's, from firmware, the stub or SMBIOS
 4 SMBIOS OEM strings, which systemd and its stub act on
 5 the EFI variable that systemd takes for more command line
 6 ACPI tables by other names than the captured launch shapes have, and tables loaded after boot. A table's AML is code
   in the kernel and has run by now, so this is a second line: the first is RTMR0 against the captured tables
 7 the kernel's own locks: lockdown, signed modules only, no kexec
 8 the root file system: erofs, read-only, on a device that dm-verity has opened with the root of the command line

Not checked here: what registers hold.
"""

from __future__ import annotations

import re
from typing import Final

from countermark.errors import FormatError, MeasurementError
from countermark_appliance.engine.verityformat import DEVICE_UUID
from countermark_appliance.guest import smbios
from countermark_appliance.platform.image import CMDLINE, PARAMETER, read_image_id
from countermark_appliance.platform.sysfs import Sysfs

WORDS: Final = "usr/lib/countermark/cmdline"
BOOT_CONFIG: Final = "proc/bootconfig"
# systemd hides /run/credentials from a service without credentials of its own, so the unit binds it here.
CREDENTIALS: Final = tuple(f"run/host-credentials/@{name}" for name in ("system", "encrypted", "initrd"))
OEM_STRINGS: Final = "sys/firmware/dmi/tables/DMI"
EFI_VARIABLES: Final = "sys/firmware/efi/efivars"
EFI_OPTIONS: Final = "SystemdOptions-8cf2644b-4b0b-428f-9387-6d876050dc67"
ACPI: Final = "sys/firmware/acpi/tables"
ACPI_TABLES: Final = ("APIC", "CCEL", "DSDT", "FACP", "FACS", "HPET", "MCFG", "TPM2", "WAET")
LOCKDOWN: Final = "sys/kernel/security/lockdown"
SIGNED_MODULES: Final = "sys/module/module/parameters/sig_enforce"
NO_KEXEC: Final = "proc/sys/kernel/kexec_load_disabled"
MOUNTS: Final = "proc/self/mountinfo"
_MAX_BYTES: Final = 1024 * 1024
_DEVICE: Final = re.compile(r"[0-9]{1,4}:[0-9]{1,7}")


def check_host(sysfs: Sysfs) -> None:
    """The eight checks above, in order.

    Raises `MeasurementError`: `guest.command_line`, `guest.boot_config`, `guest.credentials`, `guest.smbios`,
    `guest.efi_options`, `guest.acpi`, `guest.kernel_locks`, `guest.root`; and `ConfigError` `platform.image_id`.
    """
    _command_line(sysfs)
    _boot_config(sysfs)
    _credentials(sysfs)
    _oem_strings(sysfs)
    if EFI_OPTIONS in _names(sysfs, EFI_VARIABLES):
        raise _refuse("EFI variables", "none that systemd takes options from, got SystemdOptions", "guest.efi_options")
    _acpi(sysfs)
    _kernel_locks(sysfs)
    _root(sysfs)


def _command_line(sysfs: Sysfs) -> None:
    read_image_id(sysfs)
    baked = _text(sysfs, WORDS).split()
    given = [word for word in _text(sysfs, CMDLINE).split() if not word.startswith(f"{PARAMETER}=")]
    if given != baked:
        other = next((word for word in given if word not in baked), "the same words in another order or number")
        raise _refuse("kernel command line", f"the image's words alone, got {other!r:.80}", "guest.command_line")


def _boot_config(sysfs: Sysfs) -> None:
    try:
        text = _text(sysfs, BOOT_CONFIG)
    except FileNotFoundError:
        return  # a kernel without it
    found = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if found:
        raise _refuse("boot configuration", f"none, got {found[0]!r:.80}", "guest.boot_config")


def _credentials(sysfs: Sysfs) -> None:
    for folder in CREDENTIALS:
        if found := _names(sysfs, folder):
            raise _refuse("credentials", f"none, got {found[0]!r:.80} in /{folder}", "guest.credentials")


def _oem_strings(sysfs: Sysfs) -> None:
    try:
        found = smbios.oem_strings(sysfs.read(OEM_STRINGS, max_bytes=smbios.MAX_BYTES))
    except FileNotFoundError:
        return  # firmware without SMBIOS
    except FormatError as err:
        raise _refuse("SMBIOS", f"a table that can be read: {err}", "guest.smbios") from err
    if found:
        raise _refuse("SMBIOS", f"no OEM strings (type 11), got {found[0]!r:.80}", "guest.smbios")


def _acpi(sysfs: Sysfs) -> None:
    names = [name for name in _names(sysfs, ACPI) if name not in ("data", "dynamic")]
    late = _names(sysfs, f"{ACPI}/dynamic")
    if late:
        raise _refuse("ACPI", f"no table loaded after boot, got {late[0]!r:.20}", "guest.acpi")
    if other := [name for name in names if name not in ACPI_TABLES]:
        expected = f"tables of the captured launch shapes alone ({', '.join(ACPI_TABLES)})"
        raise _refuse("ACPI", f"{expected}, got {other[0]!r:.20}", "guest.acpi")
    for name in names:
        if (found := sysfs.read(f"{ACPI}/{name}", max_bytes=_MAX_BYTES)[:4]) != name.encode():
            raise _refuse("ACPI", f"the signature {name} in table {name}, got {found!r}", "guest.acpi")


def _kernel_locks(sysfs: Sysfs) -> None:
    locks = ((LOCKDOWN, "[confidentiality]"), (SIGNED_MODULES, "Y"), (NO_KEXEC, "1"))
    for path, wanted in locks:
        try:
            found = _text(sysfs, path).split()
        except OSError as err:
            raise _refuse("kernel", f"{wanted} in /{path}, got {err.strerror}", "guest.kernel_locks") from err
        if wanted not in found:
            raise _refuse("kernel", f"{wanted} in /{path}, got {' '.join(found)!r:.60}", "guest.kernel_locks")


def _root(sysfs: Sysfs) -> None:
    """proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, `-`, type, ..."""
    roots = [line.split() for line in _text(sysfs, MOUNTS).splitlines() if line.split()[4:5] == ["/"]]
    if not roots or "-" not in roots[-1]:
        raise _refuse("root file system", f"a line in /{MOUNTS}, got none", "guest.root")
    fields = roots[-1]
    kind, device, options = fields[fields.index("-") + 1], fields[2], fields[5].split(",")
    if kind != "erofs" or "ro" not in options or not _DEVICE.fullmatch(device):
        raise _refuse("root file system", f"erofs, read-only, got {kind} with {','.join(options)}", "guest.root")
    wanted = DEVICE_UUID + read_image_id(sysfs).hex()
    try:
        found = _text(sysfs, f"sys/dev/block/{device}/dm/uuid").strip()
    except OSError as err:
        raise _refuse(
            "root file system", f"a device of dm-verity's, got {device}: {err.strerror}", "guest.root"
        ) from err
    if found != wanted:
        raise _refuse("root file system", f"a device opened as {wanted}, got {found!r:.90}", "guest.root")


def _text(sysfs: Sysfs, path: str) -> str:
    return sysfs.read(path, max_bytes=_MAX_BYTES).decode("utf-8", "replace")


def _names(sysfs: Sysfs, folder: str) -> list[str]:
    path = sysfs.root / folder
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _refuse(what: str, message: str, code: str) -> MeasurementError:
    return MeasurementError(f"{what}: expected {message}", code=code)
