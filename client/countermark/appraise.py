"""Appraisal: evidence and a policy in, a sealed Verdict out. RFC 9334's verifier role.

The numbered steps of `appraise` are the checks of its result, in that order; the first that fails ends it, and the
error carries the checks so far, its step and a stable code. A Verdict exists only when every step its scope requires
passed.

Scopes: `session` applies all steps to a live connection. `bundle` is offline: step 7 becomes 7b (nonce, exporter and
TLS key are assertions of whoever made the bundle) and step 11 does not apply. Time is always an argument: a quote has
none of its own, so what is proven is that everything is valid at `now`. A retired numerics profile is refused live, and
passes offline, because `verify_bundle` checks the rest before it says that a bundle under one is undecidable.

Not checked here: receipts and logs (other modules, which take a Verdict), and where a machine stands unless the policy
lists it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NoReturn, final

from countermark.binding import Connection, verify_binding, verify_measured
from countermark.checks import Check, Status, rfc3339
from countermark.errors import (
    ChannelError,
    CountermarkError,
    FormatError,
    MeasurementError,
    PolicyError,
    QuoteError,
    UsageError,
    WeightsError,
)
from countermark.formats.boot_events import BootEvents
from countermark.formats.eventlog import parse_event_log
from countermark.formats.evidence import Evidence, PlatformName, parse_evidence
from countermark.formats.quote import parse_quote, quote_digest
from countermark.formats.report_data import Claims, parse_claims
from countermark.gpu.appraise import appraise_gpus, parse_gpus
from countermark.gpu.report import Gpu
from countermark.keys import PublicKey
from countermark.numerics import is_retired
from countermark.policy import INTEL_SGX_ROOT, Policy
from countermark.tdx.endorsements import parse_endorsements, verify_endorsements
from countermark.tdx.quote import Platform, verify_quote, verify_root
from countermark.tdx.registers import verify_event_log, verify_registers
from countermark.tdx.runtime_log import verify_runtime_log
from countermark.tdx.td import verify_td

TLS_VERSION: Final = "TLSv1.3"
TLS_GROUP: Final = "X25519MLKEM768"
_SEAL: Final = object()
STEPS: Final = {
    "1": "every byte parses",
    "2": "endorsements are signed, current and not rolled back",
    "3": "quote signatures and TCB level",
    "4": "TD attributes and TDX module",
    "5": "registers equal the reference values",
    "6": "event logs replay to the registers",
    "7": "report_data is our challenge, this connection and these keys",
    "7b": "report_data is the carried claims (connection asserted, not verified)",
    "8": "GPUs",
    "9": "hardware allow-list",
    "10": "weights, numerics and configuration",
    "11": "channel",
}


class Scope(StrEnum):
    """What the evidence is judged for; see the module docstring."""

    SESSION = "session"
    BUNDLE = "bundle"


class TimeBasis(StrEnum):
    """Where the time of an appraisal comes from: this machine's clock, somebody's choice, or a time stamp."""

    NOW = "now"
    ASSUMED = "assumed"
    ANCHOR = "anchor"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Everything the verified evidence says. Only `appraise` makes one; it cannot be copied, pickled or subclassed.

    `simulated` is true when a simulated root vouches for any of it: such a verdict proves nothing about hardware.
    In scope `bundle` the claims about the connection (nonce, exporter, TLS key) are asserted, not verified.
    """

    _: KW_ONLY
    seal: InitVar[object]
    simulated: bool
    platform: PlatformName
    scope: Scope
    time: int
    time_basis: TimeBasis
    checks: tuple[Check, ...]
    image_id: bytes
    image_version: int
    shape: str
    claims: Claims
    boot: BootEvents
    keys: Mapping[str, PublicKey]
    quote_digest: bytes
    tdx: Platform
    gpu: tuple[Gpu, ...]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a Verdict comes from appraise() only")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("a Verdict cannot be subclassed")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Verdict is neither pickled nor copied; appraise the evidence again")

    @property
    def weights_root(self) -> bytes:
        """The dm-verity root of the weights, as measured."""
        return self.boot.weights_root

    @property
    def profile(self) -> str:
        """The numerics profile, as measured."""
        return self.boot.profile

    @property
    def kernel_digest(self) -> bytes:
        """SHA-256 over the kernel sources, as measured."""
        return self.boot.kernel_digest

    @property
    def log_origin(self) -> str:
        """The origin line of this boot's log."""
        return self.claims.log_origin

    @property
    def boot_id(self) -> bytes:
        """32 random bytes that name the boot."""
        return self.claims.boot_id

    @property
    def tcb_status(self) -> str:
        """Intel's rating of the platform, such as UpToDate."""
        return self.tdx.tcb_status

    @property
    def advisory_ids(self) -> tuple[str, ...]:
        """Intel's advisories that apply to the platform."""
        return self.tdx.advisory_ids

    def __str__(self) -> str:
        """One line for people: simulated or not comes first."""
        return (
            f"{'SIMULATED ' if self.simulated else ''}{self.platform.value}: image {self.image_id.hex()[:16]}, weights"
            f" {self.weights_root.hex()[:16]}, {self.profile}, TCB {self.tcb_status}, {len(self.gpu)} GPU,"
            f" boot {self.boot_id.hex()[:16]}"
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys; digests in hex. The first key says whether this is simulated."""
        return {
            "simulated": self.simulated,
            "verdict": "accept",
            "scope": self.scope.value,
            "platform": self.platform.value,
            "time": {"value": self.time, "basis": self.time_basis.value},
            "checks": [check.as_json() for check in self.checks],
            "image_id": self.image_id.hex(),
            "image_version": self.image_version,
            "launch_shape": self.shape,
            "weights_root": self.weights_root.hex(),
            "profile": self.profile,
            "kernel_digest": self.kernel_digest.hex(),
            "config": self.boot.config.hex(),
            "boot_id": self.boot_id.hex(),
            "log_origin": self.log_origin,
            "log_size": self.claims.log_size,
            "log_root": self.claims.log_root.hex(),
            "keys": {role: key.spki_digest.hex() for role, key in self.keys.items()},
            "quote_digest": self.quote_digest.hex(),
            "tcb_status": self.tcb_status,
            "advisory_ids": list(self.advisory_ids),
            "ppid": self.tdx.ppid.hex(),
            "fmspc": self.tdx.fmspc.hex(),
            "gpu": [
                {
                    "key": gpu.key.hex(),
                    "name": gpu.name,
                    "chip": gpu.chip.hex(),
                    "driver": gpu.driver_version,
                    "vbios": gpu.vbios_version,
                }
                for gpu in self.gpu
            ],
            "claims": {
                "verified": self.scope is Scope.SESSION,
                "purpose": self.claims.purpose.value,
                "nonce": self.claims.nonce.hex(),
                "exporter": (self.claims.exporter or b"").hex(),
                "tls_spki": self.claims.tls_spki.hex(),
            },
        }


def _failed(err: CountermarkError, number: str) -> Check:
    return Check(step=number, name=STEPS[number], status=Status.FAIL, detail=str(err), code=err.code)


class _Steps:
    """Collects the checks; a step that raises is recorded as failed and its error gets all checks so far.

    A `FormatError` becomes a `QuoteError` with its code: here the malformed thing is evidence, and is refused as such.
    """

    def __init__(self) -> None:
        self.checks: list[Check] = []

    @contextmanager
    def step(self, number: str) -> Iterator[list[str]]:
        """Run one step; what it appends to the yielded list becomes the check's detail."""
        details: list[str] = []
        try:
            yield details
        except FormatError as err:
            malformed = QuoteError(str(err), code=err.code, step=number)
            malformed.checks = (*self.checks, _failed(malformed, number))
            raise malformed from err
        except CountermarkError as err:
            err.step = err.step or number
            err.checks = (*self.checks, _failed(err, err.step))
            raise
        self.checks.append(Check(step=number, name=STEPS[number], status=Status.PASS, detail="; ".join(details)))

    def skip(self, number: str, detail: str) -> None:
        """Record a step that the scope or the policy does not require."""
        self.checks.append(Check(step=number, name=STEPS[number], status=Status.SKIP, detail=detail))


def appraise(
    evidence: bytes,
    policy: Policy,
    *,
    now: int,
    scope: Scope | str = Scope.SESSION,
    connection: Connection | None = None,
    time_basis: TimeBasis = TimeBasis.NOW,
    endorsements: bytes | None = None,
) -> Verdict:
    """Appraise encoded evidence at time `now` (unix seconds) and return the Verdict, or raise.

    1 parse every byte, 2 endorsements, 3 quote signatures and TCB, 4 TD attributes and TDX module, 5 registers against
    the policy's reference values, 6 event logs, 7 report_data and what it claims (7b offline), 8 GPUs, 9 hardware
    allow-list, 10 weights, numerics and configuration, 11 channel.

    `connection`: what the client knows of its own connection; required in scope session, forbidden in scope bundle.
    `endorsements`: TDX endorsements to use instead of those that came along, which no digest of the evidence covers.
    Raises `UsageError` `appraise.connection`, `PolicyError` `policy.expired`, and for evidence that is refused the
    error of the failing step, with its `code`, `step` and `checks`.
    """
    scope = Scope(scope)
    if (scope is Scope.SESSION) is not (connection is not None):
        raise UsageError("connection: expected in scope session and only there", code="appraise.connection")
    refuse_expired(policy, now)
    steps = _Steps()

    with steps.step("1") as detail:
        parsed = parse_evidence(evidence)
        quote = parse_quote(parsed.quote)
        ccel = parse_event_log(parsed.ccel)
        rtmr3_log = parse_event_log(parsed.rtmr3_log)
        claims = parse_claims(parsed.claims)
        tdx_endorsements = parse_endorsements(parsed.endorsements.tdx if endorsements is None else endorsements)
        gpu_evidence = parse_gpus(parsed)
        detail.append(f"{len(evidence)} bytes; platform {parsed.platform.value}; quote version {quote.header.version}")

    with steps.step("2") as detail:
        verify_root(quote, policy)
        _verify_platform(parsed, policy)
        detail.append(verify_endorsements(tdx_endorsements, policy, now=now))
        if endorsements is not None:
            detail.append("the verifier's own, not those that came along")

    with steps.step("3") as detail:
        platform = verify_quote(parsed.quote, quote, tdx_endorsements, policy, now=now)
        detail.append(f"{platform.tcb_status}; advisories {', '.join(platform.advisory_ids) or 'none'}")

    with steps.step("4") as detail:
        detail.append(verify_td(quote.body, policy))

    with steps.step("5") as detail:
        image, shape = verify_registers(
            quote.body,
            policy.images,
            platform=parsed.platform.value,
            claimed=claims.image_id,
            ccel=ccel,
            now=now,
            revoked=policy.revoked_images,
        )
        kinds = f"{image.kind.value} image, machine {shape.name}"
        detail.append(f"image {image.image_id.hex()}, version {image.version}, {kinds}")

    with steps.step("6") as detail:
        detail.append(verify_event_log(quote.body, ccel))
        boot = verify_runtime_log(rtmr3_log, quote.body.rtmr3)
        if boot.image_id != image.image_id:
            message = f"image id in RTMR3: expected {image.image_id.hex()}, got {boot.image_id.hex()}"
            raise MeasurementError(message, code="measurement.image_id")
        detail.append("RTMR3 is exactly our boot events, up to system-ready")

    with steps.step("7b" if connection is None else "7") as detail:
        verify_binding(parsed, claims, quote.body.report_data, connection)
        keys = verify_measured(parsed, claims, boot)
        detail.append(f"boot {claims.boot_id.hex()[:16]}; {len(keys)} keys as measured")

    with steps.step("8") as detail:
        appraised = appraise_gpus(gpu_evidence, claims, boot.gpus, policy, now=now)
        gpus = appraised.gpus
        for gpu, comparisons in zip(gpus, appraised.comparisons, strict=True):
            detail.append(f"{gpu.name}: {', '.join(map(str, comparisons))}")
        detail.append(f"mode {policy.gpu_mode}; {appraised.revocation}")

    if policy.any_hardware:
        steps.skip("9", f"the policy accepts any machine; this is PPID {platform.ppid.hex()}")
    else:
        with steps.step("9") as detail:
            verify_ppid(platform.ppid, policy)
            for gpu in gpus:
                verify_chip(gpu.chip, policy)
            detail.append(f"PPID {platform.ppid.hex()}")

    with steps.step("10") as detail:
        _verify_model(boot, policy, scope)
        detail.append(f"weights {boot.weights_root.hex()}; {boot.profile}")
        detail.append(f"config {boot.config.hex()}" + (" (the policy accepts any)" if policy.any_config else ""))

    if connection is None:
        steps.skip("11", "does not apply offline")
    else:
        with steps.step("11") as detail:
            _verify_channel(connection)
            detail.append(f"{connection.version}, {connection.group}")

    return Verdict(
        seal=_SEAL,
        simulated=policy.simulated or parsed.platform.simulated,
        platform=parsed.platform,
        scope=scope,
        time=now,
        time_basis=time_basis,
        checks=tuple(steps.checks),
        image_id=image.image_id,
        image_version=image.version,
        shape=shape.name,
        claims=claims,
        boot=boot,
        keys=MappingProxyType(dict(keys)),
        quote_digest=quote_digest(parsed.quote),
        tdx=platform,
        gpu=gpus,
    )


def refuse_expired(policy: Policy, now: int) -> None:
    """Raises `PolicyError` `policy.expired`."""
    if now > policy.not_after:
        message = f"policy.not_after: expected a time until {rfc3339(policy.not_after)}, got {rfc3339(now)}"
        raise PolicyError(message, code="policy.expired")


def _verify_platform(evidence: Evidence, policy: Policy) -> None:
    # The name is an assertion; the root is what decides. Evidence that calls itself genuine must not pass a simulated
    # root and the other way round.
    if evidence.platform.simulated is (policy.tdx_root == INTEL_SGX_ROOT):
        wanted = "tdx" if policy.tdx_root == INTEL_SGX_ROOT else "a simulated platform"
        message = f"platform: expected {wanted} under this root, got {evidence.platform.value}"
        raise QuoteError(message, code="quote.platform")


def verify_ppid(ppid: bytes, policy: Policy) -> None:
    """Step 9, the CPU: the policy lists it. Raises `MeasurementError` `hardware.ppid`."""
    if ppid not in policy.ppids:
        known = f"one of the {len(policy.ppids)} of the policy's key ppids in [hardware]"
        raise MeasurementError(f"ppid: expected {known}, got {ppid.hex()}", code="hardware.ppid")


def verify_chip(chip: bytes, policy: Policy) -> None:
    """Step 9, one GPU: the policy lists it. Raises `MeasurementError` `hardware.gpu`."""
    if chip not in policy.gpu_chips:
        known = f"one of the {len(policy.gpu_chips)} of the policy's key gpu_chips in [hardware]"
        raise MeasurementError(f"GPU chip: expected {known}, got {chip.hex()}", code="hardware.gpu")


def _verify_model(boot: BootEvents, policy: Policy, scope: Scope) -> None:
    if boot.weights_root not in policy.weights_roots:
        known = [root.hex() for root in policy.weights_roots]
        raise WeightsError(f"weights root: expected one of {known}, got {boot.weights_root.hex()}", code="weights.root")
    retired = is_retired(boot.profile)  # offline, `verify_bundle` has the last word on those
    if not (scope is Scope.BUNDLE if retired else boot.profile in policy.numerics):
        got = f"{boot.profile}, which is retired" if retired else boot.profile
        message = f"numerics: expected one of {list(policy.numerics)}, got {got}"
        raise MeasurementError(message, code="numerics.profile")
    if not policy.any_config and boot.config not in policy.configs:
        known = [digest.hex() for digest in policy.configs]
        raise MeasurementError(f"config: expected one of {known}, got {boot.config.hex()}", code="config.digest")


def _verify_channel(connection: Connection) -> None:
    if connection.version != TLS_VERSION:
        message = f"TLS version: expected {TLS_VERSION}, got {connection.version}"
        raise ChannelError(message, code="channel.version")
    if connection.group != TLS_GROUP:
        raise ChannelError(f"TLS group: expected {TLS_GROUP}, got {connection.group}", code="channel.group")
