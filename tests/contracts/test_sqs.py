"""The SQS destination: the content of a message, the batches, and the meaning of each answer."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs
from support.kinds_base import HttpSink, Received, make_event, open_url, until
from support.kinds_kafka_sqs import aws_environment, shared_sqs
from support.servers_kafka_sqs import ACCOUNT, CREDENTIALS, REGION, Sqs

from receiver.destinations import Destination
from receiver.destinations.base import encode
from receiver.destinations.sqs import (
    MAX_BATCH_BYTES,
    MAX_BATCHES,
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    SqsDestination,
)
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"
QUEUE = "events"
Entry = dict[str, Any]
Outcome = tuple[str, str] | None
"""The code and the text of a rejected entry."""
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 1.0}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the clients credentials of the test's own."""
    for name, value in aws_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARY)


@pytest.fixture
def server() -> Sqs:
    """An SQS server."""
    return shared_sqs()


@pytest.fixture
def queue() -> str:
    """A fresh queue's name."""
    return f"events-{uuid4()}"


class Service(HttpSink):
    """A server that answers SQS requests as a test sets it, and accepts any credentials, like moto."""

    def __init__(self) -> None:
        super().__init__(self.serve)
        self.judge: Callable[[Entry], Outcome] = lambda _entry: None
        self.error: str | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0
        self.most_under_way = 0

    @property
    def batches(self) -> list[list[Entry]]:
        """The entries of each SendMessageBatch so far."""
        return [
            json.loads(request.body)["Entries"]
            for request in self.requests
            if request.headers["x-amz-target"] == "AmazonSQS.SendMessageBatch"
        ]

    async def serve(self, request: Received, writer: asyncio.StreamWriter) -> None:
        """Answer, once the gate is open."""
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.gate.wait()
        self.under_way -= 1
        entries = json.loads(request.body).get("Entries", [])
        if self.error is not None:
            status, answer = 400, {"__type": f"com.amazonaws.sqs#{self.error}", "message": CANARY}
        else:
            status, answer = 200, self._judge_all(entries)
        body = json.dumps(answer).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/x-amz-json-1.0\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def _judge_all(self, entries: list[Entry]) -> dict[str, Any]:
        successful, failed = [], []
        for entry in entries:
            outcome = self.judge(entry)
            if outcome is None:
                successful.append({"Id": entry["Id"], "MessageId": "1", "MD5OfMessageBody": "0"})
            elif outcome != SILENCE:
                code, text = outcome
                failed.append({"Id": entry["Id"], "Code": code, "Message": text, "SenderFault": True})
        return {"Successful": successful, "Failed": failed}


SILENCE = ("", "")


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """A server that accepts every entry, unless a test sets an error."""
    running = Service()
    async with running:
        yield running


@pytest.fixture
async def destination(service: Service) -> AsyncIterator[Destination]:
    """A destination at that server that has already connected."""
    opened = at(service)
    await opened.check()
    service.requests.clear()
    yield opened
    service.gate.set()
    await opened.close()


def at(service: HttpSink, queue: str = QUEUE) -> Destination:
    """Open a queue of a server."""
    return open_url(
        f"sqs://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}?endpoint=http://127.0.0.1:{service.port}"
    )


async def failure(destination: Destination, **data: object) -> PublishFailed:
    """Publish and return the failure."""
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event(data))
    return caught.value


def kind_of(entry: Entry) -> str:
    """Return the kind that `make_event` got."""
    kind: str = json.loads(entry["MessageBody"])["data"]["kind"]
    return kind


async def test_message(server: Sqs, queue: str) -> None:
    """E3: a message is the event in structured JSON, with the ids to deduplicate by as attributes."""
    destination = open_url(await asyncio.to_thread(server.create_queue, queue))
    event = make_event({"text": "Zürich 🎬 \u0000\ud800"})
    await destination.publish(event)
    await destination.close()
    (message,) = await asyncio.to_thread(server.receive, queue)
    assert message["Body"].encode() == encode(event)
    attributes = {name: each["StringValue"] for name, each in message["MessageAttributes"].items()}
    assert attributes == {"id": event.get_id(), "deliveryid": event.get_extension("deliveryid")}


