"""Builds the CloudEvent that destinations receive from a stored event; pure."""

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
    """One file of an event in the message."""

    url: str
    """Clipia's URL; it is not known how long it is valid."""
    field: str | None
    """The place of the URL in `output`."""
    kind: str
    variant: str
    state: str
    uri: str | None
    """The place in our storage; None until the file is stored."""
    sha256: str | None
    size: int | None
    """Bytes."""
    content_type: str | None
    error: str | None
    warning: str | None
    """A contradiction, such as a wrong size, in a file that Clipia's CDN sends again and again."""


@dataclass(frozen=True, kw_only=True)
class ForwardedJob:
    """The job of an event, if it was submitted through this service."""

    id: str
    idempotency_key: str
    """The caller's key, not the one that was sent to Clipia."""
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
    """Build the message of one delivery (CloudEvents 1.0).

    `id` is the event's id, the same in all attempts and replays. `deliveryid` is the delivery's; `replayid`
    is present if a replay ordered the delivery; `attempt` counts from 1. `altered` has JSON pointers into
    `data`: these values differ from the signed body, because they could not be forwarded as they are.
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
