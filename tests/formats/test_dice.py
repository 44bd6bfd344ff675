"""DER elements, against OpenSSL's reader, and the DICE extension in its two forms."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats.der import parse_elements, parse_sequence
from countermark.formats.dice import parse_dice
from countermark_appliance.platform.sim import der

FWID = bytes(range(48))
SHA384 = "2.16.840.1.101.3.4.2.2"
SPKI = der.sequence(der.sequence(der.oid("1.2.840.10045.2.1")), der.tlv(0x03, b"\0key"))
HASHED = der.sequence(der.oid(SHA384), der.octets(FWID))
OTHER = der.sequence(der.oid("2.16.840.1.101.3.4.2.1"), der.octets(bytes(32)))
HOPPER = der.sequence(der.integer(1), SPKI, HASHED)
BLACKWELL = der.sequence(der.tlv(0x80, b"NVIDIA"), der.tlv(0xA6, HASHED + OTHER), der.tlv(0x87, b"\0\x80"))


def test_the_two_forms() -> None:
    hopper, blackwell = parse_dice(HOPPER), parse_dice(BLACKWELL)
    assert (hopper.fwid, hopper.device_id) == (FWID, SPKI)
    assert (blackwell.fwid, blackwell.device_id) == (FWID, None)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("der.form", b""),
        ("der.form", b"\x30"),
        ("der.form", HOPPER + b"\0\0"),
        ("der.form", HOPPER[:-1]),
        ("der.form", der.octets(HOPPER)),
        ("der.form", b"\x30\x80" + HOPPER[3:] + b"\0\0"),
        ("der.form", der.sequence(b"\x1f\x81\x00\x00")),
        ("der.form", der.sequence(b"\x02\x81\x01\x01")),
        ("der.form", der.sequence(*[der.integer(1)] * 65)),
        ("dice.form", der.sequence()),
        ("dice.form", der.sequence(der.integer(1), SPKI)),
        ("dice.form", der.sequence(der.integer(1), SPKI, HASHED, HASHED)),
        ("dice.form", der.sequence(der.integer(1), SPKI, OTHER)),
        ("dice.form", der.sequence(der.integer(1), SPKI, der.sequence(der.oid(SHA384), der.octets(FWID[:47])))),
        ("dice.form", der.sequence(der.integer(1), SPKI, der.sequence(der.octets(FWID), der.oid(SHA384)))),
        ("dice.form", der.sequence(der.tlv(0x80, b"NVIDIA"))),
        ("dice.form", der.sequence(der.tlv(0xA6, b""))),
        ("dice.form", der.sequence(der.tlv(0xA6, HASHED * 9))),
        ("dice.form", der.sequence(der.tlv(0xA6, OTHER + HASHED))),
        ("dice.form", der.sequence(der.tlv(0xA6, HASHED), der.tlv(0xA6, HASHED))),
        ("dice.form", der.sequence(der.tlv(0x87, b"\0"), der.tlv(0xA6, HASHED))),
        ("dice.form", der.sequence(der.tlv(0x86, HASHED))),
    ],
)
def test_refused(code: str, data: bytes) -> None:
    with pytest.raises(FormatError) as err:
        parse_dice(data)
    assert err.value.code == code


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(BLACKWELL) - 1), st.integers(1, 255))
def test_arbitrary_bytes_give_a_value_or_our_error(data: bytes, position: int, change: int) -> None:
    bent = bytearray(BLACKWELL)
    bent[position] ^= change
    for attempt in (data, bytes(bent)):
        try:
            parse_dice(attempt)
        except FormatError as err:
            assert err.code in ("der.form", "dice.form")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_elements_are_what_was_put_in(values: list[bytes]) -> None:
    encoded = [der.octets(value) for value in values]
    found = parse_elements(b"".join(encoded))
    assert [item.value for item in found] == values
    assert [item.encoded for item in found] == encoded
    assert parse_sequence(der.sequence(*encoded)) == found


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_openssl_reads_the_same_elements() -> None:
    done = subprocess.run(
        ("openssl", "asn1parse", "-inform", "DER"), input=HOPPER, capture_output=True, check=True, timeout=60
    )
    lines = [line for line in done.stdout.decode().splitlines() if "d=1" in line]
    assert len(lines) == len(parse_sequence(HOPPER)) == 3
    lengths = [int(line.partition(" l=")[2].split()[0]) for line in lines]
    assert lengths == [len(item.value) for item in parse_sequence(HOPPER)]
