"""The spans of lanes: their names, their places and their attributes. docs/tracing.md lists them.

Attributes are ids, numbers and our own words, never a URL, a text of a payload or a library's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from receiver.core.trace_context import TraceContext
from receiver.db.rows import Claim, DeliveryClaim, EventClaim, JobRef, MediaRow, NewEvent, NewJob, StoredEvent
from receiver.tracing import NO_SPAN, Attributes, Span, SpanKind, TracedJob, Tracer

_BROKERS: Final = {
    "amqp": "rabbitmq",
    "amqps": "rabbitmq",
    "redis": "redis",
    "rediss": "redis",
    "nats": "nats",
    "tls": "nats",
    "kafka": "kafka",
    "sqs": "aws_sqs",
}
"""OpenTelemetry's names of messaging systems, by the scheme of a destination's URL."""


@dataclass(frozen=True, kw_only=True)
class FannedOut:
    """An event that a transaction has fanned out."""

    event: StoredEvent
    job: JobRef | None
    files: int
    deliveries: int


def database_attributes(system: str, operation: str, table: str, *, rows: int = 1) -> Attributes:
    """Return the attributes of a span for a transaction; `rows` are those that it writes together."""
    values: dict[str, str | int] = {
        "db.system.name": system,
        "db.operation.name": operation,
        "db.collection.name": table,
    }
    return values | ({"db.operation.batch.size": rows} if rows > 1 else {})


def tell_fan_out(tracer: Tracer, found: Sequence[FannedOut], *, system: str, began: float) -> None:
    """Record the receipt and the fan-out of the events of a transaction that began at the unix time `began`.

    The receipt is recorded here, because the web process does not read the job: that would cost each webhook
    a query.
    """
    for each in found:
        event, job = each.event, each.job
        own = tracer.event_context(event.id, job)
        parent = None if job is None else tracer.job_context(job)
        received = tracer.start(
            "receive event",
            parent,
            own=own,
            kind="consumer",
            attributes=_event_attributes(event) | _job_attributes(job),
            began=event.received_at.timestamp(),
        )
        attributes = database_attributes(system, "INSERT", "deliveries", rows=len(found))
        counts = {"clipia.files": each.files, "clipia.deliveries": each.deliveries}
        fan_out = tracer.start("fan out", received.context, attributes=dict(attributes) | counts, began=began)
        fan_out.end()
        received.end()


def start_storing(tracer: Tracer, events: Sequence[NewEvent], *, system: str) -> Span:
    """Begin the transaction of new events, in the trace of the first one that has no job.

    The trace of a job's event is not known yet.
    """
    if not tracer.is_on:
        return NO_SPAN
    first = next((each for each in events if each.job_id is None), None)
    if first is None:
        return NO_SPAN
    attributes = database_attributes(system, "INSERT", "events", rows=len(events))
    parent = tracer.event_context(first.id, None)
    return tracer.start("INSERT events", parent, kind="client", attributes=attributes)


def start_download(
    tracer: Tracer, claim: EventClaim, event: StoredEvent, row: MediaRow, job: TracedJob | None
) -> Span:
    """Begin an attempt at a file."""
    if not tracer.is_on:
        return NO_SPAN
    attributes = _event_attributes(event) | {
        "clipia.media.id": str(claim.id),
        "clipia.media.variant": row.variant,
        "clipia.attempt": claim.attempt,
        "http.request.method": "GET",
        "server.address": urlsplit(row.url).hostname or "",
    }
    parent = tracer.event_context(event.id, job)
    return tracer.start("download file", parent, kind="client", attributes=attributes)


def start_delivery(
    tracer: Tracer, name: str, scheme: str, claim: DeliveryClaim, event: StoredEvent, job: TracedJob | None
) -> Span:
    """Begin an attempt at a delivery to the destination `name`. The message has the place of its span."""
    if not tracer.is_on:
        return NO_SPAN
    system = _BROKERS.get(scheme)
    kind: SpanKind = "producer" if system else "client"
    attributes = _event_attributes(event) | {
        "clipia.destination": name,
        "clipia.delivery.id": str(claim.id),
        "clipia.attempt": claim.attempt,
    }
    if claim.replay_id is not None:
        attributes["clipia.replay.id"] = str(claim.replay_id)
    if system:
        attributes |= {
            "messaging.system": system,
            "messaging.operation.type": "send",
            "messaging.message.id": str(event.id),
        }
    elif scheme in {"http", "https"}:
        attributes["http.request.method"] = "POST"
    return tracer.start(f"send {name}", tracer.event_context(event.id, job), kind=kind, attributes=attributes)


def start_call(tracer: Tracer, name: str, method: str, job: TracedJob, claim: Claim) -> Span:
    """Begin a call to Clipia for a job."""
    if not tracer.is_on:
        return NO_SPAN
    attributes: dict[str, str | int] = {"clipia.job.id": str(job.id), "clipia.attempt": claim.attempt}
    attributes["http.request.method"] = method
    return tracer.start(name, tracer.job_context(job), kind="client", attributes=attributes)


def start_submission(tracer: Tracer, job: NewJob, *, system: str, began: float, storing: float) -> Span:
    """Begin the span of a job that was submitted, at the unix time `began`.

    Its transaction began at `storing` and has just ended.
    """
    if not tracer.is_on:
        return NO_SPAN
    parent = TraceContext.parse(job.traceparent, job.tracestate)
    span = tracer.start(
        "submit job",
        parent,
        own=tracer.job_context(job),
        kind="internal" if parent is None else "server",
        attributes={
            "clipia.job.id": str(job.id),
            "clipia.caller": job.caller,
            "gen_ai.request.model": job.model,
        },
        began=began,
    )
    attributes = database_attributes(system, "INSERT", "jobs")
    tracer.start("INSERT jobs", span.context, kind="client", attributes=attributes, began=storing).end()
    return span


def _event_attributes(event: StoredEvent) -> dict[str, str | int]:
    return {
        "clipia.event.id": str(event.id),
        "clipia.request.id": event.request_id,
        "clipia.source": event.source,
    }


def _job_attributes(job: TracedJob | None) -> dict[str, str | int]:
    return {} if job is None else {"clipia.job.id": str(job.id)}
