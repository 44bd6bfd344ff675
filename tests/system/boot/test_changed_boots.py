"""Each way in which a host may change what boots, one a test: refused by the client with its code, or not started.

Where the machine itself refuses, its console says the code; where it serves, a client with the policy of the good boot
refuses it. The changes are made by other people's tools (mutations.py). These boots serve a model of two layers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from booted import IMAGES, NotReady, boot, client, run
from mutations import (
    STUBS,
    UKI,
    archive,
    copied,
    flip,
    partition,
    put,
    put_together,
    read_uki,
    taken_apart,
    tool,
    with_uki,
)
from operating import Disks, Operator

pytestmark = pytest.mark.boot


@pytest.fixture
def disks(operator: Operator, tmp_path: Path) -> Disks:
    """Disks of a machine that would be accepted; a test changes a copy of one."""
    return operator.disks("small", tmp_path / "log.raw")


def refused(operator: Operator, disks: Disks, folder: Path, code: str, exit_code: int = 12, *qemu: str) -> str:
    """The machine serves and the client refuses it with `code`; the machine's console."""
    with boot(disks, folder / "serial", qemu=qemu) as machine:
        said = client("attest", machine.address, "--policy", operator.policy, "--json")
        assert said.code == exit_code, f"{said.out}{said.err}\n{machine.console()[-2000:]}"
        assert said.json()["code"] == code, said.err
        return machine.console()


def dies(disks: Disks, folder: Path, reason: str, qemu: Sequence[str] = ()) -> None:
    """The machine ends before it serves, and its console has `reason`."""
    with pytest.raises(NotReady) as caught, boot(disks, folder / "serial", qemu=qemu):
        pytest.fail("the machine serves")
    assert reason in str(caught.value), str(caught.value)


def changed(disks: Disks, folder: Path) -> Path:
    """A copy of the image's disk to change."""
    return copied(disks.root, folder / "root.raw")


# -- the image


def test_tools_that_change_nothing_make_the_same_bytes(disks: Disks, tmp_path: Path) -> None:
    """So what the tests below find is due to the change they name, not to taking apart and putting together."""
    uki = read_uki(disks.root, tmp_path / "uki.efi")
    again = put_together(taken_apart(uki, tmp_path / "sections"), tmp_path / "again.efi")
    assert uki.read_bytes() == again.read_bytes()


def test_a_word_less_on_the_kernel_command_line(disks: Disks, tmp_path: Path) -> None:
    root = changed(disks, tmp_path)
    with_uki(root, tmp_path, cmdline=("module.sig_enforce=1 ", ""))
    dies(replace(disks, root=root), tmp_path, "countermark: refused guest.command_line")


def test_a_kernel_command_line_with_the_same_words(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """The machine sees no difference in one more space. The client does."""
    root = changed(disks, tmp_path)
    with_uki(root, tmp_path, cmdline=("lockdown=confidentiality", " lockdown=confidentiality"))
    refused(operator, replace(disks, root=root), tmp_path, "measurement.rtmr1")


def test_a_changed_initrd(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    root = changed(disks, tmp_path)
    with_uki(root, tmp_path, more_initrd=archive("nothing", b"of use\n"))
    refused(operator, replace(disks, root=root), tmp_path, "measurement.rtmr1")


@pytest.mark.parametrize(("name", "offset"), [("countermark-root", 1024), ("countermark-root-verity", 4096 + 7)])
def test_a_changed_block_of_the_root(name: str, offset: int, disks: Disks, tmp_path: Path) -> None:
    """The first block of the file system; the root of the hash tree, behind the superblock."""
    root = changed(disks, tmp_path)
    flip(root, partition(root, name) + offset)
    dies(replace(disks, root=root), tmp_path, "is corrupted")


def test_another_boot_application_before_ours(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """An extra event: systemd-boot is what the firmware starts, and starts our unchanged UKI."""
    root = changed(disks, tmp_path)
    put(root, read_uki(root, tmp_path / "uki.efi"), "::/EFI/Linux/uki.efi")
    put(root, STUBS / "systemd-bootx64.efi", UKI)
    refused(operator, replace(disks, root=root), tmp_path, "measurement.rtmr1")


def test_the_development_image(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """It has no simulated platform, so nothing of it serves here; and no policy of a user's takes its manifest."""
    development = IMAGES / "development-cpu" / "disk.raw"
    assert development.is_file(), f"{development}: run `make image`"
    dies(replace(disks, root=development), tmp_path, "countermark: refused platform.")
    policy = tmp_path / "policy.toml"
    policy.write_bytes(operator.policy.read_bytes())
    said = run("countermark.cli", *operator.pin_arguments(operator.publish("development"), policy))
    assert (said.code, "policy.image" in said.err) == (1, True), said.err
    assert policy.read_bytes() == operator.policy.read_bytes()


# -- what a host puts beside the image


def test_a_credential_on_the_boot_partition(disks: Disks, tmp_path: Path) -> None:
    root, credential = changed(disks, tmp_path), tmp_path / "x.cred"
    credential.write_text("value")
    put(root, credential, "::/loader/credentials/x.cred")
    dies(replace(disks, root=root), tmp_path, "countermark: refused init.extra")


@pytest.mark.parametrize("folder", ["loader/addons", "EFI/BOOT/BOOTX64.EFI.extra.d"])
def test_an_add_on_on_the_boot_partition(folder: str, disks: Disks, tmp_path: Path) -> None:
    root, made = changed(disks, tmp_path), tmp_path / "x.addon.efi"
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
    refused(operator, disks, tmp_path, "measurement.rtmr0", 12, "-smp", "1")


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
    refused(operator, disks, tmp_path, "weights.root", 13)


def test_a_changed_byte_of_the_configuration(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    config = copied(disks.config, tmp_path / "config.raw")
    data = config.read_bytes()
    config.write_bytes(data.replace(b"boot.test.example", b"bood.test.example"))
    assert hashlib.sha256(data).digest() != hashlib.sha256(config.read_bytes()).digest()
    refused(operator, replace(disks, config=config), tmp_path, "config.digest")
