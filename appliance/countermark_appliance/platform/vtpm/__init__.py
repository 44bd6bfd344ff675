"""The simulated platform with the registers of a real boot: what a test image runs where there is a TPM and no TDX."""

from countermark_appliance.platform.vtpm.machine import VtpmPlatform, open_vtpm

__all__ = ["VtpmPlatform", "open_vtpm"]
