"""The policy file: TOML 1.0 to `Policy` and back, with a comment on every field.

Layout version 1, ours. Every table and key is listed in `parse_policy`; anything else is refused by its dotted name,
and nothing is read from the environment. Digests are lower-case hex, times RFC 3339 with an offset.
`encode_policy(parse_policy(text))` keeps every value (comments are ours).
Not checked here: contradictions between fields, which constructing the `Policy` checks.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from countermark.errors import FormatError, PolicyError
from countermark.files import read_file
from countermark.formats import manifest as manifests
from countermark.formats.manifest import Manifest
from countermark.policy.value import (
    INTEL_SGX_ROOT,
    NVIDIA_DEVICE_ROOT,
    NVIDIA_RIM_ROOT,
    GpuFreshnessRule,
    GpuRevocationRule,
    Policy,
    Profile,
    Waiver,
    WitnessRule,
)
from countermark.tlog.cosignature import VerifierKey, parse_vkey

VERSION: Final = 1
MAX_BYTES: Final = 8 * 1024 * 1024
MAX_ITEMS: Final = 1024
MAX_TIME: Final = 253_402_300_799
_SIMULATED: Final = "simulated:"
_KINDS: Final = {
    int: "a whole number",
    str: "text in quotes",
    bool: "true or false",
    list: "a list",
    dict: "a table",
    datetime: "a time such as 2026-01-31T00:00:00Z",
}


@dataclass(slots=True)
class _Table:
    """A TOML table that is read key by key and must be empty at the end."""

    values: dict[str, Any]
    path: str = ""
    seen: set[str] = field(default_factory=set)

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, kind: type, default: object = ...) -> Any:
        self.seen.add(key)
        if key not in self.values:
            if default is ...:
                message = f"{self.name(key)}: expected {_KINDS[kind]}, got nothing"
                raise PolicyError(message, code="policy.missing_key")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            message = f"{self.name(key)}: expected {_KINDS[kind]}, got {_short(value)}"
            raise PolicyError(message, code="policy.value")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.get(key, dict, {}), self.name(key))

    def tables(self, key: str) -> list[_Table]:
        items = self.get(key, list, [])
        self._check_items(key, items, dict)
        return [_Table(item, self.name(key)) for item in items]

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        items = self.get(key, list, list(default))
        self._check_items(key, items, str)
        return tuple(items)

    def _check_items(self, key: str, items: list[Any], kind: type) -> None:
        if len(items) > MAX_ITEMS:
            message = f"{self.name(key)}: expected at most {MAX_ITEMS} items, got {len(items)}"
            raise PolicyError(message, code="policy.value")
        for item in items:
            if not isinstance(item, kind):
                message = f"{self.name(key)}: expected each item to be {_KINDS[kind]}, got {_short(item)}"
                raise PolicyError(message, code="policy.value")

    def digests(self, key: str, size: int) -> tuple[bytes, ...]:
        return tuple(_hex(item, size, self.name(key)) for item in self.texts(key))

    def time(self, key: str) -> int:
        return _unix(self.get(key, datetime), self.name(key))

    def waivers(self, key: str) -> tuple[Waiver, ...]:
        table = self.table(key)
        return tuple(Waiver(name=name, until=table.time(name)) for name in sorted(table.values))

    def end(self) -> None:
        unknown = sorted(self.values.keys() - self.seen)
        if unknown:
            names = ", ".join(self.name(key) for key in unknown)
            known = ", ".join(self.name(key) for key in sorted(self.seen))
            raise PolicyError(f"{names}: unknown key, expected one of {known}", code="policy.unknown_key")


def _short(value: object) -> str:
    """A value as it stands in a message: somebody's whole file must not come back in one."""
    if isinstance(value, dict | list):
        return _KINDS[type(value)]
    return str(value).lower() if isinstance(value, bool | datetime) else f"{value!r:.80}"


