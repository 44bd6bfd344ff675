"""Trying again, where that is safe: nothing was recorded, and every check is made anew.

Attesting again is always safe: a new connection, a new nonce, a new appraisal. A request is sent again only when no
INTENT of it can exist (`Recorded.NO`): a second record would say that the prompt was answered twice. Refused evidence
is never asked for again, because a node that fails a check is not talked to.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from countermark.errors import Recorded, Unavailable, UsageError

T = TypeVar("T")
_GROWTH: Final = 2.0
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

    def waits(self) -> Iterator[float]:
        """Between one attempt and the next, before a server's advice."""
        wait_s = self.first_wait_s
        for _ in range(self.attempts - 1):
            yield min(wait_s, self.longest_wait_s)
            wait_s *= _GROWTH


def is_safe(err: Unavailable) -> bool:
    """Whether the same call may be made again without a second record."""
    return err.recorded is Recorded.NO


def retrying(
    call: Callable[[], T],
    retry: Retry | None,
    *,
    while_: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """`call()`, and again while it raises an `Unavailable` that is safe to repeat. Raises what the last one raised.

    `while_`: whether there is still something to ask, such as a connection.

    A server that asks for more than the longest wait is taken at its word: its error is raised at once.
    """
    for own_s in retry.waits() if retry is not None else ():
        try:
            return call()
        except Unavailable as err:
            wait_s = max(own_s, err.retry_after_s or 0.0)
            if retry is None or wait_s > retry.longest_wait_s or not (is_safe(err) and while_()):
                raise
        sleep(wait_s * random.uniform(1.0, 1.0 + _JITTER))  # noqa: S311  spreads load; decides nothing
    return call()
