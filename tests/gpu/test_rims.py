"""RIMs: NVIDIA's genuine ones, and what a signed document could be bent into."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID
from lxml import etree

import vectors
from countermark import x509chain
from countermark.errors import CountermarkError, FormatError, GpuError
from countermark.formats.spdm import Opaque, OpaqueType, parse_report
from countermark.gpu.rim import Rim, RimKind, compare, compare_all, parse_rim, rim_name, speaks_of, verify_rim
from countermark.gpu.rim import verify_rim_signature as verify_signature
from countermark.policy import NVIDIA_RIM_ROOT
from countermark_appliance.platform.sim import nvidia, rim
from countermark_appliance.platform.sim.issue import YEAR_S, issue
from made_certificates import make_certificate
from sim_evidence import NOW, machine

GENUINE = {  # file -> kind, version, number of active indexes, a time at which its signer was valid
    "1010_0200_882_96005E0001_PROD.swidtag": (RimKind.VBIOS, "96.00.5E.00.01", 12, "2024-06-01"),
    "1010_0200_882_96005E0001_test_no_gpu.swidtag": (RimKind.VBIOS, "96.00.5E.00.01", 12, "2024-06-01"),
    "1010_0205_862_96005E0002_PROD.swidtag": (RimKind.VBIOS, "96.00.5E.00.02", 12, "2024-06-01"),
    "Driver_RIM_test_no_gpu.swidtag": (RimKind.DRIVER, "545.00", 21, "2024-06-01"),
    "NV_GPU_DRIVER_GH100_550.144.03.xml": (RimKind.DRIVER, "550.144.03", 21, "2026-11-22"),
}
VBIOS_535 = "1010_0200_882_96005E0001_PROD.swidtag"
DRIVER_550 = "NV_GPU_DRIVER_GH100_550.144.03.xml"
DS = "{http://www.w3.org/2000/09/xmldsig#}"
SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
HASH0 = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash0"


def at(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())


def genuine(name: str) -> bytes:
    return vectors.read(f"nvidia/rim/{name}")


def genuine_rim(name: str) -> Rim:
    return verify_rim(parse_rim(genuine(name)), root=NVIDIA_RIM_ROOT, now=at(GENUINE[name][3]))


def test_the_root_is_the_one_nvidia_publishes() -> None:
    root = x509.load_pem_x509_certificate(vectors.read("nvidia/verifier_RIM_root.pem"))
    assert x509chain.digest(root) == NVIDIA_RIM_ROOT


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_rims_verify(name: str) -> None:
    kind, version, active, _ = GENUINE[name]
    found = genuine_rim(name)
    assert (found.kind, found.version, found.product, len(found.references)) == (kind, version, "GH100", active)


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_signatures_by_hand(name: str) -> None:
    """XMLDSIG core validation with lxml's C14N 1.0 (the same bytes here, without xml: attributes) and cryptography."""
    root = etree.fromstring(genuine(name))
    signature = root.find(f"{DS}Signature")
    info = signature.find(f"{DS}SignedInfo")
    signed_info = etree.tostring(info, method="c14n")
    chain = parse_rim(genuine(name)).chain
    value = base64.b64decode(signature.findtext(f"{DS}SignatureValue"))
    der = encode_dss_signature(int.from_bytes(value[:48]), int.from_bytes(value[48:]))
    key = chain[0].public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(der, signed_info, ec.ECDSA(hashes.SHA384()))
    wanted = base64.b64decode(info.findtext(f"{DS}Reference/{DS}DigestValue"))
    root.remove(signature)
    assert hashlib.sha384(etree.tostring(root, method="c14n")).digest() == wanted
    read = {
        int(item.get("index")): item.get(HASH0) for item in root.iter(f"{SWID}Resource") if item.get("active") == "True"
    }
    assert read == {item.index: item.values[0].hex() for item in genuine_rim(name).references}


def leaf(name: str) -> x509.Certificate:
    vendor = machine().gpu_vendor
    times = {"not_before": NOW, "not_after": NOW + YEAR_S}
    key = issue("x", vendor.provisioner, **times, curve=ec.SECP384R1(), ca=False).key
    start = datetime.fromtimestamp(NOW, UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=subject, public_key=key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start)
    return builder.sign(key, hashes.SHA384())


