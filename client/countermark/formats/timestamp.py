"""RFC 3161 time stamps: the request, the response, and the token as signed data (RFC 5652), read strictly.

A token is a ContentInfo of SignedData (RFC 5652 sections 3 and 5) over one TSTInfo (RFC 3161 2.4.2) with one
SignerInfo, whose signed attributes name content type, digest and signing certificate (RFC 2634 5.4; RFC 5035). DER with
definite lengths. The sets of certificates need not be sorted: OpenSSL's are not, and no rule is won by it. SHA-2 only,
but for the digest in RFC 2634's attribute, which is SHA-1 by definition. Unsigned attributes and CRLs are passed over.

Not checked here: signatures, certificates, and whether the digests are right (`countermark.anchors`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from countermark.errors import FormatError
from countermark.formats import der
from countermark.formats.der import Element, parse_elements, parse_sequence

GRANTED: Final = (0, 1)  # granted, grantedWithMods
HASHES: Final = {  # OBJECT IDENTIFIER content -> name, as hashlib has it
    bytes.fromhex("608648016503040201"): "sha256",
    bytes.fromhex("608648016503040202"): "sha384",
    bytes.fromhex("608648016503040203"): "sha512",
}
_SHA256: Final = next(iter(HASHES))
_SIGNED_DATA: Final = bytes.fromhex("2a864886f70d010702")  # 1.2.840.113549.1.7.2
_TST_INFO: Final = bytes.fromhex("2a864886f70d0109100104")  # 1.2.840.113549.1.9.16.1.4
_CONTENT_TYPE: Final = bytes.fromhex("2a864886f70d010903")
_MESSAGE_DIGEST: Final = bytes.fromhex("2a864886f70d010904")
_SIGNING_CERTIFICATE: Final = bytes.fromhex("2a864886f70d010910020c")
_SIGNING_CERTIFICATE_V2: Final = bytes.fromhex("2a864886f70d010910022f")
_BOOLEAN, _SET, _GENERALIZED_TIME = 0x01, 0x31, 0x18
_TAGGED_0, _TAGGED_1 = 0xA0, 0xA1
_TIME: Final = re.compile(rb"(\d{14})(\.\d{0,8}[1-9])?Z")
MAX_NONCE_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeInfo:
    """A TSTInfo. `time`: genTime, unix seconds, fractions cut off. `policy`: dotted. `hash`: of the imprint."""

    policy: str
    hash: str
    imprint: bytes
    serial: int
    time: int
    nonce: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A parsed token: `signature` is over `signed`, which holds `digest`, the `digest_hash` of `content`.

    `signature_algorithm`: the object identifier, dotted. `certificates`: DER, as many as came. `signer`: hash and
    digest of the signing certificate; `signer_serial` its serial number.
    """

    info: TimeInfo
    content: bytes
    certificates: tuple[bytes, ...]
    digest_hash: str
    digest: bytes
    signed: bytes
    signature_algorithm: str
    signature: bytes
    signer: tuple[str, bytes]
    signer_serial: int


