"""What the boot tests share: machines started by `image/boot`, and the commands an operator and a client type.

Nothing here looks into the product: its programs make images, disks, predictions, manifests and policies, and what they
print is what is judged.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[3]
IMAGES: Final = ROOT / "image" / "out"
TOOLS: Final = ROOT / "image" / "cache" / "tools"
SIM_STATE: Final = ROOT / "image" / "cache" / "sim"  # the simulated machine in the test image
SHAPE: Final = ROOT / "image" / "shapes" / "q35-2cpu-3g.toml"
FIRMWARE: Final = TOOLS / "usr" / "share" / "ovmf" / "OVMF.fd"
BOOT_S: Final = 600  # four times what one takes alone on two cores
TAIL_CHARACTERS: Final = 6000
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;=?]*[A-Za-z]|[^\x20-\x7e\n\t]")


class NotReady(Exception):
    """The machine ended, or took too long, before the service listened. Carries the end of its console."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disks:
    """The four disks of a machine."""

    root: Path
    weights: Path
    config: Path
    log: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One that serves."""

    address: str
    serial: Path
    seconds: float  # from the start of image/boot to the ready line

    def console(self) -> str:
        return console(self.serial)


def console(serial: Path) -> str:
    """What the machine wrote to its serial line, without the firmware's escape sequences."""
    return _ESCAPES.sub("", serial.read_text(errors="replace")) if serial.exists() else ""


@contextmanager
def boot(disks: Disks, serial: Path, *, shape: Path = SHAPE, qemu: Sequence[str] = ()) -> Iterator[Machine]:
    """A machine that serves, stopped at the end as Ctrl-C stops it. Raises `NotReady`."""
    command = [sys.executable, str(ROOT / "image" / "boot"), "--shape", str(shape)]
    command += ["--port", "0", "--timeout", str(BOOT_S)]
    for name, option in (("root", "disk"), ("weights", "weights"), ("config", "config"), ("log", "log")):
        command += [f"--{option}", str(getattr(disks, name))]
    started = time.monotonic()
    with serial.with_suffix(".boot").open("w") as said:
        process = subprocess.Popen(
            [*command, "--serial", str(serial), "--", *qemu],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"TMPDIR": str(serial.parent)},  # the TPM's state; its command line then says whose it is
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            took = time.monotonic() - started
            if not line.startswith("ready: "):
                process.wait(30)
                said.flush()
                reason = serial.with_suffix(".boot").read_text().strip()
                raise NotReady(f"{reason}\n--- the end of the console ---\n{console(serial)[-TAIL_CHARACTERS:]}")
            yield Machine(address=line.split()[1], serial=serial, seconds=took)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def children() -> list[str]:
    """Command lines of the machines and TPMs that run from the tools root."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if any(word.startswith(os.fsencode(TOOLS.resolve())) for word in words):
            found.append(b" ".join(words).decode(errors="replace"))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a command of ours left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.out)
        return body


def run(module: str, *arguments: str | Path, timeout_s: float = 300) -> Said:
    """One of the project's commands, as its user types it."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT)
    return Said(code=done.returncode, out=done.stdout, err=done.stderr)


def made(module: str, *arguments: str | Path) -> Said:
    """The same, for a step that must succeed."""
    said = run(module, *arguments)
    assert said.code == 0, f"{module} {' '.join(map(str, arguments))}: exit {said.code}\n{said.out}{said.err}"
    return said


def client(*arguments: str | Path, timeout_s: float = 300) -> Said:
    return run("countermark.cli", *arguments, timeout_s=timeout_s)


def program(file: Path, *arguments: str | Path) -> None:
    """One of image's programs, which must succeed."""
    command = [sys.executable, str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
