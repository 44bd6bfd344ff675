"""Prometheus metrics of a node, and the port that answers a scrape with them.

Names follow Prometheus's conventions (prometheus.io/docs/practices/naming): a unit at the end, seconds and tokens.
Labels come from closed sets: finish reasons, and stable codes of ours, so that no request can make a new series of its
own. The port is plain HTTP for the operator's own network; it says counts, and how long things took.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from countermark.errors import ConfigError
from countermark_appliance.operations.observing import Ended, Watcher

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_CODE: Final = re.compile(r"[a-z][a-z0-9_.]{1,39}")
_MAX_CODES: Final = 256


class Metrics:
    """The counters of one node, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self._codes: set[str] = set()
        self._build = Info("countermark_node", "What runs here; the attested truth is in the evidence", registry=to)
        self._requests = Counter(
            "countermark_requests",
            "Requests by how they ended; `refused` before an INTENT",
            ["outcome"],
            registry=to,
        )
        self._refusals = Counter(
            "countermark_errors",
            "Requests that ended without a receipt, by stable code",
            ["code"],
            registry=to,
        )
        self._tokens = Counter("countermark_tokens", "Tokens by kind", ["kind"], registry=to)
        self._accepted = self._times("countermark_accept_seconds", "From a request to its durable INTENT")
        self._first = self._times("countermark_first_token_seconds", "From a request to its first token")
        self._total = self._times("countermark_request_seconds", "From a request to its receipt")
        self._attests = Counter("countermark_attests", "Evidence asked for, by outcome", ["outcome"], registry=to)
        self._running = Gauge("countermark_requests_running", "Requests between INTENT and end", registry=to)

    def _times(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def describe(self, facts: Mapping[str, str]) -> None:
        """The public facts of the node, as labels of one constant series."""
        self._build.info(dict(facts))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def watch(self) -> Watcher:
        """For one request."""
        return _Request(self)

    def attested(self, code: str) -> None:
        """`code`: empty when evidence was given."""
        self._attests.labels(outcome=self._label(code) or "given").inc()

    def accepted(self) -> None:
        self._running.inc()

    def ended(self, end: Ended) -> None:
        if end.accepted_s is not None:
            self._running.dec()
            self._accepted.observe(end.accepted_s)
        if end.first_token_s is not None:
            self._first.observe(end.first_token_s)
        if end.code:
            self._refusals.labels(code=self._label(end.code)).inc()
        else:
            self._total.observe(end.total_s)
        aborted = "refused" if end.accepted_s is None else "aborted"
        self._requests.labels(outcome=aborted if end.code else end.finish).inc()
        for kind, count in (
            ("prompt", end.prompt_tokens),
            ("prompt_cached", end.cached_tokens),
            ("output", end.output_tokens),
        ):
            self._tokens.labels(kind=kind).inc(count)

    def _label(self, code: str) -> str:
        """Codes are ours and few; should that ever be wrong, the rest shares one series."""
        if not code or code in self._codes:
            return code
        if len(self._codes) >= _MAX_CODES or not _CODE.fullmatch(code):
            return "other"
        self._codes.add(code)
        return code


class _Request:
    """One request's accepted and ended, in step with each other."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def accepted(self) -> None:
        self._metrics.accepted()

    def ended(self, end: Ended) -> None:
        self._metrics.ended(end)


class MetricsPort:
    """`http://HOST:PORT/metrics`. Make it with `open`."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread

    @classmethod
    def open(cls, metrics: Metrics, host: str, port: int) -> MetricsPort:
        """Raises `ConfigError` (`telemetry.metrics`)."""
        try:
            server, thread = start_http_server(port, host, metrics.registry)
        except OSError as err:
            message = f"telemetry.metrics: expected to listen on {host}:{port}, got {err.strerror}"
            raise ConfigError(message, code="telemetry.metrics") from err
        return cls(server, thread)

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
