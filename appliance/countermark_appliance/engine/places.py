"""The bounded queue's places: who may still come in, and when whoever may not should ask again.

A place is taken before a request is committed to, so that a busy engine refuses it while no log says that it was
accepted, and is held until its answer has ended. One client may hold at most half of them; requests of no client
(the process's own) are bounded by the whole only. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from countermark.errors import Unavailable

RETRY_S = (0.1, 30.0)
"""The shortest and the longest wait that a refusal advises."""


class Places:
    """`capacity` places. `wait_s` estimates how long until one is free, for the refusals."""

    def __init__(self, capacity: int, wait_s: Callable[[], float]) -> None:
        self._capacity = capacity
        self._share = max(1, capacity // 2)
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._taken = 0
        self._by_client: Counter[bytes] = Counter()

    def take(self, client: bytes = b"") -> Taken:
        """A place for a request of `client`; empty: nobody's in particular. Raises `Unavailable` (`engine.busy`)."""
        with self._lock:
            full, share = self._taken >= self._capacity, bool(client) and self._by_client[client] >= self._share
            if not full and not share:
                self._taken += 1
                if client:
                    self._by_client[client] += 1
                return Taken(self, client)
        least, most = RETRY_S
        raise Unavailable(
            f"engine: all {self._capacity} places are taken; retry later"
            if full
            else f"engine: {self._share} of {self._capacity} places are this connection's already; retry later",
            code="engine.busy",
            retry_after_s=min(most, max(least, self._wait_s())),
        )

    def _give(self, client: bytes) -> None:
        with self._lock:
            self._taken -= 1
            if client:
                self._by_client[client] -= 1
                if not self._by_client[client]:
                    del self._by_client[client]


class Taken:
    """One place, until `release`."""

    def __init__(self, places: Places, client: bytes) -> None:
        self._places: Places | None = places
        self._client = client
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give it back. Idempotent, any thread."""
        with self._lock:
            places, self._places = self._places, None
        if places is not None:
            places._give(self._client)
