"""Support for tests of the submitter: a sandbox, a Clipia with scripted answers, and a world around them."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import httpx
from sqlalchemy import FromClause, Table, select, update

from receiver.app import create_app as create_receiver
from receiver.clipia.client import ClipiaClient
from receiver.core.lane_names import Wake, wake_no_lane
from receiver.core.retry import RetryPolicy
from receiver.core.signature import Secret
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import accounts, jobs
from receiver.destination_settings import DestinationSettings
from receiver.destinations.memory import MemoryDestination
from receiver.errors import RequestError
from receiver.ingest import Ingest
from receiver.lanes.base import Lane
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.fan_out import FanOut
from receiver.lanes.poll import PollLane
from receiver.lanes.targets import Target
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, create_app, running
from receiver.settings import Settings
from receiver.submitter import Job, Submitter
from support.payloads import SECRET, signed

LIVE = "clipia_live_kit"
TEST = "clipia_test_kit"
MODEL = "nano-banana-2"
PRICE = 12
PROMPT = {"prompt": "a cat"}
SECONDS = 30.0
DURATION = 240.0
"""Seconds that a generation takes unless a test sets another time.

Its webhook is signed at the sandbox's time, which has to be fresh after a test has turned the clock.
"""


class Sandbox:
    """The sandbox, its control API, and a clock that the test sets."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.url = ""
        self._control = httpx.AsyncClient(verify=False)

    async def reset(self) -> None:
        """Forget all generations; their duration is again the one at the start."""
        self.ahead = 0.0
        await self._call("POST", "reset")

    def end_all(self) -> None:
        """Turn the clock to the end of every generation."""
        self.ahead = DURATION + 5.0

    async def switch(self, **changes: Any) -> None:
        """Set switches."""
        await self._call("PATCH", "options", json=changes)

    async def submits(self) -> list[dict[str, Any]]:
        """Return every POST to a model, in order."""
        found: list[dict[str, Any]] = (await self._call("GET", "requests"))["submits"]
        return found

    async def generations(self) -> list[dict[str, Any]]:
        """Return every generation, in order."""
        found: list[dict[str, Any]] = (await self._call("GET", "requests"))["requests"]
        return found

    async def cancel(self, request_id: str) -> None:
        """Cancel a generation, as from Clipia's website."""
        await self._call("POST", f"requests/{request_id}/cancel")

    async def send_webhook(self, request_id: str, *, conflicting: bool = False) -> int | None:
        """Send a generation's webhook once more, now; return the answer's status."""
        sent = await self._call("POST", f"requests/{request_id}/webhook", json={"conflicting": conflicting})
        status: int | None = sent["status_code"]
        return status

    async def _call(self, method: str, path: str, **content: Any) -> Any:
        response = await self._control.request(method, f"{self.url}/_sandbox/{path}", **content)
        response.raise_for_status()
        return response.json() if response.content else None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        """Serve it inside the block."""
        options = SandboxOptions(duration=DURATION, webhook_backoff=0.05, retry_after=7, **WITHOUT_LIMITS)
        app = create_app(options, secret=SECRET, clock=lambda: time.time() + self.ahead)
        async with running(app) as self.url, self._control:
            yield self


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as its bytes came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def submits(self) -> bool:
        """Whether it would start a generation."""
        return self.method == "POST" and not self.path.endswith("/estimate")


class OddClipia:
    """A Clipia with scripted answers, down to the last byte."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.script: list[bytes | Callable[[], bytes]] = []
        """The answers to submissions, in order; the last one is repeated."""
        self.on_submit: Callable[[Request], Awaitable[None]] = _nothing
        """Awaited before a submission is answered."""
        self.on_question: Callable[[Request], Awaitable[None]] = _nothing
        """Awaited before any other request is answered."""
        self.others: Callable[[Request], bytes] = lambda _request: answer(content={"slug": MODEL})
        """Answers every other request than a submission."""
        self.pause = 0.0
        """Seconds before each byte of an answer."""
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def other_paths(self) -> list[str]:
        """The paths of all other requests."""
        return [request.path for request in self.requests if not request.submits]

    @property
    def posts(self) -> list[Request]:
        """The submissions."""
        return [request for request in self.requests if request.submits]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        """Serve it inside the block."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                content = await self._answer(await _read_request(reader))
                size = 1 if self.pause else len(content) or 1
                for start in range(0, len(content), size):
                    await asyncio.sleep(self.pause)
                    writer.write(content[start : start + size])
                    await writer.drain()
        finally:
            writer.close()

    async def _answer(self, request: Request) -> bytes:
        self.requests.append(request)
        if not request.submits:
            await self.on_question(request)
            return self.others(request)
        await self.on_submit(request)
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return said if isinstance(said, bytes) else said()


async def _nothing(_request: Request) -> None:
    """Remove the pauses."""


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    method, path, _version = head.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method=method, path=path, headers=headers, body=body)


def answer(status: int = 200, content: Any = None, **headers: str) -> bytes:
    """Write an HTTP answer; content that is not bytes becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = {"Content-Length": str(len(body)), "Connection": "close", "RateLimit-Limit": "6000"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body


def accepted(request_id: str | None = None, **changes: Any) -> bytes:
    """Write the answer to a submission that was accepted."""
    content: dict[str, Any] = {
        "request_id": request_id or str(uuid.uuid4()),
        "status": "IN_QUEUE",
        "cost": PRICE,
    }
    return answer(content=content | changes)


def refused(status: int, code: str, message: str = "No.", **headers: str) -> bytes:
    """Write an error in Clipia's format."""
    error = {"type": "some_error", "code": code, "message": message}
    return answer(status, {"error": error}, **headers)


