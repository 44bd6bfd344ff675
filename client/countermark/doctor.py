"""What this machine can verify and replay, found out by doing it: `countermark doctor`.

Each examination does in small what a session, a verification or a replay does: a TLS 1.3 handshake with the hybrid key
exchange, every signature scheme on a fresh key (a good one accepted, a changed one refused), the kernels' known-answer
tests. Nothing is read from the network and nothing is written. Not found out: whether a clock is right; it is shown.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from countermark.checks import Check, Status, rfc3339
from countermark.errors import CountermarkError
from countermark.numerics import PROFILES, is_retired
from countermark.policy import Policy
from countermark.replayer import Runner, load_runner
from countermark.wire.tls import TlsEndpoint, TlsFacts, client_context, server_context

ENGINES: Final = "countermark.engines"
"""Entry points by profile: `(device: str) -> Mapping[str, str]`, facts of an engine that has just tested itself."""
_EARLIEST: Final = 1_793_491_200  # 2026-11-01: this version did not exist before
_SECONDS_A_DAY: Final = 86_400
_HANDSHAKE_S: Final = 5.0
_LIBRARIES: Final = ("cryptography", "pyopenssl", "dcap-qvl", "lxml", "grpcio", "cbor2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """`checks`: one a part, those of verifying first. `replays`: profile to the devices that can execute it here."""

    checks: tuple[Check, ...]
    can_verify: bool
    replays: Mapping[str, tuple[str, ...]]

    @property
    def failed(self) -> tuple[Check, ...]:
        """What is asked of this machine and is not there; a SKIP is not."""
        return tuple(check for check in self.checks if check.status is Status.FAIL)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with stable keys."""
        return {
            "can_verify": self.can_verify,
            "can_replay": {profile: list(devices) for profile, devices in self.replays.items()},
            "checks": [check.as_json() for check in self.checks],
        }


def examine(*, policy: Policy | None = None, weights: Path | None = None, now: int | None = None) -> Examination:
    """Examine this machine; `policy` and `weights`: and whether these fit it and each other. `now`: unix seconds."""
    at = int(time.time()) if now is None else now
    checks = [
        _done("installation", _installation),
        _done("clock", lambda: _clock(at)),
        _done("attested TLS", _tls),
        _done("signatures", _signatures),
        _done("Intel quotes", _quotes),
    ]
    can_verify = all(check.status is Status.PASS for check in checks)
    replays: dict[str, tuple[str, ...]] = {}
    for profile in PROFILES:
        if is_retired(profile):
            continue
        found = [_engine(profile, device) for device in ("cpu", "cuda")]
        checks += found
        fit = zip(("cpu", "cuda"), found, strict=True)
        replays[profile] = tuple(device for device, check in fit if check.status is Status.PASS)
    if policy is not None:
        checks.append(_done("policy", lambda: _policy(policy, at)))
    if weights is not None:
        checks.append(_done("weights", lambda: _weights(weights, policy)))
    return Examination(checks=tuple(_numbered(checks)), can_verify=can_verify, replays=replays)


class _Missing(Exception):
    """Why an examination failed, in words."""


def _done(name: str, examination: Callable[[], str]) -> Check:
    try:
        return Check(step="", name=name, status=Status.PASS, detail=examination())
    except CountermarkError as err:
        return Check(step="", name=name, status=Status.FAIL, detail=str(err), code=err.code)
    except Exception as err:  # noqa: BLE001  whatever a library says of itself is the finding
        why = str(err) if isinstance(err, _Missing) else f"{type(err).__name__}: {err}"
        return Check(step="", name=name, status=Status.FAIL, detail=why, code="doctor.missing")


def _numbered(checks: list[Check]) -> list[Check]:
    return [
        Check(step=str(number), name=check.name, status=check.status, detail=check.detail, code=check.code)
        for number, check in enumerate(checks, 1)
    ]


def _installation() -> str:
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    version = importlib.metadata.version("countermark")
    return f"countermark {version}, Python {platform.python_version()} on {sys.platform}; {libraries}"


def _clock(at: int) -> str:
    if at < _EARLIEST:
        raise _Missing(f"expected a time after {rfc3339(_EARLIEST)}, got {rfc3339(at)}: set the clock")
    return f"{rfc3339(at)}; freshness of evidence is judged by it"


def _tls() -> str:
    facts = _handshake()
    return f"{facts.version}, {facts.group}"


