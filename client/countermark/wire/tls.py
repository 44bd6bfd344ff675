"""TLS 1.3 as both of our ends speak it, over memory BIOs, with the exporter that evidence is bound to.

RFC 8446 (TLS 1.3; 7.5 exporters), RFC 7301 (ALPN), draft-ietf-tls-ecdhe-mlkem (X25519MLKEM768). TLS 1.3 only, ALPN `h2`
only, X25519MLKEM768 only, no resumption and no 0-RTT. pyOpenSSL terminates it at both ends, because neither grpcio nor
the standard library's ssl exposes the exporter.

The group is checked after the handshake and before a byte of application data: pyOpenSSL cannot restrict the offer.
OpenSSL still sends its (stateful) session tickets; with the session cache off nothing can be resumed from them.

Not checked here: who the peer is. The client does no WebPKI verification: the certificate must parse and its key must
have signed the handshake; whether that key is the right one is decided by the quote (`countermark.appraise`).
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from countermark.errors import ChannelError

ALPN: Final = b"h2"
GROUP: Final = "X25519MLKEM768"
VERSION: Final = "TLSv1.3"
EXPORTER_LABEL: Final = b"EXPORTER-countermark-attest"
EXPORTER_BYTES: Final = 32
BLOCK_BYTES: Final = 256 * 1024
"""One read from a socket; also the most that waits in one direction."""
MAX_HANDSHAKE_BYTES: Final = 64 * 1024
MAX_UNSENT_BYTES: Final = 1024 * 1024
"""A peer that makes us answer (key updates) without reading the answers is cut off here."""
_RECORD_BYTES: Final = 16 * 1024
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What cryptography raises for certificates, some of which OpenSSL lets a peer show."""
_CIPHERS: Final = b"TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFacts:
    """What a finished handshake established. `peer_spki` is the SHA-256 of the peer's SubjectPublicKeyInfo (DER);
    empty where the peer showed no certificate (a server's view of its client)."""

    exporter: bytes
    group: str
    version: str
    cipher: str
    peer_spki: bytes
    peer_certificate: bytes


