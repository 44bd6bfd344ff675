"""The captured tables are what QEMU gives again: image/shapes/capture --check, with the tools root of the image."""

import subprocess
import sys

import pytest

from measurements.predict.artefacts import ROOT, SHAPES

TOOLS = ROOT / "image" / "cache" / "tools"


@pytest.mark.system
@pytest.mark.slow
def test_tables_are_captured_again_as_they_were():
    if not (TOOLS / "usr/bin/qemu-system-x86_64").exists():
        pytest.skip(f"no tools root at {TOOLS}: run `make image` once")
    call = (sys.executable, SHAPES / "capture", "--check", "--tools", TOOLS, SHAPES / "q35-2cpu-3g.toml")
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as captured before" in done.stdout
