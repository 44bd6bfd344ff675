"""Each change of the image, one a test: refused by the client with its code, or not started.

Where the machine itself refuses, its console says the code; where it serves, a client with the policy of the good boot
refuses it. The changes are made by other people's tools (mutations.py). These boots serve a model of two layers.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from booted import IMAGES, Disks, run
from judged import dies, refused
from mutations import STUBS, UKI, archive, copied, flip, partition, put, put_together, read_uki, taken_apart, with_uki
from operating import Operator

pytestmark = pytest.mark.boot


def test_tools_that_change_nothing_make_the_same_bytes(disks: Disks, tmp_path: Path) -> None:
    """So what the tests below find is due to the change they name, not to taking apart and putting together."""
    uki = read_uki(disks.root, tmp_path / "uki.efi")
    again = put_together(taken_apart(uki, tmp_path / "sections"), tmp_path / "again.efi")
    assert uki.read_bytes() == again.read_bytes()


def test_a_word_less_on_the_kernel_command_line(disks: Disks, tmp_path: Path) -> None:
    root = copied(disks.root, tmp_path / "root.raw")
    with_uki(root, tmp_path, cmdline=("module.sig_enforce=1 ", ""))
    dies(replace(disks, root=root), tmp_path, "countermark: refused guest.command_line")


def test_a_kernel_command_line_with_the_same_words(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """The machine sees no difference in one more space. The client does."""
    root = copied(disks.root, tmp_path / "root.raw")
    with_uki(root, tmp_path, cmdline=("lockdown=confidentiality", " lockdown=confidentiality"))
    refused(operator, replace(disks, root=root), tmp_path, "measurement.rtmr1")


def test_a_changed_initrd(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    root = copied(disks.root, tmp_path / "root.raw")
    with_uki(root, tmp_path, more_initrd=archive("nothing", b"of use\n"))
    refused(operator, replace(disks, root=root), tmp_path, "measurement.rtmr1")


@pytest.mark.parametrize(("name", "offset"), [("countermark-root", 1024), ("countermark-root-verity", 4096 + 7)])
def test_a_changed_block_of_the_root(name: str, offset: int, disks: Disks, tmp_path: Path) -> None:
    """The first block of the file system; the root of the hash tree, behind the superblock."""
    root = copied(disks.root, tmp_path / "root.raw")
    flip(root, partition(root, name) + offset)
    dies(replace(disks, root=root), tmp_path, "is corrupted")


def test_another_boot_application_before_ours(operator: Operator, disks: Disks, tmp_path: Path) -> None:
    """An extra event: systemd-boot is what the firmware starts, and starts our unchanged UKI."""
    root = copied(disks.root, tmp_path / "root.raw")
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
    said = run("countermark.cli", *operator.pin_arguments(operator.publish(IMAGES / "development-cpu"), policy))
    assert (said.code, "policy.image" in said.err) == (1, True), said.err
    assert policy.read_bytes() == operator.policy.read_bytes()
