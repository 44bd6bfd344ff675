"""PE hash and sections, and what systemd-stub makes of a unified kernel image."""

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark_measurements.pe import parse_pe
from countermark_measurements.uki import parse_uki
from measurements.predict.artefacts import KERNEL, UKI_SECTIONS, pe, uki

OPTIONAL = 0x40 + 24  # where the optional header of `pe` begins
CHECKSUM, CERTIFICATES = OPTIONAL + 64, OPTIONAL + 112 + 32


def refused(parse, data: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        parse(data)
    return caught.value.code


def test_hash_leaves_out_checksum_and_certificates():
    image = pe([(".text", b"code" * 200), (".data", b"data")])
    expected = hashlib.sha384(
        image[:CHECKSUM] + image[CHECKSUM + 4 : CERTIFICATES] + image[CERTIFICATES + 8 :]
    ).digest()
    assert parse_pe(image).authenticode == expected
    signed = bytearray(image + b"certificate!" * 2)
    struct.pack_into("<II", signed, CERTIFICATES, len(image), 24)
    assert parse_pe(bytes(signed)).authenticode == expected
    signed[CHECKSUM] ^= 1
    assert parse_pe(bytes(signed)).authenticode == expected
    with_tail = image + b"more"
    assert parse_pe(with_tail).authenticode != expected


def test_every_other_byte_counts():
    image = pe([(".text", b"code" * 200), (".data", b"data")])
    plain = parse_pe(image).authenticode
    excepted = {*range(CHECKSUM, CHECKSUM + 4), *range(CERTIFICATES, CERTIFICATES + 8)}
    same = set()
    for at in range(len(image)):
        changed = image[:at] + bytes((image[at] ^ 0x01,)) + image[at + 1 :]
        try:
            if parse_pe(changed).authenticode == plain:
                same.add(at)
        except FormatError:
            continue
    assert same <= excepted
    assert set(range(CHECKSUM, CHECKSUM + 4)) <= same


def test_sections_in_memory():
    image = parse_pe(pe([("a", b"x" * 10), ("b", b"")], raw_extra=512))
    assert [(item.name, item.data, item.raw_size) for item in image.sections] == [
        ("a", b"x" * 10, 1024),
        ("b", b"", 512),
    ]
    grown = bytearray(pe([("a", b"x" * 10)]))
    struct.pack_into("<I", grown, OPTIONAL + 240 + 8, 4000)  # VirtualSize beyond the file's data
    assert parse_pe(bytes(grown)).sections[0].data == b"x" * 10 + bytes(3990)


@pytest.mark.parametrize(
    ("at", "new", "code"),
    [
        (0, b"X", "pe.header"),
        (0x3C, b"\xff\xff\xff\x7f", "pe.header"),
        (0x40, b"X", "pe.header"),
        (0x44, struct.pack("<H", 0x14C), "pe.header"),
        (0x46, struct.pack("<H", 0), "pe.header"),
        (0x46, struct.pack("<H", 200), "pe.header"),
        (OPTIONAL, struct.pack("<H", 0x10B), "pe.header"),
        (OPTIONAL + 60, struct.pack("<I", 1 << 30), "pe.header"),
        (OPTIONAL + 60, struct.pack("<I", 64), "pe.header"),
        (OPTIONAL + 108, struct.pack("<I", 17), "pe.header"),
        (CERTIFICATES, struct.pack("<II", 600, 8), "pe.certificates"),
        (OPTIONAL + 240 + 16, struct.pack("<I", 1 << 20), "pe.section"),
        (OPTIONAL + 240 + 20, struct.pack("<I", 0x500), "pe.section"),
        (OPTIONAL + 240 + 40 + 20, struct.pack("<I", 0x200), "pe.section"),
        (OPTIONAL + 240 + 8, struct.pack("<I", 1 << 29), "pe.section"),
        (OPTIONAL + 240 + 40 + 12, struct.pack("<I", 0x1000), "pe.section"),  # apart in memory no more
    ],
)
def test_pe_refusals(at, new, code):
    image = pe([(".text", b"code" * 200), (".data", b"data")])
    assert refused(parse_pe, image[:at] + new + image[at + len(new) :]) == code


def test_what_the_stub_measures():
    found = parse_uki(uki())
    contents = dict(UKI_SECTIONS)
    order = [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"]  # uki.h's, not the file's
    assert list(found.sections) == [(name, contents[name]) for name in order]
    assert found.kernel_authenticode == parse_pe(KERNEL).authenticode
    assert found.authenticode == parse_pe(uki()).authenticode
    assert found.command_line == "console=ttyS0  roothash=00"
    assert found.load_options == "console=ttyS0  roothash=00\0".encode("utf-16-le")


def cpio(data: bytes) -> list[tuple[str, int, bytes]]:
    """Name, mode and content of each entry of a "newc" archive, its trailer included."""
    found, at = [], 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = at + 110 + fields[11]
        start += -start % 4
        found.append((name, fields[1], data[start : start + fields[6]]))
        at = start + fields[6]
        at += -at % 4
    return found


def test_the_initrd_has_the_stubs_archive_behind_it():
    contents = dict(UKI_SECTIONS)
    initrd = parse_uki(uki()).initrd
    own = contents[".initrd"] + bytes(-len(contents[".initrd"]) % 4)
    assert initrd.startswith(own)
    assert len(initrd) % 4 == 0
    assert cpio(initrd[len(own) :]) == [
        (".extra", 0o040555, b""),
        (".extra/os-release", 0o100444, contents[".osrel"]),
        ("TRAILER!!!", 0, b""),
    ]


def without(name: str):
    return [item for item in UKI_SECTIONS if item[0] != name]


@pytest.mark.parametrize("name", [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"])
def test_each_section_is_needed(name):
    assert refused(parse_uki, uki(without(name))) == "uki.sections"
    assert refused(parse_uki, uki([*without(name), (name, b"")])) == "uki.sections"
    assert refused(parse_uki, uki([*UKI_SECTIONS, (name, b"again")])) == "uki.sections"


@pytest.mark.parametrize("name", [".profile", ".dtb", ".dtbauto", ".hwids", ".splash", ".ucode", ".pcrsig", ".pcrpkey"])
def test_sections_that_images_have_not(name):
    assert refused(parse_uki, uki([*UKI_SECTIONS, (name, b"x")])) == "uki.sections"


@pytest.mark.parametrize("line", [b"a\0b", "ä".encode(), b"x" * 4097])
def test_command_lines_refused(line):
    assert refused(parse_uki, uki([*without(".cmdline"), (".cmdline", line)])) == "uki.command_line"


def test_an_image_that_is_no_application_is_refused():
    assert refused(parse_uki, pe(UKI_SECTIONS, subsystem=11)) == "uki.sections"
    driver = [*without(".linux"), (".linux", pe([(".text", b"x")], subsystem=11))]
    assert refused(parse_uki, uki(driver)) == "uki.sections"
    assert refused(parse_uki, uki([*without(".linux"), (".linux", b"no kernel")])) == "pe.header"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1200), st.binary(min_size=1, max_size=30))
def test_arbitrary_changes_give_an_image_or_a_refusal(at, noise):
    data = uki()
    try:
        parse_uki(data[:at] + noise + data[at + len(noise) :])
    except FormatError as err:
        assert err.code.split(".")[0] in ("pe", "uki")
