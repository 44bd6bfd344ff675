"""Simulated quotes and collateral, judged by dcap-qvl."""

import hashlib
import json

import dcap_qvl
import pytest
from cryptography import x509
from machine_helpers import NOW, booted, machine, verify

import vectors
from countermark.formats.quote import (
    TdAttributes,
    encode_quote,
    parse_pem_chain,
    parse_quote,
    quote_digest,
    signed_part,
)
from countermark_appliance.platform.sim.intel import FMSPC, Collateral, collateral_json, make_vendor

DATA = bytes(range(64))
TDX = machine().endorsements.tdx


@pytest.mark.parametrize("version", [4, 5])
def test_dcap_qvl_accepts_it_as_up_to_date_under_its_own_root(version):
    quote = booted(version=version).quote(DATA)
    claims = verify(quote, TDX, machine().root_der)
    assert claims["tcb"] == {"status": "UpToDate", "advisory_ids": [], "eval_data_number": 1000}
    parsed = parse_quote(quote)
    assert encode_quote(parsed) == quote
    assert parsed.body.report_data == DATA
    assert parsed.body.attributes == TdAttributes.SEPT_VE_DISABLE
    theirs = dcap_qvl.parse_quote(quote)
    assert theirs.report.report_data == DATA
    assert theirs.fmspc() == FMSPC.hex().upper()


def test_dcap_qvl_rejects_it_under_intels_root_and_under_another_simulated_one():
    quote = booted().quote(DATA)
    for root in (None, make_vendor(now=NOW).root.der):
        with pytest.raises(ValueError, match=r"."):
            verify(quote, TDX, root)


def test_genuine_evidence_is_rejected_under_the_simulated_root():
    genuine = vectors.tdx("dstack-90c06f")
    with pytest.raises(ValueError, match=r"."):
        verify(genuine.quote, genuine.collateral.encode(), machine().root_der, now=genuine.at)


def test_any_flipped_bit_of_the_signed_structures_is_rejected():
    quote = booted().quote(DATA)
    end = len(quote) - len(parse_quote(quote).pck_chain_pem) - 6
    for offset in [*range(0, end, 37), 0, 47, 48, 631, 632, 640, 700, 767, 770, end - 1]:
        changed = bytearray(quote)
        changed[offset] ^= 1
        with pytest.raises(ValueError, match=r"."):
            verify(bytes(changed), TDX, machine().root_der)


@pytest.mark.parametrize(
    "says",
    [
        {"status": "OutOfDate"},
        {"status": "Revoked"},
        {"status": "ConfigurationNeeded"},
        {"qe_status": "OutOfDate"},
        {"fmspc": b"OTHER!"},
        {"issued": NOW + 86_400},
        {"issued": NOW - 31 * 86_400},
        {"revoked_by_pck_ca": (machine().vendor.pck.certificate,)},
        {"revoked_by_root": (machine().vendor.pck_ca.certificate,)},
        {"revoked_by_root": (machine().vendor.tcb_signing.certificate,)},
    ],
)
def test_dcap_qvl_heeds_what_the_simulated_vendor_says(says):
    collateral = collateral_json(machine().vendor, Collateral(**{"issued": NOW - 3600} | says))
    with pytest.raises(ValueError, match=r"."):
        verify(booted().quote(DATA), collateral, machine().root_der)


def test_tcb_info_signed_by_another_key_is_rejected():
    vendor = machine().vendor
    for signer in (vendor.pck_ca, vendor.pck, make_vendor(now=NOW).tcb_signing):
        collateral = collateral_json(vendor, Collateral(issued=NOW - 3600), signer=signer)
        with pytest.raises(ValueError, match=r"."):
            verify(booted().quote(DATA), collateral, machine().root_der)


def test_advisories_and_evaluation_number_arrive():
    says = Collateral(issued=NOW - 3600, advisories=("SIMULATED-SA-1",), evaluation_number=19)
    claims = verify(booted().quote(DATA), collateral_json(machine().vendor, says), machine().root_der)
    assert claims["tcb"] == {"status": "UpToDate", "advisory_ids": ["SIMULATED-SA-1"], "eval_data_number": 19}


def test_pck_extension_has_the_genuine_members():
    ours = dcap_qvl.parse_quote(booted().quote(DATA)).pck_extension()
    genuine = dcap_qvl.parse_quote(vectors.tdx("dstack-90c06f").quote).pck_extension()
    assert ours.fmspc == FMSPC == b"SIMULA"
    assert ours.sgx_type == genuine.sgx_type == 1
    assert ours.ppid.startswith(b"SIMULATED") and len(ours.ppid) == len(genuine.ppid)
    oid = "1.2.840.113741.1.13.1"
    for member in (*(f"{oid}.{i}" for i in range(1, 8)), *(f"{oid}.2.{i}" for i in range(1, 19)), f"{oid}.7.3"):
        assert (ours.get_value(member) is None) == (genuine.get_value(member) is None), member


def test_crls_carry_number_and_authority_key():
    collateral = json.loads(TDX)
    for name, issuer in (("root_ca_crl", machine().vendor.root), ("pck_crl", machine().vendor.pck_ca)):
        crl = x509.load_der_x509_crl(bytes.fromhex(collateral[name]))
        assert crl.is_signature_valid(issuer.key.public_key())
        assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 1
        crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)


def test_every_certificate_says_simulated():
    for der in parse_pem_chain(parse_quote(booted().quote(DATA)).pck_chain_pem):
        certificate = x509.load_der_x509_certificate(der)
        assert "SIMULATED" in certificate.subject.rfc4514_string()
        assert "SIMULATED" in certificate.issuer.rfc4514_string()
        assert "Intel" not in certificate.subject.rfc4514_string()
    assert parse_quote(booted().quote(DATA)).header.user_data.startswith(b"SIMULATED")


def test_quote_digest_names_the_signed_part():
    platform = booted()
    first, second = platform.quote(DATA), platform.quote(DATA)
    assert first != second  # ECDSA draws a nonce
    assert quote_digest(first) == quote_digest(second) == hashlib.sha256(signed_part(second)).digest()
