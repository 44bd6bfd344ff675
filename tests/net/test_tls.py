"""TLS parameters at both ends, against ourselves and against the standard library's ssl (OpenSSL without ML-KEM)."""

from __future__ import annotations

import selectors
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from net_helpers import Identity, make_identity
from OpenSSL import SSL, crypto

from countermark.errors import ChannelError
from countermark.wire import tls
from countermark.wire.pump import Pump, watch


def both_ends(
    identity: Identity,
    client_context: SSL.Context | None = None,
    *,
    server_context: SSL.Context | None = None,
    session: SSL.Session | None = None,
) -> tuple[tls.TlsEndpoint, tls.TlsEndpoint]:
    """Two endpoints (server, client) over a socket pair; the handshake is run to its end."""
    left, right = socket.socketpair()
    own = server_context or tls.server_context(private_key=identity.key, certificate=identity.certificate)
    server = tls.TlsEndpoint(own, left, server=True)
    client = tls.TlsEndpoint(client_context or tls.client_context(), right, server=False)
    if session is not None:
        client._tls.set_session(session)
    done = [False, False]
    for _ in range(10):
        done = [client.handshake(), server.handshake()]
        if all(done):
            break
    assert all(done)
    return server, client


def test_both_ends_agree(identity: Identity) -> None:
    server, client = both_ends(identity)
    ours, theirs = server.facts(), client.facts()
    assert ours.exporter == theirs.exporter
    assert len(ours.exporter) == 32
    assert (theirs.group, theirs.version) == ("X25519MLKEM768", "TLSv1.3")
    key = x509.load_der_x509_certificate(identity.certificate).public_key()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    assert theirs.peer_spki == digest.finalize() == tls.spki_digest(identity.certificate)
    assert theirs.peer_certificate == identity.certificate
    assert ours.peer_spki == b""


def test_exporters_differ_between_connections(identity: Identity) -> None:
    assert both_ends(identity)[0].facts().exporter != both_ends(identity)[0].facts().exporter


def weaker_client(*, curve: ec.EllipticCurve | None = None, alpn: bytes | None = b"h2") -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    if curve is not None:
        context.set_tmp_ecdh(curve)
    if alpn is not None:
        context.set_alpn_protos([alpn])
    return context


@pytest.mark.parametrize(
    ("context", "code"),
    [
        (weaker_client(curve=ec.SECP256R1()), "channel.group"),
        (weaker_client(alpn=None), "channel.alpn"),
        (weaker_client(alpn=b"http/1.1"), "channel.alpn"),
    ],
)
def test_both_ends_refuse_weaker_parameters(identity: Identity, context: SSL.Context, code: str) -> None:
    for end in both_ends(identity, context):
        with pytest.raises(ChannelError) as caught:
            end.facts()
        assert caught.value.code == code


def test_server_refuses_tls_1_2(identity: Identity) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    left, right = socket.socketpair()
    with left, right:
        server_context = tls.server_context(private_key=identity.key, certificate=identity.certificate)
        server = tls.TlsEndpoint(server_context, left, server=True)
        client = tls.TlsEndpoint(context, right, server=False)
        assert not client.handshake()
        with pytest.raises(ChannelError) as caught:
            server.handshake()
        assert caught.value.code == "channel.tls"
        with pytest.raises(ChannelError):  # it was told why: an alert, not a bare end
            client.handshake()


def test_client_refuses_tls_1_2(identity: Identity) -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    left, right = socket.socketpair()
    with left, right:
        server = tls.TlsEndpoint(context, left, server=True)
        client = tls.TlsEndpoint(tls.client_context(), right, server=False)
        assert not client.handshake()
        with pytest.raises(ChannelError):
            server.handshake()
        with pytest.raises(ChannelError) as caught:
            client.handshake()
        assert caught.value.code == "channel.tls"


def test_garbage_and_early_end_are_tls_errors() -> None:
    left, right = socket.socketpair()
    with left, right:
        client = tls.TlsEndpoint(tls.client_context(), left, server=False)
        right.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ChannelError) as caught:
            client.handshake()
        assert caught.value.code == "channel.tls"
    left, right = socket.socketpair()
    with left:
        client = tls.TlsEndpoint(tls.client_context(), left, server=False)
        right.close()
        with pytest.raises(OSError):
            client.handshake()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("field", "value"), [(b"\xa0\x03\x02\x01", b"\x03"), (b"\x17\x0d", b"9999")])
def test_a_certificate_that_only_openssl_reads_is_refused(identity: Identity, field: bytes, value: bytes) -> None:
    """Version 4, and a time that is none: OpenSSL finishes the handshake, cryptography raises what it likes."""
    bent = bytearray(identity.certificate)
    at = bent.index(field) + len(field)
    bent[at : at + len(value)] = value
    context = tls.server_context(private_key=identity.key, certificate=identity.certificate)
    context.use_certificate(crypto.load_certificate(crypto.FILETYPE_ASN1, bytes(bent)))
    _, client = both_ends(identity, server_context=context)
    for read in (client.facts, lambda: tls.spki_digest(bytes(bent))):
        with pytest.raises(ChannelError) as caught:
            read()
        assert caught.value.code == "channel.certificate"


def test_key_and_certificate_must_belong_together(identity: Identity) -> None:
    for key, certificate in (
        (make_identity().key, identity.certificate),
        (b"", identity.certificate),
        (identity.key, identity.certificate[:-1]),
    ):
        with pytest.raises(ChannelError) as caught:
            tls.server_context(private_key=key, certificate=certificate)
        assert caught.value.code == "channel.certificate"


