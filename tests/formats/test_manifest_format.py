"""Manifests and their envelope: in-toto and DSSE form, one byte string for each value, no contradictions inside."""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import eventlog, strict_json
from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.eventlog import Event
from countermark.formats.manifest import (
    PREDICATE_TYPE,
    Envelope,
    ImageKind,
    Manifest,
    ManifestSignature,
    PredictedEvent,
    Shape,
    Subject,
    encode_envelope,
    encode_manifest,
    pae,
    parse_envelope,
    parse_manifest,
    signer_digest,
)


def predicted(register: int, digest: bytes, shape: str = "") -> PredictedEvent:
    return PredictedEvent(register=register, event_type=6, digest=digest * 48, source="image", shape=shape, note="n")


EVENTS = (
    predicted(1, b"a"),
    predicted(1, b"s", "small"),
    predicted(1, b"l", "large"),
    predicted(2, b"b"),
    predicted(3, b"c"),
)


def registers(shape: str) -> tuple[bytes, bytes, bytes, bytes]:
    wanted = [e for e in EVENTS if e.shape in ("", shape)]
    return eventlog.replay(Event(register=e.register, event_type=6, digest=e.digest, data=b"") for e in wanted)


MANIFEST = Manifest(
    subjects=(Subject(name="disk", sha256=b"d" * 32),),
    kind=ImageKind.PRODUCTION,
    platform="tdx",
    version=3,
    not_before=100,
    not_after=200,
    image_id=b"i" * 32,
    shapes=tuple(Shape(name=name, mrtd=b"m" * 48, rtmr0=registers(name)[0]) for name in ("small", "large")),
    rtmr1=registers("small")[1],
    rtmr2=registers("small")[2],
    td_attributes=bytes(8),
    xfam=bytes(8),
    mrseam=(b"s" * 48,),
    mrconfigid=bytes(48),
    mrowner=bytes(48),
    mrownerconfig=bytes(48),
    events=EVENTS,
    revoked_images=(b"r" * 32,),
)
DATA = encode_manifest(MANIFEST)
ES256 = ManifestSignature(key=CoseKey(algorithm=Algorithm.ES256, public=b"p" * 64), signature=b"s" * 64)
ML_DSA = ManifestSignature(key=CoseKey(algorithm=Algorithm.ML_DSA_65, public=b"q" * 1952), signature=b"t" * 3309)
ENVELOPE = encode_envelope(Envelope(payload=DATA, signatures=(ES256, ML_DSA)))


def test_is_an_in_toto_statement_in_a_dsse_envelope():
    statement = json.loads(DATA)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == PREDICATE_TYPE
    assert statement["subject"] == [{"name": "disk", "digest": {"sha256": (b"d" * 32).hex()}}]
    assert statement["predicate"]["simulated"] is False
    envelope = json.loads(ENVELOPE)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(envelope["payload"]) == DATA
    assert [len(base64.b64decode(item["sig"])) for item in envelope["signatures"]] == [64, 3309]
    assert pae(b"{}") == b"DSSEv1 28 application/vnd.in-toto+json 2 {}"


def test_round_trips():
    assert parse_manifest(DATA) == MANIFEST
    envelope = parse_envelope(ENVELOPE)
    assert encode_envelope(envelope) == ENVELOPE
    assert envelope.payload == DATA
    assert [item.keyid for item in envelope.signatures] == [
        signer_digest(ES256.key).hex(),
        signer_digest(ML_DSA.key).hex(),
    ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"not_after": 100}, "manifest.validity"),
        ({"platform": "sim"}, "manifest.kind"),
        ({"shapes": ()}, "manifest.shapes"),
        ({"shapes": MANIFEST.shapes[:1] * 2}, "manifest.shapes"),
        ({"shapes": MANIFEST.shapes[:1]}, "manifest.events"),
        ({"rtmr1": bytes(48)}, "manifest.events"),
        ({"rtmr2": bytes(48)}, "manifest.events"),
        ({"events": EVENTS[::-1]}, "manifest.events"),
        ({"events": EVENTS[:-1]}, "manifest.events"),
        ({"events": (*EVENTS, predicted(4, b"x"))}, "manifest.events"),
        ({"events": (*EVENTS, predicted(2, b"x", "small"))}, "manifest.events"),
        ({"events": (*EVENTS, predicted(5, b"x"))}, "manifest.events"),
        ({"events": (*EVENTS, replace(EVENTS[0], source="other"))}, "manifest.events"),
        ({"events": (*EVENTS, replace(EVENTS[0], note="\n"))}, "manifest.text"),
        ({"version": -1}, "manifest.integer"),
        ({"platform": "other"}, "manifest.platform"),
        ({"xfam": bytes(7)}, "manifest.digest"),
    ],
)
def test_refuses_contradictions(change, code):
    with pytest.raises(FormatError) as refused:
        parse_manifest(encode_manifest(replace(MANIFEST, **change)))
    assert refused.value.code == code