def test_body_has_only_valid_characters() -> None:
    """E7: an event may hold any text: its body has no character that SQS rejects."""
    text = "".join(map(chr, range(0x300))) + "\u2028\ud800\udfff\ufffe\uffff\U0010ffff"
    body = encode(make_event({text: text}, subject=text)).decode()
    assert all(" " <= character <= "\ud7ff" for character in body)


async def test_request_is_signed_for_the_region(service: Service, destination: Destination) -> None:
    """E14: requests go to the endpoint, signed for the region, and name the queue by its URL there."""
    await destination.publish(make_event())
    (request,) = service.requests
    assert f"/{REGION}/sqs/aws4_request" in request.headers["authorization"]
    assert CREDENTIALS["AWS_ACCESS_KEY_ID"] in request.headers["authorization"]
    assert json.loads(request.body)["QueueUrl"] == f"http://127.0.0.1:{service.port}/{ACCOUNT}/{QUEUE}"


async def test_fifo_queue(server: Sqs, queue: str) -> None:
    """E12: in a FIFO queue a second attempt at a delivery is dropped, and a replay gets through."""
    destination = open_url(await asyncio.to_thread(server.create_queue, f"{queue}.fifo"))
    event = make_event(id="event-1", subject="request-1", deliveryid="delivery-1")
    await destination.publish(event)
    await destination.publish(event)
    await destination.publish(make_event(id="event-1", subject="request-1", deliveryid="delivery-2"))
    await destination.close()
    messages = await asyncio.to_thread(server.receive, f"{queue}.fifo")
    attributes = [message["Attributes"] for message in messages]
    assert [each["MessageDeduplicationId"] for each in attributes] == ["delivery-1", "delivery-2"]
    assert {each["MessageGroupId"] for each in attributes} == {"request-1"}


async def test_fifo_ids_fit(service: Service) -> None:
    """E7: with any request id the message has a group, the same for the same request."""
    destination = at(service, "events.fifo")
    for subject in ("request 1", "request 1", "Zürich", "x" * 129, "\ud800"):
        await destination.publish(make_event(subject=subject))
    nameless = make_event()
    del nameless.get_attributes()["subject"]
    await destination.publish(nameless)
    await destination.close()
    groups = [entry["MessageGroupId"] for (entry,) in service.batches]
    assert all(len(group) <= 128 and group.isascii() and " " not in group for group in groups)
    assert len(set(groups)) == 5
    assert groups[0] == groups[1]
    assert groups[5] == nameless.get_extension("deliveryid")


async def test_standard_queue_has_no_groups(service: Service, destination: Destination) -> None:
    """E7: fields that only a FIFO queue takes are sent to no other queue."""
    await destination.publish(make_event())
    assert set(service.batches[0][0]) == {"Id", "MessageBody", "MessageAttributes"}


async def test_event_without_delivery_id(service: Service, destination: Destination) -> None:
    """E3: every message has an id to deduplicate by."""
    event = make_event()
    del event.get_attributes()["deliveryid"]
    await destination.publish(event)
    assert service.batches[0][0]["MessageAttributes"]["deliveryid"]["StringValue"] == event.get_id()


async def test_batches_of_ten(service: Service, destination: Destination) -> None:
    """E1: publishes that run at once go in batches of ten, several of them in flight."""
    service.gate.clear()
    publishes = [asyncio.create_task(destination.publish(make_event())) for _ in range(200)]
    await until(lambda: service.under_way == MAX_BATCHES)
    service.gate.set()
    assert await asyncio.gather(*publishes) == [None] * 200
    assert [len(batch) for batch in service.batches] == [MAX_ENTRIES] * 20
    assert service.most_under_way == MAX_BATCHES
    assert all([entry["Id"] for entry in batch] == list("0123456789") for batch in service.batches)


