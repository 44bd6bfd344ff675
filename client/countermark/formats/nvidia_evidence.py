"""GPU evidence as NVIDIA's tools serialise it: several GPUs in one JSON text, each with report and certificates.

Five shapes, as published in NVIDIA/attestation-sdk and NVIDIA/nvtrust and on docs.nvidia.com/attestation:

    [{version?: "1.0", arch, nonce?, evidence, certificate, driver_version?, vbios_version?}, ...]   SDK, both languages
    {evidences: [as above], ...}                                                       `nvattest collect-evidence`
    {nonce?, arch?, evidence_list: [{evidence, certificate, ...}], ...}                a request to the remote service
    {nonce?, arch?, evidence, certificate}                                             an older request, of one GPU
    {__cmwc_t: "tag:nvidia.com,2026:verifier-input/...", nonce?, NAME: ITEM, ...}      conceptual message wrapper (CMW)
    ITEM = {__cmwc_t: "tag:nvidia.com,2026:evidence-item/v1", evidence, certificate?, nonce?, ...}

In the first four `evidence` is the report and `certificate` the PEM chain, both in base64; `nonce` is hex. Requests of
NVIDIA's first verifiers (nvtrust, `build_payload`) had the report's hex text in the base64, and many tools still write
that. In a CMW each value is [media type, base64url]. Members that are not named here are vendors' own and ignored.

Not checked here: that `nonce`, versions and architecture are those of the report, which is what the GPU signed; items
that are no GPU (a switch) are refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from countermark.errors import FormatError
from countermark.formats import strict_json
from countermark.formats.evidence import MAX_GPUS
from countermark.formats.quote import parse_pem_chain
from countermark.formats.spdm import MAX_REPORT_BYTES

MAX_BYTES: Final = 4 * 1024 * 1024
ARCHITECTURES: Final = ("HOPPER", "BLACKWELL")
_WHAT: Final = "nvidia_evidence"
_VERSION: Final = "1.0"
_NONCE_BYTES: Final = 32
_MAX_CHAIN_BYTES: Final = 64 * 1024
_CMW: Final = "__cmwc_t"
_CMW_INPUT: Final = "tag:nvidia.com,2026:verifier-input/"
_CMW_ITEM: Final = "tag:nvidia.com,2026:evidence-item/v1"
_CMW_OTHERS: Final = (_CMW, "nonce", "appraisal-settings")
_REPORT_TYPE: Final = "application/vnd.nvidia.spdm-measurement-transcript"
_CHAIN_TYPE: Final = "application/vnd.nvidia.pem-cert-chain"
_NONCE_TYPE: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFile:
    """One GPU of a file. `nonce` is what the file says was asked; None when it does not say.

    `report`: binary or hex text, as the file has it. `arch`, `driver_version`, `vbios_version`: what the file says,
    empty when it does not; the report is what counts.
    """

    report: bytes
    chain: tuple[bytes, ...]  # DER, device first, root last
    nonce: bytes | None
    arch: str
    driver_version: str
    vbios_version: str


def parse_gpu_bundle(data: bytes) -> tuple[GpuFile, ...]:
    """The GPUs of one file, in its order. Raises `FormatError` with a code below `nvidia_evidence.`."""
    value = strict_json.load(data, _WHAT, max_bytes=MAX_BYTES)
    if isinstance(value, list):
        return _items(value, {})
    if not isinstance(value, dict):
        raise _refuse("form", "expected a list or an object")
    if _CMW in value:
        return _wrapped(value)
    if "evidences" in value:
        return _items(value["evidences"], {})
    if "evidence_list" in value:
        return _items(value["evidence_list"], {name: value[name] for name in ("nonce", "arch") if name in value})
    if "evidence" in value:
        return _items([value], {})
    raise _refuse("form", "expected evidence, evidences, evidence_list or a CMW")


def _refuse(code: str, message: str) -> FormatError:
    return FormatError(f"{_WHAT}: {message}", code=f"{_WHAT}.{code}")


def _counted(items: Any) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _refuse("form", "expected a list of objects")
    if not 1 <= len(items) <= MAX_GPUS:
        raise _refuse("count", f"expected 1 to {MAX_GPUS} GPUs, got {len(items)}")
    return items


def _items(items: Any, common: Mapping[str, Any]) -> tuple[GpuFile, ...]:
    return tuple(_item({**common, **item}) for item in _counted(items))


def _item(item: Mapping[str, Any]) -> GpuFile:
    if item.get("version", _VERSION) != _VERSION:
        raise _refuse("version", f"expected version {_VERSION}, got {item['version']!r:.20}")
    arch = _text(item, "arch")
    if arch and arch not in ARCHITECTURES:
        raise _refuse("arch", f"expected one of {ARCHITECTURES}, got {arch!r:.40}")
    nonce = _text(item, "nonce")
    return GpuFile(
        report=_report(_base64(_text(item, "evidence"), "evidence")),
        chain=_chain(_base64(_text(item, "certificate"), "certificate")),
        nonce=_nonce(_hex(nonce)) if nonce else None,
        arch=arch,
        driver_version=_text(item, "driver_version"),
        vbios_version=_text(item, "vbios_version"),
    )


def _wrapped(value: Mapping[str, Any]) -> tuple[GpuFile, ...]:
    if not str(value[_CMW]).startswith(_CMW_INPUT):
        raise _refuse("form", f"expected a CMW {_CMW_INPUT}..., got {value[_CMW]!r:.100}")
    common = value.get("nonce")
    return tuple(
        _wrapped_item(item, common) for item in _counted([value[name] for name in value if name not in _CMW_OTHERS])
    )


def _wrapped_item(item: Mapping[str, Any], common_nonce: Any) -> GpuFile:
    if item.get(_CMW) != _CMW_ITEM:
        raise _refuse("form", f"expected a CMW {_CMW_ITEM}, got {item.get(_CMW)!r:.100}")
    nonce = item.get("nonce", common_nonce)
    return GpuFile(
        report=_report(_record(item.get("evidence"), "evidence", _REPORT_TYPE)),
        chain=_chain(_record(item.get("certificate"), "certificate", _CHAIN_TYPE)),
        nonce=None if nonce is None else _nonce(_record(nonce, "nonce", _NONCE_TYPE)),
        arch="",
        driver_version="",
        vbios_version="",
    )


def _record(value: Any, name: str, media_type: str) -> bytes:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(item, str) for item in value):
        raise _refuse("field", f"{name}: expected [media type, base64url]")
    if value[0] != media_type:
        raise _refuse("field", f"{name}: expected {media_type}, got {value[0]!r:.100}")
    text = value[1].rstrip("=")
    if "+" in text or "/" in text:
        raise _refuse("field", f"{name}: expected base64url")
    text = text.replace("-", "+").replace("_", "/")
    return _base64(text + "=" * (-len(text) % 4), name)


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name, "")
    if not isinstance(value, str):
        raise _refuse("field", f"{name}: expected text, got {type(value).__name__}")
    return value


def _base64(text: str, name: str) -> bytes:
    if not text:
        raise _refuse("field", f"{name}: expected base64, got none")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as err:
        raise _refuse("field", f"{name}: expected base64") from err


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as err:
        raise _refuse("field", "nonce: expected hex") from err


def _nonce(value: bytes) -> bytes:
    if len(value) != _NONCE_BYTES:
        raise _refuse("field", f"nonce: expected {_NONCE_BYTES} bytes, got {len(value)}")
    return value


def _report(value: bytes) -> bytes:
    if len(value) > MAX_REPORT_BYTES:
        raise _refuse("too_long", f"evidence: expected at most {MAX_REPORT_BYTES} bytes, got {len(value)}")
    return value


def _chain(value: bytes) -> tuple[bytes, ...]:
    if len(value) > _MAX_CHAIN_BYTES:
        raise _refuse("too_long", f"certificate: expected at most {_MAX_CHAIN_BYTES} bytes, got {len(value)}")
    return parse_pem_chain(value, _WHAT)
