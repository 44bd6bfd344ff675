"""A booted simulated machine: registers, event logs, quotes and GPU reports, made in software.

The quoting enclave is a fresh P-256 attestation key for each boot, certified by a report that the machine's PCK key
signs, as DCAP does it: report_data of the enclave report = SHA-256(attestation key || authentication data) || zeros.
`TdLaunch` is what a host chooses at launch; its defaults are a good TD, other values are for tests of refusals.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import GpuIdentity, GpuMode
from countermark.formats.eventlog import Event, EventLog, SpecId
from countermark.formats.evidence import Endorsements, GpuEvidence, PlatformName
from countermark.formats.quote import (
    EnclaveReport,
    Header,
    Quote,
    TdReport,
    encode_enclave_report,
    encode_quote,
    encode_signed_part,
)
from countermark_appliance.platform.keyring import cose_public_key
from countermark_appliance.platform.sim import intel, measure, nvidia
from countermark_appliance.platform.sim.state import State

_QE_AUTH_DATA = b"SIMULATED quoting enclave auth. "
_CCEL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TdLaunch:
    """What a host chooses, and what the simulated CPU reports about module and TD."""

    mrtd: bytes = measure.MRTD
    td_attributes: bytes = measure.TD_ATTRIBUTES
    xfam: bytes = measure.XFAM
    mrseam: bytes = measure.MRSEAM
    mrsignerseam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    tee_tcb_svn: bytes = bytes(intel.TDX_TCB)
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    rtmr3: bytes = bytes(48)  # before the first event
    version: int = 4  # of the quote; 5 has a TD 1.5 body
    mrservicetd: bytes = bytes(48)  # version 5 only
    gpu_mode: GpuMode = GpuMode.CC_ON
    gpu_devtools: bool = False
    gpu_fwid: bytes = nvidia.FWID


class SimPlatform:
    """`platform.base.Platform` in software. Thread-safe."""

    def __init__(self, state: State, launch: TdLaunch, image: bytes, events: Sequence[Event]) -> None:
        """`events`: what the firmware's log holds, registers 1 to 3 (RTMR0 to RTMR2)."""
        log = eventlog.encode_event_log(EventLog(spec=SpecId(), events=tuple(events)))
        rtmr0, rtmr1, rtmr2, _ = eventlog.replay(events)
        self._state = state
        self._launch = launch
        self._image_id = image
        self._ccel = log + b"\xff" * max(0, _CCEL_BYTES - len(log))
        self._registers = (rtmr0, rtmr1, rtmr2)
        self._attestation_key = ec.generate_private_key(ec.SECP256R1())
        self._gpus = sorted(state.gpus, key=nvidia.Gpu.device_key_digest)
        self._lock = threading.Lock()
        self._rtmr3 = launch.rtmr3
        self._events: tuple[Event, ...] = ()

    @property
    def name(self) -> PlatformName:
        """Always `sim`."""
        return PlatformName.SIM

    @property
    def image_id(self) -> bytes:
        """32 bytes: on `sim`, measured from the code files at boot."""
        return self._image_id

    @property
    def vbios(self) -> None:
        """None: no simulated GPU computes anything."""

    def ccel(self) -> bytes:
        """The simulated firmware log in a fixed area padded with 0xff, as firmware leaves it."""
        return self._ccel

    def rtmr3_log(self) -> bytes:
        """The log of `extend_rtmr3` calls."""
        spec = SpecId(register=boot_events.REGISTER)
        return eventlog.encode_event_log(EventLog(spec=spec, events=self._events))

    def extend_rtmr3(self, event_type: int, data: bytes) -> None:
        """RTMR3 = SHA-384(RTMR3 || SHA-384(data)). Whatever the order: a register cannot refuse."""
        digest = hashlib.sha384(data).digest()
        event = Event(register=boot_events.REGISTER, event_type=event_type, digest=digest, data=data)
        with self._lock:
            self._rtmr3 = hashlib.sha384(self._rtmr3 + digest).digest()
            self._events = (*self._events, event)

    def quote(self, report_data: bytes) -> bytes:
        """A TDX quote over 64 bytes, signed down from the simulated root."""
        launch, pck = self._launch, self._state.vendor.pck
        with self._lock:
            rtmr3 = self._rtmr3
        header = Header(version=launch.version, user_data=b"SIMULATED".ljust(20, b"\0"))
        body = TdReport(
            tee_tcb_svn=launch.tee_tcb_svn,
            mrseam=launch.mrseam,
            mrsignerseam=launch.mrsignerseam,
            seam_attributes=launch.seam_attributes,
            td_attributes=launch.td_attributes,
            xfam=launch.xfam,
            mrtd=launch.mrtd,
            mrconfigid=launch.mrconfigid,
            mrowner=launch.mrowner,
            mrownerconfig=launch.mrownerconfig,
            rtmr0=self._registers[0],
            rtmr1=self._registers[1],
            rtmr2=self._registers[2],
            rtmr3=rtmr3,
            report_data=report_data,
        )
        if launch.version == 5:
            body = replace(body, tee_tcb_svn2=launch.tee_tcb_svn, mrservicetd=launch.mrservicetd)
        attestation_key = cose_public_key(self._attestation_key.public_key()).public
        qe_report = _qe_report(attestation_key)
        quote = Quote(
            header=header,
            body=body,
            signature=intel.sign_raw(self._attestation_key, encode_signed_part(header, body)),
            attestation_key=attestation_key,
            qe_report=qe_report,
            qe_report_signature=intel.sign_raw(pck.key, encode_enclave_report(qe_report)),
            qe_auth_data=_QE_AUTH_DATA,
            pck_chain_pem=self._state.vendor.pck_chain_pem,
        )
        return encode_quote(quote)

    def endorsements(self) -> Endorsements:
        """What the simulated vendors signed when the machine was made."""
        return self._state.endorsements

    def gpu_identities(self) -> tuple[GpuIdentity, ...]:
        """Device key digests and the modes the simulated driver reports, sorted."""
        launch = self._launch
        return tuple(
            GpuIdentity(device_key=gpu.device_key_digest(), mode=launch.gpu_mode.value, devtools=launch.gpu_devtools)
            for gpu in self._gpus
        )

    def gpu_evidence(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report over the 32-byte nonce from every GPU."""
        ppcie = self._launch.gpu_mode is GpuMode.CC_PROTECTED_PCIE
        return tuple(
            GpuEvidence(
                report=nvidia.report(gpu, nonce, protected_pcie=ppcie, fwid=self._launch.gpu_fwid),
                certs=gpu.chain(self._state.gpu_vendor),
            )
            for gpu in self._gpus
        )

    def admit_gpus(self) -> None:
        """Nothing to do: a simulated GPU takes no work."""

    def check_unchanged(self) -> None:
        """Nothing to find: a simulated machine does not change."""


def boot(state: State, launch: TdLaunch | None = None, *, roots: Sequence[Path] | None = None) -> SimPlatform:
    """Power the machine on: measure the code files as they are now and start with an empty RTMR3 log.

    Raises `ConfigError` `platform.code` when the code files cannot be read.
    """
    image = measure.image_id(roots)
    return SimPlatform(state, launch or TdLaunch(), image, measure.as_log_events(measure.boot_events(image)))


def _qe_report(attestation_key: bytes) -> EnclaveReport:
    binding = hashlib.sha256(attestation_key + _QE_AUTH_DATA).digest()
    return EnclaveReport(
        cpu_svn=bytes(intel.SGX_TCB),
        misc_select=0,
        isv_ext_prod_id=bytes(16),
        attributes=intel.QE_ATTRIBUTES,
        mrenclave=hashlib.sha256(b"SIMULATED quoting enclave").digest(),
        mrsigner=intel.QE_SIGNER,
        config_id=bytes(64),
        isv_prod_id=intel.QE_PROD_ID,
        isv_svn=intel.QE_SVN,
        config_svn=0,
        isv_family_id=bytes(16),
        report_data=binding + bytes(32),
    )
