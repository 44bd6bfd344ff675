"""Claims, keys and the 64 bytes: recomputed here with hashlib and cbor2's own encoder."""

import hashlib
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.formats.cose_key import Algorithm, CoseKey, encode_cose_key, parse_cose_key
from countermark.formats.report_data import (
    ROLES,
    Claims,
    GpuFreshness,
    Purpose,
    RoleKey,
    encode_claims,
    gpu_digest,
    gpu_nonce,
    keys_digest,
    keys_from_value,
    keys_value,
    parse_claims,
    report_data,
)

SIZES = {Algorithm.ES256: 64, Algorithm.EDDSA: 32, Algorithm.ML_DSA_44: 1312, Algorithm.ML_DSA_65: 1952}
KEYS = tuple(RoleKey(role=r, key=CoseKey(algorithm=a, public=bytes((7,)) * SIZES[a])) for r, a in ROLES.items())
CLAIMS = Claims(
    purpose=Purpose.SESSION,
    nonce=b"n" * 32,
    exporter=b"e" * 32,
    boot_id=b"b" * 32,
    tls_spki=b"t" * 32,
    keys=b"k" * 32,
    log_origin="operator.example/1",
    log_size=7,
    log_root=b"r" * 32,
    weights_root=b"w" * 32,
    image_id=b"i" * 32,
    config=b"c" * 32,
    gpu_digest=b"g" * 32,
    gpu_freshness=GpuFreshness.SESSION,
)
PASSPORT = replace(CLAIMS, purpose=Purpose.PASSPORT, exporter=None)


def test_against_another_encoder():
    value = {
        "v": 1,
        "purpose": "session",
        "nonce": b"n" * 32,
        "exporter": b"e" * 32,
        "boot_id": b"b" * 32,
        "tls_spki": b"t" * 32,
        "keys": b"k" * 32,
        "log_origin": "operator.example/1",
        "log_size": 7,
        "log_root": b"r" * 32,
        "weights_root": b"w" * 32,
        "image_id": b"i" * 32,
        "config": b"c" * 32,
        "gpu": {"digest": b"g" * 32, "freshness": "session"},
    }
    encoded = cbor2.dumps(value, canonical=True)
    assert encode_claims(CLAIMS) == encoded
    expected = hashlib.sha512(b"countermark/attest/v1" + encoded).digest()
    assert report_data(CLAIMS) == report_data(encoded) == expected
    assert gpu_nonce(b"n" * 32, b"t" * 32) == hashlib.sha256(b"countermark/gpu/v1" + b"n" * 32 + b"t" * 32).digest()
    gpus = cbor2.dumps([[b"report", [b"leaf", b"root"]]], canonical=True)
    assert (
        gpu_digest([(b"report", (b"leaf", b"root"))]) == hashlib.sha256(b"countermark/gpu-evidence/v1" + gpus).digest()
    )


@pytest.mark.parametrize("claims", [CLAIMS, PASSPORT, replace(PASSPORT, purpose=Purpose.REPLAY, log_size=0)])
def test_round_trip(claims):
    assert parse_claims(encode_claims(claims)) == claims