async def test_batches_are_small_enough(service: Service, destination: Destination) -> None:
    """E1: a batch holds a limited number of bytes; a message that is larger goes alone."""
    sizes = [100_000, 100_000, 100_000, 10, 1_000_000, 10, 10]
    await asyncio.gather(*(destination.publish(make_event({"fill": "x" * size})) for size in sizes))
    lengths = [[len(entry["MessageBody"]) for entry in batch] for batch in service.batches]
    assert sorted(map(len, lengths)) == [1, 2, 2, 2]
    assert all(len(batch) == 1 or sum(batch) <= MAX_BATCH_BYTES for batch in lengths)


# The client advises against requests of more than 1 MiB; SQS still takes a message of that size.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
async def test_largest_message(server: Sqs, queue: str) -> None:
    """E7: a message of exactly the service's limit arrives; one byte more is rejected, unsent."""
    destination = open_url(await asyncio.to_thread(server.create_queue, queue))
    spare = (
        MAX_MESSAGE_BYTES
        - len(encode(make_event({"fill": ""})))
        - 2 * (36 + len("String"))
        - len("iddeliveryid")
    )
    await destination.publish(make_event({"fill": "x" * spare}))
    with pytest.raises(PublishRejected) as caught:
        await destination.publish(make_event({"fill": "x" * (spare + 1)}))
    await destination.close()
    assert caught.value.reason == "too_large"
    assert len(await asyncio.to_thread(server.receive, queue)) == 1


async def test_message_above_the_queues_own_limit(server: Sqs, queue: str) -> None:
    """E7: a message that the queue rejects is rejected; the others of its batch arrive."""
    url = await asyncio.to_thread(server.create_queue, queue, MaximumMessageSize="2048")
    destination = open_url(url)
    with capture_logs() as logs:
        await destination.start()
    assert "2048" in logs[0]["problem"]
    events = [make_event({"fill": "x" * (3000 if number == 4 else 10)}) for number in range(10)]
    outcomes = await asyncio.gather(*(destination.publish(event) for event in events), return_exceptions=True)
    await destination.close()
    poison = outcomes.pop(4)
    assert isinstance(poison, PublishRejected)
    assert poison.reason == "too_large"
    assert outcomes == [None] * 9
    assert len(await asyncio.to_thread(server.receive, queue)) == 9


async def test_partial_failure(service: Service, destination: Destination) -> None:
    """E1: each publish of a batch gets its own result; a missing result is not a confirmation."""
    outcomes: dict[str, Outcome] = {
        "good": None,
        "text": ("InvalidMessageContents", "bad text"),
        "internal": ("InternalError", "try later"),
        "parameter": ("InvalidParameterValue", "no idea"),
        "throttled": ("RequestThrottled", "slowly"),
        "forgotten": SILENCE,
        "late": None,
    }
    service.judge = lambda entry: outcomes[kind_of(entry)]
    results = dict(
        zip(
            outcomes,
            await asyncio.gather(
                *(destination.publish(make_event({"kind": kind})) for kind in outcomes),
                return_exceptions=True,
            ),
            strict=True,
        )
    )
    assert len(service.batches) == 1
    assert results["good"] is results["late"] is None
    assert isinstance(results["text"], PublishRejected)
    reasons = {kind: result.reason for kind, result in results.items() if isinstance(result, PublishFailed)}
    assert reasons == {
        "internal": "refused",
        "parameter": "refused",
        "throttled": "throttled",
        "forgotten": "unconfirmed",
    }
    assert "try later" in str(results["internal"])


