"""The `tdx` back end, written against documented interfaces of Linux 6.16 and newer. It has not run on hardware yet."""

from countermark_appliance.platform.tdx.machine import TdxPlatform, open_tdx

__all__ = ["TdxPlatform", "open_tdx"]