def test_the_names_under_which_nvidia_publishes() -> None:
    """A GB100's driver of Hopper's name is published, too, and another manifest (seen with driver 595)."""
    report = parse_report(vectors.gpu_report("h100-535"))
    hopper, blackwell = leaf("GH100 A01 GSP FMC LF"), leaf("GB100 A01 GSP FMC LF")
    assert rim_name(report, RimKind.DRIVER, hopper) == "NV_GPU_DRIVER_GH100_535.86.09"
    assert rim_name(report, RimKind.DRIVER, blackwell) == "NV_GPU_CC_DRIVER_GB100_535.86.09"
    stated = replace(report, opaque=(*report.opaque, Opaque(kind=OpaqueType.CHIP_INFO, value=b"GB102\0")))
    assert rim_name(stated, RimKind.DRIVER, blackwell) == "NV_GPU_CC_DRIVER_GB102_535.86.09"
    others = tuple(item for item in report.opaque if item.kind != OpaqueType.PROJECT)
    lower = replace(report, opaque=(*others, Opaque(kind=OpaqueType.PROJECT, value=b"g525\0")))
    assert rim_name(report, RimKind.VBIOS, hopper) == "NV_GPU_VBIOS_1010_0200_882_96005E0001"
    assert rim_name(lower, RimKind.VBIOS, blackwell) == "NV_GPU_VBIOS_G525_0200_882_96005E0001"


def test_the_535_report_matches_its_vbios_rim_and_the_others_do_not() -> None:
    """The convention of indexes, proven: RIM index i is measurement block i + 1, 12 of 12."""
    report = parse_report(vectors.gpu_report("h100-535"))
    right = genuine_rim(VBIOS_535)
    assert speaks_of(right, report)
    found = compare(report, right)
    assert (len(found.matched), found.failed, found.skipped) == (12, (), ())
    assert str(found) == "VBIOS 96.00.5E.00.01: 12 of 12 measurements match"
    found.require_match()
    other = genuine_rim("1010_0205_862_96005E0002_PROD.swidtag")
    assert not speaks_of(other, report)
    assert len(compare(report, other).matched) == 11
    with pytest.raises(GpuError) as err:
        compare(report, other).require_match()
    assert err.value.code == "gpu.measurement"
    assert "index 11: expected" in str(err.value)


def test_of_two_rims_with_one_version_the_better_match_counts() -> None:
    report = parse_report(vectors.gpu_report("h100-535"))
    test_rim = genuine_rim("1010_0200_882_96005E0001_test_no_gpu.swidtag")
    (best,) = compare_all(report, [test_rim, genuine_rim(VBIOS_535)])
    assert len(best.matched) == 12
    (alone,) = compare_all(report, [test_rim])
    assert len(alone.failed) == 4


def test_no_driver_rim_here_is_for_a_report_here() -> None:
    """Why no genuine GPU can be accepted to the end with these files: each report wants the RIM of its own driver."""
    reports = [parse_report(vectors.gpu_report(name)) for name in vectors.GPU_SETS]
    drivers = [genuine_rim(name) for name, (kind, *_) in GENUINE.items() if kind is RimKind.DRIVER]
    assert not any(speaks_of(item, report) for item in drivers for report in reports)


def test_nvdec0_off_spares_its_index_only() -> None:
    report = parse_report(vectors.gpu_report("h100-550"))
    driver = genuine_rim(DRIVER_550)
    changed = [item for item in driver.references if item.index in (34, 35)]
    wrong = [type(item)(index=item.index, values=(bytes(48),)) for item in changed]
    found = compare(report, type(driver)(kind=driver.kind, version="1", product="", references=tuple(wrong)))
    assert (found.failed, found.skipped, found.active) == ((34,), (35,), (34, 35))
    assert "1 not compared" in str(found)


