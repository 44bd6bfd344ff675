"""The files of a machine that booted an image well, for tests to bend one at a time."""

import errno
from pathlib import Path

from countermark_appliance.engine import verityformat
from countermark_appliance.engine.weights.verity import build_tree
from countermark_appliance.guest import host, prepare
from countermark_appliance.platform.sysfs import Sysfs

ROOTFS = Path(__file__).parents[2] / "image" / "rootfs"
WORDS = (ROOTFS / "common" / host.WORDS).read_text()
ROOTHASH = "5a" * 32
IMAGE = bytes(range(256)) * 16 * 3  # three blocks
ROOT, TREE = build_tree(memoryview(IMAGE))
CONFIG = f"""[node]
operator = "test.example"
listen = "0.0.0.0:8443"
[platform]
name = "vtpm"
state = "/usr/lib/countermark/sim"
[weights]
dir = "weights"
root = "{ROOT.hex()}"
[log]
dir = "log"
"""
MOUNTINFO = """21 1 253:0 / / ro,relatime shared:1 - erofs /dev/dm-0 ro,user_xattr
22 21 0:20 / /proc rw,nosuid,nodev,noexec,relatime shared:2 - proc proc rw
"""
# struct 0 and a type 11 with two strings, then the end (DSP0134 6.1)
SMBIOS = bytes((0, 5, 0, 0, 1)) + b"EDK II\0\0" + bytes((127, 4, 9, 0)) + b"\0\0"
INJECTED = (
    bytes((0, 5, 0, 0, 1))
    + b"EDK II\0\0"
    + bytes((11, 5, 1, 0, 2))
    + b"io.systemd.stub.kernel-cmdline-extra=init=/bin/sh\0second\0\0"
    + bytes((127, 4, 9, 0))
    + b"\0\0"
)


class Machine(Sysfs):
    """A root directory with the files of a good boot."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.put(host.WORDS, WORDS)
        self.put(host.CMDLINE, " ".join([*WORDS.split(), f"roothash={ROOTHASH}"]) + "\n")
        self.put(host.BOOT_CONFIG, "")
        self.put(host.OEM_STRINGS, SMBIOS)
        self.put(host.LOCKDOWN, "none integrity [confidentiality]\n")
        self.put(host.SIGNED_MODULES, "Y\n")
        self.put(host.NO_KEXEC, "1\n")
        self.put(host.MOUNTS, MOUNTINFO)
        self.put("sys/dev/block/253:0/dm/uuid", verityformat.DEVICE_UUID + ROOTHASH + "\n")
        self.put(prepare.MODULES, "0\n")
        for name in ("APIC", "DSDT", "FACP"):
            self.put(f"{host.ACPI}/{name}", name.encode() + bytes(40))
        (root / host.ACPI / "dynamic").mkdir()
        (root / "run" / "countermark").mkdir(parents=True)
        text = CONFIG.encode()
        self.disk("vdb", 16, partitions={"countermark-weights": IMAGE, "countermark-weights-verity": TREE})
        self.disk("vdc", 32, serial="cm-config", data=text + bytes(-len(text) % 4096))
        self.disk("vdd", 48, serial="cm-log", data=bytes(8192))
        self.put("dev/mapper/control", "")
        self.no_write = False

    def put(self, path: str, data: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())

    def disk(self, name: str, minor: int, *, serial: str = "", data: bytes = b"", partitions=None) -> None:
        self.put(f"sys/block/{name}/serial", serial)
        self._block(name, minor, data, "")
        for number, (label, content) in enumerate((partitions or {}).items(), 1):
            self._block(f"{name}{number}", minor + number, content, f"PARTN={number}\nPARTNAME={label}\n")

    def _block(self, name: str, minor: int, data: bytes, more: str) -> None:
        uevent = f"MAJOR=254\nMINOR={minor}\nDEVNAME={name}\nDEVTYPE=disk\n{more}"
        self.put(f"sys/class/block/{name}/uevent", uevent)
        self.put(f"sys/class/block/{name}/size", f"{len(data) // 512}\n")
        self.put(f"dev/{name}", data)

    def write(self, path: str, data: bytes) -> None:
        if self.no_write:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        super().write(path, data)
