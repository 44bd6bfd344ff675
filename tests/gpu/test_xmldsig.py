"""The one XML signature we read: against expat's canonical XML, against signxml, and against what bends signatures."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree

import vectors
from countermark.errors import CountermarkError, FormatError, GpuError
from countermark.gpu import xmldsig
from countermark.gpu.rim import RimDocument, parse_rim, verify_rim, verify_rim_signature
from countermark.gpu.xmldsig import Enveloped, parse_enveloped, verify_enveloped
from countermark.policy import NVIDIA_RIM_ROOT
from countermark_appliance.platform.sim.issue import YEAR_S, issue
from sim_evidence import NOW, machine
from xmldsig_made import C14N, DS, SIGNED_INFO, SWID, by_signxml, canonical, signed

GENUINE = (
    "1010_0200_882_96005E0001_PROD.swidtag",
    "1010_0200_882_96005E0001_test_no_gpu.swidtag",
    "1010_0205_862_96005E0002_PROD.swidtag",
    "Driver_RIM_test_no_gpu.swidtag",
    "NV_GPU_DRIVER_GH100_550.144.03.xml",
)
IN_2026 = 1_780_000_000  # the 550 driver RIM's signer is valid
VENDOR = machine().gpu_vendor
SIGNER, CHAIN = VENDOR.rim_signer, (VENDOR.rim_signer.certificate, VENDOR.rim_root.certificate)
MADE = machine().endorsements.gpu_rims[0]


def genuine(name: str = GENUINE[-1]) -> bytes:
    return vectors.read(f"nvidia/rim/{name}")


def content(data: bytes) -> bytes:
    """What verified as signed, canonical."""
    document = parse_rim(data)
    verify_rim_signature(document)
    return document.signed.content


def code(data: bytes) -> str | None:
    """The code that a document is refused with, None when its signature verifies; nothing untyped comes out."""
    try:
        key = parse_rim(data).chain[0].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        verify_enveloped(parse_enveloped(data), key)
    except CountermarkError as err:
        assert isinstance(err, FormatError if err.code == "gpu.rim" else GpuError)
        return err.code
    return None


# Canonical XML and the verdict, compared with other people's code.


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_rims_are_what_expat_and_signxml_say(name: str) -> None:
    data = genuine(name)
    parsed = parse_enveloped(data)
    assert parsed.signed_info == canonical(data, apex="SignedInfo")
    assert parsed.content == canonical(data, without="Signature")
    assert content(data) == parsed.content == by_signxml(data, parse_rim(data).chain[0])


def test_the_simulated_vendors_are_too() -> None:
    for data in machine().endorsements.gpu_rims:
        assert content(data) == canonical(data, without="Signature") == by_signxml(data, SIGNER.certificate)


ROOT = f'<SoftwareIdentity xmlns="{SWID}"'
SPELLINGS = {  # before the signature, after it, and its prefix
    "plain": (ROOT + ">", "</SoftwareIdentity>", "ds:"),
    "no prefix": (ROOT + "><a/>", "</SoftwareIdentity>", ""),
    "no prefix, and other namespaces": (ROOT + ' xmlns:b="urn:b"><b:a/>', "</SoftwareIdentity>", ""),
    "no prefix below one": (f'<s:SoftwareIdentity xmlns:s="{SWID}">', "</s:SoftwareIdentity>", ""),
    "space around the signature": (ROOT + ">one\n<a/>two ", " \r\n <b/>three\n</SoftwareIdentity>", "ds:"),
    "space after it and no element before": (ROOT + ">one ", "\n\t</SoftwareIdentity>", "ds:"),
    "nothing but space": (ROOT + ">\n", "\n</SoftwareIdentity>", "ds:"),
    "a comment before it": (ROOT + "><!-- a -->x<!-- b -->", "\n<!-- c --></SoftwareIdentity><!-- d -->\n", "ds:"),
    "an unused namespace": (ROOT + ' xmlns:b="urn:b" xmlns:a="urn:a"><b:x/>', "</SoftwareIdentity>", "sig:"),
    "a namespace bound again": (ROOT + '><a xmlns="urn:x"><b xmlns=""/></a>', "</SoftwareIdentity>", "ds:"),
    "the prefix for something else": (f'{ROOT} xmlns:ds="urn:x"><ds:Signature/>', "</SoftwareIdentity>", "ds:"),
    "its namespace at the root": (f'{ROOT} xmlns:ds="{DS}" xmlns:other="{DS}">', "</SoftwareIdentity>", "ds:"),
    "attributes to be sorted": (
        ROOT + ' xmlns:z="urn:a" xmlns:a="urn:z"><x b="1" a:a="2" z:z="3" a="4"/>',
        "</SoftwareIdentity>",
        "ds:",
    ),
    "characters to be escaped": (
        ROOT + ' n="&quot;&lt;&amp;&#x9;&#xA;&#xD;\n&gt;\'">&lt;&gt;&amp;&#xD;\r\n"\'',
        "</SoftwareIdentity>",
        "ds:",
    ),
    "CDATA": (ROOT + "><![CDATA[<a>&]]>", "</SoftwareIdentity>", "ds:"),
    "xml: attributes below": (ROOT + '><a xml:lang="en"><b xml:space="preserve"/></a>', "</SoftwareIdentity>", "ds:"),
    "beyond ASCII": (ROOT + ' n="é𝄞">é𝄞', "</SoftwareIdentity>", "ds:"),
    "a declaration": ('<?xml version="1.0" encoding="ISO-8859-1"?>\n' + ROOT + ">", "</SoftwareIdentity>\n", "ds:"),
}


@pytest.mark.parametrize(("before", "after", "prefix"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_has_the_canonical_form_of_expat(before: str, after: str, prefix: str) -> None:
    data = signed(before, after, SIGNER.key, CHAIN, prefix=prefix)
    assert code(data) is None
    found = parse_enveloped(data).content
    assert found == canonical(data, without="Signature")
    if prefix:  # signxml takes lxml's canonical form of a part for canonical: it is not, without a prefix
        assert found == by_signxml(data, SIGNER.certificate)


def flips(data: bytes, step: int) -> list[bytes]:
    found = []
    for bit in range(0, 8 * len(data), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        found.append(bytes(changed))
    return found


def judged_alike(data: bytes) -> str | None:
    """Our code for `data`. Whatever we accept, signxml accepts as the same content."""
    got = code(data)
    if got is None:
        document = parse_rim(data)
        assert by_signxml(data, document.chain[0]) == document.signed.content
    return got


def test_bit_flips_of_a_genuine_rim_are_refused() -> None:
    """A sample; all bits are in `test_every_bit_flip`."""
    data, good = genuine(), parse_enveloped(genuine()).content
    start = data.index(b"<ds:Signature")
    sample = flips(data, 577) + [data[:start] + item for item in flips(data[start:], 61)]
    assert len(sample) > 700
    for changed in sample:
        _refused_or_the_same(changed, good)


@pytest.mark.slow
@pytest.mark.parametrize("data", [genuine, lambda: MADE], ids=["genuine", "made"])
def test_every_bit_flip(data: Callable[[], bytes]) -> None:
    good = parse_enveloped(data()).content
    for changed in flips(data(), 1):
        _refused_or_the_same(changed, good)


def _refused_or_the_same(changed: bytes, good: bytes) -> None:
    if judged_alike(changed) is None:  # a bit of a certificate above the signer's, or of white space
        assert parse_enveloped(changed).content == good
        with pytest.raises(CountermarkError):
            verify_rim(parse_rim(changed), root=NVIDIA_RIM_ROOT, now=IN_2026)


# What a signature could be bent into. Each is refused, and with which code.


def edit(old: str, new: str, count: int = 1) -> bytes:
    text = MADE.decode()
    assert old in text, old
    return text.replace(old, new, count).encode()


def inside(name: str, change: Callable[[str], str]) -> bytes:
    """The text of the first such element of the signature, changed."""
    pattern = re.compile(rf"(<ds:{name}>)([^<]*)(</ds:{name}>)")
    assert pattern.search(MADE.decode())
    return pattern.sub(lambda found: found[1] + change(found[2]) + found[3], MADE.decode(), count=1).encode()


def split(text: str, by: str) -> str:
    return text[:20] + by + text[20:]


def evil(inner: str, signature: str = "") -> str:
    """A document of ours with all values zero, and something in it."""
    text = re.sub(r"<ds:Signature .*</ds:Signature>", lambda _: signature, MADE.decode(), flags=re.DOTALL)
    text = re.sub(r'Hash0="[0-9a-f]+"', f'Hash0="{"00" * 48}"', text)
    return text.replace("</swid:SoftwareIdentity>", inner + "</swid:SoftwareIdentity>")


SIGNATURE = re.search(r"<ds:Signature .*</ds:Signature>", MADE.decode(), re.DOTALL)[0]  # type: ignore[index]
WITHOUT = MADE.decode().replace(SIGNATURE, "")
TRANSFORM = f'<ds:Transform Algorithm="{C14N}"/>'
ENVELOPED = f'<ds:Transform Algorithm="{DS}enveloped-signature"/>'
REFERENCE = re.search(r"<ds:Reference .*</ds:Reference>", MADE.decode())[0]  # type: ignore[index]
MORE = "http://www.w3.org/2001/04/xmldsig-more#"
CERTIFICATE = "<ds:X509Certificate>"
NEW_PREFIX = 'xmlns:ds="urn:x"'


def moved(text: str) -> str:
    return SIGNATURE.replace("</ds:Signature>", f"{text}</ds:Signature>")


WRAPPED = {
    "the good document inside an evil one's signature": evil("", moved(f"<ds:Object>{WITHOUT}</ds:Object>")),
    "the signed document below an evil one": evil(MADE.decode()),
    "and its signature copied up": evil(MADE.decode() + SIGNATURE),
    "the signature deeper": evil(f"<swid:Entity>{SIGNATURE}</swid:Entity>"),
    "the signature as root": SIGNATURE,
    "the signature around the document": moved(f"<ds:Object>{WITHOUT}</ds:Object>"),
    "two, the good one first": MADE.decode().replace(SIGNATURE, 2 * SIGNATURE),
    "two, one of them empty": MADE.decode().replace(SIGNATURE, f'{SIGNATURE}<ds:Signature xmlns:ds="{DS}"/>'),
    "one inside the other": MADE.decode().replace("<ds:KeyInfo>", f"<ds:KeyInfo>{SIGNATURE}"),
    "none": WITHOUT,
    "of another namespace": MADE.decode().replace(f'xmlns:ds="{DS}"', 'xmlns:ds="http://www.w3.org/2000/09/xmldsig"'),
    "of none": MADE.decode().replace("<ds:Signature ", "<Signature ").replace("</ds:Signature>", "</Signature>"),
    "in capitals": MADE.decode().replace("ds:Signature ", "ds:SIGNATURE ").replace("/ds:Signature>", "/ds:SIGNATURE>"),
    "a prefix bound again inside": MADE.decode().replace("<ds:KeyInfo>", f"<ds:KeyInfo {NEW_PREFIX}>"),
}
REFERENCES = {
    "by id": edit('URI=""', 'URI="#x"'),
    "by pointer": edit('URI=""', 'URI="#xpointer(/)"'),
    "elsewhere": edit('URI=""', 'URI="https://example.invalid/"'),
    "to nothing": edit(' URI=""', ""),
    "with an id": edit('URI=""', 'URI="" Id="x"'),
    "with a type": edit('URI=""', 'URI="" Type="http://www.w3.org/2000/09/xmldsig#Object"'),
    "with a URI of another namespace": edit('URI=""', 'xmlns:x="urn:x" x:URI="" URI=""'),
    "two": edit(REFERENCE, REFERENCE + REFERENCE),
    "none": edit(REFERENCE, ""),
    "to a manifest": edit(REFERENCE, f"<ds:Manifest>{REFERENCE}</ds:Manifest>"),
}
TRANSFORMS = {
    "in another order": edit(ENVELOPED + TRANSFORM, TRANSFORM + ENVELOPED),
    "not enveloped": edit(ENVELOPED, ""),
    "enveloped twice": edit(ENVELOPED, ENVELOPED + ENVELOPED),
    "not canonical": edit(TRANSFORM, ""),
    "none": edit(ENVELOPED + TRANSFORM, ""),
    "no list": edit(f"<ds:Transforms>{ENVELOPED}{TRANSFORM}</ds:Transforms>", ""),
    "two lists": edit("<ds:DigestMethod", "<ds:Transforms/><ds:DigestMethod"),
    "one more": edit(TRANSFORM, TRANSFORM + '<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#base64"/>'),
    "a parameter": edit(
        TRANSFORM,
        TRANSFORM.replace(
            "/>",
            '><e:InclusiveNamespaces xmlns:e="http://www.w3.org/2001/10/xml-exc-c14n#" PrefixList=""/></ds:Transform>',
        ),
    ),
    "text in one": edit(TRANSFORM, TRANSFORM.replace("/>", ">x</ds:Transform>")),
} | {
    name: edit(TRANSFORM, f'<ds:Transform Algorithm="{uri}"/>')
    for name, uri in {
        "XSLT": "http://www.w3.org/TR/1999/REC-xslt-19991116",
        "XPath": "http://www.w3.org/TR/1999/REC-xpath-19991116",
        "XPath filter": "http://www.w3.org/2002/06/xmldsig-filter2",
        "canonical XML 1.0": "http://www.w3.org/TR/2001/REC-xml-c14n-20010315",
        "canonical XML with comments": C14N + "#WithComments",
        "exclusive": "http://www.w3.org/2001/10/xml-exc-c14n#",
        "decryption": "http://www.w3.org/2002/07/decrypt#XML",
    }.items()
}
ALGORITHMS = {
    f"{old.rpartition('#')[2]} to {new.rpartition('#')[2]}": edit(f'Algorithm="{old}"', f'Algorithm="{new}"')
    for old, new in (
        (f"{MORE}ecdsa-sha384", f"{MORE}ecdsa-sha256"),
        (f"{MORE}ecdsa-sha384", f"{MORE}ecdsa-sha512"),
        (f"{MORE}ecdsa-sha384", f"{MORE}hmac-sha384"),
        (f"{MORE}ecdsa-sha384", f"{MORE}rsa-sha384"),
        (f"{MORE}ecdsa-sha384", f"{MORE}ECDSA-SHA384"),
        (f"{MORE}ecdsa-sha384", f" {MORE}ecdsa-sha384"),
        (f"{MORE}sha384", "http://www.w3.org/2001/04/xmlenc#sha256"),
        (f"{MORE}sha384", "http://www.w3.org/2000/09/xmldsig#sha1"),
        (C14N, "http://www.w3.org/TR/2001/REC-xml-c14n-20010315"),
        (C14N, "http://www.w3.org/2001/10/xml-exc-c14n#"),
    )
} | {
    "a length of the HMAC": edit(
        f'<ds:SignatureMethod Algorithm="{MORE}ecdsa-sha384"/>',
        f'<ds:SignatureMethod Algorithm="{MORE}hmac-sha384">'
        "<ds:HMACOutputLength>1</ds:HMACOutputLength></ds:SignatureMethod>",
    ),
    "one attribute more": edit(f'Algorithm="{MORE}sha384"', f'Algorithm="{MORE}sha384" x=""'),
    "one attribute twice": edit(f'Algorithm="{MORE}sha384"', f'Algorithm="{MORE}sha384" Algorithm="{MORE}sha384"'),
    "two digest methods": edit("<ds:DigestValue>", f'<ds:DigestMethod Algorithm="{MORE}sha384"/><ds:DigestValue>'),
    "two digests": edit("<ds:DigestValue>", "<ds:DigestValue>AAAA</ds:DigestValue><ds:DigestValue>"),
    "two signature values": edit(
        "<ds:SignatureValue>", "<ds:SignatureValue>AAAA</ds:SignatureValue><ds:SignatureValue>"
    ),
    "two SignedInfos": edit("<ds:SignedInfo>", "<ds:SignedInfo/><ds:SignedInfo>"),
}
KEYS = {
    "none": edit("<ds:KeyInfo>", "<ds:KeyInfo/><ds:KeyInfo>"),
    "a value": edit("<ds:KeyInfo>", "<ds:KeyInfo><ds:KeyValue/>"),
    "a name": edit("</ds:KeyInfo>", "<ds:KeyName>x</ds:KeyName></ds:KeyInfo>"),
    "a retrieval": edit("<ds:KeyInfo>", '<ds:KeyInfo><ds:RetrievalMethod URI="https://example.invalid/"/>'),
    "two X509Data": edit("<ds:KeyInfo>", "<ds:KeyInfo><ds:X509Data/>"),
    "an issuer and serial number": edit("<ds:X509Data>", "<ds:X509Data><ds:X509IssuerSerial/>"),
    "a CRL": edit("</ds:X509Data>", "<ds:X509CRL>AAAA</ds:X509CRL></ds:X509Data>"),
    "two infos": edit("</ds:KeyInfo>", "</ds:KeyInfo><ds:KeyInfo/>"),
    "an object": edit("</ds:Signature>", "<ds:Object/></ds:Signature>"),
    "no certificate": re.sub(rb"(<ds:X509Data>).*(</ds:X509Data>)", rb"\1\2", MADE, flags=re.DOTALL),
    "an empty certificate": edit(CERTIFICATE, f"{CERTIFICATE}</ds:X509Certificate>{CERTIFICATE}"),
    "nine certificates": edit(CERTIFICATE, 8 * f"{CERTIFICATE}AAAA</ds:X509Certificate>" + CERTIFICATE),
}
VALUES = {
    f"{name}: {what}": inside(name, change)
    for name in ("DigestValue", "SignatureValue", "X509Certificate")
    for what, change in {
        "split by a comment": lambda text: split(text, "<!-- -->"),
        "cut by a comment": lambda text: text + "<!-- -->AAAA",
        "split by an instruction": lambda text: split(text, "<?x?>"),
        "split by an element": lambda text: split(text, "<ds:x/>"),
        "split by an entity": lambda text: split(text, "&x;"),
        "with other characters": lambda text: split(text, "!"),
        "with a space that XML has none of": lambda text: split(text, "\u00a0"),
        "in the other alphabet": lambda text: "-_" + text[2:],
        "cut short": lambda text: text[:-1],
        "padded more": lambda text: text + "=",
        "other bits in the padding": lambda text: text[:-4] + "AB==",
    }.items()
} | {
    "an attribute of a value": edit("<ds:DigestValue>", '<ds:DigestValue Encoding="x">'),
    "an id of the signature": edit("<ds:Signature ", '<ds:Signature Id="x" '),
    "an id of SignedInfo": edit("<ds:SignedInfo>", '<ds:SignedInfo Id="x">'),
    "text in the signature": edit("<ds:SignatureValue>", "x<ds:SignatureValue>"),
    "text before it all": edit("<ds:SignedInfo>", "x<ds:SignedInfo>"),
    "text after the signature": edit("</ds:Signature>", "</ds:Signature>x"),
    "text in KeyInfo": edit("</ds:KeyInfo>", "x</ds:KeyInfo>"),
    "a comment in the signature": edit("<ds:SignatureValue>", "<!-- --><ds:SignatureValue>"),
    "a comment in KeyInfo": edit("<ds:X509Data>", "<!-- --><ds:X509Data>"),
}
DOCTYPE = "<!DOCTYPE swid:SoftwareIdentity"
TYPES = {
    "an empty one": f"{DOCTYPE}>" + MADE.decode(),
    "an entity for a value": f'{DOCTYPE} [<!ENTITY x "AAAA">]>' + inside("DigestValue", lambda _: "&x;").decode(),
    "an attribute by default": f'{DOCTYPE} [<!ATTLIST swid:Meta x CDATA "y">]>' + MADE.decode(),
    "an algorithm by default": f'{DOCTYPE} [<!ATTLIST ds:Transform Algorithm CDATA "{C14N}">]>' + MADE.decode(),
    "an id by default": f"{DOCTYPE} [<!ATTLIST swid:Meta name ID #IMPLIED>]>" + MADE.decode(),
    "a parameter entity": f'{DOCTYPE} [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]>' + MADE.decode(),
    "an external one": f'{DOCTYPE} SYSTEM "file:///etc/passwd">' + MADE.decode(),
    "after a comment": f"<!-- -->{DOCTYPE}>" + MADE.decode(),
    "after a space": "\n" + f"{DOCTYPE}>" + MADE.decode(),
    "in small letters": f"{DOCTYPE.lower()}>" + MADE.decode(),
    "an instruction before": "<?xml-stylesheet href='x'?>" + MADE.decode(),
    "an instruction after": MADE.decode() + "<?x?>",
    "an instruction inside": edit("<swid:Meta", "<?x?><swid:Meta").decode(),
    "an undefined entity": edit("<swid:Meta", "&x;<swid:Meta").decode(),
    "two documents": 2 * MADE.decode(),
    "text after": MADE.decode() + "x",
    "a zero": MADE.decode() + "\0",
}
INHERITED = {
    f"xml:{name}": edit("<swid:SoftwareIdentity", f'<swid:SoftwareIdentity xml:{name}="{value}"')
    for name, value in {"id": "x", "base": "urn:x", "lang": "en", "space": "preserve"}.items()
} | {"xml:id of the signature": edit("<ds:Signature ", '<ds:Signature xml:id="x" ')}
LIMITS = {
    "a namespace without a scheme": edit("<swid:Meta", '<swid:Meta xmlns:x="x"'),
    "a prefix without a namespace": edit("<swid:Meta", "<x:y/><swid:Meta"),
    "33 namespaces": edit("<swid:Meta", "<swid:Meta" + "".join(f' xmlns:x{i}="urn:x"' for i in range(33))),
    "129 attributes": edit("<swid:Meta", "<swid:Meta" + "".join(f' x{i}=""' for i in range(129))),
    "2049 tags": edit("<swid:Meta", 2049 * "<x/>" + "<swid:Meta"),
    "2049 comments": edit("<swid:Meta", 2049 * "<!---->" + "<swid:Meta"),
    "300 deep": edit("<swid:Meta", 300 * "<x>" + 300 * "</x>" + "<swid:Meta"),
}
FORMS = {
    f"{group}: {name}": value if isinstance(value, bytes) else value.encode()
    for group, table in {
        "wrapped": WRAPPED,
        "reference": REFERENCES,
        "transforms": TRANSFORMS,
        "algorithms": ALGORITHMS,
        "key": KEYS,
        "value": VALUES,
        "type": TYPES,
        "inherited": INHERITED,
        "limit": LIMITS,
    }.items()
    for name, value in table.items()
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_another_form_is_refused_whoever_signed_it(data: bytes) -> None:
    with pytest.raises(FormatError) as err:
        parse_rim(data)
    assert err.value.code == "gpu.rim"


ATTRIBUTES = "".join(f' x{i:05}=""' for i in range(25_000))
SPACES = "".join(f' xmlns:x{i}="urn:x{i}"' for i in range(500))


@pytest.mark.parametrize(
    "data",
    [
        edit("<swid:Meta", "<swid:Meta" + ATTRIBUTES),
        edit("<swid:SoftwareIdentity", "<swid:SoftwareIdentity" + SPACES).replace(b"<swid:Meta", 45_000 * b"<x/>", 1),
        edit("<swid:Meta", "<swid:Meta" + "".join(f' xmlns:x{i}="urn:x{i}"' for i in range(25))).replace(
            b"<swid:Payload", 1900 * b"<x/>" + b"<swid:Payload", 1
        ),
    ],
    ids=["many attributes", "many namespaces and elements", "as many as allowed"],
)
def test_no_document_takes_canonical_xml_long(data: bytes) -> None:
    """A genuine signature in it would get any of them as far as canonical XML: minutes for the second."""
    start = time.process_time()
    assert code(data) in ("gpu.rim", "gpu.rim_signature")
    assert time.process_time() - start < 1


# Of the form, but not signed by the key that it names.


def resigned(key: ec.EllipticCurvePrivateKey, chain: tuple[x509.Certificate, ...], **changes: object) -> bytes:
    before, _, after = MADE.decode().partition(SIGNATURE)
    return signed(before, after, key, chain, **changes)  # type: ignore[arg-type]


def raw(change: Callable[[bytes], bytes]) -> bytes:
    return inside("SignatureValue", lambda text: base64.b64encode(change(base64.b64decode(text))).decode())


STRANGER = issue("x", VENDOR.rim_root, not_before=NOW - 60, not_after=NOW + YEAR_S, curve=ec.SECP384R1(), ca=False)
ORDER_384 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
FORGED = {
    "wrapped: the good document after its signature": evil(SIGNATURE + WITHOUT).encode(),
    "wrapped: an evil document in the good one": edit("<swid:Meta", evil("") + "<swid:Meta"),
    "nobody's signature": raw(lambda value: bytes(96)),
    "r and s exchanged": raw(lambda value: value[48:] + value[:48]),
    "s out of range": raw(lambda value: value[:48] + b"\xff" * 48),
    "r plus the order": raw(
        lambda value: ((int.from_bytes(value[:48]) + ORDER_384) % (1 << 384)).to_bytes(48) + value[48:]
    ),
    "as DER": raw(lambda value: b"\x30\x64\x02\x30" + value[:48] + b"\x02\x30" + value[48:]),
    "one byte more": raw(lambda value: b"\0" + value),
    "one byte less": raw(lambda value: value[1:]),
    "empty": inside("SignatureValue", lambda _: ""),
    "no digest": inside("DigestValue", lambda _: ""),
    "another digest, signed": resigned(SIGNER.key, CHAIN, digest=bytes(48)),
    "half a digest, signed": resigned(SIGNER.key, CHAIN, digest=b""),
    "another key": resigned(STRANGER.key, CHAIN),
    "another certificate first": resigned(SIGNER.key, (STRANGER.certificate, *CHAIN)),
    "the root first": resigned(SIGNER.key, CHAIN[::-1]),
    "a namespace that SignedInfo inherits": edit("<ds:Signature ", '<ds:Signature xmlns:x="urn:x" '),
    "a namespace that everything inherits": edit("<swid:SoftwareIdentity ", '<swid:SoftwareIdentity xmlns:x="urn:x" '),
    "a prefix renamed": MADE.replace(b"<ds:", b"<dx:").replace(b"</ds:", b"</dx:").replace(b"xmlns:ds", b"xmlns:dx"),
    "the signature moved, with space": edit(SIGNATURE, "\n" + SIGNATURE),
    "space after it": edit(SIGNATURE, SIGNATURE + "\n"),
    "space in SignedInfo": edit("<ds:Reference", "\n<ds:Reference"),
    "an element more": edit("<swid:Meta", "<swid:x/><swid:Meta"),
    "an attribute of another namespace": edit("<swid:Meta ", '<swid:Meta swid:colloquialVersion="1" '),
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED)
def test_what_the_named_key_did_not_sign_is_refused(data: bytes) -> None:
    document = parse_rim(data)
    with pytest.raises(GpuError) as err:
        verify_rim_signature(document)
    assert (err.value.code, err.value.step) == ("gpu.rim_signature", "8")
    assert by_signxml(data, document.chain[0]) is None


def test_a_key_on_another_curve_is_refused() -> None:
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        other = issue("x", VENDOR.rim_root, not_before=NOW - 60, not_after=NOW + YEAR_S, curve=curve, ca=False)
        assert code(resigned(other.key, (other.certificate, *CHAIN))) == "gpu.rim_signature"


def test_whose_key_it_is_the_chain_says() -> None:
    """A stranger's document under a certificate of its own verifies as signed, and is refused for its root."""
    key = ec.generate_private_key(ec.SECP384R1())
    own = issue("own", None, not_before=NOW - 60, not_after=NOW + YEAR_S, curve=ec.SECP384R1(), ca=True)
    assert key.curve.name == own.key.curve.name
    data = resigned(own.key, (own.certificate,))
    assert code(data) is None
    with pytest.raises(GpuError) as err:
        verify_rim(parse_rim(data), root=NVIDIA_RIM_ROOT, now=NOW)
    assert err.value.code == "gpu.rim_root"


