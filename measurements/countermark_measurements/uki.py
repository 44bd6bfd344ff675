"""What systemd-stub measures of a unified kernel image, and what it hands to the kernel.

systemd 257.13, `src/boot/stub.c`, `cpio.c`, `measure.c`, `linux.c` and `src/fundamental/uki.h`; UAPI group's UKI
specification. Before anything else the stub measures into PCR 11, for each section it knows, in its own order and
not the file's: the name in ASCII with its NUL, then the section as it lies in memory (VirtualSize bytes). Then it loads
the kernel, which is `.linux`, through the firmware's LoadImage, which measures it as a PE image.

To the kernel it gives

- the command line: `.cmdline` cut at its first NUL, white space and control characters turned to spaces, none left at
  the ends, as UTF-16LE with NUL. The kernel's EFI stub measures it as it is given;
- the initrd: `.initrd`, padded to 4 bytes, then a cpio archive that the stub makes, with `.extra/os-release` (`.osrel`)
  and, where such sections exist, others. The kernel's EFI stub measures the whole.

We refuse what this project's images do not have: sections for other profiles, device trees, splash, microcode, PCR
signatures (`.profile`, `.dtb`, `.dtbauto`, `.hwids`, `.splash`, `.ucode`, `.pcrsig`, `.pcrpkey`), and any section
twice.

What the stub takes from the disk beside the image (credentials, extensions, addons) and from SMBIOS (a longer command
line, not in a confidential VM) is measured into PCR 12 and 13, is not predicted and so refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark_measurements import pe

# unified_sections of uki.h, in the order in which they are measured. .pcrsig would not be measured.
_MEASURED: Final = (".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat")
_REFUSED: Final = (".ucode", ".splash", ".dtb", ".pcrsig", ".pcrpkey", ".profile", ".dtbauto", ".hwids")
MAX_COMMAND_LINE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Uki:
    """A unified kernel image. Digests are SHA-384 Authenticode."""

    authenticode: bytes
    kernel_authenticode: bytes
    sections: tuple[tuple[str, bytes], ...]  # name and content, in the order of measurement
    command_line: str
    initrd: bytes  # as the kernel gets it

    @property
    def load_options(self) -> bytes:
        """The command line as the kernel gets it: UTF-16LE with NUL."""
        return self.command_line.encode("utf-16-le") + b"\0\0"


def parse_uki(data: bytes) -> Uki:
    """Parse an image. Raises `FormatError`: `uki.sections`, `uki.command_line`, or a code below `pe.`."""
    image = pe.parse_pe(data)
    if image.subsystem != pe.APPLICATION:
        raise FormatError("uki: expected an EFI application", code="uki.sections")
    found: dict[str, bytes] = {}
    for section in image.sections:
        if section.name in _REFUSED or section.name in found:
            message = f"uki: expected each section once, and none for profiles or devices, got {section.name}"
            raise FormatError(message, code="uki.sections")
        found[section.name] = section.data
    missing = [name for name in _MEASURED if not found.get(name)]
    if missing:
        raise FormatError(
            f"uki: expected sections {', '.join(_MEASURED)}, {missing[0]} is missing", code="uki.sections"
        )
    kernel = pe.parse_pe(found[".linux"])
    if kernel.subsystem != pe.APPLICATION:
        raise FormatError("uki: expected a kernel with an EFI stub in .linux", code="uki.sections")
    return Uki(
        authenticode=image.authenticode,
        kernel_authenticode=kernel.authenticode,
        sections=tuple((name, found[name]) for name in _MEASURED),
        command_line=_command_line(found[".cmdline"]),
        initrd=_pad4(found[".initrd"]) + _pad4(_extra("os-release", found[".osrel"])),
    )


def _command_line(section: bytes) -> str:
    """`mangle_stub_cmdline` of `.cmdline`. ASCII alone is taken: it has one form in UTF-16."""
    text = section.split(b"\0", 1)[0]
    if section[len(text) :].strip(b"\0") or not text.isascii() or len(text) > MAX_COMMAND_LINE_BYTES:
        message = f"uki: expected a command line of at most {MAX_COMMAND_LINE_BYTES} ASCII bytes and no NUL in it"
        raise FormatError(message, code="uki.command_line")
    return "".join(" " if ord(char) <= 0x20 or char == "\x7f" else char for char in text.decode()).strip(" ")


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _extra(name: str, content: bytes) -> bytes:
    """The archive of `pack_cpio_literal`: .extra (0555), .extra/NAME (0444), the trailer; "newc" format."""
    return _entry(1, 0o040555, ".extra", b"") + _entry(2, 0o100444, f".extra/{name}", content) + _TRAILER


def _entry(inode: int, mode: int, name: str, content: bytes) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _pad4(head) + _pad4(content)


# The stub's own bytes: upper-case B, one link, and a fourth NUL.
_TRAILER: Final = b"070701" + b"0" * 32 + b"00000001" + b"0" * 48 + b"0000000B" + b"0" * 8 + b"TRAILER!!!" + bytes(4)