def test_every_claim_changes_report_data():
    seen = {report_data(CLAIMS)}
    for name in Claims.__slots__:
        old = getattr(CLAIMS, name)
        new = {Purpose.SESSION: Purpose.REPLAY, GpuFreshness.SESSION: GpuFreshness.BOOT}.get(old)
        if new is None:
            new = old + 1 if isinstance(old, int) else old[:-1] + ("x" if isinstance(old, str) else b"x")
        seen.add(report_data(replace(CLAIMS, **{name: new})))
    assert len(seen) == len(Claims.__slots__) + 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"v": 2}, "claims.version"),
        ({"purpose": "other"}, "claims.field"),
        ({"purpose": "passport"}, "claims.field"),  # an exporter that must not be there
        ({"nonce": b"n" * 31}, "claims.length"),
        ({"exporter": b""}, "claims.length"),
        ({"log_size": -1}, "claims.log_size"),
        ({"log_size": 1 << 63}, "claims.log_size"),
        ({"log_size": True}, "claims.field"),
        ({"log_origin": ""}, "claims.log_origin"),
        ({"log_origin": "a\nb"}, "claims.log_origin"),
        ({"log_origin": "x" * 257}, "claims.log_origin"),
        ({"gpu": {"digest": b"g" * 32}}, "claims.field"),
        ({"gpu": {"digest": b"g" * 31, "freshness": "boot"}}, "claims.length"),
        ({"gpu": {"digest": b"g" * 32, "freshness": "old"}}, "claims.enum"),
        ({"extra": 1}, "claims.field"),
    ],
)
def test_refuses(change, code):
    value = cbor.decode(encode_claims(CLAIMS)) | change
    with pytest.raises(FormatError) as refused:
        parse_claims(cbor.encode(value))
    assert refused.value.code == code


def test_keys_round_trip_and_digest():
    value = keys_value(KEYS)
    assert keys_from_value(cbor.decode(cbor.encode(value))) == KEYS
    assert keys_digest(KEYS) == hashlib.sha256(cbor.encode(value)).digest()
    assert [item[0] for item in value] == ["tls", "receipt-es256", "receipt-ml-dsa-65", "log-ed25519", "log-ml-dsa-44"]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[:-1],
        lambda v: [*v, v[0]],
        lambda v: [v[1], v[0], *v[2:]],
        lambda v: [["tls", v[3][1]], *v[1:]],
        lambda v: [["tls"], *v[1:]],
        lambda v: [["tls", 1], *v[1:]],
        lambda v: None,
    ],
)
def test_keys_refuse(change):
    with pytest.raises(FormatError):
        keys_from_value(change(keys_value(KEYS)))


def test_cose_keys_are_the_registered_maps():
    es256 = {1: 2, 3: -7, -1: 1, -2: b"x" * 32, -3: b"y" * 32}
    eddsa = {1: 1, 3: -8, -1: 6, -2: b"e" * 32}
    akp = {1: 7, 3: -49, -1: b"m" * 1952}
    for value, algorithm in ((es256, Algorithm.ES256), (eddsa, Algorithm.EDDSA), (akp, Algorithm.ML_DSA_65)):
        key = parse_cose_key(cbor.encode(value))
        assert key.algorithm is algorithm
        assert cbor2.loads(encode_cose_key(key)) == value


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {1: 2, 3: -7, -1: 1, -2: b"x" * 32},
        {1: 2, 3: -7, -1: 2, -2: b"x" * 32, -3: b"y" * 32},
        {1: 2, 3: -7, -1: 1, -2: b"x" * 31, -3: b"y" * 33},
        {1: 2, 3: -7, -1: 1, -2: b"x" * 32, -3: b"y" * 32, 4: 1},
        {1: 2, 3: -7, -1: 1, -2: b"x" * 32, -3: b"y" * 32, -4: b"private"},
        {1: 1, 3: -7, -1: 1, -2: b"x" * 32, -3: b"y" * 32},
        {1: 7, 3: -48, -1: b"m" * 1952},
        {1: 7, 3: -50, -1: b"m" * 2592},
        {1: 7, 3: True, -1: b"m"},
        {1: 1, 3: -8, -1: 6, -2: 5},
    ],
)
def test_cose_keys_refuse(value):
    with pytest.raises(FormatError):
        parse_cose_key(cbor.encode(value))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_arbitrary_bytes(data, offset, value):
    changed = bytearray(encode_claims(CLAIMS))
    changed[offset % len(changed)] = value
    for attempt in (data, bytes(changed)):
        try:
            parsed = parse_claims(attempt)
        except FormatError:
            continue
        assert encode_claims(parsed) == attempt
