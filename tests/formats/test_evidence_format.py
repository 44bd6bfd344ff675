"""The evidence map and the passport: round trips, caps, every field of another type."""

from dataclasses import replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_data import KEYS

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.formats.evidence import (
    Endorsements,
    Evidence,
    GpuEvidence,
    Passport,
    PlatformName,
    encode_evidence,
    encode_passport,
    gpu_digest,
    parse_evidence,
    parse_passport,
)

VALUE = Evidence(
    platform=PlatformName.SIM,
    quote=b"quote",
    ccel=b"ccel",
    rtmr3_log=b"log",
    gpu=(GpuEvidence(report=b"report", certs=(b"leaf", b"root")),),
    claims=b"claims",
    keys=KEYS,
    endorsements=Endorsements(tdx=b"{}", gpu_rims=(b"<rim/>",), gpu_crls=(b"crl",), gpu_ocsp=(b"ocsp",)),
)
DATA = encode_evidence(VALUE)


def test_round_trip():
    assert parse_evidence(DATA) == VALUE
    empty = replace(VALUE, gpu=(), endorsements=Endorsements(tdx=b""))
    assert parse_evidence(encode_evidence(empty)) == empty
    assert cbor2.loads(DATA)["gpu"] == [{"report": b"report", "certs": [b"leaf", b"root"]}]


def test_only_tdx_is_not_simulated():
    assert [name.value for name in PlatformName if not name.simulated] == ["tdx"]


def test_gpu_digest_covers_every_report_and_certificate():
    other = GpuEvidence(report=b"report", certs=(b"leaf",))
    digests = {gpu_digest(VALUE.gpu), gpu_digest(()), gpu_digest((other,)), gpu_digest((*VALUE.gpu, other))}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"v": 2}, "evidence.version"),
        ({"platform": "gpu"}, "evidence.platform"),
        ({"quote": "text"}, "evidence.field"),
        ({"quote": bytes(70_000)}, "evidence.too_long"),
        ({"claims": bytes(5000)}, "evidence.too_long"),
        ({"gpu": [{"report": b""}]}, "evidence.field"),
        ({"gpu": [{"report": b"", "certs": ["text"]}]}, "evidence.field"),
        ({"gpu": [{"report": b"", "certs": [b""] * 9}]}, "evidence.too_many"),
        ({"gpu": [{"report": b"", "certs": []}] * 17}, "evidence.too_many"),
        ({"keys": []}, "keys.roles"),
        ({"endorsements": {"tdx": b""}}, "evidence.field"),
        (
            {"endorsements": {"tdx": b"", "gpu": {"rims": [], "crls": [bytes(1 << 19)], "ocsp": []}}},
            "evidence.too_long",
        ),
        (
            {"endorsements": {"tdx": b"", "gpu": {"rims": [], "crls": [], "ocsp": [bytes(1 << 15)]}}},
            "evidence.too_long",
        ),
        ({"endorsements": {"tdx": b"", "gpu": {"rims": [b""] * 33, "crls": [], "ocsp": []}}}, "evidence.too_many"),
        ({"endorsements": {"tdx": b"", "gpu": {"rims": [], "crls": [b""] * 17, "ocsp": []}}}, "evidence.too_many"),
        ({"endorsements": {"tdx": b"", "gpu": {"rims": [], "crls": [], "ocsp": [b""] * 129}}}, "evidence.too_many"),
        ({"endorsements": {"tdx": b"", "gpu": {"rims": [], "crls": []}}}, "evidence.field"),
        ({"more": 1}, "evidence.field"),
    ],
)
def test_refuses(change, code):
    with pytest.raises(FormatError) as refused:
        parse_evidence(cbor.encode(cbor.decode(DATA) | change))
    assert refused.value.code == code


@pytest.mark.parametrize("name", sorted(cbor2.loads(DATA)))
def test_refuses_without_a_field(name):
    with pytest.raises(FormatError) as refused:
        parse_evidence(cbor.encode({key: item for key, item in cbor.decode(DATA).items() if key != name}))
    assert refused.value.code == "evidence.field"


def test_passport():
    passport = Passport(quote=b"quote", claims=b"claims")
    data = encode_passport(passport)
    assert data == cbor2.dumps(cbor2.CBORTag(60000, [b"quote", b"claims"]))
    assert parse_passport(data) == passport
    for value, code in (
        ([b"quote", b"claims"], "passport.tag"),
        (cbor2.CBORTag(60001, [b"quote", b"claims"]), "passport.tag"),
        (cbor2.CBORTag(60000, [b"quote"]), "passport.form"),
        (cbor2.CBORTag(60000, ["quote", b""]), "evidence.field"),
    ):
        with pytest.raises(FormatError) as refused:
            parse_passport(cbor2.dumps(value))
        assert refused.value.code == code


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 255), st.binary(max_size=200))
def test_arbitrary_bytes(offset, value, data):
    changed = bytearray(DATA)
    changed[offset] = value
    for attempt in (bytes(changed), data):
        for parse, encode in ((parse_evidence, encode_evidence), (parse_passport, encode_passport)):
            try:
                parsed = parse(attempt)
            except FormatError:
                continue
            assert encode(parsed) == attempt
