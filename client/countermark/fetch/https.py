"""One request to a service that hands out endorsements, under strict limits.

HTTP/1.1 (RFC 9112) over TLS 1.2 or later, the peer's name and certificate verified against the system's authorities or
against those of one file; there is no way to leave that out. Plain HTTP goes to this machine alone. Redirects are
refused, proxies and other settings of the environment ignored, the body and the time are capped. Messages name host and
status, never path or content.

Not checked here: what the body says; and how long the system takes to resolve a name.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from countermark.errors import Unavailable, UsageError

TIMEOUT_S: Final = 20.0
_MAX_URL: Final = 2048
_NAME: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63}){0,20}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Where to ask. `url`: the base, without query. `ca_file`: PEM authorities to use instead of the system's.

    Raises `UsageError` `usage.url`.
    """

    url: str
    ca_file: Path | None = None
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        _split(self.url)

    @property
    def host(self) -> str:
        """The name that messages give."""
        return _split(self.url).hostname or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A complete answer with status 200. `headers` by lower-case name."""

    headers: Mapping[str, str]
    body: bytes


def _split(url: str) -> urllib.parse.SplitResult:
    wanted = "expected https://HOST[:PORT][/PATH], or http:// to this machine"
    try:
        parts = urllib.parse.urlsplit(url)
        host, usable = parts.hostname or "", parts.port != 0
    except ValueError as err:
        raise UsageError(f"url: {wanted}, got {url!r:.80}", code="usage.url") from err
    usable &= url.isascii() and url.isprintable() and " " not in url and len(url) <= _MAX_URL
    usable &= not (parts.query or parts.fragment or "@" in parts.netloc)
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
        usable &= _NAME.fullmatch(host) is not None
    if not usable or not (parts.scheme == "https" or (parts.scheme == "http" and loopback)):
        raise UsageError(f"url: {wanted}, got {url!r:.80}", code="usage.url")
    return parts


def request(
    service: Service, path: str, *, max_bytes: int, body: bytes | None = None, content_type: str = ""
) -> Response:
    """GET `path` below the service's URL, or POST `body` to it; the answer, or an error.

    Raises `UsageError` `usage.file` (the authorities' file), and `Unavailable`: `endorsements.fetch.connection`,
    `endorsements.fetch.timeout`, `endorsements.fetch.status` (any but 200), `endorsements.fetch.too_long`.
    """
    parts = _split(service.url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    context = _context(service.ca_file) if secure else None
    headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "countermark"}
    if body is not None:
        headers["Content-Type"] = content_type
    started = time.monotonic()
    connection = http.client.HTTPConnection(host, parts.port or (443 if secure else 80), timeout=service.timeout_s)
    timer: threading.Timer | None = None
    try:
        connection.connect()
        if context is not None:
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
        timer = threading.Timer(service.timeout_s - (time.monotonic() - started), _cut, [connection.sock])
        timer.daemon = True
        timer.start()
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        target = parts.path.rstrip("/") + path
        connection.request("GET" if body is None else "POST", target or "/", body, headers)
        response = _read(connection.getresponse(), host, max_bytes)
        if time.monotonic() - started >= service.timeout_s:  # what is cut off may look like a whole body
            raise TimeoutError
        return response
    except (OSError, http.client.HTTPException) as err:
        if time.monotonic() - started >= service.timeout_s:
            message = f"{host}: expected an answer within {service.timeout_s:g} s, got none"
            raise Unavailable(message, code="endorsements.fetch.timeout") from err
        raise Unavailable(f"{host}: {_reason(err)}", code="endorsements.fetch.connection") from err
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # names and certificates are verified
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cafile=ca_file)
    except OSError as err:  # ssl.SSLError is one
        reason = "expected certificates in PEM" if isinstance(err, ssl.SSLError) else err.strerror
        raise UsageError(f"{ca_file}: {reason}", code="usage.file") from err
    return context


def _cut(sock: socket.socket) -> None:
    # The limit on each read would let a server go on for ever, a byte at a time. SSLSocket.shutdown is not for other
    # threads than the reading one; the system's is.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, host: str, max_bytes: int) -> Response:
    if response.status != 200:
        after = response.headers.get("Retry-After", "")
        message = f"{host}: expected status 200, got {response.status}"
        if 300 <= response.status < 400:
            message += " (redirects are not followed)"
        wait_s = float(after) if after.isascii() and after.isdigit() and len(after) < 7 else None
        raise Unavailable(message, code="endorsements.fetch.status", retry_after_s=wait_s)
    data = response.read(max_bytes + 1)
    if len(data) > max_bytes:
        message = f"{host}: expected at most {max_bytes} bytes, got more"
        raise Unavailable(message, code="endorsements.fetch.too_long")
    if response.length:
        raise http.client.IncompleteRead(data, response.length)
    return Response(headers={name.lower(): value for name, value in response.headers.items()}, body=data)


def _reason(err: Exception) -> str:
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {err.verify_message}"
    if isinstance(err, ssl.SSLError):
        return f"TLS: {err.reason or type(err).__name__}"
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    return f"not HTTP: {type(err).__name__}"