@pytest.mark.parametrize(
    ("code", "day", "root"),
    [
        ("gpu.rim_expired", "2026-12-31", NVIDIA_RIM_ROOT),
        ("gpu.rim_not_yet_valid", "2024-12-30", NVIDIA_RIM_ROOT),
        ("gpu.rim_root", "2026-01-01", bytes(32)),
    ],
)
def test_genuine_signers_are_judged_at_the_time_given(code: str, day: str, root: bytes) -> None:
    document = parse_rim(genuine(DRIVER_550))
    with pytest.raises(GpuError) as err:
        verify_rim(document, root=root, now=at(day))
    assert (err.value.code, err.value.step) == (code, "8")
    assert verify_signature(document).version == "550.144.03"  # an auditor may still read what was signed


# What the simulated vendor signed, bent.

GOOD = machine().endorsements.gpu_rims[0]
SIM_ROOT = hashlib.sha256(machine().rim_root_der).digest()


def judge(data: bytes) -> Rim:
    return verify_rim(parse_rim(data), root=SIM_ROOT, now=NOW)


def edit(change: Callable[[etree._Element, etree._Element], object]) -> bytes:
    root = etree.fromstring(GOOD)
    signature = root.find(f"{DS}Signature")
    change(root, signature)
    return etree.tostring(root)


def wrapped(root: etree._Element, signature: etree._Element) -> None:
    """The whole signed document moved below an evil one of the same name, its signature too."""
    evil = etree.fromstring(GOOD)
    for child in list(root):
        root.remove(child)
    for child in list(evil.iter(f"{DS}Signature")):
        child.getparent().remove(child)
    for item in evil.iter(f"{SWID}Resource"):
        item.set(HASH0, "00" * 48)
    root.extend(list(evil))
    root.append(etree.fromstring(GOOD))


def wrapped_by_id(root: etree._Element, signature: etree._Element) -> None:
    """The classic: the reference names a copy of the good document that hangs where nobody looks."""
    good = etree.fromstring(GOOD)
    good.set("Id", "good")
    signature.find(f"{DS}SignedInfo/{DS}Reference").set("URI", "#good")
    etree.SubElement(signature, f"{DS}Object").append(good)
    next(root.iter(f"{SWID}Resource")).set(HASH0, "00" * 48)


def add_transform(root: etree._Element, signature: etree._Element) -> None:
    etree.SubElement(
        next(root.iter(f"{DS}Transforms")), f"{DS}Transform", Algorithm="http://www.w3.org/TR/1999/REC-xslt-19991116"
    )


def add_reference(root: etree._Element, signature: etree._Element) -> None:
    info = signature.find(f"{DS}SignedInfo")
    info.append(etree.fromstring(etree.tostring(info.find(f"{DS}Reference"))))


def with_set(path: str, name: str, value: str) -> Callable[[etree._Element, etree._Element], object]:
    def change(root: etree._Element, signature: etree._Element) -> None:
        found = root.find(path)
        assert found is not None, path
        found.set(name, value)

    return change


def key_value(root: etree._Element, signature: etree._Element) -> None:
    etree.SubElement(signature.find(f"{DS}KeyInfo"), f"{DS}KeyValue")


def twice_signed(root: etree._Element, signature: etree._Element) -> None:
    root.append(etree.fromstring(etree.tostring(signature)))


def many_attributes(root: etree._Element, signature: etree._Element) -> None:
    info = signature.find(f"{DS}SignedInfo")
    for number in range(9):
        info.set(f"a{number}", "")


