"""A TDX guest as a platform: quotes, registers and logs from the kernel, GPUs from NVIDIA's driver.

Opening reads everything that a client would miss later, so that an operator hears of it before a port opens: image id,
the firmware's log against RTMR0-2, RTMR3 at zero, a first quote, confidential GPUs where the engine computes on one.
Endorsements come from a source that is handed in; this module has no network.
Not checked here: anything a verifier must judge for itself, such as the quote's signatures and the TCB level.
"""

from __future__ import annotations

import threading
from typing import Final

from countermark.errors import MeasurementError
from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import GpuIdentity
from countermark.formats.eventlog import Event, EventLog, SpecId
from countermark.formats.evidence import Endorsements, GpuEvidence, PlatformName
from countermark_appliance.config import Config
from countermark_appliance.platform.base import OpenEndorsements
from countermark_appliance.platform.image import read_image_id
from countermark_appliance.platform.nvml_gpus import ConfidentialGpus, open_gpus
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.tdx.ccel import read_ccel
from countermark_appliance.platform.tdx.registers import Rtmr3
from countermark_appliance.platform.tdx.reports import Reports

_NO_CHALLENGE: Final = bytes(64)  # no report_data of ours: that is a hash
_NO_NONCE: Final = bytes(32)


class TdxPlatform:
    """`platform.base.Platform` on a TDX guest. Thread-safe."""

    def __init__(self, sysfs: Sysfs, *, endorsements: OpenEndorsements, gpus: ConfidentialGpus | None) -> None:
        """`endorsements`: opens their source for a quote and the GPUs' reports, which say what to look for.
        `gpus`: None where the engine computes on the CPU. Raises as `open_tdx` does."""
        self._reports = Reports(sysfs)  # first: what every TDX guest has
        self._rtmr3 = Rtmr3(sysfs)
        self._ccel = read_ccel(sysfs)
        self._image_id = read_image_id(sysfs)
        self._gpus = gpus
        self._endorsements = endorsements(self._reports.quote(_NO_CHALLENGE)[0], self.gpu_evidence(_NO_NONCE))
        self._lock = threading.Lock()  # one extension at a time; quotes, which may take long, do not hold it
        self._events: tuple[Event, ...] = ()

    @property
    def name(self) -> PlatformName:
        """Always `tdx`. The name is an assertion; the quote's root is what decides at the verifier."""
        return PlatformName.TDX

    @property
    def image_id(self) -> bytes:
        """The root hash of the root file system, from the measured command line."""
        return self._image_id

    @property
    def vbios(self) -> str | None:
        """The GPUs' VBIOS version."""
        return self._gpus.vbios if self._gpus is not None else None

    def ccel(self) -> bytes:
        """The firmware's log up to its last event, as read at start: nothing is appended to it after boot."""
        return self._ccel

    def rtmr3_log(self) -> bytes:
        """The log of `extend_rtmr3` calls."""
        spec = SpecId(register=boot_events.REGISTER)
        return eventlog.encode_event_log(EventLog(spec=spec, events=self._events))

    def extend_rtmr3(self, event_type: int, data: bytes) -> None:
        """Extend the register, then append to the log. Raises `MeasurementError` as `Rtmr3.extend` does."""
        event = boot_events.event(data)
        if event.event_type != event_type:
            message = f"rtmr3: expected an event of type {event.event_type:#x}, got {event_type:#x}"
            raise MeasurementError(message, code="platform.rtmr3_event")
        with self._lock:
            self._rtmr3.extend(event.digest)
            self._events = (*self._events, event)

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes, whose RTMR3 is our log's.

        Raises `Unavailable` as `Reports.quote` does, and `MeasurementError` `platform.rtmr3_foreign`.
        """
        before = self._rtmr3.value
        quote, body = self._reports.quote(report_data)
        if body.rtmr3 not in (before, self._rtmr3.value):  # the second where an event of ours came in between
            message = f"rtmr3: expected {self._rtmr3.value.hex()} in the quote, got {body.rtmr3.hex()}"
            raise MeasurementError(message, code="platform.rtmr3_foreign")
        return quote

    def endorsements(self) -> Endorsements:
        """What the source has now."""
        return self._endorsements.current()

    def gpu_identities(self) -> tuple[GpuIdentity, ...]:
        """Device key digests and modes, sorted; none where the engine computes on the CPU."""
        return self._gpus.identities if self._gpus is not None else ()

    def gpu_evidence(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report over the 32-byte nonce from every GPU. Raises `Unavailable` (`gpu.report`)."""
        return self._gpus.evidence(nonce) if self._gpus is not None else ()

    def admit_gpus(self) -> None:
        """Let the GPUs take work. Raises `GpuError` (`gpu.ready_state`)."""
        if self._gpus is not None:
            self._gpus.admit()

    def check_unchanged(self) -> None:
        """Raises `MeasurementError` `platform.rtmr3_foreign` or `GpuError` `gpu.changed`."""
        self._rtmr3.check()
        if self._gpus is not None:
            self._gpus.check_unchanged()


def open_tdx(config: Config, *, endorsements: OpenEndorsements, sysfs: Sysfs | None = None) -> TdxPlatform:
    """Open this machine, and its GPUs where `config.device` is cuda. `endorsements`: as for `TdxPlatform`.

    Raises `GpuError` as `open_gpus` does; `ConfigError`: `platform.image_id`, `platform.ccel_missing`,
    `platform.ccel_table`, `platform.ccel_log`, `platform.rtmr_missing`, `platform.rtmr_size`, `platform.tsm_missing`,
    `platform.provider`; `MeasurementError`: `platform.ccel_replay`, `platform.rtmr3_not_zero`; `Unavailable` as
    `Reports.quote` does.
    """
    gpus = open_gpus() if config.device == "cuda" else None
    return TdxPlatform(sysfs or Sysfs(), endorsements=endorsements, gpus=gpus)
