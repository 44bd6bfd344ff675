"""Reference integrity manifests (RIM): what NVIDIA says a driver or a VBIOS measures to, signed.

A RIM is a SWID tag (ISO/IEC 19770-2:2015, TCG RIM Information Model 1.01) with an enveloped XML signature of one form
(`gpu.xmldsig`), the signer's certificates in KeyInfo, root last. Values are read from the bytes that were signed, never
from the document around them.

`colloquialVersion` is the driver's version or, as five bytes in hex, the VBIOS's. Resource `index` i speaks of the
report's measurement block i + 1, and only where `active`; any of its `alternatives` will do. Index 35 (NVDEC0's) is not
compared when the report says that this unit is disabled (NVIDIA's own rule, NVIDIA/attestation-sdk).

The name under which NVIDIA publishes a RIM (`NV_GPU_VBIOS_<project>_<project SKU>_<chip SKU>_<version>`) is not in the
signed document, so RIMs of several boards may have one version: any one whose values all match is enough. Not checked
here: revocation of the signer (`gpu.revocation`), the RIM's tagId and product, and the GPU's own signature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from lxml import etree

from countermark import x509chain
from countermark.errors import FormatError, GpuError
from countermark.formats.spdm import STATUS_DISABLED, OpaqueType, Report
from countermark.gpu.xmldsig import MAX_BYTES, Enveloped, parse_enveloped, verify_enveloped

MAX_RIM_BYTES: Final = MAX_BYTES
MAX_ALTERNATIVES: Final = 64
_SWID: Final = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_RESOURCE: Final = f"{_SWID}Resource"
_HASH: Final = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"
_NVDEC0_INDEX: Final = 35
_VBIOS: Final = re.compile(r"[0-9A-Fa-f]{2}(\.[0-9A-Fa-f]{2}){4}")
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBERS: Final = {str(number): number for number in range(254)}  # as they are written, and no other way
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2}){1,128}")


class RimKind(StrEnum):
    """What a RIM speaks of."""

    DRIVER = "driver"
    VBIOS = "VBIOS"


@dataclass(frozen=True, slots=True, kw_only=True)
class RimDocument:
    """A RIM whose form is right; nothing verified, so nothing in it is read but its signer's certificates."""

    signed: Enveloped
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One active reference: its index and the values, of which any one will do."""

    index: int
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rim:
    """What the signed part of a RIM says."""

    kind: RimKind
    version: str
    product: str
    references: tuple[Reference, ...]  # by index


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A report against one RIM, by RIM index. `active` are the matched, the failed and the skipped (NVDEC0 off)."""

    kind: RimKind
    version: str
    matched: tuple[int, ...]
    failed: tuple[int, ...]
    skipped: tuple[int, ...]
    difference: str  # the first failed index, what was expected there and what was got; empty when none failed

    @property
    def active(self) -> tuple[int, ...]:
        """All indexes the RIM speaks of."""
        return tuple(sorted((*self.matched, *self.failed, *self.skipped)))

    def __str__(self) -> str:
        """One line for people."""
        skipped = f", {len(self.skipped)} not compared (NVDEC0 off)" if self.skipped else ""
        return f"{self.kind} {self.version}: {len(self.matched)} of {len(self.active)} measurements match{skipped}"

    def require_match(self) -> None:
        """Raises `GpuError` `gpu.measurement`, naming the first index that differs."""
        if self.failed:
            message = f"GPU measurements, {self.kind} {self.version}: {self.difference}"
            raise _refuse(f"{message}; {len(self.failed)} of {len(self.active)} differ", "measurement")


def _refuse(message: str, code: str) -> GpuError:
    return GpuError(message, code=f"gpu.{code}", step="8")


def _malformed(message: str) -> FormatError:
    return FormatError(f"RIM: {message}", code="gpu.rim")


