"""Trying again, where that is safe: nothing was recorded, and every check is made anew.

Attesting again is always safe: a new connection, a new nonce, a new appraisal. A request is sent again only when no
INTENT of it can exist (`Recorded.NO`): a second record would say that the prompt was answered twice. Refused evidence
is never asked for again, because a node that fails a check is not talked to.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from countermark.errors import Recorded, Unavailable, UsageError

T = TypeVar("T")
_JITTER: Final = 0.25  # so that clients that were refused together do not come back together


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and for how long. `attempts`: in all, the first included. Waits in seconds; a server's advice counts.

    Raises `UsageError` (`usage.retry`).
    """

    attempts: int = 3
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0

    def __post_init__(self) -> None:
        if not (self.attempts >= 1 and 0 <= self.first_wait_s <= self.longest_wait_s):
            message = f"retry: expected at least one attempt and growing waits, got {self}"
            raise UsageError(message, code="usage.retry")

    def wait_s(self, attempt: int, err: Unavailable) -> float | None:
        """How long to wait after the failure of this attempt, the first being 1. None: it is not to be repeated.

        A server that asks for more than the longest wait is taken at its word.
        """
        own_s = min(self.first_wait_s * 2.0 ** min(attempt - 1, 64), self.longest_wait_s)
        wait_s = max(own_s, err.retry_after_s or 0.0)
        if attempt >= self.attempts or wait_s > self.longest_wait_s or err.recorded is not Recorded.NO:
            return None
        return wait_s * random.uniform(1.0, 1.0 + _JITTER)  # noqa: S311  spreads load; decides nothing


ONCE: Final = Retry(attempts=1)


def retrying(
    call: Callable[[], T],
    retry: Retry | None,
    *,
    while_: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """`call()`, and again while it raises an `Unavailable` that is safe to repeat. Raises what the last one raised.

    `while_`: whether there is still something to ask, such as a connection.
    """
    for attempt in itertools.count(1):
        try:
            return call()
        except Unavailable as err:
            wait_s = (retry or ONCE).wait_s(attempt, err)
            if wait_s is None or not while_():
                raise
            sleep(wait_s)
    raise AssertionError("counting has no end")
