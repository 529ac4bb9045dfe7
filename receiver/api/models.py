"""The answers of the internal API that differ from the rows that the commands and the database layer have."""

from datetime import datetime
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, WithJsonSchema, with_config
from typing_extensions import TypedDict

from receiver.db.rejections import ListedRejection, RejectionGroup
from receiver.db.views import DeliveryWithLog, EventHead, FileWithLog, ReceiptHead

Base64 = Annotated[str, WithJsonSchema({"type": "string", "contentEncoding": "base64"})]


class ShownReceipt(ReceiptHead):
    """A request on record for an event."""

    body: Base64 | None
    """Of a conflict, and of a body that another one has superseded."""


class ShownFile(FileWithLog):
    """A file of an event and the attempts to download it."""

    link: str | None
    """The file at the receiver's own address; null if it is not stored, or without RECEIVER_INTERNAL_URL."""


class ShownEvent(EventHead):
    """An event with its body, receipts, files, deliveries and attempts."""

    body: NotRequired[Any]
    """The signed body as JSON; absent if it is none."""
    body_base64: NotRequired[Base64]
    """The exact bytes, if they are no JSON or differ from `body`, or with `exact`."""
    altered: NotRequired[list[str]]
    """The places at which `body` differs from the bytes."""
    recoverable: NotRequired[bool]
    """Of an unrecognized event: whether this release can read it."""
    receipts: list[ShownReceipt]
    """The first 50."""
    receipts_total: int
    media: list[ShownFile]
    deliveries: list[DeliveryWithLog]


class ShownRejection(ListedRejection):
    """A rejected request to the callback."""

    headers: list[list[str]]
    """Names and values of those headers that hold no secret."""
    body: str | None
    """The first 16 KiB as text; null if it was not read."""
    remedy: str
    """What to do about its cause."""


class ShownRejectionGroup(RejectionGroup):
    """Rejected requests of one cause."""

    remedy: str
    """What to do about the cause."""


class Fetched(TypedDict):
    """The event of a result that was asked for."""

    event_id: str
    stored: bool
    """Whether it is stored now; false if it was before."""


class CloudEventModel(TypedDict):
    """A CloudEvent (1.0) in structured mode."""

    specversion: str
    id: str
    """The event's id."""
    source: str
    type: str
    subject: str
    """Clipia's request_id."""
    time: str
    datacontenttype: str
    deliveryid: str
    attempt: int
    replayid: NotRequired[str]
    traceparent: NotRequired[str]
    tracestate: NotRequired[str]
    data: dict[str, Any]


class Restarted(TypedDict):
    """Dead letters that will be delivered again."""

    restarted: dict[str, int]
    """Their number by destination."""


class RestartedMany(Restarted):
    """Dead letters that will be delivered again, up to 10,000."""

    not_configured: list[str]
    """Those destinations that the receiver does not have any more."""
    more: bool
    """Whether others may match: call again, with `began` as `not_restarted_since`."""
    began: datetime
    """By the database's clock."""


@with_config(ConfigDict(extra="allow"))
class ModelEstimate(TypedDict):
    """The price of an input; further fields are Clipia's."""

    credits: int | float
    warnings: list[Any]