class World:
    """One database, one Clipia, and submitters and lanes over them as several processes would have them."""

    def __init__(self, database_url: str, clipia_url: str) -> None:
        self.database_url = database_url
        self.clipia_url = clipia_url
        self.database = Database(database_url)
        settings = DestinationSettings.model_validate({"name": "main", "url": "memory:"})
        self.destination = MemoryDestination(settings)
        self._target = Target(
            name="main", destination=self.destination, waits_for_media=False, retry=RetryPolicy()
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self.database.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def submitter(self, *, key: str | None = LIVE, url: str | None = None, **options: Any) -> Submitter:
        """Make a submitter, as one process would."""
        client = None if key is None else ClipiaClient(key, base_url=url or self.clipia_url)
        made = Submitter(self.database, client, **options)
        self._stack.push_async_callback(made.close)
        return made

    async def serve_callback(self) -> str:
        """Serve the callback until the end of the test and return its public URL."""
        settings = Settings.load(database_url=self.database_url, clipia_webhook_secret=SECRET)
        app = create_receiver(settings, only="webhook", worker=False)
        return await self._stack.enter_async_context(running(app))

    def poll_lane(self, submitter: Submitter, *, poll_after: float = 60.0) -> PollLane:
        """Make the lane that polls jobs, with the inbox behind it."""
        secrets = {"clipia": [Secret.from_text(SECRET)]}
        ingest = Ingest(
            self.database, secrets=secrets, tolerance=300, clock=time.time, on_accepted=lambda: None
        )

        async def store(source: str, body: bytes) -> None:
            await ingest.record_result(source, body)

        return PollLane(
            self.database, submitter.client, store=store, wake=wake_no_lane, poll_after=poll_after
        )

    def fan_out(self, *, wake: Wake = wake_no_lane) -> FanOut:
        """Make the fan-out to one destination."""
        return FanOut(self.database, [self._target], wake=wake)

    def delivery_lane(self, *, wake: Wake = wake_no_lane) -> DeliveryLane:
        """Make the lane of the only destination."""
        return DeliveryLane(self.database, self._target, wake=wake)

    async def forward(self) -> None:
        """Fan out the received events, and deliver them."""
        while await self.fan_out().run():
            pass
        lane = self.delivery_lane()
        while await self.run_lane(lane):
            pass

    async def run_lane(self, lane: Lane | None) -> int:
        """Claim the due work of a lane, do it, and return its number."""
        assert lane is not None
        works = await lane.claim(lane.concurrency)
        await asyncio.gather(*(work.run() for work in works))
        return len(works)

    async def make_due(self) -> None:
        """End every wait: of open jobs, and of the accounts."""
        await self.set(jobs, where=jobs.c.next_attempt_at.is_not(None), next_attempt_at=db_time(-1.0))
        no_pauses = dict.fromkeys(
            ("submits_until", "polls_until", "asks_until", "calls_after", "submits_after"), 0.0
        )
        await self.set(accounts, **no_pauses)

    async def retry(self, submitter: Submitter) -> int:
        """End every wait and run a submitter's lane once; return how many jobs it attempted."""
        await self.make_due()
        return await self.run_lane(submitter.lane)

    async def set(self, table: Table, *, where: Any = None, **values: Any) -> None:
        """Change rows of a table; all of them if no condition is given."""
        statement = update(table).values(**values)
        async with self.database.write() as connection:
            await connection.execute(statement if where is None else statement.where(where))

    async def rows(self, table: FromClause) -> list[dict[str, Any]]:
        """Return all rows of a table, in order."""
        order = table.c.seq if "seq" in table.c else table.c.id
        async with self.database.read() as connection:
            found = (await connection.execute(select(table).order_by(order))).mappings()
            return [dict(row) for row in found]

    async def job(self) -> dict[str, Any]:
        """Return the only row of a job."""
        (row,) = await self.rows(jobs)
        return row

    async def retry_delay(self) -> float:
        """Return the seconds between the last result of the only job and its next attempt."""
        row = await self.job()
        rest: timedelta = row["next_attempt_at"] - row["updated_at"]
        return rest.total_seconds()

    async def watched(self, job_id: uuid.UUID) -> bool:
        """Return whether the database has a waiter for a job."""
        async with self.database.read() as connection:
            until = select(jobs.c.watched_until).where(jobs.c.id == job_id)
            return (await connection.execute(until)).scalar_one() is not None

    async def until(self, submitter: Submitter, *states: str) -> list[Job]:
        """Wait until there are exactly these jobs, in exactly these states."""
        deadline = time.monotonic() + SECONDS
        while True:
            page = await submitter.list_jobs(limit=200)
            if sorted(job.state for job in page.jobs) == sorted(states):
                return list(page.jobs)
            assert time.monotonic() < deadline, page.jobs
            await asyncio.sleep(0.02)


async def refusal(call: Coroutine[Any, Any, Any]) -> RequestError:
    """Return the error that a call raises."""
    try:
        await call
    except RequestError as error:
        return error
    raise AssertionError("it was not refused")


async def show(submitter: Submitter, job: Job) -> Job:
    """Return a job's present state."""
    found = await submitter.get(job.id)
    assert found is not None
    return found


def error_code(job: Job) -> str | None:
    """Return the code of a job's error."""
    return None if job.error is None else job.error["code"]


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not await condition():
        assert time.monotonic() < deadline, "it does not come"
        await asyncio.sleep(0.01)


def path_token(url: str) -> str:
    """Return the token in a job's callback URL."""
    return url.rsplit("/", 1)[1].partition(".")[2]


async def post(url: str, content: bytes) -> None:
    """Post a signed webhook that must be accepted."""
    async with httpx.AsyncClient(verify=False) as client:
        response = await client.post(url, content=content, headers=signed(content))
    assert response.status_code == 200
