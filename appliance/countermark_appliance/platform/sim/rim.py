"""Reference integrity manifests of the simulated GPU vendor: what driver and VBIOS measure to, signed.

SWID tags (ISO/IEC 19770-2:2015, TCG RIM Information Model 1.01) with the element and attribute names of NVIDIA's, and
an enveloped XML signature (XMLDSIG 1.1: ECDSA P-384 with SHA-384, canonical XML 1.1, certificates signer first, root
last). Index i in a RIM speaks of report index i + 1. The version strings spell SIMULATED.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from lxml import etree

from countermark_appliance.platform.sim.nvidia import (
    DRIVER_INDEXES,
    DRIVER_VERSION,
    MEASUREMENTS,
    VBIOS_INDEXES,
    VBIOS_VERSION,
    GpuVendor,
    measured,
)

_DS = "http://www.w3.org/2000/09/xmldsig#"
_C14N = "http://www.w3.org/2006/12/xml-c14n11"
_SCALAR_BYTES = 48
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
    """The SWID tag with the vendor's enveloped signature as its last element."""
    digest = hashlib.sha384(_canonical(tag)).digest()
    signature = etree.SubElement(tag, f"{{{_DS}}}Signature", nsmap={"ds": _DS})
    info = _add(signature, "SignedInfo")
    _add(info, "CanonicalizationMethod", Algorithm=_C14N)
    _add(info, "SignatureMethod", Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384")
    reference = _add(info, "Reference", URI="")
    transforms = _add(reference, "Transforms")
    _add(transforms, "Transform", Algorithm=f"{_DS}enveloped-signature")
    _add(transforms, "Transform", Algorithm=_C14N)
    _add(reference, "DigestMethod", Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384")
    _add(reference, "DigestValue").text = base64.b64encode(digest).decode("ascii")
    r, s = decode_dss_signature(vendor.rim_signer.key.sign(_canonical(info), ec.ECDSA(hashes.SHA384())))
    value = b"".join(number.to_bytes(_SCALAR_BYTES, "big") for number in (r, s))
    _add(signature, "SignatureValue").text = base64.b64encode(value).decode("ascii")
    data = _add(_add(signature, "KeyInfo"), "X509Data")
    for issued in (vendor.rim_signer, vendor.rim_root):
        _add(data, "X509Certificate").text = base64.b64encode(issued.der).decode("ascii")
    return etree.tostring(tag)


def _add(parent: etree._Element, name: str, **attributes: str) -> etree._Element:
    return etree.SubElement(parent, f"{{{_DS}}}{name}", attributes)


def _canonical(element: etree._Element) -> bytes:
    # lxml's is version 1.0; 1.1 gives the same bytes where no attribute is of the xml: namespace.
    return etree.tostring(element, method="c14n", with_comments=False)