def encode_request(digest: bytes, nonce: int) -> bytes:
    """A TimeStampReq for a SHA-256 digest that asks for the authority's certificates. `nonce`: positive."""
    algorithm = _tlv(der.SEQUENCE, _tlv(der.OID, _SHA256) + b"\x05\x00")
    imprint = _tlv(der.SEQUENCE, algorithm + _tlv(der.OCTET_STRING, digest))
    number = _tlv(der.INTEGER, nonce.to_bytes(nonce.bit_length() // 8 + 1, "big"))
    return _tlv(der.SEQUENCE, _tlv(der.INTEGER, b"\x01") + imprint + number + _tlv(_BOOLEAN, b"\xff"))


def parse_response(data: bytes) -> tuple[int, bytes | None]:
    """The status of a TimeStampResp, and the token unless it was refused. Raises `FormatError`."""
    items = parse_sequence(data)
    if not 1 <= len(items) <= 2 or items[0].tag != der.SEQUENCE:
        raise _refuse("a TimeStampResp")
    status = parse_elements(items[0].value)
    if not status or status[0].tag != der.INTEGER:
        raise _refuse("a PKIStatusInfo")
    return _integer(status[0]), items[1].encoded if len(items) == 2 else None


def parse_token(data: bytes) -> Token:
    """Parse a TimeStampToken that fills `data`. Raises `FormatError`: `der.form`, `anchor.token`."""
    outer = _shape(parse_sequence(data), "ContentInfo", der.OID, _TAGGED_0)
    signed_data = _only(outer[1], der.SEQUENCE, "SignedData")
    if outer[0].value != _SIGNED_DATA:
        raise _refuse("SignedData")
    items = list(parse_elements(signed_data.value))
    optional = {item.tag: item for item in items[3:-1]}
    if len(items) < 4 or len(optional) != len(items) - 4 or not optional.keys() <= {_TAGGED_0, _TAGGED_1}:
        raise _refuse("SignedData with at most certificates and CRLs beside its fields")
    _, _, encapsulated, signers = _shape((*items[:3], items[-1]), "SignedData", der.INTEGER, _SET, der.SEQUENCE, _SET)
    kind, wrapped = _shape(parse_elements(encapsulated.value), "EncapsulatedContentInfo", der.OID, _TAGGED_0)
    content = _only(wrapped, der.OCTET_STRING, "eContent").value
    if kind.value != _TST_INFO:
        raise _refuse("a TSTInfo as the content")
    certificates = parse_elements(optional[_TAGGED_0].value) if _TAGGED_0 in optional else ()
    return _signer(
        _only(signers, der.SEQUENCE, "one SignerInfo"),
        info=_info(content),
        content=content,
        certificates=tuple(item.encoded for item in certificates if item.tag == der.SEQUENCE),
    )


def _signer(info_of: Element, *, info: TimeInfo, content: bytes, certificates: tuple[bytes, ...]) -> Token:
    items = parse_elements(info_of.value)
    if len(items) == 7 and items[6].tag == _TAGGED_1:  # unsigned attributes
        items = items[:6]
    tags = (der.INTEGER, der.SEQUENCE, der.SEQUENCE, _TAGGED_0, der.SEQUENCE, der.OCTET_STRING)
    _, identifier, digest, attributes, algorithm, signature = _shape(items, "SignerInfo by issuer and serial", *tags)
    _, serial = _shape(parse_elements(identifier.value), "IssuerAndSerialNumber", der.SEQUENCE, der.INTEGER)
    found = _attributes(attributes)
    if _only(found[_CONTENT_TYPE], der.OID, "content type").value != _TST_INFO:
        raise _refuse("a TSTInfo as the signed content type")
    return Token(
        info=info,
        content=content,
        certificates=certificates,
        digest_hash=_hash(digest),
        digest=_only(found[_MESSAGE_DIGEST], der.OCTET_STRING, "message digest").value,
        signed=bytes([_SET]) + attributes.encoded[1:],  # RFC 5652 5.4: signed as the SET OF that it is
        signature_algorithm=_dotted(_algorithm(algorithm)),
        signature=signature.value,
        signer=_signing_certificate(found),
        signer_serial=_integer(serial),
    )


def _attributes(element: Element) -> dict[bytes, Element]:
    """Object identifier -> the SET of values of each signed attribute."""
    found: dict[bytes, Element] = {}
    for item in parse_elements(element.value):
        name, values = _shape(parse_elements(item.value), "Attribute", der.OID, _SET)
        if name.value in found:
            raise _refuse("each signed attribute once")
        found[name.value] = values
    if not found.keys() >= {_CONTENT_TYPE, _MESSAGE_DIGEST}:
        raise _refuse("content type and message digest among the signed attributes")
    return found


def _signing_certificate(found: dict[bytes, Element]) -> tuple[str, bytes]:
    """Hash and digest of the first ESSCertIDv2, or ESSCertID: the certificate that the signer means."""
    if _SIGNING_CERTIFICATE_V2 in found:
        identifier, name = _first_certificate_id(found[_SIGNING_CERTIFICATE_V2]), "sha256"
        if identifier and identifier[0].tag == der.SEQUENCE:
            identifier, name = identifier[1:], _hash(identifier[0])
    elif _SIGNING_CERTIFICATE in found:
        identifier, name = _first_certificate_id(found[_SIGNING_CERTIFICATE]), "sha1"
    else:
        raise _refuse("the signing certificate among the signed attributes")
    if not identifier or identifier[0].tag != der.OCTET_STRING:
        raise _refuse("the digest of the signing certificate")
    return name, identifier[0].value


def _first_certificate_id(values: Element) -> tuple[Element, ...]:
    outer = parse_elements(_only(values, der.SEQUENCE, "SigningCertificate").value)
    if not outer or outer[0].tag != der.SEQUENCE:
        raise _refuse("certificate identifiers")
    identifiers = parse_elements(outer[0].value)
    if not identifiers or identifiers[0].tag != der.SEQUENCE:
        raise _refuse("a certificate identifier")
    return parse_elements(identifiers[0].value)


def _info(content: bytes) -> TimeInfo:
    items = parse_sequence(content)
    tags = (der.INTEGER, der.OID, der.SEQUENCE, der.INTEGER, _GENERALIZED_TIME)
    version, policy, imprint, serial, time = _shape(items[:5], "TSTInfo", *tags)
    if _integer(version) != 1:
        raise _refuse("a TSTInfo of version 1")
    algorithm, digest = _shape(parse_elements(imprint.value), "MessageImprint", der.SEQUENCE, der.OCTET_STRING)
    nonce: int | None = None
    order = (der.SEQUENCE, _BOOLEAN, der.INTEGER, _TAGGED_0, _TAGGED_1)  # accuracy, ordering, nonce, tsa, extensions
    at = 0
    for item in items[5:]:
        if item.tag not in order[at:]:
            raise _refuse("the fields of a TSTInfo in their order")
        at = order.index(item.tag) + 1
        if item.tag == der.INTEGER:
            nonce = _integer(item)
        if item.tag == _TAGGED_1:
            _refuse_critical(item)
    return TimeInfo(
        policy=_dotted(policy.value),
        hash=_hash(algorithm),
        imprint=digest.value,
        serial=_integer(serial),
        time=_unix(time.value),
        nonce=nonce,
    )


def _refuse_critical(extensions: Element) -> None:
    for item in parse_elements(extensions.value):
        parts = parse_elements(item.value)
        if len(parts) > 1 and parts[1].tag == _BOOLEAN and parts[1].value != b"\x00":
            raise _refuse("no critical extension")


def _unix(value: bytes) -> int:
    match = _TIME.fullmatch(value)
    try:
        if match is None:
            raise ValueError(value)
        moment = datetime.strptime(match[1].decode(), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError as err:
        raise _refuse("a genTime in UTC, such as 20260131120000Z") from err
    return int(moment.timestamp())


def _algorithm(element: Element) -> bytes:
    parts = parse_elements(element.value)
    if not 1 <= len(parts) <= 2 or parts[0].tag != der.OID:
        raise _refuse("an AlgorithmIdentifier")
    return parts[0].value


def _hash(element: Element) -> str:
    name = HASHES.get(_algorithm(element))
    if name is None:
        raise _refuse("SHA-256, SHA-384 or SHA-512")
    return name


def _integer(element: Element) -> int:
    if not 1 <= len(element.value) <= MAX_NONCE_BYTES:
        raise _refuse(f"integers of at most {MAX_NONCE_BYTES} bytes")
    return int.from_bytes(element.value, "big", signed=True)


def _dotted(value: bytes) -> str:
    """An object identifier's content (X.690 8.19) as text."""
    arcs: list[int] = []
    number = 0
    for byte in value:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(number)
            number = 0
    if not arcs or number or len(value) > 64 or value[-1] >= 0x80:
        raise _refuse("an object identifier")
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def _shape(items: tuple[Element, ...], what: str, *tags: int) -> tuple[Element, ...]:
    if tuple(item.tag for item in items) != tags:
        raise _refuse(what)
    return items


def _only(element: Element, tag: int, what: str) -> Element:
    return _shape(parse_elements(element.value), what, tag)[0]


def _tlv(tag: int, value: bytes) -> bytes:
    assert len(value) < 0x80  # requests are short
    return bytes([tag, len(value)]) + value


def _refuse(expected: str) -> FormatError:
    return FormatError(f"time stamp: expected {expected}", code="anchor.token")