def serve_one(identity: Identity, sock: socket.socket, errors: list[ChannelError]) -> None:
    """A blocking echo of TLS onto a plain socket pair, until the client leaves."""
    context = tls.server_context(private_key=identity.key, certificate=identity.certificate)
    end = tls.TlsEndpoint(context, sock, server=True)
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        try:
            while not end.handshake():
                selector.select()
            end.facts()
        except ChannelError as err:
            errors.append(err)
        sock.close()


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
def test_a_client_without_ml_kem_is_refused(identity: Identity, maximum: ssl.TLSVersion) -> None:
    """The standard library's OpenSSL is another implementation version; before 3.5 it knows only X25519."""
    left, right = socket.socketpair()
    errors: list[ChannelError] = []
    thread = threading.Thread(target=serve_one, args=(identity, left, errors))
    thread.start()
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = maximum
    context.set_alpn_protocols(["h2"])
    refused = False
    try:
        with context.wrap_socket(right) as client:
            refused = client.recv(1) == b""
    except OSError:
        refused = True
    thread.join(5)
    if maximum is ssl.TLSVersion.TLSv1_3 and ssl.OPENSSL_VERSION_INFO >= (3, 5):
        assert errors == []  # that library has the group, and offers it
    else:
        assert refused
        assert [err.code for err in errors] == ["channel.group" if maximum is ssl.TLSVersion.TLSv1_3 else "channel.tls"]


def test_sessions_cannot_be_resumed(identity: Identity) -> None:
    """OpenSSL sends tickets whatever we say; taking one up again gives a full handshake with another exporter."""
    contexts = {
        "client_context": tls.client_context(),
        "server_context": tls.server_context(private_key=identity.key, certificate=identity.certificate),
    }
    _, first = both_ends(identity, **contexts)
    assert first.receive() == b""  # takes the tickets in
    session = first._tls.get_session()
    assert session is not None
    _, second = both_ends(identity, **contexts, session=session)
    assert SSL._lib.SSL_session_reused(second._tls._ssl) == 0
    assert second.facts().exporter != first.facts().exporter


class Bench:
    """Both pumps over socket pairs in one loop: a | pump = tls = pump | b."""

    def __init__(self, identity: Identity) -> None:
        server, client = both_ends(identity)
        self.a, a_inner = socket.socketpair()
        self.b, b_inner = socket.socketpair()
        self.ends = [(server, a_inner), (client, b_inner)]
        self.pumps = [Pump(end, plain) for end, plain in self.ends]
        self.selector = selectors.DefaultSelector()
        self.masks = [(0, 0), (0, 0)]
        for pump in self.pumps:
            pump.start()

    def turn(self, timeout: float = 0.0) -> bool:
        """One round of the loop; False when nothing was ready."""
        for i, (end, plain) in enumerate(self.ends):
            self.masks[i] = watch(self.selector, (end.sock, plain), self.masks[i], self.pumps[i].interests, i)
        ready = [[0, 0], [0, 0]]
        events = self.selector.select(timeout)
        for key, mask in events:
            owner, side = key.data
            ready[owner][side] |= mask
        for pump, (tls_mask, plain_mask) in zip(self.pumps, ready, strict=True):
            if tls_mask or plain_mask:
                pump.step(tls_mask, plain_mask)
        return bool(events)

    def close(self) -> None:
        self.selector.close()
        for sock in (self.a, self.b, *(s for end, plain in self.ends for s in (end.sock, plain))):
            sock.close()


def test_pump_stops_reading_when_nobody_takes_the_bytes(identity: Identity) -> None:
    bench = Bench(identity)
    bench.a.setblocking(False)
    sent = 0
    block = bytes(range(256)) * 256
    for _ in range(2000):
        try:
            sent += bench.a.send(block[sent % len(block) :])
        except BlockingIOError:
            if not bench.turn():
                break
    else:
        pytest.fail("the pump took everything though nobody read")
    assert sent < 8 * 1024 * 1024
    received = bytearray()
    bench.b.setblocking(False)
    while len(received) < sent:
        bench.turn()
        try:
            received += bench.b.recv(1 << 20)
        except BlockingIOError:
            continue
    assert received == (block * (sent // len(block) + 1))[:sent]
    bench.close()


def test_half_close_passes_the_last_byte_and_leaves_the_other_direction(identity: Identity) -> None:
    bench = Bench(identity)
    data = bytes(300_000)
    threading.Thread(target=lambda: (bench.a.sendall(data), bench.a.shutdown(socket.SHUT_WR))).start()
    bench.b.setblocking(False)
    received = bytearray()
    ended = False
    while not ended:
        bench.turn(0.01)
        try:
            part = bench.b.recv(1 << 20)
        except BlockingIOError:
            continue
        received += part
        ended = not part
    assert len(received) == len(data)
    assert not any(pump.done for pump in bench.pumps)
    bench.b.setblocking(True)
    bench.b.sendall(b"still open this way")
    bench.b.shutdown(socket.SHUT_WR)
    while not all(pump.done for pump in bench.pumps):
        bench.turn(0.01)
    assert bench.a.recv(100) == b"still open this way"
    assert bench.a.recv(1) == b""
    bench.close()


def test_end_without_close_notify_is_a_loss(identity: Identity) -> None:
    server, client = both_ends(identity)
    client.receive()
    server.sock.close()
    with pytest.raises(OSError):
        client.receive()


def test_a_peer_that_never_reads_our_answers_is_cut_off(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = both_ends(identity)
    monkeypatch.setattr(tls, "MAX_UNSENT_BYTES", 1000)
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with pytest.raises(ChannelError) as caught:
        for _ in range(100):
            server.send(bytes(50_000))
    assert caught.value.code == "channel.tls"
    client.sock.close()
    server.sock.close()
