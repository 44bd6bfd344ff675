"""From a platform and this start's keys to evidence: what is extended at boot, and what a quote covers.

RTMR3 gets the events of `formats.boot_events` in their order: `extend_boot` all but the last, `extend_ready` the
last, once the weights are loaded and tested. `Attester` then answers Attest calls. Its caller holds the connection
rules (one Attest for each connection, rate limits). Not done here: TLS, the log, deciding when the machine is ready.
"""

from __future__ import annotations

from dataclasses import dataclass

from countermark.formats import boot_events
from countermark.formats.boot_events import BootEvents
from countermark.formats.evidence import Evidence, Passport, encode_evidence, gpu_digest
from countermark.formats.report_data import (
    Claims,
    GpuFreshness,
    Purpose,
    encode_claims,
    gpu_nonce,
    report_data,
)
from countermark_appliance.platform.base import Platform
from countermark_appliance.platform.keyring import Keyring


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHead:
    """The transparency log as it stands; narrows a rollback to the time between two quotes."""

    origin: str
    size: int
    root: bytes  # 32


def boot_values(
    platform: Platform, keys: Keyring, *, config: bytes, weights_root: bytes, profile: str, kernel_digest: bytes
) -> BootEvents:
    """The values RTMR3 gets for this start."""
    return BootEvents(
        image_id=platform.image_id,
        config=config,
        weights_root=weights_root,
        profile=profile,
        kernel_digest=kernel_digest,
        gpus=platform.gpu_identities(),
        keys=keys.digest(),
    )


def extend_boot(platform: Platform, boot: BootEvents) -> None:
    """Extend every event but `system-ready`."""
    for data in boot_events.boot_event_data(boot)[:-1]:
        platform.extend_rtmr3(boot_events.EVENT_TYPE, data)


def extend_ready(platform: Platform, boot: BootEvents) -> None:
    """Extend `system-ready`: from here on the machine serves, and nothing is extended any more."""
    platform.extend_rtmr3(boot_events.EVENT_TYPE, boot_events.boot_event_data(boot)[-1])


class Attester:
    """Makes evidence for one booted platform. Thread-safe as far as the platform is."""

    def __init__(self, platform: Platform, keys: Keyring, boot: BootEvents) -> None:
        self._platform = platform
        self._keys = keys
        self._boot = boot

    def attest(self, *, purpose: Purpose, nonce: bytes, exporter: bytes | None, log: LogHead) -> bytes:
        """Encoded evidence over the caller's 32-byte nonce. `exporter`: the connection's, for SESSION only.

        Raises what the platform raises.
        """
        platform, boot = self._platform, self._boot
        tls_spki = self._keys.tls_spki()
        gpus = platform.gpu_evidence(gpu_nonce(nonce, tls_spki))
        claims = encode_claims(
            Claims(
                purpose=purpose,
                nonce=nonce,
                exporter=exporter,
                boot_id=self._keys.boot_id,
                tls_spki=tls_spki,
                keys=boot.keys,
                log_origin=log.origin,
                log_size=log.size,
                log_root=log.root,
                weights_root=boot.weights_root,
                image_id=boot.image_id,
                config=boot.config,
                gpu_digest=gpu_digest(gpus),
                gpu_freshness=GpuFreshness.SESSION,
            )
        )
        evidence = Evidence(
            platform=platform.name,
            quote=platform.quote(report_data(claims)),
            ccel=platform.ccel(),
            rtmr3_log=platform.rtmr3_log(),
            gpu=gpus,
            claims=claims,
            keys=self._keys.role_keys(),
            endorsements=platform.endorsements(),
        )
        return encode_evidence(evidence)

    def passport(self, evidence: Evidence) -> Passport:
        """The part of passport evidence that fits into the TLS certificate."""
        return Passport(quote=evidence.quote, claims=evidence.claims)
