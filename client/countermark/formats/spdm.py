"""NVIDIA GPU attestation report: one SPDM 1.1 GET_MEASUREMENTS request and its MEASUREMENTS response.

DMTF DSP0274 1.1.0, section 10.11 (messages and measurement blocks, little-endian); the opaque data is NVIDIA's list
of type, size, value records (type numbers as published in NVIDIA/nvtrust and NVIDIA/attestation-sdk), in the newest
firmware behind a header `NVDAOD` and with a value type in each record. The signature is r || s on P-384, each 48 bytes
big-endian, over SHA-384 of everything before it (request and response), checked on genuine H100 reports.

Hopper and Blackwell reports have one form and differ in their records: PROTECTED_PCIE_STATUS since driver 550 on
Hopper, SWITCH_PDI and FEATURE_FLAG since opaque data version 1, neither before. Developer-tools mode is in no report;
the driver inside the guest knows it, and it stands in RTMR3. Unknown opaque types are kept.
Not checked here: the signature, the certificate chain, the nonce, any measurement value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from countermark.errors import FormatError
from countermark.formats.reader import Reader

REQUEST_BYTES = 37
NONCE_BYTES = 32
SIGNATURE_BYTES = 96
MAX_REPORT_BYTES = 64 * 1024
_VERSION = 0x11
_GET_MEASUREMENTS = 0xE0
_MEASUREMENTS = 0x60
_WITH_SIGNATURE = 0x01
_ALL_MEASUREMENTS = 0xFF
_DMTF = 0x01
_BLOCK = struct.Struct("<BBHBH")  # index, specification, size of what follows; value type, value size
_VALUE_HEAD_BYTES = 3

_OPAQUE_MAGIC = b"NVDAOD"
_OPAQUE_PROFILE = bytes(2)
_OPAQUE_HEADER_BYTES = 12
_MAX_OPAQUE_VERSION = 1  # the highest whose records are published
_PDI_BYTES = 8


class OpaqueType(IntEnum):
    """NVIDIA's opaque record types by their published names."""

    CERT_ISSUER_NAME = 1
    CERT_AUTHORITY_KEY_IDENTIFIER = 2
    DRIVER_VERSION = 3
    GPU_INFO = 4
    SKU = 5
    VBIOS_VERSION = 6
    MANUFACTURER_ID = 7
    TAMPER_DETECTION = 8
    SMC = 9
    VPR = 10
    NVDEC0_STATUS = 11
    MEASUREMENT_COUNTS = 12
    CPR_INFO = 13
    BOARD_ID = 14
    CHIP_SKU = 15
    CHIP_SKU_MOD = 16
    PROJECT = 17
    PROJECT_SKU = 18
    PROJECT_SKU_MOD = 19
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDI = 22
    FLOORSWEPT_PORTS = 23
    POSITION_ID = 24
    LOCK_SWITCH_STATUS = 25
    GPU_LINK_CONN = 32
    SYS_ENABLE_STATUS = 33
    OPAQUE_DATA_VERSION = 34
    CHIP_INFO = 35
    FEATURE_FLAG = 36


class FeatureFlag(IntEnum):
    """How the GPU protects what leaves it: one GPU alone, several with encrypted NVLink, or trusted NVLink (PPCIE).

    Published enumerations disagree on which of 0 and 1 is which; both are confidential computing on.
    """

    SPT = 0
    MPT = 1
    PPCIE = 2


