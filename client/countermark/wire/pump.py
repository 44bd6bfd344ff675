"""The byte pump: plaintext on one socket, TLS on the other, one block at a time in each direction.

Used at both ends: the client's channel and the appliance's front end. Back-pressure: a side is read only when what it
gave before has been written, so that at most one block (256 KiB) waits in each direction and a peer that stops reading
stops its sender and nobody else. Half-close: the end of one direction is passed on (FIN <-> close_notify) after its
last byte; the other direction goes on. The pump does no waiting: its owner's selector does.
"""

from __future__ import annotations

import selectors
import socket

from countermark.wire.tls import BLOCK_BYTES, TlsEndpoint

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Pump:
    """Moves bytes between `tls` (handshake finished) and `plain` (connected, non-blocking). Not thread-safe.

    The owner calls `start` once, then `step` whenever its selector reports one of `interests`, until `done`. All three
    raise `OSError` when a side is lost and `ChannelError` when the TLS peer breaks the protocol; the owner then closes
    both sockets.
    """

    def __init__(self, tls: TlsEndpoint, plain: socket.socket) -> None:
        plain.setblocking(False)
        self._tls = tls
        self._plain = plain
        self._to_plain = memoryview(b"")
        self._plain_ended = False  # nothing more comes from plain
        self._plain_told = False  # plain knows that nothing more comes from TLS
        self.bytes_received = 0
        self.bytes_sent = 0

    def start(self) -> None:
        """Pass on what came together with the end of the handshake: no selector will report it."""
        self._read_tls()

    @property
    def interests(self) -> tuple[int, int]:
        """Event masks to wait for: (on the TLS socket, on the plain socket)."""
        tls = 0 if self._to_plain or self._tls.received_end else READ
        plain = 0 if self._tls.unsent or self._plain_ended else READ
        return tls | (WRITE if self._tls.unsent else 0), plain | (WRITE if self._to_plain else 0)

    @property
    def stalled(self) -> bool:
        """The TLS peer has not taken what it was sent."""
        return bool(self._tls.unsent)

    @property
    def half_closed(self) -> bool:
        return self._plain_ended or self._tls.received_end

    @property
    def done(self) -> bool:
        """Both directions have ended and are written."""
        return self._plain_ended and self._plain_told and not self._tls.unsent

    def step(self, tls_events: int, plain_events: int) -> None:
        """Do what the events allow: at most one block in each direction, so that one owner serves many pumps fairly."""
        wants_tls, wants_plain = self.interests
        tls_events &= wants_tls
        plain_events &= wants_plain
        if plain_events & WRITE:
            self._write_plain()
        if tls_events & READ:
            self._read_tls()
        if tls_events & WRITE:
            self._tls.flush()
        if plain_events & READ:
            self._read_plain()

    def _read_tls(self) -> None:
        data = self._tls.receive()
        self.bytes_received += len(data)
        self._to_plain = memoryview(data)
        self._write_plain()

    def _write_plain(self) -> None:
        while self._to_plain:
            try:
                self._to_plain = self._to_plain[self._plain.send(self._to_plain) :]
            except (BlockingIOError, InterruptedError):
                return
        if self._tls.received_end and not self._plain_told:
            self._plain_told = True
            self._plain.shutdown(socket.SHUT_WR)

    def _read_plain(self) -> None:
        try:
            data = self._plain.recv(BLOCK_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        if data:
            self.bytes_sent += len(data)
            self._tls.send(data)
        else:
            self._plain_ended = True
            self._tls.end()


def watch(
    selector: selectors.BaseSelector,
    sockets: tuple[socket.socket, socket.socket],
    old: tuple[int, int],
    new: tuple[int, int],
    owner: object = None,
) -> tuple[int, int]:
    """Register, change or drop a pump's sockets (TLS, plain) as its interests go from `old` to `new`; returns `new`.

    Each is registered with the data (`owner`, 0 for TLS or 1 for plain).
    """
    for side, (sock, before, after) in enumerate(zip(sockets, old, new, strict=True)):
        if before == after:
            continue
        if not before:
            selector.register(sock, after, (owner, side))
        elif not after:
            selector.unregister(sock)
        else:
            selector.modify(sock, after, (owner, side))
    return new
