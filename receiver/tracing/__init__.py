"""Traces. The base classes are tracing that is off: they do nothing, and import nothing of OpenTelemetry.

Not even the API of OpenTelemetry is called then: a span of its own no-op tracer takes 11 µs.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from uuid import UUID

import structlog

from receiver.config_file import otlp_endpoint
from receiver.core.trace_context import TraceContext
from receiver.errors import SettingsError

SpanKind = Literal["internal", "server", "client", "producer", "consumer"]
Attributes = Mapping[str, str | int]

log = structlog.get_logger()


class TracedJob(Protocol):
    """A job, with the headers of the call that submitted it."""

    @property
    def id(self) -> UUID:
        """Its id."""

    @property
    def traceparent(self) -> str | None:
        """The caller's span; None if the caller sent none."""

    @property
    def tracestate(self) -> str | None:
        """What tracing systems added to it."""


class Span:
    """A span; this one is not recorded. As a context manager it ends with the block's error."""

    context: TraceContext | None = None
    """Its place, for a message; None while tracing is off."""

    def child(self, name: str, *, kind: SpanKind = "client", attributes: Attributes | None = None) -> "Span":
        """Begin a span in this one."""
        return self

    def end(self, error: BaseException | None = None, **attributes: str | int | None) -> None:
        """End it. Of the error it gets the reason or the class, never the text, which may quote anything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


NO_SPAN = Span()


class Tracer:
    """Makes spans; this one does not. All calls come from the thread that made it."""

    is_on = False

    def job_context(self, job: TracedJob) -> TraceContext:
        """Return the place of the span that submitted a job; each process computes the same one."""
        raise NotImplementedError

    def event_context(self, event_id: UUID, job: TracedJob | None) -> TraceContext:
        """Return the place of the span that received an event; likewise."""
        raise NotImplementedError

    def start(
        self,
        name: str,
        parent: TraceContext | None,
        *,
        own: TraceContext | None = None,
        kind: SpanKind = "internal",
        attributes: Attributes | None = None,
        began: float | None = None,
    ) -> Span:
        """Begin a span, or at the unix time `began`; with `own`, at this place."""
        return NO_SPAN

    async def close(self) -> None:
        """Export the spans that are left, for a limited time."""


OFF = Tracer()


def start_tracing(*, is_optional: bool = False) -> Tracer:
    """Return the tracer of this process; it is `OFF` unless OpenTelemetry's variables name a collector.

    Call it in the process that makes the spans: it starts a thread. Raises SettingsError as `require_tracing`
    does; if tracing `is_optional`, it is off then.
    """
    try:
        require_tracing()
    except SettingsError as error:
        if not is_optional:
            raise
        log.warning("no traces", error=str(error))
        return OFF
    if otlp_endpoint() is None:
        return OFF
    from receiver.tracing import sdk  # noqa: PLC0415 - needs an extra, and 0.3 s

    return sdk.start()


def require_tracing(environ: Mapping[str, str] = os.environ) -> None:
    """Raise SettingsError if tracing is on and cannot be: for another protocol, or without the extra."""
    if otlp_endpoint(environ) is None:
        return
    name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(name) or "http/protobuf"
    if protocol.strip().lower() != "http/protobuf":
        raise SettingsError(
            f"{name}: traces are sent as http/protobuf only, usually to port 4318: set it to http/protobuf, "
            "or set OTEL_TRACES_EXPORTER=none for no traces"
        )
    try:
        import_module("receiver.tracing.sdk")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"traces need the package {error.name}; install it with: pip install 'clipia-receiver[otel]', or "
            "unset OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from None


def check_collector() -> str:
    """Send the collector a request without spans, and return its origin. Raises SettingsError if it fails."""
    from receiver.tracing import sdk  # noqa: PLC0415 - as above

    return sdk.check()


def error_type(error: BaseException) -> str:
    """Return the word for an error in a span: its reason, or else its class."""
    reason: Any = getattr(error, "reason", None)
    is_word = isinstance(reason, str) and len(reason) <= 64 and reason.isascii() and reason.isidentifier()
    return reason if is_word else type(error).__name__
