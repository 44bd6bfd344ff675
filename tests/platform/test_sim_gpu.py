"""Simulated H100s: form of the genuine ones, signatures by cryptography and signxml."""

import datetime
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from lxml import etree
from machine_helpers import NOW, booted, machine
from signxml.algorithms import SignatureMethod
from signxml.exceptions import InvalidDigest
from signxml.verifier import SignatureConfiguration, XMLVerifier

import vectors
from countermark.formats.boot_events import GpuMode
from countermark.formats.spdm import OpaqueType, encode_report, parse_report, signed_part
from countermark_appliance.platform.sim import nvidia

NONCE = bytes(range(32))
FWID_OID = x509.ObjectIdentifier("2.23.133.5.4.1")


def test_report_is_signed_by_the_device_key_over_our_nonce():
    evidence = booted().gpu_evidence(NONCE)
    assert len(evidence) == 2
    for item, identity in zip(evidence, booted().gpu_identities(), strict=True):
        report = parse_report(item.report)
        assert encode_report(report) == item.report
        assert report.nonce == NONCE
        leaf = x509.load_der_x509_certificate(item.certs[0])
        r, s = (int.from_bytes(part, "big") for part in (report.signature[:48], report.signature[48:]))
        leaf.public_key().verify(encode_dss_signature(r, s), signed_part(item.report), ec.ECDSA(hashes.SHA384()))
        spki = leaf.public_key().public_bytes(encoding=Encoding.DER, format=PublicFormat.SubjectPublicKeyInfo)
        assert identity.device_key == hashlib.sha256(spki).digest()


def test_chain_leads_to_the_simulated_root_and_says_so():
    chain = [x509.load_der_x509_certificate(der) for der in booted().gpu_evidence(NONCE)[0].certs]
    assert len(chain) == 5
    for certificate, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
        certificate.verify_directly_issued_by(issuer)
        assert "SIMULATED" in certificate.subject.rfc4514_string()
        assert certificate.public_key().curve.name == "secp384r1"
    assert chain[-1].public_bytes(Encoding.DER) == machine().gpu_root_der


def test_device_certificate_names_the_firmware_as_genuine_ones_do():
    genuine = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))[0]
    ours = x509.load_der_x509_certificate(booted().gpu_evidence(NONCE)[0].certs[0])
    values = [c.extensions.get_extension_for_oid(FWID_OID).value.value for c in (genuine, ours)]
    key = slice(29, 126)  # the boot ROM's public point
    assert [len(value) for value in values] == [189, 189]
    assert values[0][: key.start] == values[1][: key.start]
    assert values[0][key.stop : -48] == values[1][key.stop : -48]
    assert values[1][-48:] == nvidia.FWID == parse_report(booted().gpu_evidence(NONCE)[0].report).fwid


def test_report_has_the_records_of_a_genuine_one():
    genuine, ours = parse_report(vectors.gpu_report("h100-550")), parse_report(booted().gpu_evidence(NONCE)[0].report)
    assert [record.kind for record in ours.opaque] == [record.kind for record in genuine.opaque]
    assert [block.index for block in ours.measurements] == [block.index for block in genuine.measurements]
    assert ours.driver_version == "0.0.0-SIMULATED"
    assert ours.text(OpaqueType.PROJECT) == "SIMULATED"
    assert all(gpu.uuid.startswith("GPU-SIMULATED-") for gpu in machine().gpus)


def test_modes():
    for mode, status in ((GpuMode.CC_ON, b"\x55"), (GpuMode.CC_PROTECTED_PCIE, b"\xaa")):
        platform = booted(gpu_mode=mode)
        assert {identity.mode for identity in platform.gpu_identities()} == {mode.value}
        report = parse_report(platform.gpu_evidence(NONCE)[0].report)
        assert report.find(OpaqueType.PROTECTED_PCIE_STATUS) == status
    assert all(identity.devtools for identity in booted(gpu_devtools=True).gpu_identities())
    assert parse_report(booted(gpu_fwid=b"").gpu_evidence(NONCE)[0].report).fwid is None
    keys = [identity.device_key for identity in booted().gpu_identities()]
    assert keys == sorted(set(keys))


def test_crls_are_their_issuers():
    vendor = machine().gpu_vendor
    revoked = nvidia.crls(vendor, now=NOW, revoked=(machine().gpus[0].device.certificate,))
    for data, clean, issuer in zip(
        revoked, machine().endorsements.gpu_crls, (vendor.root, vendor.family, vendor.provisioner), strict=True
    ):
        crl = x509.load_der_x509_crl(data)
        assert crl.is_signature_valid(issuer.key.public_key())
        serial = machine().gpus[0].device.certificate.serial_number
        assert crl.get_revoked_certificate_by_serial_number(serial) is not None
        assert x509.load_der_x509_crl(clean).get_revoked_certificate_by_serial_number(serial) is None


def test_rims_are_signed_and_describe_the_report():
    config = SignatureConfiguration(
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        verification_time=datetime.datetime.fromtimestamp(NOW, datetime.UTC),
    )
    report = parse_report(booted().gpu_evidence(NONCE)[0].report)
    values = {block.index: block.value.hex() for block in report.measurements}
    seen: set[int] = set()
    for data, version in zip(machine().endorsements.gpu_rims, ("0.0.0-SIMULATED", "00.00.00.00.00"), strict=True):
        certificate = machine().gpu_vendor.rim_signer.certificate
        signed = XMLVerifier().verify(data, x509_cert=certificate, expect_config=config).signed_xml
        swid = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
        assert signed.find(f"{swid}Meta").get("colloquialVersion") == version
        resources = signed.findall(f"{swid}Payload/{swid}Resource")
        assert [int(item.get("index")) for item in resources] == list(range(64))
        for item in resources:
            if item.get("active") == "True":
                index = int(item.get("index")) + 1
                assert item.get("{http://www.w3.org/2001/04/xmlenc#sha384}Hash0") == values[index]
                assert index not in seen
                seen.add(index)
        root = etree.fromstring(data)
        root.find(f"{swid}Meta").set("colloquialVersion", "other")
        with pytest.raises(InvalidDigest):
            XMLVerifier().verify(etree.tostring(root), x509_cert=certificate, expect_config=config)
    assert seen == {index for index, value in values.items() if int(value, 16)}
