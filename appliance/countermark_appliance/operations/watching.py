"""Who is told of a node's requests, put together once for the service: a key's quota, metrics, traces."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from countermark_appliance.faults import describe
from countermark_appliance.operations.observing import Ended, Watcher, Watchers
from countermark_appliance.operations.quotas import Quotas

_log = logging.getLogger(__name__)


class Metrics(Protocol):
    """`operations.metrics.Metrics`."""

    def watch(self) -> Watcher: ...

    def ended(self, end: Ended) -> None: ...

    def attested(self, code: str) -> None: ...


class Traces(Protocol):
    """`operations.traces.Traces`."""

    def watch(self, name: str, metadata: Mapping[str, str]) -> Watcher: ...


class Operations:
    """By default nobody is told and everybody is admitted."""

    def __init__(
        self, *, quotas: Quotas | None = None, metrics: Metrics | None = None, traces: Traces | None = None
    ) -> None:
        self._quotas = quotas or Quotas(())
        self._metrics = metrics
        self._traces = traces

    def admit(self, name: str, metadata: Mapping[str, str]) -> Watcher:
        """Who is to be told of a request that is let in. Raises as `Quotas.admit` does, and nothing once it is let in:
        a place that was taken is given back by the end of a request, so there must be one.
        """
        watchers: list[Watcher] = []
        if (lease := self._quotas.admit(metadata)) is not None:
            watchers.append(lease)
        try:
            if self._metrics is not None:
                watchers.append(self._metrics.watch())
            if self._traces is not None:
                watchers.append(self._traces.watch(name, metadata))
        except Exception as err:  # noqa: BLE001
            _log.error("watcher: unexpected %s", describe(err))
        return Watchers(watchers)

    def refused(self, code: str) -> None:
        """A request that was not let in."""
        if self._metrics is not None:
            self._metrics.ended(nothing_done(code))

    def attested(self, code: str) -> None:
        """Evidence was asked for; `code`: empty when it was given."""
        if self._metrics is not None:
            self._metrics.attested(code)


def nothing_done(code: str) -> Ended:
    """The end of what never began."""
    return Ended(
        code=code,
        finish="",
        prompt_tokens=0,
        output_tokens=0,
        cached_tokens=0,
        accepted_s=None,
        first_token_s=None,
        total_s=0.0,
    )
