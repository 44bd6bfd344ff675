"""The script for machines with a GPU, run against the fake NVML: it must work there at the first try."""

import json
import runpy
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FakeNvml

import sim_evidence
from countermark_appliance.platform import nvml, nvml_gpus
from countermark_appliance.platform.nvml import Nvml

SCRIPT = Path(__file__).parents[1] / "hardware" / "nvml_cc_off.py"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(fake: FakeNvml | None) -> tuple[int, dict[str, object]]:
        def load():
            if fake is None:
                raise OSError("cannot open shared object file")
            return fake

        monkeypatch.setattr(Nvml.__init__, "__defaults__", (load,))
        monkeypatch.setattr(nvml_gpus.open_gpus, "__defaults__", (Nvml,))
        code = runpy.run_path(str(SCRIPT))["main"]()
        return code, json.loads(capsys.readouterr().out)

    return run


def test_a_gpu_without_confidential_mode(run):
    fake = FakeNvml(sim_evidence.machine(gpus=2))
    fake.cc_feature = fake.environment = 0
    fake.errors = {
        "nvmlDeviceGetConfComputeGpuCertificate": pynvml.NVML_ERROR_NOT_SUPPORTED,
        "nvmlDeviceGetConfComputeGpuAttestationReport": pynvml.NVML_ERROR_NOT_SUPPORTED,
    }
    code, found = run(fake)
    assert code == 0
    assert found["refused"] == "gpu.cc_off"
    assert found["settings"] == {"environment": 0, "cc_feature": 0, "devtools": 0, "multi_gpu": 0, "mode": "cc-off"}
    assert [gpu["report"]["error"] for gpu in found["gpus"]] == [3, 3]
    assert "SIMULATED" not in json.dumps(found["gpus"])  # no identifier of the machine


def test_a_driver_that_knows_no_confidential_gpu(run):
    fake = FakeNvml(sim_evidence.machine(gpus=1))
    fake.errors = dict.fromkeys(("nvmlSystemGetConfComputeSettings",), pynvml.NVML_ERROR_NOT_SUPPORTED)
    code, found = run(fake)
    assert (code, found["refused"], found["settings"]["error"]) == (0, "gpu.cc_off", 3)


def test_a_confidential_gpu(run):
    code, found = run(FakeNvml(sim_evidence.machine(gpus=1)))
    assert (code, found["refused"], found["settings"]["mode"]) == (1, "accepted", "cc-on")
    assert found["gpus"][0]["report"]["bytes"] > 1000


def test_no_driver(run):
    code, found = run(None)
    assert (code, list(found)) == (2, ["nvml"])


@pytest.mark.gpu
def test_this_gpu_is_refused_unless_it_is_confidential(capsys):
    """On a machine with NVIDIA's driver: without confidential mode the appliance's code is `gpu.cc_off`."""
    code = runpy.run_path(str(SCRIPT))["main"]()
    found = json.loads(capsys.readouterr().out)
    assert code in (0, 1)
    assert (found["refused"] == "gpu.cc_off") is (code == 0)


def test_it_needs_no_package(tmp_path):
    """With the standard library and this repository alone."""
    import subprocess
    import sys

    root = SCRIPT.parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-E",
            "-c",
            f"import sys; sys.path[:0] = ['{root}/appliance', '{root}/client'];"
            f"import runpy; sys.exit(runpy.run_path('{SCRIPT}')['main']())",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1, 2), done.stderr
    assert nvml.LIBRARY in done.stdout or "driver" in done.stdout