async def test_one_message_spoils_no_batch(service: Service, destination: Destination) -> None:
    """E7: if the service rejects a batch because of one message, the others are sent without it."""
    service.error = "BatchRequestTooLong"
    service.gate.clear()
    publishes = [asyncio.create_task(destination.publish(make_event())) for _ in range(3)]
    await until(lambda: service.under_way == 1)
    service.gate.set()
    outcomes = await asyncio.gather(*publishes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PublishRejected] * 3
    assert [len(batch) for batch in service.batches] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("code", "reason", "advice"),
    [
        ("QueueDoesNotExist", "no_queue", "create it"),
        ("AWS.SimpleQueueService.NonExistentQueue", "no_queue", "create it"),
        ("AccessDeniedException", "permission", "sqs:SendMessage"),
        ("KmsAccessDenied", "permission", "key"),
        ("ExpiredTokenException", "auth", "AWS_ACCESS_KEY_ID"),
        ("InvalidSignatureException", "auth", "clock"),
        ("ThrottlingException", "throttled", "throttles"),
        ("SomethingNew", "refused", "SomethingNew"),
        ("InvalidParameterValue", "refused", "InvalidParameterValue"),
    ],
)
async def test_rejected_requests(
    service: Service, destination: Destination, code: str, reason: str, advice: str
) -> None:
    """E4: an error of the service is reported with advice, without its own text; then it works again."""
    service.error = code
    error = await failure(destination)
    assert (error.reason, error.retry_after) == (reason, None)
    assert advice in str(error)
    assert CANARY not in f"{error} {error!r}"
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    assert caught.value.reason == reason
    service.error = None
    await destination.publish(make_event())


async def test_queue_that_comes_later(server: Sqs, queue: str) -> None:
    """E1: without its queue no event is delivered, and the message says to create it; then it works."""
    destination = open_url(server.url(queue))
    with capture_logs() as logs:
        await destination.start()
    assert [(entry["log_level"], entry["destination"]) for entry in logs] == [("warning", "test")]
    error = await failure(destination)
    assert (error.reason, "create it" in str(error)) == ("no_queue", True)
    await asyncio.to_thread(server.create_queue, queue)
    await destination.publish(make_event())
    await destination.check()
    await destination.close()
    assert len(await asyncio.to_thread(server.receive, queue)) == 1


async def test_credentials_that_come_later(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: without credentials the message says how to set them; once they are there it works."""
    destination = at(service)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        error = await failure(destination)
        assert (error.reason, "AWS_ACCESS_KEY_ID" in str(error)) == ("auth", True)
        patch.setenv("AWS_ACCESS_KEY_ID", "half")
        assert (await failure(destination)).reason == "auth"
    assert service.requests == []
    await destination.publish(make_event())
    await destination.close()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\n{}", b"SSH-2.0-x\r\n"]
)
async def test_broken_answer(service: Service, destination: Destination, answer: bytes) -> None:
    """E1: a missing, truncated or invalid answer confirms no event."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    service.answer = respond
    error = await failure(destination)
    assert error.reason in {"connection", "timeout"}
    service.answer = service.serve
    await destination.publish(make_event())


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"Successful": [{"Id": "1"}]}', b""])
async def test_answer_without_meaning(service: Service, destination: Destination, body: bytes) -> None:
    """E1: a 200 that does not name the message does not confirm it, and fails it at once."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    service.answer = respond
    async with asyncio.timeout(8):
        await failure(destination)


async def test_dead_connection_is_no_failure(service: Service, destination: Destination) -> None:
    """E4: a connection that the service has closed while it was idle is replaced without a failure."""
    await destination.publish(make_event())
    await service.stop()
    await service.start()
    await destination.publish(make_event())
    assert len(service.batches) == 2


@pytest.mark.usefixtures("destination", "impatient")
async def test_service_that_hangs(service: Service, destination: Destination) -> None:
    """E4: if the service hangs each publish fails in time, and afterwards the same destination works."""
    service.gate.clear()
    began = time.monotonic()
    outcomes = await asyncio.gather(
        *(destination.publish(make_event()) for _ in range(200)), return_exceptions=True
    )
    assert time.monotonic() - began < 10
    assert {type(outcome) for outcome in outcomes} == {PublishFailed}
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, PublishFailed)} == {"timeout"}
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    assert caught.value.reason == "timeout"
    service.gate.set()
    await destination.publish(make_event())


@pytest.mark.usefixtures("destination", "impatient")
async def test_close_while_the_service_hangs(service: Service, destination: Destination) -> None:
    """E16: closing is bounded, and leaves no task."""
    service.gate.clear()
    publishes = [asyncio.create_task(destination.publish(make_event())) for _ in range(200)]
    await until(lambda: service.under_way > 0)
    began = time.monotonic()
    await destination.close()
    assert time.monotonic() - began < 3
    outcomes = await asyncio.gather(*publishes, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PublishFailed}
    await service.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.usefixtures("destination", "impatient")
async def test_no_publish_is_left_behind(
    service: Service, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: a publish in the very moment in which the last sender ends is sent, too."""
    assert isinstance(destination, SqsDestination)
    monkeypatch.setattr(destination._batches._batcher, "_max_in_flight", 1)
    for _ in range(5):
        await destination.publish(make_event())
    assert len(service.batches) == 5