# What is one document in another spelling: accepted, and read as what was signed.

SAME = {
    "space in a certificate": inside("X509Certificate", lambda text: f"\n {text[:64]}\r\n\t{text[64:]}\n"),
    "space in the signature's value": inside("SignatureValue", lambda text: "\n".join(re.findall(".{1,64}", text))),
    "space between what is not signed": edit("<ds:KeyInfo>", "\n  <ds:KeyInfo>\n\t").replace(
        b"</ds:Signature>", b"\n</ds:Signature>"
    ),
    "a namespace for what is not signed": edit("<ds:KeyInfo>", '<ds:KeyInfo xmlns:x="urn:x">'),
    "a value as CDATA": inside("DigestValue", lambda text: f"<![CDATA[{text}]]>"),
    "a value by its number": inside("SignatureValue", lambda text: f"&#{ord(text[0])};{text[1:]}"),
    "an algorithm by its numbers": edit(f'Algorithm="{MORE}ecdsa', f'Algorithm="&#104;{MORE[1:]}ecdsa'),
    "attributes in another order": edit('corpus="false" name="GH100"', 'name="GH100" corpus="false"'),
    "other quotes": edit('corpus="false"', "corpus = 'false'"),
    "a comment": edit("<swid:Meta", "<!-- x --><swid:Meta"),
    "comments around": b"<!-- a -->" + MADE + b"\n<!-- b -->\n",
    "a declaration": b'<?xml version="1.0" encoding="UTF-16" standalone="no"?>\n' + MADE,
    "a byte order mark": b"\xef\xbb\xbf" + MADE,
    "other line ends": MADE.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("data", SAME.values(), ids=SAME)
def test_another_spelling_of_the_same_document_is_the_same(data: bytes) -> None:
    assert content(data) == content(MADE)
    assert verify_rim_signature(parse_rim(data)) == verify_rim_signature(parse_rim(MADE))


def test_signxml_is_no_stricter_anywhere() -> None:
    """Whatever is accepted above, signxml accepts as the same content; what it takes besides is refused by form."""
    for name, data in SAME.items():
        if name != "a declaration":  # signxml believes it
            assert by_signxml(data, SIGNER.certificate) == content(MADE), name
    looser = [name for name, data in FORMS.items() if by_signxml(data, SIGNER.certificate) is not None]
    assert "value: SignatureValue: with other characters" in looser
    assert "key: a retrieval" in looser


def test_only_the_signed_bytes_are_read() -> None:
    """`verify_enveloped` reads back what it hashed: with other content under a good signature there is nothing."""
    good = parse_enveloped(MADE)
    values = {name: getattr(good, name) for name in Enveloped.__slots__}
    forged = Enveloped(**values | {"content": good.content.replace(b'active="True"', b'active="False"', 1)})
    with pytest.raises(GpuError) as err:
        verify_rim_signature(RimDocument(signed=forged, chain=CHAIN))
    assert err.value.code == "gpu.rim_signature"
    tree = verify_enveloped(good, SIGNER.key.public_key())
    assert xmldsig.canonical(tree) == good.content
    assert tree.find(f"{{{DS}}}Signature") is None
    assert not list(tree.iter(etree.Comment))


def test_certificates_are_the_documents() -> None:
    assert parse_enveloped(MADE).certificates == tuple(item.public_bytes(Encoding.DER) for item in CHAIN)
    assert SIGNED_INFO.format(p="ds:", digest="x").count("Algorithm") == 5
