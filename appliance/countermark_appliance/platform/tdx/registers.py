"""RTMRs through the kernel's measurement-register files.

Linux, Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest (kernel 6.16): `rtmr0:sha384` to `rtmr3:sha384`
hold 48 bytes each. A write of exactly 48 bytes at offset 0 extends the register: RTMR = SHA-384(RTMR || written). A
read after a write asks the TDX module again. RTMR3 is this process's alone: it must be zero when we start, and hold
after each extension what we compute ourselves.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Final

from countermark.errors import ConfigError, MeasurementError
from countermark_appliance.platform.sysfs import Sysfs

MEASUREMENTS: Final = "sys/devices/virtual/misc/tdx_guest/measurements"
REGISTER_BYTES: Final = 48
_MAX_BYTES: Final = 4096


def read_register(sysfs: Sysfs, index: int) -> bytes:
    """The 48 bytes of RTMR`index`. Raises `ConfigError` `platform.rtmr_missing` or `platform.rtmr_size`."""
    path = f"{MEASUREMENTS}/rtmr{index}:sha384"
    try:
        value = sysfs.read(path, max_bytes=_MAX_BYTES)
    except OSError as err:
        message = (
            f"rtmr{index}: expected to read /{path} (Linux 6.16 or newer with CONFIG_TSM_MEASUREMENTS, module"
            f" tdx-guest, as root), got {err.strerror}"
        )
        raise ConfigError(message, code="platform.rtmr_missing") from err
    if len(value) != REGISTER_BYTES:
        message = f"rtmr{index}: expected {REGISTER_BYTES} bytes in /{path}, got {len(value)}"
        raise ConfigError(message, code="platform.rtmr_size")
    return value


class Rtmr3:
    """The register of our own events. Thread-safe."""

    def __init__(self, sysfs: Sysfs) -> None:
        """Raises `ConfigError` as `read_register` does, and `MeasurementError` `platform.rtmr3_not_zero`."""
        self._sysfs = sysfs
        self._lock = threading.Lock()
        self.value = read_register(sysfs, 3)
        if any(self.value):
            message = (
                f"rtmr3: expected zero at start, got {self.value.hex()}: something was measured since power-on; start"
                " the machine again (the appliance starts once a boot, and nothing else may extend RTMR3)"
            )
            raise MeasurementError(message, code="platform.rtmr3_not_zero")

    def extend(self, digest: bytes) -> None:
        """RTMR3 = SHA-384(RTMR3 || digest), checked before and after.

        Raises `MeasurementError`: `platform.rtmr3_foreign`, `platform.rtmr3_extend`.
        """
        with self._lock:
            self._check()
            expected = hashlib.sha384(self.value + digest).digest()
            try:
                self._sysfs.write(f"{MEASUREMENTS}/rtmr3:sha384", digest)
            except OSError as err:
                message = f"rtmr3: expected the kernel to extend it, got {err.strerror}"
                raise MeasurementError(message, code="platform.rtmr3_extend") from err
            found = read_register(self._sysfs, 3)
            if found != expected:
                message = f"rtmr3: expected {expected.hex()} after extending it, got {found.hex()}"
                raise MeasurementError(message, code="platform.rtmr3_extend")
            self.value = expected

    def check(self) -> None:
        """Raises `MeasurementError` `platform.rtmr3_foreign` when somebody else has extended the register."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        found = read_register(self._sysfs, 3)
        if found != self.value:
            message = f"rtmr3: expected {self.value.hex()} as we left it, got {found.hex()}: somebody else extended it"
            raise MeasurementError(message, code="platform.rtmr3_foreign")
