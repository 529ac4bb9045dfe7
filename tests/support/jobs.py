"""Jobs between real processes: a sandbox, receivers that submit to it, callers, and a proxy."""

import asyncio
import contextlib
import re
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import orjson
from sqlalchemy import func, select, update

from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.tables import deliveries, events, jobs, media
from support.commands import ReceiverProcess, command_environment
from support.payloads import SECRET
from support.servers import end, free_port, wait_for_port

TOKEN = "token-of-the-tests-0123456789"
LIVE_KEY = "clipia_live_jobs"
TEST_KEY = "clipia_test_jobs"
IMAGE = ("nano-banana-2", {"prompt": "a cat"})
SPEECH = ("gemini-3-1-flash-tts", {"prompt": "a cat"})
"""A model and an input; speech has one file, an image two."""

T = TypeVar("T")


class Sandbox:
    """`receiver sandbox` as a process, and its control API."""

    def __init__(self, folder: Path, **options: object) -> None:
        self._folder = folder
        self._options = ["--no-like-clipia"]
        self._options += [part for name, value in options.items() for part in (_flag(name), str(value))]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._control = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)

    def __enter__(self) -> Self:
        environment = command_environment(CLIPIA_WEBHOOK_SECRET=SECRET)
        with (self._folder / "sandbox.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "receiver", "sandbox", "--port", str(self.port), *self._options],
                # With coverage it would be the slowest part of each test.
                env={name: value for name, value in environment.items() if not name.startswith("COVERAGE_")},
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        wait_for_port(self.port, self._process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.close()
        end(self._process)

    def requests(self) -> dict[str, Any]:
        """Return the record of the sandbox: `requests`, `submits`, `idempotency_keys`."""
        return self._json("GET", "/_sandbox/requests")

    def change(self, **options: object) -> None:
        """Set some of the switches."""
        self._json("PATCH", "/_sandbox/options", json=options)

    def cancel(self, request_id: str) -> bool:
        """Cancel a generation; False if it has ended already."""
        response = self._control.post(f"/_sandbox/requests/{request_id}/cancel")
        assert response.status_code in (200, 409), response.text
        return response.status_code == 200

    def send_webhook(self, request_id: str) -> dict[str, Any]:
        """Send a generation's webhook once, and return the attempt."""
        return self._json("POST", f"/_sandbox/requests/{request_id}/webhook")

    def credits_spent(self, key: str) -> int:
        """Return the credits that an account was charged."""
        account = self._json("GET", "/v1/account", headers={"X-Api-Key": key})
        return int(account["usage_30d"]["credits_spent"])

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._control.request(method, path, **options)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


def job_receiver(
    folder: Path, sandbox: Sandbox, *, api: str | None = None, key: str = LIVE_KEY, **settings: str
) -> ReceiverProcess:
    """Return a receiver that submits to the sandbox, through `api` if it is given.

    It forwards to `events.jsonl` in its folder, unless its destinations are in RECEIVER_CONFIG.
    """
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    receiver = ReceiverProcess(
        folder,
        "serve",
        "--port",
        port,
        CLIPIA_KEY=key,
        CLIPIA_BASE_URL=api or sandbox.url,
        RECEIVER_MEDIA_HOSTS=sandbox.url,
        RECEIVER_API_TOKENS=f"tests:{TOKEN}",
        RECEIVER_PUBLIC_URL=f"http://127.0.0.1:{port}",
        **(
            {}
            if "RECEIVER_CONFIG" in settings
            else {"RECEIVER_DESTINATION_URL": f"file:{folder / 'events.jsonl'}"}
        ),
        **settings,
    )
    receiver.url = f"http://127.0.0.1:{port}"
    return receiver


def forwarded(*folders: Path) -> list[dict[str, Any]]:
    """Return the messages that the receivers of these folders have forwarded."""
    paths = [folder / "events.jsonl" for folder in folders]
    return [orjson.loads(line) for path in paths if path.exists() for line in path.read_bytes().splitlines()]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A receiver's answer to a submission."""

    status: int
    job: dict[str, Any]


class Caller:
    """An internal service that submits jobs from any number of threads."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            verify=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def submit(self, key: str, job: tuple[str, Mapping[str, Any]] = IMAGE) -> Answer | None:
        """Submit a job; None if there is no answer. After a 503 it is sent again."""
        model, given = job
        content = {"model": model, "input": given, "metadata": {"of": key}}
        deadline = time.monotonic() + 60
        while True:
            try:
                response = self._client.post("/v1/jobs", json=content, headers={"Idempotency-Key": key})
            except httpx.TransportError:
                return None
            if response.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        # If the answer is no JSON, it is not the API's, but its status is enough.
        found = response.json() if "json" in response.headers.get("content-type", "") else {}
        return Answer(status=response.status_code, job=found)

    def submit_all(
        self, keys: Iterable[str], *, at_once: int, job: tuple[str, Mapping[str, Any]] = IMAGE
    ) -> dict[str, Answer | None]:
        """Submit a job per key, `at_once` at a time; return the answers by key."""
        wanted = list(keys)
        with ThreadPoolExecutor(at_once) as pool:
            return dict(zip(wanted, pool.map(lambda key: self.submit(key, job), wanted), strict=True))

    def get(self, path: str) -> httpx.Response:
        """Return the answer to a GET."""
        return self._client.get(path)


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """The row of a job in the database."""

    id: str
    idempotency_key: str
    provider_key: str
    state: str
    request_id: str | None
    cost: int | None
    charged: int | None


def run(url: str, work: Callable[[Database], Awaitable[T]]) -> T:
    """Run a coroutine with a database."""

    async def opened() -> T:
        database = Database(url)
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(opened())


async def read_jobs(database: Database) -> list[JobRow]:
    """Return all jobs, oldest first."""
    columns = [jobs.c[name] for name in JobRow.__dataclass_fields__]
    async with database.read() as connection:
        rows = (await connection.execute(select(*columns).order_by(jobs.c.seq))).mappings().all()
    texts = ("id", "provider_key")
    return [JobRow(**(dict(row) | {name: str(row[name]) for name in texts})) for row in rows]


async def read_outcomes(database: Database) -> dict[str, list[str]]:
    """Return the outcomes of all webhooks, by `request_id`."""
    statement = (
        select(events.c.request_id, all_receipts.c.outcome)
        .join(all_receipts, all_receipts.c.event_seq == events.c.seq)
        .order_by(events.c.seq, all_receipts.c.seq)
    )
    found: dict[str, list[str]] = {}
    async with database.read() as connection:
        for request_id, outcome in await connection.execute(statement):
            found.setdefault(request_id, []).append(outcome)
    return found


def wait_until_none(url: str, *states: str, seconds: float = 60) -> None:
    """Wait until no job is in one of these states."""

    async def wait(database: Database) -> None:
        statement = select(jobs.c.state, func.count()).where(jobs.c.state.in_(states)).group_by(jobs.c.state)
        await _until_empty(database, statement, seconds=seconds)

    run(url, wait)


def wait_until_done(url: str, *, seconds: float = 60) -> list[JobRow]:
    """Wait until each job has ended and each event was forwarded; return the jobs."""

    async def wait(database: Database) -> list[JobRow]:
        deadline = time.monotonic() + seconds
        for statement in (
            select(jobs.c.state, func.count())
            .where(jobs.c.state.in_(("pending", "submitted")))
            .group_by(jobs.c.state),
            select(events.c.state, func.count())
            .where(events.c.state.in_(("received", "fetching")))
            .group_by(events.c.state),
            select(deliveries.c.state, func.count())
            .where(deliveries.c.state == "pending")
            .group_by(deliveries.c.state),
        ):
            await _until_empty(database, statement, seconds=deadline - time.monotonic())
        return await read_jobs(database)

    return run(url, wait)


async def _until_empty(database: Database, statement: Any, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        async with database.read() as connection:
            left = (await connection.execute(statement)).all()
        if not left:
            return
        assert time.monotonic() < deadline, f"still there: {left}"
        await asyncio.sleep(0.1)


def end_leases(url: str) -> None:
    """Make the leases of killed processes expire now; otherwise they would in a minute."""

    async def work(database: Database) -> None:
        async with database.write() as connection:
            for table in (jobs, media, deliveries):
                await connection.execute(
                    update(table).where(table.c.lease.is_not(None)).values(next_attempt_at=db_time(0.0))
                )

    run(url, work)


def assert_paid_once(sandbox: Sandbox, rows: Sequence[JobRow]) -> dict[str, dict[str, Any]]:
    """Check that each job has one generation, under one key and with the same bytes at each attempt.

    Return the generations by the job's id.
    """
    seen = sandbox.requests()
    made = {generation["idempotency_key"]: generation for generation in seen["requests"]}
    paid = {key: count["generations"] for key, count in seen["idempotency_keys"].items()}
    wanted = dict.fromkeys((row.provider_key for row in rows), 1)
    assert paid == wanted, f"generations by key that are not one per job: {paid.items() ^ wanted.items()}"
    assert len(seen["requests"]) == len(rows), f"{len(seen['requests'])} generations of {len(rows)} jobs"
    bodies: dict[str, set[str]] = {}
    for submit in seen["submits"]:
        bodies.setdefault(submit["idempotency_key"], set()).add(submit["body_sha256"])
    differing = [key for key, found in bodies.items() if len(found) > 1]
    assert not differing, f"keys that were sent with different bytes: {differing}"
    for row in rows:
        generation = made[row.provider_key]
        assert generation["request_id"] == row.request_id, f"not the generation of {row}"
        assert _job_of(generation["body"]) == row.id, f"not the webhook of {row}"
    return {row.id: made[row.provider_key] for row in rows}


def _job_of(body: str) -> str:
    """Return the id of the job in a submission's `webhook_url`."""
    return str(orjson.loads(body)["webhook_url"]).rsplit("/", 1)[1].partition(".")[0]


@dataclass(kw_only=True, eq=False)
class Call:
    """A request that came to a proxy; `at` is of the monotonic clock."""

    method: str
    path: str
    key: str | None
    content: bytes = field(repr=False)
    at: float = field(default_factory=time.monotonic)
    status: int | None = None


class Link:
    """A request on its way through a proxy."""

    def __init__(self, call: Call, client: socket.socket, upstream: tuple[str, int]) -> None:
        self.call = call
        self.open = True
        self._client = client
        self._upstream_address = upstream
        self._upstream: socket.socket | None = None

    def send(self, count: int | None = None) -> None:
        """Pass the request on, or only its first bytes (a negative count leaves out as many)."""
        self._upstream = socket.create_connection(self._upstream_address, timeout=60)
        self._upstream.sendall(self.call.content[:count])

    def receive(self) -> bytes:
        """Read the answer to the bytes that were sent."""
        assert self._upstream is not None
        with self._upstream.makefile("rb") as stream:
            head, body = _read_message(stream)
        self.call.status = int(head.split(b" ", 2)[1])
        return head + body

    def deliver(self, answer: bytes) -> None:
        """Send the answer, or part of it, to the client, which may have disconnected."""
        with contextlib.suppress(OSError):
            self._client.sendall(answer)

    def relay(self) -> None:
        """Send, receive and deliver."""
        self.send()
        self.deliver(self.receive())

    def cut(self, *, reset: bool = False) -> None:
        """Close the client's connection after this call; with `reset` by a TCP reset."""
        if reset:
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.open = False

    def close(self) -> None:
        """Close the connection to the server."""
        if self._upstream is not None:
            self._upstream.close()


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy between a receiver and the sandbox, which records all calls and can break them."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.upstream = ("127.0.0.1", sandbox.port)
        self.calls: list[Call] = []
        self.handle_call: Callable[[Link], None] = Link.relay
        """Handles each call."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without the FIN that the library would send before each RST."""
        self.close_request(request)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._thread.join(30)
        self.server_close()


class _Connection(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        host = f"{self.server.upstream[0]}:{self.server.upstream[1]}"
        with contextlib.suppress(ConnectionError):
            while call := _read_call(self.rfile, host=host):
                self.server.calls.append(call)
                link = Link(call, self.connection, self.server.upstream)
                try:
                    self.server.handle_call(link)
                finally:
                    link.close()
                if not link.open:
                    return


def _read_call(stream: BufferedIOBase, *, host: str) -> Call | None:
    head, body = _read_message(stream)
    if not head:
        return None
    method, target, _ = head.decode("latin-1").split(" ", 2)
    key = re.search(rb"(?im)^idempotency-key: *(\S+)", head)
    # The sandbox makes the URLs of its files from the host in the request.
    content = re.sub(rb"(?im)^host:[^\r]*", f"Host: {host}".encode(), head) + body
    return Call(
        method=method, path=urlsplit(target).path, key=key[1].decode() if key else None, content=content
    )


def _read_message(stream: BufferedIOBase) -> tuple[bytes, bytes]:
    """Read one HTTP message with a Content-Length; empty if the connection was closed."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b"", b""
        head += line
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    return head, stream.read(int(length[1])) if length else b""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
