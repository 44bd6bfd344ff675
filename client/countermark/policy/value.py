"""The policy value: what a verifier accepts, one frozen dataclass; every weakening is a named field.

Profile `production` accepts Intel's SGX root and NVIDIA's device and RIM roots alone, pinned here by SHA-256 of the
certificate; `test` and `development` may name a simulated root by its digest. An empty list accepts nothing.
Not checked here: whether `not_after` has passed (appraisal does, at its time T).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from countermark.checks import rfc3339
from countermark.errors import FormatError, PolicyError
from countermark.formats.manifest import ImageKind, Manifest
from countermark.numerics import CURRENT
from countermark.policy.modules import KNOWN_MRSEAM
from countermark.tlog.cosignature import WITNESS_TYPES, VerifierKey, log_keys, names_of

# SHA-256 of the DER certificates: Intel SGX Root CA, NVIDIA Device Identity CA, NVIDIA CoRIM signing Root CA.
INTEL_SGX_ROOT: Final = bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")
NVIDIA_DEVICE_ROOT: Final = bytes.fromhex("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48")
NVIDIA_RIM_ROOT: Final = bytes.fromhex("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1")

# What a simulated machine reports. Under a simulated root this value, like any other, is anybody's to claim.
SIMULATED_MRSEAM: Final = hashlib.sha384(b"SIMULATED TDX module, version 1.5").digest()

DAY_S: Final = 86_400
# Revoked is not in the list: no policy can accept it.
ACCEPTABLE_STATUSES: Final = (
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)
MAX_VALIDITY_DAYS: Final = 3660
_ADVISORY: Final = re.compile(r"[A-Z0-9-]{1,32}")
_OID: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]{0,38})){1,30}")


class Profile(Enum):
    """`PRODUCTION` admits the vendors' roots and production images only."""

    PRODUCTION = "production"
    TEST = "test"
    DEVELOPMENT = "development"


_KINDS: Final = {
    Profile.PRODUCTION: (ImageKind.PRODUCTION,),
    Profile.TEST: (ImageKind.PRODUCTION, ImageKind.TEST, ImageKind.SIMULATED),
    Profile.DEVELOPMENT: tuple(ImageKind),
}


class GpuFreshnessRule(Enum):
    """`SESSION`: reports must carry this quote's nonce. `BOOT`: reports made at boot are enough."""

    SESSION = "session"
    BOOT = "boot"


class GpuRevocationRule(Enum):
    """`REQUIRED`: a CRL or OCSP response valid at T must cover every GPU and RIM certificate below the roots.

    `OPTIONAL`: certificates that none covers are accepted. What is there is judged under either rule.
    """

    REQUIRED = "required"
    OPTIONAL = "if-given"


