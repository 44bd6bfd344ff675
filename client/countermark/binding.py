"""Step 7: the quote's 64 bytes of report_data are about this verifier's challenge, this connection, these keys.

Rule (formats.report_data): report_data = SHA-512("countermark/attest/v1" || claims). In a session every claim we know
ourselves (our nonce, our TLS exporter, the key the peer showed) must be ours; together with the hash that is the same
as rebuilding the claims from our own values, and the claims we keep are the hashed ones. Offline (7b) nonce, exporter
and key are assertions of whoever made the bundle; only the hash is checked. Then every claim that was also measured
must agree with RTMR3, and the keys handed over must be the claimed ones.
Not checked here: whether the values are acceptable (policy), and the GPU digest (`gpu.appraise`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from countermark import keys
from countermark.errors import ChannelError, MeasurementError
from countermark.formats.boot_events import BootEvents
from countermark.formats.evidence import Evidence
from countermark.formats.report_data import Claims, Purpose, keys_digest, report_data
from countermark.keys import PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What the client itself knows of its TLS connection: its nonce, the exporter, SHA-256 of the peer's SPKI."""

    nonce: bytes  # 32
    exporter: bytes  # 32
    peer_spki: bytes  # 32
    group: str
    version: str


def verify_binding(evidence: Evidence, claims: Claims, quoted: bytes, connection: Connection | None) -> None:
    """Step 7 (with a connection) or 7b (None): `quoted` is report_data from the verified quote.

    Raises `MeasurementError` `claims.report_data`, or `ChannelError`: `claims.purpose`, `claims.nonce`,
    `claims.exporter`, `claims.tls_spki`.
    """
    hashed = report_data(evidence.claims)
    if hashed != quoted:
        message = f"report_data: expected {hashed.hex()} for these claims, got {quoted.hex()}"
        raise MeasurementError(message, code="claims.report_data")
    ours: dict[str, bytes | Purpose] = {"purpose": Purpose.SESSION}
    if connection is not None:
        ours |= {"nonce": connection.nonce, "exporter": connection.exporter, "tls_spki": connection.peer_spki}
    for name, wanted in ours.items():
        got = getattr(claims, name)
        if got != wanted:
            raise ChannelError(f"{name}: expected {_text(wanted)}, got {_text(got)}", code=f"claims.{name}")


def _text(value: bytes | Purpose | None) -> str:
    return value.hex() if isinstance(value, bytes) else value.value if value else "none"


def verify_measured(evidence: Evidence, claims: Claims, boot: BootEvents) -> Mapping[str, PublicKey]:
    """Step 7, second half: claims agree with RTMR3, and the keys in the evidence are the claimed and measured ones.

    Returns the keys by role. Raises `MeasurementError` `claims.image_id`, `claims.weights_root`, `claims.config`,
    `claims.keys`, `claims.keys_differ`, `claims.tls_key`, or `FormatError` `cose_key.public`.
    """
    for name in ("image_id", "weights_root", "config", "keys"):
        claimed, measured = getattr(claims, name), getattr(boot, name)
        if claimed != measured:
            message = f"{name}: expected {measured.hex()} as measured into RTMR3, got {claimed.hex()} in the claims"
            raise MeasurementError(message, code=f"claims.{name}")
    found = keys_digest(evidence.keys)
    if found != claims.keys:
        message = f"keys: expected {claims.keys.hex()} as claimed, got {found.hex()} for those handed over"
        raise MeasurementError(message, code="claims.keys_differ")
    by_role = {item.role: keys.load(item.key) for item in evidence.keys}
    if by_role["tls"].spki_digest != claims.tls_spki:
        message = f"tls key: expected {claims.tls_spki.hex()}, got {by_role['tls'].spki_digest.hex()}"
        raise MeasurementError(message, code="claims.tls_key")
    return by_role