def _handshake() -> TlsFacts:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "countermark doctor")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        context = server_context(private_key=private, certificate=certificate.public_bytes(Encoding.DER))
        client, server = TlsEndpoint(client_context(), ours, server=False), TlsEndpoint(context, theirs, server=True)
        end = time.monotonic() + _HANDSHAKE_S
        while not all([client.handshake(), server.handshake()]):
            if time.monotonic() > end:
                raise _Missing("expected a TLS handshake with ourselves to end")
        facts = client.facts()
        if facts.exporter != server.facts().exporter:
            raise _Missing("expected the same TLS exporter at both ends")
        return facts


def _signatures() -> str:
    message, changed = b"countermark doctor", b"countermark doctos"
    p256, p384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    sha256, sha384 = ec.ECDSA(hashes.SHA256()), ec.ECDSA(hashes.SHA384())
    edwards = ed25519.Ed25519PrivateKey.generate()
    try:
        lattice44, lattice65 = mldsa.MLDSA44PrivateKey.generate(), mldsa.MLDSA65PrivateKey.generate()
    except UnsupportedAlgorithm as err:
        raise _Missing("expected ML-DSA (FIPS 204) from the library cryptography, got none: upgrade it") from err
    pairs: dict[str, tuple[bytes, Callable[[bytes, bytes], object]]] = {
        "ES256": (p256.sign(message, sha256), lambda s, m: p256.public_key().verify(s, m, sha256)),
        "ES384": (p384.sign(message, sha384), lambda s, m: p384.public_key().verify(s, m, sha384)),
        "Ed25519": (edwards.sign(message), edwards.public_key().verify),
        "ML-DSA-44": (lattice44.sign(message), lattice44.public_key().verify),
        "ML-DSA-65": (lattice65.sign(message), lattice65.public_key().verify),
    }
    for name, (signature, verify) in pairs.items():
        verify(signature, message)
        try:
            verify(signature, changed)
        except InvalidSignature:
            continue
        raise _Missing(f"{name}: expected a changed message to be refused")
    return ", ".join(pairs)


def _quotes() -> str:
    import dcap_qvl  # noqa: PLC0415  what fails to load here is the finding

    if not callable(dcap_qvl.verify):
        raise _Missing("expected dcap-qvl to verify")
    return f"dcap-qvl {importlib.metadata.version('dcap-qvl')}"


def _engine(profile: str, device: str) -> Check:
    name = f"replay {profile} on {device}"
    found = tuple(entry_points(group=ENGINES, name=profile))
    try:
        if not found:
            raise ImportError(f"nothing is registered for {profile}")
        facts = found[0].load()(device)
    except (ImportError, CountermarkError) as err:
        advice = "pip install 'countermark[appliance]' for it" if isinstance(err, ImportError) else "none here"
        return Check(step="", name=name, status=Status.SKIP, detail=f"{advice} ({err})")
    except Exception as err:  # noqa: BLE001
        detail = f"{type(err).__name__}: {err}"
        return Check(step="", name=name, status=Status.FAIL, detail=detail, code="doctor.engine")
    detail = ", ".join(f"{key} {value}" for key, value in facts.items() if value)
    return Check(step="", name=name, status=Status.PASS, detail=detail)


def _policy(policy: Policy, at: int) -> str:
    if at > policy.not_after:
        raise _Missing(f"expired {rfc3339(policy.not_after)}: make a new one with `countermark policy new`")
    if not policy.images:
        raise _Missing("accepts no image yet: countermark policy pin MANIFEST")
    if not policy.weights_roots:
        raise _Missing("accepts no weights yet: countermark policy pin MANIFEST --weights ROOT")
    days = (policy.not_after - at) // _SECONDS_A_DAY
    kind = "SIMULATED platform, " if policy.simulated else ""
    return f"{kind}{len(policy.images)} image(s), {len(policy.weights_roots)} weights root(s), {days} days left"


def _weights(directory: Path, policy: Policy | None) -> str:
    profile = next(name for name in PROFILES if not is_retired(name))
    runner: Runner = load_runner(profile, directory)
    root = runner.weights_root
    if policy is not None and root not in policy.weights_roots:
        raise _Missing(f"the policy accepts other weights than these, {root.hex()}")
    size = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    return f"root {root.hex()}, every block checked, {size / 1e6:.0f} MB"
