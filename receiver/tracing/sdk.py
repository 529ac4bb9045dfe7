"""OpenTelemetry, the extra `otel`: the only module that imports it."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind as OtelKind

from receiver import __version__
from receiver.config_file import is_web_url, otlp_endpoint
from receiver.core.trace_context import RANDOM, SAMPLED, TraceContext, computed_ids
from receiver.errors import SettingsError
from receiver.tracing import Attributes, Span, SpanKind, TracedJob, Tracer, error_type

FLUSH_SECONDS: Final = 3.0
"""How long a process that ends waits for the collector."""
CHECK_SECONDS: Final = 5.0
REPORT_SECONDS: Final = 60.0
"""Shortest time between two log records about lost spans."""
QUEUE_SIZE: Final = 2048
"""Spans that wait for the collector, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise."""
_SERVICE: Final = "clipia-receiver"

log = structlog.get_logger()


class RecordedSpan(Span):
    """A span of OpenTelemetry; it may still be one that is not sampled."""

    def __init__(self, tracer: "SdkTracer", span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        place = span.get_span_context()
        state = place.trace_state.to_header() or None
        self.context: TraceContext = TraceContext(
            place.trace_id, place.span_id, int(place.trace_flags) & (SAMPLED | RANDOM), state
        )

    def child(self, name: str, *, kind: SpanKind = "client", attributes: Attributes | None = None) -> Span:
        """Begin a span in this one."""
        return self._tracer.start(name, self.context, kind=kind, attributes=attributes)

    def end(self, error: BaseException | None = None, **attributes: str | int | None) -> None:
        """End it."""
        known = {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
        self._span.set_attributes(known)
        if error is not None:
            self._span.set_attribute("error.type", error_type(error))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class SdkTracer(Tracer):
    """Makes spans with a provider of its own: the global one belongs to the program around it."""

    is_on = True

    def __init__(self, processor: SpanProcessor) -> None:
        self._ids = _Ids()
        # It reads OTEL_TRACES_SAMPLER and the limits.
        self._provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_SERVICE, __version__)

    def job_context(self, job: TracedJob) -> TraceContext:
        """Return the place of the span that submitted a job."""
        trace_id, span_id = computed_ids(job.id)
        caller = TraceContext.parse(job.traceparent, job.tracestate)
        return caller._replace(span_id=span_id) if caller else self._root(trace_id, span_id)

    def event_context(self, event_id: UUID, job: TracedJob | None) -> TraceContext:
        """Return the place of the span that received an event."""
        trace_id, span_id = computed_ids(event_id)
        return (
            self._root(trace_id, span_id) if job is None else self.job_context(job)._replace(span_id=span_id)
        )

    def _root(self, trace_id: int, span_id: int) -> TraceContext:
        # Every process asks its sampler, and gets the same answer for the same trace.
        decision = self._provider.sampler.should_sample(Context(), trace_id, "").decision
        return TraceContext(trace_id, span_id, RANDOM | (SAMPLED if decision.is_sampled() else 0))

    def start(
        self,
        name: str,
        parent: TraceContext | None,
        *,
        own: TraceContext | None = None,
        kind: SpanKind = "internal",
        attributes: Attributes | None = None,
        began: float | None = None,
    ) -> RecordedSpan:
        """Begin a span."""
        self._ids.next = own
        try:
            span = self._tracer.start_span(
                name,
                # Never the current one of the program around it.
                context=Context() if parent is None else _otel_context(parent),
                kind=OtelKind[kind.upper()],
                attributes=attributes,
                start_time=None if began is None else int(began * 1_000_000_000),
            )
        finally:
            self._ids.next = None
        return RecordedSpan(self, span)

    async def close(self) -> None:
        """Export the spans that are left, for a limited time; the spans that remain are lost."""
        # If the collector is away, `shutdown` takes 30 s, and the end of a thread of asyncio's is waited for.
        thread = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        thread.start()
        deadline = time.monotonic() + FLUSH_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(0.01)
        if thread.is_alive():
            log.warning("the last spans are lost: the collector does not answer", seconds=FLUSH_SECONDS)


def start() -> SdkTracer:
    """Return a tracer that exports to the collector of the environment."""
    return SdkTracer(LimitedProcessor(_open_exporter()))


def check() -> str:
    """Send the collector an empty request and return its origin. Raises SettingsError if it fails."""
    exporter = _open_exporter(timeout=CHECK_SECONDS)
    try:
        if exporter.export(()) is not SpanExportResult.SUCCESS:
            raise SettingsError(
                f"the collector at {collector()} does not take spans: is it up, and does it take OTLP over "
                "HTTP (port 4318, not 4317)? Check OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_HEADERS"
            )
    finally:
        exporter.shutdown()
    return collector()


def collector() -> str:
    """Return the collector's origin; a URL with a user, or a mistyped one, is not shown at all."""
    endpoint = otlp_endpoint() or ""
    if not is_web_url(endpoint, plain=True):
        return "OTEL_EXPORTER_OTLP_ENDPOINT"
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}"


