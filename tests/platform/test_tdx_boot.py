"""A whole boot of the `tdx` back end over a fake kernel and a fake NVML, up to a verifier's word on it.

Nothing here is evidence of hardware, and no verifier takes it for that: under a simulated root the name `tdx` is
refused, and under Intel's root the quote is. Under the name `sim` the same bytes pass every step, which shows that what
this back end gives is what a verifier asks for.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from fake_kernel import FakeKernel
from fake_nvml import FakeNvml

import sim_evidence
from countermark.appraise import TLS_GROUP, TLS_VERSION, Scope, appraise
from countermark.binding import Connection
from countermark.errors import ConfigError, GpuError, QuoteError
from countermark.formats import eventlog
from countermark.formats.boot_events import parse_boot_log
from countermark.formats.evidence import PlatformName, encode_evidence, parse_evidence
from countermark.formats.quote import parse_quote
from countermark.formats.report_data import Purpose, gpu_nonce, report_data
from countermark.formats.spdm import parse_report
from countermark.numerics import CURRENT
from countermark.policy import INTEL_SGX_ROOT
from countermark_appliance.config import Config, parse_config
from countermark_appliance.platform import endorsements, sim
from countermark_appliance.platform.attester import Attester, LogHead, boot_values, extend_boot, extend_ready
from countermark_appliance.platform.base import open_platform
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.platform.nvml import Nvml
from countermark_appliance.platform.tdx import machine, reports
from sim_evidence import CONFIG, KERNELS, NOW, WEIGHTS

NONCE, EXPORTER = b"n" * 32, b"e" * 32
LOG = LogHead(origin="test/boot", size=0, root=hashlib.sha256(b"").digest())
NODE = """
[node]
operator = "test.example"
[platform]
name = "tdx"
[endorsements]
dir = "endorsements"
[weights]
dir = "weights"
root = "{root}"
[log]
dir = "log"
[engine]
device = "{device}"
"""


class Cached:
    def current(self):
        return sim_evidence.machine(gpus=2).endorsements


def config(tmp_path, *, device: str = "cuda") -> Config:
    return parse_config(NODE.format(root=WEIGHTS.hex(), device=device).encode(), base=tmp_path)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The machine that is found: (kernel, NVML)."""
    state = sim_evidence.machine(gpus=2)
    kernel, library = FakeKernel(tmp_path / "root", state), FakeNvml(state)
    monkeypatch.setattr(machine, "Sysfs", lambda: kernel)
    monkeypatch.setattr(endorsements, "open_endorsements", lambda _config, _quote, _gpus: Cached())
    monkeypatch.setattr(Nvml.__init__, "__defaults__", (lambda: library,))
    return kernel, library


def started(tmp_path):
    platform, keys = open_platform(config(tmp_path)), Keyring()
    boot = boot_values(platform, keys, config=CONFIG, weights_root=WEIGHTS, profile=CURRENT, kernel_digest=KERNELS)
    extend_boot(platform, boot)
    platform.admit_gpus()
    extend_ready(platform, boot)
    return platform, keys, boot, Attester(platform, keys, boot)


def test_a_whole_boot(host, tmp_path):
    kernel, library = host
    platform, keys, boot, attester = started(tmp_path)
    assert library.is_ready
    evidence = parse_evidence(attester.attest(purpose=Purpose.SESSION, nonce=NONCE, exporter=EXPORTER, log=LOG))
    assert evidence.platform is PlatformName.TDX
    assert parse_boot_log(evidence.rtmr3_log) == boot
    assert boot.image_id == kernel.cpu.image_id
    body = parse_quote(evidence.quote).body
    assert eventlog.replay(eventlog.parse_event_log(evidence.rtmr3_log).events)[3] == body.rtmr3 == kernel.register(3)
    assert eventlog.replay(eventlog.parse_event_log(evidence.ccel).events)[:3] == body.rtmrs[:3]
    assert body.report_data == report_data(evidence.claims)
    assert {parse_report(gpu.report).nonce for gpu in evidence.gpu} == {gpu_nonce(NONCE, keys.tls_spki())}
    assert len(evidence.gpu) == len(boot.gpus) == 2
    platform.check_unchanged()


