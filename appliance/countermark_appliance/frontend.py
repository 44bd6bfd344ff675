"""The service's side of the TLS front end: starts its process, keeps the table of connections in step with it.

The process (`frontend_process`) gets one inherited socket: listen address, key and certificate come over it, never by
arguments or disk, and when it ends the process does too. Control messages are deterministic CBOR behind a 4-byte
length. The service sends a map of settings, then [`ack`, kind, number] and [`drain`]; the front end sends
[`listening`, port] or [`refused`, reason], then [`open`, number, port, exporter, spki] and [`close`, number, port].
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from countermark.errors import ChannelError, ConfigError, FormatError, Unavailable
from countermark.formats import cbor
from countermark.wire.tls import server_context
from countermark_appliance.connections import Connection, Connections

_MAX_MESSAGE_BYTES: Final = 1024 * 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost. `stall_s`: sent bytes not taken; `idle_s`: no byte in either direction; `quiet_s`: no
    byte for so long, and the place is given away when all are taken (our own clients ping every 30 s)."""

    connections: int = 256
    handshake_s: int = 10
    stall_s: int = 60
    idle_s: int = 900
    quiet_s: int = 90


class FrontEnd:
    """The service's handle on the front-end process."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, port: int) -> None:
        self.port = port
        self._process = process
        self._control = control
        self._lock = threading.Lock()

    @classmethod
    def start(
        cls,
        *,
        host: str,
        port: int,
        private_key: bytes,
        certificate: bytes,
        upstream_port: int,
        connections: Connections,
        limits: Limits | None = None,
        on_exit: Callable[[], None] | None = None,
        timeout_s: float = 30.0,
    ) -> Self:
        """Start the process and return once it listens (`port` 0: any free one; see `.port`).

        `private_key` is PKCS#8 DER, `certificate` DER. `on_exit` is called when the process ends for whatever reason.
        Raises `ConfigError` (`config.listen`) when the address cannot be listened on, `ChannelError`
        (`channel.certificate`), `Unavailable` (`frontend.start`) when the process does not come up.
        """
        server_context(private_key=private_key, certificate=certificate)
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "countermark_appliance.frontend_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(timeout_s)
        try:
            send_message(
                ours,
                {
                    "host": host,
                    "port": port,
                    "private_key": private_key,
                    "certificate": certificate,
                    "upstream_port": upstream_port,
                    "limits": asdict(limits or Limits()),
                },
            )
            answer = receive_message(ours)
        except (OSError, FormatError):
            answer = None
        match answer:
            case ["listening", int(bound)]:
                pass
            case _:
                ours.close()
                process.kill()
                process.wait()
                if isinstance(answer, list) and len(answer) == 2:
                    raise ConfigError(f"listen: {host}:{port}: {answer[1]}", code="config.listen")
                raise Unavailable("front end: process did not start", code="frontend.start")
        ours.settimeout(None)
        front_end = cls(process, ours, bound)
        threading.Thread(
            target=front_end._serve, args=(connections, on_exit), name="countermark-frontend", daemon=True
        ).start()
        return front_end

    def is_alive(self) -> bool:
        """The process is still there."""
        return self._process.poll() is None

    def drain(self) -> None:
        """Accept no more connections; those that exist go on."""
        with contextlib.suppress(OSError), self._lock:
            send_message(self._control, ["drain"])

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the process. What it still had to forward is lost: stop the gRPC server first. Idempotent."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _serve(self, connections: Connections, on_exit: Callable[[], None] | None) -> None:
        try:
            while (message := receive_message(self._control)) is not None:
                match message:
                    case ["open", int(number), int(port), bytes(exporter), bytes(spki)]:
                        connections.add(port, Connection(number=number, exporter=exporter, tls_spki=spki))
                    case ["close", int(number), int(port)]:
                        connections.remove(port)
                    case _:
                        raise ChannelError("front end: unexpected message", code="frontend.message")
                with self._lock:
                    send_message(self._control, ["ack", message[0], number])
        except (OSError, FormatError, ChannelError) as err:
            # A front end that is gone or talks nonsense: without the table in step, nobody may be served.
            _log.error("front end: %s", err)
        finally:
            self._control.close()
            connections.clear()
            if on_exit is not None:
                on_exit()


def forbid_core_dumps() -> None:
    """Both processes hold private keys and prompts: a crash must not leave them on a disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def send_message(control: socket.socket, value: object) -> None:
    """Write one control message. Raises `OSError` when the other side is gone."""
    data = cbor.encode(value)
    control.sendall(len(data).to_bytes(4, "big") + data)


def receive_message(control: socket.socket) -> Any:
    """Read one control message; None at the end. Reads not a byte more. Raises `OSError`, `FormatError`."""
    head = _exactly(control, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "big")
    if size > _MAX_MESSAGE_BYTES:
        raise FormatError(f"control message: {size} bytes", code="frontend.message")
    data = _exactly(control, size)
    return None if data is None else cbor.decode(data)


def _exactly(control: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = control.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
