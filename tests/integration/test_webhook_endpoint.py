"""The callback over HTTP, on both databases: the stored rows and the answers."""

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import FromClause, func, select
from starlette.applications import Starlette
from support.payloads import SECRET, body, failure, signed
from support.serving import Door, serving

from receiver.api.answers import HEAD_COMPLETE
from receiver.api.webhook import WebhookEndpoint
from receiver.app import create_app
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.rows import event_id
from receiver.db.tables import events
from receiver.errors import DatabaseUnavailable
from receiver.settings import Settings

URL = "/clipia/webhook"
OTHER_SECRET = "whsec_other-0123456789abcdef"


class Site:
    """A receiver inside the test, without its worker, and access to its database."""

    def __init__(self, app: Starlette, url: str, database: Database) -> None:
        self.app = app
        self.client = httpx.AsyncClient(base_url=url)
        self.database = database

    async def post(
        self, content: bytes, *, url: str = URL, headers: dict[str, str] | None = None, **sign: Any
    ) -> httpx.Response:
        """Post a webhook; it is signed if no `headers` are given."""
        return await self.client.post(
            url, content=content, headers=signed(content, **sign) if headers is None else _latin(headers)
        )

    async def trickle(self, content: bytes, *, length: int) -> tuple[int, bytes]:
        """Send a head with this Content-Length and the content byte by byte; return the answer's head."""
        reader, writer = await asyncio.open_connection(self.client.base_url.host, self.client.base_url.port)
        writer.write(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        for byte in content:
            await asyncio.wait([answer], timeout=0.05)
            if answer.done():
                break
            writer.write(bytes([byte]))
        head = await asyncio.wait_for(answer, 5)
        writer.close()
        return int(head.split()[1]), head

    async def rows(self, table: FromClause) -> list[dict[str, Any]]:
        """Return all rows of a table."""
        async with self.database.read() as connection:
            return [
                dict(row)
                for row in (await connection.execute(select(table).order_by(table.c.seq))).mappings()
            ]

    async def count(self, table: FromClause) -> int:
        """Return the number of rows of a table."""
        async with self.database.read() as connection:
            return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


@asynccontextmanager
async def make_site(
    database_url: str, database: Database, *, door: Door = "direct", **settings: Any
) -> AsyncIterator[Site]:
    """Open a receiver with some settings."""
    loaded = Settings.load(database_url=database_url, **({"clipia_webhook_secret": SECRET} | settings))
    app = create_app(loaded, worker=False)
    async with serving(app, door=door) as url:
        site = Site(app, url, database)
        yield site
        await site.client.aclose()


@pytest.fixture(params=["direct", "asgi"])
def door(request: pytest.FixtureRequest) -> Door:
    """Each of the two ways of a webhook."""
    found: Door = request.param
    return found


@pytest.fixture
async def site(database_url: str, database: Database, door: Door) -> AsyncIterator[Site]:
    """A receiver with the defaults."""
    async with make_site(database_url, database, door=door) as opened:
        yield opened


def metric(name: str, **labels: str) -> float:
    """Return a counter's value."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_signed_webhook_is_stored_as_it_was_sent(site: Site) -> None:
    """A2: odd spacing, escapes and line ends are signed, verified and stored byte for byte."""
    content = (
        b'{ "request_id":"r-1",\r\n "status" : "OK", '
        b'"payload":{"model":"m\\/x","cost":3,"new":"\\u00e9\xc3\xa9"} }\n'
    )
    response = await site.post(content)
    assert response.status_code == 200
    assert response.json() == {"status": "accepted", "event_id": str(event_id("clipia", "r-1"))}
    (event,) = await site.rows(events)
    assert event["body"] == content
    assert (event["source"], event["request_id"], event["origin"]) == ("clipia", "r-1", "webhook")
    assert (event["state"], event["status"], event["model"], event["cost"]) == ("received", "OK", "m/x", 3)
    assert abs((datetime.now(UTC) - event["received_at"]).total_seconds()) < 60


async def test_a_failure_is_an_event_too(site: Site) -> None:
    """An ERROR webhook is stored like any other result."""
    response = await site.post(failure("r-2"))
    assert response.json()["status"] == "accepted"
    (event,) = await site.rows(events)
    assert (event["state"], event["status"], event["model"], event["cost"]) == (
        "received",
        "ERROR",
        None,
        None,
    )


async def test_each_delivery_leaves_a_receipt(site: Site) -> None:
    """A12, A15: signed time, secret id and the unsigned webhook id are recorded."""
    content = body("r-3")
    now = int(time.time()) - 7
    headers = signed(content, at=now)
    await site.post(content, headers=headers)
    (receipt,) = await site.rows(all_receipts)
    assert receipt["signed_at"] == datetime.fromtimestamp(now, UTC)
    assert receipt["webhook_id"] == headers["X-Clipia-Webhook-Id"]
    assert receipt["outcome"] == "accepted"
    assert receipt["body"] is None
    assert len(receipt["secret_id"]) == 8


BAD_HEADERS = [
    None,
    "",
    "t=1",
    f"t={int(time.time())}",
    f"t={int(time.time())},v1={'0' * 64}",
    f"v1={'0' * 64}",
    "v1=" + "é" * 64,
]


async def test_every_rejection_looks_the_same(site: Site) -> None:
    """A1: missing, malformed, wrong and stale signatures get one constant answer, and no event is stored."""
    content = body()
    answers = []
    for value in BAD_HEADERS:
        headers = {} if value is None else {"X-Clipia-Signature": value.encode("latin-1").decode("latin-1")}
        answers.append(await site.client.post(URL, content=content, headers=_latin(headers)))
    answers.append(await site.post(content, at=time.time() - 301))
    answers.append(await site.post(content, at=time.time() + 302))
    answers.append(await site.post(content, secret=OTHER_SECRET))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert len({tuple(sorted(answer.headers.items())) for answer in answers}) == 1
    assert await site.count(events) == await site.count(all_receipts) == 0


def _latin(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


async def test_rejections_are_counted_by_reason(site: Site) -> None:
    """A9, G11: a changed format of the provider shows within minutes, in the metrics only."""
    before = metric("receiver_rejections_total", source="clipia", reason="format")
    await site.client.post(URL, content=b"{}", headers={"X-Clipia-Signature": f"t=1700000000,v1={'A' * 64}"})
    assert metric("receiver_rejections_total", source="clipia", reason="format") == before + 1


async def test_two_signature_headers_are_ambiguous(site: Site) -> None:
    """A8: duplicated header lines are rejected, even if one of them is valid."""
    content = body()
    good = signed(content)["X-Clipia-Signature"]
    for other in (good, f"t=1700000000,v1={'0' * 64}"):
        headers = [("X-Clipia-Signature", good), ("X-Clipia-Signature", other)]
        assert (await site.client.post(URL, content=content, headers=headers)).status_code == 401


async def test_one_signature_of_several_is_enough(site: Site) -> None:
    """A7: during a rotation of Clipia's, one matching v1 is enough."""
    content = body()
    t, good = signed(content)["X-Clipia-Signature"].split(",")
    for value in (f"{t},v1={'0' * 64},{good}", f"{t},{good},v1={'0' * 64}", f"{t},v0=x,{good}"):
        response = await site.client.post(URL, content=content, headers={"X-Clipia-Signature": value})
        assert response.status_code == 200


async def test_secrets_rotate_without_a_rejection(database_url: str, database: Database) -> None:
    """A12: old only, both, new only: webhooks signed with either secret pass while both are configured."""
    for configured, accepted in (
        (SECRET, {SECRET}),
        (f"{OTHER_SECRET},{SECRET}", {SECRET, OTHER_SECRET}),
        (OTHER_SECRET, {OTHER_SECRET}),
    ):
        async with make_site(database_url, database, clipia_webhook_secret=configured) as site:
            for secret in (SECRET, OTHER_SECRET):
                response = await site.post(body(), secret=secret)
                assert response.status_code == (200 if secret in accepted else 401)


async def test_the_same_bytes_a_hundred_times_are_one_event(site: Site) -> None:
    """A13: a repeat inside the tolerance is acked and changes no event."""
    content = body("r-4")
    headers = signed(content)
    answers = await asyncio.gather(*(site.post(content, headers=headers) for _ in range(100)))
    statuses = sorted(answer.json()["status"] for answer in answers)
    assert statuses == ["accepted"] + ["duplicate"] * 99
    assert len({answer.json()["event_id"] for answer in answers}) == 1
    assert await site.count(events) == 1
    assert sum(1 + row["repeated"] for row in await site.rows(all_receipts)) == 100


async def test_a_changed_request_id_breaks_the_signature(site: Site) -> None:
    """A14: an event cannot be replayed under another id."""
    content = body("r-5")
    response = await site.post(content.replace(b"r-5", b"r-6"), headers=signed(content))
    assert response.status_code == 401


@pytest.mark.parametrize("webhook_id", ["same", "", "x" * 400, "\xe9\xff", None])
async def test_unsigned_headers_change_nothing(site: Site, webhook_id: str | None) -> None:
    """A15: unsigned headers have no effect on status and deduplication."""
    content = body("r-7")
    headers = signed(content)
    del headers["X-Clipia-Webhook-Id"]
    headers["X-Clipia-Timestamp"] = "1"
    if webhook_id is not None:
        headers["X-Clipia-Webhook-Id"] = webhook_id
    assert (await site.post(content, headers=headers)).json()["status"] == "accepted"
    assert (await site.post(content, headers=headers)).json()["status"] == "duplicate"
    other = body("r-8")
    headers |= {"X-Clipia-Signature": signed(other)["X-Clipia-Signature"]}
    assert (await site.post(other, headers=headers)).json()["status"] == "accepted"


async def test_sources_do_not_touch_each_other(database_url: str, database: Database) -> None:
    """A16, A17: one request_id from two sources is two events; a secret is valid for its own source only."""
    staging = {"name": "staging", "secret": OTHER_SECRET}
    async with make_site(database_url, database, sources=[staging]) as site:
        content = body("r-9")
        first = await site.post(content)
        second = await site.post(content, url=f"{URL}/staging", secret=OTHER_SECRET)
        assert first.json()["status"] == second.json()["status"] == "accepted"
        assert first.json()["event_id"] != second.json()["event_id"]
        assert (await site.post(content, secret=OTHER_SECRET)).status_code == 401
        assert (await site.post(content, url=f"{URL}/staging")).status_code == 401
        assert (await site.post(content, url=f"{URL}/clipia")).json()["status"] == "duplicate"
        assert (await site.post(content, url=f"{URL}/absent")).status_code == 404


async def test_the_path_is_no_credential(site: Site) -> None:
    """A18: the path of a source is of no use without its secret."""
    assert (await site.client.post(f"{URL}/clipia", content=body())).status_code == 401


# -- the body


async def test_a_large_body_is_rejected_before_it_is_read(site: Site) -> None:
    """B3: a declared length over the limit is answered 413 before a byte is read."""
    assert (await site.trickle(b"", length=10 * 2**30))[0] == 413


async def test_a_chunked_body_is_read_up_to_the_limit(site: Site) -> None:
    """B3: an endless chunked body is cut after the limit."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        # With a timeout: without the limit there would be another answer, not an endless wait.
        for _ in range(64):
            sent += 65_536
            yield b"x" * 65_536

    async with httpx.AsyncClient(transport=httpx.ASGITransport(site.app), base_url="http://x") as client:
        response = await client.post(URL, content=endless())
    assert response.status_code == 413
    assert sent <= 262_144 + 2 * 65_536


async def test_a_body_at_the_limit_is_taken(site: Site) -> None:
    """B3: the limit itself is allowed, one byte more is not."""
    content = body("r-10", padding="")
    content = content.replace(b'"padding": ""', b'"padding": "' + b"x" * (262_144 - len(content)) + b'"')
    assert len(content) == 262_144
    assert (await site.post(content)).status_code == 200
    assert (await site.post(content + b" ")).status_code == 413


async def test_a_slow_body_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2: a body that does not arrive in time is answered 408 and leaves no task behind."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 0.2)
    before = len(asyncio.all_tasks())
    status, head = await site.trickle(b"x" * 49, length=50)
    assert status == 408
    assert b"\r\nconnection: close\r\n" in head
    assert len(asyncio.all_tasks()) == before


async def test_a_client_that_hangs_up_is_forgotten(site: Site) -> None:
    """B5: after a disconnect in mid-body no event is stored and no answer sent."""
    app = site.app
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    await app(scope, receive, send)
    assert sent == []
    assert await site.count(events) == 0


@pytest.mark.parametrize(
    "encoding",
    ["gzip", "br", "gzip, gzip", "deflate", "X-GZIP", "identity, gzip", "utf-8,zstd", "compress;q=1", "dcb"],
)
async def test_an_encoded_body_is_rejected_unread(site: Site, encoding: str) -> None:
    """B6: no body is inflated before it is verified; it must come as it was signed."""
    content = gzip.compress(body())
    response = await site.post(content, headers=signed(content) | {"Content-Encoding": encoding})
    assert response.status_code == 415


@pytest.mark.parametrize(
    "encoding",
    [
        *[
            "identity",
            "",
            "utf-8",
            "UTF8",
            "us-ascii",
            "iso-8859-1",
            "8bit",
            "binary",
            "none",
            "text",
            "json",
        ],
        *["identity, identity", "utf-8; q=1", '"utf-8"', "charset=utf-8", ",", "*", "x"],
    ],
)
async def test_a_name_that_changes_no_byte_is_no_encoding(site: Site, encoding: str) -> None:
    """B6: a Content-Encoding that is no compression is ignored; the signature over the raw bytes decides."""
    content = body()
    response = await site.post(content, headers=signed(content) | {"Content-Encoding": encoding})
    assert response.status_code == 200
    forged = await site.post(content, headers=signed(b"{}") | {"Content-Encoding": encoding})
    assert forged.status_code == 401


STRANGE = {
    "B7 empty": b"",
    "B7 whitespace": b" \n\t ",
    "B7 UTF-16": body("r").decode().encode("utf-16"),
    "B7 UTF-32": body("r").decode().encode("utf-32"),
    "B9 duplicate key": b'{"request_id":"r","request_id":"s","status":"OK"}',
    "B9 unclosed": b'{"request_id":"r","status":"OK","x":' + b"[" * 50_000,
    "B9 NUL in request_id": b'{"request_id":"r\\u0000","status":"OK"}',
    "B10 list": b"[]",
    "B10 number": b"1",
    "B10 null": b"null",
    "B10 no request_id": b'{"status":"OK","payload":{}}',
    "B10 integer request_id": b'{"request_id":1,"status":"OK"}',
    "B10 empty request_id": b'{"request_id":"","status":"OK"}',
    "B10 long request_id": b'{"request_id":"' + b"x" * 10_000 + b'","status":"OK"}',
    "B11 unknown status": b'{"request_id":"r","status":"PENDING"}',
    "B11 empty status": b'{"request_id":"r","status":""}',
    "B11 lower-case status": b'{"request_id":"r","status":"ok"}',
    "B11 canceled": b'{"request_id":"r","status":"CANCELED"}',
    "B11 no status": b'{"request_id":"r"}',
}


@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE)
async def test_authentic_but_strange_is_kept(site: Site, content: bytes) -> None:
    """B7-B11: a signed body that is no event is acked and kept as evidence, byte for byte."""
    first, again = await site.post(content), await site.post(content)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["status"] == again.json()["status"] == "unrecognized"
    (event,) = await site.rows(events)
    assert (event["state"], event["body"]) == ("unrecognized", content)
    assert event["reason"]
    assert [receipt["outcome"] for receipt in await site.rows(all_receipts)] == ["unrecognized"] * 2


ODD_SHAPES = {
    "payload null": {"payload": None},
    "payload a string": {"payload": "x"},
    "output null": {"payload": {"output": None}},
    "images empty": {"payload": {"output": {"images": []}}},
    "images of wrong things": {"payload": {"output": {"images": [1, None, "x", {"url": 3}, {"url": ""}]}}},
    "4,000 images": {"payload": {"output": {"images": [{"url": f"https://x/{n}"} for n in range(4000)]}}},
    "cost a string": {"payload": {"cost": "12"}},
    "cost too large for a column": {"payload": {"cost": 2**63}},
    "model a list": {"payload": {"model": ["m"]}},
    "unknown fields": {"x": {"y": [1.5, True, None, "ü"]}},
}


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
async def test_odd_shapes_are_events(site: Site, shape: dict[str, Any]) -> None:
    """B10: with an id and a known status it is an event, even if the payload has an unknown form."""
    content = json.dumps({"request_id": "r-11", "status": "OK", **shape}).encode()
    assert (await site.post(content)).json()["status"] == "accepted"
    (event,) = await site.rows(events)
    assert (event["state"], event["body"]) == ("received", content)


async def test_an_unknown_status_does_not_take_the_place_of_the_result(site: Site) -> None:
    """B11: the result that comes after an unknown status is stored, and is no conflict."""
    assert (await site.post(b'{"request_id":"r-12","status":"PENDING"}')).json()["status"] == "unrecognized"
    assert (await site.post(body("r-12"))).json()["status"] == "accepted"
    assert await site.count(events) == 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods_do_nothing(site: Site, method: str) -> None:
    """B12: only POST; any other method is 405 without side effects."""
    response = await site.client.request(method, URL, headers=signed(b""))
    assert response.status_code == 405
    assert await site.count(events) == 0


@pytest.mark.parametrize(
    "path", ["/clipia", "/", "/clipia/webhooks", "/clipia/webhook/a/b", "/x//clipia/webhook", "/clipia/"]
)
async def test_other_paths_do_not_redirect(site: Site, path: str) -> None:
    """B12: there is no redirect, because providers count one as a failure."""
    assert (await site.post(body(), url=path)).status_code == 404


async def test_forwarded_headers_are_not_believed(site: Site) -> None:
    """B13: a client's claim of its own address has no effect and is not stored."""
    content = body()
    headers = signed(content) | {
        "X-Forwarded-For": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
    }
    assert (await site.post(content, headers=headers)).status_code == 200
    assert "6.6.6.6" not in repr(await site.rows(events)) + repr(await site.rows(all_receipts))


# -- deduplication and conflicts


async def test_another_body_for_the_same_request_is_a_conflict(site: Site) -> None:
    """C9: the first body is kept; the second is stored on its receipt and counted."""
    first, second = body("r-13"), failure("r-13")
    before = metric("receiver_webhooks_total", source="clipia", outcome="conflict")
    assert (await site.post(first)).json()["status"] == "accepted"
    response = await site.post(second)
    assert (response.status_code, response.json()["status"]) == (200, "conflict")
    (event,) = await site.rows(events)
    assert event["body"] == first
    kept = await site.rows(all_receipts)
    assert [(row["outcome"], row["body"]) for row in kept] == [("accepted", None), ("conflict", second)]
    assert metric("receiver_webhooks_total", source="clipia", outcome="conflict") == before + 1


async def test_the_same_json_in_other_bytes_is_a_duplicate(site: Site) -> None:
    """C9: a body with other key order, spacing and escapes is no conflict."""
    content = body("r-14", note="é")
    reordered = json.dumps(dict(reversed(json.loads(content).items())), ensure_ascii=False, indent=2).encode()
    assert content != reordered
    await site.post(content)
    assert (await site.post(reordered)).json()["status"] == "duplicate"


async def test_an_unrecognized_body_never_conflicts(site: Site) -> None:
    """Two unrecognized bodies are two pieces of evidence."""
    await site.post(b"x")
    assert (await site.post(b"y")).json()["status"] == "unrecognized"
    assert await site.count(events) == 2


async def test_a_driver_that_hangs_is_answered_in_time(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: 503 in time, even if the driver neither answers nor can be cancelled."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(WebhookEndpoint, "ANSWER_SECONDS", 0.3)
    released = asyncio.Event()

    async def hang(*_arguments: Any) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        raise DatabaseUnavailable("too late", reason="database")

    monkeypatch.setattr(Database, "insert_arrivals", hang)
    async with make_site(database_url, database) as site:
        try:
            response = await asyncio.wait_for(site.post(body("r-15")), 5)
        finally:
            released.set()
        assert response.status_code == 503
        assert response.headers["retry-after"]
        await asyncio.sleep(0.1)


async def slow_body(content: bytes, *, seconds: float) -> AsyncIterator[bytes]:
    """Yield a body in two parts with a pause between them."""
    yield content[:10]
    await asyncio.sleep(seconds)
    yield content[10:]


@pytest.mark.parametrize("slow", ["store", "repeat"])
async def test_one_deadline_for_body_store_and_repeat(
    site: Site, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """C4: a slow body, a slow store and a slow repeat do not add up: there is one deadline for the answer."""
    content = body("r-17")
    if slow == "repeat":
        await site.post(content)
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(WebhookEndpoint, "ANSWER_SECONDS", 1.5)
    released = asyncio.Event()
    insert = Database.insert_arrivals

    async def late(*arguments: Any) -> Any:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(released.wait(), 0.4 if slow == "repeat" else 6)
        return await insert(*arguments)

    async def never(*_arguments: Any, **_options: Any) -> Any:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(released.wait(), 6)
        raise DatabaseUnavailable("too late", reason="database")

    monkeypatch.setattr(Database, "insert_arrivals", late)
    monkeypatch.setattr(Database, "run_transaction", never)
    began = time.monotonic()
    response = await site.client.post(
        URL,
        content=slow_body(content, seconds=0.8),
        headers=signed(content) | {"Content-Length": str(len(content))},
        timeout=20,
    )
    took = time.monotonic() - began
    released.set()
    await asyncio.sleep(0.1)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    # If each wait had its own timeout, the sum would be 10 s.
    assert 1.4 < took < 4


async def test_the_deadline_counts_from_the_head(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4: the time that a request waited for the event loop after its head was complete counts, too."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 1.0)
    content = body("r-18")
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    app = site.app
    loop = asyncio.get_running_loop()
    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "headers": [(b"x-clipia-signature", signed(content)["X-Clipia-Signature"].encode())],
        "state": {HEAD_COMPLETE: loop.time() - 5},
    }
    began = loop.time()
    await asyncio.wait_for(app(scope, receive, send), 20)
    assert sent[0]["status"] == 408
    assert loop.time() - began < 0.9


async def test_a_task_that_is_cancelled_from_outside_ends(site: Site) -> None:
    """C4: only the deadline's own cancellation is answered; that of a stopping server is raised."""

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        pytest.fail(f"answered {message}")

    app = site.app
    scope = {"type": "http", "method": "POST", "path": URL, "headers": []}
    task = asyncio.create_task(app(scope, receive, send))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_bug_is_not_acked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: after any error while storing, the answer is 503 and Clipia sends the webhook again."""

    async def break_down(*_arguments: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(Database, "insert_arrivals", break_down)
    assert (await site.post(body("r-16"))).status_code == 503
    assert await site.count(events) == 0


def test_event_ids_never_change() -> None:
    """The id of an event is part of the contract with consumers: it must be the same in every release."""
    assert str(event_id("clipia", "r-1")) == "8e4e5e6d-3274-5a32-9fdc-8803b0a2d779"
