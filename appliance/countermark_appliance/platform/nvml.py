"""NVML's confidential-computing calls, through ctypes and the standard library alone.

Source: NVIDIA's nvml.h of CUDA 12.4 and later ("definitions related to Confidential Computing", with
nvmlSystemConfComputeSettings_v1_t); a test compares every structure and constant with NVIDIA's own Python binding.
NVML_STRUCT_VERSION(T, v) = sizeof(T) | v << 24. Older drivers lack nvmlSystemGetConfComputeSettings; what they say then
comes from nvmlSystemGetConfComputeState, which knows no multi-GPU mode. Protected PCIe is a multi-GPU mode, in which
`ccFeature` is 0.

The binding is our own because it is small, belongs to what is measured, and runs where no package can be installed.
Not checked here: what any of it means for us (`platform.nvml_gpus`), certificates and reports. CEC reports, which some
boards give beside the GPU's, are not read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

LIBRARY: Final = "libnvidia-ml.so.1"
NONCE_BYTES: Final = 0x20
FEATURE_DISABLED: Final = 0
MULTIGPU_PROTECTED_PCIE: Final = 1
ENVIRONMENT_PRODUCTION: Final = 2
DEVTOOLS_OFF: Final = 0
READY: Final = 1
NOT_SUPPORTED: Final = 3
FUNCTION_NOT_FOUND: Final = 13
_CERT_CHAIN_BYTES: Final = 0x1000
_ATTESTATION_CERT_CHAIN_BYTES: Final = 0x1400
_REPORT_BYTES: Final = 0x2000
_CEC_REPORT_BYTES: Final = 0x1000
_DRIVER_VERSION_BYTES: Final = 80
_VBIOS_VERSION_BYTES: Final = 32
_UUID_BYTES: Final = 96
_RETURNS: Final = {
    1: "uninitialized",
    2: "invalid argument",
    3: "not supported",
    4: "no permission",
    6: "not found",
    7: "insufficient size",
    9: "driver not loaded",
    10: "timeout",
    11: "interrupt request issue",
    12: "library not found",
    13: "function not found",
    15: "GPU is lost",
    16: "GPU requires a reset",
    17: "refused by the operating system",
    18: "library and driver differ in version",
    19: "in use",
    25: "argument version mismatch",
    27: "system not ready",
    28: "GPU not found",
    29: "invalid state",
    999: "unknown error",
}

Device = ctypes.c_void_p


class NvmlError(Exception):
    """An NVML call failed. `number` is its nvmlReturn_t; a missing library or function has NVML's own number for it."""

    def __init__(self, call: str, number: int, reason: str = "") -> None:
        super().__init__(f"{call}: {reason or _RETURNS.get(number, 'error')} ({number})")
        self.call = call
        self.number = number


class Caps(ctypes.Structure):
    """nvmlConfComputeSystemCaps_t."""

    _fields_ = (("cpuCaps", ctypes.c_uint), ("gpusCaps", ctypes.c_uint))


class State(ctypes.Structure):
    """nvmlConfComputeSystemState_t."""

    _fields_ = (("environment", ctypes.c_uint), ("ccFeature", ctypes.c_uint), ("devToolsMode", ctypes.c_uint))


class SettingsV1(ctypes.Structure):
    """nvmlSystemConfComputeSettings_v1_t."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("environment", ctypes.c_uint),
        ("ccFeature", ctypes.c_uint),
        ("devToolsMode", ctypes.c_uint),
        ("multiGpuMode", ctypes.c_uint),
    )


class Certificates(ctypes.Structure):
    """nvmlConfComputeGpuCertificate_t."""

    _fields_ = (
        ("certChainSize", ctypes.c_uint),
        ("attestationCertChainSize", ctypes.c_uint),
        ("certChain", ctypes.c_ubyte * _CERT_CHAIN_BYTES),
        ("attestationCertChain", ctypes.c_ubyte * _ATTESTATION_CERT_CHAIN_BYTES),
    )


class AttestationReport(ctypes.Structure):
    """nvmlConfComputeGpuAttestationReport_t."""

    _fields_ = (
        ("isCecAttestationReportPresent", ctypes.c_uint),
        ("attestationReportSize", ctypes.c_uint),
        ("cecAttestationReportSize", ctypes.c_uint),
        ("nonce", ctypes.c_ubyte * NONCE_BYTES),
        ("attestationReport", ctypes.c_ubyte * _REPORT_BYTES),
        ("cecAttestationReport", ctypes.c_ubyte * _CEC_REPORT_BYTES),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the driver says of all GPUs of this machine together."""

    environment: int  # 0 unavailable, 1 simulation, 2 production
    cc_feature: int
    devtools: int
    multi_gpu: int  # 0 none, 1 protected PCIe, 2 encrypted NVLink

    @property
    def mode(self) -> str:
        """In the words of `formats.boot_events.GpuMode`."""
        if self.multi_gpu == MULTIGPU_PROTECTED_PCIE:
            return "protected-pcie"
        return "cc-off" if self.cc_feature == FEATURE_DISABLED else "cc-on"


