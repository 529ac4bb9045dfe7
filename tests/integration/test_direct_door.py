"""The direct door of the callback beside ASGI: the same answers, and nothing left behind."""

import asyncio
import contextlib
import gc
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import select
from support.payloads import SECRET, body, failure, signed
from support.serving import Door, serving

from receiver.api.direct import DirectDoor, DirectRequest
from receiver.api.webhook import WebhookEndpoint
from receiver.app import create_app
from receiver.db.database import Database
from receiver.db.tables import events
from receiver.errors import DatabaseUnavailable
from receiver.settings import Settings

URL = "/clipia/webhook"
JOB_PATH = f"{URL}/clipia/0f8fad5b-d9cb-469f-a165-70867728950e.x"
FORGED = "t=1700000000,v1=" + "0" * 64
OTHER_SECRET = "whsec_other-0123456789abcdef"


class Client:
    """One connection to a receiver."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, content: bytes, *, path: str = URL, **changes: str | None) -> None:
        """Send a signed webhook; `changes` are headers to add, or to leave out if None."""
        headers: dict[str, str | None] = {"Host": "x", "Content-Length": str(len(content)), **signed(content)}
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
        self.writer.write(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content)

    async def answer(self) -> bytes:
        """Return the next answer with a constant date."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        found = head + await asyncio.wait_for(self.reader.readexactly(int(length[1])), 10)
        return re.sub(rb"date: [^\r]*", b"date: -", found)

    async def post(self, content: bytes, *, path: str = URL, **changes: str | None) -> bytes:
        """Send a webhook and return its answer."""
        self.send(content, path=path, **changes)
        return await self.answer()

    async def is_closed(self) -> bool:
        """Return whether the server closes the connection within two seconds, with nothing more to read."""
        return await asyncio.wait_for(self.reader.read(), 4) == b""


class Site:
    """A running receiver."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> Client:
        """Open a connection."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        self._writers.append(writer)
        return Client(reader, writer)

    async def close(self) -> None:
        """Close all connections."""
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def make_site(database_url: str, *, door: Door = "direct", keep_alive: int = 5) -> AsyncIterator[Site]:
    """Open a receiver with two sources."""
    settings = Settings.load(
        database_url=database_url,
        clipia_webhook_secret=SECRET,
        sources=[{"name": "staging", "secret": OTHER_SECRET}],
    )
    async with serving(create_app(settings, worker=False), door=door, keep_alive=keep_alive) as url:
        site = Site(url)
        yield site
        await site.close()


@pytest.fixture
async def site(database: Database) -> AsyncIterator[Site]:
    """A receiver whose webhooks take the direct door."""
    async with make_site(database.url) as opened:
        yield opened


async def stored(database: Database) -> set[str]:
    """Return the request ids of all events."""
    async with database.read() as connection:
        return {*(await connection.execute(select(events.c.request_id))).scalars()}


