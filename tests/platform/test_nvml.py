"""Our NVML calls against NVIDIA's own binding, and every GPU the appliance refuses to start with."""

import ctypes
import hashlib

import pynvml
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fake_nvml import FakeNvml

import sim_evidence
import vectors
from countermark.errors import GpuError, Unavailable
from countermark.formats.spdm import parse_report
from countermark_appliance.platform import nvml
from countermark_appliance.platform.nvml import Nvml, NvmlError
from countermark_appliance.platform.nvml_gpus import ConfidentialGpus, open_gpus

NONCE = bytes(range(32))


@pytest.fixture
def fake() -> FakeNvml:
    return FakeNvml(sim_evidence.machine(gpus=2))


def opened(fake: FakeNvml) -> ConfidentialGpus:
    return open_gpus(lambda: Nvml(lambda: fake))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nvml.Caps, pynvml.c_nvmlConfComputeSystemCaps_t),
        (nvml.State, pynvml.c_nvmlConfComputeSystemState_t),
        (nvml.SettingsV1, pynvml.c_nvmlSystemConfComputeSettings_v1_t),
        (nvml.Certificates, pynvml.c_nvmlConfComputeGpuCertificate_t),
        (nvml.AttestationReport, pynvml.c_nvmlConfComputeGpuAttestationReport_t),
    ],
)
def test_structures_are_nvidias(ours, theirs):
    def layout(kind):
        parts = [getattr(kind, name) for name, _ in kind._fields_]
        return [(name, part.offset, part.size) for (name, _), part in zip(kind._fields_, parts, strict=True)]

    assert layout(ours) == layout(theirs)
    assert ctypes.sizeof(ours) == ctypes.sizeof(theirs)


def test_constants_are_nvidias():
    assert ctypes.sizeof(nvml.SettingsV1) | 1 << 24 == pynvml.nvmlSystemConfComputeSettings_v1
    assert (nvml.FEATURE_DISABLED, nvml.DEVTOOLS_OFF, nvml.ENVIRONMENT_PRODUCTION) == (
        pynvml.NVML_CC_SYSTEM_FEATURE_DISABLED,
        pynvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF,
        pynvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD,
    )
    assert nvml.MULTIGPU_PROTECTED_PCIE == pynvml.NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE
    assert nvml.READY == pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE
    assert (nvml.NOT_SUPPORTED, nvml.FUNCTION_NOT_FOUND) == (
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    )
    assert nvml.NONCE_BYTES == pynvml.NVML_CC_GPU_CEC_NONCE_SIZE
    numbers = {value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}
    assert set(nvml._RETURNS) <= numbers


def test_the_same_answers_as_nvidias_binding(fake, monkeypatch):
    """Both read the same library; theirs is the oracle for ours and for the fake."""
    monkeypatch.setattr(pynvml, "nvmlLib", fake)
    ours = Nvml(lambda: fake)
    theirs = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    fake.multi_gpu = pynvml.NVML_CC_SYSTEM_MULTIGPU_NVLE
    settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
    assert pynvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings)) == 0
    found = ours.settings()
    assert (found.environment, found.cc_feature, found.devtools, found.multi_gpu) == (
        settings.environment,
        settings.ccFeature,
        settings.devToolsMode,
        settings.multiGpuMode,
    )
    state = pynvml.nvmlSystemGetConfComputeState()
    assert (ours.state().environment, ours.state().cc_feature) == (state.environment, state.ccFeature)
    caps = pynvml.nvmlSystemGetConfComputeCapabilities()
    assert ours.capabilities() == (caps.cpuCaps, caps.gpusCaps)
    assert ours.driver_version() == pynvml.nvmlSystemGetDriverVersion()
    assert not ours.ready()
    pynvml.nvmlSystemSetConfComputeGpusReadyState(pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE)
    assert ours.ready()
    for device, handle in zip(ours.devices(), theirs, strict=True):
        assert ours.uuid(device) == pynvml.nvmlDeviceGetUUID(handle)
        assert ours.vbios_version(device) == pynvml.nvmlDeviceGetVbiosVersion(handle)
        certificate = pynvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
        chain = bytes(certificate.attestationCertChain[: certificate.attestationCertChainSize])
        assert ours.attestation_chain(device) == chain
        report = pynvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, NONCE)
        assert parse_report(bytes(report.attestationReport[: report.attestationReportSize])).nonce == NONCE
        assert parse_report(ours.attestation_report(device, NONCE)).nonce == NONCE
    ours.close()
    assert fake.calls[-1] == "nvmlShutdown"