def _session() -> Any:
    """Return the exporter's session: to the library a redirect, which it does not follow, is a success."""
    # It has no types.
    requests: Any = import_module("requests")

    def reject_redirect(response: Any, **_: Any) -> None:
        if 300 <= response.status_code < 400:
            response.close()
            raise requests.TooManyRedirects("redirects are not followed")

    session = requests.Session()
    session.hooks["response"].append(reject_redirect)
    return session


def _open_exporter(timeout: float | None = None) -> OTLPSpanExporter:
    try:
        return OTLPSpanExporter(timeout=timeout, session=_session())
    except Exception as error:  # noqa: BLE001 - of files, URLs and plug-ins
        # Its text may quote a variable.
        raise SettingsError(
            f"traces: a variable OTEL_EXPORTER_OTLP_… is wrong ({type(error).__name__}): check the files of "
            "certificates that they name"
        ) from None


class LimitedProcessor(BatchSpanProcessor):
    """Exports spans in a thread, and reports lost ones in our words, once a minute.

    The library logs each attempt to export, and does not count the spans that its full queue drops.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        size = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
        self._free = int(size) if size.isdecimal() and int(size) else QUEUE_SIZE
        self._exporter = exporter
        self._lost = 0
        self._next_report = 0.0
        self._lock = threading.Lock()
        super().__init__(_Counted(exporter, self.exported), max_queue_size=self._free)

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span; if the queue is full, it is lost."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            has_room = self._free > 0
            self._free -= has_room
        if has_room:
            super().on_end(span)
        else:
            self._lose(1)

    def exported(self, number: int, result: SpanExportResult) -> None:
        """Note the end of an export."""
        with self._lock:
            self._free += number
        if result is not SpanExportResult.SUCCESS:
            self._lose(number)
        elif self._lost and self._free > 0:
            log.info("the collector takes spans again", lost=self._lost)
            self._lost, self._next_report = 0, 0.0

    def _lose(self, number: int) -> None:
        with self._lock:
            self._lost += number
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            log.warning(
                "spans are lost: the collector does not take them", lost=self._lost, collector=collector()
            )


class _Counted(SpanExporter):
    def __init__(self, inner: SpanExporter, done: Callable[[int, SpanExportResult], None]) -> None:
        self._inner = inner
        self._done = done

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans and report the result."""
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            self._done(len(spans), result)
        return result

    def shutdown(self) -> None:
        """Close the connections."""
        self._inner.shutdown()


class _Ids(RandomIdGenerator):
    """Random ids, except for a span whose place is computed."""

    next: TraceContext | None = None

    def generate_trace_id(self) -> int:
        """Return the id of a new trace."""
        return super().generate_trace_id() if self.next is None else self.next.trace_id

    def generate_span_id(self) -> int:
        """Return the id of a new span."""
        return super().generate_span_id() if self.next is None else self.next.span_id


def _otel_context(parent: TraceContext) -> Context:
    state = TraceState.from_header([parent.state]) if parent.state else None
    flags = TraceFlags(parent.flags)
    place = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags, trace_state=state)
    return set_span_in_context(NonRecordingSpan(place), Context())


def _resource() -> Resource:
    """Return OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME, with our name if they have none."""
    found = Resource.create({"service.version": __version__, "process.pid": os.getpid()})
    if str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        found = found.merge(Resource({"service.name": _SERVICE}))
    return found