class WitnessRule(Enum):
    """What the required witnesses must have seen. `EPOCH`: that the boot stands in the operator log.

    `EPOCH_AND_RECEIPT`: offline also a checkpoint of the boot's own log that extends the receipt's.
    """

    EPOCH = "epoch"
    EPOCH_AND_RECEIPT = "epoch-and-receipt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """Something Intel advises against that is accepted all the same `until` a time (unix seconds)."""

    name: str
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is accepted. Every default is the strict one. Digests are raw bytes, times unix seconds.

    `tdx_root`, `gpu_root`, `rim_root`: SHA-256 of the root certificates. `images`: verified manifests, whose registers
    are the reference values. `manifest_version`: the highest seen, never lowered. `manifest_signers`: SHA-256 of both
    COSE_Keys. `manifest_log`: both verifier keys of the measurement log that a manifest must stand in, or none.
    `ppids`, `gpu_chips`: hardware allow-lists, which `any_hardware` switches off; `configs` likewise.
    `operator_log`: its two verifier keys, or none. `witnesses`: verifier keys; those of one name are one witness, which
    counts when all of them have signed, and `witnesses_required` of them must.
    `tsa_roots`: SHA-256 of the certificates under which time stamps give a bundle its time; without one they are passed
    over. `tsa_policies`: the authorities' policies that will do, dotted; any, if none is named.
    Constructing one that contradicts itself raises `PolicyError`.
    """

    profile: Profile
    created: int
    not_after: int
    max_validity_days: int = 30
    tdx_root: bytes = INTEL_SGX_ROOT
    gpu_root: bytes = NVIDIA_DEVICE_ROOT
    rim_root: bytes = NVIDIA_RIM_ROOT
    manifest_signers: tuple[bytes, ...] = ()
    manifest_version: int = 0
    manifest_log: tuple[VerifierKey, ...] | None = None
    images: tuple[Manifest, ...] = ()
    revoked_images: tuple[bytes, ...] = ()
    endorsement_max_age_days: int = 30
    min_tcb_evaluation_data_number: int = 17
    mrseam: tuple[bytes, ...] = KNOWN_MRSEAM
    accepted_statuses: tuple[Waiver, ...] = ()
    accepted_advisories: tuple[Waiver, ...] = ()
    any_hardware: bool = False
    ppids: tuple[bytes, ...] = ()
    gpu_chips: tuple[bytes, ...] = ()
    gpu_count: int = 1
    gpu_mode: str = "cc-on"
    gpu_freshness: GpuFreshnessRule = GpuFreshnessRule.SESSION
    gpu_revocation: GpuRevocationRule = GpuRevocationRule.REQUIRED
    weights_roots: tuple[bytes, ...] = ()
    numerics: tuple[str, ...] = (CURRENT,)
    any_config: bool = False
    configs: tuple[bytes, ...] = ()
    operator_log: tuple[VerifierKey, ...] | None = None
    witnesses: tuple[VerifierKey, ...] = ()
    witnesses_required: int = 0
    witnessed: WitnessRule = WitnessRule.EPOCH
    tsa_roots: tuple[bytes, ...] = ()
    tsa_policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `PolicyError` `policy.root`, `.validity`, `.value`, `.image` or `.contradiction`."""
        _check(self)

    @property
    def simulated(self) -> bool:
        """Whether a trust root in this policy is a simulated one."""
        vendors = (INTEL_SGX_ROOT, NVIDIA_DEVICE_ROOT, NVIDIA_RIM_ROOT)
        return (self.tdx_root, self.gpu_root, self.rim_root) != vendors


def _refuse(message: str, code: str) -> PolicyError:
    return PolicyError(message, code=f"policy.{code}")


def _check(policy: Policy) -> None:
    if policy.profile is Profile.PRODUCTION and policy.simulated:
        wanted = "expected intel and nvidia in the production profile, got a simulated root"
        raise _refuse(f"trust.{_simulated_key(policy)}: {wanted}", "root")
    if not policy.created < policy.not_after <= policy.created + policy.max_validity_days * DAY_S:
        span = (
            f"later than created = {rfc3339(policy.created)}, by at most max_validity_days = {policy.max_validity_days}"
        )
        raise _refuse(f"not_after: expected {span}, got {rfc3339(policy.not_after)}", "validity")
    bounds = (
        ("max_validity_days", policy.max_validity_days, 1, MAX_VALIDITY_DAYS),
        ("endorsements.max_age_days", policy.endorsement_max_age_days, 1, MAX_VALIDITY_DAYS),
        ("endorsements.min_tcb_evaluation_data_number", policy.min_tcb_evaluation_data_number, 0, 1 << 31),
        ("manifest.highest_version", policy.manifest_version, 0, 1 << 53),
        ("gpu.count", policy.gpu_count, 1, 16),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise _refuse(f"{name}: expected {low} to {high}, got {value}", "value")
    if policy.gpu_mode not in ("cc-on", "protected-pcie"):
        raise _refuse(f"gpu.mode: expected cc-on or protected-pcie, got {policy.gpu_mode}", "value")
    if len(set(policy.manifest_signers)) not in (0, 2):
        message = f"manifest.signers: expected two digests, or none yet, got {len(set(policy.manifest_signers))}"
        raise _refuse(message, "value")
    for profile in policy.numerics:
        if not (profile.isascii() and profile.isprintable()):
            raise _refuse(f"model.numerics: expected printable ASCII, got {profile!a}", "value")
    for status in policy.accepted_statuses:
        if status.name not in ACCEPTABLE_STATUSES:
            wanted = (
                f"expected one of {', '.join(ACCEPTABLE_STATUSES)} (UpToDate needs none, Revoked is never accepted)"
            )
            raise _refuse(f"tdx.accept_status: {wanted}, got {status.name!r}", "value")
    for advisory in policy.accepted_advisories:
        if not _ADVISORY.fullmatch(advisory.name):
            wanted = "expected an advisory such as INTEL-SA-00615"
            raise _refuse(f"tdx.accept_advisory: {wanted}, got {advisory.name!r}", "value")
    if policy.any_hardware and (policy.ppids or policy.gpu_chips):
        raise _refuse("hardware: expected either any = true or lists, got both", "contradiction")
    if policy.any_config and policy.configs:
        raise _refuse("config: expected either any = true or digests, got both", "contradiction")
    _check_log(policy)
    for name in policy.tsa_policies:
        if not _OID.fullmatch(name):
            wanted = "expected an object identifier such as 1.2.3.4.1"
            raise _refuse(f"anchors.tsa_policies: {wanted}, got {name!r:.80}", "value")
    for image in policy.images:
        if image.kind not in _KINDS[policy.profile]:
            kinds = " or ".join(kind.value for kind in _KINDS[policy.profile])
            wanted = f"expected kind {kinds} in profile {policy.profile.value}, got {image.kind.value}"
            raise _refuse(f"image {image.image_id.hex()}: {wanted}", "image")
        if image.version > policy.manifest_version:
            wanted = f"at most manifest.highest_version = {policy.manifest_version}"
            raise _refuse(f"image {image.image_id.hex()}: expected version {wanted}, got {image.version}", "image")
        if image.image_id in policy.revoked_images:
            wanted = "expected none that manifest.revoked_images lists"
            raise _refuse(f"image {image.image_id.hex()}: {wanted}", "image")


def _check_log(policy: Policy) -> None:
    for name, keys in (("manifest.log", policy.manifest_log), ("log.operator", policy.operator_log)):
        if keys is not None:
            try:
                log_keys(keys)
            except FormatError as err:
                raise _refuse(f"{name}: {err}", "value") from err
    for key in policy.witnesses:
        if key.kind not in WITNESS_TYPES:
            wanted = "expected a witness's verifier key, of type 0x04 or 0x06"
            raise _refuse(f"log.witnesses: {wanted}, got {key.kind:#04x} of {key.name}", "value")
    if len(set(policy.witnesses)) != len(policy.witnesses):
        raise _refuse("log.witnesses: expected each verifier key once, got one twice", "value")
    others = {key.public for key in policy.operator_log or ()}
    for key in policy.witnesses:  # under another name it would be somebody else, and count again
        if key.public in others:
            wanted = "expected keys that no other witness and no operator log has"
            raise _refuse(f"log.witnesses: {wanted}, got one of {key.name}", "value")
        others.add(key.public)
    most = len(names_of(policy.witnesses))
    if not 0 <= policy.witnesses_required <= most:
        wanted = f"expected 0 to {most}, the witnesses named"
        raise _refuse(f"log.witnesses_required: {wanted}, got {policy.witnesses_required}", "contradiction")
    if policy.witnesses_required and policy.operator_log is None:
        raise _refuse("log.operator: expected the log that witnesses are required of, got none", "contradiction")


def _simulated_key(policy: Policy) -> str:
    if policy.tdx_root != INTEL_SGX_ROOT:
        return "tdx"
    return "gpu" if policy.gpu_root != NVIDIA_DEVICE_ROOT else "rim"