def test_the_gpus_take_no_work_before_rtmr3_names_them(host, tmp_path):
    _, library = host
    platform, keys = open_platform(config(tmp_path)), Keyring()
    boot = boot_values(platform, keys, config=CONFIG, weights_root=WEIGHTS, profile=CURRENT, kernel_digest=KERNELS)
    extend_boot(platform, boot)
    assert not library.is_ready
    assert "nvmlSystemSetConfComputeGpusReadyState" not in library.calls


def test_a_gpu_that_leaves_is_noticed(host, tmp_path):
    _, library = host
    platform, *_ = started(tmp_path)
    platform.check_unchanged()
    library.gpus.pop()
    with pytest.raises(GpuError) as refused:
        platform.check_unchanged()
    assert refused.value.code == "gpu.changed"


def test_a_verifier_takes_these_bytes_for_what_they_are(host, tmp_path):
    state = sim_evidence.machine(gpus=2)
    policy = sim_evidence.policy_for(state)
    _, keys, _, attester = started(tmp_path)
    evidence = attester.attest(purpose=Purpose.SESSION, nonce=NONCE, exporter=EXPORTER, log=LOG)
    connection = Connection(
        nonce=NONCE, exporter=EXPORTER, peer_spki=keys.tls_spki(), group=TLS_GROUP, version=TLS_VERSION
    )
    with pytest.raises(QuoteError) as refused:
        appraise(evidence, policy, now=NOW, connection=connection)
    assert (refused.value.code, refused.value.step) == ("quote.platform", "2")
    with pytest.raises(QuoteError) as refused:
        appraise(evidence, replace(policy, tdx_root=INTEL_SGX_ROOT), now=NOW, connection=connection)
    assert (refused.value.code, refused.value.step) == ("quote.root", "2")
    with pytest.raises(QuoteError) as refused:
        appraise(evidence, policy, now=NOW, scope=Scope.BUNDLE)
    assert refused.value.code == "quote.platform"
    honest = encode_evidence(replace(parse_evidence(evidence), platform=PlatformName.SIM))
    verdict = appraise(honest, policy, now=NOW, connection=connection)
    assert verdict.simulated
    assert len(verdict.gpu) == 2


def test_no_gpu_is_asked_where_the_cpu_computes(host, tmp_path):
    _, library = host
    library.gpus.clear()
    platform = open_platform(config(tmp_path, device="cpu"))
    assert platform.gpu_identities() == ()
    assert library.calls == []


def test_a_gpu_that_is_not_confidential_ends_the_start(host, tmp_path):
    kernel, library = host
    library.cc_feature = 0
    with pytest.raises(GpuError) as refused:
        open_platform(config(tmp_path))
    assert (refused.value.code, refused.value.exit_code) == ("gpu.cc_off", 14)
    assert not library.is_ready
    assert kernel.register(3) == bytes(48)


def test_on_sim_nobody_asks_for_the_mode_of_a_gpu(tmp_path, monkeypatch):
    """`sim` starts with device cuda and never asks NVML; what it hands out says simulated."""
    monkeypatch.setattr(Nvml.__init__, "__defaults__", (lambda: pytest.fail("NVML was asked"),))
    sim.create(tmp_path / "sim", now=NOW)
    text = NODE.replace('name = "tdx"', 'name = "sim"\nstate = "sim"').format(root=WEIGHTS.hex(), device="cuda")
    platform = open_platform(parse_config(text.encode(), base=tmp_path))
    platform.admit_gpus()
    platform.check_unchanged()
    assert platform.name.simulated
    assert platform.vbios is None


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"tdx"', '"vtpm"', "platform.state"),
        ('"tdx"', '"sgx"', "platform.unknown"),
        ('"tdx"', '"sim"', "platform.state"),
        ('"tdx"', '"sim"\nstate = "absent"', "platform.state"),
    ],
)
def test_open_platform_refuses(tmp_path, old, new, code):
    text = NODE.replace(old, new).format(root=WEIGHTS.hex(), device="cpu")
    with pytest.raises(ConfigError) as refused:
        open_platform(parse_config(text.encode(), base=tmp_path))
    assert refused.value.code == code


@pytest.mark.skipif(Path("/", reports.REPORTS).exists(), reason="this may be a TDX guest")
def test_this_machine_is_no_tdx_guest(tmp_path):
    """The real files of wherever this runs."""
    with pytest.raises(ConfigError) as refused:
        open_platform(config(tmp_path, device="cpu"))
    assert refused.value.code == "platform.tsm_missing"