def _load() -> Any:
    return ctypes.CDLL(LIBRARY)


class Nvml:
    """The library, initialised. Every method raises `NvmlError`. NVML itself is thread-safe."""

    def __init__(self, load: Callable[[], Any] = _load) -> None:
        try:
            self._library = load()
        except OSError as err:
            raise NvmlError("dlopen", 12, str(err)) from err
        self._call("nvmlInit_v2")

    def close(self) -> None:
        """nvmlShutdown."""
        self._call("nvmlShutdown")

    def driver_version(self) -> str:
        """nvmlSystemGetDriverVersion."""
        return self._text("nvmlSystemGetDriverVersion", _DRIVER_VERSION_BYTES)

    def capabilities(self) -> tuple[int, int]:
        """nvmlSystemGetConfComputeCapabilities: (CPU's, GPUs'). GPUs': 1 if they could be confidential."""
        caps = Caps()
        self._call("nvmlSystemGetConfComputeCapabilities", ctypes.byref(caps))
        return caps.cpuCaps, caps.gpusCaps

    def state(self) -> Settings:
        """nvmlSystemGetConfComputeState, which knows no multi-GPU mode (0)."""
        state = State()
        self._call("nvmlSystemGetConfComputeState", ctypes.byref(state))
        return Settings(
            environment=state.environment, cc_feature=state.ccFeature, devtools=state.devToolsMode, multi_gpu=0
        )

    def settings(self) -> Settings:
        """nvmlSystemGetConfComputeSettings; `state` on a driver that does not have it."""
        found = SettingsV1(version=ctypes.sizeof(SettingsV1) | 1 << 24)
        try:
            self._call("nvmlSystemGetConfComputeSettings", ctypes.byref(found))
        except NvmlError as err:
            if err.number != FUNCTION_NOT_FOUND:
                raise
            return self.state()
        return Settings(
            environment=found.environment,
            cc_feature=found.ccFeature,
            devtools=found.devToolsMode,
            multi_gpu=found.multiGpuMode,
        )

    def ready(self) -> bool:
        """nvmlSystemGetConfComputeGpusReadyState: whether the GPUs take work."""
        value = ctypes.c_uint()
        self._call("nvmlSystemGetConfComputeGpusReadyState", ctypes.byref(value))
        return value.value == READY

    def set_ready(self) -> None:
        """nvmlSystemSetConfComputeGpusReadyState: let the GPUs take work."""
        self._call("nvmlSystemSetConfComputeGpusReadyState", ctypes.c_uint(READY))

    def devices(self) -> tuple[Device, ...]:
        """Handles of all GPUs, in NVML's order."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return tuple(self._device(index) for index in range(count.value))

    def uuid(self, device: Device) -> str:
        """nvmlDeviceGetUUID."""
        return self._text("nvmlDeviceGetUUID", _UUID_BYTES, device)

    def vbios_version(self, device: Device) -> str:
        """nvmlDeviceGetVbiosVersion."""
        return self._text("nvmlDeviceGetVbiosVersion", _VBIOS_VERSION_BYTES, device)

    def attestation_chain(self, device: Device) -> bytes:
        """nvmlDeviceGetConfComputeGpuCertificate: the attestation chain, PEM, device first."""
        call = "nvmlDeviceGetConfComputeGpuCertificate"
        found = Certificates()
        self._call(call, device, ctypes.byref(found))
        return _part(call, found.attestationCertChain, found.attestationCertChainSize)

    def attestation_report(self, device: Device, nonce: bytes) -> bytes:
        """nvmlDeviceGetConfComputeGpuAttestationReport: SPDM request and response over the 32-byte nonce."""
        call = "nvmlDeviceGetConfComputeGpuAttestationReport"
        found = AttestationReport(nonce=(ctypes.c_ubyte * NONCE_BYTES)(*nonce))
        self._call(call, device, ctypes.byref(found))
        return _part(call, found.attestationReport, found.attestationReportSize)

    def _device(self, index: int) -> Device:
        handle = Device()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def _text(self, call: str, size: int, *device: Device) -> str:
        buffer = ctypes.create_string_buffer(size)
        self._call(call, *device, buffer, ctypes.c_uint(size))
        return buffer.value.decode("ascii", "replace")

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as err:
            raise NvmlError(name, FUNCTION_NOT_FOUND) from err
        number = function(*arguments)
        if number:
            raise NvmlError(name, number)


def _part(call: str, buffer: ctypes.Array[ctypes.c_ubyte], size: int) -> bytes:
    if not 0 < size <= len(buffer):
        raise NvmlError(call, 7, f"expected 1 to {len(buffer)} bytes, got {size}")
    return bytes(buffer[:size])
