"""OpenTelemetry spans of requests, sent to a collector by OTLP over gRPC. Counts and times, never content.

A client that sends a W3C `traceparent` (w3.org/TR/trace-context) finds its request's span below its own; nothing else
of its metadata is read, and no baggage is kept. A collector that does not answer costs spans, never a request: they
wait in a bounded queue on a thread of their own. Attribute names follow OpenTelemetry's conventions for generative AI
where there is one (`gen_ai.usage.*`), and leave out those that would hold content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from countermark_appliance.operations.observing import Ended, Watcher

_QUEUE: Final = 4096
_EXPORT_MS: Final = 10_000
_PARENT: Final = "traceparent"
_MAX_PARENT: Final = 64


class Traces:
    """Makes a span for each request. Thread-safe."""

    def __init__(self, exporter: SpanExporter, facts: Mapping[str, str]) -> None:
        """`facts`: of the node, as resource attributes below `countermark.`."""
        named = {f"countermark.{name}": value for name, value in facts.items()}
        # Not `Resource.create`, which would read the environment.
        resource = Resource({"service.name": "countermark", **named})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(exporter, max_queue_size=_QUEUE, export_timeout_millis=_EXPORT_MS)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("countermark")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, url: str, facts: Mapping[str, str]) -> Traces:
        """To the OTLP/gRPC collector at `http://HOST:PORT`, or `https://`."""
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  slow

        return cls(OTLPSpanExporter(endpoint=url, insecure=url.startswith("http://")), facts)

    def watch(self, name: str, metadata: Mapping[str, str]) -> Watcher:
        """A span for one request, from now on."""
        parent = metadata.get(_PARENT, "")
        carrier = {_PARENT: parent} if 0 < len(parent) <= _MAX_PARENT else {}
        context = self._propagator.extract(carrier)
        return _Request(self._tracer.start_span(name, context=context, kind=SpanKind.SERVER))

    def close(self) -> None:
        """Send what waits, for as long as an export may take."""
        self._provider.shutdown()


class _Request:
    def __init__(self, span: Span) -> None:
        self._span = span

    def accepted(self) -> None:
        self._span.add_event("countermark.intent")

    def ended(self, end: Ended) -> None:
        span = self._span
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": end.prompt_tokens,
                "gen_ai.usage.output_tokens": end.output_tokens,
                "countermark.cached_tokens": end.cached_tokens,
            }
        )
        if end.finish:
            span.set_attribute("gen_ai.response.finish_reasons", (end.finish,))
        if end.first_token_s is not None:
            span.set_attribute("countermark.first_token_s", end.first_token_s)
        if end.code:
            span.set_attribute("error.type", end.code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