async def test_cancelled_publish_is_not_sent(
    service: Service, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E16: a publish that is cancelled before its batch leaves is not in it."""
    assert isinstance(destination, SqsDestination)
    monkeypatch.setattr(destination._batches._batcher, "_max_in_flight", 1)
    service.gate.clear()
    first = asyncio.create_task(destination.publish(make_event({"kind": "first"})))
    await until(lambda: service.under_way == 1)
    others = [
        asyncio.create_task(destination.publish(make_event({"kind": kind}))) for kind in ("second", "third")
    ]
    await asyncio.sleep(0)
    others[0].cancel()
    service.gate.set()
    await asyncio.gather(first, others[1])
    assert [[kind_of(entry) for entry in batch] for batch in service.batches] == [["first"], ["third"]]


async def test_secrets_stay_out_of_logs(
    service: Service, destination: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """G8: neither a session token nor a key is in a log, at any level, or in a shown text."""
    caplog.set_level(logging.DEBUG)
    await destination.publish(make_event())
    assert service.requests[0].headers["x-amz-security-token"] == CANARY
    shown = f"{caplog.text} {destination!r} {vars(destination)}"
    assert CANARY not in shown
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in shown


def urls() -> Iterator[tuple[str, str, str]]:
    """Yield URLs that may work, each with its queue URL and its region."""
    path = "/123456789012/events"
    for host, region in {
        "sqs.eu-central-1.amazonaws.com": "eu-central-1",
        "sqs.cn-north-1.amazonaws.com.cn": "cn-north-1",
        "sqs-fips.us-gov-west-1.amazonaws.com": "us-gov-west-1",
        "vpce-0a1b-2c.sqs.us-east-1.vpce.amazonaws.com": "us-east-1",
        "sqs.us-west-2.api.aws": "us-west-2",
    }.items():
        yield f"sqs://{host}{path}", f"https://{host}{path}", region
    yield (
        f"sqs://sqs.eu-west-1.amazonaws.com{path}.fifo?region=eu-west-2",
        f"https://sqs.eu-west-1.amazonaws.com{path}.fifo",
        "eu-west-2",
    )
    yield (
        f"sqs://queue{path}?endpoint=http://127.0.0.1:9324/&region=elasticmq",
        f"http://127.0.0.1:9324{path}",
        "elasticmq",
    )


@pytest.mark.parametrize(("url", "queue_url", "region"), list(urls()))
async def test_usable_url(url: str, queue_url: str, region: str) -> None:
    """G8: the URL of the queue names its endpoint and its region."""
    destination = open_url(url)
    assert isinstance(destination, SqsDestination)
    assert (destination._queue.url, destination._queue.region) == (queue_url, region)
    await destination.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqs:",
        "sqs://sqs.eu-west-1.amazonaws.com",
        "sqs://sqs.eu-west-1.amazonaws.com/events",
        "sqs://sqs.eu-west-1.amazonaws.com/123/events",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/a/b",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/a.b",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/{'x' * 81}",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/{'x' * 76}.fifo",
        "sqs://queue.amazonaws.com/123456789012/events",
        "sqs://[::1/123456789012/events",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?region=",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?region=EU WEST",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?region=a&region=b",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=127.0.0.1:9324",
        "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=http://[::1",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=http://u:{CANARY}@host",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=http://host/?{CANARY}",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?secret={CANARY}",
        f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/events#{CANARY}",
        f"sqs://key:{CANARY}@sqs.eu-west-1.amazonaws.com/123456789012/events",
    ],
)
def test_unusable_url(url: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    assert "'test'" in str(caught.value)
    assert "write sqs://" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "region"),
    [
        (
            "message-queue.api.cloud.yandex.net/b1g8ad42m6he1/dj6000000/events?region=ru-central1",
            "ru-central1",
        ),
        ("sqs.mnq.fr-par.scaleway.com/project-5a1d2f6c/events?region=fr-par", "fr-par"),
        ("sqs.eu-west-1.localhost.localstack.cloud:4566/000000000000/events", "eu-west-1"),
        ("eu-west-1.queue.localhost.localstack.cloud:4566/000000000000/events", "eu-west-1"),
        ("localhost:4566/queue/eu-west-1/000000000000/events", "us-east-2"),
        ("localhost:9324/queue/events", "us-east-2"),
        ("eu-west-1.queue.amazonaws.com/123456789012/events", "eu-west-1"),
    ],
)
async def test_other_services(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: str, region: str
) -> None:
    """E14: queue URLs are accepted as each service writes them, at its host or the environment's endpoint."""
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    path = place.partition("?")[0].partition("/")[2]
    destination = open_url(f"sqs://{place}")
    assert isinstance(destination, SqsDestination)
    assert destination._queue.url == f"https://{place.partition('?')[0]}"
    await destination.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{service.port}")
    destination = open_url(f"sqs://{place}")
    await destination.publish(make_event())
    await destination.close()
    (request,) = service.requests
    assert f"/{region}/sqs/aws4_request" in request.headers["authorization"]
    assert json.loads(request.body)["QueueUrl"] == f"http://127.0.0.1:{service.port}/{path}"


async def test_endpoint_of_the_environment(server: Sqs, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E14: with `AWS_ENDPOINT_URL` the URL of a queue at Amazon leads to another server."""
    url = (await asyncio.to_thread(server.create_queue, queue)).partition("?")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    destination = open_url(url)
    await destination.check()
    await destination.publish(make_event())
    await destination.close()
    assert len(await asyncio.to_thread(server.receive, queue)) == 1


@pytest.mark.parametrize(
    ("environment", "query", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "http://a:1"}, "", "http://a:1"),
        ({"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_SQS": "http://b:2/sqs/"}, "", "http://b:2/sqs"),
        ({"AWS_ENDPOINT_URL": "http://a:1"}, "?endpoint=https://c", "https://c"),
        ({"AWS_ENDPOINT_URL": "http://a:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "", None),
        ({"AWS_ENDPOINT_URL_S3": "http://a:1"}, "", None),
    ],
)
async def test_which_endpoint(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], query: str, expected: str | None
) -> None:
    """E14: the URL's endpoint comes first, then the environment's for SQS, then that for all services."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    destination = open_url(f"sqs://sqs.eu-west-1.amazonaws.com/123456789012/events{query}")
    assert isinstance(destination, SqsDestination)
    endpoint = expected or "https://sqs.eu-west-1.amazonaws.com"
    assert destination._queue.endpoint == endpoint
    assert destination._queue.url == f"{endpoint}/123456789012/events"
    await destination.close()


@pytest.mark.parametrize(
    "value", ["localhost:9324", f"http://u:{CANARY}@host", f"http://host?key={CANARY}", "http://["]
)
def test_unusable_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """G8: an invalid endpoint in the environment is reported by its variable, and not quoted."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL: write https://host") as caught:
        open_url("sqs://sqs.eu-west-1.amazonaws.com/123456789012/events")
    assert CANARY not in str(caught.value)