@pytest.mark.parametrize(
    "path",
    [URL, f"{URL}/clipia", f"{URL}/clipia/0f8fad5b-d9cb-469f-a165-70867728950e.x", f"{URL}/clipia/odd"],
)
async def test_each_callback_path_is_direct(
    site: Site, database: Database, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The paths of the default source, of a named source and of a job need no ASGI application."""
    monkeypatch.delattr(WebhookEndpoint, "__call__")
    client = await site.connect()
    assert b'"status":"accepted"' in await client.post(body("r-1"), path=path)
    assert await stored(database) == {"r-1"}


CASES: dict[str, dict[str, Any]] = {
    "accepted": {"content": body("r-1")},
    "repeated": {"content": body("r-0")},
    "conflict": {"content": failure("r-0")},
    "unrecognized": {"content": b"[]"},
    "empty": {"content": b""},
    "of a job": {"content": body("r-2"), "path": JOB_PATH},
    "extra slashes": {"content": body("r-3"), "path": "//clipia//webhook"},
    "encoded path": {"content": body("r-4"), "path": "/clipia/%77ebhook"},
    "query": {"content": body("r-5"), "path": f"{URL}?a=b"},
    "unknown source": {"content": body("r-6"), "path": f"{URL}/nope"},
    "job of the bare path": {"content": body("r-7"), "path": f"{URL}/nope/job"},
    "forged": {"content": body("r-8"), "X_Clipia_Signature": FORGED},
    "unsigned": {"content": body("r-8"), "X_Clipia_Signature": None},
    "content coding": {"content": body("r-9"), "Content_Encoding": "gzip"},
    "too large": {"content": b"x", "Content_Length": "300000"},
    "close": {"content": body("r-10"), "Connection": "close"},
    "expect": {"content": body("r-11"), "Expect": "something"},
}


async def test_both_doors_send_the_same_bytes(database: Database) -> None:
    """B12: status, headers, their order and the body are the same, and so is the end of the connection."""
    answers: dict[Door, dict[str, tuple[bytes, bool]]] = {"direct": {}, "asgi": {}}
    doors: tuple[Door, ...] = ("direct", "asgi")
    for door in doors:
        async with make_site(database.url, door=door) as site:
            await (await site.connect()).post(body("r-0"))
            for name, request in CASES.items():
                client = await site.connect()
                answer = await client.post(**request)
                closes = b"\r\nconnection: close\r\n" in answer
                answers[door][name] = answer, closes and await client.is_closed()
        async with database.write() as connection:
            for table in reversed(events.metadata.sorted_tables):
                await connection.execute(table.delete())
    assert answers["direct"] == answers["asgi"]
    assert {answer.split()[1] for answer, _ in answers["direct"].values()} == {
        *(b"200", b"401", b"404", b"413", b"415")
    }


async def test_pipelined_requests_are_answered_in_order(site: Site, database: Database) -> None:
    """B5: the first request of a read is direct, those behind it wait, and each gets its own answer."""
    client = await site.connect()
    for number in range(5):
        client.send(body(f"r-{number}"))
    answers = [await client.answer() for _ in range(5)]
    assert all(b'"status":"accepted"' in answer for answer in answers)
    assert await stored(database) == {f"r-{number}" for number in range(5)}


async def test_an_answer_inside_a_read_does_not_start_the_keep_alive_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B5: a forged and a good webhook in one read: the connection waits for the good one's answer."""
    insert = Database.insert_arrivals

    async def late(*arguments: Any) -> Any:
        await asyncio.sleep(1.5)
        return await insert(*arguments)

    monkeypatch.setattr(Database, "insert_arrivals", late)
    async with make_site(database.url, keep_alive=1) as site:
        client = await site.connect()
        client.send(body("r-0"), X_Clipia_Signature=FORGED)
        client.send(body("r-1"))
        assert (await client.answer()).split()[1] == b"401"
        assert b'"status":"accepted"' in await client.answer()


async def test_a_request_behind_a_closing_answer_is_not_stored(site: Site, database: Database) -> None:
    """B5: if an answer closes the connection, a later request of the same read is dropped, not acted on."""
    client = await site.connect()
    for name, signature in (("r-0", FORGED), ("r-1", None)):
        content = body(name)
        headers = signed(content) | ({"X-Clipia-Signature": signature} if signature else {})
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        head = (
            f"POST {URL} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(content)}\r\n{lines}\r\n"
        )
        client.writer.write(head.encode() + content)
    assert (await client.answer()).split()[1] == b"401"
    assert await client.is_closed()
    assert await stored(database) == set()


async def test_a_body_is_late_in_time_beside_a_store_that_hangs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2: the deadline of a body holds while another webhook waits for the database."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(WebhookEndpoint, "ANSWER_SECONDS", 5.0)
    released = asyncio.Event()

    async def hang(*_arguments: Any) -> Any:
        await released.wait()
        raise DatabaseUnavailable("gone", reason="database")

    monkeypatch.setattr(Database, "insert_arrivals", hang)
    stuck, slow = await site.connect(), await site.connect()
    stuck.send(body("r-0"))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    slow.send(b"{", Content_Length="100")
    assert (await slow.answer()).split()[1] == b"408"
    assert time.monotonic() - began < 2.5
    released.set()
    assert (await stuck.answer()).split()[1] == b"503"


async def test_a_failing_answer_is_logged_and_ends_the_connection(
    site: Site, database: Database, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """C3: a bug in an answer is no silent end, and the other webhooks of the group are answered."""
    answer = WebhookEndpoint.answer

    def break_down(self: WebhookEndpoint, source: str, received: Any, error: Any) -> Any:
        if received is not None and received.outcome == "unrecognized":
            raise RuntimeError("bug")
        return answer(self, source, received, error)

    monkeypatch.setattr(WebhookEndpoint, "answer", break_down)
    bad, good = await site.connect(), await site.connect()
    bad.send(b"[]")
    good.send(body("r-1"))
    assert b'"status":"accepted"' in await good.answer()
    with contextlib.suppress(ConnectionResetError):
        assert await bad.is_closed()
    assert "webhook not answered" in "".join(capfd.readouterr())
    assert "r-1" in await stored(database)


async def test_a_client_that_hangs_up_later_is_stored(
    site: Site, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B5: if the client hangs up after its body, the event is stored; if it hangs up before, it is not."""
    insert = Database.insert_arrivals
    started, go = asyncio.Event(), asyncio.Event()

    async def wait(*arguments: Any) -> Any:
        started.set()
        await go.wait()
        return await insert(*arguments)

    monkeypatch.setattr(Database, "insert_arrivals", wait)
    late, early = await site.connect(), await site.connect()
    late.send(body("r-1"))
    early.send(body("r-2")[:-1], Content_Length=str(len(body("r-2"))))
    await asyncio.wait_for(started.wait(), 10)
    for client in (late, early):
        client.writer.transport.abort()
    await asyncio.sleep(0.1)
    go.set()
    assert b'"status":"accepted"' in await (await site.connect()).post(body("r-3"))
    assert await stored(database) == {"r-1", "r-3"}


async def test_a_client_that_hangs_up_at_the_deadline_is_no_error(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """B2: if the event loop does not know yet that the client has gone, the answer fails quietly."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 0.3)
    begun, begin = asyncio.Event(), DirectDoor.open

    def note(door: DirectDoor, request: DirectRequest) -> None:
        begin(door, request)
        begun.set()

    monkeypatch.setattr(DirectDoor, "open", note)
    client = await site.connect()
    client.send(b"{", Content_Length="100")
    await asyncio.wait_for(begun.wait(), 10)
    client.writer.transport.abort()
    # The event loop closes the client's socket and runs the deadline before it looks for what has arrived.
    time.sleep(0.5)  # noqa: ASYNC251 - it has to block the event loop
    await asyncio.sleep(0.2)
    written = "".join(capfd.readouterr())
    assert "too_slow" in written
    assert "webhook not answered" not in written


@pytest.mark.parametrize(
    "kind", ["stored", "forged", "failed", "late", "too slow", "hung up early", "hung up late"]
)
async def test_a_request_leaves_nothing_behind(
    site: Site, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Reference counting frees each request: no cycle waits for the garbage collector."""
    monkeypatch.setattr(WebhookEndpoint, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(WebhookEndpoint, "ANSWER_SECONDS", 0.3)

    async def fail(*_arguments: Any) -> Any:
        if kind == "failed":
            raise DatabaseUnavailable("gone", reason="database")
        await asyncio.sleep(0.5)
        raise RuntimeError("bug")

    if kind not in {"stored", "forged"}:
        monkeypatch.setattr(Database, "insert_arrivals", fail)
    gc.collect()
    gc.disable()
    try:
        for number in range(3):
            client = await site.connect()
            content = body(f"r-{number}")
            if kind == "forged":
                client.send(content, X_Clipia_Signature=FORGED)
            elif kind in {"too slow", "hung up early"}:
                client.send(content[:-1], Content_Length=str(len(content)))
            else:
                client.send(content)
            if kind.startswith("hung up"):
                await asyncio.sleep(0.05)
                client.writer.transport.abort()
            else:
                await client.answer()
        deadline = time.monotonic() + 10
        while left := sum(isinstance(each, DirectRequest) for each in gc.get_objects()):
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.1)
    finally:
        gc.enable()


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(database: Database) -> None:
    """B2: the keep-alive time counts from the last answer, although one timer serves all requests."""
    async with make_site(database.url, keep_alive=1) as site:
        client = await site.connect()
        for number in range(5):
            assert b'"status":"accepted"' in await client.post(body(f"r-{number}"))
            await asyncio.sleep(0.4)
        began = time.monotonic()
        assert await client.is_closed()
        assert time.monotonic() - began < 3
    assert len(await stored(database)) == 5
