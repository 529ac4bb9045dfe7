"""The HTTP destination: the request, the meaning of each answer, and recovery."""

import asyncio
import base64
import itertools
import json
import logging
import random
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from pydantic import SecretStr
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs
from support.certificates import make_certificate
from support.kinds_base import TRACE, Answer, HttpSink, Received, make_event, open_url, until

from receiver import http_connections
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, base, open_destination
from receiver.destinations.answers import MAX_HEAD_BYTES
from receiver.destinations.base import MAX_READ_ANSWER, answer_text
from receiver.destinations.http import MAX_ANSWER_BYTES
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.masking import MASK, register_secret

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CANARY = "s3cr3t-canary"
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 0.3}


@pytest.fixture
async def sink() -> AsyncIterator[HttpSink]:
    """A server that answers 200, unless a test sets another answer."""
    async with HttpSink() as running:
        yield running


@pytest.fixture
async def destination(sink: HttpSink) -> AsyncIterator[Destination]:
    """A destination that posts to the server."""
    opened = open_url(sink.url)
    await opened.start()
    yield opened
    await opened.close()


async def test_binary_mode_has_the_attributes_in_headers(sink: HttpSink) -> None:
    """E14: in binary mode the CloudEvents library reads the same event from headers and body."""
    settings = DestinationSettings(
        name="test", url=SecretStr(sink.url), secret=SecretStr(SECRET), binary=True
    )
    destination = open_destination(settings)
    event = make_event({"prompt": "Zürich 東京"}, subject="request é 1", replayid="replay-1", **TRACE)
    await destination.publish(event)
    await destination.close()
    (request,) = sink.requests
    read = from_http_event(HTTPMessage(headers=request.headers, body=request.body))
    assert read.get_attributes() == event.get_attributes() | {"attempt": "1"}
    assert read.get_data() == event.get_data()
    assert {name: request.headers[name] for name in TRACE} == TRACE
    Webhook(SECRET).verify(request.body, request.headers)


def raw(answer: bytes, *, close: bool = False) -> Answer:
    """Answer with these bytes."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        if close:
            writer.close()

    return respond


def status(code: int, headers: str = "") -> Answer:
    """Answer with a status, headers and an empty body."""
    return raw(f"HTTP/1.1 {code} Whatever\r\ncontent-length: 0\r\n{headers}\r\n".encode())


async def test_request(sink: HttpSink, destination: Destination) -> None:
    """E1: an event is one POST of a structured CloudEvent to exactly the path of the URL."""
    event = make_event({"text": "Zürich"}, **TRACE)
    await destination.publish(event)
    (request,) = sink.requests
    assert {name: request.headers[name] for name in TRACE} == TRACE
    assert (request.method, request.target) == ("POST", "/events")
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["host"] == f"127.0.0.1:{sink.port}"
    assert request.headers["content-length"] == str(len(request.body))
    assert request.headers["user-agent"].startswith("clipia-receiver/")
    assert json.loads(request.body)["data"] == {"text": "Zürich"}
    assert not [name for name in request.headers if name.startswith("webhook-")]


async def test_signature_verifies_with_the_reference_library(sink: HttpSink) -> None:
    """E14: with a secret the request carries a Standard Webhooks signature over the exact body."""
    destination = open_url(sink.url, secret=SECRET)
    event = make_event({"text": "Zürich 🎬"})
    await destination.publish(event)
    await destination.close()
    (request,) = sink.requests
    assert request.headers["webhook-id"] == event.get_extension("deliveryid")
    verifier = Webhook(SECRET)
    assert verifier.verify(request.body, request.headers)["id"] == event.get_id()
    for change in ({"webhook-id": event.get_id()}, {"webhook-timestamp": "1"}):
        with pytest.raises(WebhookVerificationError):
            verifier.verify(request.body, request.headers | change)
    with pytest.raises(WebhookVerificationError):
        verifier.verify(request.body + b" ", request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(b"x" * 24).decode()).verify(request.body, request.headers)


async def test_event_without_delivery_id_is_signed_with_its_own(sink: HttpSink) -> None:
    """E14: every message has an id to deduplicate by."""
    destination = open_url(sink.url, secret=SECRET)
    event = make_event()
    del event.get_attributes()["deliveryid"]
    await destination.publish(event)
    await destination.close()
    assert sink.requests[0].headers["webhook-id"] == event.get_id()


@pytest.mark.parametrize("size", [24, 25, 26, 64])
async def test_secret_with_and_without_padding(sink: HttpSink, size: int) -> None:
    """E14: base64 may leave out its padding, as some tools do."""
    encoded = base64.b64encode(b"k" * size).decode()
    for secret in {f"whsec_{encoded}", f"whsec_{encoded.rstrip('=')}"}:
        destination = open_url(sink.url, secret=secret)
        await destination.publish(make_event())
        await destination.close()
        request = sink.requests.pop()
        Webhook(b"k" * size).verify(request.body, request.headers)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        CANARY * 3,
        SECRET.removeprefix("whsec_"),
        f"whsec_{SECRET}",
        f"{SECRET}!{CANARY}",
        f"whsec_{base64.b64encode(b'x' * 23).decode()}",
        f"whsec_é{base64.b64encode(b'x' * 32).decode()}",
        f"whsec_ {base64.b64encode(b'x' * 32).decode()}",
        f"WHSEC_{base64.b64encode(b'x' * 32).decode()}",
    ],
)
def test_bad_secret_is_rejected(secret: str) -> None:
    """E14: a secret must be whsec_ and base64 of enough bytes; another one is rejected and not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url("https://example.com", secret=secret)
    assert "whsec_" in str(caught.value)
    assert "'test'" in str(caught.value)
    assert len(secret) < 7 or secret not in str(caught.value)


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
async def test_2xx_is_delivered(sink: HttpSink, destination: Destination, code: int) -> None:
    """E1: every 2xx confirms."""
    sink.answer = status(code)
    await destination.publish(make_event())
    await destination.publish(make_event())
    assert len(sink.requests) == 2


