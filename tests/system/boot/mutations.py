"""Changed copies of a disk, made by the tools root's programs of other people; our predictor has no part in them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from booted import TOOLS

UKI: Final = "::/EFI/BOOT/BOOTX64.EFI"
SECTIONS: Final = ("linux", "initrd", "cmdline", "osrel", "uname")
STUBS: Final = TOOLS / "usr" / "lib" / "systemd" / "boot" / "efi"
_LIBRARIES: Final = TOOLS / "usr" / "lib" / "x86_64-linux-gnu"
_SECTOR: Final = 512


def tool(program: str, *arguments: str | Path, python: bool = False) -> str:
    """Run one of the tools root's programs where it lies; what it printed. Raises when it fails."""
    where = TOOLS / "usr" / "bin" / program
    if not where.exists():
        where = TOOLS / "usr" / "sbin" / program
    command = [str(_LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", str(_LIBRARIES)]
    if python:
        command.append(str(TOOLS / "usr" / "bin" / "python3.13"))
    command += [str(where), *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "MTOOLS_SKIP_CHECK": "1", "PYTHONHOME": str(TOOLS / "usr")}
    environment["PYTHONPATH"] = str(TOOLS / "usr" / "lib" / "python3" / "dist-packages")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, f"{program}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def copied(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)], check=True, timeout=300)
    return target


def partition(disk: Path, name: str) -> int:
    """Where one begins, in bytes, by its name in the GPT (UEFI 2.10, 5.3.3: entries of 128 bytes from LBA 2)."""
    with disk.open("rb") as file:
        entries = file.read(2 * _SECTOR + 128 * 128)[2 * _SECTOR :]
    for start in range(0, len(entries), 128):
        if entries[start + 56 : start + 128].decode("utf-16-le").rstrip("\0") == name:
            return int.from_bytes(entries[start + 32 : start + 40], "little") * _SECTOR
    raise AssertionError(f"{disk}: no partition {name}")


def flip(disk: Path, offset: int) -> None:
    """One bit of one byte."""
    with disk.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# -- the EFI system partition


def esp(disk: Path) -> str:
    """As mtools name it."""
    return f"{disk}@@{partition(disk, 'esp')}"


def read_uki(disk: Path, target: Path) -> Path:
    tool("mcopy", "-n", "-i", esp(disk), UKI, target)
    return target


def put(disk: Path, source: Path, target: str) -> None:
    """Copy a file to the ESP, with the folders above it, in place of what has its name."""
    image = esp(disk)
    folder = "::"
    for name in target.removeprefix("::/").split("/")[:-1]:
        folder += f"/{name}"
        if not _exists(image, folder):
            tool("mmd", "-i", image, folder)
    if _exists(image, target):
        tool("mdel", "-i", image, target)
    tool("mcopy", "-i", image, source, target)


def _exists(image: str, path: str) -> bool:
    try:
        tool("mdir", "-b", "-i", image, path)
    except AssertionError:
        return False
    return True


# -- the unified kernel image


def taken_apart(uki: Path, folder: Path) -> dict[str, Path]:
    """The sections that came from files, as objcopy reads them."""
    folder.mkdir()
    parts = {name: folder / name for name in SECTIONS}
    for name, path in parts.items():
        tool("objcopy", "-O", "binary", f"--only-section=.{name}", uki, path)
    return parts


def put_together(parts: dict[str, Path], target: Path) -> Path:
    """What ukify makes of the sections."""
    files: Sequence[str] = [
        f"--linux={parts['linux']}", f"--initrd={parts['initrd']}", f"--cmdline=@{parts['cmdline']}",
        f"--os-release=@{parts['osrel']}", f"--uname={parts['uname'].read_text()}",
    ]  # fmt: skip
    tool("ukify", "build", *files, f"--stub={STUBS / 'linuxx64.efi.stub'}", f"--output={target}", python=True)
    return target


def with_uki(disk: Path, folder: Path, *, cmdline: tuple[str, str] | None = None, more_initrd: bytes = b"") -> None:
    """Replace the UKI of `disk`: a word of its command line by another, or with more at the end of its initrd."""
    parts = taken_apart(read_uki(disk, folder / "uki.efi"), folder / "sections")
    if cmdline is not None:
        text = parts["cmdline"].read_text()
        assert text.count(cmdline[0]) == 1, text
        parts["cmdline"].write_text(text.replace(*cmdline))
    if more_initrd:
        with parts["initrd"].open("ab") as file:
            file.write(b"\0" * (-file.tell() % 4) + more_initrd)
    put(disk, put_together(parts, folder / "changed.efi"), UKI)


def archive(name: str, data: bytes) -> bytes:
    """A cpio archive of one file in the form that the kernel reads (Documentation/driver-api/early-userspace, newc)."""
    written = b""
    for entry, mode, body in ((name, 0o100644, data), ("TRAILER!!!", 0, b"")):
        path = entry.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        for part in (head, body):
            written += part + b"\0" * (-len(part) % 4)
    return written
