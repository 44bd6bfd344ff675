"""Every bit of a genuine quote that a signature covers, flipped: no flip is accepted, and the refusal says which layer.

The PEM chain at the end is not part of it: white space in it may change (`quote_digest` names a quote without it), and
its certificates are swept in test_x509chain. What a flip there may do is stated by the last test.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

import vectors
from countermark.errors import CountermarkError
from countermark.formats.quote import BODY_10_BYTES, ENCLAVE_REPORT_BYTES, HEADER_BYTES, parse_quote, quote_digest
from countermark.policy import Policy, Profile, new_policy
from countermark.tdx.endorsements import Endorsements, parse_endorsements, verify_endorsements
from countermark.tdx.quote import Platform, verify_quote, verify_root
from countermark.tdx.td import verify_td

GENUINE = ("dstack-90c06f", "phala-b0c06f")
SIGNED = HEADER_BYTES + BODY_10_BYTES
AUTH_DATA = 32
# offset in the quote -> what stands there, up to the next
PARTS = {
    0: "header",
    HEADER_BYTES: "body",
    SIGNED: "signature size",
    SIGNED + 4: "signature",
    SIGNED + 68: "attestation key",
    SIGNED + 132: "certification framing",
    SIGNED + 138: "QE report",
    SIGNED + 138 + ENCLAVE_REPORT_BYTES: "QE report signature",
    SIGNED + 202 + ENCLAVE_REPORT_BYTES: "authentication data size",
    SIGNED + 204 + ENCLAVE_REPORT_BYTES: "authentication data",
    SIGNED + 204 + ENCLAVE_REPORT_BYTES + AUTH_DATA: "chain framing",
    SIGNED + 210 + ENCLAVE_REPORT_BYTES + AUTH_DATA: "chain",
}
STARTS = sorted(PARTS)
CODES = {
    "body": {"quote.signature"},
    "signature": {"quote.signature"},
    "attestation key": {"quote.qe_binding"},
    "QE report signature": {"quote.qe_signature"},
    "authentication data": {"quote.qe_binding"},
}


@lru_cache
def endorsed(name: str) -> tuple[Endorsements, Policy]:
    """Endorsements and policy under which the genuine quote is accepted; they do not change with the quote."""
    item = vectors.tdx(name)
    endorsements, policy = parse_endorsements(item.collateral.encode()), new_policy(Profile.PRODUCTION, now=item.at)
    verify_endorsements(endorsements, policy, now=item.at)
    return endorsements, policy


def appraised(name: str, data: bytes) -> Platform:
    item = vectors.tdx(name)
    endorsements, policy = endorsed(name)
    quote = parse_quote(data)
    verify_root(quote, policy)
    platform = verify_quote(data, quote, endorsements, policy, now=item.at)
    verify_td(quote.body, policy)
    return platform


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def part_of(position: int) -> str:
    return PARTS[max(start for start in STARTS if start <= position)]


def sweep(name: str, bits: range) -> dict[str, set[str]]:
    """The codes by part of the quote; fails on the first flip that is accepted."""
    data = vectors.tdx(name).quote
    codes: dict[str, set[str]] = {}
    for bit in bits:
        with pytest.raises(CountermarkError) as err:
            appraised(name, flip(data, bit))
        codes.setdefault(part_of(bit // 8), set()).add(err.value.code)
    return codes


def check(codes: dict[str, set[str]]) -> None:
    assert codes.keys() == set(PARTS.values()) - {"chain"}
    for part, expected in CODES.items():
        assert codes[part] == expected, part
    assert codes["header"] >= {"quote.version", "quote.signature"}
    assert codes["QE report"] <= {"quote.qe_signature", "quote.qe_reserved"}
    assert all(code.startswith("quote.") for part in codes.values() for code in part)


@pytest.mark.parametrize("name", GENUINE)
def test_the_parts_are_where_they_are_said_to_be(name: str) -> None:
    data = vectors.tdx(name).quote
    quote = parse_quote(data)
    assert data[STARTS[-1] :].startswith(quote.pck_chain_pem)
    assert data[SIGNED + 4 : SIGNED + 68] == quote.signature
    assert data.index(quote.qe_auth_data, SIGNED) == SIGNED + 204 + ENCLAVE_REPORT_BYTES
    assert len(quote.qe_auth_data) == AUTH_DATA
    assert appraised(name, data).tcb_status == "UpToDate"


@pytest.mark.parametrize("name", GENUINE)
def test_a_sample_of_flipped_bits_is_refused(name: str) -> None:
    check(sweep(name, range(GENUINE.index(name), STARTS[-1] * 8, 11)))


@pytest.mark.slow
@pytest.mark.parametrize("name", GENUINE)
def test_every_flipped_bit_is_refused(name: str) -> None:
    check(sweep(name, range(STARTS[-1] * 8)))


@pytest.mark.parametrize("name", GENUINE)
def test_a_flip_behind_the_signed_part_is_refused_or_means_the_same(name: str) -> None:
    data = vectors.tdx(name).quote
    whole, same = appraised(name, data), 0
    for bit in range(STARTS[-1] * 8, len(data) * 8, 173):
        changed = flip(data, bit)
        try:
            platform = appraised(name, changed)
        except CountermarkError as err:
            assert err.code.startswith("quote."), (bit, err.code)
        else:
            same += 1
            assert (platform, quote_digest(changed)) == (whole, quote_digest(data))
            assert parse_quote(changed).body == parse_quote(data).body
    assert same < 8  # line ends of the PEM text
