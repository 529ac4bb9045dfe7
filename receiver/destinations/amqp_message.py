"""The message that RabbitMQ gets: an event in the binary mode of CloudEvents' AMQP binding."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

from aiormq import spec
from cloudevents.core.bindings.amqp import CE_PREFIX_UNDERSCORE, CONTENT_TYPE_PROPERTY, to_binary
from cloudevents.core.v1.event import CloudEvent
from pamqp.header import ContentHeader

from receiver.destinations.base import JSON
from receiver.errors import PublishRejected

MAX_SHORT_BYTES: Final = 255
"""The limit of a message property that is a short string."""
PERSISTENT: Final = 2


@dataclass(frozen=True, kw_only=True)
class Message:
    """An event in the binary mode of CloudEvents' AMQP binding; `head` is the frame before the body."""

    body: bytes
    properties: spec.Basic.Properties
    head: bytes


def encode_message(event: CloudEvent) -> Message:
    """Return the event as a message. Raises PublishRejected for a value that AMQP or JSON cannot express."""
    try:
        message = to_binary(event, JSON)
        headers = dict(message.application_properties)
        for name, value in event.get_attributes().items():
            if isinstance(value, datetime):
                # The binding would write milliseconds, which lose the rest; AMQP 0-9-1 has only seconds.
                headers[CE_PREFIX_UNDERSCORE + name] = value.isoformat().replace("+00:00", "Z")
        body = message.application_data
        properties = spec.Basic.Properties(
            content_type=message.properties.get(CONTENT_TYPE_PROPERTY),
            headers=headers,
            delivery_mode=PERSISTENT,
            message_id=_short(event.get_extension("deliveryid") or event.get_id()) or uuid4().hex,
            correlation_id=_short(event.get_subject()),
            message_type=_short(event.get_type()),
            timestamp=event.get_time(),
            app_id="clipia-receiver",
        )
        head = ContentHeader(body_size=len(body), properties=properties).marshal()
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as a message", reason="encoding") from error
    return Message(body=body, properties=properties, head=head)


def _short(value: Any) -> str | None:
    """Return the value as a short string, or None if it is empty or too long."""
    text = str(value or "")
    return text if 0 < len(text.encode()) <= MAX_SHORT_BYTES else None
