"""The interface every platform offers, and the factory that opens one by name.

`tdx`: a TDX guest with the kernel's interfaces and NVIDIA's driver. `sim`: the same wire formats made in software under
a development root. `vtpm`: `sim` with registers from a real TPM log, for boot tests. A platform only reports and
extends; what is extended, and in which order, is `platform.attester`'s business.

On a simulated platform nothing depends on the mode of the GPU that computes: all its evidence says SIMULATED. On `tdx`
a GPU computes in confidential mode or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from countermark.errors import ConfigError
from countermark.formats.boot_events import GpuIdentity
from countermark.formats.evidence import Endorsements, GpuEvidence, PlatformName
from countermark_appliance.config import Config


class Platform(Protocol):
    """One booted machine, from power-on to power-off. Methods may be called from several threads."""

    @property
    def name(self) -> PlatformName:
        """Which back end this is; `name.simulated` says whether a CPU stands behind the quotes."""

    @property
    def image_id(self) -> bytes:
        """32 bytes naming the image that booted."""

    @property
    def vbios(self) -> str | None:
        """The VBIOS version of the GPUs whose evidence this platform gives; None where there are none, or simulated."""

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

    def admit_gpus(self) -> None:
        """Let the GPUs take work: their identities stand in RTMR3. Raises `GpuError`."""

    def check_unchanged(self) -> None:
        """Raises a `VerificationError` when the machine is no longer what RTMR3 says; ask every few seconds."""


class EndorsementSource(Protocol):
    """Where a platform gets what the vendors signed, such as a cache with validity."""

    def current(self) -> Endorsements:
        """What is valid now. Raises `Unavailable` when there is nothing."""


OpenEndorsements = Callable[[bytes, tuple[GpuEvidence, ...]], EndorsementSource]


def open_platform(config: Config) -> Platform:
    """Boot the platform that the configuration names.

    Raises `ConfigError`: `platform.unknown`, `platform.unavailable` (not in this build), `platform.state`, or what
    `platform.tdx.open_tdx`, `platform.vtpm.open_vtpm` and `platform.endorsements.open_endorsements` raise.
    """
    match config.platform:
        case PlatformName.SIM.value:
            return _open_sim(config)
        case PlatformName.TDX.value:
            return _open_tdx(config)
        case PlatformName.VTPM.value:
            return _open_vtpm(config)
    raise ConfigError(f"platform.name: expected sim, tdx or vtpm, got {config.platform!r}", code="platform.unknown")


def _open_sim(config: Config) -> Platform:
    state = _simulated_state(config)
    try:
        from countermark_appliance.platform import sim  # noqa: PLC0415  production images carry no `sim` package
    except ImportError as err:
        raise _unavailable(config) from err
    return sim.boot(sim.load(state))


def _open_vtpm(config: Config) -> Platform:
    state = _simulated_state(config)
    try:
        from countermark_appliance.platform import vtpm  # noqa: PLC0415  in test images alone
    except ImportError as err:
        raise _unavailable(config) from err
    return vtpm.open_vtpm(state)


def _simulated_state(config: Config) -> Path:
    if config.platform_state is None:
        raise ConfigError(
            "platform.state: expected the directory that `countermark-appliance sim new` made, got none",
            code="platform.state",
        )
    return config.platform_state


def _unavailable(config: Config) -> ConfigError:
    message = f"platform.name: {config.platform} is not in this build: it has no code that simulates"
    return ConfigError(message, code="platform.unavailable")


def _open_tdx(config: Config) -> Platform:
    from countermark_appliance.platform import endorsements, tdx  # noqa: PLC0415  `tdx` imports this module

    return tdx.open_tdx(config, endorsements=functools.partial(endorsements.open_endorsements, config))
