"""The event log of a TPM: what a guest without TDX has in place of the CCEL, and how its PCRs stand for RTMRs.

TCG PC Client Platform Firmware Profile (PFP) 1.05 and 1.06, section 10: a TCG_PCClientPCREvent that holds the Spec ID
event, then TCG_PCR_EVENT2 for everything else, each with exactly one digest for each bank that the Spec ID event
names. Linux gives it as /sys/kernel/security/tpm0/binary_bios_measurements, with the events after GetEventLog
appended. The unused rest of an area is all 0xff or all zero, as in `formats.eventlog`.

PCRs as registers: UEFI 2.10 section 38.4.1 gives the mapping for TDX: PCR 0 is MRTD, PCR 1 and 7 are RTMR0, PCR 2 to 6
RTMR1, PCR 8 to 15 RTMR2. Registers here are numbered as in `formats.eventlog`: 0 is MRTD, 1 to 3 are RTMR0 to RTMR2.
PCR 16 to 23 (debug, dynamic root, application) have no counterpart and are refused where one is needed.

Replay: PCR = H(PCR || digest), from zero; a StartupLocality event (PFP section 10.4.5.3) sets the last byte that PCR 0
starts from; EV_NO_ACTION events extend nothing.

Not checked here: that a digest is the hash of its event's data, and that the PCRs of a TPM have these values. Who
compares them leaves `IMA_PCR` out and makes sure that the log has no event of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark.formats.eventlog import EV_NO_ACTION, Event
from countermark.formats.reader import Reader

MAX_LOG_BYTES: Final = 1024 * 1024
MAX_EVENTS: Final = 4096
MAX_EVENT_BYTES: Final = 64 * 1024
PCRS: Final = 24
IMA_PCR: Final = 10  # Linux extends it (IMA's boot aggregate, even without a policy) and logs that elsewhere
ALGORITHMS: Final = {  # TCG algorithm registry: id -> (name as hashlib has it, digest size in bytes)
    0x0004: ("sha1", 20),
    0x000B: ("sha256", 32),
    0x000C: ("sha384", 48),
    0x000D: ("sha512", 64),
    0x0012: ("sm3", 32),
}
_SIGNATURE: Final = b"Spec ID Event03\0"
_LOCALITY: Final = b"StartupLocality\0"
_LOCALITIES: Final = (0, 3, 4)  # TPM 2.0 library part 3, section 9.3: 3 is TPM2_Startup's, 4 an H-CRTM's
_REGISTERS: Final = {0: 0, 1: 1, 7: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2} | dict.fromkeys(range(8, 16), 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmEvent:
    """One event. `digests`: algorithm name to digest, one for every bank of the log."""

    pcr: int  # 0 to 23
    event_type: int
    digests: Mapping[str, bytes]
    data: bytes

    @property
    def extends(self) -> bool:
        """Whether the event changes a PCR."""
        return self.event_type != EV_NO_ACTION


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmLog:
    """A parsed log. `algorithms`: the banks, in the Spec ID event's order. `padding`: bytes after the last event."""

    algorithms: tuple[str, ...]
    events: tuple[TpmEvent, ...]
    padding: int = 0


def parse_tpm_log(data: bytes) -> TpmLog:
    """Parse a whole log to its last byte. Raises `FormatError` with a code below `tpmlog.`."""
    if len(data) > MAX_LOG_BYTES:
        raise FormatError(f"tpmlog: expected at most {MAX_LOG_BYTES} bytes, got {len(data)}", code="tpmlog.too_long")
    reader = Reader(data, "tpmlog")
    algorithms = _parse_spec_id(reader)
    fill = data[-1] if data[-1] in (0x00, 0xFF) else 0xFF
    used = len(data.rstrip(bytes((fill,))))
    events: list[TpmEvent] = []
    while reader.offset < used:
        ahead = data[reader.offset : reader.offset + 12]
        if not ahead[:4].strip(b"\xff") or not any(ahead):
            message = f"tpmlog: expected only 0xff or only zero bytes after the last event at {reader.offset}"
            raise FormatError(message, code="tpmlog.trailing")
        if len(events) == MAX_EVENTS:
            raise FormatError(f"tpmlog: expected at most {MAX_EVENTS} events", code="tpmlog.too_many")
        events.append(_parse_event(reader, algorithms))
    return TpmLog(
        algorithms=tuple(ALGORITHMS[kind][0] for kind in algorithms), events=tuple(events), padding=reader.left
    )


def register_of(pcr: int) -> int:
    """The register that stands for a PCR: 0 for MRTD, 1 to 3 for RTMR0 to RTMR2.

    Raises `FormatError` `tpmlog.pcr` for a PCR without a counterpart.
    """
    if pcr not in _REGISTERS:
        raise FormatError(f"tpmlog.pcr: expected 0 to 15, got {pcr}", code="tpmlog.pcr")
    return _REGISTERS[pcr]


def ccel_events(log: TpmLog) -> tuple[Event, ...]:
    """The log's events as a CCEL has them: SHA-384 alone, registers for PCRs, order kept, MRTD's (PCR 0) left out.

    Raises `FormatError`: `tpmlog.bank` without a SHA-384 bank, `tpmlog.pcr`.
    """
    _bank(log, "sha384")
    return tuple(
        Event(register=register_of(item.pcr), event_type=item.event_type, digest=item.digests["sha384"], data=item.data)
        for item in log.events
        if register_of(item.pcr) != 0
    )


