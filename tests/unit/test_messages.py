"""The messages for destinations: valid CloudEvents, and the same JSON as the library writes."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from support.kinds_base import make_event
from support.payloads import body, failure

from receiver.core.file_links import file_link
from receiver.core.trace_context import TraceContext
from receiver.db.rows import DeliveryClaim, JobRef, MediaRow, StoredEvent, new_id
from receiver.destinations.base import JSON, encode
from receiver.lanes import envelope

FILE = MediaRow(
    id=new_id(),
    position=0,
    variant="original",
    kind="image",
    url="https://media.clipia.ai/works/a.png",
    field="/images/0/url",
    state="stored",
    error=None,
    size=8,
    sha256="0" * 64,
    content_type="image/png",
    storage_key="a.png",
    uri="file:///a.png",
    warning=None,
    seen_sha256=None,
)


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def stored_event(request_id: str, *, status: str = "OK", microsecond: int = 0) -> StoredEvent:
    """Return an event as workers load it."""
    return StoredEvent(
        seq=1,
        id=uuid.uuid4(),
        source="clipia",
        request_id=request_id,
        status=status,
        body=body(request_id) if status == "OK" else failure(request_id),
        received_at=datetime(2026, 11, 20, 12, 30, 15, microsecond, tzinfo=UTC),
        job_id=None,
        path_token=None,
    )


def claim_of(replay_id: uuid.UUID | None) -> DeliveryClaim:
    """Return the claim of the second attempt at a delivery."""
    return DeliveryClaim(
        id=new_id(), lease=uuid.uuid4(), attempt=2, lost=0, age=0.0, event_seq=1, replay_id=replay_id
    )


@pytest.mark.parametrize("status", ["OK", "ERROR"])
@pytest.mark.parametrize("replay_id", [None, uuid.uuid4()])
@pytest.mark.parametrize("microsecond", [0, 5])
def test_message_is_a_valid_cloudevent(status: str, replay_id: uuid.UUID | None, microsecond: int) -> None:
    """The library's own constructor, which checks attributes, takes those of a message unchanged."""
    request_id = str(uuid.uuid4())
    event = stored_event(request_id, status=status, microsecond=microsecond)
    claim = claim_of(replay_id)
    job = JobRef(id=uuid.uuid4(), caller="shop", idempotency_key="order/1", metadata={"a": "b"})
    message = envelope.build(claim, event, [FILE], job, internal_url="https://receiver.internal")
    data = message.get_data()
    assert isinstance(data, dict)
    assert data["media"][0]["link"] == f"https://receiver.internal/v1/media/{FILE.id}"
    checked = CloudEvent(dict(message.get_attributes()), data)
    assert checked.get_attributes() == message.get_attributes()
    assert json.loads(encode(message)) == json.loads(JSONFormat().write(checked))
    assert message.get_extension("deliveryid") == str(claim.id)
    assert message.get_subject() == request_id


@pytest.mark.parametrize(
    ("stored", "own", "sent"),
    [
        ((None, None), None, {}),
        ((PARENT, "a=1"), None, {"traceparent": PARENT, "tracestate": "a=1"}),
        ((PARENT, None), None, {"traceparent": PARENT}),
        ((PARENT, "a=1"), TraceContext(1, 2, 0), {"traceparent": f"00-{1:032x}-{2:016x}-00"}),
        (
            (None, None),
            TraceContext(1, 2, 1, "b=2"),
            {"traceparent": f"00-{1:032x}-{2:016x}-01", "tracestate": "b=2"},
        ),
    ],
)
def test_message_names_its_trace(
    stored: tuple[str | None, str | None], own: TraceContext | None, sent: dict[str, str]
) -> None:
    """The message has the attempt's own span, or else that of the job's caller, or else none."""
    parent, state = stored
    job = JobRef(
        id=uuid.uuid4(),
        caller="shop",
        idempotency_key="1",
        metadata={},
        traceparent=parent,
        tracestate=state,
    )
    event = stored_event(str(uuid.uuid4()))
    attributes = envelope.build(claim_of(None), event, [], job, trace=own).get_attributes()
    assert {name: attributes[name] for name in ("traceparent", "tracestate") if name in attributes} == sent


def test_only_stored_files_have_links() -> None:
    """A file has a link if it is stored and the internal listener's URL is known."""
    url = "https://receiver.internal"
    assert file_link(url, FILE.id, FILE.storage_key) == f"{url}/v1/media/{FILE.id}"
    assert file_link(url, FILE.id, None) is None
    assert file_link(None, FILE.id, FILE.storage_key) is None


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "Größe \N{SNOWMAN} \N{GRINNING FACE}",
        "line\nends\r\u2028\x7f and \x00 and half of a pair: \ud83d",
        [1e16, 1e-7, 0.1, -0.0, 2**63, 2**64 - 1, 2**70, -(2**70), True, None],
        {"": {"a": []}, "deep": [[[[{}]]]]},
        {1: "a key that is no text"},
        datetime(2026, 11, 20, 12, 30, 15, tzinfo=UTC),
    ],
    ids=ascii,
)
def test_json_is_that_of_the_library(value: Any) -> None:
    """Both modes write the values that the library writes, in ASCII and on one line."""
    data = {"value": value}
    event = make_event(data)
    for written, expected in (
        (encode(event), JSONFormat().write(event)),
        (JSON.write_data(data, None), JSONFormat().write_data(data, None)),
    ):
        assert json.loads(written) == json.loads(expected)
        assert written.isascii()
        assert b"\n" not in written
