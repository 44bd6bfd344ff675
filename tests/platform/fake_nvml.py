"""A small NVML: C functions that fill NVIDIA's own structures, for GPUs of the simulated vendor.

The functions are ctypes callbacks, so a call goes through the C calling convention as it does to the real library; the
structures are those of nvidia-ml-py, NVIDIA's binding, and not ours. There is no hardware below it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import pynvml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from countermark_appliance.platform.sim import nvidia
from countermark_appliance.platform.sim.state import State

SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED = 0, pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NOT_SUPPORTED
UINT, POINTER, TEXT = ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p


class FakeNvml:
    """Stands for the loaded library. Attributes are what a test bends; `errors` maps a function to what it returns."""

    def __init__(self, state: State, gpus: Sequence[nvidia.Gpu] | None = None) -> None:
        self.vendor = state.gpu_vendor
        self.gpus = list(state.gpus if gpus is None else gpus)
        self.environment = pynvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD
        self.cc_feature = pynvml.NVML_CC_SYSTEM_FEATURE_ENABLED
        self.devtools = pynvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF
        self.multi_gpu = pynvml.NVML_CC_SYSTEM_MULTIGPU_NONE
        self.driver = "0.0.0-SIMULATED"
        self.is_ready = False
        self.errors: dict[str, int] = {}
        self.missing: set[str] = set()
        self.nonce: bytes | None = None  # answer this nonce in place of the one asked
        self.chain_text: bytes | None = None
        self.report_size: int | None = None
        self.calls: list[str] = []
        self._functions: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        signature = _SIGNATURES.get(name)
        if signature is None or name in self.__dict__["missing"]:
            raise AttributeError(f"undefined symbol: {name}")
        if name not in self._functions:

            def called(*arguments: Any) -> int:
                self.calls.append(name)
                return self.errors.get(name) or int(getattr(self, f"_{name}")(*arguments))

            self._functions[name] = ctypes.CFUNCTYPE(ctypes.c_int, *signature)(called)
        return self._functions[name]

    def _gpu(self, handle: int) -> nvidia.Gpu:
        return self.gpus[handle - 0x1000]

    def _nvmlInit_v2(self) -> int:
        return SUCCESS

    def _nvmlShutdown(self) -> int:
        return SUCCESS

    def _nvmlSystemGetDriverVersion(self, text: int, length: int) -> int:
        return _put(text, length, self.driver)

    def _nvmlSystemGetConfComputeCapabilities(self, at: int) -> int:
        caps = pynvml.c_nvmlConfComputeSystemCaps_t.from_address(at)
        caps.cpuCaps, caps.gpusCaps = pynvml.NVML_CC_SYSTEM_CPU_CAPS_INTEL_TDX, pynvml.NVML_CC_SYSTEM_GPUS_CC_CAPABLE
        return SUCCESS

    def _nvmlSystemGetConfComputeState(self, at: int) -> int:
        state = pynvml.c_nvmlConfComputeSystemState_t.from_address(at)
        state.environment, state.ccFeature, state.devToolsMode = self.environment, self.cc_feature, self.devtools
        return SUCCESS

    def _nvmlSystemGetConfComputeSettings(self, at: int) -> int:
        found = pynvml.c_nvmlSystemConfComputeSettings_v1_t.from_address(at)
        if found.version != pynvml.nvmlSystemConfComputeSettings_v1:
            return int(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        found.environment, found.ccFeature, found.devToolsMode = self.environment, self.cc_feature, self.devtools
        found.multiGpuMode = self.multi_gpu
        return SUCCESS

    def _nvmlSystemGetConfComputeGpusReadyState(self, at: int) -> int:
        ctypes.c_uint.from_address(at).value = self.is_ready
        return SUCCESS

    def _nvmlSystemSetConfComputeGpusReadyState(self, ready: int) -> int:
        self.is_ready = ready == pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE
        return SUCCESS

    def _nvmlDeviceGetCount_v2(self, at: int) -> int:
        ctypes.c_uint.from_address(at).value = len(self.gpus)
        return SUCCESS

    def _nvmlDeviceGetHandleByIndex_v2(self, index: int, at: int) -> int:
        if index >= len(self.gpus):
            return INVALID_ARGUMENT
        ctypes.c_void_p.from_address(at).value = 0x1000 + index
        return SUCCESS

    def _nvmlDeviceGetUUID(self, handle: int, text: int, length: int) -> int:
        return _put(text, length, self._gpu(handle).uuid)

    def _nvmlDeviceGetVbiosVersion(self, handle: int, text: int, length: int) -> int:
        return _put(text, length, nvidia.VBIOS_VERSION)

    def _nvmlDeviceGetConfComputeGpuCertificate(self, handle: int, at: int) -> int:
        found = pynvml.c_nvmlConfComputeGpuCertificate_t.from_address(at)
        text = self.chain_text
        if text is None:
            chain = self._gpu(handle).chain(self.vendor)
            text = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in chain)
        found.attestationCertChainSize = len(text)
        found.attestationCertChain[: len(text)] = text
        return SUCCESS

    def _nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, at: int) -> int:
        found = pynvml.c_nvmlConfComputeGpuAttestationReport_t.from_address(at)
        protected = self.multi_gpu == pynvml.NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE
        report = nvidia.report(self._gpu(handle), self.nonce or bytes(found.nonce), protected_pcie=protected)
        found.attestationReportSize = len(report) if self.report_size is None else self.report_size
        found.attestationReport[: len(report)] = report
        return SUCCESS


def _put(address: int, length: int, text: str) -> int:
    data = text.encode() + b"\0"
    if len(data) > length:
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    ctypes.memmove(address, data, len(data))
    return SUCCESS


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlSystemGetDriverVersion": (TEXT, UINT),
    "nvmlSystemGetConfComputeCapabilities": (POINTER,),
    "nvmlSystemGetConfComputeState": (POINTER,),
    "nvmlSystemGetConfComputeSettings": (POINTER,),
    "nvmlSystemGetConfComputeGpusReadyState": (POINTER,),
    "nvmlSystemSetConfComputeGpusReadyState": (UINT,),
    "nvmlDeviceGetCount_v2": (POINTER,),
    "nvmlDeviceGetHandleByIndex_v2": (UINT, POINTER),
    "nvmlDeviceGetUUID": (POINTER, TEXT, UINT),
    "nvmlDeviceGetVbiosVersion": (POINTER, TEXT, UINT),
    "nvmlDeviceGetConfComputeGpuCertificate": (POINTER, POINTER),
    "nvmlDeviceGetConfComputeGpuAttestationReport": (POINTER, POINTER),
}
