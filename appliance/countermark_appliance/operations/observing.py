"""One request's life as counts and times, told to whoever watches: metrics, traces, a key's quota.

A watcher gets numbers and stable codes, never text: nothing it is told is a prompt, an answer, a salt or a message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from countermark_appliance.faults import describe

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a request ended. `code`: empty for an answer with a receipt, else that of what the client was told.

    Times are seconds since the request came; None for what did not happen. `cached_tokens`: of the prompt's, those that
    were not computed again.
    """

    code: str
    finish: str  # stop, length, ... or empty
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    accepted_s: float | None
    first_token_s: float | None
    total_s: float


class Watcher(Protocol):
    """Told of one request; both calls are quick and on the service's thread."""

    def accepted(self) -> None:
        """Its INTENT is durable."""

    def ended(self, end: Ended) -> None:
        """Once, whatever became of it."""


class Watchers:
    """Several as one. A watcher that fails is logged by type and place, and harms no request."""

    def __init__(self, watchers: Iterable[Watcher] = ()) -> None:
        self._watchers = tuple(watchers)

    def accepted(self) -> None:
        for watcher in self._watchers:
            try:
                watcher.accepted()
            except Exception as err:  # noqa: BLE001
                _log.error("watcher: unexpected %s", describe(err))

    def ended(self, end: Ended) -> None:
        for watcher in self._watchers:
            try:
                watcher.ended(end)
            except Exception as err:  # noqa: BLE001
                _log.error("watcher: unexpected %s", describe(err))
