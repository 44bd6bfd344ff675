"""The client's channel against the front end: one connection, one local peer, and never a second of either."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from net_helpers import Identity, Node, Relay, start_node, wait_until
from OpenSSL import SSL

from countermark.channel import Channel, parse_address
from countermark.errors import ChannelError, ConfigError, CountermarkError, Unavailable, UsageError
from countermark_appliance.connections import Connections
from countermark_appliance.frontend import FrontEnd, Limits
from countermark_appliance.frontend_process import main as front_end_main


def once(channel: Channel, timeout: float | None = 10) -> Callable[[bytes], bytes]:
    call = channel.grpc_channel.unary_unary("/echo/once")
    return lambda request: call(request, timeout=timeout)


@pytest.fixture
def relay(node: Node) -> Iterator[Relay]:
    relay = Relay(("127.0.0.1", node.front_end.port))
    yield relay
    relay.close()


def test_registered_with_the_same_exporter(node: Node) -> None:
    channel = Channel.open(node.address)
    assert once(channel)(b"hello") == b"hello"
    connection = node.connections.of(node.echo.peers[-1])
    assert connection.exporter == channel.facts.exporter
    assert connection.tls_spki == channel.facts.peer_spki
    peer = node.echo.peers[-1]
    channel.close()
    assert channel.failure() is None
    wait_until(lambda: len(node.connections) == 0)
    with pytest.raises(ChannelError) as caught:
        node.connections.of(peer)
    assert caught.value.code == "channel.unregistered"


def test_connections_have_their_own_entries(node: Node) -> None:
    first, second = Channel.open(node.address), Channel.open(node.address)
    once(first)(b"1")
    once(second)(b"2")
    entries = [node.connections.of(peer) for peer in node.echo.peers[-2:]]
    assert entries[0].exporter == first.facts.exporter != second.facts.exporter == entries[1].exporter
    assert entries[0].number != entries[1].number
    first.close()
    second.close()


def test_big_messages_pass_whole(node: Node) -> None:
    channel = Channel.open(node.address)
    data = os.urandom(3_900_000)
    assert once(channel)(data) == data
    with pytest.raises(grpc.RpcError) as caught:
        once(channel)(bytes(4 * 1024 * 1024 + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert once(channel)(b"still works") == b"still works"
    channel.close()


def test_local_listener_accepts_once_and_is_gone(node: Node) -> None:
    channel = Channel.open(node.address)
    directory = channel._directory
    assert directory.stat().st_mode & 0o777 == 0o700
    once(channel)(b"x")
    assert not directory.exists()
    channel.close()


def test_a_stranger_at_the_local_socket_ends_the_channel(node: Node) -> None:
    """Not even another process of ours may take the place of our grpcio."""
    channel = Channel.open(node.address)
    code = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"
    subprocess.run(["python3", "-c", code, str(channel._directory / "h2")], check=False, timeout=10)
    failure = channel.failure(wait_s=5)
    assert failure is not None
    assert failure.code == "channel.local"
    with pytest.raises(grpc.RpcError):
        once(channel, 2)(b"prompt")
    channel.close()


def test_closing_before_the_first_call(node: Node) -> None:
    channel = Channel.open(node.address)
    channel.close()
    assert channel.is_over
    assert not channel._directory.exists()


def test_cut_connection_is_never_replaced(node: Node, relay: Relay) -> None:
    channel = Channel.open(relay.address)
    once(channel)(b"first")
    relay.cut()
    failure = channel.failure(wait_s=5)
    assert failure is not None
    assert failure.code == "channel.lost"
    before = len(node.echo.peers)
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as caught:
            once(channel, 1)(b"prompt that must not travel")
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    time.sleep(0.3)
    assert relay.connections == 1
    assert len(node.echo.peers) == before
    channel.close()


def test_wait_for_ready_does_not_bring_it_back(node: Node, relay: Relay) -> None:
    channel = Channel.open(relay.address)
    once(channel)(b"first")
    relay.cut()
    channel.failure(wait_s=5)
    with pytest.raises(grpc.RpcError):
        channel.grpc_channel.unary_unary("/echo/once")(b"prompt", wait_for_ready=True, timeout=2)
    assert relay.connections == 1
    channel.close()


def refused(address: str, timeout_s: float = 5) -> CountermarkError:
    with pytest.raises(CountermarkError) as caught:
        Channel.open(address, timeout_s=timeout_s)
    return caught.value


def test_addresses() -> None:
    assert parse_address("[::1]:7") == ("::1", 7)
    for text in ("", "host", "host:0", "host:99999", "ho st:1", "host:1\n", "::1:7"):
        with pytest.raises(UsageError) as caught:
            parse_address(text)
        assert caught.value.code == "usage.address"


def test_nobody_there_and_nobody_answering(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert refused(address, 0.3).code == "channel.timeout"
    assert refused(address).code == "channel.connect"
    assert refused("a..b:1").code == "channel.connect"
    assert isinstance(refused(address), Unavailable)
    assert refused(f"127.0.0.1:{node.upstream_port}").code == "channel.tls"  # gRPC in the clear


def test_a_server_without_the_group_is_refused(identity: Identity, tmp_path: Path) -> None:
    """The standard library as server: TLS 1.3 with h2, but another group."""
    if ssl.OPENSSL_VERSION_INFO >= (3, 5):
        pytest.skip("this library's server has the group")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(ssl.DER_cert_to_PEM_cert(identity.certificate))
    key.write_text(ssl.DER_cert_to_PEM_cert(identity.key).replace("CERTIFICATE", "PRIVATE KEY"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    received: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        try:
            with context.wrap_socket(sock, server_side=True) as connection:
                received.append(connection.recv(100))
        except OSError:
            received.append(b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        assert refused(f"127.0.0.1:{listener.getsockname()[1]}").code == "channel.group"
        thread.join(5)
    assert received == [b""]


def test_plaintext_and_stuck_clients_disturb_nobody(identity: Identity) -> None:
    nodes = start_node(identity, Limits(connections=6, handshake_s=1, stall_s=60, idle_s=60))
    node = next(nodes)
    good = Channel.open(node.address)
    target = ("127.0.0.1", node.front_end.port)
    plain = socket.create_connection(target)
    plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    silent = socket.create_connection(target)
    half = socket.create_connection(target)
    half.sendall(b"\x16\x03\x01\x02")
    assert once(good)(b"fine") == b"fine"
    plain.settimeout(3)
    answer = plain.recv(100)
    assert not answer or answer[0] == 0x15  # a TLS alert, then the end
    for sock in (silent, half):
        sock.settimeout(4)
        assert sock.recv(1) == b""  # out of time
        sock.close()
    assert once(good)(b"fine") == b"fine"
    good.close()
    nodes.close()


def test_a_client_that_stops_reading_stalls_only_itself(identity: Identity) -> None:
    nodes = start_node(identity, Limits(stall_s=1))
    node = next(nodes)
    relay_target = ("127.0.0.1", node.front_end.port)
    hog = Channel.open(node.address)
    stream = hog.grpc_channel.unary_stream("/echo/many")(bytes(2_000_000))
    next(stream)  # and not one more
    other = Channel.open("{}:{}".format(*relay_target))
    times = []
    for _ in range(50):
        started = time.perf_counter()
        assert once(other)(b"ping") == b"ping"
        times.append(time.perf_counter() - started)
    assert sorted(times)[25] < 0.1
    assert node.echo.sent < 64 * 2_000_000  # the sender waits
    stream.cancel()
    hog.close()
    other.close()
    nodes.close()


def test_a_client_that_takes_nothing_from_tcp_is_cut_off(identity: Identity) -> None:
    def flood() -> None:
        sock, _ = upstream.accept()
        try:
            while True:
                sock.sendall(bytes(1 << 20))
        except OSError:
            sock.close()

    with socket.create_server(("127.0.0.1", 0)) as upstream:
        threading.Thread(target=flood, daemon=True).start()
        connections = Connections()
        front_end = FrontEnd.start(
            host="127.0.0.1",
            port=0,
            private_key=identity.key,
            certificate=identity.certificate,
            upstream_port=upstream.getsockname()[1],
            connections=connections,
            limits=Limits(stall_s=1),
        )
        _, sock = raw_client(front_end.port)
        wait_until(lambda: len(connections) == 1)
        wait_until(lambda: len(connections) == 0)
        sock.close()
        front_end.close()


def raw_client(port: int) -> tuple[SSL.Connection, socket.socket]:
    """A TLS client without HTTP/2 manners."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([b"h2"])
    sock = socket.create_connection(("127.0.0.1", port))
    connection = SSL.Connection(context, sock)
    connection.set_connect_state()
    connection.do_handshake()
    return connection, sock


