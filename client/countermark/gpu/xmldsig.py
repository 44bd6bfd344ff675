"""The one form of XML signature that RIMs have: enveloped, over the whole document, by a P-384 key.

W3C XML Signature Syntax and Processing 1.1, cut down to what NVIDIA's RIMs of every generation say, byte for byte in
this order: SignedInfo (canonical XML 1.1; ECDSA with SHA-384; one Reference with the empty URI, the enveloped-signature
transform, canonical XML 1.1, SHA-384), SignatureValue (r || s, 48 bytes each: RFC 6931 section 2.3.6), KeyInfo with one
X509Data of certificates alone. Nothing in the document chooses anything: what differs is refused, so that there is no
second signature, reference, key, transform or algorithm that could be taken for this one.

1 `parse_enveloped` finds the framing and makes the two canonical texts: of SignedInfo, and of the document without its
signature. 2 `verify_enveloped` checks digest and signature over exactly those bytes. 3 Only what it returns, parsed
from the signed bytes, is to be read: never the document around them.

Canonical XML is lxml's (libxml2's), version 1.0. 1.1 differs from it for parts of a document that inherit `xml:`
attributes, and only there; SignedInfo could inherit them from the root element, so the root may not have any. Comments
are no part of canonical XML: they may stand anywhere but in the signature, where they could split a value in two.
Not checked here: whose key it is, and what the document says.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from lxml import etree

from countermark.errors import FormatError, GpuError

MAX_BYTES: Final = 256 * 1024
# Canonical XML takes time by the product of the first two and by the square of the third; genuine RIMs have 6, 99, 11.
MAX_NAMESPACES: Final = 32
MAX_TAGS: Final = 2048
MAX_ATTRIBUTES: Final = 128
DS: Final = "{http://www.w3.org/2000/09/xmldsig#}"
C14N: Final = "http://www.w3.org/2006/12/xml-c14n11"
ENVELOPED: Final = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
ECDSA_SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#sha384"
SCALAR_BYTES: Final = 48
_XML: Final = "{http://www.w3.org/XML/1998/namespace}"
_XML_SPACE: Final = " \t\r\n"
_DROP_SPACE: Final = str.maketrans("", "", _XML_SPACE)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Enveloped:
    """A signed document whose form is right; nothing verified."""

    tag: str  # the root element's
    certificates: tuple[bytes, ...]  # DER, in the document's order
    signed_info: bytes  # canonical
    signature: bytes
    digest: bytes  # what SignedInfo says of `content`
    content: bytes  # canonical: the document without its signature


def _malformed(message: str) -> FormatError:
    return FormatError(f"RIM: {message}", code="gpu.rim")


def _unsigned(message: str) -> GpuError:
    return GpuError(f"RIM: its signature does not verify: {message}", code="gpu.rim_signature", step="8")


def _parser() -> etree.XMLParser:
    # The encoding is fixed, so that a declared one cannot make other text of the bytes than was looked at before.
    return etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False
    )


def canonical(root: etree._Element) -> bytes:
    """Canonical XML of a document without its comments."""
    return etree.tostring(root, method="c14n", with_comments=False)


def _alone(element: etree._Element) -> etree._Element:
    """The element as the root of a document of its own, with every namespace that it inherits.

    Of an element inside a document lxml makes another text: it undeclares an inherited default namespace two levels
    down (seen with lxml 6.1.3, libxml2 2.14.6).
    """
    return etree.fromstring(etree.tostring(element, with_tail=False), _parser())


def parse_enveloped(data: bytes) -> Enveloped:
    """1 the text, 2 every node, 3 the signature's form, 4 its values. Raises `FormatError` `gpu.rim`."""
    root = _parse(data)
    signature = _one_signature(root)
    info, value, key_info = _children(signature, "SignedInfo", "SignatureValue", "KeyInfo")
    digest = _signed_info(info)
    (x509_data,) = _children(key_info, "X509Data")
    certificates = _children(x509_data, *("X509Certificate",) * max(1, len(x509_data)))
    try:
        signed_info = canonical(_alone(info))
        _remove(signature, root)
        content = canonical(root)
    except etree.LxmlError as err:  # a namespace whose name is relative, for one
        raise _malformed(f"expected XML that has a canonical form: {err}") from err
    return Enveloped(
        tag=str(root.tag),
        certificates=tuple(map(_base64, certificates)),
        signed_info=signed_info,
        signature=_base64(value),
        digest=_base64(digest),
        content=content,
    )


