"""The CloudEvent that destinations receive; pure."""

from collections.abc import Sequence
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent

from receiver.core.file_links import file_link
from receiver.core.payload import parse
from receiver.core.trace_context import TraceContext
from receiver.db.rows import DeliveryClaim, JobRef, MediaRow, StoredEvent
from receiver.settings import CALLBACK_PATH

TYPES: Final = {"OK": "ai.clipia.generation.completed", "ERROR": "ai.clipia.generation.failed"}
# `url` is Clipia's, and it is not known how long it is valid; `uri` is the place in our storage.
_FILE_FIELDS: Final = (
    *("url", "field", "kind", "variant", "state", "uri"),
    *("sha256", "size", "content_type", "error", "warning"),
)


class _Message(CloudEvent):
    """A CloudEvent whose attributes are valid as `build` makes them.

    The library's constructor would check them for as long as the rest of `build` takes.
    """

    def __init__(self, attributes: dict[str, Any], data: dict[str, Any]) -> None:
        self._attributes = attributes
        self._data = data


def build(
    claim: DeliveryClaim,
    event: StoredEvent,
    files: Sequence[MediaRow],
    job: JobRef | None,
    *,
    internal_url: str | None = None,
    trace: TraceContext | None = None,
) -> CloudEvent:
    """Build the message of one delivery (CloudEvents 1.0). Raises UnrecognizedBody.

    `id` is the event's id, the same in all attempts and replays. `deliveryid` is the delivery's; `replayid`
    is present if a replay ordered the delivery; `attempt` counts from 1. The links of files begin with
    `internal_url`; without it they are null. `altered` has JSON pointers into
    `data`: these values differ from the signed body, because they could not be forwarded as they are.
    `promoted` is present if a person put this body in the place of an earlier one.
    `traceparent` and `tracestate` name the span of this attempt, `trace`, or else the job's caller's.
    """
    content = parse(event.body)
    return _Message(
        attributes={
            "specversion": "1.0",
            "id": str(event.id),
            "source": f"{CALLBACK_PATH}/{event.source}",
            "type": TYPES[event.status],
            "subject": event.request_id,
            "time": event.received_at,
            "datacontenttype": "application/json",
            "deliveryid": str(claim.id),
            "attempt": claim.attempt,
            **({} if claim.replay_id is None else {"replayid": str(claim.replay_id)}),
            **_trace_attributes(job, trace),
        },
        data={
            "request_id": event.request_id,
            "status": event.status,
            "model": content.model,
            "cost": content.cost,
            "output": content.output,
            "error": content.error,
            **({"altered": list(content.altered)} if content.altered else {}),
            **({"promoted": True} if event.first_outcome == "promoted" else {}),
            "media": [_file(row, internal_url) for row in files],
            # The key is the caller's, not the one that was sent to Clipia.
            "job": job
            and {"id": str(job.id), "idempotency_key": job.idempotency_key, "metadata": job.metadata},
        },
    )


def _trace_attributes(job: JobRef | None, trace: TraceContext | None) -> dict[str, str]:
    """Return CloudEvents' extension for distributed tracing."""
    if trace is not None:
        parent, state = trace.parent, trace.state
    elif job is not None and job.traceparent is not None:
        parent, state = job.traceparent, job.tracestate
    else:
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if state else {})


def _file(row: MediaRow, internal_url: str | None) -> dict[str, Any]:
    return {
        "id": str(row.id),
        **{name: getattr(row, name) for name in _FILE_FIELDS},
        "link": file_link(internal_url, row.id, row.storage_key),
    }