ABOUT_THE_MESSAGE = [400, 413, 415, 422]
DURING_A_DEPLOY = [
    300,
    304,
    305,
    401,
    402,
    403,
    404,
    405,
    406,
    408,
    409,
    410,
    411,
    414,
    418,
    421,
    425,
    428,
    429,
]


@pytest.mark.parametrize("code", [*DURING_A_DEPLOY, 431, 451, 499, 500, 501, 502, 503, 504, 507, 599])
async def test_status_about_the_destination(sink: HttpSink, destination: Destination, code: int) -> None:
    """E4: a status that is not about the message is retried: a deploy or a proxy may answer so."""
    sink.answer = status(code)
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert (caught.value.reason, caught.value.retry_after) == ("status", None)
    assert str(caught.value).startswith(f"http://127.0.0.1:{sink.port} answered {code}")


@pytest.mark.parametrize("code", ABOUT_THE_MESSAGE)
async def test_status_about_the_message(sink: HttpSink, destination: Destination, code: int) -> None:
    """E4: a status that rejects this message ends the delivery."""
    sink.answer = status(code)
    with pytest.raises(PublishRejected) as caught:
        await destination.publish(make_event())
    assert caught.value.reason == "status"
    assert str(code) in str(caught.value)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(sink: HttpSink, destination: Destination, code: int) -> None:
    """E13: a redirect is a failure that advises the final URL; no event is sent to its target."""
    async with HttpSink() as elsewhere:
        sink.answer = status(code, f"location: {elsewhere.url}?{CANARY}\r\n")
        with pytest.raises(PublishFailed, match="redirects are not followed") as caught:
            await destination.publish(make_event())
        assert elsewhere.connections == 0
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize("code", [301, 404, 408, 421, 429, 500, 503])
async def test_retry_after_in_seconds(sink: HttpSink, destination: Destination, code: int) -> None:
    """E5: the delay that an answer asks for is passed on, with any status."""
    sink.answer = status(code, "retry-after: 7\r\n")
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert caught.value.retry_after == 7.0


