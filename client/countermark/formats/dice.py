"""The firmware a device key was derived for: the TCG DICE extension of a GPU's leaf certificate.

Two forms, told apart by their first element, under the two identifiers that NVIDIA's certificates use:
2.23.133.5.4.1 (Hopper) holds CompositeDeviceID of TCG's "Implicit Identity Based Device Attestation" 1.0 section 5.2,
SEQUENCE {INTEGER version, SubjectPublicKeyInfo deviceID, FWID}; 2.23.133.5.4.1.1 (Blackwell) holds DiceTcbInfo of TCG's
"DICE Attestation Architecture" 1.1 section 6.1.1, whose member [6] lists one FWID for each layer, the firmware that
signs reports first. FWID is SEQUENCE {hash algorithm, digest}. Seen in genuine H100 and GB100 certificates.

Not checked here: vendor, model, version, SVN and flags of DiceTcbInfo, which nobody publishes reference values for
(genuine GB100 ones say `notConfigured`), and the certificate around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark.formats.der import INTEGER, OCTET_STRING, OID, SEQUENCE, Element, parse_elements, parse_sequence

COMPOSITE_DEVICE_ID: Final = "2.23.133.5.4.1"
TCB_INFO: Final = "2.23.133.5.4.1.1"
FWID_BYTES: Final = 48
_SHA384: Final = bytes.fromhex("608648016503040202")  # 2.16.840.1.101.3.4.2.2
_FWIDS: Final = 0xA6  # [6] IMPLICIT SEQUENCE OF
_CONTEXT: Final = 0x80
_MAX_FWIDS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DiceIdentity:
    """`fwid`: SHA-384 of the firmware. `device_id`: the chip's SubjectPublicKeyInfo (DER), where it is stated."""

    fwid: bytes
    device_id: bytes | None


def parse_dice(data: bytes) -> DiceIdentity:
    """Parse the extension's value, either form. Raises `FormatError` `der.form` or `dice.form`."""
    members = parse_sequence(data)
    if members and members[0].tag == INTEGER:
        if [member.tag for member in members] != [INTEGER, SEQUENCE, SEQUENCE]:
            raise _refuse("CompositeDeviceID of version, key and FWID", members)
        return DiceIdentity(fwid=_fwid(members[2]), device_id=members[1].encoded)
    numbers = [member.tag & 0x1F for member in members]
    if any(member.tag & 0xC0 != _CONTEXT for member in members) or sorted(set(numbers)) != numbers:
        raise _refuse("DiceTcbInfo with its members in order, each once", members)
    lists = [member for member in members if member.tag == _FWIDS]
    fwids = parse_elements(lists[0].value) if lists else ()
    if not 1 <= len(fwids) <= _MAX_FWIDS:
        raise _refuse(f"DiceTcbInfo with 1 to {_MAX_FWIDS} firmware identifiers", fwids)
    for layer in fwids[1:]:  # of other layers, in any hash
        _hashed(layer)
    return DiceIdentity(fwid=_fwid(fwids[0]), device_id=None)


def _hashed(element: Element) -> tuple[bytes, bytes]:
    members = parse_elements(element.value)
    if element.tag != SEQUENCE or [member.tag for member in members] != [OID, OCTET_STRING]:
        raise _refuse("FWID of hash algorithm and digest", members)
    return members[0].value, members[1].value


def _fwid(element: Element) -> bytes:
    algorithm, digest = _hashed(element)
    if algorithm != _SHA384 or len(digest) != FWID_BYTES:
        message = f"dice.fwid: expected {FWID_BYTES} bytes of SHA-384, got {len(digest)} of OID {algorithm.hex()}"
        raise FormatError(message, code="dice.form")
    return digest


def _refuse(expected: str, got: tuple[Element, ...]) -> FormatError:
    tags = " ".join(f"{element.tag:02x}" for element in got)
    return FormatError(f"dice: expected {expected}, got tags {tags or 'none'}", code="dice.form")
