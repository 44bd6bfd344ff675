"""GPU reports: genuine H100 reports with their signatures, and mutations."""

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import FormatError
from countermark.formats.spdm import (
    FeatureFlag,
    Measurement,
    Opaque,
    OpaqueType,
    Report,
    encode_report,
    parse_report,
    signed_part,
)

VALUE = Report(
    nonce=bytes(range(32)),
    slot=1,
    response_params=b"\0\1",
    measurements=(
        Measurement(index=1, value_type=1, value=bytes(48)),
        Measurement(index=9, value_type=0x81, value=b"raw"),
    ),
    responder_nonce=bytes(32),
    opaque=(
        Opaque(kind=3, value=b"550.90.07\0"),
        Opaque(kind=6, value=bytes.fromhex("009f009601000000")),
        Opaque(kind=12, value=bytes((1, 0, 0, 0, 2, 0, 0, 0))),
        Opaque(kind=20, value=b""),
        Opaque(kind=999, value=b"kept"),
    ),
    signature=bytes(96),
)
DATA = encode_report(VALUE)


@pytest.mark.parametrize("name", vectors.GPU_SETS)
def test_genuine_reports_verify_over_the_part_before_the_signature(name):
    data = vectors.gpu_report(name)
    report = parse_report(data)
    assert encode_report(report) == data
    assert [block.index for block in report.measurements] == list(range(1, 65))
    assert {len(block.value) for block in report.measurements} == {48}
    leaf = x509.load_pem_x509_certificates(vectors.gpu_chain_pem(name))[0]
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:48], report.signature[48:]))
    leaf.public_key().verify(encode_dss_signature(r, s), signed_part(data), ec.ECDSA(hashes.SHA384()))


def test_genuine_fields():
    new, old = (parse_report(vectors.gpu_report(name)) for name in vectors.GPU_SETS)
    assert new.nonce.hex() == "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb"
    assert (new.driver_version, new.vbios_version) == ("550.90.07", "96.00.9F.00.01")
    assert (old.driver_version, old.vbios_version) == ("535.86.09", "96.00.5E.00.01")
    leaf = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))[0]
    dice = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("2.23.133.5.4.1"))
    assert new.fwid == dice.value.value[-48:]
    assert old.fwid is None
    assert new.find(OpaqueType.PROTECTED_PCIE_STATUS) == b"\x55"
    assert len(new.measurement_counts) == 64


def test_reads_fields():
    report = parse_report(DATA)
    assert report == VALUE
    assert (report.driver_version, report.vbios_version, report.fwid) == ("550.90.07", "96.00.9F.00.01", None)
    assert report.measurement_counts == (1, 2)
    assert report.find(OpaqueType.BOARD_ID) is None


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0, 0x12, "spdm.request_version"),
        (1, 0xE1, "spdm.request_code"),
        (2, 0, "spdm.request_param1"),
        (3, 1, "spdm.request_param2"),
        (36, 8, "spdm.slot"),
        (37, 0x12, "spdm.response_version"),
        (38, 0x7F, "spdm.response_code"),
        (41, 1, "spdm.trailing"),
        (41, 3, "spdm.truncated"),
        (42, 0, "spdm.truncated"),
        (45, 0, "spdm.index"),
        (45, 9, "spdm.index"),
        (46, 2, "spdm.measurement_specification"),
        (47, 50, "spdm.truncated"),
        (50, 47, "spdm.trailing"),
        (144, 6, "spdm.opaque_duplicate"),
    ],
)
def test_refuses(offset, value, code):
    data = bytearray(DATA)
    if code == "spdm.opaque_duplicate":
        offset = data.index(b"\x03\x00\x0a\x00")
    data[offset] = value
    with pytest.raises(FormatError) as refused:
        parse_report(bytes(data))
    assert refused.value.code == code


def test_refuses_sizes():
    for data, code in (
        (DATA + b"\0", "spdm.trailing"),
        (DATA[:-1], "spdm.truncated"),
        (bytes(99_999), "spdm.too_long"),
    ):
        with pytest.raises(FormatError) as refused:
            parse_report(data)
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("kind", "value", "name"),
    [(3, b"a\0b", "driver_version"), (3, b"\xff", "driver_version"), (6, b"1", "vbios_version")],
)
def test_fields_of_another_form_are_refused_when_read(kind, value, name):
    import dataclasses

    report = dataclasses.replace(VALUE, opaque=(Opaque(kind=kind, value=value),))
    with pytest.raises(FormatError):
        getattr(report, name)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 255), st.integers(-100, 9))
def test_every_byte_is_accounted_for(offset, value, resize):
    changed = bytearray(DATA)
    changed[offset] = value
    mutated = bytes(changed[:resize] if resize < 0 else changed + bytes(resize))
    try:
        report = parse_report(mutated)
    except FormatError as err:
        assert err.code.startswith("spdm.")
    else:
        assert encode_report(report) == mutated


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    for head in (b"", DATA[:45]):
        with pytest.raises(FormatError):
            parse_report(head + data)


def test_the_form_with_a_header_has_value_types():
    header = b"NVDAOD" + bytes((0, 0, 1, 0, 0, 0))
    typed = tuple(replace(item, value_type=0x87) for item in VALUE.opaque)
    value = replace(VALUE, opaque_header=header, opaque=typed)
    assert parse_report(encode_report(value)) == value
    assert parse_report(encode_report(value)).driver_version == VALUE.driver_version
    for bad in (b"NVDAOD" + bytes((1, 0, 0, 0, 0, 0)), b"NVDAOD" + bytes((0, 0, 2, 0, 0, 0)), b"NVDAOD\0\0\0\0\0\1"):
        with pytest.raises(FormatError) as refused:
            parse_report(encode_report(replace(value, opaque_header=bad)))
        assert refused.value.code == "spdm.opaque_version"


@pytest.mark.parametrize(
    ("kind", "value", "name", "code"),
    [
        (OpaqueType.FEATURE_FLAG, b"", "feature_flag", "spdm.feature_flag"),
        (OpaqueType.FEATURE_FLAG, b"\3\0", "feature_flag", "spdm.feature_flag"),
        (OpaqueType.FEATURE_FLAG, b"\1" + bytes(8), "feature_flag", "spdm.feature_flag"),
        (OpaqueType.SWITCH_PDI, bytes(9), "switch_pdis", "spdm.switch_pdi"),
    ],
)
def test_records_of_newer_firmware_that_are_none(kind, value, name, code):
    with pytest.raises(FormatError) as refused:
        getattr(replace(VALUE, opaque=(Opaque(kind=kind, value=value),)), name)
    assert refused.value.code == code


def test_records_of_newer_firmware():
    pdis = bytes(range(16))
    records = (
        Opaque(kind=OpaqueType.FEATURE_FLAG, value=b"\2\0"),
        Opaque(kind=OpaqueType.SWITCH_PDI, value=pdis),
        Opaque(kind=OpaqueType.OPAQUE_DATA_VERSION, value=b"\1\0"),
    )
    report = parse_report(encode_report(replace(VALUE, opaque=records)))
    assert (report.feature_flag, report.switch_pdis) == (FeatureFlag.PPCIE, (pdis[:8], pdis[8:]))
    assert (VALUE.feature_flag, VALUE.switch_pdis) == (None, ())
    newer = replace(VALUE, opaque=(Opaque(kind=OpaqueType.OPAQUE_DATA_VERSION, value=b"\2\0"),))
    with pytest.raises(FormatError) as refused:
        parse_report(encode_report(newer))
    assert refused.value.code == "spdm.opaque_version"