async def test_retry_after_as_a_date(sink: HttpSink, destination: Destination) -> None:
    """E5: a date is converted into the seconds until then."""
    sink.answer = status(503, f"retry-after: {format_datetime(datetime.now(UTC) + timedelta(hours=1))}\r\n")
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert caught.value.retry_after is not None
    assert 3000 < caught.value.retry_after <= 3600


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("retry-after: Mon, 01 Jan 99999999999999999999 00:00:00 GMT\r\n", None),
        ("retry-after: Mon, 01 Jan 2027 00:00:00 +99999999999999\r\n", None),
        ("retry-after: 7\r\nretry-after: 7\r\n", 7.0),
        ("retry-after: soon\r\nretry-after: 7\r\nretry-after: 9\r\n", 9.0),
        ("X Trace: 1\r\nretry-after: 7\r\n", 7.0),
        ("Retry-After : 7\r\nnonsense\r\n", 7.0),
        ("retry-after:\r\n 7\r\n", 7.0),
    ],
)
async def test_retry_after_in_odd_heads(
    sink: HttpSink, destination: Destination, headers: str, expected: float | None
) -> None:
    """E5: a date too far ahead is ignored, and neither repetition nor odd headers hide a delay."""
    sink.answer = status(503, headers)
    with pytest.raises(PublishFailed, match="answered 503") as caught:
        await destination.publish(make_event())
    assert caught.value.retry_after == expected


async def drip(writer: asyncio.StreamWriter, head: bytes) -> None:
    """Send a byte at a time until the client closes the connection."""
    writer.write(head)
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK", b"HTTP/1.1 100 Continue\r\nX: "])
@pytest.mark.usefixtures("impatient")
async def test_dripping_answer_is_cut_off(sink: HttpSink, destination: Destination, head: bytes) -> None:
    """D7: the deadline is for the whole exchange; bytes that arrive in time do not extend it."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await drip(writer, head)

    sink.answer = respond
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert caught.value.reason in {"timeout", "connection"}


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n",
        b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nffffff\r\n",
        b"HTTP/1.0 202 Accepted\r\n\r\n",
    ],
    ids=["headers", "body", "chunk", "no length"],
)
@pytest.mark.usefixtures("impatient")
async def test_status_confirms_however_slow_the_rest(
    sink: HttpSink, destination: Destination, head: bytes
) -> None:
    """E1: a 2xx whose headers or body never end has confirmed; the wait for the rest is bounded."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await drip(writer, head)

    sink.answer = respond
    async with asyncio.timeout(10):
        await destination.publish(make_event())


@pytest.mark.usefixtures("impatient")
async def test_silent_server_times_out(sink: HttpSink, destination: Destination) -> None:
    """E6: if a server takes the request and does not answer, the publish fails in time."""
    sink.answer = raw(b"")
    with pytest.raises(PublishFailed, match=r"did not answer within 0\.3 s") as caught:
        await destination.publish(make_event())
    assert caught.value.reason == "timeout"