def edited(**predicate: object) -> bytes:
    value = json.loads(DATA)
    value["predicate"] |= predicate
    return strict_json.dump(value)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (DATA.replace(b'"version":3', b'"version":3,"version":3'), "manifest.json"),
        (DATA.replace(b'"version":3', b'"version": 3'), "manifest.not_canonical"),
        (DATA.replace(b'"version":3', b'"version":3.0'), "manifest.integer"),
        (DATA.replace(b'"version":3', b'"version":NaN'), "manifest.json"),
        (DATA + b"\n", "manifest.not_canonical"),
        (DATA.replace(b"64" * 32, b"6D" * 32), "manifest.not_canonical"),
        (DATA.replace(b"Statement/v1", b"Statement/v2"), "manifest.type"),
        (DATA.replace(b"measurement/v1", b"measurement/v2"), "manifest.type"),
        (edited(extra=1), "manifest.members"),
        (edited(simulated=True), "manifest.not_canonical"),
        (edited(simulated=0), "manifest.not_canonical"),
        (edited(kind="other"), "manifest.kind"),
        (edited(kind=[]), "manifest.kind"),
        (edited(version=True), "manifest.integer"),
        (edited(shapes={}), "manifest.members"),
        (edited(shapes=[1]), "manifest.members"),
        (edited(image_id=None), "manifest.digest"),
        (edited(image_id=" " + (b"i" * 32).hex()), "manifest.not_canonical"),
        (b"\xef\xbb\xbf" + DATA, "manifest.json"),
        (b"[" * 100_000, "manifest.json"),
        (b" " * 5_000_000, "manifest.too_long"),
        (b"null", "manifest.members"),
    ],
)
def test_refuses_other_texts(data, code):
    with pytest.raises(FormatError) as refused:
        parse_manifest(data)
    assert refused.value.code == code


def envelope_with(**members: object) -> bytes:
    return strict_json.dump(json.loads(ENVELOPE) | members)


FIRST, SECOND = json.loads(ENVELOPE)["signatures"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (envelope_with(signatures=[FIRST]), "manifest.signatures"),
        (envelope_with(signatures=[SECOND, FIRST]), "manifest.signatures"),
        (envelope_with(signatures=[FIRST, FIRST]), "manifest.signatures"),
        (envelope_with(signatures=[FIRST, SECOND, FIRST]), "manifest.members"),
        (envelope_with(signatures=[FIRST | {"keyid": SECOND["keyid"]}, SECOND]), "manifest.keyid"),
        (envelope_with(signatures=[FIRST | {"sig": "AAAA"}, SECOND]), "manifest.signatures"),
        (envelope_with(signatures=[FIRST | {"sig": "*"}, SECOND]), "manifest.base64"),
        (envelope_with(signatures=[FIRST | {"publicKey": "AAAA"}, SECOND]), "cbor.not_deterministic"),
        (envelope_with(payloadType="text/plain"), "manifest.payload_type"),
        (envelope_with(payload=3), "manifest.base64"),
        (envelope_with(more=1), "manifest.members"),
        (b"{}", "manifest.members"),
        (ENVELOPE + b" ", "manifest.not_canonical"),
    ],
)
def test_refuses_envelopes(data, code):
    with pytest.raises(FormatError) as refused:
        parse_envelope(data)
    assert refused.value.code == code


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 255), st.binary(max_size=100))
def test_arbitrary_bytes(offset, value, data):
    for good, parse, encode in ((DATA, parse_manifest, encode_manifest), (ENVELOPE, parse_envelope, encode_envelope)):
        changed = bytearray(good)
        changed[offset] = value
        for attempt in (bytes(changed), data):
            try:
                parsed = parse(attempt)
            except FormatError:
                continue
            assert encode(parsed) == attempt
