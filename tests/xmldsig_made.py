"""XML signatures made and judged without the code under test: by expat's canonical XML, and by signxml."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from xml.parsers import expat

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import SignXMLException
from signxml.verifier import SignatureConfiguration, XMLVerifier

DS = "http://www.w3.org/2000/09/xmldsig#"
SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
C14N = "http://www.w3.org/2006/12/xml-c14n11"


@dataclass(kw_only=True)
class _Canonical:
    """Inclusive canonical XML (W3C REC-xml-c14n11-20080502), without comments, of the document or of one element.

    `apex`: the name in the signature's namespace of the element it is of; `without`: of one left out with all it has.
    Attributes of the xml: namespace that an apex would inherit are not supported.
    """

    apex: str | None
    without: str | None
    out: list[str] = field(default_factory=list)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    shown: list[dict[str, str]] = field(default_factory=lambda: [{}])
    inside: int = 0  # elements open from the apex on
    left_out: int = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        scope = dict(self.scopes[-1])
        plain: list[tuple[str, str, str, str]] = []
        for key, value in attributes.items():
            if key == "xmlns" or key.startswith("xmlns:"):
                scope[key.partition(":")[2]] = value
        for key, value in attributes.items():
            if key != "xmlns" and not key.startswith("xmlns:"):
                prefix, colon, local = key.rpartition(":")
                plain.append((scope.get(prefix, prefix) if colon else "", local, key, value))
        self.scopes.append(scope)
        prefix, _, local = name.rpartition(":")
        ours = local if scope.get(prefix) == DS else None
        if self.left_out or (ours and ours == self.without):
            self.left_out += 1
        if self.inside or self.apex is None or ours == self.apex:
            self.inside += 1
        if not self.inside or self.left_out:
            return
        shown = self.shown[-1]
        spaces = {prefix: uri for prefix, uri in scope.items() if shown.get(prefix, "") != uri}
        self.shown.append(scope)
        text = "".join(
            f' xmlns{":" if prefix else ""}{prefix}="{_attribute(spaces[prefix])}"' for prefix in sorted(spaces)
        )
        text += "".join(f' {key}="{_attribute(value)}"' for _, _, key, value in sorted(plain))
        self.out.append(f"<{name}{text}>")

    def end(self, name: str) -> None:
        self.scopes.pop()
        if self.inside and not self.left_out:
            self.out.append(f"</{name}>")
            self.shown.pop()
        self.left_out -= self.left_out > 0
        self.inside -= self.inside > 0

    def text(self, data: str) -> None:
        if self.inside and not self.left_out:
            for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\r", "&#xD;")):
                data = data.replace(old, new)
            self.out.append(data)


def _attribute(value: str) -> str:
    table = (("&", "&amp;"), ("<", "&lt;"), ('"', "&quot;"), ("\t", "&#x9;"), ("\n", "&#xA;"), ("\r", "&#xD;"))
    for old, new in table:
        value = value.replace(old, new)
    return value


def canonical(data: bytes, *, apex: str | None = None, without: str | None = None) -> bytes:
    """Canonical XML by expat and the lines above."""
    found = _Canonical(apex=apex, without=without)
    parser = expat.ParserCreate()
    parser.StartElementHandler = found.start
    parser.EndElementHandler = found.end
    parser.CharacterDataHandler = found.text
    parser.Parse(data, True)
    return "".join(found.out).encode()


def by_signxml(data: bytes, signer: x509.Certificate) -> bytes | None:
    """What signxml says the signer signed, None when it refuses: configured as this project used it."""
    config = SignatureConfiguration(
        location="./",
        expect_references=1,
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
        verification_time=signer.not_valid_before_utc,
    )
    parser = etree.XMLParser(encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False)
    try:
        found = XMLVerifier().verify(data, x509_cert=signer, expect_config=config, parser=parser, validate_schema=False)
    except (SignXMLException, etree.LxmlError, ValueError, TypeError, AttributeError):
        return None
    assert not isinstance(found, list)
    return found.signed_data


SIGNED_INFO = (
    f'<{{p}}SignedInfo><{{p}}CanonicalizationMethod Algorithm="{C14N}"/>'
    '<{p}SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"/>'
    f'<{{p}}Reference URI=""><{{p}}Transforms><{{p}}Transform Algorithm="{DS}enveloped-signature"/>'
    f'<{{p}}Transform Algorithm="{C14N}"/></{{p}}Transforms>'
    '<{p}DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>'
    "<{p}DigestValue>{digest}</{p}DigestValue></{p}Reference></{p}SignedInfo>"
)


def signed(
    before: str,
    after: str,
    key: ec.EllipticCurvePrivateKey,
    chain: tuple[x509.Certificate, ...],
    *,
    prefix: str = "ds:",
    info: str = SIGNED_INFO,
    key_info: str | None = None,
    digest: bytes | None = None,
) -> bytes:
    """`before`, a signature over both, `after`: whatever `info` and `key_info` say, signed as canonical XML."""
    place = f'<{prefix}Signature xmlns{":" if prefix else ""}{prefix.rstrip(":")}="{DS}">'
    over = canonical(f"{before}{place}</{prefix}Signature>{after}".encode(), without="Signature")
    value = hashlib.sha384(over).digest() if digest is None else digest
    text = info.format(p=prefix, digest=base64.b64encode(value).decode())
    unsigned = f"{before}{place}{text}</{prefix}Signature>{after}"
    curve_bytes = (key.curve.key_size + 7) // 8
    r, s = decode_dss_signature(key.sign(canonical(unsigned.encode(), apex="SignedInfo"), ec.ECDSA(hashes.SHA384())))
    raw = base64.b64encode(r.to_bytes(curve_bytes) + s.to_bytes(curve_bytes)).decode()
    texts = [base64.b64encode(item.public_bytes(Encoding.DER)).decode() for item in chain]
    certificates = "".join(f"<{prefix}X509Certificate>{item}</{prefix}X509Certificate>" for item in texts)
    data = f"<{prefix}X509Data>{certificates}</{prefix}X509Data>"
    holder = f"<{prefix}KeyInfo>{data}</{prefix}KeyInfo>" if key_info is None else key_info.format(p=prefix, data=data)
    value_text = f"<{prefix}SignatureValue>{raw}</{prefix}SignatureValue>"
    return f"{before}{place}{text}{value_text}{holder}</{prefix}Signature>{after}".encode()
