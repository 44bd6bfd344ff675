"""The TLS front end's process: terminates TLS 1.3 and forwards HTTP/2 to the gRPC server on 127.0.0.1.

Run by `frontend.FrontEnd` as `python -m countermark_appliance.frontend_process FD`, the control socket's number.

One selector loop serves every connection, a block at a time, so a client that is slow, stuck or not speaking TLS costs
the others nothing. The life of a connection: handshake and its checks; a loopback socket is bound, its port registered
with the service and the acknowledgement awaited; only then is it connected and do bytes flow. On the way out the entry
is removed, acknowledged, and only then is the port given back.

It sees plaintext and logs none of it; it knows nothing of gRPC, evidence or requests.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import sys
import time
from enum import Enum, auto
from typing import Any, Final

from OpenSSL import SSL

from countermark.errors import ChannelError
from countermark.wire.pump import READ, WRITE, Pump, watch
from countermark.wire.tls import TlsEndpoint, server_context, spki_digest
from countermark_appliance.frontend import Limits, forbid_core_dumps, receive_message, send_message

_TICK_S: Final = 0.5
_ACCEPT_BATCH: Final = 32
_BACKLOG: Final = 128
_LOST = (OSError, ChannelError, SSL.Error)


class _State(Enum):
    HANDSHAKE = auto()
    REGISTERING = auto()
    CONNECTING = auto()
    PUMPING = auto()
    LEAVING = auto()


class _Client:
    """One TLS connection and its loopback twin."""

    def __init__(self, number: int, tls: TlsEndpoint) -> None:
        self.number = number
        self.tls = tls
        self.upstream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.port = 0  # of `upstream`, once bound
        self.state = _State.HANDSHAKE
        self.pump: Pump | None = None
        self.masks = (0, 0)
        self.moved = 0  # bytes, both ways
        self.since = time.monotonic()  # of the last progress

    @property
    def interests(self) -> tuple[int, int]:
        match self.state:
            case _State.HANDSHAKE:
                return READ | (WRITE if self.tls.unsent else 0), 0
            case _State.CONNECTING:
                return 0, WRITE
            case _State.PUMPING if self.pump is not None:
                return self.pump.interests
        return 0, 0

    def overdue(self, limits: Limits, now: float) -> bool:
        waited = now - self.since
        if self.pump is None:
            return waited > limits.handshake_s
        return waited > (limits.stall_s if self.pump.stalled or self.pump.half_closed else limits.idle_s)


class _Loop:
    def __init__(self, control: socket.socket, settings: dict[str, Any], listener: socket.socket) -> None:
        self._control = control
        self._listener = listener
        self._context = server_context(private_key=settings["private_key"], certificate=settings["certificate"])
        self._spki = spki_digest(settings["certificate"])
        self._upstream = ("127.0.0.1", settings["upstream_port"])
        self._limits = Limits(**settings["limits"])
        self._clients: dict[int, _Client] = {}
        self._numbers = 0
        self._accepting = False
        self._draining = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve until the control socket ends."""
        self._listener.setblocking(False)
        self._selector.register(self._control, READ)
        ticked = 0.0
        while True:
            now = time.monotonic()
            if now - ticked >= _TICK_S:
                ticked = now
                self._tick(now)
            ready: dict[int, list[int]] = {}
            for key, mask in self._selector.select(_TICK_S):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._control:
                    message = receive_message(self._control)
                    if message is None:
                        return
                    self._command(message)
                else:
                    number, side = key.data
                    ready.setdefault(number, [0, 0])[side] |= mask
            for number, masks in ready.items():
                if number in self._clients:
                    self._advance(self._clients[number], *masks)

    def _tick(self, now: float) -> None:
        for client in list(self._clients.values()):
            moved = client.pump.bytes_sent + client.pump.bytes_received if client.pump else 0
            if moved != client.moved:
                client.moved, client.since = moved, now
            elif client.overdue(self._limits, now):
                self._leave(client)
        if not self._accepting and not self._draining:
            self._selector.register(self._listener, READ)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._selector.unregister(self._listener)
            self._accepting = False

    def _accept(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # out of descriptors: rest until the next tick
                self._stop_accepting()
                return
            if len(self._clients) >= self._limits.connections and not self._make_room():
                sock.close()
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._numbers += 1
            try:
                client = _Client(self._numbers, TlsEndpoint(self._context, sock, server=True))
            except OSError:
                sock.close()
                self._stop_accepting()
                return
            self._clients[client.number] = client
            self._advance(client, READ, 0)

    def _make_room(self) -> bool:
        """Give up the oldest unfinished handshake, else the quietest connection, so that silence holds no place."""
        now = time.monotonic()
        shaking = (one for one in self._clients.values() if one.state is _State.HANDSHAKE)
        quiet = (
            one
            for one in sorted(self._clients.values(), key=lambda one: one.since)
            if one.state is _State.PUMPING and now - one.since > self._limits.quiet_s
        )
        victim = next(shaking, None) or next(quiet, None)
        if victim is not None:
            self._leave(victim)
        return victim is not None

    def _command(self, message: object) -> None:
        match message:
            case ["ack", "open", int(number)]:
                client = self._clients[number]
                if client.state is _State.REGISTERING:
                    client.state = _State.CONNECTING
                    self._connect(client)
            case ["ack", "close", int(number)]:
                self._clients.pop(number).upstream.close()
            case ["drain"]:
                self._draining = True
                self._stop_accepting()
                self._listener.close()
            case _:
                raise ChannelError("control: unexpected message", code="frontend.message")

    def _advance(self, client: _Client, tls_mask: int, plain_mask: int) -> None:
        try:
            if client.state is _State.HANDSHAKE and client.tls.handshake():
                self._register(client)
            elif client.state is _State.CONNECTING and plain_mask & WRITE:
                self._connected(client)
            elif client.pump is not None and client.state is _State.PUMPING:
                client.pump.step(tls_mask, plain_mask)
                if client.pump.done:
                    self._leave(client)
                    return
            self._watch(client)
        except _LOST:
            self._leave(client)

    def _register(self, client: _Client) -> None:
        facts = client.tls.facts()
        client.upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.upstream.setblocking(False)
        client.upstream.bind(("127.0.0.1", 0))
        client.port = client.upstream.getsockname()[1]
        client.state = _State.REGISTERING
        send_message(self._control, ["open", client.number, client.port, facts.exporter, self._spki])

    def _connect(self, client: _Client) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                client.upstream.connect(self._upstream)
            self._watch(client)
        except _LOST:
            self._leave(client)

    def _connected(self, client: _Client) -> None:
        error = client.upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "upstream")
        client.pump = Pump(client.tls, client.upstream)
        client.state = _State.PUMPING
        client.since = time.monotonic()
        client.pump.start()

    def _leave(self, client: _Client) -> None:
        """Close both sides; the loopback port stays ours until the service has forgotten it."""
        if client.state is _State.LEAVING:
            return
        registered = client.state is not _State.HANDSHAKE
        client.state = _State.LEAVING
        self._watch(client)
        client.tls.sock.close()
        if registered:
            with contextlib.suppress(OSError):
                client.upstream.shutdown(socket.SHUT_RDWR)
            send_message(self._control, ["close", client.number, client.port])
        else:
            client.upstream.close()
            del self._clients[client.number]

    def _watch(self, client: _Client) -> None:
        sockets = (client.tls.sock, client.upstream)
        client.masks = watch(self._selector, sockets, client.masks, client.interests, client.number)


def main(control_fd: int) -> int:
    """Receive the settings, listen, serve until the service ends. Returns the exit status."""
    forbid_core_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the service's to handle
    with socket.socket(fileno=control_fd) as control:
        settings = receive_message(control)
        if settings is None:
            return 1
        try:
            family = socket.AF_INET6 if ":" in settings["host"] else socket.AF_INET
            listener = socket.create_server((settings["host"], settings["port"]), family=family, backlog=_BACKLOG)
        except OSError as err:
            send_message(control, ["refused", err.strerror or type(err).__name__])
            return 1
        with listener:
            send_message(control, ["listening", listener.getsockname()[1]])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service is gone
                _Loop(control, settings, listener).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
