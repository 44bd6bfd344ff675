"""The TLS connections that exist now, by the loopback port each one's plaintext comes from.

The front end terminates TLS in its own process and forwards HTTP/2 to the gRPC server over 127.0.0.1. It registers each
connection here before it forwards a byte and removes it before the port can be used again, so a peer that is not in
the table did not come through TLS. (Over a unix socket grpcio reports no peer that could be told apart.)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from countermark.errors import ChannelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """The quote a connection was given: its digest (header and body) and the log size it states."""

    quote_digest: bytes
    log_size: int


@dataclass(slots=True, kw_only=True)
class Connection:
    """One TLS connection. `attested` is set once, by its one successful Attest."""

    number: int
    exporter: bytes
    tls_spki: bytes
    attested: Attested | None = None
    _attesting: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin_attest(self) -> None:
        """Claim the connection's one Attest. Raises `ChannelError` (`channel.attested`) when it is used or in use."""
        with self._lock:
            if self._attesting or self.attested is not None:
                raise ChannelError("attest: expected once per connection, got another", code="channel.attested")
            self._attesting = True

    def end_attest(self, attested: Attested | None) -> None:
        """Finish what `begin_attest` began; None when no evidence was produced, so that the client may try again."""
        with self._lock:
            self._attesting = False
            self.attested = attested


class Connections:
    """Thread-safe table of connections by source port on 127.0.0.1."""

    def __init__(self) -> None:
        self._by_peer: dict[str, Connection] = {}
        self._lock = threading.Lock()

    def add(self, port: int, connection: Connection) -> None:
        with self._lock:
            if self._by_peer.setdefault(_peer(port), connection) is not connection:
                raise ChannelError(f"connection: port {port} is registered already", code="channel.registered")

    def remove(self, port: int) -> None:
        with self._lock:
            self._by_peer.pop(_peer(port), None)

    def clear(self) -> None:
        """Forget all: the front end is gone, so nothing that connects now came through it."""
        with self._lock:
            self._by_peer.clear()

    def of(self, peer: str) -> Connection:
        """The connection behind a gRPC peer name. Raises `ChannelError` (`channel.unregistered`)."""
        with self._lock:
            connection = self._by_peer.get(peer)
        if connection is None:
            raise ChannelError("peer: expected a connection of the front end", code="channel.unregistered")
        return connection

    def __len__(self) -> int:
        with self._lock:
            return len(self._by_peer)


def _peer(port: int) -> str:
    return f"ipv4:127.0.0.1:{port}"
