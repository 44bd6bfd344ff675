"""From the tree to the disk: erofs, dm-verity, initramfs, UKI, EFI system partition, GPT. Every id is a constant."""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from pathlib import Path
from typing import Final

from .errors import BuildError
from .folders import write
from .gpt import TYPE_ESP, TYPE_ROOT, TYPE_ROOT_VERITY, Partition, write_disk
from .initramfs import cpio, load_order, read_module
from .tools import Tools

KERNEL: Final = "7.3.4+deb13-cloud-amd64"
# All that an image of the cpu variant ever loads; the initramfs does, and the rest of the kernel's modules is left out.
MODULES: Final = ("virtio_blk", "dm_verity", "erofs", "virtio_net", "virtio_rng", "tsm_report", "tdx_guest")
DISK_GUID: Final = uuid.UUID("6f0c5ee8-7bb0-4b7e-9c33-a1a3fb52d0e4")
ESP_GUID: Final = uuid.UUID("3e5b41ea-53d5-4c21-bd47-5a6d4fca6a2c")
ROOT_GUID: Final = uuid.UUID("c6f1d0a5-1ea6-4d0c-8c0e-0a7bba0a3b25")
VERITY_GUID: Final = uuid.UUID("97a4fc7e-6ea5-44e5-9b9f-6b1f2e0f1a77")
EROFS_UUID: Final = "5c1a9d42-9e0f-4f26-8a3d-3f7f6a1b52c8"
VERITY_UUID: Final = "e3a60d1f-8d5e-4ab3-b2a5-77cf0b9b4c19"
VERITY_SALT: Final = hashlib.sha256(b"countermark root verity salt 1").hexdigest()
ESP_SERIAL: Final = "434d4b31"
BLOCK: Final = 4096
ESP_MIB: Final = 48


def make_erofs(rootfs: Path, target: Path, tools: Tools) -> None:
    """The tree as erofs: all owners root, all times the lock's epoch, a fixed UUID."""
    tools.run(
        "/usr/bin/mkfs.erofs",
        "--quiet",
        "--all-root",
        f"-T{tools.epoch}",
        f"-U{EROFS_UUID}",
        "-zlz4hc,9",
        "-C65536",
        "-Eztailpacking",
        "-x-1",
        "--hard-dereference",
        "--workers=2",
        target,
        rootfs,
    )
    pad = -target.stat().st_size % BLOCK
    with target.open("ab") as file:
        file.write(bytes(pad))


def make_verity(image: Path, target: Path, tools: Tools) -> str:
    """The hash tree of `image` with a veritysetup superblock; returns the root hash."""
    write(target, b"")
    said = tools.run(
        "/usr/sbin/veritysetup",
        "format",
        image,
        target,
        f"--salt={VERITY_SALT}",
        f"--uuid={VERITY_UUID}",
        "--hash=sha256",
        f"--data-block-size={BLOCK}",
        f"--hash-block-size={BLOCK}",
        "--format=1",
    )
    roots = [line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith("Root hash:")]
    if len(roots) != 1 or len(roots[0]) != 64:
        raise BuildError(f"veritysetup gave no root hash: {said}")
    return roots[0]


