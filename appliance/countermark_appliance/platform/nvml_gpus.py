"""The confidential GPUs of this machine: who they are, what they sign, and that they stay the same.

The driver inside the measured image is what says that a GPU is in confidential mode (`platform.nvml`); each GPU's own
report says so again over its signature, and clients compare. `open_gpus` refuses GPUs that no policy would accept, so
that the operator hears it at start and not from clients. In confidential mode the driver gives GPUs no work until the
ready state is set, which `admit` does once RTMR3 names them.

Changes are noticed by polling (`check_unchanged`): another driver, another set of UUIDs, another mode, a ready state
that was taken back. A reset that is over between two polls ends the engine's CUDA context, and with it the process; a
swapped GPU cannot sign for the certificate chain that was read at start.
Not checked here: chains, signatures and measurements, which are the verifier's to judge; NVSwitches, which protected
PCIe adds and nothing here attests; that the driver's word about several GPUs covers each (their reports do).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from countermark.errors import FormatError, GpuError, Unavailable
from countermark.formats import spdm
from countermark.formats.boot_events import GpuIdentity, GpuMode
from countermark.formats.evidence import MAX_GPUS, GpuEvidence
from countermark.formats.quote import parse_pem_chain
from countermark_appliance.platform.keyring import spki_digest
from countermark_appliance.platform.nvml import (
    DEVTOOLS_OFF,
    ENVIRONMENT_PRODUCTION,
    NOT_SUPPORTED,
    Device,
    Nvml,
    NvmlError,
    Settings,
)

_OFF: Final = Settings(environment=0, cc_feature=0, devtools=0, multi_gpu=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gpu:
    device: Device
    identity: GpuIdentity
    chain: tuple[bytes, ...]
    vbios: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What must stay as it was at start."""

    driver: str
    settings: Settings
    uuids: tuple[str, ...]


