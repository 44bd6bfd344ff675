"""Reference integrity manifests of the simulated GPU vendor: what driver and VBIOS measure to, signed.

SWID tags (ISO/IEC 19770-2:2015, TCG RIM Information Model 1.01) with the element and attribute names of NVIDIA's, and
an enveloped XML signature (XMLDSIG 1.1: ECDSA P-384 with SHA-384, canonical XML 1.1, certificates signer first, root
last). Index i in a RIM speaks of report index i + 1. The version strings spell SIMULATED.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.signer import XMLSigner

from countermark_appliance.platform.sim.nvidia import (
    DRIVER_INDEXES,
    DRIVER_VERSION,
    MEASUREMENTS,
    VBIOS_INDEXES,
    VBIOS_VERSION,
    GpuVendor,
    measured,
)

_SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_SHA384 = "http://www.w3.org/2001/04/xmlenc#sha384"
_RIM = "https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/"


def make_rims(vendor: GpuVendor) -> tuple[bytes, bytes]:
    """The signed driver RIM and VBIOS RIM (XML) of every simulated H100."""
    return make_rim(vendor, DRIVER_VERSION, DRIVER_INDEXES), make_rim(vendor, VBIOS_VERSION, VBIOS_INDEXES)


def make_rim(
    vendor: GpuVendor, version: str, active: Collection[int], *, values: Mapping[int, bytes] | None = None
) -> bytes:
    """One signed RIM. `active`: the report indexes it speaks of; `values`: theirs, where not a simulated GPU's."""
    expected = {index: measured(index) for index in active} if values is None else values
    tag = etree.Element(f"{{{_SWID}}}SoftwareIdentity", nsmap={"swid": _SWID, "ns2": _SHA384})
    tag_id = hashlib.sha384(b"SIMULATED RIM " + version.encode()).hexdigest()
    for name, value in (
        ("corpus", "false"),
        ("name", "GH100"),
        ("patch", "false"),
        ("supplemental", "false"),
        ("tagId", tag_id),
        ("version", "1.0"),
        ("tagVersion", "0"),
    ):
        tag.set(name, value)
    etree.SubElement(tag, f"{{{_SWID}}}Entity", name="countermark SIMULATED", role="softwareCreator tagCreator")
    meta = etree.SubElement(tag, f"{{{_SWID}}}Meta", nsmap={"ns1": _RIM})
    for name, value in (
        ("colloquialVersion", version),
        ("edition", "GPU"),
        ("product", "GH100"),
        ("revision", "r1"),
        ("PayloadType", "direct"),
        (f"{{{_RIM}}}BindingSpec", "RIMIM"),
        (f"{{{_RIM}}}BindingSpecVersion", "1.01"),
        (f"{{{_RIM}}}PlatformManufacturerStr", "countermark SIMULATED"),
        (f"{{{_RIM}}}PlatformModel", "GH100"),
        (f"{{{_RIM}}}FirmwareManufacturer", "countermark SIMULATED"),
    ):
        meta.set(name, value)
    payload = etree.SubElement(tag, f"{{{_SWID}}}Payload", nsmap={"SHA384": _SHA384})
    for index in range(MEASUREMENTS):
        is_active = index + 1 in active
        resource = etree.SubElement(payload, f"{{{_SWID}}}Resource")
        resource.set("type", "Measurement")
        resource.set("index", str(index))
        resource.set("active", str(is_active))
        resource.set("alternatives", "1")
        resource.set(f"{{{_SHA384}}}Hash0", (expected[index + 1] if is_active else bytes(48)).hex())
        resource.set("name", f"Measurement_{index}")
        resource.set("size", "48")
    return sign_tag(vendor, tag)


def sign_tag(vendor: GpuVendor, tag: etree._Element) -> bytes:
    """The SWID tag with the vendor's enveloped signature."""
    signer = XMLSigner(signature_algorithm=SignatureMethod.ECDSA_SHA384, digest_algorithm=DigestAlgorithm.SHA384)
    chain = [vendor.rim_signer.certificate, vendor.rim_root.certificate]
    return etree.tostring(signer.sign(tag, key=vendor.rim_signer.key, cert=chain))