STATUS_ENABLED = 0xAA
STATUS_DISABLED = 0x55


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measurement block: its index (1 to 254), DMTF value type (bit 7: raw, not a digest) and value."""

    index: int
    value_type: int
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """One opaque record; `kind` may be a number that `OpaqueType` does not name.

    `value_type`: what NVIDIA says the value is; None in the form without a header.
    """

    kind: int
    value: bytes
    value_type: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Request and response. `nonce` is the requester's (ours), `responder_nonce` the GPU's.

    `opaque_header`: empty, or 12 bytes, and then every opaque record has a value type.
    """

    nonce: bytes  # 32
    slot: int
    response_params: bytes  # 2: Param1 and Param2 of the response
    measurements: tuple[Measurement, ...]
    responder_nonce: bytes  # 32
    opaque: tuple[Opaque, ...]
    signature: bytes  # 96
    opaque_header: bytes = b""

    def find(self, kind: OpaqueType) -> bytes | None:
        """The value of the one opaque record of this type, or None."""
        return next((record.value for record in self.opaque if record.kind == kind), None)

    def text(self, kind: OpaqueType) -> str | None:
        """A zero-terminated ASCII record as text, or None when absent. Raises `FormatError` `spdm.text`."""
        value = self.find(kind)
        if value is None:
            return None
        body = value.rstrip(b"\0")
        if not body.isascii() or not body.decode("ascii").isprintable():
            raise FormatError(f"spdm.{kind.name.lower()}: expected printable ASCII", code="spdm.text")
        return body.decode("ascii")

    @property
    def driver_version(self) -> str | None:
        """Such as `550.90.07`."""
        return self.text(OpaqueType.DRIVER_VERSION)

    @property
    def vbios_version(self) -> str | None:
        """Such as `96.00.9F.00.01`: the first four bytes reversed, then the fifth, in hex."""
        value = self.find(OpaqueType.VBIOS_VERSION)
        if value is None:
            return None
        if len(value) != 8:
            raise FormatError(f"spdm.vbios_version: expected 8 bytes, got {len(value)}", code="spdm.vbios_version")
        return ".".join(f"{byte:02X}" for byte in (*reversed(value[:4]), value[4]))

    @property
    def fwid(self) -> bytes | None:
        """The firmware identifier, None when the record is absent or empty."""
        return self.find(OpaqueType.FWID) or None

    @property
    def measurement_counts(self) -> tuple[int, ...]:
        """For each measurement index from 1, how often it was extended; empty when the record is absent."""
        value = self.find(OpaqueType.MEASUREMENT_COUNTS) or b""
        if len(value) % 4:
            raise FormatError("spdm.measurement_counts: expected a multiple of 4 bytes", code="spdm.measurement_counts")
        return tuple(int.from_bytes(value[i : i + 4], "little") for i in range(0, len(value), 4))

    @property
    def feature_flag(self) -> FeatureFlag | None:
        """What the GPU protects, None when it does not say. Raises `FormatError` `spdm.feature_flag`."""
        value = self.find(OpaqueType.FEATURE_FLAG)
        if value is None:
            return None
        number = int.from_bytes(value, "little")
        if not 1 <= len(value) <= 8 or number not in tuple(FeatureFlag):
            message = f"spdm.feature_flag: expected {[item.value for item in FeatureFlag]}, got {value[:8].hex()}"
            raise FormatError(message, code="spdm.feature_flag")
        return FeatureFlag(number)

    @property
    def switch_pdis(self) -> tuple[bytes, ...]:
        """The 8-byte identities of the NVSwitches this GPU is linked to, one for each link; empty when not stated."""
        value = self.find(OpaqueType.SWITCH_PDI) or b""
        if len(value) % _PDI_BYTES:
            raise FormatError(f"spdm.switch_pdi: expected a multiple of {_PDI_BYTES} bytes", code="spdm.switch_pdi")
        return tuple(value[i : i + _PDI_BYTES] for i in range(0, len(value), _PDI_BYTES))


def parse_report(data: bytes) -> Report:
    """Parse a report to its last byte. Raises `FormatError` with a code below `spdm.`."""
    if len(data) > MAX_REPORT_BYTES:
        raise FormatError(f"spdm: expected at most {MAX_REPORT_BYTES} bytes, got {len(data)}", code="spdm.too_long")
    reader = Reader(data, "spdm")
    reader.expect(_VERSION, 1, "request_version")
    reader.expect(_GET_MEASUREMENTS, 1, "request_code")
    reader.expect(_WITH_SIGNATURE, 1, "request_param1")
    reader.expect(_ALL_MEASUREMENTS, 1, "request_param2")
    nonce = reader.take(NONCE_BYTES, "nonce")
    slot = reader.uint(1, "slot")
    if slot > 7:
        raise FormatError(f"spdm.slot: expected 0 to 7, got {slot}", code="spdm.slot")
    reader.expect(_VERSION, 1, "response_version")
    reader.expect(_MEASUREMENTS, 1, "response_code")
    response_params = reader.take(2, "response_params")
    count = reader.uint(1, "number_of_blocks")
    record = Reader(reader.take(reader.uint(3, "record_size"), "record"), "spdm")
    measurements = tuple(_parse_measurement(record) for _ in range(count))
    record.end()
    if len({block.index for block in measurements}) != count:
        raise FormatError("spdm.index: expected each measurement index once", code="spdm.index")
    responder_nonce = reader.take(NONCE_BYTES, "responder_nonce")
    header, opaque = _parse_opaque(Reader(reader.take(reader.uint(2, "opaque_size"), "opaque"), "spdm"))
    signature = reader.take(SIGNATURE_BYTES, "signature")
    reader.end()
    return Report(
        nonce=nonce,
        slot=slot,
        response_params=response_params,
        measurements=measurements,
        responder_nonce=responder_nonce,
        opaque=opaque,
        signature=signature,
        opaque_header=header,
    )


