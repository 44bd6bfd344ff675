"""The image as it is, and what a host may do beside it: other files, other words, another machine, other disks.

Refused by the client with its code, or by the machine with one on its console. These boots serve a model of two layers.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from booted import IMAGES, Disks, boot, client
from judged import dies, refused
from mutations import STUBS, copied, flip, partition, put, read_uki, taken_apart, tool
from operating import Operator

pytestmark = pytest.mark.boot


# -- what a host puts beside the image


def test_a_credential_on_the_boot_partition(disks: Disks, tmp_path: Path) -> None:
    root, credential = copied(disks.root, tmp_path / "root.raw"), tmp_path / "x.cred"
    credential.write_text("value")
    put(root, credential, "::/loader/credentials/x.cred")
    dies(replace(disks, root=root), tmp_path, "countermark: refused init.extra")


@pytest.mark.parametrize("folder", ["loader/addons", "EFI/BOOT/BOOTX64.EFI.extra.d"])
def test_an_add_on_on_the_boot_partition(folder: str, disks: Disks, tmp_path: Path) -> None:
    root, made = copied(disks.root, tmp_path / "root.raw"), tmp_path / "x.addon.efi"
    stub = f"--stub={STUBS / 'addonx64.efi.stub'}"
    tool("ukify", "build", "--cmdline=systemd.debug_shell=1", stub, f"--output={made}", python=True)
    put(root, made, f"::/{folder}/x.addon.efi")
    dies(replace(disks, root=root), tmp_path, "countermark: refused guest.command_line")


SMBIOS = {
    "io.systemd.stub.kernel-cmdline-extra=systemd.debug_shell=1": "guest.command_line",
    "io.systemd.credential:passwd.plaintext-password.root=x": "guest.smbios",
}


@pytest.mark.parametrize("string", SMBIOS)
def test_a_string_in_smbios(string: str, disks: Disks, tmp_path: Path) -> None:
    dies(disks, tmp_path, f"countermark: refused {SMBIOS[string]}", qemu=("-smbios", f"type=11,value={string}"))


def test_a_credential_in_qemus_firmware_configuration(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """No register shows it, and the image has no driver for that device. Had systemd taken it, prepare would refuse."""
    qemu = ("-fw_cfg", "name=opt/io.systemd.credentials/sysctl.extra,string=kernel.sysrq=1")
    with boot(disks, tmp_path / "serial", qemu=qemu) as machine:
        said = client("attest", machine.address, "--policy", operator.policy)
        assert said.code == 0, said.err
    initrd = taken_apart(read_uki(disks.root, tmp_path / "uki.efi"), tmp_path / "sections")["initrd"].read_bytes()
    assert b"virtio_blk.ko" in initrd
    assert b"qemu_fw_cfg" not in initrd
    assert "qemu_fw_cfg" not in (IMAGES / "test-cpu" / "files.txt").read_text()


def test_a_launch_of_another_shape(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """One processor. On this platform no event tells how much memory there is; on TDX the hand-off block does."""
    refused(operator, disks, tmp_path, "measurement.rtmr0", qemu=("-smp", "1"))


# -- the node's other disks


def test_a_changed_block_of_the_weights(disks: Disks, tmp_path: Path) -> None:
    weights = copied(disks.weights, tmp_path / "weights.raw")
    flip(weights, partition(weights, "countermark-weights") + 40 * 4096 + 11)
    dies(replace(disks, weights=weights), tmp_path, "countermark: refused weights.")


def test_the_disk_of_other_weights(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """Whole and valid, but not what the configuration names."""
    other = operator.disks("other", tmp_path / "unused.raw").weights
    dies(replace(disks, weights=other), tmp_path, "countermark: refused weights.")


def test_a_configuration_that_names_other_weights(operator: Operator, tmp_path: Path) -> None:
    disks = operator.disks("other", tmp_path / "log.raw")
    refused(operator, disks, tmp_path, "weights.root", exit_code=13)


def test_a_changed_byte_of_the_configuration(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    config = copied(disks.config, tmp_path / "config.raw")
    data = config.read_bytes()
    config.write_bytes(data.replace(b"boot.test.example", b"bood.test.example"))
    assert hashlib.sha256(data).digest() != hashlib.sha256(config.read_bytes()).digest()
    refused(operator, replace(disks, config=config), tmp_path, "config.digest")
