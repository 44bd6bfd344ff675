"""Deterministic CBOR against cbor2 (an independent codec) and RFC 8949's own examples."""

import struct
import time

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import cbor

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**64), max_value=2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.binary(max_size=300)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
)
KEYS = st.integers(min_value=-1000, max_value=1000) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12)


@given(VALUES)
def test_round_trip_and_second_codec(value: object) -> None:
    data = cbor.encode(value)
    assert cbor2.loads(data) == value
    assert cbor.decode(data) == value


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_value_or_a_format_error(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except FormatError:
        return
    assert cbor.encode(value) == data


# RFC 8949 appendix A, rows with a value we allow
@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (24, "1818"),
        (1000000000000, "1b000000e8d4a51000"),
        (18446744073709551615, "1bffffffffffffffff"),
        (-18446744073709551616, "3bffffffffffffffff"),
        (-1000, "3903e7"),
        (0.0, "f90000"),
        (-0.0, "f98000"),
        (1.1, "fb3ff199999999999a"),
        (65504.0, "f97bff"),
        (100000.0, "fa47c35000"),
        (5.960464477539063e-8, "f90001"),
        (-4.1, "fbc010666666666666"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ("ü", "62c3bc"),
        ([1, [2, 3], [4, 5]], "8301820203820405"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
    ],
)
def test_rfc_8949_appendix_a(value: object, encoded: str) -> None:
    assert cbor.encode(value).hex() == encoded


def test_map_keys_sort_bytewise_not_by_length() -> None:
    """RFC 8949 4.2.1 sorts 1000 (19 03e8) before -1 (20); RFC 7049's length-first order has it the other way round."""
    assert cbor.encode({-1: 0, 1000: 0}).hex() == "a21903e8002000"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("1800", "cbor.not_deterministic"),  # long head
        ("fb3ff8000000000000", "cbor.not_deterministic"),  # 1.5 as binary64
        ("9f01ff", "cbor.not_deterministic"),  # indefinite length
        ("a2616201616102", "cbor.not_deterministic"),  # keys out of order
        ("a2616101616102", "cbor.not_deterministic"),  # duplicate key
        ("0000", "cbor.not_deterministic"),  # trailing byte
        ("f97e00", "cbor.type"),  # NaN
        ("f97c00", "cbor.type"),  # infinity
        ("5f", "cbor.not_deterministic"),
        ("1c", "cbor.malformed"),  # reserved length
        ("ff", "cbor.malformed"),  # the end of nothing
        ("a18000", "cbor.type"),  # an array as map key
        ("a2f500", "cbor.malformed"),
        ("61ff", "cbor.malformed"),  # not UTF-8
        ("f8ff", "cbor.type"),  # an unassigned simple value
        ("", "cbor.malformed"),
        ("9b7fffffffffffffff", "cbor.malformed"),  # an array longer than memory
        ("81" * 40 + "00", "cbor.malformed"),  # deep nesting
        ("f7", "cbor.type"),  # undefined
    ],
)
def test_refused(data: str, code: str) -> None:
    with pytest.raises(FormatError) as err:
        cbor.decode(bytes.fromhex(data))
    assert err.value.code == code


@pytest.mark.parametrize(
    "data",
    [
        "c074323031332d30332d32315432303a30343a30305a",  # a date
        "c249010000000000000000",  # a bignum
        "c5821b7fffffffffffffff03",  # 3 * 2^(2^63)
        "d81c81d81d00",  # a list that holds itself
        "d81e820100",  # 1 / 0
        "d8236b28286128612861292b292b",  # a regular expression
    ],
)
def test_a_tag_has_no_meaning_here(data: str) -> None:
    value = cbor.decode(bytes.fromhex(data))
    assert type(value) is cbor2.CBORTag
    assert cbor.encode(value).hex() == data


def test_references_are_not_followed() -> None:
    """Tags 28/29 and 256/25 let a few kilobytes stand for more than any memory holds; followed, this never ends."""
    shared = [bytes.fromhex("d81c9864" + ("00" if n == 0 else f"d81d{n - 1:02x}") * 100) for n in range(12)]
    values = [b"\x8c" + b"".join(shared), bytes.fromhex("d9010099ffff") + b"\x5a\x00\x10\x00\x00" + bytes(1 << 20)]
    values[1] += bytes.fromhex("d81900") * 0xFFFE
    for data in values:
        assert cbor.encode(cbor.decode(data)) == data


def test_too_long() -> None:
    with pytest.raises(FormatError) as err:
        cbor.decode(b"\x00" * 11, max_bytes=10)
    assert err.value.code == "cbor.too_long"


def test_items_are_counted_before_they_are_built() -> None:
    """32 MB of empty arrays took minutes and gigabytes to be told that they are no answer."""
    head = b"\x9a" + (32 * 1024 * 1024).to_bytes(4, "big")
    for item in (b"\x80", b"\xa0", b"\x00", b"\x40", b"\xc0\x00", b"\x78\x01a"):
        started = time.monotonic()
        with pytest.raises(FormatError) as err:
            cbor.decode(head + item * (32 * 1024 * 1024 // len(item)))
        assert err.value.code == "cbor.too_many"
        assert time.monotonic() - started < 10
    value = [bytes(1 << 20), "a" * 300, list(range(3000)), {"k": 1.5}, None]
    assert cbor.decode(cbor.encode(value)) == value


def test_fields_names_missing_unknown_and_mistyped() -> None:
    assert cbor.fields({"v": 1}, "thing", v=int) == {"v": 1}
    for bad in ({}, {"v": 1, "w": 2}, {"v": True}, {"v": "1"}, [1]):
        with pytest.raises(FormatError) as err:
            cbor.fields(bad, "thing", v=int)
        assert err.value.code == "thing.field"


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_binary32_values_never_need_more_than_binary32(value: float) -> None:
    assert len(cbor.encode(value)) <= 1 + struct.calcsize(">f")