class ConfidentialGpus:
    """All GPUs of the machine, in the order of their identities. Thread-safe."""

    def __init__(self, nvml: Nvml, gpus: tuple[_Gpu, ...], seen: _Seen) -> None:
        self._nvml = nvml
        self._gpus = gpus
        self._seen = seen
        self._admitted = False
        self._lock = threading.Lock()

    @property
    def identities(self) -> tuple[GpuIdentity, ...]:
        """Device key digests and modes, sorted."""
        return tuple(gpu.identity for gpu in self._gpus)

    @property
    def vbios(self) -> str:
        """The VBIOS version; where GPUs differ, all of them."""
        return ", ".join(sorted({gpu.vbios for gpu in self._gpus}))

    def evidence(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report over the same 32-byte nonce from every GPU. Raises `Unavailable` (`gpu.report`)."""
        with self._lock:
            return tuple(GpuEvidence(report=self._report(gpu, nonce), certs=gpu.chain) for gpu in self._gpus)

    def admit(self) -> None:
        """Let the GPUs take work. Raises `GpuError` (`gpu.ready_state`)."""
        try:
            self._nvml.set_ready()
            ready = self._nvml.ready()
        except NvmlError as err:
            raise GpuError(f"GPU ready state: {err}", code="gpu.ready_state") from err
        if not ready:
            raise GpuError("GPU ready state: expected ready after setting it, got not ready", code="gpu.ready_state")
        self._admitted = True

    def check_unchanged(self) -> None:
        """Raises `GpuError` (`gpu.changed`) when the GPUs are not as they were at start, or do not answer."""
        try:
            seen = _look(self._nvml, self._nvml.devices())
            ready = self._nvml.ready()
        except NvmlError as err:
            raise GpuError(f"GPUs: expected them to answer as at start, got {err}", code="gpu.changed") from err
        if seen != self._seen:
            raise GpuError(f"GPUs: expected {self._seen}, got {seen}", code="gpu.changed")
        if self._admitted and not ready:
            raise GpuError("GPU ready state: expected ready, got not ready", code="gpu.changed")

    def _report(self, gpu: _Gpu, nonce: bytes) -> bytes:
        try:
            report = self._nvml.attestation_report(gpu.device, nonce)
            answered = spdm.parse_report(report).nonce
        except (NvmlError, FormatError) as err:
            raise Unavailable(f"GPU report: {err}", code="gpu.report") from err
        if answered != nonce:
            raise Unavailable("GPU report: expected our nonce in it, got another", code="gpu.report")
        return report


def open_gpus(load: Callable[[], Nvml] = Nvml) -> ConfidentialGpus:
    """All GPUs of the machine, all of them in confidential mode.

    Raises `GpuError`: `gpu.library`, `gpu.none`, `gpu.count`, `gpu.cc_off`, `gpu.environment`, `gpu.devtools`,
    `gpu.certificate`, `gpu.duplicate`, or `gpu.nvml` when another call fails.
    """
    try:
        nvml = load()
    except NvmlError as err:
        message = f"GPU driver: expected NVIDIA's driver and its NVML, got {err}; is the kernel module loaded?"
        raise GpuError(message, code="gpu.library") from err
    try:
        devices = nvml.devices()
        if not devices:
            raise GpuError("GPUs: expected at least one in this machine, got none", code="gpu.none")
        if len(devices) > MAX_GPUS:
            raise GpuError(f"GPUs: expected at most {MAX_GPUS}, got {len(devices)}", code="gpu.count")
        seen = _look(nvml, devices)
        _require_confidential(seen.settings)
        gpus = tuple(_gpu(nvml, device, seen.settings) for device in devices)
    except NvmlError as err:
        raise GpuError(f"GPUs: {err}", code="gpu.nvml") from err
    if len({gpu.identity.device_key for gpu in gpus}) != len(gpus):
        raise GpuError("GPU device keys: expected each once, got a repeated one", code="gpu.duplicate")
    return ConfidentialGpus(nvml, tuple(sorted(gpus, key=lambda gpu: gpu.identity)), seen)


def _look(nvml: Nvml, devices: tuple[Device, ...]) -> _Seen:
    try:
        settings = nvml.settings()
    except NvmlError as err:
        if err.number != NOT_SUPPORTED:  # what a driver says that has no confidential GPU
            raise
        settings = _OFF
    uuids = tuple(sorted(nvml.uuid(device) for device in devices))
    return _Seen(driver=nvml.driver_version(), settings=settings, uuids=uuids)


def _require_confidential(settings: Settings) -> None:
    if settings.mode == GpuMode.CC_OFF.value:
        message = (
            "GPU mode: expected confidential computing on, got off (ccFeature 0, no protected PCIe); switch it on from"
            " the host and start the machine again, or compute on the CPU with engine.device"
        )
        raise GpuError(message, code="gpu.cc_off")
    if settings.devtools != DEVTOOLS_OFF:  # asked first: with developer tools the environment is not production either
        message = "GPU developer tools: expected off, got on; no policy accepts them, switch them off from the host"
        raise GpuError(message, code="gpu.devtools")
    if settings.environment != ENVIRONMENT_PRODUCTION:
        message = f"GPU environment: expected production ({ENVIRONMENT_PRODUCTION}), got {settings.environment}"
        raise GpuError(message, code="gpu.environment")


def _gpu(nvml: Nvml, device: Device, settings: Settings) -> _Gpu:
    try:
        chain = parse_pem_chain(nvml.attestation_chain(device), "gpu")
        leaf = x509.load_der_x509_certificate(chain[0]).public_key()
    except (FormatError, ValueError) as err:
        raise GpuError(f"GPU certificate chain: {err}", code="gpu.certificate") from err
    if not isinstance(leaf, ec.EllipticCurvePublicKey):
        message = f"GPU device key: expected an elliptic-curve key, got {type(leaf).__name__}"
        raise GpuError(message, code="gpu.certificate")
    identity = GpuIdentity(device_key=spki_digest(leaf), mode=settings.mode, devtools=settings.devtools != DEVTOOLS_OFF)
    return _Gpu(device=device, identity=identity, chain=chain, vbios=nvml.vbios_version(device))
