"""One TLS connection to an appliance, with a gRPC channel inside it that can never reconnect.

grpcio gives no access to TLS exporters and reconnects silently, so it does neither here: it speaks HTTP/2 in the clear
over a unix socket in a private directory, a pump carries those bytes over one TLS connection whose exporter we hold,
and the local listener accepts exactly once. When either connection ends, the channel is over for good: there is nothing
left that grpcio could connect to.

Not checked here: whether the peer's key is the right one (the quote says so: `countermark.appraise`).
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import grpc

from countermark.errors import ChannelError, CountermarkError, Unavailable, UsageError
from countermark.wire.pump import READ, WRITE, Pump, watch
from countermark.wire.tls import TlsEndpoint, TlsFacts, client_context

MAX_RECEIVE_BYTES: Final = 16 * 1024 * 1024
MAX_SEND_BYTES: Final = 4 * 1024 * 1024
_CLOSE_S: Final = 2.0
_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.default_authority", "countermark"),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def parse_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` to its parts. Raises `UsageError` (`usage.address`)."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):(\d{1,5})", address)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UsageError(f"address: expected HOST:PORT, got {address!r}", code="usage.address")
    return match[1] or match[2], int(match[3])


class Channel:
    """One TLS connection and the gRPC channel that runs inside it. Make it with `Channel.open`; close it once."""

    facts: TlsFacts
    grpc_channel: grpc.Channel

    def __init__(self, tls: TlsEndpoint, facts: TlsFacts) -> None:
        self.facts = facts
        self._tls = tls
        self._failure: CountermarkError | None = None
        self._accepted = False
        self._closing = False
        self._over = threading.Event()
        self._stop, self._stopped = socket.socketpair()
        self._directory = Path(tempfile.mkdtemp(prefix="countermark-"))  # mode 0700
        path = self._directory / "h2"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
            self._listener.listen(1)
        except OSError as err:
            self._remove_listener()
            self._close_sockets()
            raise ChannelError(f"local socket: {err.strerror or err}", code="channel.local") from err
        self.grpc_channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._thread = threading.Thread(target=self._run, name="countermark-channel", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, address: str, *, timeout_s: float = 30.0) -> Channel:
        """Connect to `HOST:PORT`, finish the TLS handshake and check its parameters.

        Raises `Unavailable` (`channel.connect`, `channel.timeout`, `channel.lost`), `ChannelError` (`channel.tls`,
        `channel.version`, `channel.group`, `channel.alpn`, `channel.certificate`), `UsageError` (`usage.address`).
        """
        end = time.monotonic() + timeout_s
        try:
            sock = socket.create_connection(parse_address(address), timeout=timeout_s)
        except TimeoutError as err:
            raise Unavailable(f"{address}: no answer within {timeout_s:g} s", code="channel.timeout") from err
        except (OSError, UnicodeError) as err:  # UnicodeError: a host name that cannot be one
            reason = getattr(err, "strerror", None) or type(err).__name__
            raise Unavailable(f"{address}: {reason}", code="channel.connect") from err
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = TlsEndpoint(client_context(), sock, server=False)
            _handshake(tls, address, end)
            return cls(tls, tls.facts())
        except OSError as err:
            sock.close()
            raise Unavailable(f"{address}: connection lost in the TLS handshake", code="channel.lost") from err
        except BaseException:
            sock.close()
            raise

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def failure(self, *, wait_s: float = 0.0) -> CountermarkError | None:
        """Why the channel ended; None while it runs and after a close of our own.

        grpcio may notice an end before we have said why: `wait_s` waits that long for the end.
        """
        self._over.wait(wait_s)
        return self._failure

    def close(self) -> None:
        """End the connection: what was sent is delivered, then close_notify. Idempotent."""
        self._closing = True
        self.grpc_channel.close()
        if self._accepted:
            self._over.wait(_CLOSE_S)  # the pump sees grpcio's end and passes it on
        with contextlib.suppress(OSError):
            self._stop.send(b"x")
        self._thread.join()

    def _run(self) -> None:
        try:
            plain = self._accept()
            if plain is not None:
                with plain:
                    self._pump(Pump(self._tls, plain), plain)
        except ChannelError as err:
            self._fail(err)
        except OSError as err:
            self._fail(Unavailable(f"connection: lost ({type(err).__name__})", code="channel.lost"))
        finally:
            self._remove_listener()
            self._close_sockets()
            self._over.set()

    def _accept(self) -> socket.socket | None:
        """The one connection of our own grpcio; None when closed before it came."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, READ)
            selector.register(self._stopped, READ)
            if any(key.fileobj is self._stopped for key, _ in selector.select()):
                return None
        plain, _ = self._listener.accept()
        self._accepted = True
        self._remove_listener()
        if hasattr(socket, "SO_PEERCRED"):  # the directory is ours alone; so must the process be
            credentials = plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid = struct.unpack("3i", credentials)[0]
            if pid != os.getpid():
                plain.close()
                raise ChannelError(f"local socket: expected our own process, got {pid}", code="channel.local")
        return plain

    def _pump(self, pump: Pump, plain: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, READ)
            masks = (0, 0)
            pump.start()
            while not pump.done:
                masks = watch(selector, (self._tls.sock, plain), masks, pump.interests)
                events = {key.fileobj: mask for key, mask in selector.select()}
                if self._stopped in events:
                    return
                pump.step(events.get(self._tls.sock, 0), events.get(plain, 0))
                if self._tls.received_end:
                    self._fail(Unavailable("connection: ended by the server", code="channel.closed"))

    def _fail(self, err: CountermarkError) -> None:
        if self._failure is None and not self._closing:
            self._failure = err

    def _remove_listener(self) -> None:
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            (self._directory / "h2").unlink()
        with contextlib.suppress(FileNotFoundError):
            self._directory.rmdir()

    def _close_sockets(self) -> None:
        self._tls.sock.close()
        self._stop.close()
        self._stopped.close()


def _handshake(tls: TlsEndpoint, address: str, end: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(tls.sock, READ)
        while not tls.handshake():
            selector.modify(tls.sock, READ | WRITE if tls.unsent else READ)
            left = end - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise Unavailable(f"{address}: no TLS handshake in time", code="channel.timeout")
