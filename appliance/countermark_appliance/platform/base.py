"""The interface every platform offers, and the factory that opens one by name.

`tdx`: the CPU's quotes through configfs-tsm. `sim`: the same wire formats made in software under a development root.
`vtpm`: `sim` with registers from a real TPM log, for boot tests. A platform only reports and extends; what is
extended, and in which order, is `platform.attester`'s business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from countermark.errors import ConfigError
from countermark.formats.boot_events import GpuIdentity
from countermark.formats.evidence import Endorsements, GpuEvidence, PlatformName


class Platform(Protocol):
    """One booted machine, from power-on to power-off. Methods may be called from several threads."""

    @property
    def name(self) -> PlatformName:
        """Which back end this is; `name.simulated` says whether a CPU stands behind the quotes."""

    @property
    def image_id(self) -> bytes:
        """32 bytes naming the image that booted."""

    def ccel(self) -> bytes:
        """The firmware's event log: RTMR0 to RTMR2."""

    def rtmr3_log(self) -> bytes:
        """The log of our own extensions, in the form of `formats.boot_events`."""

    def extend_rtmr3(self, event_type: int, data: bytes) -> None:
        """Extend RTMR3 with SHA-384(data) and append the event to the log."""

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes. Raises `Unavailable` when the quoting service does not answer."""

    def endorsements(self) -> Endorsements:
        """What the vendors signed about this hardware, for verifiers without a network."""

    def gpu_identities(self) -> tuple[GpuIdentity, ...]:
        """Device key digests and modes of the GPUs, sorted."""

    def gpu_evidence(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report over the 32-byte nonce from every GPU, in the order of `gpu_identities`."""


def open_platform(name: str, state: Path | None) -> Platform:
    """Boot the named platform; `state` is the directory of a simulated one.

    Raises `ConfigError`: `platform.unknown`, `platform.unavailable` (not in this build), `platform.state`.
    """
    if name not in {member.value for member in PlatformName}:
        raise ConfigError(f"platform.name: expected sim, tdx or vtpm, got {name!r}", code="platform.unknown")
    if name != PlatformName.SIM.value:
        raise ConfigError(f"platform.name: {name} is not available in this build", code="platform.unavailable")
    if state is None:
        raise ConfigError(
            "platform.state: expected the directory that `countermark-appliance sim new` made, got none",
            code="platform.state",
        )
    from countermark_appliance.platform import sim  # noqa: PLC0415  production images carry no `sim` package

    return sim.boot(sim.load(state))