def test_identities_and_evidence_stand_in_one_order(fake):
    fake.gpus.sort(key=lambda gpu: gpu.device_key_digest(), reverse=True)  # NVML's order is not ours
    gpus = opened(fake)
    assert [one.device_key for one in gpus.identities] == sorted(gpu.device_key_digest() for gpu in fake.gpus)
    assert {(one.mode, one.devtools) for one in gpus.identities} == {("cc-on", False)}
    evidence = gpus.evidence(NONCE)
    for item, identity in zip(evidence, gpus.identities, strict=True):
        leaf = x509.load_der_x509_certificate(item.certs[0]).public_key()
        spki = leaf.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert hashlib.sha256(spki).digest() == identity.device_key
        assert parse_report(item.report).nonce == NONCE
    assert {item.certs[1:] for item in evidence} == {gpu.chain(fake.vendor)[1:] for gpu in fake.gpus}
    assert gpus.vbios == "00.00.00.00.00"


@pytest.mark.parametrize(
    ("bend", "mode"),
    [
        ({"multi_gpu": 0}, "cc-on"),
        ({"multi_gpu": 2}, "cc-on"),
        ({"cc_feature": 0, "multi_gpu": 1}, "protected-pcie"),
    ],
)
def test_modes(fake, bend, mode):
    vars(fake).update(bend)
    assert {one.mode for one in opened(fake).identities} == {mode}


def test_a_driver_without_the_settings_call(fake):
    fake.missing = {"nvmlSystemGetConfComputeSettings"}
    assert {one.mode for one in opened(fake).identities} == {"cc-on"}
    fake.cc_feature = 0
    with pytest.raises(GpuError) as refused:
        opened(fake)
    assert refused.value.code == "gpu.cc_off"


REFUSED = [
    ("gpu.cc_off", {"cc_feature": 0}),
    ("gpu.cc_off", {"errors": {"nvmlSystemGetConfComputeSettings": pynvml.NVML_ERROR_NOT_SUPPORTED}}),
    ("gpu.devtools", {"devtools": 1, "environment": 1}),
    ("gpu.environment", {"environment": 1}),
    ("gpu.environment", {"environment": 0}),
    ("gpu.none", {"gpus": []}),
    ("gpu.library", {"errors": {"nvmlInit_v2": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}}),
    ("gpu.nvml", {"errors": {"nvmlDeviceGetUUID": pynvml.NVML_ERROR_GPU_IS_LOST}}),
    ("gpu.nvml", {"errors": {"nvmlSystemGetConfComputeSettings": pynvml.NVML_ERROR_UNKNOWN}}),
    ("gpu.nvml", {"missing": {"nvmlDeviceGetConfComputeGpuCertificate"}}),
    ("gpu.certificate", {"chain_text": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}),
    ("gpu.certificate", {"chain_text": b"no certificate"}),
]


@pytest.mark.parametrize(("code", "bend"), REFUSED, ids=[f"{code}-{n}" for n, (code, _) in enumerate(REFUSED)])
def test_refused_at_start(fake, code, bend):
    vars(fake).update(bend)
    with pytest.raises(GpuError) as refused:
        opened(fake)
    assert (refused.value.code, refused.value.exit_code) == (code, 14)


def test_a_repeated_gpu_and_too_many(fake):
    fake.gpus = [fake.gpus[0], fake.gpus[0]]
    with pytest.raises(GpuError) as refused:
        opened(fake)
    assert refused.value.code == "gpu.duplicate"
    fake.gpus = fake.gpus[:1] * 17
    with pytest.raises(GpuError) as refused:
        opened(fake)
    assert refused.value.code == "gpu.count"


def test_no_library_on_this_machine():
    def load():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    with pytest.raises(GpuError) as refused:
        open_gpus(lambda: Nvml(load))
    assert refused.value.code == "gpu.library"