def parse_rim(data: bytes) -> RimDocument:
    """The form of a RIM: XML without DTD or entities, one signature of the one kind. Raises `FormatError` `gpu.rim`."""
    signed = parse_enveloped(data)
    if signed.tag != f"{_SWID}SoftwareIdentity":
        raise _malformed(f"expected a SWID SoftwareIdentity, got {signed.tag:.100}")
    try:
        return RimDocument(signed=signed, chain=x509chain.parse_der_chain(signed.certificates, "gpu"))
    except FormatError as err:
        raise _malformed(f"X509Data: {err}") from err


def verify_rim(document: RimDocument, *, root: bytes, now: int) -> Rim:
    """The signer's chain, then the signature, then what was signed. Raises as the two functions below."""
    verify_rim_chain(document, root=root, now=now)
    return verify_rim_signature(document)


def verify_rim_chain(document: RimDocument, *, root: bytes, now: int) -> None:
    """The signer's certificates lead to the pinned RIM root, which has the SHA-256 `root`, and are valid at `now`.

    Raises `GpuError`: `gpu.rim_root`, `gpu.rim_chain`, `gpu.rim_not_yet_valid`, `gpu.rim_expired`.
    """
    try:
        x509chain.verify_chain(document.chain, root=root, now=now)
    except x509chain.ChainError as err:
        code = err.reason if err.reason in ("root", "not_yet_valid", "expired") else "chain"
        raise _refuse(f"RIM signer: {err}", f"rim_{code}") from err
    usage = [item.value for item in document.chain[0].extensions if isinstance(item.value, x509.KeyUsage)]
    if any(not value.digital_signature for value in usage):
        raise _refuse(f"{x509chain.name(document.chain[0])}: expected a key that may sign documents", "rim_chain")


@lru_cache(maxsize=64)  # a fact about the bytes, whatever the time: the same RIMs come with every connection
def verify_rim_signature(document: RimDocument) -> Rim:
    """What the holder of the first certificate's key signed; whether it may, and when, is `verify_rim_chain`'s to say.

    Raises `GpuError` `gpu.rim_signature`, or `FormatError` `gpu.rim` for signed content that is not a RIM.
    """
    signer = document.chain[0]
    key = signer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _refuse(f"{x509chain.name(signer)}: expected a P-384 key", "rim_signature")
    return _read(verify_enveloped(document.signed, key))


def _read(tag: etree._Element) -> Rim:
    for name in ("patch", "supplemental"):
        if tag.get(name, "false") != "false":
            raise _malformed(f"{name}: expected false, got {tag.get(name)!s:.20}")
    meta, payload = _only(tag, "Meta"), _only(tag, "Payload")
    version = meta.get("colloquialVersion", "")
    if not _VERSION.fullmatch(version):
        raise _malformed(f"colloquialVersion: expected a version, got {version!s:.100}")
    vbios = _VBIOS.fullmatch(version) is not None
    references = sorted(filter(None, map(_reference, payload)), key=lambda item: item.index)
    if not references:
        raise _malformed("expected at least one active measurement")
    if len({item.index for item in references}) != len(references):
        raise _malformed("expected each active index once")
    return Rim(
        kind=RimKind.VBIOS if vbios else RimKind.DRIVER,
        version=version.upper() if vbios else version,
        product=meta.get("product", ""),
        references=tuple(references),
    )


def _only(tag: etree._Element, name: str) -> etree._Element:
    found = tag.findall(_SWID + name)
    if len(found) != 1:
        raise _malformed(f"expected one {name}, got {len(found)}")
    return found[0]


def _reference(item: etree._Element) -> Reference | None:
    """One Resource, or None when it is not active."""
    # Something else to be measured must not be passed over in silence.
    if item.tag != _RESOURCE or item.get("type") != "Measurement":
        raise _malformed(f"expected measurements alone, got {item.tag!s:.100} of type {item.get('type')!s:.40}")
    active = item.get("active", "").lower()
    if active not in ("true", "false"):
        raise _malformed(f"active: expected True or False, got {active:.20}")
    index = _number(item, "index", 253)
    if active == "false":
        return None
    size, count = _number(item, "size", 64), _number(item, "alternatives", MAX_ALTERNATIVES)
    texts = {str(name): str(value) for name, value in item.items() if str(name).startswith(_HASH)}
    names = [f"{_HASH}{number}" for number in range(count)]
    if not names or set(texts) != set(names):
        raise _malformed(f"index {index}: expected {count} alternatives, got {len(texts)}")
    if any(not _HEX.fullmatch(texts[name]) or len(texts[name]) != 2 * size for name in names):
        raise _malformed(f"index {index}: expected values of {size} bytes in hex")
    return Reference(index=index, values=tuple(bytes.fromhex(texts[name]) for name in names))