def server_context(*, private_key: bytes, certificate: bytes) -> SSL.Context:
    """The server's context from a PKCS#8 DER private key and a DER certificate.

    Raises `ChannelError` (`channel.certificate`) when they do not parse or do not belong together.
    """
    context = _context(SSL.TLS_SERVER_METHOD)
    try:
        key = serialization.load_der_private_key(private_key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ChannelError("tls: expected an EC private key", code="channel.certificate")
        context.use_privatekey(key)
        context.use_certificate(x509.load_der_x509_certificate(certificate))
        context.check_privatekey()
    except (*_UNREADABLE, SSL.Error) as err:
        raise ChannelError(
            f"tls: expected a key and its certificate, got {type(err).__name__}", code="channel.certificate"
        ) from err
    context.set_alpn_select_callback(_select_alpn)
    return context


def client_context() -> SSL.Context:
    """The client's context: offers h2, verifies no chain."""
    context = _context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([ALPN])
    context.set_verify(SSL.VERIFY_NONE)
    return context


def spki_digest(certificate: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo (DER) of a DER certificate. Raises `ChannelError` (`channel.certificate`)."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except _UNREADABLE as err:
        raise _bad_certificate(err) from err
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def _bad_certificate(err: Exception) -> ChannelError:
    return ChannelError(f"certificate: expected X.509, got {type(err).__name__}", code="channel.certificate")


def _context(method: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_CIPHERS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    return context


def _select_alpn(_connection: SSL.Connection, offered: Sequence[bytes]) -> bytes | SSL._NoOverlappingProtocols:
    # A callback that raises or answers oddly is undefined; `facts` refuses a connection without h2.
    return ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS


class TlsEndpoint:
    """One end of a TLS connection over a non-blocking socket. Not thread-safe: one thread drives it.

    Ciphertext that the socket did not take waits in `unsent`; the owner writes no more while it is not empty, so at
    most one block and what the handshake layer adds is ever held.
    """

    def __init__(self, context: SSL.Context, sock: socket.socket, *, server: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._server = server
        self._tls = SSL.Connection(context, None)
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
        self._handshake_bytes = 0
        self._closing = False
        self.unsent = memoryview(b"")
        self.received_end = False

    def handshake(self) -> bool:
        """Advance as far as the socket allows; True when the handshake is finished.

        Raises `ChannelError`: `channel.tls` (not TLS 1.3, a bad signature, an early end), or as `facts` does.
        Raises `OSError` when the connection is lost.
        """
        while True:
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                done = False
            except SSL.Error as err:
                self._collect()
                self._flush_alert()
                raise _tls_error(err) from err
            else:
                done = True
            self._collect()
            self.flush()
            if done:
                return True
            if not self._fill(_RECORD_BYTES):
                return False
            if self._handshake_bytes > MAX_HANDSHAKE_BYTES:
                raise ChannelError(f"tls: handshake longer than {MAX_HANDSHAKE_BYTES} bytes", code="channel.tls")

    def facts(self) -> TlsFacts:
        """What the finished handshake established, if it is what we require.

        Raises `ChannelError`: `channel.version`, `channel.group`, `channel.alpn` or `channel.certificate`.
        """
        version = self._tls.get_protocol_version_name()
        if version != VERSION:
            raise ChannelError(f"tls version: expected {VERSION}, got {version}", code="channel.version")
        group = self._tls.get_group_name()
        if group != GROUP:
            raise ChannelError(f"tls group: expected {GROUP}, got {group}", code="channel.group")
        alpn = self._tls.get_alpn_proto_negotiated()
        if alpn != ALPN:
            raise ChannelError(
                f"alpn: expected {ALPN.decode()}, got {alpn.decode(errors='replace')}", code="channel.alpn"
            )
        peer = b""
        if not self._server:
            try:
                shown = self._tls.get_peer_certificate(as_cryptography=True)
            except _UNREADABLE as err:
                raise _bad_certificate(err) from err
            if shown is None:
                raise ChannelError("certificate: expected one, got none", code="channel.certificate")
            peer = shown.public_bytes(serialization.Encoding.DER)
        return TlsFacts(
            exporter=self._tls.export_keying_material(EXPORTER_LABEL, EXPORTER_BYTES),
            group=group,
            version=version,
            cipher=self._tls.get_cipher_name() or "",
            peer_spki=spki_digest(peer) if peer else b"",
            peer_certificate=peer,
        )

    def receive(self) -> bytes:
        """Plaintext of at most about one block; empty when nothing is there now or the peer ended (`received_end`).

        Raises `OSError` when the connection is lost (an end without close_notify is a loss), `ChannelError`
        (`channel.tls`) on bad records.
        """
        plain = self._decrypt()
        if plain or self.received_end:
            return plain  # what came together with the end of the handshake
        return self._decrypt() if self._fill(BLOCK_BYTES) else b""

    def send(self, plain: bytes | memoryview) -> None:
        """Encrypt `plain` into `unsent` and write what the socket takes. Call only while `unsent` is empty."""
        rest = memoryview(plain)
        try:
            while rest:
                rest = rest[self._tls.send(rest) :]
        except SSL.Error as err:
            raise _tls_error(err) from err
        self._collect()
        self.flush()

    def flush(self) -> None:
        """Write of `unsent` what the socket takes now. Raises `OSError` when the connection is lost."""
        while self.unsent:
            try:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
            except (BlockingIOError, InterruptedError):
                return
        if self._closing:
            self._closing = False
            self.sock.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """Tell the peer that nothing more follows (close_notify, then FIN once it is written). Reading goes on."""
        try:
            self._tls.shutdown()
        except SSL.Error as err:
            raise _tls_error(err) from err
        self._closing = True
        self._collect()
        self.flush()

    def _fill(self, size: int) -> bool:
        """Read ciphertext from the socket; False when none is there now."""
        try:
            data = self.sock.recv(size)
        except (BlockingIOError, InterruptedError):
            return False
        if not data:
            raise ConnectionAbortedError("closed without close_notify")
        self._handshake_bytes += len(data)
        self._tls.bio_write(data)
        return True

    def _decrypt(self) -> bytes:
        blocks = []
        try:
            while True:
                blocks.append(self._tls.recv(_RECORD_BYTES))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.received_end = True
        except SSL.Error as err:
            raise _tls_error(err) from err
        self._collect()
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def _collect(self) -> None:
        """Move the ciphertext that OpenSSL has made to `unsent`."""
        made = [bytes(self.unsent)] if self.unsent else []
        try:
            while True:
                made.append(self._tls.bio_read(2 * BLOCK_BYTES))
        except SSL.WantReadError:
            pass
        if made:
            self.unsent = memoryview(made[0] if len(made) == 1 else b"".join(made))
        if len(self.unsent) > MAX_UNSENT_BYTES:
            raise ChannelError(f"tls: peer leaves {len(self.unsent)} bytes unread", code="channel.tls")

    def _flush_alert(self) -> None:
        try:
            self.flush()
        except OSError:
            self.unsent = memoryview(b"")  # the peer is gone; the error being raised says why


def _tls_error(err: SSL.Error) -> ChannelError:
    """OpenSSL's reasons hold no secret and no data of the peer's."""
    reasons = err.args[0] if err.args and isinstance(err.args[0], list) else []
    text = ", ".join(str(item[-1]) for item in reasons) or type(err).__name__
    return ChannelError(f"tls: expected TLS 1.3 with {GROUP}, got {text}", code="channel.tls")