@pytest.mark.parametrize(
    "bend",
    [
        {"errors": {"nvmlDeviceGetConfComputeGpuAttestationReport": pynvml.NVML_ERROR_TIMEOUT}},
        {"nonce": b"x" * 32},
        {"report_size": 0},
        {"report_size": 0x2001},
        {"report_size": 100},
    ],
)
def test_a_report_that_does_not_come(fake, bend):
    gpus = opened(fake)
    vars(fake).update(bend)
    with pytest.raises(Unavailable) as refused:
        gpus.evidence(NONCE)
    assert refused.value.code == "gpu.report"


@pytest.mark.parametrize("size", [0, 0x2001, 0xFFFFFFFF])
def test_a_size_that_the_structure_cannot_have(fake, size):
    fake.report_size = size
    library = Nvml(lambda: fake)
    with pytest.raises(NvmlError) as failed:
        library.attestation_report(library.devices()[0], NONCE)
    assert failed.value.number == pynvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_gpus_are_not_ready_until_admitted(fake):
    gpus = opened(fake)
    assert not fake.is_ready
    gpus.check_unchanged()  # before: nothing is expected of the ready state
    gpus.admit()
    assert fake.is_ready
    gpus.check_unchanged()


@pytest.mark.parametrize(
    "bend",
    [
        {"errors": {"nvmlSystemSetConfComputeGpusReadyState": pynvml.NVML_ERROR_NOT_SUPPORTED}},
        {"_nvmlSystemSetConfComputeGpusReadyState": lambda _ready: 0},
    ],
)
def test_a_ready_state_that_does_not_stay(fake, bend):
    gpus = opened(fake)
    vars(fake).update(bend)
    with pytest.raises(GpuError) as refused:
        gpus.admit()
    assert refused.value.code == "gpu.ready_state"


CHANGES = {
    "another GPU": lambda fake: fake.gpus.__setitem__(0, sim_evidence.machine(gpus=1).gpus[0]),
    "one less": lambda fake: fake.gpus.pop(),
    "one more": lambda fake: fake.gpus.append(sim_evidence.machine(gpus=1).gpus[0]),
    "mode off": lambda fake: setattr(fake, "cc_feature", 0),
    "devtools": lambda fake: setattr(fake, "devtools", 1),
    "driver": lambda fake: setattr(fake, "driver", "1.0"),
    "not ready": lambda fake: setattr(fake, "is_ready", False),
    "lost": lambda fake: fake.errors.update(nvmlDeviceGetUUID=pynvml.NVML_ERROR_GPU_IS_LOST),
    "reset": lambda fake: fake.errors.update(nvmlDeviceGetHandleByIndex_v2=pynvml.NVML_ERROR_RESET_REQUIRED),
    "hangs up": lambda fake: fake.errors.update(nvmlDeviceGetCount_v2=pynvml.NVML_ERROR_UNINITIALIZED),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(fake, change):
    gpus = opened(fake)
    gpus.admit()
    gpus.check_unchanged()
    change(fake)
    with pytest.raises(GpuError) as refused:
        gpus.check_unchanged()
    assert refused.value.code == "gpu.changed"


def test_the_order_of_the_same_gpus_may_change(fake):
    gpus = opened(fake)
    fake.gpus.reverse()
    gpus.check_unchanged()


def test_an_error_names_the_call_and_the_number(fake):
    fake.errors = {"nvmlDeviceGetCount_v2": 15}
    with pytest.raises(NvmlError) as failed:
        Nvml(lambda: fake).devices()
    assert (failed.value.call, failed.value.number) == ("nvmlDeviceGetCount_v2", 15)


def test_a_genuine_chain_is_read(fake):
    """NVIDIA's chain of a real H100, in the form NVML gives it."""
    fake.gpus = fake.gpus[:1]
    fake.chain_text = vectors.read("nvidia/h100-550/hopperCertChain.txt")
    (gpu,) = opened(fake)._gpus
    assert len(gpu.chain) == 5
    subjects = [x509.load_der_x509_certificate(der).subject.rfc4514_string() for der in gpu.chain]
    assert "GSP FMC LF" in subjects[0]
    assert "Device Identity CA" in subjects[-1]
