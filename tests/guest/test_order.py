"""The order of a start with GPUs: attested, named in RTMR3, let to work, weights, self-test, `system-ready`, port.

The kernel is a directory and NVML a stand-in (tests/platform); the engine is left out, its construction is its
self-test. Each failure on the way ends the start before a port is open.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "platform"))

from fake_kernel import FakeKernel
from fake_nvml import FakeNvml

import sim_evidence
from countermark.errors import CountermarkError, GpuError, MeasurementError, VerificationError, WeightsError
from countermark.formats import cbor
from countermark.formats.boot_events import NAMES, parse_boot_log
from countermark_appliance import main
from countermark_appliance.platform import endorsements
from countermark_appliance.platform.nvml import Nvml
from countermark_appliance.platform.tdx import machine, registers

ROOT = bytes(range(32))
NODE = f"""[node]
operator = "test.example"
[platform]
name = "tdx"
[endorsements]
dir = "endorsements"
[weights]
dir = "weights"
root = "{ROOT.hex()}"
[log]
dir = "log"
[engine]
device = "cuda"
"""


class PortOpened(Exception):
    """Far enough."""


class Start:
    """What happens, in order, while `main.serve` runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = sim_evidence.machine(gpus=2)
        self.steps: list[str] = []
        self.kernel, self.library = FakeKernel(folder / "root", state), FakeNvml(state)
        self.failing: dict[str, CountermarkError] = {}
        self.config = folder / "node.toml"
        self.config.write_text(NODE)
        self.platform = None
        write, extended = self.kernel.write, iter(NAMES)

        def spied(path: str, data: bytes) -> None:
            if path == f"{registers.MEASUREMENTS}/rtmr3:sha384":
                self._step(f"extend {next(extended)}")
            write(path, data)

        monkeypatch.setattr(self.kernel, "write", spied)
        ready = FakeNvml._nvmlSystemSetConfComputeGpusReadyState
        report = FakeNvml._nvmlDeviceGetConfComputeGpuAttestationReport

        def set_ready(library, *arguments):
            self._step("GPUs may work")
            return ready(library, *arguments)

        def attested(library, *arguments):
            if not self.steps:
                self._step("GPUs attested")
            return report(library, *arguments)

        monkeypatch.setattr(FakeNvml, "_nvmlSystemSetConfComputeGpusReadyState", set_ready)
        monkeypatch.setattr(FakeNvml, "_nvmlDeviceGetConfComputeGpuAttestationReport", attested)
        monkeypatch.setattr(machine, "Sysfs", lambda: self.kernel)
        source = SimpleNamespace(current=lambda: state.endorsements)
        monkeypatch.setattr(endorsements, "open_endorsements", lambda *_: source)
        monkeypatch.setattr(Nvml.__init__, "__defaults__", (lambda: self.library,))
        monkeypatch.setattr(main.signal, "signal", lambda *_: None)
        monkeypatch.setattr(main.weights, "load", self._load)
        monkeypatch.setattr(main, "Engine", self._engine)
        monkeypatch.setattr(main.Recorder, "open", self._begin_log)
        monkeypatch.setattr(main.FrontEnd, "start", self._open_port)

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.failing:
            raise self.failing[name]

    def _load(self, _directory: Path, *, expected_root: bytes) -> object:
        assert expected_root == ROOT
        self._step("weights")
        return object()

    def _engine(self, *_args: object, **_options: object) -> object:
        self._step("self-test")
        info = SimpleNamespace(model="m", profile="p", backend="b")
        return SimpleNamespace(info=info, close=lambda: self.steps.append("engine closed"))

    def _begin_log(self, *_args: object, **_options: object) -> object:
        self._step("log")
        raise PortOpened

    def _open_port(self, **_options: object) -> None:
        raise AssertionError("a port before the log")

    def run(self) -> None:
        main.serve(self.config, ready=lambda _: pytest.fail("ready"))


@pytest.fixture
def start(tmp_path, monkeypatch):
    return Start(tmp_path, monkeypatch)


ORDER = [
    "GPUs attested",
    *(f"extend {name}" for name in NAMES[:-1]),
    "GPUs may work",
    "weights",
    "self-test",
    "extend system-ready",
    "log",
]


def test_a_start(start, monkeypatch):
    monkeypatch.setattr(main, "_stack", lambda *_: None)
    with pytest.raises(PortOpened):
        start.run()
    assert start.steps == [*ORDER, "engine closed"]
    assert NAMES[4] == "gpu"
    assert start.library.is_ready


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("weights", WeightsError("x", code="weights.block")),
        ("self-test", VerificationError("x", code="engine.self_test")),
        ("extend system-ready", MeasurementError("x", code="platform.rtmr3_extend")),
    ],
)
def test_what_fails_ends_it(start, step, error):
    """RTMR3 then has no `system-ready`, which every verifier asks for."""
    start.failing[step] = error
    with pytest.raises(type(error)):
        start.run()
    assert start.steps[: ORDER.index(step) + 1] == ORDER[: ORDER.index(step) + 1]
    assert "log" not in start.steps


def test_gpus_that_the_driver_does_not_let_work(start):
    start.library.errors["nvmlSystemSetConfComputeGpusReadyState"] = 999
    with pytest.raises(GpuError) as refused:
        start.run()
    assert refused.value.code == "gpu.ready_state"
    assert start.steps == ORDER[: ORDER.index("GPUs may work")]


@pytest.mark.parametrize("change", [lambda nvml: setattr(nvml, "cc_feature", 0), lambda nvml: nvml.gpus.clear()])
def test_gpus_that_are_not_confidential_measure_nothing(start, change):
    change(start.library)
    with pytest.raises(GpuError):
        start.run()
    assert start.steps == []
    assert start.kernel.register(3) == bytes(48)


def test_every_event_is_one_of_the_boots(start, monkeypatch):
    monkeypatch.setattr(main, "_stack", lambda *_: None)
    seen = []
    monkeypatch.setattr(main, "extend_ready", lambda platform, boot: seen.append((platform.rtmr3_log(), boot)))
    with pytest.raises(PortOpened):
        start.run()
    log, boot = seen[0]
    with pytest.raises(CountermarkError):
        parse_boot_log(log)  # not complete before the last event
    assert len(boot.gpus) == 2
    assert cbor.decode(cbor.encode([gpu.mode for gpu in boot.gpus])) == ["cc-on", "cc-on"]
