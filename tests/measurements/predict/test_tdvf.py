"""MRTD: Debian's firmware against values of another implementation, a made image against the specification."""

import hashlib
import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark_measurements.tdvf import Order, SectionKind, mrtd, parse_tdvf
from measurements.predict.artefacts import ovmf_path

# Of the file with sha256 14954040..., by an implementation independent of this one.
INDEPENDENT = {
    Order.ONE_PASS: "bdc6fb145880f06f30c8b346b8dce2a99d9351b56892df22f80fcf6574caa9f9c31df8e8576d53b4d0cd1c3f28910e11",
    Order.TWO_PASSES: "456f07902150d008bb913c3e1e84e9297f735a6c83cd2a957a1f0a8bbedb06df"
    "188e3837ae48d32c73d473d097dc0db2",
}
CODE, VARIABLES = bytes(range(256)) * 32, b"\x5a" * 4096  # 8192 and 4096 bytes
METADATA = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
OTHER = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le
FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
SECTIONS = [
    (4096, 8192, 0xFFFFE000, 8192, 0, 1),
    (0, 4096, 0xFFFFD000, 4096, 1, 0),
    (0, 0, 0x809000, 8192, 2, 0),
    (0, 0, 0x80B000, 4096, 3, 0),
]


def firmware(sections=SECTIONS, *, version=1, count=None, length=None, entry=METADATA, offset=None, footer=FOOTER):
    body = VARIABLES + CODE
    descriptor = struct.pack("<4sIII", b"TDVF", length or 16 + 32 * len(sections), version, count or len(sections))
    descriptor += b"".join(struct.pack("<IIQQII", *section) for section in sections)
    table = b"1234" + struct.pack("<H", 22) + OTHER
    table += struct.pack("<I", 0) + struct.pack("<H", 22) + entry
    total = len(table) + 18
    end = descriptor + table + struct.pack("<H", total) + footer + bytes(32)
    from_end = len(end) if offset is None else offset
    end = end.replace(struct.pack("<I", 0) + struct.pack("<H", 22) + entry, struct.pack("<IH", from_end, 22) + entry)
    return body + end


def test_debians_firmware_in_both_orders():
    tdvf = parse_tdvf(ovmf_path().read_bytes())
    assert {order: mrtd(tdvf, order).hex() for order in Order} == INDEPENDENT
    cfv = tdvf.only(SectionKind.CFV).data
    assert hashlib.sha384(cfv).hexdigest().startswith("344bc51c980ba621")  # as genuine logs have it, see test_rtmr0


def test_a_made_image_as_the_specification_says():
    """The stream written out: MEM.PAGE.ADD for each page, MR.EXTEND and the bytes for each 256 bytes of code."""
    one, two = hashlib.sha384(), hashlib.sha384()

    def block(name: bytes, address: int) -> bytes:
        return name + bytes(16 - len(name)) + struct.pack("<Q", address) + bytes(104)

    def pieces(page: int) -> bytes:
        return b"".join(
            block(b"MR.EXTEND", 0xFFFFE000 + at) + CODE[at : at + 256] for at in range(page, page + 4096, 256)
        )

    adds = [block(b"MEM.PAGE.ADD", 0xFFFFE000), block(b"MEM.PAGE.ADD", 0xFFFFF000)]
    rest = b"".join(block(b"MEM.PAGE.ADD", at) for at in (0xFFFFD000, 0x809000, 0x80A000, 0x80B000))
    one.update(adds[0] + pieces(0) + adds[1] + pieces(4096) + rest)
    two.update(adds[0] + adds[1] + pieces(0) + pieces(4096) + rest)
    tdvf = parse_tdvf(firmware())
    assert mrtd(tdvf, Order.ONE_PASS) == one.digest()
    assert mrtd(tdvf, Order.TWO_PASSES) == two.digest()


def changed(index: int, **fields: int):
    names = ("offset", "raw", "address", "size", "kind", "attributes")
    found = list(SECTIONS)
    found[index] = tuple(fields.get(name, value) for name, value in zip(names, found[index], strict=True))
    return found


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "tdvf.table"),
        (firmware(footer=bytes(16)), "tdvf.table"),
        (firmware(entry=bytes(16)), "tdvf.table"),
        (firmware(entry=OTHER), "tdvf.table"),
        (firmware(offset=1 << 20), "tdvf.metadata"),
        (firmware(offset=64), "tdvf.metadata"),
        (firmware(version=2), "tdvf.metadata"),
        (firmware(count=3), "tdvf.metadata"),
        (firmware(length=100), "tdvf.metadata"),
        (firmware(changed(0, offset=1 << 20)), "tdvf.sections"),
        (firmware(changed(0, raw=4096)), "tdvf.sections"),
        (firmware(changed(0, address=0xFFFFE001)), "tdvf.sections"),
        (firmware(changed(0, attributes=3)), "tdvf.sections"),
        (firmware(changed(0, kind=4)), "tdvf.sections"),
        (firmware(changed(2, attributes=1)), "tdvf.sections"),
        (firmware(changed(2, size=0)), "tdvf.sections"),
        (firmware(changed(2, size=1 << 40)), "tdvf.sections"),
        (firmware(changed(3, address=0x80A000)), "tdvf.sections"),
        (firmware(changed(3, raw=16)), "tdvf.sections"),
        (bytes((64 << 20) + 1), "tdvf.too_long"),
    ],
)
def test_refusals(data, code):
    with pytest.raises(FormatError) as caught:
        parse_tdvf(data)
    assert caught.value.code == code


def test_every_byte_of_the_code_and_no_other_counts():
    plain = mrtd(parse_tdvf(firmware()), Order.ONE_PASS)
    image = firmware()
    for at in (4096, 4096 + 8191):
        flipped = image[:at] + bytes((image[at] ^ 1,)) + image[at + 1 :]
        assert mrtd(parse_tdvf(flipped), Order.ONE_PASS) != plain
    in_variables = b"\0" + image[1:]  # the firmware measures these itself, into RTMR0
    assert mrtd(parse_tdvf(in_variables), Order.ONE_PASS) == plain


def test_truncated_images_are_refused():
    image = firmware()
    for end in range(0, len(image), 7):
        with pytest.raises(FormatError):
            parse_tdvf(image[:end])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 250), st.binary(min_size=1, max_size=40))
def test_arbitrary_changes_of_the_metadata_give_sections_or_a_refusal(from_end, noise):
    image = firmware()
    at = max(len(image) - 250 + from_end, 0)
    try:
        found = parse_tdvf(image[:at] + noise + image[at + len(noise) :])
    except FormatError as err:
        assert err.code.startswith("tdvf.")
    else:
        assert len(mrtd(found, Order.TWO_PASSES)) == 48
