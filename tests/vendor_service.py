"""A service of a vendor's on this machine, over HTTP or HTTPS, that answers as a test says."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass
class Reply:
    """`stall`: called with the handler instead of writing anything."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: Callable[[BaseHTTPRequestHandler], None] | None = None


@dataclass
class Server:
    """`routes`: path with query -> reply, or a function of the request's body. `asked`: what came."""

    url: str
    routes: dict[str, Reply | Callable[[bytes], Reply]]
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@contextlib.contextmanager
def serving(
    routes: dict[str, Reply | Callable[[bytes], Reply]], *, tls: tuple[Path, Path] | None = None
) -> Iterator[Server]:
    """`tls`: certificate and key files."""
    state = Server(url="", routes=routes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            state.asked.append((self.command, self.path, dict(self.headers.items()), body))
            reply = state.routes.get(self.path, Reply(status=404))
            reply = reply(body) if callable(reply) else reply
            with contextlib.suppress(OSError):
                if reply.stall is not None:
                    reply.stall(self)
                    return
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

        do_GET = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    state.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tls_files(folder: Path, *, address: str = "127.0.0.1", days: int = 1) -> tuple[Path, Path]:
    """A self-signed certificate for an address, valid from yesterday, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a cache of endorsements")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "service.pem", folder / "service.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def pccs_routes(
    collateral: bytes, *, fmspc: str, ca: str = "platform", update: str = "update=standard"
) -> dict[str, Reply | Callable[[bytes], Reply]]:
    """The four answers of a PCCS that has these endorsements (nine-field JSON)."""
    values = json.loads(collateral)

    def chain(name: str, field_name: str) -> dict[str, str]:
        return {name: urllib.parse.quote(values[field_name])}

    def signed(member: str, name: str) -> bytes:
        return f'{{"{member}":{values[name]},"signature":"{values[name + "_signature"]}"}}'.encode()

    return {
        f"/sgx/certification/v4/pckcrl?ca={ca}&encoding=der": Reply(
            bytes.fromhex(values["pck_crl"]), headers=chain("SGX-PCK-CRL-Issuer-Chain", "pck_crl_issuer_chain")
        ),
        f"/tdx/certification/v4/tcb?fmspc={fmspc.upper()}&{update}": Reply(
            signed("tcbInfo", "tcb_info"), headers=chain("TCB-Info-Issuer-Chain", "tcb_info_issuer_chain")
        ),
        f"/tdx/certification/v4/qe/identity?{update}": Reply(
            signed("enclaveIdentity", "qe_identity"),
            headers=chain("SGX-Enclave-Identity-Issuer-Chain", "qe_identity_issuer_chain"),
        ),
        "/sgx/certification/v4/rootcacrl": Reply(values["root_ca_crl"].encode()),
    }
