"""Everything a host could say beside the measured image is refused, each way with its code."""

import pytest
from guest_machine import INJECTED, MOUNTINFO, ROOTHASH, WORDS, Machine

from countermark.errors import ConfigError, MeasurementError
from countermark_appliance.guest import host
from countermark_appliance.guest.host import check_host

LINE = " ".join(WORDS.split())


def test_a_good_boot_passes(tmp_path):
    check_host(Machine(tmp_path))


@pytest.mark.parametrize("gone", [host.BOOT_CONFIG, host.OEM_STRINGS])
def test_a_machine_without_it_passes(tmp_path, gone):
    machine = Machine(tmp_path)
    (tmp_path / gone).unlink()
    check_host(machine)


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        (host.CMDLINE, f"{LINE} roothash={ROOTHASH} init=/bin/sh", "guest.command_line"),
        (host.CMDLINE, f"systemd.unit=rescue.target {LINE} roothash={ROOTHASH}", "guest.command_line"),
        (host.CMDLINE, f"{LINE.replace(' lockdown=confidentiality', '')} roothash={ROOTHASH}", "guest.command_line"),
        (host.CMDLINE, f"{LINE} quiet roothash={ROOTHASH}", "guest.command_line"),
        (host.CMDLINE, f"{LINE.replace('import_credentials=no', 'import_credentials=yes')} roothash={ROOTHASH}",
         "guest.command_line"),
        (host.BOOT_CONFIG, 'kernel.loglevel = "7"\n', "guest.boot_config"),
        ("run/host-credentials/@system/ssh.authorized_keys.root", "key", "guest.credentials"),
        ("run/host-credentials/@initrd/sysctl.extra", "x", "guest.credentials"),
        ("run/host-credentials/@encrypted/x", "x", "guest.credentials"),
        (host.OEM_STRINGS, INJECTED, "guest.smbios"),
        (host.OEM_STRINGS, INJECTED[:-8], "guest.smbios"),
        (f"{host.EFI_VARIABLES}/{host.EFI_OPTIONS}", "x", "guest.efi_options"),
        (f"{host.ACPI}/SSDT", b"SSDT" + bytes(40), "guest.acpi"),
        (f"{host.ACPI}/SSDT1", b"SSDT" + bytes(40), "guest.acpi"),
        (f"{host.ACPI}/DSDT", b"OEM1" + bytes(40), "guest.acpi"),
        (f"{host.ACPI}/dynamic/SSDT2", b"SSDT", "guest.acpi"),
        (host.LOCKDOWN, "none [integrity] confidentiality\n", "guest.kernel_locks"),
        (host.LOCKDOWN, "[none] integrity confidentiality\n", "guest.kernel_locks"),
        (host.SIGNED_MODULES, "N\n", "guest.kernel_locks"),
        (host.NO_KEXEC, "0\n", "guest.kernel_locks"),
        (host.MOUNTS, MOUNTINFO.replace("erofs /dev/dm-0 ro", "ext4 /dev/vda2 ro"), "guest.root"),
        (host.MOUNTS, MOUNTINFO.replace("ro,relatime shared:1", "rw,relatime shared:1"), "guest.root"),
        (host.MOUNTS, MOUNTINFO.replace("253:0", "254:2"), "guest.root"),
        (host.MOUNTS, "", "guest.root"),
        ("sys/dev/block/253:0/dm/uuid", "countermark-verity-" + "00" * 32, "guest.root"),
        ("sys/dev/block/253:0/dm/uuid", "CRYPT-VERITY-" + ROOTHASH, "guest.root"),
    ],
)  # fmt: skip
def test_refused(tmp_path, path, content, code):
    machine = Machine(tmp_path)
    machine.put(path, content)
    with pytest.raises(MeasurementError) as refused:
        check_host(machine)
    assert (refused.value.code, refused.value.exit_code) == (code, 12)


@pytest.mark.parametrize("path", [host.LOCKDOWN, host.SIGNED_MODULES, host.NO_KEXEC])
def test_a_kernel_without_a_lock_is_refused(tmp_path, path):
    machine = Machine(tmp_path)
    (tmp_path / path).unlink()
    with pytest.raises(MeasurementError) as refused:
        check_host(machine)
    assert refused.value.code == "guest.kernel_locks"


@pytest.mark.parametrize("line", [LINE, f"{LINE} roothash={ROOTHASH} roothash={ROOTHASH}", f"{LINE} roothash=00"])
def test_no_image_id_is_refused(tmp_path, line):
    machine = Machine(tmp_path)
    machine.put(host.CMDLINE, line)
    with pytest.raises(ConfigError) as refused:
        check_host(machine)
    assert refused.value.code == "platform.image_id"


def test_the_root_that_counts_is_the_last_mounted(tmp_path):
    """A second mount over / hides the first."""
    machine = Machine(tmp_path)
    machine.put(host.MOUNTS, MOUNTINFO + "30 21 0:30 / / rw,relatime - tmpfs tmpfs rw\n")
    with pytest.raises(MeasurementError) as refused:
        check_host(machine)
    assert refused.value.code == "guest.root"
