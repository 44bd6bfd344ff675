"""A small kernel over a directory: the files a TDX guest has, with the semantics that Linux documents for them.

configfs-tsm: mkdir makes the attributes, a binary attribute arrives when its file is closed (so an error of that write
is never seen), reading `outblob` makes a quote from the last `inblob`, `generation` counts writes. Measurement
registers: a write of 48 bytes at offset 0 extends, any other size is EINVAL. ACPI: the CCEL table and the log area.
The CPU below it is the simulated one, whose vendor signs; no hardware is anywhere.
"""

import errno
import hashlib
from pathlib import Path

import sim_evidence
from countermark.formats.quote import parse_quote
from countermark_appliance.platform import image, sim
from countermark_appliance.platform.sim.state import State
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.tdx import ccel, registers, reports


def ccel_table(area_bytes: int, **changes: int | bytes) -> bytes:
    """An ACPI CCEL table with a good checksum, unless `checksum` says otherwise."""
    field = {"signature": b"CCEL", "length": 56, "cc_type": 2, "subtype": 0, "reserved": 0, "address": 0x7F000000}
    field |= changes
    table = bytearray()
    table += bytes(field["signature"]) + int(field["length"]).to_bytes(4, "little") + bytes((1, 0))
    table += b"SIMULASIMULATE" + bytes(12)
    table += bytes((int(field["cc_type"]), int(field["subtype"]))) + int(field["reserved"]).to_bytes(2, "little")
    table += area_bytes.to_bytes(8, "little") + int(field["address"]).to_bytes(8, "little")
    table[9] = int(field.get("checksum", -sum(table) % 256))
    return bytes(table)


class FakeKernel(Sysfs):
    """`Sysfs` whose files behave. Attributes below are what a test bends."""

    def __init__(self, root: Path, state: State, *, code: str = "the code") -> None:
        super().__init__(root)
        self.cpu = sim.boot(state, roots=[sim_evidence.code_folder(code)])
        self.provider = "tdx_guest\n"
        self.quote_error = 0  # errno of reading outblob
        self.lost_write = False  # the host still owns the buffer: EBUSY at close, which nobody sees
        self.second_writer = False
        self.answer: bytes | None = None  # what the host hands back in place of the quote
        self.write_does_nothing = False
        self.write_error = 0
        self.calls: list[str] = []
        measured = parse_quote(self.cpu.quote(bytes(64))).body
        area = self.cpu.ccel()
        self.put(image.CMDLINE, b"quiet roothash=" + self.cpu.image_id.hex().encode() + b" panic=-1\n")
        self.put(ccel.TABLE, ccel_table(len(area)))
        self.put(ccel.LOG, area)
        self.put(f"{registers.MEASUREMENTS}/mrtd:sha384", measured.mrtd)
        for index, value in enumerate(measured.rtmrs):
            self.put(f"{registers.MEASUREMENTS}/rtmr{index}:sha384", value)
        (root / reports.REPORTS).mkdir(parents=True)

    def put(self, path: str, data: bytes) -> None:
        """Make or replace a file."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def drop(self, path: str) -> None:
        (self.root / path).unlink()

    def register(self, index: int) -> bytes:
        return (self.root / f"{registers.MEASUREMENTS}/rtmr{index}:sha384").read_bytes()

    def extend(self, digest: bytes) -> None:
        """Extend RTMR3 behind everybody's back."""
        self.put(f"{registers.MEASUREMENTS}/rtmr3:sha384", hashlib.sha384(self.register(3) + digest).digest())

    def entries(self) -> list[str]:
        return sorted(entry.name for entry in (self.root / reports.REPORTS).iterdir())

    def make(self, path: str) -> None:
        if not self.provider:
            raise OSError(errno.ENXIO, "No such device or address", path)
        super().make(path)
        self.calls.append(f"mkdir {path}")
        for name, data in {
            "provider": self.provider.encode(),
            "generation": b"0\n",
            "inblob": b"",
            "outblob": b"",
        }.items():
            self.put(f"{path}/{name}", data)

    def remove(self, path: str) -> None:
        for file in (self.root / path).iterdir():  # configfs takes an item's attributes along
            file.unlink()
        super().remove(path)
        self.calls.append(f"rmdir {path}")

    def write(self, path: str, data: bytes) -> None:
        if path.endswith("/inblob"):
            if not self.lost_write:
                super().write(path, data)
                self._written(path)
            return
        if path.startswith(registers.MEASUREMENTS):
            self._extend(path, data)
            return
        raise PermissionError(errno.EACCES, "Permission denied", path)

    def read(self, path: str, *, max_bytes: int) -> bytes:
        if path.endswith("/outblob"):
            self._make_quote(path)
        return super().read(path, max_bytes=max_bytes)

    def _written(self, path: str) -> None:
        entry = path.rpartition("/")[0]
        count = int((self.root / entry / "generation").read_text()) + 1
        self.put(f"{entry}/generation", b"%d\n" % count)

    def _extend(self, path: str, data: bytes) -> None:
        if self.write_error or len(data) != 48:
            raise OSError(self.write_error or errno.EINVAL, "write refused", path)
        before = (self.root / path).read_bytes()
        super().write(path, data)
        after = before if self.write_does_nothing else hashlib.sha384(before + data).digest()
        self.put(path, after)

    def _make_quote(self, path: str) -> None:
        entry = path.rpartition("/")[0]
        if self.quote_error:
            raise OSError(self.quote_error, "GetQuote failed", path)
        if self.second_writer:
            self.put(f"{entry}/inblob", bytes(64))
            self._written(path)
        given = (self.root / entry / "inblob").read_bytes()
        if not given:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        quote = self.answer
        if quote is None:
            quote = sim_evidence.resign(self.cpu, self.cpu.quote(given), rtmr3=self.register(3))
        self.put(path, quote)
