"""The firmware's event log, where ACPI says it is.

ACPI 6.5 section 5.2.34, CC Event Log table: header (36 bytes), CC type (2: TDX), CC subtype, two reserved bytes, the
log area's minimum length and its address (LAML, LASA, 8 bytes each, little-endian). Linux shows the table as
`/sys/firmware/acpi/tables/CCEL` and the log area, LAML bytes of it, as `data/CCEL` beside it; a machine with two such
tables has no file of that name. The log must replay to RTMR0-2 as the TDX module has them, so that an operator hears
here what clients would refuse. What follows the last event in the area is left out: it is padding.
"""

from __future__ import annotations

from typing import Final

from countermark.errors import ConfigError, FormatError, MeasurementError
from countermark.formats import eventlog
from countermark.formats.reader import Reader
from countermark_appliance.platform.sysfs import Sysfs
from countermark_appliance.platform.tdx.registers import read_register

TABLE: Final = "sys/firmware/acpi/tables/CCEL"
LOG: Final = "sys/firmware/acpi/tables/data/CCEL"
TABLE_BYTES: Final = 56
CC_TYPE_TDX: Final = 2
_HEADER_REST_BYTES: Final = 26  # OEM id, OEM table id and revision, creator id and revision


def read_ccel(sysfs: Sysfs) -> bytes:
    """The log up to its last event.

    Raises `ConfigError` `platform.ccel_missing`, `platform.ccel_table`, `platform.ccel_log`, or `MeasurementError`
    `platform.ccel_replay`.
    """
    table = _read(sysfs, TABLE, eventlog.MAX_LOG_BYTES)
    try:
        length = _parse_table(table)
    except FormatError as err:
        raise ConfigError(f"CCEL table: {err}", code="platform.ccel_table") from err
    data = _read(sysfs, LOG, eventlog.MAX_LOG_BYTES)
    if len(data) != length:
        raise ConfigError(f"CCEL log: expected {length} bytes, got {len(data)}", code="platform.ccel_log")
    try:
        log = eventlog.parse_event_log(data)
    except FormatError as err:
        raise ConfigError(f"CCEL log: {err}", code="platform.ccel_log") from err
    for index, replayed in enumerate(eventlog.replay(log.events)[:3]):
        if (found := read_register(sysfs, index)) != replayed:
            message = f"rtmr{index}: expected {replayed.hex()} from the CCEL log, got {found.hex()}"
            raise MeasurementError(message, code="platform.ccel_replay")
    return data[: len(data) - log.padding]


def _parse_table(table: bytes) -> int:
    """LAML. Raises `FormatError` with a code below `ccel.`."""
    reader = Reader(table, "ccel")
    reader.expect(b"CCEL", 4, "signature")
    reader.expect(TABLE_BYTES, 4, "length")
    reader.take(2, "revision and checksum")
    reader.take(_HEADER_REST_BYTES, "header")
    reader.expect(CC_TYPE_TDX, 1, "cc_type")
    reader.expect(0, 1, "cc_subtype")
    reader.expect(0, 2, "reserved")
    length = reader.uint(8, "log_area_minimum_length")
    address = reader.uint(8, "log_area_start_address")
    reader.end()
    if sum(table) & 0xFF:
        raise FormatError("ccel.checksum: expected all bytes to add up to 0", code="ccel.checksum")
    if not (0 < length <= eventlog.MAX_LOG_BYTES and address):
        message = f"ccel.log_area: expected 1 to {eventlog.MAX_LOG_BYTES} bytes at an address, got {length}"
        raise FormatError(message, code="ccel.log_area")
    return length


def _read(sysfs: Sysfs, path: str, max_bytes: int) -> bytes:
    try:
        return sysfs.read(path, max_bytes=max_bytes)
    except OSError as err:
        message = f"CCEL: expected to read /{path} (firmware that measures, as root), got {err.strerror}"
        raise ConfigError(message, code="platform.ccel_missing") from err
