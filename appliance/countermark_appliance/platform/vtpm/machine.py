"""A simulated TD whose MRTD and RTMR0-2 are those of this boot, from its TPM's event log.

MRTD is PCR 0 of the SHA-384 bank; PCRs 1 and 7, 2 to 6, 8 to 15 are folded into RTMR0, RTMR1, RTMR2 in the order of the
log (`formats.tpm_log`). The image id is the root hash of the command line, as on `tdx`. So a manifest that was made
before the boot is held against what firmware, stub and kernel really measured. RTMR3, quotes, endorsements and GPUs are
the simulated machine's, whose keys lie in the image: nothing here vouches for anything but a test.
"""

from __future__ import annotations

from pathlib import Path

from countermark.formats import tpm_log
from countermark.formats.evidence import PlatformName
from countermark.formats.tpm_log import TpmLog
from countermark_appliance.platform.image import read_image_id
from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch
from countermark_appliance.platform.sim.state import State, load
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.vtpm import tpm


class VtpmPlatform(SimPlatform):
    """`platform.base.Platform`; simulated but for the registers. Thread-safe."""

    def __init__(self, state: State, image: bytes, log: TpmLog, sysfs: Sysfs) -> None:
        super().__init__(state, TdLaunch(mrtd=tpm_log.mrtd(log)), image, tpm_log.ccel_events(log))
        self._log = log
        self._sysfs = sysfs

    @property
    def name(self) -> PlatformName:
        """Always `vtpm`."""
        return PlatformName.VTPM

    def check_unchanged(self) -> None:
        """Raises `MeasurementError` `platform.tpm_replay` when something extended a PCR since the start."""
        tpm.compare(self._sysfs, self._log)


def open_vtpm(state: Path, sysfs: Sysfs | None = None) -> VtpmPlatform:
    """Open this machine's TPM. `state`: the directory that `countermark-appliance sim new` made.

    Raises `ConfigError`: `platform.state`, `platform.image_id`, `platform.tpm_missing`, `platform.tpm_log`;
    `MeasurementError` `platform.tpm_replay`.
    """
    sysfs = sysfs or Sysfs()
    return VtpmPlatform(load(state), read_image_id(sysfs), tpm.read_log(sysfs), sysfs)
