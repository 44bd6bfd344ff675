"""A manifest's reference values as a CoRIM: draft-ietf-rats-corim-10 (2 March 2026), deterministic CBOR, not signed.

`#6.501({0: id, 1: [+ #6.506(bstr .cbor CoMID)], 4: {0: not before, 1: not after}})`, one CoMID for each launch shape:

    {1: {0: "<image id>/<shape>", 1: version},
     4: {0: [[{0: {1: "countermark", 2: "<kind>/<platform>"}},
              [{0: "td", 1: {14: {"mrtd": [[7, h]], "rtmr0": ..., "rtmr1": ..., "rtmr2": ...}}},
               {0: "mrseam", 1: {14: {"mrseam": [+ [7, h]]}}},             ; if any is named
               {0: "td_attributes", 1: {4: #6.560(h)}}, {0: "xfam", ...}, ...]]]}}

The registers of a shape stand in one integrity-registers map (section on integrity registers: all objects of a map
together are the acceptable state), so that MRTD of one shape does not go with RTMR0 of another. Digest algorithm 7 is
SHA-384 in IANA's Named Information registry; 1 is the tag of a time, 560 that of bytes. Which environment a verifier
finds TDX evidence under is its own; this one's names are ours.

A CoRIM says less than its manifest: no events, no revocations. It is as good as whoever derived it from a verified one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cbor2 import CBORTag

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.formats.manifest import MAX_SHAPES, PLATFORMS, ImageKind, Manifest

CORIM, COMID, TIME, TAGGED_BYTES = 501, 506, 1, 560
SHA384: Final = 7
MAX_BYTES: Final = 1024 * 1024
VENDOR: Final = "countermark"
REGISTERS: Final = ("mrtd", "rtmr0", "rtmr1", "rtmr2")
_TD, _MRSEAM = "td", "mrseam"
_RAW: Final = {"td_attributes": 8, "xfam": 8, "mrconfigid": 48, "mrowner": 48, "mrownerconfig": 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeValues:
    """The registers of one launch shape, in the order of `REGISTERS`."""

    name: str
    registers: tuple[bytes, bytes, bytes, bytes]  # 48 each


@dataclass(frozen=True, slots=True, kw_only=True)
class Corim:
    """What of a manifest stands in a CoRIM. `launch`: the values of `_RAW`, in its order."""

    image_id: bytes  # 32
    version: int
    kind: ImageKind
    platform: str
    not_before: int
    not_after: int
    shapes: tuple[ShapeValues, ...]
    mrseam: tuple[bytes, ...]
    launch: tuple[bytes, ...]


def corim_of(manifest: Manifest) -> Corim:
    """The reference values of a manifest."""
    return Corim(
        image_id=manifest.image_id,
        version=manifest.version,
        kind=manifest.kind,
        platform=manifest.platform,
        not_before=manifest.not_before,
        not_after=manifest.not_after,
        shapes=tuple(
            ShapeValues(name=shape.name, registers=(shape.mrtd, shape.rtmr0, manifest.rtmr1, manifest.rtmr2))
            for shape in manifest.shapes
        ),
        mrseam=manifest.mrseam,
        launch=tuple(getattr(manifest, name) for name in _RAW),
    )


def encode_corim(corim: Corim) -> bytes:
    """The CoRIM's bytes."""
    tags = [CBORTag(COMID, cbor.encode(_comid(corim, shape))) for shape in corim.shapes]
    validity = {0: CBORTag(TIME, corim.not_before), 1: CBORTag(TIME, corim.not_after)}
    return cbor.encode(CBORTag(CORIM, {0: _id(corim), 1: tags, 4: validity}))


def parse_corim(data: bytes) -> Corim:
    """The inverse of `encode_corim`; other CoRIMs are refused. Raises `FormatError` (`cbor.*`, `corim.*`)."""
    top = _tagged(cbor.decode(data, max_bytes=MAX_BYTES), CORIM)
    body = _map(top, 0, 1, 4)
    validity = _map(body[4], 0, 1)
    tags = body[1]
    if not isinstance(tags, list) or not 0 < len(tags) <= MAX_SHAPES:
        raise _refuse(f"1 to {MAX_SHAPES} tags")
    parsed = [_parse_comid(_tagged(tag, COMID)) for tag in tags]
    first = parsed[0]
    corim = Corim(
        image_id=first[0],
        version=first[1],
        kind=first[2],
        platform=first[3],
        not_before=_uint(_tagged(validity[0], TIME)),
        not_after=_uint(_tagged(validity[1], TIME)),
        shapes=tuple(item[4] for item in parsed),
        mrseam=first[5],
        launch=first[6],
    )
    if encode_corim(corim) != data:  # ids that differ, or CoMIDs of another image, end here
        raise _refuse("the CoRIM of one manifest, as we derive it")
    return corim