def test_idle_connections_and_too_many_are_closed(identity: Identity) -> None:
    nodes = start_node(identity, Limits(connections=2, idle_s=1, handshake_s=5, stall_s=5))
    node = next(nodes)
    _, first = raw_client(node.front_end.port)
    _, second = raw_client(node.front_end.port)
    wait_until(lambda: len(node.connections) == 2)
    with socket.create_connection(("127.0.0.1", node.front_end.port)) as third:
        third.settimeout(3)
        assert third.recv(1) == b""
    wait_until(lambda: len(node.connections) == 0)  # both said nothing for a second
    first.close()
    second.close()
    channel = Channel.open(node.address)
    assert once(channel)(b"room again") == b"room again"
    channel.close()
    nodes.close()


def test_silence_holds_no_place(identity: Identity) -> None:
    """All places taken by clients that say nothing: one in its handshake, one after it; two that talk get in."""
    nodes = start_node(identity, Limits(connections=2, quiet_s=0))
    node = next(nodes)
    _, quiet = raw_client(node.front_end.port)
    wait_until(lambda: len(node.connections) == 1)
    with socket.create_connection(("127.0.0.1", node.front_end.port)):
        first = Channel.open(node.address)
        assert once(first)(b"in") == b"in"
        second = Channel.open(node.address)
        assert once(second)(b"in too") == b"in too"
    quiet.close()
    first.close()
    second.close()
    nodes.close()


