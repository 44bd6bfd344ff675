"""The vtpm platform over the event log and PCRs of a real boot (tests/data/tpmlog), and over bent ones."""

import hashlib
import json
from pathlib import Path

import pytest
from machine_helpers import machine

from countermark.errors import ConfigError, MeasurementError
from countermark.formats.eventlog import parse_event_log, replay
from countermark.formats.evidence import PlatformName
from countermark.formats.quote import parse_quote
from countermark_appliance.config import parse_config
from countermark_appliance.platform import base, sim
from countermark_appliance.platform.image import CMDLINE
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.vtpm import machine as vtpm_machine
from countermark_appliance.platform.vtpm import open_vtpm, tpm

DATA = Path(__file__).parents[1] / "data" / "tpmlog"
ROOTHASH = "ab" * 32
# Extended by Linux's IMA, without an event in the firmware's log.
IMA = 10


def pcrs() -> dict[int, bytes]:
    """The SHA-384 bank as the TPM of that boot had it."""
    values = json.loads((DATA / "expected.json").read_text())["tpm_sha384"]
    return {int(index): bytes.fromhex(value) for index, value in values.items()}


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The files of a guest with that TPM; the simulated machine is made once and not read from a disk."""
    monkeypatch.setattr(vtpm_machine, "load", lambda _state: machine())
    (tmp_path / tpm.LOG).parent.mkdir(parents=True)
    (tmp_path / tpm.LOG).write_bytes((DATA / "binary_bios_measurements.bin").read_bytes())
    (tmp_path / tpm.PCRS).mkdir(parents=True)
    for index, value in pcrs().items():
        (tmp_path / tpm.PCRS / str(index)).write_text(value.hex().upper() + "\n")
    (tmp_path / CMDLINE).parent.mkdir(parents=True)
    (tmp_path / CMDLINE).write_text(f"quiet roothash={ROOTHASH}\n")
    return Sysfs(tmp_path)


def test_the_quote_has_the_registers_of_the_boot(kernel):
    platform = open_vtpm(Path("state"), kernel)
    body = parse_quote(platform.quote(bytes(64))).body
    assert (platform.name, platform.name.simulated) == (PlatformName.VTPM, True)
    assert platform.image_id.hex() == ROOTHASH
    assert body.mrtd == pcrs()[0]
    log = parse_event_log(platform.ccel())
    assert {event.register for event in log.events} == {1, 2, 3}
    assert replay(log.events)[:3] == body.rtmrs[:3]
    # RTMR2 has PCRs 8 to 15 in the log's order, so it can be folded from the log alone; PCR 7's events open RTMR0.
    again = bytes(48)
    for event in log.events:
        if event.register == 1 and event.extends:
            again = hashlib.sha384(again + event.digest).digest()
    assert body.rtmr0 == again != bytes(48)
    assert body.rtmr3 == bytes(48)
    platform.check_unchanged()


def test_rtmr3_and_gpus_are_the_simulated_ones(kernel):
    platform = open_vtpm(Path("state"), kernel)
    platform.extend_rtmr3(0x434D0001, b"one")
    assert (
        parse_quote(platform.quote(bytes(64))).body.rtmr3
        == hashlib.sha384(bytes(48) + hashlib.sha384(b"one").digest()).digest()
    )
    assert platform.gpu_identities() == sim.boot(machine()).gpu_identities()


def test_two_boots_of_one_log_are_alike(kernel):
    first, second = (parse_quote(open_vtpm(Path("state"), kernel).quote(bytes(64))).body for _ in range(2))
    assert first.rtmrs == second.rtmrs
    assert first.mrtd == second.mrtd


@pytest.mark.parametrize("pcr", [pcr for pcr in range(16) if pcr != IMA])
def test_a_pcr_that_the_log_does_not_explain(kernel, pcr):
    (kernel.root / tpm.PCRS / str(pcr)).write_text("11" * 48)
    with pytest.raises(MeasurementError, match=f"PCR {pcr}:") as refused:
        open_vtpm(Path("state"), kernel)
    assert refused.value.code == "platform.tpm_replay"


@pytest.mark.parametrize("pcr", [IMA, 16, 23])
def test_pcrs_that_stand_for_nothing_are_not_compared(kernel, pcr):
    (kernel.root / tpm.PCRS / str(pcr)).write_text("11" * 48)
    open_vtpm(Path("state"), kernel)


def test_a_pcr_extended_after_the_start(kernel):
    platform = open_vtpm(Path("state"), kernel)
    (kernel.root / tpm.PCRS / "15").write_text("22" * 48)
    with pytest.raises(MeasurementError) as refused:
        platform.check_unchanged()
    assert refused.value.code == "platform.tpm_replay"


def edited(kernel: Sysfs, change) -> None:
    path = kernel.root / tpm.LOG
    path.write_bytes(change(path.read_bytes()))


def event(pcr: int, event_type: int = 0xD) -> bytes:
    """A TCG_PCR_EVENT2 with the two banks of that log."""
    banks = b"\x0b\x00" + bytes(32) + b"\x0c\x00" + bytes(48)
    return pcr.to_bytes(4, "little") + event_type.to_bytes(4, "little") + b"\x02\0\0\0" + banks + b"\x01\0\0\0x"


@pytest.mark.parametrize(
    ("change", "code", "kind"),
    [
        (lambda data: data + event(12), "platform.tpm_replay", MeasurementError),
        (lambda data: data[:-1], "platform.tpm_log", ConfigError),
        (lambda data: b"", "platform.tpm_log", ConfigError),
        (lambda data: data + event(IMA), "platform.tpm_log", ConfigError),
        (lambda data: data + event(16), "platform.tpm_log", ConfigError),
        (lambda data: data.replace(b"\x0c\x00\x30\x00", b"\x0d\x00\x30\x00"), "platform.tpm_log", ConfigError),
    ],
)
def test_a_log_that_is_refused(kernel, change, code, kind):
    edited(kernel, change)
    with pytest.raises(kind) as refused:
        open_vtpm(Path("state"), kernel)
    assert refused.value.code == code


@pytest.mark.parametrize("gone", [tpm.LOG, f"{tpm.PCRS}/3"])
def test_no_tpm(kernel, gone):
    (kernel.root / gone).unlink()
    with pytest.raises(ConfigError) as refused:
        open_vtpm(Path("state"), kernel)
    assert refused.value.code == "platform.tpm_missing"


def test_a_pcr_that_is_no_digest(kernel):
    (kernel.root / tpm.PCRS / "3").write_text("00\n")
    with pytest.raises(ConfigError) as refused:
        open_vtpm(Path("state"), kernel)
    assert refused.value.code == "platform.tpm_missing"


NODE = """[node]
operator = "test.example"
[platform]
name = "{name}"
state = "state"
[weights]
dir = "weights"
root = "{root}"
[log]
dir = "log"
"""


@pytest.mark.parametrize("name", ["sim", "vtpm"])
def test_a_build_without_simulation(tmp_path, monkeypatch, name):
    """What a production image answers: the packages are not in it."""
    import sys

    for package in ("sim", "vtpm"):
        monkeypatch.setitem(sys.modules, f"countermark_appliance.platform.{package}", None)
        monkeypatch.delattr(f"countermark_appliance.platform.{package}", raising=False)
    with pytest.raises(ConfigError) as refused:
        base.open_platform(parse_config(NODE.format(name=name, root="00" * 32).encode(), base=tmp_path))
    assert refused.value.code == "platform.unavailable"


def test_open_platform_takes_the_state_from_the_config(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("countermark_appliance.platform.vtpm.open_vtpm", found.append)
    base.open_platform(parse_config(NODE.format(name="vtpm", root="00" * 32).encode(), base=tmp_path))
    assert found == [tmp_path / "state"]
