"""Reference values for Trustee (confidential-containers/trustee), derived from a manifest.

The payload of RVPS' provenance type `sample` (rvps/src/extractors/sample, 2025): one JSON object, from the name of a
reference value to the list of values that will do, here lower-case hex. The names are those that Trustee's own policy
asks for (`query_reference_value("mr_td")`, `rtmr_1`, `rtmr_2`, `mr_seam`, `xfam`; default_cpu.rego), and for the other
fields of a TD report those of its claims (deps/verifier/src/tdx/claims.rs). `encode_message` wraps the payload as
`rvps-tool register` wants it (message version 0.1.0).

A list says which values will do, not which go together: MRTD of one launch shape with RTMR0 of another passes. Whoever
needs the pairs takes the CoRIM or the manifest. Not derived: `tcb_svn`, which is the platform's and not the image's.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError, UsageError
from countermark.formats import strict_json
from countermark.formats.manifest import Manifest

MESSAGE_VERSION: Final = "0.1.0"
MAX_BYTES: Final = 1024 * 1024
MAX_VALUES: Final = 256
_SIZES: Final = {
    "mr_td": 48,
    "rtmr_0": 48,
    "rtmr_1": 48,
    "rtmr_2": 48,
    "mr_seam": 48,
    "xfam": 8,
    "td_attributes": 8,
    "mr_config_id": 48,
    "mr_owner": 48,
    "mr_owner_config": 48,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceValues:
    """Values by Trustee's names, sorted by name; the values in the order they were given."""

    values: tuple[tuple[str, tuple[bytes, ...]], ...]


def reference_values(manifest: Manifest) -> ReferenceValues:
    """What a manifest says, in Trustee's terms. Raises `UsageError` (`usage.manifest`) unless it is about TDX."""
    if manifest.simulated:
        message = f"manifest: expected platform tdx, because Trustee appraises TDX quotes, got {manifest.platform}"
        raise UsageError(message, code="usage.manifest")
    found = {
        "mr_td": tuple(dict.fromkeys(shape.mrtd for shape in manifest.shapes)),
        "rtmr_0": tuple(dict.fromkeys(shape.rtmr0 for shape in manifest.shapes)),
        "rtmr_1": (manifest.rtmr1,),
        "rtmr_2": (manifest.rtmr2,),
        "mr_seam": manifest.mrseam,
        "xfam": (manifest.xfam,),
        "td_attributes": (manifest.td_attributes,),
        "mr_config_id": (manifest.mrconfigid,),
        "mr_owner": (manifest.mrowner,),
        "mr_owner_config": (manifest.mrownerconfig,),
    }
    return ReferenceValues(values=tuple(sorted((name, values) for name, values in found.items() if values)))


def encode_rvps(values: ReferenceValues) -> bytes:
    """The `sample` payload."""
    return strict_json.dump({name: [item.hex() for item in items] for name, items in values.values})


def parse_rvps(data: bytes) -> ReferenceValues:
    """The inverse of `encode_rvps`. Raises `FormatError` (`rvps.*`)."""
    value = strict_json.load(data, "rvps", max_bytes=MAX_BYTES)
    if not isinstance(value, dict) or not value.keys() <= _SIZES.keys():
        raise FormatError(f"rvps: expected an object of {sorted(_SIZES)}", code="rvps.members")
    found = []
    for name, items in sorted(value.items()):
        if not isinstance(items, list) or not 0 < len(items) <= MAX_VALUES:
            raise FormatError(f"rvps.{name}: expected a list of 1 to {MAX_VALUES}", code="rvps.members")
        found.append((name, tuple(_hex(item, name) for item in items)))
    values = ReferenceValues(values=tuple(found))
    if encode_rvps(values) != data:
        raise FormatError("rvps: expected the one compact encoding", code="rvps.members")
    return values


def encode_message(values: ReferenceValues) -> bytes:
    """What `rvps-tool register --path` takes."""
    payload = base64.b64encode(encode_rvps(values)).decode()
    return strict_json.dump({"version": MESSAGE_VERSION, "type": "sample", "payload": payload})


def _hex(item: object, name: str) -> bytes:
    try:
        data = bytes.fromhex(item) if isinstance(item, str) else b""
    except ValueError:
        data = b""
    if len(data) != _SIZES[name] or data.hex() != item:
        raise FormatError(f"rvps.{name}: expected {2 * _SIZES[name]} lower-case hex digits", code="rvps.digest")
    return data