def replay_pcrs(log: TpmLog, alg: str = "sha384") -> dict[int, bytes]:
    """PCR index to value after the log's events, for PCR 0 to 16 and 23 and for each other one that was extended.

    PCR 17 to 22 start from all ones (TCG PC Client Platform TPM Profile 1.05, section 4.6.2), so an extended one has
    seen no dynamic launch. Raises `FormatError`: `tpmlog.bank` for an algorithm that is no bank of the log or that
    cannot be computed here, `tpmlog.locality`.
    """
    _bank(log, alg)
    size = next(size for name, size in ALGORITHMS.values() if name == alg)
    pcrs = dict.fromkeys((*range(17), 23), bytes(size))
    pcrs[0] = bytes(size - 1) + bytes((_locality(log),))
    for item in log.events:
        if item.extends:
            before = pcrs.get(item.pcr, b"\xff" * size)
            pcrs[item.pcr] = hashlib.new(alg, before + item.digests[alg]).digest()
    return pcrs


def mrtd(log: TpmLog) -> bytes:
    """What stands for MRTD (48 bytes): PCR 0 of the SHA-384 bank. Raises as `replay_pcrs` does."""
    return replay_pcrs(log)[0]


def _parse_spec_id(reader: Reader) -> dict[int, int]:
    """The Spec ID event: algorithm id to digest size, in order."""
    reader.expect(0, 4, "spec_id")
    reader.expect(EV_NO_ACTION, 4, "spec_id")
    reader.expect(bytes(20), 20, "spec_id")
    payload = Reader(reader.take(_size(reader.uint(4, "spec_id_size")), "spec_id"), "tpmlog")
    payload.expect(_SIGNATURE, len(_SIGNATURE), "spec_id")
    payload.expect(0, 4, "spec_id")  # platform class: client
    payload.expect(b"\x00\x02", 2, "spec_id")  # minor, major
    payload.take(1, "errata")
    uintn_size = payload.uint(1, "uintn_size")
    if uintn_size not in (1, 2):
        raise FormatError(f"tpmlog.spec_id: expected 32 or 64-bit UINTN, got {uintn_size}", code="tpmlog.spec_id")
    count = payload.uint(4, "algorithm_count")
    if not 0 < count <= len(ALGORITHMS):
        message = f"tpmlog.algorithms: expected 1 to {len(ALGORITHMS)}, got {count}"
        raise FormatError(message, code="tpmlog.algorithms")
    sizes: dict[int, int] = {}
    for _ in range(count):
        kind, size = payload.uint(2, "algorithm"), payload.uint(2, "digest_size")
        if kind in sizes or kind not in ALGORITHMS or size != ALGORITHMS[kind][1]:
            message = f"tpmlog.algorithms: expected a known one, once, with its size, got {kind:#06x} with {size}"
            raise FormatError(message, code="tpmlog.algorithms")
        sizes[kind] = size
    payload.take(payload.uint(1, "vendor_info_size"), "vendor_info")
    payload.end()
    return sizes


def _parse_event(reader: Reader, sizes: dict[int, int]) -> TpmEvent:
    pcr = reader.uint(4, "pcr")
    if pcr >= PCRS:
        raise FormatError(f"tpmlog.pcr: expected 0 to {PCRS - 1}, got {pcr}", code="tpmlog.pcr")
    event_type = reader.uint(4, "event_type")
    count = reader.uint(4, "digest_count")
    if count != len(sizes):
        message = f"tpmlog.digest_count: expected one for each of {len(sizes)} banks, got {count}"
        raise FormatError(message, code="tpmlog.digest_count")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        kind = reader.uint(2, "digest_algorithm")
        if kind not in sizes or ALGORITHMS[kind][0] in digests:
            message = f"tpmlog.digest_algorithm: expected one of the Spec ID event's, each once, got {kind:#06x}"
            raise FormatError(message, code="tpmlog.digest_algorithm")
        digests[ALGORITHMS[kind][0]] = reader.take(sizes[kind], "digest")
    data = reader.take(_size(reader.uint(4, "event_size")), "event")
    return TpmEvent(pcr=pcr, event_type=event_type, digests=digests, data=data)


def _size(value: int) -> int:
    if value > MAX_EVENT_BYTES:
        message = f"tpmlog.event_size: expected at most {MAX_EVENT_BYTES}, got {value}"
        raise FormatError(message, code="tpmlog.event_size")
    return value


def _bank(log: TpmLog, alg: str) -> None:
    if alg not in log.algorithms or alg not in hashlib.algorithms_available:
        raise FormatError(f"tpmlog.bank: expected one of {', '.join(log.algorithms)}, got {alg}", code="tpmlog.bank")


def _locality(log: TpmLog) -> int:
    """The locality of TPM2_Startup, 0 if the log has no such event."""
    found = [item for item in log.events if not item.extends and item.data.startswith(_LOCALITY)]
    if not found:
        return 0
    data = found[0].data
    if len(found) != 1 or found[0].pcr != 0 or len(data) != len(_LOCALITY) + 1 or data[-1] not in _LOCALITIES:
        message = f"tpmlog.locality: expected one event of PCR 0 with one of {_LOCALITIES}"
        raise FormatError(message, code="tpmlog.locality")
    return data[-1]