ENTITIES = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
EXTERNAL = b'<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
FORMS = {
    "nothing": b"",
    "no XML": b"RIM",
    "too long": GOOD + b" " * (256 * 1024),
    "namespaces that take canonical XML seconds": GOOD.replace(
        b"SoftwareIdentity", b"SoftwareIdentity" + b"".join(b' xmlns:n%d="a:b"' % i for i in range(8000)), 1
    ),
    "attributes that take canonical XML seconds": edit(many_attributes),
    "entity expansion": ENTITIES + GOOD.replace(b">", b">&b;", 1),
    "external entity": EXTERNAL + GOOD.replace(b">", b">&x;", 1),
    "external document type": b'<!DOCTYPE SoftwareIdentity SYSTEM "http://example.invalid/a.dtd">' + GOOD,
    "document type in UTF-16": (EXTERNAL.decode() + GOOD.decode()).encode("utf-16"),
    "declared encoding that hides a document type": b'<?xml version="1.0" encoding="UTF-7"?>+ADw-+ACE-DOCTYPE' + GOOD,
    "another document": b"<a/>",
    "no signature": edit(lambda root, signature: root.remove(signature)),
    "two signatures": edit(twice_signed),
    "signature wrapping": edit(wrapped),
    "signature wrapping by id": edit(wrapped_by_id),
    "signature deeper": edit(lambda root, signature: root.find(f"{SWID}Payload").append(signature)),
    "another transform": edit(add_transform),
    "a second reference": edit(add_reference),
    "a reference to a part": edit(with_set(f".//{DS}Reference", "URI", "#part")),
    "a typed reference": edit(with_set(f".//{DS}Reference", "Type", "x")),
    "C14N with comments": edit(
        with_set(f".//{DS}CanonicalizationMethod", "Algorithm", "http://www.w3.org/2006/12/xml-c14n11#WithComments")
    ),
    "SHA-1": edit(with_set(f".//{DS}DigestMethod", "Algorithm", "http://www.w3.org/2000/09/xmldsig#sha1")),
    "HMAC": edit(
        with_set(f".//{DS}SignatureMethod", "Algorithm", "http://www.w3.org/2001/04/xmldsig-more#hmac-sha384")
    ),
    "a key beside the certificates": edit(key_value),
    "no certificate": edit(lambda root, signature: next(signature.iter(f"{DS}X509Data")).clear()),
    "a certificate that is none": edit(
        lambda root, signature: setattr(next(signature.iter(f"{DS}X509Certificate")), "text", "AAAA")
    ),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_other_forms_are_refused_before_anything_is_verified(data: bytes) -> None:
    with pytest.raises(FormatError) as err:
        parse_rim(data)
    assert err.value.code == "gpu.rim"


def stranger() -> bytes:
    """Signed by another vendor, with our vendor's certificates in the document."""
    theirs = rim.make_rim(nvidia.make_gpu_vendor(now=NOW), nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES)
    chain = re.search(rb"<ds:X509Data>.*</ds:X509Data>", GOOD, re.DOTALL)
    assert chain is not None
    return re.sub(rb"<ds:X509Data>.*</ds:X509Data>", lambda _: chain[0], theirs, flags=re.DOTALL)


def by_signer(ca: bool = False, **changes: int) -> bytes:
    vendor = machine().gpu_vendor
    times = {"not_before": NOW - 3600, "not_after": NOW + YEAR_S, **changes}
    signer = issue("RIM signer", vendor.rim_root, **times, curve=ec.SECP384R1(), ca=ca)
    return rim.make_rim(replace(vendor, rim_signer=signer), nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES)


def by_a_key_for_something_else() -> bytes:
    vendor = machine().gpu_vendor
    signer = make_certificate(vendor.rim_root, ca=False, sign=False)
    return rim.make_rim(replace(vendor, rim_signer=signer), nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES)


def first_hash(root: etree._Element, signature: etree._Element) -> None:
    next(item for item in root.iter(f"{SWID}Resource") if item.get("active") == "True").set(HASH0, "00" * 48)


VERIFIED = {
    "a changed value": ("gpu.rim_signature", edit(first_hash)),
    "a changed version": ("gpu.rim_signature", edit(with_set(f"{SWID}Meta", "colloquialVersion", "1.0"))),
    "an index made inactive": ("gpu.rim_signature", GOOD.replace(b'active="True"', b'active="False"', 1)),
    "an added element": (
        "gpu.rim_signature",
        edit(lambda root, signature: etree.SubElement(root, f"{SWID}Payload")),
    ),
    "a changed signature": (
        "gpu.rim_signature",
        edit(lambda r, s: setattr(s.find(f"{DS}SignatureValue"), "text", base64.b64encode(bytes(96)).decode())),
    ),
    "a signature too short": (
        "gpu.rim_signature",
        edit(lambda r, s: setattr(s.find(f"{DS}SignatureValue"), "text", base64.b64encode(bytes(8)).decode())),
    ),
    "a changed digest": (
        "gpu.rim_signature",
        edit(lambda r, s: setattr(next(s.iter(f"{DS}DigestValue")), "text", base64.b64encode(bytes(48)).decode())),
    ),
    "a stranger's signature under our certificates": ("gpu.rim_signature", stranger()),
    "another vendor's root": (
        "gpu.rim_root",
        rim.make_rim(nvidia.make_gpu_vendor(now=NOW), nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES),
    ),
    "an expired signer": ("gpu.rim_expired", by_signer(not_before=NOW - YEAR_S, not_after=NOW - 1)),
    "a signer from the future": ("gpu.rim_not_yet_valid", by_signer(not_before=NOW + 60)),
    "a signer that is an authority": ("gpu.rim_chain", by_signer(ca=True)),
    "a signer whose key is for something else": ("gpu.rim_chain", by_a_key_for_something_else()),
    "certificates of the root alone": (
        "gpu.rim_chain",
        edit(lambda r, s: (data := next(s.iter(f"{DS}X509Data"))).remove(data[0])),
    ),
}


@pytest.mark.parametrize(("code", "data"), VERIFIED.values(), ids=VERIFIED)
def test_what_does_not_verify_is_refused(code: str, data: bytes) -> None:
    with pytest.raises(CountermarkError) as err:
        judge(data)
    assert (err.value.code, getattr(err.value, "step", None)) == (code, "8")


def test_comments_are_not_what_is_read() -> None:
    """A comment splits a text for readers of the document; the signed form has none (CVE-2017-11427 and its kin)."""
    for place in (b"<swid:Meta", b"<swid:Resource"):
        assert place in GOOD
        assert judge(GOOD.replace(place, b"<!-- 1.0 -->" + place, 1)) == judge(GOOD)


def signed(change: Callable[[etree._Element], object]) -> bytes:
    """A RIM whose content is changed before the vendor's own key signs it."""
    tag = etree.fromstring(GOOD)
    tag.remove(tag.find(f"{DS}Signature"))
    change(tag)
    return rim.sign_tag(machine().gpu_vendor, tag)


def resource(tag: etree._Element, *, active: str = "True") -> etree._Element:
    return next(item for item in tag.iter(f"{SWID}Resource") if item.get("active") == active)


CONTENTS = {
    "no Meta": lambda tag: tag.remove(tag.find(f"{SWID}Meta")),
    "two payloads": lambda tag: etree.SubElement(tag, f"{SWID}Payload"),
    "no version": lambda tag: tag.find(f"{SWID}Meta").set("colloquialVersion", ""),
    "a patch": lambda tag: tag.set("patch", "true"),
    "a supplement": lambda tag: tag.set("supplemental", "true"),
    "nothing active": lambda tag: [item.set("active", "False") for item in tag.iter(f"{SWID}Resource")],
    "one index twice": lambda tag: resource(tag).set("index", "21"),
    "an index that is none": lambda tag: resource(tag).set("index", "-1"),
    "an index out of range": lambda tag: resource(tag).set("index", "254"),
    "active unclear": lambda tag: resource(tag).set("active", "yes"),
    "something else to judge": lambda tag: resource(tag).set("type", "Opaque"),
    "a file": lambda tag: etree.SubElement(tag.find(f"{SWID}Payload"), f"{SWID}File", name="x"),
    "no value": lambda tag: resource(tag).attrib.pop(HASH0),
    "more values than alternatives": lambda tag: resource(tag).set(HASH0[:-1] + "1", "00" * 48),
    "fewer values than alternatives": lambda tag: resource(tag).set("alternatives", "2"),
    "no alternatives": lambda tag: resource(tag).set("alternatives", "0"),
    "another size": lambda tag: resource(tag).set("size", "32"),
    "a value that is no hex": lambda tag: resource(tag).set(HASH0, "xy" * 48),
}


@pytest.mark.parametrize("change", CONTENTS.values(), ids=CONTENTS)
def test_signed_documents_that_are_no_rims_are_refused(change: Callable[[etree._Element], object]) -> None:
    judge(signed(lambda tag: None))
    with pytest.raises(FormatError) as err:
        judge(signed(change))
    assert err.value.code == "gpu.rim"