def test_the_process_dies_with_a_killed_service(tmp_path: Path) -> None:
    code = (
        "import sys, time; from net_helpers import make_identity, start_node\n"
        "node = next(start_node(make_identity()))\n"
        "print(node.front_end._process.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as service:
        assert service.stdout is not None
        pid = int(service.stdout.readline())
        service.kill()
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    """Alive, and not merely waiting for its adopter to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bytes_that_are_not_http2_reach_no_handler(node: Node) -> None:
    before = len(node.echo.peers)
    connection, sock = raw_client(node.front_end.port)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    try:
        while connection.recv(1000):
            pass
    except (SSL.ZeroReturnError, SSL.SysCallError):
        pass
    assert len(node.echo.peers) == before
    sock.close()
    wait_until(lambda: len(node.connections) == 0)


def test_the_process_ends_when_its_control_socket_does(identity: Identity) -> None:
    """As when the service is killed: the kernel closes its end."""
    nodes = start_node(identity)
    node = next(nodes)
    process = node.front_end._process
    node.front_end._control.shutdown(socket.SHUT_RDWR)
    assert process.wait(5) == 0
    assert node.exited.wait(5)
    nodes.close()


def test_a_dead_front_end_is_noticed_and_nobody_stays_registered(identity: Identity) -> None:
    nodes = start_node(identity)
    node = next(nodes)
    channel = Channel.open(node.address)
    once(channel)(b"x")
    os.kill(node.front_end._process.pid, signal.SIGKILL)
    assert node.exited.wait(5)
    assert len(node.connections) == 0
    assert channel.failure(wait_s=5) is not None
    channel.close()
    nodes.close()


def test_drain_refuses_new_connections_and_keeps_old_ones(identity: Identity) -> None:
    nodes = start_node(identity)
    node = next(nodes)
    channel = Channel.open(node.address)
    once(channel)(b"x")
    node.front_end.drain()
    wait_until(lambda: refused(node.address, 0.5).code in ("channel.connect", "channel.timeout", "channel.lost"))
    assert once(channel)(b"still") == b"still"
    channel.close()
    nodes.close()


def test_an_address_in_use_is_said(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError) as caught:
        FrontEnd.start(
            host="127.0.0.1",
            port=taken.getsockname()[1],
            private_key=identity.key,
            certificate=identity.certificate,
            upstream_port=1,
            connections=Connections(),
        )
    assert caught.value.code == "config.listen"


def test_key_stays_out_of_arguments_and_environment(node: Node, identity: Identity) -> None:
    proc = Path("/proc") / str(node.front_end._process.pid)
    if not proc.exists():
        pytest.skip("no /proc here")
    assert (proc / "cmdline").read_bytes().split(b"\0")[2:4] == [b"-m", b"countermark_appliance.frontend_process"]
    assert identity.key not in (proc / "environ").read_bytes()
    assert front_end_main.__module__ == "countermark_appliance.frontend_process"


def test_a_crash_leaves_no_core(node: Node) -> None:
    limits = Path("/proc") / str(node.front_end._process.pid) / "limits"
    if not limits.exists():
        pytest.skip("no /proc here")
    line = next(line for line in limits.read_text().splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]
