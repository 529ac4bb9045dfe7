"""Stored event → the CloudEvent that destinations get; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from cloudevents.core.v1.event import CloudEvent

from receiver.price import Credits
from receiver.settings import CALLBACK_PATH

TYPES: Final = {
    "OK": "ai.clipia.generation.completed",
    "ERROR": "ai.clipia.generation.failed",
}


@dataclass(frozen=True, kw_only=True)
class ForwardedFile:
    """One file of an event, as destinations see it."""

    url: str
    """Where Clipia serves it; how long is not known."""
    field: str | None
    """Where in `output` the URL stands."""
    kind: str
    variant: str
    state: str
    uri: str | None
    """Where our storage has it; None until it is stored."""
    sha256: str | None
    size: int | None
    """Bytes."""
    content_type: str | None
    error: str | None
    warning: str | None
    """What contradicts a stored file, although it is what Clipia's CDN has."""


@dataclass(frozen=True, kw_only=True)
class ForwardedJob:
    """The job that an event is the result of, where it was submitted through this service."""

    id: str
    idempotency_key: str
    """The caller's key, not the one sent to Clipia."""
    metadata: Mapping[str, str]


def build(
    *,
    event_id: UUID,
    source: str,
    received_at: datetime,
    request_id: str,
    status: str,
    model: str | None,
    cost: Credits | None,
    output: Any,
    error: Any,
    altered: Sequence[str],
    media: Sequence[ForwardedFile],
    job: ForwardedJob | None,
    delivery_id: UUID,
    attempt: int,
    replay_id: UUID | None = None,
) -> CloudEvent:
    """Make the message of one delivery (CloudEvents 1.0).

    `id` is the event's and the same on every try and replay; `deliveryid` is this delivery's; `replayid` is
    there where a replay ordered it; `attempt` counts from 1. `altered` are JSON pointers into `data`, to the
    places that could not be forwarded as they were signed.
    """
    return CloudEvent(
        attributes={
            "specversion": "1.0",
            "id": str(event_id),
            "source": f"{CALLBACK_PATH}/{source}",
            "type": TYPES[status],
            "subject": request_id,
            "time": received_at,
            "datacontenttype": "application/json",
            "deliveryid": str(delivery_id),
            "attempt": attempt,
            **({} if replay_id is None else {"replayid": str(replay_id)}),
        },
        data={
            "request_id": request_id,
            "status": status,
            "model": model,
            "cost": cost,
            "output": output,
            "error": error,
            **({"altered": list(altered)} if altered else {}),
            "media": [asdict(file) for file in media],
            "job": None if job is None else asdict(job),
        },
    )
