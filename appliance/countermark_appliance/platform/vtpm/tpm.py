"""The TPM's event log and PCRs, as Linux shows them, and that the one gives the other.

Linux: /sys/kernel/security/tpm0/binary_bios_measurements (drivers/char/tpm/eventlog), /sys/class/tpm/tpm0/pcr-sha384/N
(Documentation/ABI/stable/sysfs-class-tpm: upper-case hex and a newline). Compared are PCRs 0 to 15, which stand for
registers, but for PCR 10: Linux extends that one itself, and no firmware's log may have an event for it.
"""

from __future__ import annotations

import re
from typing import Final

from countermark.errors import ConfigError, FormatError, MeasurementError
from countermark.formats import tpm_log
from countermark.formats.tpm_log import TpmLog
from countermark_appliance.platform.sysfs import Sysfs

LOG: Final = "sys/kernel/security/tpm0/binary_bios_measurements"
PCRS: Final = "sys/class/tpm/tpm0/pcr-sha384"
COMPARED: Final = tuple(pcr for pcr in range(16) if pcr != tpm_log.IMA_PCR)
_MAX_TEXT: Final = 256
_HEX48: Final = re.compile(r"[0-9A-Fa-f]{96}")


def read_log(sysfs: Sysfs) -> TpmLog:
    """The log, which must replay to the PCRs.

    Raises `ConfigError`: `platform.tpm_missing`, `platform.tpm_log`; `MeasurementError` `platform.tpm_replay`.
    """
    try:
        data = sysfs.read(LOG, max_bytes=tpm_log.MAX_LOG_BYTES)
    except OSError as err:
        raise _missing(LOG, err) from err
    try:
        log = tpm_log.parse_tpm_log(data)
        if any(event.pcr == tpm_log.IMA_PCR and event.extends for event in log.events):
            message = f"tpmlog.pcr: expected no event of PCR {tpm_log.IMA_PCR}, got one"
            raise FormatError(message, code="tpmlog.pcr")
        tpm_log.ccel_events(log)
        compare(sysfs, log)
    except FormatError as err:
        raise ConfigError(f"TPM event log: {err}", code="platform.tpm_log") from err
    return log


def compare(sysfs: Sysfs, log: TpmLog) -> None:
    """Raises `MeasurementError` `platform.tpm_replay` where a PCR is not what the log says, `ConfigError` as above."""
    replayed = tpm_log.replay_pcrs(log)
    for pcr in COMPARED:
        if (found := read_pcr(sysfs, pcr)) != replayed[pcr]:
            message = f"PCR {pcr}: expected {replayed[pcr].hex()} from the event log, got {found.hex()}"
            raise MeasurementError(message, code="platform.tpm_replay")


def read_pcr(sysfs: Sysfs, pcr: int) -> bytes:
    """48 bytes of the SHA-384 bank. Raises `ConfigError` `platform.tpm_missing`."""
    path = f"{PCRS}/{pcr}"
    try:
        text = sysfs.read(path, max_bytes=_MAX_TEXT).decode("ascii", "replace").strip()
    except OSError as err:
        raise _missing(path, err) from err
    if not _HEX48.fullmatch(text):
        raise ConfigError(f"PCR {pcr}: expected 96 hex digits, got {text!r:.100}", code="platform.tpm_missing")
    return bytes.fromhex(text)


def _missing(path: str, err: OSError) -> ConfigError:
    message = f"TPM: expected to read /{path} (a TPM 2.0 with a SHA-384 bank, as root), got {err.strerror}"
    return ConfigError(message, code="platform.tpm_missing")
