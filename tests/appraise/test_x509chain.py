"""X.509 from outside: whatever the bytes, a parsed value or one of our errors; and the path rules one by one."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.errors import FormatError
from countermark.x509chain import ChainError
from countermark_appliance.platform.sim.issue import issue, issue_crl
from sim_evidence import NOW, machine, sha256

YEAR_S = 365 * 86_400


def pck_chain() -> list[bytes]:
    vendor = machine().vendor
    return [vendor.pck.der, vendor.pck_ca.der, vendor.root.der]


def changed(data: bytes, position: int, bits: int) -> bytes:
    return data[:position] + bytes((data[position] ^ bits,)) + data[position + 1 :]


def verify(items: list[bytes], *, root: bytes | None = None, now: int = NOW) -> None:
    chain = x509chain.parse_der_chain(items, "test")
    x509chain.verify_chain(chain, root=root or sha256(machine().root_der), now=now)


def test_the_good_chain_verifies() -> None:
    verify(pck_chain())


@pytest.mark.filterwarnings("ignore:Parsed a serial number:Warning")
@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_changed_byte_of_a_chain_is_refused_with_our_errors(which: int, bits: int) -> None:
    good = pck_chain()
    for position in range(len(good[which])):
        items = list(good)
        items[which] = changed(good[which], position, bits)
        with pytest.raises((FormatError, ChainError)):
            verify(items)


@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
def test_any_changed_byte_of_a_crl_is_refused_with_our_errors(bits: int) -> None:
    vendor = machine().vendor
    good = issue_crl(vendor.pck_ca, this_update=NOW - 60, next_update=NOW + 60, revoked=[vendor.pck.certificate])
    x509chain.verify_crl(x509chain.parse_crl(good, "test"), vendor.pck_ca.certificate, now=NOW)
    for position in range(len(good)):
        bad = changed(good, position, bits)
        with pytest.raises((FormatError, ChainError)):
            x509chain.verify_crl(x509chain.parse_crl(bad, "test"), vendor.pck_ca.certificate, now=NOW)


@pytest.mark.parametrize(
    ("reason", "items", "now"),
    [
        ("root", [0, 1], NOW),
        ("short", [2], NOW),
        ("ca", [1, 2], NOW),
        ("signature", [0, 2], NOW),
        ("expired", [0, 1, 2], NOW + 3 * YEAR_S),
        ("not_yet_valid", [0, 1, 2], NOW - YEAR_S),
    ],
)
def test_path_rules(reason: str, items: list[int], now: int) -> None:
    with pytest.raises(ChainError) as err:
        verify([pck_chain()[index] for index in items], now=now)
    assert err.value.reason == reason


def test_a_leaf_that_issues_is_refused() -> None:
    vendor = machine().vendor
    with pytest.raises(ChainError) as err:
        verify([vendor.tcb_signing.der, vendor.tcb_signing.der, vendor.root.der])
    assert err.value.reason == "ca"


def test_a_path_length_is_kept() -> None:
    """The platform CA has path length 0: a CA of its own making must not stand below it."""
    vendor = machine().vendor
    times: Any = {"not_before": NOW - 60, "not_after": NOW + 60, "curve": ec.SECP256R1()}
    sub_ca = issue("sub CA", vendor.pck_ca, **times, ca=True)
    leaf = issue("leaf", sub_ca, **times, ca=False)
    with pytest.raises(ChainError) as err:
        verify([leaf.der, sub_ca.der, vendor.pck_ca.der, vendor.root.der])
    assert err.value.reason == "ca"


def test_a_ca_whose_key_may_not_sign_certificates_is_refused() -> None:
    vendor = machine().vendor
    good = vendor.pck_ca.certificate
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(good.issuer)
        .public_key(vendor.pck_ca.key.public_key())
        .serial_number(1)
        .not_valid_before(good.not_valid_before_utc)
        .not_valid_after(good.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(**usage, key_cert_sign=False, crl_sign=True, encipher_only=False, decipher_only=False),
            critical=True,
        )
    )
    bad = builder.sign(vendor.root.key, hashes.SHA256()).public_bytes(Encoding.DER)
    with pytest.raises(ChainError) as err:
        verify([vendor.pck.der, bad, vendor.root.der])
    assert err.value.reason == "ca"


def test_a_crl_needs_a_next_update_and_its_time() -> None:
    vendor = machine().vendor
    crl = x509chain.parse_crl(issue_crl(vendor.pck_ca, this_update=NOW, next_update=NOW + 60), "test")
    for now, reason in ((NOW - 1, "not_yet_valid"), (NOW + 61, "expired")):
        with pytest.raises(ChainError) as err:
            x509chain.verify_crl(crl, vendor.pck_ca.certificate, now=now)
        assert err.value.reason == reason


def test_counts_and_sizes_are_capped_first() -> None:
    for items in ([], [b""] * 9, [b"0" * 70_000]):
        with pytest.raises(FormatError) as err:
            x509chain.parse_der_chain(items, "test")
        assert err.value.code == "test.chain"
    with pytest.raises(FormatError) as err:
        x509chain.parse_crl(b"0" * (5 << 20), "test")
    assert err.value.code == "test.crl"
