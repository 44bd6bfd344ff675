"""RVPS and CoRIM: round trips, and what others read: cbor2, and cddl-verifier with the draft's CDDL."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from cddl_verifier import validate
from hypothesis import given, settings
from hypothesis import strategies as st
from publisher import SHAPES, sha384, statement

from countermark.errors import FormatError, UsageError
from countermark.formats.manifest import Manifest
from countermark_measurements.corim import corim_of, encode_corim, parse_corim
from countermark_measurements.rvps import encode_message, encode_rvps, parse_rvps, reference_values

CDDL = Path(__file__).parents[2] / "data" / "corim" / "corim.cddl"
SCHEMA = CDDL.read_text()
IMAGE = replace(statement(), mrseam=(sha384("module 1"), sha384("module 2")))
CORIM = encode_corim(corim_of(IMAGE))


def rvps_of(image: Manifest) -> bytes:
    return encode_rvps(reference_values(image))


def test_rvps_has_trustees_names() -> None:
    """The names that default_cpu.rego asks for and those of its TDX claims; every value a list of hex."""
    value = json.loads(rvps_of(IMAGE))
    assert value["mr_td"] == [sha384("mrtd qemu-8.2").hex(), sha384("mrtd qemu-9").hex()]
    assert value["rtmr_0"] == [shape.rtmr0.hex() for shape in IMAGE.shapes]
    assert (value["rtmr_1"], value["rtmr_2"]) == ([IMAGE.rtmr1.hex()], [IMAGE.rtmr2.hex()])
    assert value["mr_seam"] == [item.hex() for item in IMAGE.mrseam]
    assert value["xfam"] == ["e702060000000000"]
    assert value["td_attributes"] == ["0000001000000000"]
    assert {name for name in value if name.startswith("mr_")} == {
        *("mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"),
    }
    assert "mr_seam" not in json.loads(rvps_of(replace(IMAGE, mrseam=())))  # an empty list would refuse every module


def test_rvps_round_trip() -> None:
    assert parse_rvps(rvps_of(IMAGE)) == reference_values(IMAGE)
    message = json.loads(encode_message(reference_values(IMAGE)))
    assert (message["version"], message["type"]) == ("0.1.0", "sample")
    assert base64.b64decode(message["payload"]) == rvps_of(IMAGE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"mr_td":"00"}',
        b'{"mr_td":[]}',
        b'{"mr_td":["00"]}',
        b'{"mr_tdx":[]}',
        rvps_of(IMAGE)[:-1],
        rvps_of(IMAGE) + b"\n",
        rvps_of(IMAGE).replace(b"e7020600", b"E7020600"),
    ],
)
def test_another_rvps_file_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as err:
        parse_rvps(data)
    assert err.value.code.startswith("rvps.")


def test_simulated_values_are_not_for_trustee() -> None:
    with pytest.raises(UsageError) as err:
        reference_values(statement(platform="vtpm"))
    assert err.value.code == "usage.manifest"


def test_corim_round_trip() -> None:
    assert parse_corim(CORIM) == corim_of(IMAGE)
    bare = statement(platform="vtpm")
    assert parse_corim(encode_corim(corim_of(bare))) == corim_of(bare)


def test_a_corim_is_what_the_draft_allows() -> None:
    for image in (IMAGE, statement(platform="vtpm"), replace(IMAGE, mrseam=())):
        found = validate(SCHEMA, encode_corim(corim_of(image)))
        assert found.valid, found.errors


def test_another_decoder_finds_the_registers() -> None:
    """cbor2, with the keys of the draft written out: 501, 506, triples, integrity registers, raw values."""

    outer = cbor2.loads(CORIM)
    assert outer.tag == 501
    body = outer.value
    assert body[0] == f"countermark/{IMAGE.image_id.hex()}/1"
    assert int(body[4][0].timestamp()) == IMAGE.not_before  # tag 1: cbor2 makes a date of it
    assert int(body[4][1].timestamp()) == IMAGE.not_after
    for tag, shape in zip(body[1], IMAGE.shapes, strict=True):
        assert tag.tag == 506
        comid = cbor2.loads(tag.value)
        assert comid[1] == {0: f"{IMAGE.image_id.hex()}/{shape.name}", 1: 1}
        ((environment, claims),) = comid[4][0]
        assert environment == {0: {1: "countermark", 2: "production/tdx"}}
        values = {claim[0]: claim[1] for claim in claims}
        assert values["td"][14] == {
            "mrtd": [[7, shape.mrtd]],
            "rtmr0": [[7, shape.rtmr0]],
            "rtmr1": [[7, IMAGE.rtmr1]],
            "rtmr2": [[7, IMAGE.rtmr2]],
        }
        assert values["mrseam"][14] == {"mrseam": [[7, item] for item in IMAGE.mrseam]}
        raw = {name: value[4] for name, value in values.items() if 4 in value}
        assert {item.tag for item in raw.values()} == {560}
        assert {name: item.value for name, item in raw.items()} == {
            name: getattr(IMAGE, name) for name in ("td_attributes", "xfam", "mrconfigid", "mrowner", "mrownerconfig")
        }
    assert len(body[1]) == len(SHAPES)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b"\xd9\x01\xf5", b"\xd9\x01\xf6"),  # the tag of a signed CoRIM
        (b"\xd9\x01\xfa", b"\xd9\x01\xfb"),  # of a CoMID
        (b"\xa1\x0e\xa4", b"\xa1\x0d\xa4"),  # integrity registers
        (b"\x82\x07\x58", b"\x82\xf5\x58"),  # the algorithm
        (b"\xd9\x02\x30", b"\xd9\x02\x31"),  # tagged bytes
        (b"\xc1\x1a", b"\xc2\x1a"),  # time
    ],
)
def test_both_refuse_another_form(good: bytes, bad: bytes) -> None:
    """So that the check against the draft is shown to be one."""
    assert good in CORIM
    changed = CORIM.replace(good, bad, 1)
    assert not validate(SCHEMA, changed).valid
    with pytest.raises(FormatError):
        parse_corim(changed)


def test_another_corim_is_refused() -> None:
    wrong_id = CORIM.replace(f"countermark/{IMAGE.image_id.hex()}".encode(), b"countermark/" + b"0" * 64, 1)
    other_image = CORIM.replace(
        IMAGE.image_id.hex().encode() + b"/" + SHAPES[1].encode(), b"0" * 64 + b"/" + SHAPES[1].encode()
    )
    sha256 = CORIM.replace(b"\x82\x07\x58", b"\x82\x01\x58", 1)
    for data in (b"", CORIM[:-1], CORIM + b"\0", wrong_id, other_image, sha256, cbor2.dumps({})):
        with pytest.raises(FormatError):
            parse_corim(data)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(CORIM) - 1), st.integers(0, 255))
def test_any_changed_byte_gives_an_error_or_another_value(at: int, value: int) -> None:
    changed = CORIM[:at] + bytes([value]) + CORIM[at + 1 :]
    try:
        found = parse_corim(changed)
    except FormatError:
        return
    assert encode_corim(found) == changed
    assert (found == corim_of(IMAGE)) is (changed == CORIM)
