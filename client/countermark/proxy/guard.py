"""Who may ask: not every web page that a browser on this machine has open, and with a key only who knows it.

A page of another site can send requests to loopback, and after DNS rebinding (its own name answered with 127.0.0.1)
read the answers. Against the first: a request that a browser marks as coming from elsewhere (`Origin`, RFC 6454;
`Sec-Fetch-Site`, W3C Fetch Metadata) is refused. Against the second: only names that are this proxy's own are accepted
as `Host` (RFC 9110, 7.2); a rebound name is not. Programs send neither header and are let in, as on any loopback port:
`--key-file` shuts out those that do not know the key.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from countermark.errors import RequestError

LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_METHODS: Final = "GET, POST, OPTIONS"
_EXPOSED: Final = (
    "x-countermark-receipt, x-countermark-node, x-countermark-simulated, x-countermark-resent, retry-after"
)


def is_loopback(host: str) -> bool:
    """Whether a listening address (no name but localhost) is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """`hosts`: further names that are ours, without port. `origins`: pages that may ask. `key`: what bearers show."""

    listen: str
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    key: bytes | None = field(default=None, repr=False)

    def check_browser(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers that let an allowed page read the answer. Raises `RequestError` (`proxy.host`, `proxy.origin`)."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise RequestError("host: expected a name of this proxy; --allow-host adds one", code="proxy.host")
        origin = headers.get("origin")
        if origin is not None:
            if origin in self.origins:
                return {
                    "access-control-allow-origin": origin,
                    "access-control-expose-headers": _EXPOSED,
                    "vary": "origin",
                }
            if origin.lower() != f"http://{host}".lower():
                message = "origin: expected no page of another site; --allow-origin admits one"
                raise RequestError(message, code="proxy.origin")
        elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RequestError("sec-fetch-site: expected no page of another site", code="proxy.origin")
        return {}

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raises `RequestError` (`proxy.key`)."""
        if self.key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            raise RequestError("authorization: expected this proxy's key as a bearer token", code="proxy.key")

    @staticmethod
    def preflight() -> dict[str, str]:
        """What a browser asks of an allowed page's request before it sends it (Fetch, CORS preflight)."""
        return {
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": "*, authorization",
            "access-control-max-age": "600",
        }

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower()
        if name in (*LOOPBACK_NAMES, self.listen.lower(), f"[{self.listen.lower()}]") or name in self.hosts:
            return True
        if is_loopback(self.listen):
            return False
        try:  # exposed: a number is no name that could be rebound
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True
