"""X.509 from outside: whatever the bytes, a parsed value or one of our errors; and the path rules one by one."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.errors import FormatError
from countermark.x509chain import ChainError
from countermark_appliance.platform.sim import der
from countermark_appliance.platform.sim.issue import Issued, issue, issue_crl
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
    for now in (NOW, NOW + 59):
        x509chain.verify_crl(crl, vendor.pck_ca.certificate, now=now)
    for now, reason in ((NOW - 1, "not_yet_valid"), (NOW + 60, "expired"), (NOW + 61, "expired")):
        with pytest.raises(ChainError) as err:
            x509chain.verify_crl(crl, vendor.pck_ca.certificate, now=now)
        assert err.value.reason == reason


def test_a_critical_extension_that_nobody_reads_is_refused() -> None:
    vendor = machine().vendor
    times: Any = {"not_before": NOW - 60, "not_after": NOW + 60, "curve": ec.SECP256R1()}
    read = ("2.23.133.5.4.1", "2.23.133.5.4.1.1")
    for oid, reason in (("1.2.840.113741.1.13.1", "extension"), *((oid, None) for oid in read)):
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), b"\5\0")
        for critical in (True, False):
            leaf = issue("leaf", vendor.pck_ca, **times, ca=False, extensions=[extension], critical=critical)
            if reason and critical:
                with pytest.raises(ChainError) as err:
                    verify([leaf.der, vendor.pck_ca.der, vendor.root.der])
                assert err.value.reason == reason
            else:
                verify([leaf.der, vendor.pck_ca.der, vendor.root.der])


def test_a_crl_of_a_key_that_may_not_sign_crls_is_refused() -> None:
    vendor = machine().vendor
    crl = x509chain.parse_crl(issue_crl(vendor.pck, this_update=NOW, next_update=NOW + 60), "test")
    with pytest.raises(ChainError) as err:
        x509chain.verify_crl(crl, vendor.pck.certificate, now=NOW)
    assert err.value.reason == "crl_issuer"


@pytest.mark.parametrize(
    "extension",
    [
        x509.DeltaCRLIndicator(1),
        x509.IssuingDistributionPoint(None, None, True, False, None, False, False),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"),
    ],
)
def test_a_crl_that_lists_only_a_part_is_refused(extension: x509.ExtensionType) -> None:
    issuer = machine().vendor.pck_ca
    for critical in (True, False):
        crl = x509chain.parse_crl(crl_with(issuer, extension, critical=critical), "test")
        if critical:
            with pytest.raises(ChainError) as err:
                x509chain.verify_crl(crl, issuer.certificate, now=NOW)
            assert err.value.reason == "crl_extension"
        else:
            x509chain.verify_crl(crl, issuer.certificate, now=NOW)


def crl_with(issuer: Issued, extension: x509.ExtensionType, *, critical: bool) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(datetime.fromtimestamp(NOW - 60, UTC))
        .next_update(datetime.fromtimestamp(NOW + 60, UTC))
        .add_extension(extension, critical=critical)
    )
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_a_crl_without_a_next_update_is_never_current() -> None:
    issuer = machine().vendor.pck_ca
    body = x509chain.parse_crl(issue_crl(issuer, this_update=NOW - 60, next_update=NOW + 60), "test").tbs_certlist_bytes
    times = [match.start() for match in re.finditer(rb"\x17\x0d[0-9]{12}Z", body)]
    assert len(times) == 2
    body = der.sequence(body[len(body) - len_of_body(body) : times[1]], body[times[1] + 15 :])
    algorithm = der.sequence(der.oid("1.2.840.10045.4.3.2"))
    signature = issuer.key.sign(body, ec.ECDSA(hashes.SHA256()))
    data = der.sequence(body, algorithm, der.tlv(3, b"\0" + signature))
    crl = x509chain.parse_crl(data, "test")
    assert crl.next_update_utc is None
    with pytest.raises(ChainError) as err:
        x509chain.verify_crl(crl, issuer.certificate, now=NOW)
    assert err.value.reason == "expired"


def len_of_body(data: bytes) -> int:
    """The length of the outer element's content."""
    return data[1] if data[1] < 0x80 else int.from_bytes(data[2 : 2 + data[1] - 0x80])


def test_common_names_are_read_whole() -> None:
    vendor = machine().vendor
    assert x509chain.common_name(vendor.pck.certificate) == "SIMULATED SGX PCK Certificate"


def test_counts_and_sizes_are_capped_first() -> None:
    for items in ([], [b""] * 9, [b"0" * 70_000]):
        with pytest.raises(FormatError) as err:
            x509chain.parse_der_chain(items, "test")
        assert err.value.code == "test.chain"
    with pytest.raises(FormatError) as err:
        x509chain.parse_crl(b"0" * (5 << 20), "test")
    assert err.value.code == "test.crl"
