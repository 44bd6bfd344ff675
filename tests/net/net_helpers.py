"""Keys, a TLS front end before a plain gRPC echo server, and a TCP relay that counts what passes."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from countermark_appliance.connections import Connections
from countermark_appliance.frontend import FrontEnd, Limits


@dataclass(frozen=True)
class Identity:
    key: bytes
    certificate: bytes


def make_identity() -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "countermark test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return Identity(
        key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(serialization.Encoding.DER),
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "condition not reached in time"
        time.sleep(0.005)


class Echo(grpc.GenericRpcHandler):
    """`/echo/once` returns the request; `/echo/many` sends the request 64 times."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.sent = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == "/echo/once":
            return grpc.unary_unary_rpc_method_handler(self._once)
        if details.method == "/echo/many":
            return grpc.unary_stream_rpc_method_handler(self._many)
        return None

    def _once(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.peers.append(context.peer())
        return request

    def _many(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(64):
            self.sent += len(request)
            yield request


@dataclass
class Node:
    front_end: FrontEnd
    connections: Connections
    echo: Echo
    upstream_port: int
    exited: threading.Event

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.front_end.port}"


def start_node(identity: Identity, limits: Limits | None = None) -> Iterator[Node]:
    echo = Echo()
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(8), handlers=[echo], options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connections = Connections()
    exited = threading.Event()
    front_end = FrontEnd.start(
        host="127.0.0.1",
        port=0,
        private_key=identity.key,
        certificate=identity.certificate,
        upstream_port=port,
        connections=connections,
        limits=limits,
        on_exit=exited.set,
    )
    yield Node(front_end, connections, echo, port, exited)
    front_end.close()
    server.stop(None)


@dataclass
class Relay:
    """A TCP relay in the middle: counts connections and client bytes, and can cut everything."""

    target: tuple[str, int]
    connections: int = 0
    client_bytes: list[int] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number = self.connections
            self.connections += 1
            self.client_bytes.append(0)
            server = socket.create_connection(self.target)
            self._sockets += [client, server]
            threading.Thread(target=self._copy, args=(client, server, number), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, None), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        try:
            while data := source.recv(65536):
                if number is not None:
                    self.client_bytes[number] += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def cut(self) -> None:
        """Reset every connection; new ones are still accepted and relayed."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._sockets.clear()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
