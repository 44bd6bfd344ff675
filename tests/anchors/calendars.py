"""What calendars of OpenTimestamps answer, and one on this machine."""

from __future__ import annotations

from countermark.formats import ots


def attestation(kind: bytes, payload: bytes) -> bytes:
    return b"\0" + kind + bytes([len(payload)]) + payload


def pending(uri: str) -> bytes:
    return attestation(ots.PENDING, bytes([len(uri)]) + uri.encode())