async def test_connections_survive_timeouts(
    sink: HttpSink, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: a hundred exchanges that time out, many before they had a connection, leave the pool whole."""
    answer, sink.answer = sink.answer, raw(b"")
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 0.3)
    results = await asyncio.gather(
        *(destination.publish(make_event()) for _ in range(100)), return_exceptions=True
    )
    assert [type(result) for result in results] == [PublishFailed] * 100
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 5.0)
    sink.answer = answer
    for _ in range(3):
        await asyncio.gather(*(destination.publish(make_event()) for _ in range(20)))


async def test_connections_survive_cancellation(
    sink: HttpSink, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E16: publishes that are cancelled at any moment leak neither connections nor slots."""
    monkeypatch.setattr(http_connections, "KEEP_ALIVE_SECONDS", 0.3)
    choose = random.Random()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(choose.uniform(0, 0.01))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    sink.answer = respond
    for _ in range(15):
        tasks = [asyncio.create_task(destination.publish(make_event())) for _ in range(60)]
        for _ in tasks:
            await asyncio.sleep(choose.uniform(0, 0.001))
            choose.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await destination.publish(make_event())
    await until(lambda: sink.open_connections == 0)


async def test_cancelled_publish_is_given_up(sink: HttpSink, destination: Destination) -> None:
    """E16: a publish that is cancelled at shutdown does not delay the close until the server answers."""
    sink.answer = raw(b"")
    publishing = asyncio.create_task(destination.publish(make_event()))
    await until(lambda: bool(sink.requests))
    publishing.cancel()
    async with asyncio.timeout(5):
        await destination.close()


@pytest.mark.parametrize("length", [0, 5])
async def test_error_answers_leave_no_connections(
    sink: HttpSink, destination: Destination, length: int
) -> None:
    """E5: an answer that is not read to its end does not keep its connection."""
    sink.answer = raw(b"HTTP/1.1 500 No\r\ncontent-length: %d\r\n\r\n" % length + b"x" * length)
    for _ in range(30):
        with pytest.raises(PublishFailed):
            await destination.publish(make_event())
    await until(lambda: sink.open_connections <= 1)


@pytest.mark.parametrize("code", [422, 503])
async def test_start_of_an_answer_is_kept_as_text(
    sink: HttpSink, destination: Destination, code: int
) -> None:
    """The failure has the start of the consumer's answer, without secrets and control characters."""
    register_secret(CANARY)
    body = f'{{"error": "no order", "token": "{CANARY}"}}\r\n\x1b[31m'.encode() + b"\xff" + b"x" * 3000
    chunked = b"HTTP/1.1 %d No\r\ntransfer-encoding: chunked\r\n\r\n" % code
    sink.answer = raw(chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    with pytest.raises(PublishFailed if code == 503 else PublishRejected) as caught:
        await destination.publish(make_event())
    assert isinstance(caught.value, PublishFailed | PublishRejected)
    answer = str(caught.value.answer)
    shown = f'{{"error": "no order", "token": "{MASK}"}}\\r\\n\\x1b[31m\\xff'
    assert answer.startswith(shown + "xxx")
    assert (len(answer), CANARY in str(caught.value)) == (1024, False)


async def test_only_the_start_of_an_answer_is_masked(
    sink: HttpSink, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long answer only the start is decoded and masked: masking all of it would block the event loop."""
    sizes: list[int] = []

    def seen(text: str) -> str:
        sizes.append(len(text))
        return text

    monkeypatch.setattr(base, "mask", seen)
    sink.answer = raw(b"HTTP/1.1 422 No\r\ncontent-length: 100000\r\n\r\n" + b"\xff" * 100_000)
    with pytest.raises(PublishRejected):
        await destination.publish(make_event())
    assert sizes == [MAX_READ_ANSWER]


@pytest.mark.parametrize("cut", range(4, 40, 3))
def test_half_a_secret_at_the_cut_is_not_shown(cut: int) -> None:
    """A secret that the cut of an answer has halved is dropped, even if masked secrets have made room."""
    secret = "Zq7".join("canary")
    register_secret(secret * 3)
    url = "amqp://login:hunter2-hunter2-hunter2-hunter2@broker"
    # The cut counts bytes: other letters take three.
    for last, rest in itertools.product((secret, url), ("-", "\N{CJK UNIFIED IDEOGRAPH-9519}")):
        start = f"{secret * 3} "
        start += rest * ((MAX_READ_ANSWER - cut - len(start)) // len(rest.encode()))
        shown = answer_text(f"{start}{last} and more".encode())
        assert shown.startswith(MASK)
        assert not any(last[at : at + 4] in shown for at in range(len(last) - 3))


async def test_an_endless_error_answer_is_cut_off(sink: HttpSink, destination: Destination) -> None:
    """D7: of an error answer that never ends the start is kept, and the attempt ends in a second."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await drip(writer, b"HTTP/1.1 500 No\r\ncontent-length: 9999999\r\n\r\n")

    sink.answer = respond
    with pytest.raises(PublishFailed, match="answered 500") as caught:
        await asyncio.wait_for(destination.publish(make_event()), 10)
    assert caught.value.answer


async def test_answer_is_read_up_to_a_limit(sink: HttpSink, destination: Destination) -> None:
    """D7: an endless answer confirms once the limit is read, and no more of it is read."""
    sent = 0

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        # Bounded: without the limit, 40 MiB are sent, which is too much.
        for _ in range(5 * 1024):
            writer.write(b"a" * 8192)
            sent += 8192
            await writer.drain()

    sink.answer = respond
    await destination.publish(make_event())
    # Bytes above the limit are in the buffers of the two sockets.
    assert MAX_ANSWER_BYTES < sent < MAX_ANSWER_BYTES + 16 * 1024 * 1024


async def test_compressed_answer_is_not_inflated(sink: HttpSink, destination: Destination) -> None:
    """D8: no compression is requested, and a compressed answer is not unpacked."""
    sink.answer = raw(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 7\r\n\r\nnot zip")
    await destination.publish(make_event())
    assert sink.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"220 " + CANARY.encode() + b"\r\n",
        b"HTTP/1.1 2" + CANARY.encode() + b"\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"garbage\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["nothing", "half a line", "interim", "another protocol", "bad status", "four digits", "late line"],
)
async def test_broken_answer_is_no_confirmation(
    sink: HttpSink, destination: Destination, answer: bytes
) -> None:
    """E1: an answer without a whole status line does not confirm, and is not quoted."""
    sink.answer = raw(answer, close=True)
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert caught.value.reason == "connection"
    assert CANARY not in str(caught.value)


ODD_RESTS = {
    "half a head": b"\r\n",
    "a space in a name": b"\r\nX Trace: 1\r\ncontent-length: 0\r\n\r\n",
    "a header without a colon": b"\r\nnonsense\r\n\r\n",
    "a control character": b"\r\nX: a\x00b\r\n\r\n",
    "two lengths": b"\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "the same length twice": b"\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nab",
    "no number for a length": b"\r\ncontent-length: two\r\n\r\nab",
    "a length beyond all bounds": b"\r\ncontent-length: 9" + b"9" * 40 + b"\r\n\r\nab",
    "a length too large": b"\r\ncontent-length: 100\r\n\r\nhalf",
    "a length too small": b"\r\ncontent-length: 1\r\n\r\nmore",
    "half a chunk": b"\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhal",
    "no chunk": b"\r\ntransfer-encoding: chunked\r\n\r\nnot chunked",
    "an unknown transfer encoding": b"\r\ntransfer-encoding: gzip\r\n\r\nab",
    "a head too long": b"\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("rest", ODD_RESTS.values(), ids=ODD_RESTS)
@pytest.mark.parametrize(
    "line", [b"HTTP/1.1 200 OK", b"HTTP/1.0 201", b"HTTP/1.1 102 P\r\n\r\nHTTP/1.1 204 "]
)
async def test_status_line_confirms(
    sink: HttpSink, destination: Destination, line: bytes, rest: bytes
) -> None:
    """E1: once its status line says 2xx the event has arrived, even if the rest is invalid."""
    sink.answer = raw(line + rest, close=True)
    await destination.publish(make_event())
    sink.answer = status(200)
    await destination.publish(make_event())
    assert len(sink.requests) == 2, "none was sent twice"


@pytest.mark.parametrize(
    ("code", "outcome"), [(503, PublishFailed), (404, PublishFailed), (422, PublishRejected)]
)
async def test_status_line_rejects(
    sink: HttpSink, destination: Destination, code: int, outcome: type[Exception]
) -> None:
    """E4: a status counts with invalid headers as it does without."""
    sink.answer = raw(b"HTTP/1.1 %d No\r\nX Trace: 1\r\n\r\n" % code)
    with pytest.raises(outcome, match=f"answered {code}"):
        await destination.publish(make_event())


@pytest.mark.parametrize(
    "line",
    [
        "HTTP/1.2 {} X",
        "HTTP/2.0 {} X",
        "HTTP/0.9 {} X",
        "HTTP/2 {}",
        "HTTP/1.1  {} X",
        "HTTP/1.1\t{} X",
        "http/1.1 {} X",
        "HTTP/1.1 {}OK",
    ],
)
async def test_status_line_of_any_spelling_counts(
    sink: HttpSink, destination: Destination, line: str
) -> None:
    """E1: a recognizable status counts, with any version and white space before it."""
    for code in (200, 503, 204):
        sink.answer = raw(line.format(code).encode() + b"\r\ncontent-length: 0\r\n\r\n")
        if code == 503:
            with pytest.raises(PublishFailed, match="answered 503"):
                await destination.publish(make_event())
        else:
            await destination.publish(make_event())
    assert len(sink.requests) == 3


@pytest.mark.parametrize("close", [True, False])
async def test_invalid_answers_are_reported(sink: HttpSink, destination: Destination, *, close: bool) -> None:
    """E1: bytes that are not an HTTP answer fail at once, with a message that is true of them."""
    for answer in (b"220 ready\r\n", b"ICY 200 OK\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"\x15\x03\x01\x00"):
        sink.answer = raw(answer, close=close)
        with pytest.raises(PublishFailed, match="no final status line in the answer") as caught:
            await destination.publish(make_event())
        assert caught.value.reason == "connection"


ANNOUNCEMENTS = {
    "plain": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n",
    "odd": b"HTTP/1.1 103 Early Hints\r\nX Odd: a\r\n\r\n",
    "without fields": b"HTTP/1.1 100 Continue\r\n\r\n",
    "of another version": b"HTTP/1.2 102\n\n",
    "many": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 5000,
    "long": b"HTTP/1.1 103 Early Hints\r\nlink: " + b"x" * 2 * MAX_HEAD_BYTES + b"\r\n\r\n",
}


@pytest.mark.parametrize("announcement", ANNOUNCEMENTS.values(), ids=ANNOUNCEMENTS)
@pytest.mark.parametrize("pause", [True, False])
async def test_announcements_hide_no_answer(
    sink: HttpSink, destination: Destination, announcement: bytes, *, pause: bool
) -> None:
    """E1: the answer after 1xx counts, even if those are invalid, long or split."""
    cuts = [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"]

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        parts = [announcement + cuts[0][:8], cuts[0][8:]]
        if pause:
            parts = [announcement[:-3], announcement[-3:-1], announcement[-1:], *parts[1:]]
            parts[3:] = [cuts[0]]
        for part in parts:
            writer.write(part)
            await writer.drain()
            # The next part is a read of its own.
            await asyncio.sleep(0.02)

    sink.answer = respond
    await destination.publish(make_event())
    await destination.publish(make_event())
    assert sink.connections == 1
    cuts.pop(0)
    with pytest.raises(PublishFailed, match="answered 503"):
        await destination.publish(make_event())


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n", 1),
        (CHUNKED + b"0\r\n\r\n", 1),
        (CHUNKED + b"2;a=b\r\n0\n\r\n000\r\nX-Sum: 0\r\n\r\n", 1),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n\r\n", 4),
        (CHUNKED + b"0\r\n\r\n0\r\n\r\n", 4),
        (CHUNKED + b"0\r\n\r\n" + CHUNKED + b"0\r\n\r\n", 4),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok\r\n", 4),
        # llhttp rejects it.
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok", 4),
    ],
)
@pytest.mark.parametrize("size", [10_000, 1])
async def test_bytes_after_an_answer_cost_its_connection_only(
    sink: HttpSink, destination: Destination, answer: bytes, connections: int, size: int
) -> None:
    """E1: each event is confirmed, and a connection is used again only if no byte followed an answer."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(answer), size):
            writer.write(answer[start : start + size])
            await asyncio.sleep(0)

    sink.answer = respond
    for _ in range(4):
        await destination.publish(make_event())
    assert (len(sink.requests), sink.connections) == (4, connections)


FORGED = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\ncontent-length: %d\r\n\r\n" % len(FORGED),
        b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
async def test_bytes_after_an_answer_confirm_no_other_event(
    sink: HttpSink, destination: Destination, answer: bytes
) -> None:
    """E1: bytes after an answer, such as the body of a 204, are not read as the next answer."""
    sink.answer = raw(answer + FORGED)
    await destination.publish(make_event())
    sink.answer = status(503)
    with pytest.raises(PublishFailed, match="answered 503"):
        await destination.publish(make_event())
    assert sink.connections == 2


async def test_line_end_after_a_body_is_no_answer(sink: HttpSink, destination: Destination) -> None:
    """E1: a line end that arrives late, after a body, hides neither a confirmation nor a rejection."""
    await destination.publish(make_event())
    sink.answer = raw(b"\r\nHTTP/1.1 204 No Content\r\n\r\n")
    await destination.publish(make_event())
    sink.answer = raw(b"\r\n\r\nHTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")
    with pytest.raises(PublishFailed, match="answered 503"):
        await destination.publish(make_event())
    assert len(sink.requests) == 3


async def test_announced_body_of_a_204_costs_the_connection(sink: HttpSink, destination: Destination) -> None:
    """E1: if a 204 announces a body the next event uses another connection: the body may arrive late."""
    sink.answer = raw(b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n")
    await destination.publish(make_event())
    await destination.publish(make_event())
    assert sink.connections == 2


async def test_left_over_chunks_confirm_no_other_event(sink: HttpSink, destination: Destination) -> None:
    """E1: an answer that arrived before its request does not count, and does not hide the right one."""
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    sink.answer = raw(chunked + FORGED)
    await destination.publish(make_event())
    sink.answer = status(503)
    with pytest.raises(PublishFailed, match="answered 503"):
        await destination.publish(make_event())
    sink.answer = status(200)
    await destination.publish(make_event())


async def test_connection_is_reused(sink: HttpSink, destination: Destination) -> None:
    """E5: events that follow each other share a connection."""
    for _ in range(20):
        await destination.publish(make_event())
    assert sink.connections == 1


async def test_connections_are_bounded(sink: HttpSink, destination: Destination) -> None:
    """E5: a backlog does not open a connection per event."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    sink.answer = respond
    await asyncio.gather(*(destination.publish(make_event()) for _ in range(100)))
    assert 1 < sink.most_open <= 32


async def test_cookies_are_not_kept(sink: HttpSink, destination: Destination) -> None:
    """D5: a server's cookies are not sent back."""
    sink.answer = status(204, "set-cookie: session=1\r\n")
    for _ in range(2):
        await destination.publish(make_event())
    assert "cookie" not in sink.requests[1].headers


async def test_environment_is_not_trusted(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """D5: proxies and password files of the environment are ignored."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {CANARY}\n")
    netrc.chmod(0o600)
    async with HttpSink() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NETRC", str(netrc))
        destination = open_url(sink.url)
        await destination.publish(make_event())
        await destination.close()
        assert proxy.connections == 0
    assert "authorization" not in sink.requests[0].headers


async def test_credentials_move_to_the_header(sink: HttpSink) -> None:
    """G8: a user and password in the URL are sent as Basic authorization, decoded, and not in the target."""
    url = sink.url.replace("http://", "http://us%40er:p%C3%A4ss%3A@") + "?a=b"
    destination = open_url(url)
    await destination.publish(make_event())
    await destination.close()
    (request,) = sink.requests
    kind, _, encoded = request.headers["authorization"].partition(" ")
    assert (kind, base64.b64decode(encoded).decode()) == ("Basic", "us@er:päss:")
    assert request.target == "/events?a=b"
    assert request.headers["host"] == f"127.0.0.1:{sink.port}"


@pytest.mark.usefixtures("impatient")
async def test_no_secret_reaches_errors_or_logs(sink: HttpSink, caplog: pytest.LogCaptureFixture) -> None:
    """G8: passwords, queries, secrets and answers are in no error and no log line, at any level."""
    caplog.set_level(logging.DEBUG)
    url = sink.url.replace("http://", f"http://user:{CANARY}@") + f"/{CANARY}?token={CANARY}#{CANARY}"
    destination = open_url(url, secret=SECRET)
    texts = [repr(destination)]
    answer = f"HTTP/1.1 %d {CANARY}\r\ncontent-length: {len(CANARY)}\r\n\r\n{CANARY}"
    answers = [raw((answer % code).encode()) for code in (200, 302, 404, 500)]
    for sink.answer in (*answers, raw(b""), raw(CANARY.encode(), close=True)):
        try:
            await destination.publish(make_event({"prompt": CANARY}))
        except (PublishFailed, PublishRejected) as error:
            texts += [str(error), repr(error)]
    await sink.stop()
    for call in (destination.publish(make_event()), destination.check()):
        with pytest.raises(PublishFailed) as caught:
            await call
        texts.append(str(caught.value))
    await destination.close()
    assert len(texts) == 13
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    for secret in (CANARY, SECRET.removeprefix("whsec_")):
        assert secret not in "\n".join(texts + ours)


async def test_refused_connection_is_explained(destination: Destination, sink: HttpSink) -> None:
    """E4: a server that is down is a transient failure that names the server."""
    await sink.stop()
    with pytest.raises(PublishFailed, match=rf"http://127\.0\.0\.1:{sink.port}: ConnectError") as caught:
        await destination.publish(make_event())
    assert caught.value.reason == "connection"


@pytest.mark.parametrize(
    ("code", "headers", "verdict"),
    [
        (200, "", "fine"),
        (204, "allow: OPTIONS, POST\r\n", "fine"),
        (405, "allow: POST\r\n", "fine"),
        (405, "allow: GET\r\nallow: post\r\n", "fine"),
        (405, "X Odd: 1\r\nallow: POST\r\n", "fine"),
        (200, "allow: *\r\n", "fine"),
        (405, "allow: *\r\n", "fine"),
        (200, "allow: post\r\n", "fine"),
        (200, "allow:\r\n", "fine"),
        (405, "allow:\r\n", "warned"),
        (200, "X Odd: 1\r\nallow: GET\r\n", "warned"),
        (501, "", "fine"),
        (200, "allow: GET, HEAD\r\n", "warned"),
        (405, "allow: GET\r\n", "warned"),
        *((code, "", "warned") for code in (301, 308, 400, 401, 403, 404, 405, 409, 410, 421, 499)),
        (500, "", "failed"),
        (503, "", "failed"),
    ],
)
async def test_check_asks_for_options(
    sink: HttpSink, destination: Destination, code: int, headers: str, verdict: str
) -> None:
    """The check warns if a URL answers as if it took no events, and fails if the service is down."""
    sink.answer = status(code, headers)
    with capture_logs() as logs:
        if verdict == "failed":
            with pytest.raises(PublishFailed, match="is the service behind it up"):
                await destination.check()
        else:
            await destination.check()
    assert [f"answers {code} to OPTIONS" in entry["problem"] for entry in logs] == [True] * (
        verdict == "warned"
    )
    assert [(request.method, request.body) for request in sink.requests] == [("OPTIONS", b"")]


async def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E14: a server without a trusted certificate gets no event; SSL_CERT_FILE names a private authority."""
    certificate = make_certificate(tmp_path / "server.pem")
    context: Any = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    sink = await HttpSink().start(ssl=context)
    destination = open_url(sink.url)
    with pytest.raises(PublishFailed, match="CERTIFICATE_VERIFY_FAILED"):
        await destination.publish(make_event())
    await destination.close()
    assert sink.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    destination = open_url(sink.url)
    await destination.publish(make_event())
    await destination.close()
    assert len(sink.requests) == 1
    await sink.stop()


async def test_headers_of_one_s_own(sink: HttpSink) -> None:
    """E14: a destination's headers are in every request, the check's, too, and may replace ours."""
    headers = {"Authorization": f"Bearer {CANARY}", "X-Team": "video", "User-Agent": "ours/1"}
    destination = open_url(sink.url, headers=headers)
    await destination.check()
    await destination.publish(make_event())
    await destination.close()
    assert [request.method for request in sink.requests] == ["OPTIONS", "POST"]
    for request in sink.requests:
        assert {name: request.headers[name.lower()] for name in headers} == headers


async def test_two_secrets_while_rotating(sink: HttpSink) -> None:
    """A12: with two secrets a consumer that knows the old or the new one verifies each message."""
    other = "whsec_" + base64.b64encode(b"another secret of 24 bytes").decode()
    destination = open_url(sink.url, secret=f"{SECRET}, {other}")
    await destination.publish(make_event())
    await destination.close()
    (request,) = sink.requests
    for secret in (SECRET, other):
        Webhook(secret).verify(request.body, request.headers)
    with pytest.raises(SettingsError, match="each secret must be whsec_"):
        open_url(sink.url, secret=f"{SECRET},whsec_short")


async def test_connections_are_as_many_as_the_concurrency(sink: HttpSink) -> None:
    """E6: a destination with a wider `concurrency` than usual has as many connections."""
    gate = asyncio.Event()

    async def wait(_request: Received, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    sink.answer = wait
    destination = open_url(sink.url, concurrency=40)
    publishes = [asyncio.create_task(destination.publish(make_event())) for _ in range(50)]
    await until(lambda: sink.open_connections == 40)
    gate.set()
    await asyncio.gather(*publishes)
    await destination.close()
    assert sink.most_open == 40