def _number(item: etree._Element, name: str, most: int) -> int:
    text = item.get(name, "")
    number = _NUMBERS.get(text)
    if number is None or number > most:
        raise _malformed(f"{name}: expected 0 to {most}, got {text:.20}")
    return number


def compare(report: Report, rim: Rim) -> Comparison:
    """The report's measurements against the RIM's active references; versions are `speaks_of`'s."""
    blocks = {block.index - 1: block.value for block in report.measurements}
    off = report.find(OpaqueType.NVDEC0_STATUS) == bytes((STATUS_DISABLED,))
    matched: list[int] = []
    failed: list[int] = []
    skipped: list[int] = []
    difference = ""
    for reference in rim.references:
        got = blocks.get(reference.index)
        if got in reference.values:
            matched.append(reference.index)
        elif off and reference.index == _NVDEC0_INDEX:
            skipped.append(reference.index)
        else:
            wanted = " or ".join(value.hex() for value in reference.values)
            text = "no measurement" if got is None else got.hex()
            difference = difference or f"index {reference.index}: expected {wanted}, got {text}"
            failed.append(reference.index)
    return Comparison(
        kind=rim.kind,
        version=rim.version,
        matched=tuple(matched),
        failed=tuple(failed),
        skipped=tuple(skipped),
        difference=difference,
    )


def speaks_of(rim: Rim, report: Report) -> bool:
    """Whether the RIM is for this report's driver or VBIOS: the same version, exactly."""
    return rim.version == _version(report, rim.kind)


def _version(report: Report, kind: RimKind) -> str | None:
    return report.driver_version if kind is RimKind.DRIVER else report.vbios_version


def rim_name(report: Report, kind: RimKind, leaf: x509.Certificate) -> str:
    """The name under which NVIDIA publishes the RIM for this report of the GPU with this certificate.

    Blackwell's drivers are published by the chip that the report states, GB100 where it states none
    (NVIDIA/attestation-sdk); the name of Hopper's form is there, too, and another manifest's.
    """
    if kind is RimKind.DRIVER:
        version = report.driver_version or "?"
        if x509chain.common_name(leaf).startswith("GB"):
            return f"NV_GPU_CC_DRIVER_{report.text(OpaqueType.CHIP_INFO) or 'GB100'}_{version}"
        return f"NV_GPU_DRIVER_GH100_{version}"
    board = (OpaqueType.PROJECT, OpaqueType.PROJECT_SKU, OpaqueType.CHIP_SKU)
    texts = [report.text(item) or "?" for item in board]
    return "_".join(("NV_GPU_VBIOS", *texts, (report.vbios_version or "?").replace(".", ""))).upper()


def compare_all(report: Report, rims: Sequence[Rim]) -> tuple[Comparison, ...]:
    """The report against the given RIMs that speak of it, at most one for each kind: the best match.

    No index may be active in both. Raises `GpuError` `gpu.rim_conflict`.
    """
    chosen: dict[RimKind, tuple[Rim, Comparison]] = {}
    for rim in rims:
        if not speaks_of(rim, report):
            continue
        comparison = compare(report, rim)
        best = chosen.get(rim.kind)
        if best is None or len(comparison.failed) < len(best[1].failed):
            chosen[rim.kind] = (rim, comparison)
    indexes = [reference.index for rim, _ in chosen.values() for reference in rim.references]
    twice = sorted({index for index in indexes if indexes.count(index) > 1})
    if twice:
        raise _refuse(f"RIM index: expected in the driver's or the VBIOS's RIM, got {twice} in both", "rim_conflict")
    return tuple(chosen[kind][1] for kind in RimKind if kind in chosen)
