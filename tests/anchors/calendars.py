"""What calendars of OpenTimestamps answer, and one on this machine."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from countermark.formats import ots
from vendor_service import Reply, Server, serving


def attestation(kind: bytes, payload: bytes) -> bytes:
    return b"\0" + kind + bytes([len(payload)]) + payload


def pending(uri: str) -> bytes:
    return attestation(ots.PENDING, bytes([len(uri)]) + uri.encode())


@dataclass
class Calendar:
    """Promises a block for whatever it is given; `mine` keeps the promises."""

    server: Server
    promised: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def take(self, digest: bytes) -> Reply:
        self.promised.append(hashlib.sha256(digest + b"calendar").digest())
        return Reply(b"\xf0\x08calendar\x08" + pending(self.url))

    def mine(self, height: int) -> bytes:
        """One block of all that was promised; its Merkle root."""
        root = hashlib.sha256(b"".join(self.promised)).digest()
        for at, message in enumerate(self.promised):
            before, after = (b"".join(part) for part in (self.promised[:at], self.promised[at + 1 :]))
            steps = b"".join(bytes([kind, len(part)]) + part for kind, part in ((0xF1, before), (0xF0, after)) if part)
            tree = steps + b"\x08" + attestation(ots.BITCOIN, bytes([height]))
            self.server.routes[f"/timestamp/{message.hex()}"] = Reply(tree)
        return root


@contextlib.contextmanager
def calendar() -> Iterator[Calendar]:
    with serving({}) as server:
        found = Calendar(server)
        server.routes["/digest"] = found.take
        yield found
