"""The measured image in figures: its size, its build, and the time from power-on to serving under QEMU without KVM.

Sizes and build times are those that `image/build` wrote beside each disk; the boots are made here, one after another,
with the stand-in model's weights. Run `make image` first; writes bench/results/image.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from benchlib import built_weights, machine, say

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "image"
RESULT = ROOT / "bench" / "results" / "image.json"
KINDS = ("production", "test")
SHAPE = IMAGE / "shapes" / "q35-2cpu-3g.toml"
CONFIG = """[node]
operator = "bench.example"
listen = "0.0.0.0:8443"
[platform]
name = "vtpm"
state = "/usr/lib/countermark/sim"
[weights]
dir = "/run/countermark/weights"
root = "{root}"
[log]
dir = "/run/countermark/log"
"""


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description="Sizes, build times and boots of the measured image.")
    parser.add_argument("--boots", type=int, default=3)
    boots = parser.parse_args().boots
    result = {
        "machine": {key: value for key, value in machine().items() if key in ("cpu", "cores", "date")},
        "images": {kind: figures(IMAGE / "out" / f"{kind}-cpu") for kind in KINDS},
        "boot": booted(boots),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {RESULT}")


def figures(folder: Path) -> dict[str, Any]:
    """What `image/build` says of one image, in bytes and seconds."""
    built = json.loads((folder / "image.json").read_text())
    sizes = {name: built["sizes"][name] for name in ("disk.raw", "root.erofs", "uki.efi", "rootfs_files")}
    return {"sizes": sizes, "seconds": built["seconds"]}


def booted(boots: int) -> dict[str, Any]:
    """Seconds from the start of image/boot to the line that the service listens."""
    weights = built_weights()
    root = json.loads((weights / "weights.json").read_text())["root"]
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "node.toml").write_text(CONFIG.format(root=root))
        run("disks", "weights", weights, folder / "weights.raw")
        run("disks", "config", folder / "node.toml", folder / "config.raw")
        for count in range(boots):
            run("disks", "log", folder / "log.raw", "--size", 64)
            seconds.append(ready_s(folder))
            say(f"boot {count + 1} of {boots}: ready after {seconds[-1]:.1f} s")
    shape = tomllib.loads(SHAPE.read_text())
    return {
        "model": "SmolLM2-135M",
        "shape": shape["name"],
        "qemu": shape["qemu"]["version"],
        "ready_s": seconds,
        "ready_median_s": statistics.median(seconds),
    }


def run(program: str, *arguments: object) -> None:
    """One of image's programs, which must succeed."""
    subprocess.run([sys.executable, IMAGE / program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def ready_s(folder: Path) -> float:
    """One boot, ended when it is ready. Raises RuntimeError when it is not."""
    disks = ["--disk", IMAGE / "out" / "test-cpu" / "disk.raw"]
    for name in ("weights", "config", "log"):
        disks += [f"--{name}", folder / f"{name}.raw"]
    command = [sys.executable, IMAGE / "boot", *disks, "--shape", SHAPE, "--port", "0", "--serial", folder / "serial"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.fullmatch(r"ready: \S+ after ([0-9.]+) s\n", process.stdout.readline())
        process.terminate()
    if found is None:
        raise RuntimeError("image/boot: not ready")
    return float(found[1])


if __name__ == "__main__":
    main()