def _hex(text: str, size: int, name: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size or value.hex() != text:
        message = f"{name}: expected {2 * size} lower-case hex digits, got {_short(text)} ({len(text)} characters)"
        raise PolicyError(message, code="policy.value")
    return value


def _unix(moment: datetime, name: str) -> int:
    if moment.tzinfo is None:
        raise PolicyError(f"{name}: expected a time with an offset such as Z, got {moment}", code="policy.value")
    seconds = int(moment.timestamp())
    if not 0 <= seconds <= MAX_TIME:  # beyond it, or before it, an offset leads to years that no file can name
        raise PolicyError(f"{name}: expected a time in the years 1970 to 9999, got {moment}", code="policy.value")
    return seconds


def _root(table: _Table, key: str, vendor: str, digest: bytes) -> bytes:
    text = table.get(key, str)
    if text == vendor:
        return digest
    if not text.startswith(_SIMULATED):
        message = f"{table.name(key)}: expected {vendor!r} or '{_SIMULATED}<SHA-256>', got {text!r}"
        raise PolicyError(message, code="policy.root")
    return _hex(text.removeprefix(_SIMULATED), 32, table.name(key))


def _enum(
    table: _Table,
    key: str,
    kind: type[Profile | GpuFreshnessRule | GpuRevocationRule | WitnessRule],
    default: object = ...,
) -> Any:
    text = table.get(key, str, default)
    try:
        return kind(text)
    except ValueError as err:
        message = f"{table.name(key)}: expected {' or '.join(item.value for item in kind)}, got {text!r:.80}"
        raise PolicyError(message, code="policy.value") from err


def _vkeys(table: _Table, key: str) -> tuple[VerifierKey, ...]:
    try:
        return tuple(map(parse_vkey, table.texts(key)))
    except FormatError as err:
        raise PolicyError(f"{table.name(key)}: {err}", code="policy.value") from err


def load_policy(path: Path | str) -> Policy:
    """Read and parse a policy file. Raises `UsageError` (`usage.file`) or as `parse_policy`."""
    return parse_policy(read_file(path, max_bytes=MAX_BYTES))


def parse_policy(data: bytes) -> Policy:
    """Parse a policy file.

    Raises `PolicyError`: `policy.toml`, `policy.too_long`, `policy.version`, `policy.unknown_key`,
    `policy.missing_key`, `policy.value`, `policy.manifest`, or a code of `Policy` itself.
    """
    if len(data) > MAX_BYTES:
        raise PolicyError(f"policy: expected at most {MAX_BYTES} bytes, got {len(data)}", code="policy.too_long")
    try:
        top = _Table(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as err:
        raise PolicyError(f"policy: expected TOML: {err}", code="policy.toml") from err
    if top.get("version", int) != VERSION:
        raise PolicyError(f"version: expected {VERSION}, got {top.values['version']}", code="policy.version")
    trust, manifest, endorsements = top.table("trust"), top.table("manifest"), top.table("endorsements")
    tdx, hardware, gpu = top.table("tdx"), top.table("hardware"), top.table("gpu")
    model, config, log, images = top.table("model"), top.table("config"), top.table("log"), top.tables("image")
    anchors = top.table("anchors")
    values: dict[str, Any] = {
        "profile": _enum(top, "profile", Profile),
        "created": top.time("created"),
        "not_after": top.time("not_after"),
        "max_validity_days": top.get("max_validity_days", int),
    }
    top.end()  # before the tables, so that one with a wrong name is named, and not what it lacks
    values |= {
        "tdx_root": _root(trust, "tdx", "intel", INTEL_SGX_ROOT),
        "gpu_root": _root(trust, "gpu", "nvidia", NVIDIA_DEVICE_ROOT),
        "rim_root": _root(trust, "rim", "nvidia", NVIDIA_RIM_ROOT),
        "manifest_signers": manifest.digests("signers", 32),
        "manifest_version": manifest.get("highest_version", int),
        "manifest_log": _vkeys(manifest, "log") or None,
        "revoked_images": manifest.digests("revoked_images", 32),
        "images": tuple(_image(item) for item in images),
        "endorsement_max_age_days": endorsements.get("max_age_days", int),
        "min_tcb_evaluation_data_number": endorsements.get("min_tcb_evaluation_data_number", int),
        "mrseam": tdx.digests("mrseam", 48),
        "accepted_statuses": tdx.waivers("accept_status"),
        "accepted_advisories": tdx.waivers("accept_advisory"),
        "any_hardware": hardware.get("any", bool, False),
        "ppids": hardware.digests("ppids", 16),
        "gpu_chips": hardware.digests("gpu_chips", 32),
        "gpu_count": gpu.get("count", int),
        "gpu_mode": gpu.get("mode", str),
        "gpu_freshness": _enum(gpu, "freshness", GpuFreshnessRule),
        "gpu_revocation": _enum(gpu, "revocation", GpuRevocationRule),
        "weights_roots": model.digests("weights_roots", 32),
        "numerics": model.texts("numerics"),
        "any_config": config.get("any", bool, False),
        "configs": config.digests("digests", 32),
        "operator_log": _vkeys(log, "operator") or None,
        "witnesses": _vkeys(log, "witnesses"),
        "witnesses_required": log.get("witnesses_required", int, 0),
        "witnessed": _enum(log, "witnessed", WitnessRule, WitnessRule.EPOCH.value),
        "tsa_roots": anchors.digests("tsa_roots", 32),
        "tsa_policies": anchors.texts("tsa_policies"),
    }
    for table in (trust, manifest, endorsements, tdx, hardware, gpu, model, config, log, anchors, *images):
        table.end()
    return Policy(**values)


def _image(table: _Table) -> Manifest:
    try:
        return manifests.parse_manifest(table.get("statement", str).encode())
    except FormatError as err:
        raise PolicyError(f"{table.name('statement')}: {err}", code="policy.manifest") from err


def _time(value: int) -> str:
    return datetime.fromtimestamp(value, UTC).isoformat().replace("+00:00", "Z")


def _list(values: Iterable[bytes | str]) -> str:
    items = [json.dumps(value.hex() if isinstance(value, bytes) else value) for value in values]
    return "[" + "".join(f"\n  {item}," for item in items) + ("\n]" if items else "]")


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _waivers(waivers: tuple[Waiver, ...]) -> list[str]:
    return [f"{json.dumps(item.name)} = {_time(item.until)}" for item in waivers]


def encode_policy(policy: Policy) -> str:
    """The policy as commented TOML that `parse_policy` reads back to an equal value."""
    tdx, gpu, rim = (
        vendor if root == digest else _SIMULATED + root.hex()
        for root, digest, vendor in (
            (policy.tdx_root, INTEL_SGX_ROOT, "intel"),
            (policy.gpu_root, NVIDIA_DEVICE_ROOT, "nvidia"),
            (policy.rim_root, NVIDIA_RIM_ROOT, "nvidia"),
        )
    )
    lines = [
        "# What this verifier accepts. An unknown key is an error; an absent list accepts nothing.",
        f"version = {VERSION}  # of this file's layout",
        f'profile = "{policy.profile.value}"  # production: the vendors\' roots and production images only',
        f"created = {_time(policy.created)}  # to renew the policy, read it again, then change this and not_after",
        f"not_after = {_time(policy.not_after)}  # nothing is accepted later; at most max_validity_days after created",
        f"max_validity_days = {policy.max_validity_days}  # 30 unless you say otherwise: a policy grows stale",
        "",
        "[trust]  # root certificates",
        *(["# SIMULATED: evidence under such a root proves nothing about hardware."] if policy.simulated else []),
        f'tdx = "{tdx}"  # "intel", or in test and development "{_SIMULATED}<SHA-256 of the root certificate>"',
        f'gpu = "{gpu}"  # the device certificates; "nvidia", or likewise',
        f'rim = "{rim}"  # who signs the expected measurements of drivers and VBIOSes; "nvidia", or likewise',
        "",
        "[manifest]  # who may publish images",
        f"signers = {_list(policy.manifest_signers)}  # SHA-256 of the ES256 and the ML-DSA-65 COSE_Key",
        f"highest_version = {policy.manifest_version}  # never lower it: an older manifest is a rollback",
        f"revoked_images = {_list(policy.revoked_images)}  # by their publisher",
        f"log = {_list(map(str, policy.manifest_log or ()))}  # both verifier keys of the measurement log that every"
        " manifest must stand in; may be absent",
        "",
        "[endorsements]  # Intel's signed statements about platforms",
        f"max_age_days = {policy.endorsement_max_age_days}  # since TCB info, QE identity and PCK CRL were issued",
        f"min_tcb_evaluation_data_number = {policy.min_tcb_evaluation_data_number}  # of TCB info and QE identity;"
        " higher asks for later security updates",
        "",
        "[tdx]  # the TDX module and the platform's security updates",
        f"mrseam = {_list(policy.mrseam)}  # SHA-384 of the TDX modules accepted; pinning an image adds none",
        "[tdx.accept_status]  # besides UpToDate, until a time, such as OutOfDate = 2026-01-31T00:00:00Z",
        *_waivers(policy.accepted_statuses),
        "[tdx.accept_advisory]  # until a time, such as INTEL-SA-00615 = 2026-01-31T00:00:00Z",
        *_waivers(policy.accepted_advisories),
        "",
        "[hardware]  # where the machine stands is known only by naming it: PPIDs and GPU chips instead of any = true",
        f"any = {_bool(policy.any_hardware)}  # true: any machine whose vendor vouches for it",
        f"ppids = {_list(policy.ppids)}  # the CPUs, as the verdict shows them",
        f"gpu_chips = {_list(policy.gpu_chips)}  # SHA-256 of the boot ROM certificate's public key",
        "",
        "[gpu]  # every GPU of the machine",
        f"count = {policy.gpu_count}  # exactly so many",
        f'mode = "{policy.gpu_mode}"  # cc-on, or protected-pcie',
        f'freshness = "{policy.gpu_freshness.value}"  # session: reports answer our nonce; boot: once per boot',
        f'revocation = "{policy.gpu_revocation.value}"  # required: every certificate is covered by a CRL or an OCSP'
        " response; if-given: none need be",
        "",
        "[model]  # what computes the answers",
        f"weights_roots = {_list(policy.weights_roots)}  # dm-verity roots",
        f"numerics = {_list(policy.numerics)}  # numerics profiles",
        "",
        "[config]  # the operator's measured configuration file",
        f"any = {_bool(policy.any_config)}  # true: whatever the operator configured; the verdict names it",
        f"digests = {_list(policy.configs)}  # SHA-256 of the file",
        "",
        "[log]  # who else must have seen the node's log; all of it may be absent",
        f"operator = {_list(map(str, policy.operator_log or ()))}  # both verifier keys of the operator log",
        f"witnesses = {_list(map(str, policy.witnesses))}  # verifier keys; a witness with two must sign with both",
        f"witnesses_required = {policy.witnesses_required}  # so many must have cosigned; 0: results say unwitnessed",
        f'witnessed = "{policy.witnessed.value}"  # of what: epoch, or epoch-and-receipt, which a bundle must then'
        " show",
        "",
        "[anchors]  # who may say by when an answer was logged; all of it may be absent",
        f"tsa_roots = {_list(policy.tsa_roots)}  # SHA-256 of time-stamping authorities' root certificates",
        f"tsa_policies = {_list(policy.tsa_policies)}  # their policies that will do; any, if none is named",
    ]
    for image in policy.images:
        lines += ["", *_image_lines(image)]
    return "\n".join(lines) + "\n"


def _image_lines(image: Manifest) -> list[str]:
    statement = manifests.encode_manifest(image).decode()
    quoted = json.dumps(statement) if "'" in statement else f"'{statement}'"
    lines = [
        "[[image]]  # the verified statement of a measurement manifest; `policy pin` writes it",
        f"# image {image.image_id.hex()}, {image.kind.value}, platform {image.platform}, version {image.version}",
    ]
    lines += [f"# {shape.name}: mrtd {shape.mrtd.hex()} rtmr0 {shape.rtmr0.hex()}" for shape in image.shapes]
    lines += [f"# rtmr1 {image.rtmr1.hex()}", f"# rtmr2 {image.rtmr2.hex()}", f"statement = {quoted}"]
    return lines