def _parse(data: bytes) -> etree._Element:
    if len(data) > MAX_BYTES:
        raise _malformed(f"expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise _malformed("expected UTF-8") from err
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise _malformed("expected no document type and no entities")
    for what, count, most in (
        ("namespaces", text.count("xmlns"), MAX_NAMESPACES),
        ("tags", text.count("<"), MAX_TAGS),
    ):
        if count > most:
            raise _malformed(f"expected at most {most} {what}, got {count}")
    try:
        root = etree.fromstring(data, _parser())
    except (etree.XMLSyntaxError, ValueError) as err:
        raise _malformed(f"expected well-formed XML: {err}") from err
    return root


def _one_signature(root: etree._Element) -> etree._Element:
    """The one signature, a child of the root element, after a look at every node of the document."""
    found: list[etree._Element] = []
    for node in (*root.itersiblings(preceding=True), *root.itersiblings(), *root.iter()):
        if isinstance(node, etree._Comment):
            continue
        if not isinstance(node.tag, str):
            raise _malformed(f"expected elements and comments alone, got {str(node)!s:.100}")
        if len(node.attrib) > MAX_ATTRIBUTES:
            raise _malformed(f"expected at most {MAX_ATTRIBUTES} attributes in an element, got {len(node.attrib)}")
        if node.tag == DS + "Signature":
            found.append(node)
    if len(found) != 1 or found[0].getparent() is not root:
        raise _malformed(f"expected one signature, below the root element, got {len(found)}")
    inherited = [str(name) for name in root.attrib if str(name).startswith(_XML)]
    if inherited:
        raise _malformed(f"expected no attribute that the signature inherits, got {inherited!s:.200}")
    _no_attributes(found[0])
    return found[0]


def _signed_info(info: etree._Element) -> etree._Element:
    """The DigestValue of a SignedInfo that says exactly what this module does."""
    _no_attributes(info)
    canonical_xml, method, reference = _children(info, "CanonicalizationMethod", "SignatureMethod", "Reference")
    transforms, digest_method, digest = _children(reference, "Transforms", "DigestMethod", "DigestValue")
    enveloped, transform = _children(transforms, "Transform", "Transform")
    for element, algorithm in (
        (canonical_xml, C14N),
        (method, ECDSA_SHA384),
        (enveloped, ENVELOPED),
        (transform, C14N),
        (digest_method, SHA384),
    ):
        _children(element)
        if _attributes(element) != {"Algorithm": algorithm}:
            raise _malformed(f"expected the algorithm {algorithm} alone, got {_attributes(element)!s:.200}")
    if _attributes(reference) != {"URI": ""}:
        raise _malformed(f"expected a reference to the whole document, got {_attributes(reference)!s:.200}")
    _no_attributes(transforms)
    return digest


def _children(element: etree._Element, *names: str) -> list[etree._Element]:
    """The element's children, which must be exactly these, with nothing but white space around them."""
    found = list(element)
    if [child.tag for child in found] != [DS + name for name in names]:
        got = [str(child.tag) for child in found]
        raise _malformed(f"{element.tag}: expected {list(names)}, got {got!s:.300}")
    if any((text or "").strip(_XML_SPACE) for text in (element.text, *(child.tail for child in found))):
        raise _malformed(f"{element.tag}: expected no text beside elements")
    return found


def _attributes(element: etree._Element) -> dict[str, str]:
    return {str(name): str(value) for name, value in element.attrib.items()}


def _no_attributes(element: etree._Element) -> None:
    if element.attrib:
        raise _malformed(f"{element.tag}: expected no attributes, got {_attributes(element)!s:.200}")


def _base64(element: etree._Element) -> bytes:
    """The bytes an element is the base64 of: RFC 4648 and XML's white space, and no other text for the same bytes."""
    _no_attributes(element)
    if len(element):  # a comment, too: what follows it is no part of `text`
        raise _malformed(f"{element.tag}: expected text alone")
    text = (element.text or "").translate(_DROP_SPACE)
    try:
        value = binascii.a2b_base64(text) if _BASE64.fullmatch(text) else b""
    except binascii.Error as err:
        raise _malformed(f"{element.tag}: expected base64: {err}") from err
    if base64.b64encode(value).decode("ascii") != text:
        raise _malformed(f"{element.tag}: expected base64")
    return value


def _remove(signature: etree._Element, root: etree._Element) -> None:
    # The enveloped-signature transform takes the element; lxml would take the white space after it along.
    tail, before = signature.tail or "", signature.getprevious()
    if tail.strip(_XML_SPACE):
        raise _malformed("expected no text after the signature")
    if before is None:
        root.text = (root.text or "") + tail
    else:
        before.tail = (before.tail or "") + tail
    root.remove(signature)


def verify_enveloped(signed: Enveloped, key: ec.EllipticCurvePublicKey) -> etree._Element:
    """1 the signature over SignedInfo, 2 its digest of the content; returns the content, parsed from the signed bytes.

    `key` must be on P-384. Raises `GpuError` `gpu.rim_signature`, or `FormatError` `gpu.rim` for content that cannot be
    read back.
    """
    if not isinstance(key.curve, ec.SECP384R1):
        raise _unsigned(f"expected a P-384 key, got {key.curve.name}")
    if len(signed.signature) != 2 * SCALAR_BYTES:
        raise _unsigned(f"expected {2 * SCALAR_BYTES} bytes, got {len(signed.signature)}")
    r, s = (int.from_bytes(part) for part in (signed.signature[:SCALAR_BYTES], signed.signature[SCALAR_BYTES:]))
    try:
        key.verify(encode_dss_signature(r, s), signed.signed_info, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as err:
        raise _unsigned("another key or other signed information") from err
    digest = hashlib.sha384(signed.content).digest()
    if digest != signed.digest:
        raise _unsigned(f"the document was changed: expected digest {signed.digest.hex():.96}, got {digest.hex()}")
    try:
        return etree.fromstring(signed.content, _parser())
    except etree.XMLSyntaxError as err:
        raise _malformed(f"expected XML that can be read back: {err}") from err
