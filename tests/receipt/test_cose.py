"""The receipt as COSE_Sign, read by a decoder that is not ours and checked with the keys alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import cbor2
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.formats import receipt as formats
from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.receipt import P256_ORDER, parse_receipt, thumbprint
from one_answer import World

Parts = list[object]


def opened(data: bytes) -> Parts:
    tag = cbor2.loads(data)
    assert tag.tag == 98
    return [*tag.value[:3], [list(block) for block in tag.value[3]]]


def closed(parts: Parts) -> bytes:
    plain = [parts[0], dict(parts[1]), parts[2], [[b[0], dict(b[1]), *b[2:]] for b in parts[3]]]  # type: ignore
    return b"\xd8\x62" + cbor.encode(plain)


def test_an_independent_verifier_accepts_it(world: World) -> None:
    protected, unprotected, payload, blocks = cbor2.loads(world.receipt).value
    es256, ml_dsa = world.machine.keyring.receipt_es256, world.machine.keyring.receipt_ml_dsa_65
    assert dict(unprotected) == {}
    header = cbor2.loads(protected)
    assert header[2] == ["required"]
    assert header[3] == "application/vnd.countermark.receipt+cbor"
    assert [item[0] for item in header["required"]] == [-7, -49]
    assert len(blocks) == 2
    for block, required in zip(blocks, header["required"], strict=True):
        assert dict(block[1]) == {}
        assert cbor2.loads(block[0]) == {1: required[0], 4: required[1]}
    signed = [cbor2.dumps(["Signature", protected, block[0], b"countermark/receipt/v1", payload]) for block in blocks]
    r, s = (int.from_bytes(blocks[0][2][i : i + 32], "big") for i in (0, 32))
    es256.public_key().verify(encode_dss_signature(r, s), signed[0], ec.ECDSA(hashes.SHA256()))
    assert s <= P256_ORDER // 2
    ml_dsa.public_key().verify(blocks[1][2], signed[1])  # the empty context
    with pytest.raises(InvalidSignature):
        ml_dsa.public_key().verify(blocks[1][2], signed[1], b"countermark/receipt/v1")
    assert {"intent", "outcome", "checkpoint", "from_attested", "from_accepted", "v"} == cbor2.loads(payload).keys()


def test_thumbprint_of_rfc_9679_section_6() -> None:
    point = (
        "65eda5a12577c2bae829437fe338701a10aaa375e1bb5b5de108de439c08551d"
        "1e52ed75701163f7f9e40ddf9f341b3dc9ba860af7e0ca7ca7e9eecd0084d19c"
    )
    key = CoseKey(algorithm=Algorithm.ES256, public=bytes.fromhex(point))
    assert thumbprint(key).hex() == "496bd8afadf307e5b08c64b0421bf9dc01528a344a43bda88fadd1669da253ec"


def test_thumbprint_of_an_akp_key_covers_its_algorithm() -> None:
    """RFC 9964: kty, alg and pub are the required members of AKP."""
    key = CoseKey(algorithm=Algorithm.ML_DSA_65, public=bytes(1952))
    expected = hashlib.sha256(cbor2.dumps({1: 7, 3: -49, -1: bytes(1952)}, canonical=True)).digest()
    assert thumbprint(key) == expected


def strip(which: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[3].pop(which)  # type: ignore[attr-defined]

    return change


def add(parts: Parts) -> None:
    parts[3].append(parts[3][0])  # type: ignore[attr-defined, index]


def swap(parts: Parts) -> None:
    parts[3].reverse()  # type: ignore[attr-defined]


def twice(parts: Parts) -> None:
    parts[3][1] = parts[3][0]  # type: ignore[index]


def high_s(parts: Parts) -> None:
    signature = parts[3][0][2]  # type: ignore[index]
    s = P256_ORDER - int.from_bytes(signature[32:], "big")
    parts[3][0][2] = signature[:32] + s.to_bytes(32, "big")  # type: ignore[index]


def zero_r(parts: Parts) -> None:
    parts[3][0][2] = bytes(32) + parts[3][0][2][32:]  # type: ignore[index]


def long_signature(parts: Parts) -> None:
    parts[3][1][2] += b"\0"  # type: ignore[index]


def unprotected_body(parts: Parts) -> None:
    parts[1] = {4: b"kid"}


def unprotected_signer(parts: Parts) -> None:
    parts[3][0][1] = {1: -7}  # type: ignore[index]


def other_algorithm(parts: Parts) -> None:
    header = cbor2.loads(parts[3][1][0])  # type: ignore[index]
    parts[3][1][0] = cbor.encode({1: -48, 4: header[4]})  # type: ignore[index]


def extra_header(parts: Parts) -> None:
    header = cbor2.loads(parts[3][1][0])  # type: ignore[index]
    parts[3][1][0] = cbor.encode({**header, 5: b"iv"})  # type: ignore[index]


def required_less(parts: Parts) -> None:
    header = cbor2.loads(parts[0])  # type: ignore[arg-type]
    parts[0] = cbor.encode({**header, "required": header["required"][:1]})


def not_critical(parts: Parts) -> None:
    header = cbor2.loads(parts[0])  # type: ignore[arg-type]
    del header[2]
    parts[0] = cbor.encode(header)


def other_content_type(parts: Parts) -> None:
    header = cbor2.loads(parts[0])  # type: ignore[arg-type]
    parts[0] = cbor.encode({**header, 3: "application/cose"})


def detached(parts: Parts) -> None:
    parts[2] = None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (strip(0), "receipt.signers"),
        (strip(1), "receipt.signers"),
        (add, "receipt.signers"),
        (swap, "receipt.signers"),
        (twice, "receipt.signers"),
        (high_s, "receipt.high_s"),
        (zero_r, "receipt.signature_form"),
        (long_signature, "receipt.signature_form"),
        (unprotected_body, "receipt.header"),
        (unprotected_signer, "receipt.header"),
        (other_algorithm, "receipt.signers"),
        (extra_header, "receipt.signers"),
        (required_less, "receipt.header"),
        (not_critical, "receipt.header"),
        (other_content_type, "receipt.header"),
        (detached, "receipt.form"),
    ],
)
def test_other_forms_are_refused(world: World, change: Callable[[Parts], None], code: str) -> None:
    parts = opened(world.receipt)
    assert closed(parts) == world.receipt
    change(parts)
    with pytest.raises(FormatError) as caught:
        parse_receipt(closed(parts))
    assert caught.value.code == code


@pytest.mark.parametrize("tag", [b"", b"\xd2", b"\xd8\x61", b"\xd9\x00\x62"])
def test_only_cose_sign(world: World, tag: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_receipt(tag + world.receipt[2:])
    assert caught.value.code == "receipt.form"


def test_round_trips(world: World) -> None:
    parsed = parse_receipt(world.receipt)
    payload = formats.encode_payload(parsed.payload)
    assert formats.encode_receipt(payload, parsed.kids, parsed.signatures) == world.receipt
    acceptance = world.committed.acceptance
    assert formats.parse_acceptance(formats.encode_acceptance(acceptance)) == acceptance
    assert formats.parse_answer(formats.encode_answer(world.answer)) == world.answer


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    for parse in (parse_receipt, formats.parse_acceptance, formats.parse_answer):
        for head in (b"", b"\xd8\x62"):
            with pytest.raises(FormatError):
                parse(head + data)
