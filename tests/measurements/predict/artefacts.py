"""What these tests predict from: a firmware that is looked for, and small disks and images made here."""

from __future__ import annotations

import binascii
import hashlib
import lzma
import os
import struct
from pathlib import Path
from uuid import UUID

import pytest

ROOT = Path(__file__).resolve().parents[3]
DISKS = ROOT / "tests" / "data" / "disk"
SHAPES = ROOT / "image" / "shapes"
OVMF_SHA256 = "14954040cc754ade0c625ac3470ea46d4c14318b5b1396de4ef77090203d76db"  # Debian's 2025.02-8+deb13u1
_PLACES = (ROOT / "image/cache/tools/usr/share/ovmf/OVMF.fd", Path("/usr/share/ovmf/OVMF.fd"))


def ovmf_path() -> Path:
    """Debian's OVMF.fd of the locked version. Skips, saying where it was looked for, when it is not there."""
    named = os.environ.get("COUNTERMARK_OVMF")
    for place in (Path(named),) if named else _PLACES:
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == OVMF_SHA256:
            return place
    pytest.skip(f"no OVMF.fd with sha256 {OVMF_SHA256[:8]}...: set COUNTERMARK_OVMF, or run `make image` once")


def unpacked(name: str) -> bytes:
    """A disk or volume of tests/data/disk."""
    return lzma.decompress((DISKS / f"{name}.img.xz").read_bytes())


def pe(sections: list[tuple[str, bytes]], *, subsystem: int = 10, tail: bytes = b"", raw_extra: int = 0) -> bytes:
    """A PE32+ image for x86-64 with these sections, as linkers lay it out: 512-byte file alignment."""
    header_bytes = -(-(0x40 + 4 + 20 + 112 + 128 + 40 * len(sections)) // 512) * 512
    out = bytearray(b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40))
    out += b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 112 + 128, 0x22)
    optional = bytearray(112 + 128)
    struct.pack_into("<H", optional, 0, 0x20B)
    struct.pack_into("<II", optional, 60, header_bytes, 0xDEADBEEF)  # SizeOfHeaders, CheckSum
    struct.pack_into("<H", optional, 68, subsystem)
    struct.pack_into("<I", optional, 108, 16)
    out += optional
    offset, address, body = header_bytes, 0x1000, b""
    for name, content in sections:
        raw = -(-len(content) // 512) * 512 + raw_extra
        out += name.encode().ljust(8, b"\0") + struct.pack("<IIII", len(content), address, raw, offset)
        out += bytes(12) + struct.pack("<I", 0x40000040)
        body += content.ljust(raw, b"\0")
        offset, address = offset + raw, address + -(-max(len(content), 1) // 4096) * 4096
    return bytes(out).ljust(header_bytes, b"\0") + body + tail


KERNEL = pe([(".text", b"\x90" * 700)])
UKI_SECTIONS = [
    (".text", b"\xcc" * 300),
    (".osrel", b"ID=countermark\n"),
    (".cmdline", b" console=ttyS0\n roothash=00 "),
    (".uname", b"7.3.4"),
    (".sbat", b"sbat,1\n"),
    (".linux", KERNEL),
    (".initrd", b"070701 not really"),
]


def uki(sections: list[tuple[str, bytes]] | None = None) -> bytes:
    """A unified kernel image; the kernel in it is a PE image too."""
    return pe(UKI_SECTIONS if sections is None else sections)


def fat16(files: dict[str, bytes]) -> bytes:
    """A FAT16 volume of 8 MiB with these files, 8.3 names, 512-byte clusters; the directory tree is made as needed."""
    reserved, fats, root_entries, sectors = 1, 2, 512, 16384
    fat_sectors = 64
    data_sector = reserved + fats * fat_sectors + root_entries * 32 // 512
    fat: list[int] = [0xFFF8, 0xFFFF]
    clusters: list[bytes] = []

    def store(content: bytes) -> int:
        if not content:
            return 0
        first = len(fat)
        count = -(-len(content) // 512)
        fat.extend([*range(first + 1, first + count), 0xFFFF])
        clusters.extend(content[512 * at : 512 * at + 512].ljust(512, b"\0") for at in range(count))
        return first

    def entry(name: str, attribute: int, first: int, size: int) -> bytes:
        base, _, extension = name.partition(".")
        text = base.encode().ljust(8) + extension.encode().ljust(3)
        return text + struct.pack("<B14xHI", attribute, first, size)

    def directory(prefix: str) -> bytes:
        out, seen = b"", set()
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            name, slash, _ = path[len(prefix) :].partition("/")
            if slash and name not in seen:
                seen.add(name)
                out += entry(name, 0x10, store(directory(f"{prefix}{name}/").ljust(512, b"\0")), 0)
            elif not slash:
                out += entry(name, 0x20, store(content), len(content))
        return out

    root = directory("")
    boot = bytearray(512)
    struct.pack_into("<HBHBHHBH", boot, 11, 512, 1, reserved, fats, root_entries, sectors, 0xF8, fat_sectors)
    boot[510:] = b"\x55\xaa"
    table = struct.pack(f"<{len(fat)}H", *fat).ljust(fat_sectors * 512, b"\0")
    out = bytes(boot) + table * 2 + root.ljust(root_entries * 32, b"\0")
    assert len(out) == data_sector * 512
    return (out + b"".join(clusters)).ljust(sectors * 512, b"\0")


def gpt_disk(path: Path, partitions: list[tuple[UUID, UUID, str, bytes]]) -> Path:
    """A GPT disk with these partitions (type, unique, name, content), one after the other from sector 2048."""
    entries, body, at = b"", b"", 2048
    for kind, unique, name, content in partitions:
        count = -(-len(content) // 512)
        entries += kind.bytes_le + unique.bytes_le + struct.pack("<QQQ", at, at + count - 1, 0)
        entries += name.encode("utf-16-le").ljust(72, b"\0")
        body += content.ljust(512 * count, b"\0")
        at += count
    entries = entries.ljust(128 * 128, b"\0")
    last = at + 33 + 6
    disk_guid = UUID("6d0d2b52-0f3b-4f55-8a2a-6a1f3bd0a5c1").bytes_le

    def header(own: int, other: int, array: int) -> bytes:
        def fields(crc: int) -> bytes:
            start = struct.pack("<8sIIIIQQQQ", b"EFI PART", 0x10000, 92, crc, 0, own, other, 34, last - 33)
            return start + disk_guid + struct.pack("<QIII", array, 128, 128, binascii.crc32(entries))

        return fields(binascii.crc32(fields(0))).ljust(512, b"\0")

    mbr = bytearray(512)
    mbr[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, last)
    mbr[510:] = b"\x55\xaa"
    data = bytes(mbr) + header(1, last, 2) + entries
    data = data.ljust(2048 * 512, b"\0") + body
    data = data.ljust((last - 32) * 512, b"\0") + entries + header(last, 1, last - 32)
    path.write_bytes(data)
    return path


ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")


def image(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A disk with an EFI system partition that holds a unified kernel image, and a root partition."""
    system = fat16({"EFI/BOOT/BOOTX64.EFI": uki()} if files is None else files)
    root = (UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"), UUID(int=2), "countermark-root", b"root" * 1000)
    return gpt_disk(path, [(ESP, UUID(int=1), "esp", system), root])