def _id(corim: Corim) -> str:
    return f"{VENDOR}/{corim.image_id.hex()}/{corim.version}"


def _comid(corim: Corim, shape: ShapeValues) -> dict[int, object]:
    registers = {name: _digests([value]) for name, value in zip(REGISTERS, shape.registers, strict=True)}
    claims: list[object] = [{0: _TD, 1: {14: registers}}]
    if corim.mrseam:
        claims.append({0: _MRSEAM, 1: {14: {_MRSEAM: _digests(list(corim.mrseam))}}})
    claims += [{0: name, 1: {4: CBORTag(TAGGED_BYTES, value)}} for name, value in zip(_RAW, corim.launch, strict=True)]
    environment = {0: {1: VENDOR, 2: f"{corim.kind.value}/{corim.platform}"}}
    identity = {0: f"{corim.image_id.hex()}/{shape.name}", 1: corim.version}
    return {1: identity, 4: {0: [[environment, claims]]}}


def _digests(values: list[bytes]) -> list[list[object]]:
    return [[SHA384, value] for value in values]


def _parse_comid(
    data: Any,
) -> tuple[bytes, int, ImageKind, str, ShapeValues, tuple[bytes, ...], tuple[bytes, ...]]:
    if not isinstance(data, bytes):
        raise _refuse("a CoMID in a byte string")
    comid = _map(cbor.decode(data, max_bytes=MAX_BYTES), 1, 4)
    identity, triples = _map(comid[1], 0, 1), _map(comid[4], 0)[0]
    image, slash, name = identity[0].partition("/") if isinstance(identity[0], str) else ("", "", "")
    record = triples[0] if isinstance(triples, list) and len(triples) == 1 else None
    if not isinstance(record, list) or len(record) != 2 or not isinstance(record[1], list) or not slash:
        raise _refuse("a tag id with a shape, and one reference triple")
    model = _map(_map(record[0], 0)[0], 1, 2)[2]
    kind, _, platform = model.partition("/") if isinstance(model, str) else ("", "", "")
    if kind not in [item.value for item in ImageKind] or platform not in PLATFORMS:
        raise _refuse("a model of a known kind and platform")
    claims = {}
    for item in record[1]:
        claim = _map(item, 0, 1)
        if not isinstance(claim[0], str) or claim[0] in claims:
            raise _refuse("one measurement of each name")
        claims[claim[0]] = claim[1]
    if not {_TD, *_RAW} <= claims.keys() <= {_TD, _MRSEAM, *_RAW}:
        raise _refuse(f"measurements {_TD}, {', '.join(_RAW)}")
    registers = _map(_map(claims[_TD], 14)[14], *REGISTERS)
    mrtd, rtmr0, rtmr1, rtmr2 = (_one(registers[name]) for name in REGISTERS)
    mrseam = _parse_digests(_map(_map(claims[_MRSEAM], 14)[14], _MRSEAM)[_MRSEAM]) if _MRSEAM in claims else ()
    launch = [(_tagged(_map(claims[raw], 4)[4], TAGGED_BYTES), size) for raw, size in _RAW.items()]
    if any(not isinstance(value, bytes) or len(value) != size for value, size in launch):
        raise _refuse("raw values of the registers' sizes")
    return (
        _image_id(image),
        _uint(identity[1]),
        ImageKind(kind),
        platform,
        ShapeValues(name=name, registers=(mrtd, rtmr0, rtmr1, rtmr2)),
        mrseam,
        tuple(value for value, _ in launch),
    )


def _image_id(text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != 32:
        raise _refuse("an image id of 64 hex digits")
    return data


def _one(value: Any) -> bytes:
    found = _parse_digests(value)
    if len(found) != 1:
        raise _refuse("one digest")
    return found[0]


def _parse_digests(value: Any) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not value:
        raise _refuse("digests")
    for item in value:
        pair = item if isinstance(item, list) and len(item) == 2 else [None, None]
        if pair[0] != SHA384 or not isinstance(pair[1], bytes) or len(pair[1]) != 48:
            raise _refuse("SHA-384 digests")
    return tuple(item[1] for item in value)


def _map(value: Any, *keys: int | str) -> dict[int | str, Any]:
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise _refuse(f"a map with exactly {list(keys)}")
    return value


def _tagged(value: Any, tag: int) -> Any:
    if not isinstance(value, CBORTag) or value.tag != tag:
        raise _refuse(f"tag {tag}")
    return value.value


def _uint(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise _refuse("an integer from 0 to 2^53 - 1")
    return value


def _refuse(expected: str) -> FormatError:
    return FormatError(f"corim: expected {expected}", code="corim.form")
