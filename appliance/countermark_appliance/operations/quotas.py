"""Who may ask, and how much: bearer keys with rates, quotas and places, from the measured configuration.

The configuration holds a key's SHA-256 and never the key. Keys are random (`countermark-appliance key new` makes 32
bytes), so a plain hash is enough. What is refused here is refused before anything is computed or recorded. Counters
live in memory: a restart forgives. Tokens are charged when an answer ends, so a key may overdraw by what it has
running; it then waits until the debt is paid.

A token bucket each: requests a minute with a burst of a minute's, tokens a day with a burst of a day's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from countermark.errors import ConfigError, RequestError, Unavailable
from countermark_appliance.operations.observing import Ended

MAX_KEYS: Final = 1024
MAX_KEY_CHARACTERS: Final = 256
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HEX32: Final = re.compile(r"[0-9a-f]{64}")
LIMITS: Final = {"requests_per_minute": 1_000_000, "tokens_per_day": 1 << 50, "concurrent": 4096}
_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One client's key. A limit of None is no limit."""

    name: str
    sha256: bytes
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent: int | None = None


def new_key() -> tuple[str, bytes]:
    """A key for a client, and its SHA-256 for the configuration."""
    key = "cmk-" + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).digest()


def parse_keys(document: object) -> tuple[Key, ...]:
    """The array of tables `[[key]]`. Raises `ConfigError`, naming the key."""
    if not isinstance(document, list) or len(document) > MAX_KEYS:
        raise ConfigError(f"key: expected at most {MAX_KEYS} tables [[key]]", code="config.value")
    keys = tuple(_parse_key(index, table) for index, table in enumerate(document, 1))
    for what, values in (("name", [key.name for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) != len(values):
            raise ConfigError(f"key.{what}: expected one of its own for each key", code="config.value")
    return keys


def _parse_key(index: int, table: object) -> Key:
    if not isinstance(table, dict):
        raise ConfigError(f"key {index}: expected a table [[key]]", code="config.value")
    known = ("name", "sha256", *LIMITS)
    for name in sorted(table.keys() - set(known)):
        message = f"config: expected a key of {', '.join(f'key.{one}' for one in known)}, got 'key.{name:.40}'"
        raise ConfigError(message, code="config.unknown_key")
    name, digest = table.get("name"), table.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"key.name: expected lower-case letters, digits, '.', '_' and '-', got {name!r:.70}"
        raise ConfigError(message, code="config.value")
    if not isinstance(digest, str) or not _HEX32.fullmatch(digest):
        raise ConfigError(f"key.sha256: expected 64 lower-case hex digits for {name}", code="config.value")
    limits: dict[str, int] = {}
    for limit, most in LIMITS.items():
        value = table.get(limit)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"key.{limit}: expected 1 to {most}, got {value!r:.40}", code="config.value")
        limits[limit] = value
    return Key(name=name, sha256=bytes.fromhex(digest), **limits)


class Quotas:
    """What each key has left. Thread-safe. Without keys everybody is admitted."""

    def __init__(self, keys: Iterable[Key], clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = tuple(_Account(key, clock) for key in keys)

    def admit(self, metadata: Mapping[str, str]) -> Lease | None:
        """A lease on the account of the call's `authorization: Bearer KEY`, to be told of the request's end.

        None where the node has no keys. Raises `RequestError` (`access.key`: none, or not one of ours), `Unavailable`
        (`quota.rate`, `quota.tokens`, `quota.concurrent`) with when to come back.
        """
        if not self._accounts:
            return None
        return self._account(metadata.get("authorization", "")).lease()

    def _account(self, value: str) -> _Account:
        scheme, _, key = value.partition(" ")
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        found = None
        for account in self._accounts:  # all of them, whichever it is: the time it takes tells nothing
            if hmac.compare_digest(account.key.sha256, digest):
                found = account
        if found is None or scheme.lower() != "bearer" or len(key) > MAX_KEY_CHARACTERS:
            got = "none" if not value else "another"
            raise RequestError(f"authorization: expected a key that this node knows, got {got}", code="access.key")
        return found


class Lease:
    """One request of a key: a `Watcher`, and something to give back when it never became one."""

    def __init__(self, account: _Account) -> None:
        self._account = account
        self._open = True

    @property
    def name(self) -> str:
        return self._account.key.name

    def accepted(self) -> None:
        """Nothing to do: it was admitted before."""

    def ended(self, end: Ended) -> None:
        if self._open:
            self._open = False
            self._account.settle(end.prompt_tokens + end.output_tokens)


class _Account:
    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self.key = key
        self._lock = threading.Lock()
        self._running = 0
        self._rate = _Bucket(key.requests_per_minute, _MINUTE_S, clock)
        self._tokens = _Bucket(key.tokens_per_day, _DAY_S, clock)

    def lease(self) -> Lease:
        with self._lock:
            most = self.key.concurrent
            if most is not None and self._running >= most:
                raise _refuse(f"{most} at a time", "quota.concurrent", 1.0)
            if (wait_s := self._tokens.wait_s(1.0)) > 0:
                raise _refuse(f"{self.key.tokens_per_day} tokens a day", "quota.tokens", wait_s)
            if (wait_s := self._rate.wait_s(1.0)) > 0:
                raise _refuse(f"{self.key.requests_per_minute} requests a minute", "quota.rate", wait_s)
            self._rate.take(1.0)
            self._running += 1
        return Lease(self)

    def settle(self, tokens: int) -> None:
        with self._lock:
            self._running -= 1
            self._tokens.take(float(tokens))


class _Bucket:
    """`amount` in `period_s`; may be overdrawn. None: without end. Not thread-safe."""

    def __init__(self, amount: int | None, period_s: float, clock: Callable[[], float]) -> None:
        self._amount = amount
        self._clock = clock
        self._per_s = 0.0 if amount is None else amount / period_s
        self._level, self._at = float(amount or 0), clock()

    def wait_s(self, needed: float) -> float:
        """Until so much is there; 0 when it is."""
        if self._amount is None:
            return 0.0
        now = self._clock()
        self._level = min(float(self._amount), self._level + (now - self._at) * self._per_s)
        self._at = now
        return max(0.0, (needed - self._level) / self._per_s)

    def take(self, amount: float) -> None:
        if self._amount is not None:
            self._level -= amount


def _refuse(allowed: str, code: str, wait_s: float) -> Unavailable:
    return Unavailable(f"key: expected {allowed}, got more", code=code, retry_after_s=wait_s)


def metadata_of(pairs: Iterable[Any]) -> dict[str, str]:
    """Text values of a call's metadata by name; of several under one name none, because which is meant is open."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for name, value in pairs:
        if name in found:
            twice.add(name)
        if isinstance(value, str):
            found[name] = value
    return {name: value for name, value in found.items() if name not in twice}
