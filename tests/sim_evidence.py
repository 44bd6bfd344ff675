"""Evidence of a simulated machine for tests, good by default, with a hook for each way a host could bend it.

Everything a hook changes is signed again by the simulated vendors' real keys, so a refusal is about the content and not
about a broken signature, unless the test breaks one on purpose. The code a machine measures is a fixed text, so that
tests do not depend on the files of this repository.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from countermark.appraise import TLS_GROUP, TLS_VERSION, Scope, Verdict, appraise
from countermark.binding import Connection
from countermark.formats import boot_events
from countermark.formats.boot_events import BootEvents
from countermark.formats.evidence import Evidence, GpuEvidence, encode_evidence, gpu_digest
from countermark.formats.quote import encode_quote, encode_signed_part, parse_quote
from countermark.formats.report_data import Claims, GpuFreshness, Purpose, encode_claims, gpu_nonce, report_data
from countermark.numerics import CURRENT
from countermark.policy import Policy, Profile, new_policy, pin
from countermark_appliance.platform import sim
from countermark_appliance.platform.attester import boot_values
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim import state as sim_state
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch
from countermark_appliance.platform.sim.state import State

NOW = 1_800_000_000  # 2027-01-15; nothing here reads a clock
WEIGHTS = hashlib.sha256(b"weights").digest()
CONFIG = hashlib.sha256(b"config").digest()
KERNELS = hashlib.sha256(b"kernels").digest()


@lru_cache
def code_folder(text: str = "the code") -> Path:
    """A folder with one file: what the simulated machine measures as its image."""
    folder = Path(tempfile.mkdtemp(prefix="countermark-test-")) / "code"
    folder.mkdir()
    (folder / "main.py").write_text(text)
    return folder


@lru_cache
def machine(gpus: int = 1) -> State:
    """One simulated machine, its vendors and its manifest."""
    return sim_state.make(now=NOW, gpus=gpus, roots=[code_folder()])


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def policy_for(state: State, **changes: Any) -> Policy:
    """A development policy that pins this machine's roots, manifest and weights; `changes` are Policy fields."""
    policy = new_policy(
        Profile.DEVELOPMENT,
        now=NOW,
        simulated_tdx_root=sha256(state.root_der),
        simulated_gpu_root=sha256(state.gpu_root_der),
        simulated_rim_root=sha256(state.rim_root_der),
    )
    policy = pin(policy, state.manifest, now=NOW, signers=state.signer_digests, weights_roots=[WEIGHTS])
    return replace(policy, **{"gpu_count": max(1, len(state.gpus)), **changes})


def with_collateral(state: State, **says: Any) -> State:
    """The machine with newly signed endorsements; `says` are `Collateral` fields."""
    data = intel.collateral_json(state.vendor, Collateral(**{"issued": NOW - 3600, **says}))
    return with_endorsements(state, data)


def with_endorsements(state: State, data: bytes) -> State:
    return replace(state, endorsements=replace(state.endorsements, tdx=data))


def edit_endorsements(state: State, **values: Any) -> State:
    """Replace members of the endorsements' JSON without signing anything again; None removes the member."""
    members = json.loads(state.endorsements.tdx) | values
    kept = {name: value for name, value in members.items() if value is not None}
    return with_endorsements(state, json.dumps(kept).encode())


def resign(platform: SimPlatform, quote: bytes, **body: bytes) -> bytes:
    """The quote with other TD report fields, signed by the boot's attestation key."""
    parsed = parse_quote(quote)
    changed = replace(parsed, body=replace(parsed.body, **body))
    signature = intel.sign_raw(platform._attestation_key, encode_signed_part(changed.header, changed.body))
    return encode_quote(replace(changed, signature=signature))


def same(value: Any) -> Any:
    return value


@dataclass(kw_only=True)
class Scene:
    """A machine, a client's connection to it, and what the machine does differently from a good one.

    `boot`: values for RTMR3. `events`: the data of the events really extended. `claims`: what goes into report_data.
    `gpus`: the GPU evidence before it is digested. `quote`: the signed quote. `evidence`: the finished map.
    """

    state: State = field(default_factory=machine)
    launch: TdLaunch = field(default_factory=TdLaunch)
    code: str = "the code"
    boot: Callable[[BootEvents], BootEvents] = same
    events: Callable[[tuple[bytes, ...]], Sequence[bytes]] = same
    claims: Callable[[Claims], Claims] = same
    gpus: Callable[[SimPlatform, bytes], tuple[GpuEvidence, ...]] = SimPlatform.gpu_evidence
    quote: Callable[[SimPlatform, bytes], bytes] = lambda _platform, quote: quote
    evidence: Callable[[Evidence], Evidence] = same
    keys: Keyring = field(default_factory=Keyring)
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    exporter: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def connection(self, **changes: Any) -> Connection:
        """The client's view of its connection to this machine."""
        good = Connection(
            nonce=self.nonce,
            exporter=self.exporter,
            peer_spki=self.keys.tls_spki(),
            group=TLS_GROUP,
            version=TLS_VERSION,
        )
        return replace(good, **changes)

    def make(self) -> Evidence:
        """Boot, extend, quote."""
        platform = sim.boot(self.state, self.launch, roots=[code_folder(self.code)])
        boot = self.boot(
            boot_values(
                platform, self.keys, config=CONFIG, weights_root=WEIGHTS, profile=CURRENT, kernel_digest=KERNELS
            )
        )
        for data in self.events(boot_events.boot_event_data(boot)):
            platform.extend_rtmr3(boot_events.EVENT_TYPE, data)
        spki = self.keys.tls_spki()
        gpus = self.gpus(platform, gpu_nonce(self.nonce, spki))
        claims = encode_claims(
            self.claims(
                Claims(
                    purpose=Purpose.SESSION,
                    nonce=self.nonce,
                    exporter=self.exporter,
                    boot_id=self.keys.boot_id,
                    tls_spki=spki,
                    keys=boot.keys,
                    log_origin=f"test/{self.keys.boot_id.hex()}",
                    log_size=0,
                    log_root=sha256(b""),
                    weights_root=boot.weights_root,
                    image_id=boot.image_id,
                    config=boot.config,
                    gpu_digest=gpu_digest(gpus),
                    gpu_freshness=GpuFreshness.SESSION,
                )
            )
        )
        return self.evidence(
            Evidence(
                platform=platform.name,
                quote=self.quote(platform, platform.quote(report_data(claims))),
                ccel=platform.ccel(),
                rtmr3_log=platform.rtmr3_log(),
                gpu=gpus,
                claims=claims,
                keys=self.keys.role_keys(),
                endorsements=platform.endorsements(),
            )
        )

    def encoded(self) -> bytes:
        return encode_evidence(self.make())

    def appraise(self, policy: Policy | None = None, *, now: int = NOW, **connection: Any) -> Verdict:
        """Appraise as the client of this machine does; `connection` bends the client's view of it."""
        return appraise(
            self.encoded(), policy or policy_for(self.state), now=now, connection=self.connection(**connection)
        )

    def appraise_bundle(self, policy: Policy | None = None, *, now: int = NOW) -> Verdict:
        return appraise(self.encoded(), policy or policy_for(self.state), now=now, scope=Scope.BUNDLE)