def encode_report(report: Report) -> bytes:
    """The inverse of `parse_report`."""
    return encode_signed_part(report) + report.signature


def encode_signed_part(report: Report) -> bytes:
    """Everything before the signature: the bytes the GPU signs."""
    record = b"".join(
        bytes((block.index, _DMTF))
        + (3 + len(block.value)).to_bytes(2, "little")
        + bytes((block.value_type,))
        + len(block.value).to_bytes(2, "little")
        + block.value
        for block in report.measurements
    )
    opaque = report.opaque_header + b"".join(map(_encode_opaque, report.opaque))
    return b"".join(
        (
            bytes((_VERSION, _GET_MEASUREMENTS, _WITH_SIGNATURE, _ALL_MEASUREMENTS)),
            report.nonce,
            bytes((report.slot, _VERSION, _MEASUREMENTS)),
            report.response_params,
            bytes((len(report.measurements),)),
            len(record).to_bytes(3, "little"),
            record,
            report.responder_nonce,
            len(opaque).to_bytes(2, "little"),
            opaque,
        )
    )


def signed_part(data: bytes) -> bytes:
    """The exact received bytes the signature goes over; `data` is a report that parses."""
    return data[:-SIGNATURE_BYTES]


def _parse_measurement(record: Reader) -> Measurement:
    index, specification, size, value_type, value_size = record.unpack(_BLOCK, "measurement")
    if not 1 <= index <= 254:
        raise FormatError(f"spdm.index: expected 1 to 254, got {index}", code="spdm.index")
    if specification != _DMTF:
        message = f"spdm.measurement_specification: expected {_DMTF}, got {specification}"
        raise FormatError(message, code="spdm.measurement_specification")
    if size != _VALUE_HEAD_BYTES + value_size:
        message = f"spdm.measurement_size: expected {_VALUE_HEAD_BYTES + value_size}, got {size}"
        raise FormatError(message, code="spdm.trailing" if size > _VALUE_HEAD_BYTES + value_size else "spdm.truncated")
    return Measurement(index=index, value_type=value_type, value=record.take(value_size, "value"))


def _parse_opaque(reader: Reader) -> tuple[bytes, tuple[Opaque, ...]]:
    header = b""
    if reader.data.startswith(_OPAQUE_MAGIC):
        header = reader.take(_OPAQUE_HEADER_BYTES, "opaque_header")
        profile, major, reserved = header[6:8], header[8], header[10:]
        if profile != _OPAQUE_PROFILE or major > _MAX_OPAQUE_VERSION or any(reserved):
            message = f"spdm.opaque_header: expected profile 0 of version 0 or 1, got {header.hex()}"
            raise FormatError(message, code="spdm.opaque_version")
    records: list[Opaque] = []
    while reader.left:
        kind = reader.uint(2, "opaque_type")
        value_type = reader.uint(2, "opaque_value_type") if header else None
        value = reader.take(reader.uint(2, "opaque_value_size"), "opaque_value")
        records.append(Opaque(kind=kind, value=value, value_type=value_type))
    if len({record.kind for record in records}) != len(records):
        raise FormatError("spdm.opaque: expected each opaque type once", code="spdm.opaque_duplicate")
    for record in records:
        version = int.from_bytes(record.value, "little")
        if record.kind == OpaqueType.OPAQUE_DATA_VERSION and version > _MAX_OPAQUE_VERSION:
            message = f"spdm.opaque_data_version: expected at most {_MAX_OPAQUE_VERSION}, got {version:#x}"
            raise FormatError(message, code="spdm.opaque_version")
    return header, tuple(records)


def _encode_opaque(record: Opaque) -> bytes:
    value_type = b"" if record.value_type is None else record.value_type.to_bytes(2, "little")
    return record.kind.to_bytes(2, "little") + value_type + len(record.value).to_bytes(2, "little") + record.value