def make_initramfs(image: Path, base: Path, root_image: Path, tools: Tools) -> bytes:
    """The cpio: /init with this root's parameters compiled in, and the modules it loads."""
    order = load_order(base / "usr/lib/modules" / KERNEL, list(MODULES))
    names = [path.name.split(".ko", 1)[0] for path in order]
    params = [
        "#define MODULES " + ", ".join(f'"{name}"' for name in names),
        f'#define DATA_PARTUUID "{ROOT_GUID}"',
        f'#define HASH_PARTUUID "{VERITY_GUID}"',
        f"#define DATA_BLOCKS {root_image.stat().st_size // BLOCK}",
        f'#define SALT "{VERITY_SALT}"',
    ]
    place = tools.root / "build" / "init"
    write(place / "params.h", "\n".join(params) + "\n")
    write(place / "init.c", (image / "initramfs" / "init.c").read_bytes())
    flags = ["-std=gnu17", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none"]
    hardening = ["-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-ffile-prefix-map=/build/init=."]
    tools.run("/usr/bin/gcc", *flags, *hardening, "-o", place / "init", place / "init.c")
    entries: dict[str, bytes | None] = dict.fromkeys(("dev", "modules", "proc", "root", "sys"))
    entries["init"] = (place / "init").read_bytes()
    for name, path in zip(names, order, strict=True):
        entries[f"modules/{name}.ko"] = read_module(path)
    return cpio(entries, {"init"})


def make_uki(image: Path, base: Path, rootfs: Path, initrd: bytes, root_hash: str, work: Path, tools: Tools) -> str:
    """Write work/uki.efi; returns its command line: the overlay's words, then the root hash, and nothing else."""
    words = (rootfs / "usr/lib/countermark/cmdline").read_text(encoding="ascii").split()
    cmdline = " ".join([*words, f"roothash={root_hash}"])
    write(work / "initrd", initrd)
    write(work / "vmlinuz", (base / "usr/lib/modules" / KERNEL / "vmlinuz").read_bytes())
    write(work / "os-release", (rootfs / "usr/lib/os-release").read_bytes())
    write(work / "cmdline", cmdline)
    inside = "/" + str(work.relative_to(tools.root))
    tools.run(
        "/usr/bin/python3.13",
        "-I",
        "/usr/bin/ukify",
        "build",
        f"--linux={inside}/vmlinuz",
        f"--initrd={inside}/initrd",
        f"--cmdline=@{inside}/cmdline",
        f"--os-release=@{inside}/os-release",
        f"--uname={KERNEL}",
        "--stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub",
        f"--output={inside}/uki.efi",
    )
    return cmdline


def make_esp(work: Path, tools: Tools) -> None:
    """work/esp.img: FAT32 with /EFI/BOOT/BOOTX64.EFI alone."""
    target, uki = work / "esp.img", work / "uki.efi"
    with target.open("wb") as file:
        file.truncate(ESP_MIB << 20)
    if uki.stat().st_size > (ESP_MIB - 2) << 20:
        raise BuildError(f"the UKI has {uki.stat().st_size} bytes: more than the ESP holds")
    tools.run("/usr/sbin/mkfs.fat", "--invariant", "-F32", "-s1", f"-i{ESP_SERIAL}", "-nESP", target)
    os.utime(uki, (tools.epoch, tools.epoch))
    for folder in ("EFI", "EFI/BOOT"):
        tools.run("/usr/bin/mmd", "-i", target, f"::{folder}")
    tools.run("/usr/bin/mcopy", "-m", "-i", target, uki, "::EFI/BOOT/BOOTX64.EFI")


def make_disk(work: Path) -> None:
    """work/disk.raw out of the ESP, the root and its hash tree."""
    write_disk(
        work / "disk.raw",
        DISK_GUID,
        (
            Partition(name="esp", type_guid=TYPE_ESP, guid=ESP_GUID, content=work / "esp.img"),
            Partition(name="countermark-root", type_guid=TYPE_ROOT, guid=ROOT_GUID, content=work / "root.erofs"),
            Partition(
                name="countermark-root-verity",
                type_guid=TYPE_ROOT_VERITY,
                guid=VERITY_GUID,
                content=work / "root.verity",
            ),
        ),
    )


def verity_blocks(tree: Path) -> int:
    """The data blocks that a veritysetup superblock says it covers (offset 40 of `struct verity_sb`)."""
    with tree.open("rb") as file:
        head = file.read(48)
    if head[:8] != b"verity\0\0":
        raise BuildError("root.verity has no superblock")
    return int(struct.unpack_from("<Q", head, 40)[0])
