"""Which image booted: the dm-verity root hash of its root file system, as the measured command line names it.

The image's UKI carries `roothash=` (the name of systemd-veritysetup-generator(8)) in its `.cmdline` section, which
firmware and stub measure; a command line from anywhere else changes RTMRs that the manifest fixes. So the value names
the image without the image holding reference values of its own, and what a host makes of it is refused by the verifier.
Kernel and initramfs are not in this hash: the manifest's registers are about them.
"""

from __future__ import annotations

import re
from typing import Final

from countermark.errors import ConfigError
from countermark_appliance.platform.sysfs import Sysfs

CMDLINE: Final = "proc/cmdline"
PARAMETER: Final = "roothash"
_MAX_BYTES: Final = 16 * 1024
_HEX32: Final = re.compile(r"[0-9a-f]{64}")


def read_image_id(sysfs: Sysfs) -> bytes:
    """32 bytes. Raises `ConfigError` `platform.image_id` unless the parameter stands there once, as 64 hex digits."""
    try:
        text = sysfs.read(CMDLINE, max_bytes=_MAX_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as err:
        raise _refuse(f"to read /{CMDLINE}, got {err}") from err
    if '"' in text:
        raise _refuse('no quotation marks, got "')
    values = [word.partition("=")[2] for word in text.split() if word.partition("=")[0] == PARAMETER]
    if len(values) != 1:
        raise _refuse(f"{PARAMETER}= once, got it {len(values)} times: this is not an appliance image")
    if not _HEX32.fullmatch(values[0]):
        raise _refuse(f"{PARAMETER}= and 64 lower-case hex digits, got {values[0]!r:.70}")
    return bytes.fromhex(values[0])


def _refuse(message: str) -> ConfigError:
    return ConfigError(f"kernel command line: expected {message}", code="platform.image_id")
