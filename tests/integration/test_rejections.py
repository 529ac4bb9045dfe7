"""Rejected requests are kept and diagnosed, through a real server and on both databases."""

import asyncio
import itertools
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select
from structlog.testing import capture_logs
from support.events import insert_event
from support.payloads import SECRET, body, signed
from support.servers import Postgres
from support.serving import Door, serving

from receiver import rejections as recorder
from receiver import retention
from receiver.app import create_app
from receiver.cli import main
from receiver.core import diagnosis
from receiver.db import rejections as sql
from receiver.db.database import Database
from receiver.db.rejections import NewRejection
from receiver.db.tables import events, rejections
from receiver.ingest import make_event
from receiver.media import open_storage
from receiver.settings import Settings

URL = "/clipia/webhook"
RETIRED = "whsec_retired-0123456789abcdef"
OTHER = "whsec_other-0123456789abcdef"
TOKEN = "operator-0123456789abcdef"
SECONDS = 20.0


class Site:
    """A running receiver without a worker, and an operator's client."""

    def __init__(self, url: str, database: Database) -> None:
        self.client = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {TOKEN}"})
        self.database = database

    async def post(self, content: bytes, headers: Any, *, path: str = URL) -> int:
        """Post a webhook; return the status."""
        return (await self.client.post(path, content=content, headers=headers)).status_code

    async def rows(self) -> list[dict[str, Any]]:
        """Return the kept requests, newest first."""
        found: list[dict[str, Any]] = (await self.client.get("/v1/rejections?limit=200")).json()["data"]
        return found

    async def has(self, number: int) -> bool:
        """Return whether exactly so many requests are kept."""
        return len(await self.rows()) == number

    async def kept(self, number: int) -> list[dict[str, Any]]:
        """Wait until so many requests are kept, and return them."""
        await until(lambda: self.has(number))
        return await self.rows()

    async def flood(self, content: bytes, headers: dict[str, str], *, number: int) -> set[int]:
        """Send a webhook many times on a connection of its own; return the statuses of the answers."""
        url = self.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n{lines}\r\n"
        statuses = set()
        for _ in range(number):
            writer.write(head.encode() + content)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
            length = re.search(rb"content-length: (\d+)", answer)
            assert length is not None
            await asyncio.wait_for(reader.readexactly(int(length[1])), SECONDS)
            statuses.add(int(answer.split()[1]))
        writer.close()
        return statuses

    async def show(self, rejection_id: int) -> dict[str, Any]:
        """Return one rejected request."""
        found: dict[str, Any] = (await self.client.get(f"/v1/rejections/{rejection_id}")).json()
        return found


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(SECONDS):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def make_site(database: Database, *, door: Door = "direct", **changes: Any) -> AsyncIterator[Site]:
    """Open a receiver with two sources and a retired secret."""
    settings = Settings.load(
        **{
            "database_url": database.url,
            "clipia_webhook_secret": SECRET,
            "clipia_retired_webhook_secret": RETIRED,
            "sources": [{"name": "staging", "secret": OTHER}],
            "api_tokens": [{"name": "ops", "token": TOKEN, "scopes": ["operate", "read"]}],
            **changes,
        }
    )
    async with serving(create_app(settings, worker=False), door=door) as url:
        site = Site(url, database)
        yield site
        await site.client.aclose()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write kept requests at once."""
    monkeypatch.setattr(recorder, "GATHER_SECONDS", 0.01)


@pytest.fixture(params=["direct", "asgi"])
def door(request: pytest.FixtureRequest) -> Door:
    """Each of the two ways of a webhook."""
    found: Door = request.param
    return found


def metric(outcome: str) -> float:
    """Return the number of rejected requests with an outcome."""
    return REGISTRY.get_sample_value("receiver_rejections_kept_total", {"outcome": outcome}) or 0.0


def without(headers: dict[str, str], name: str) -> dict[str, str]:
    """Return headers without one."""
    return {key: value for key, value in headers.items() if key != name}


# --- causes ---


def requests() -> dict[str, tuple[str, bytes, Any]]:
    """Return a request for each cause: its path, its body and its headers."""
    content = body("r-1")
    good = signed(content)
    signature = good["X-Clipia-Signature"]
    return {
        "clock": (URL, content, signed(content, at=time.time() - 413)),
        "retired_secret": (URL, content, signed(content, secret=RETIRED)),
        "other_source": (URL, content, signed(content, secret=OTHER)),
        "secret_prefix": (URL, content, signed(content, secret=SECRET.removeprefix("whsec_"))),
        "secret_spelling": (URL, content, signed(content, secret=f"{SECRET}\n")),
        "newline_added": (URL, content + b"\n", good),
        "newline_removed": (URL, content, signed(content + b"\n")),
        "newlines_changed": (URL, b"{\n}", signed(b"{\r\n}")),
        "json_rewritten": (f"{URL}/clipia", json.dumps(json.loads(content), indent=2).encode(), good),
        "no_signature": (URL, content, without(good, "X-Clipia-Signature")),
        "no_timestamp": (URL, content, good | {"X-Clipia-Signature": signature.partition(",")[2]}),
        "two_signatures": (URL, content, good | {"X-Clipia-Signature": f"{signature},{signature}"}),
        "malformed": (URL, content, good | {"X-Clipia-Signature": "t=1,v1=2"}),
        "empty_body": (URL, b"", good),
        "large_body": (URL, content + b" " * 20_000, good),
        "unknown_secret": (f"{URL}/clipia/0b2a6a0e.x", content, signed(content, secret="forged")),
        "wrong_url": (f"{URL}s", content, good),
        "encoding": (URL, content, good | {"Content-Encoding": "gzip"}),
        "too_large": (URL, b" " * 300_000, good),
    }


async def test_each_cause_is_listed_and_shown(database: Database, door: Door) -> None:
    """G14: each rejected request is listed with its cause in words, and shown with headers and body."""
    sent = requests()
    async with make_site(database, door=door) as site:
        for path, content, headers in sent.values():
            assert await site.post(content, headers, path=path) in {401, 404, 413, 415}
        rows = await site.kept(len(sent))
        assert [row["cause"] for row in reversed(rows)] == list(sent)
        assert "Clock off by +41" in rows[-1]["diagnosis"]
        answer = await site.client.get(f"/v1/rejections/{rows[0]['id']}")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        for row in rows:
            assert row["peer"] == "127.0.0.1"
            path, content, headers = sent[row["cause"]]
            assert row["path"] == path
            shown = await site.show(row["id"])
            assert shown == row | {key: shown[key] for key in ("headers", "body", "remedy")}
            assert shown["remedy"]
            if row["cause"] in {"wrong_url", "encoding", "too_large"}:
                assert (shown["body"], shown["body_size"]) == (None, None)
            else:
                assert shown["body"].encode() == content[:16_384]
                assert shown["body_size"] == len(content)
            signature = headers.get("X-Clipia-Signature")
            assert dict(shown["headers"]).get("x-clipia-signature") == signature
        async with database.read() as connection:
            assert await connection.scalar(select(func.count()).select_from(events)) == 0


async def test_the_list_is_filtered_and_paged(database: Database) -> None:
    """G14: the list goes by source, reason, cause and time, in pages; an id that is none is a 404."""
    async with make_site(database) as site:
        for path, content, headers in requests().values():
            await site.post(content, headers, path=path)
        await site.post(b"{}", signed(b"{}"), path=f"{URL}/staging")
        rows = await site.kept(len(requests()) + 1)
        assert (rows[0]["source"], rows[0]["cause"]) == ("staging", "other_source")

        async def ids(**query: Any) -> list[int]:
            answer = await site.client.get("/v1/rejections", params=query)
            assert answer.status_code == 200, answer.text
            return [row["id"] for row in answer.json()["data"]]

        assert await ids(source="staging") == [rows[0]["id"]]
        assert await ids(source="-") == [row["id"] for row in rows if row["cause"] == "wrong_url"]
        assert len(await ids(reason="stale")) == len(await ids(cause="clock")) == 1
        assert await ids(since=datetime.now(UTC).isoformat()) == []
        assert len(await ids(until=datetime.now(UTC).isoformat())) == len(rows)
        paged, cursor, page = list[int](), dict[str, str](), dict[str, Any]()
        while len(paged) < len(rows):
            page = (await site.client.get("/v1/rejections", params={"limit": "7", **cursor})).json()
            paged += [row["id"] for row in page["data"]]
            if page["next"] is None:
                break
            cursor = {"cursor": page["next"]}
        assert (paged, page["next"]) == ([row["id"] for row in rows], None)
        for wrong in ("x", "0", "999999", "9" * 30, "-1"):
            assert (await site.client.get(f"/v1/rejections/{wrong}")).status_code == 404
        for query in ("cause=x", "limit=0", "cursor=x", "unknown=1"):
            assert (await site.client.get(f"/v1/rejections?{query}")).status_code == 400


# --- limits ---


async def test_a_flood_is_bounded_and_genuine_webhooks_are_stored(database: Database, door: Door) -> None:
    """G11: of a flood of forged requests few are kept, and each genuine webhook between them is accepted."""
    content = b'{"pad":"' + b"x" * 4000 + b'"}'
    forged = signed(content, secret="forged")
    dropped, kept = metric("rate"), metric("kept")
    began = time.monotonic()
    async with make_site(database, door=door) as site:

        async def genuine() -> list[int]:
            return [await site.post(each, signed(each)) for each in (body(f"r-{n}") for n in range(30))]

        floods = (site.flood(content, forged, number=50) for _ in range(10))
        *rejected, accepted = await asyncio.gather(*floods, genuine())
        assert rejected == [{401}] * 10
        assert accepted == [200] * 30
    allowed = recorder.BURST + (time.monotonic() - began) * recorder.RATE + 1
    async with database.read() as connection:
        number, size = (
            await connection.execute(
                select(func.count(), func.sum(rejections.c.size)).select_from(rejections)
            )
        ).one()
        assert await connection.scalar(select(func.count()).select_from(events)) == 30
    assert 0 < number <= allowed
    assert size <= number * 16_384
    # Each of the others is counted.
    assert metric("kept") - kept + metric("rate") - dropped == 500


async def test_the_memory_of_requests_that_wait_is_bounded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11: requests that cannot be written yet have a limit of bytes; those beyond it are counted."""
    monkeypatch.setattr(recorder, "BURST", 10_000)
    monkeypatch.setattr(recorder, "GATHER_SECONDS", 600.0)
    content = b"x" * 20_000
    before = metric("memory")
    async with make_site(database) as site:
        for _ in range(80):
            await site.post(content, {})
    async with database.read() as connection:
        number, size = (
            await connection.execute(
                select(func.count(), func.sum(rejections.c.size)).select_from(rejections)
            )
        ).one()
    # A stopping process writes those that wait.
    assert 0 < number < 80
    assert size <= recorder.MAX_WAITING_BYTES
    assert metric("memory") - before == 80 - number


def new(number: int, *, size: int = 1000, age: float = 0.0, content: bytes | None = None) -> NewRejection:
    """Return a rejected request to store."""
    return NewRejection(
        received_at=datetime.now(UTC) - timedelta(days=age),
        source="clipia",
        reason="mismatch",
        cause="unknown_secret",
        diagnosis=f"number {number}",
        path=URL,
        peer=None,
        headers=[],
        body_size=size,
        size=size,
        body=content,
    )


async def numbers(database: Database) -> list[int]:
    """Return the numbers of the stored requests."""
    async with database.read() as connection:
        rows = await sql.list_rejections(connection, limit=1000)
    return [int(row["diagnosis"].split()[1]) for row in rows]


async def test_the_oldest_are_deleted_first(database: Database) -> None:
    """G11: the table has a limit of rows and one of bytes; the oldest rows are deleted with each write."""
    async with database.write() as connection:
        await sql.insert(connection, [new(number) for number in range(30)])
        await sql.trim(connection, rows=1000, size=1_000_000)
    assert await numbers(database) == list(range(29, -1, -1))
    async with database.write() as connection:
        await sql.trim(connection, rows=80, size=1_000_000)
    assert await numbers(database) == list(range(29, 9, -1))
    async with database.write() as connection:
        await sql.insert(connection, [new(30, size=7000)])
        await sql.trim(connection, rows=80, size=40_000)
    assert await numbers(database) == [30, 29, 28, 27]
    async with database.write() as connection:
        await sql.trim(connection, rows=80, size=40_000)
    assert await numbers(database) == [30, 29, 28, 27]
    async with database.write() as connection:
        await sql.trim(connection, rows=2, size=40_000)
    assert await numbers(database) == [30, 29]


async def test_forged_requests_do_not_crowd_out_the_others(database: Database) -> None:
    """G11: a cause may take a quarter of the rows and of the bytes."""
    async with database.write() as connection:
        await sql.insert(connection, [replace(new(number), cause="clock") for number in range(2)])
        await sql.insert(connection, [new(number) for number in range(2, 60)])
        await sql.trim(connection, rows=60, size=1_000_000)
    assert await numbers(database) == [*range(59, 44, -1), 1, 0]
    async with database.write() as connection:
        await sql.trim(connection, rows=60, size=20_000)
    assert await numbers(database) == [*range(59, 54, -1), 1, 0]


async def test_a_request_with_many_headers_is_kept_beside_others(database: Database) -> None:
    """G11: other headers do not crowd out the signature, and no request takes the others with it."""
    async with make_site(database) as site:
        content = body("r-1")
        headers = signed(content, at=time.time() - 413)
        reader, writer = await asyncio.open_connection(site.client.base_url.host, site.client.base_url.port)
        lines = "Via: 1.1 proxy\r\n" * 40 + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n{lines}\r\n"
        writer.write(head.encode() + content)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), SECONDS)
        assert answer.split()[1] == b"401"
        writer.close()
        await site.post(content, {})
        assert {each["cause"] for each in await site.kept(2)} == {"clock", "no_signature"}


def test_a_path_is_cut_after_its_long_segments() -> None:
    """G2: the place of the cut shows no more of a token than the middle of a path."""
    path = "/x" * 56 + "/" + "t" * 40
    assert recorder.readable_path(path).endswith("/tttt…")


async def test_the_setting_limits_the_table_or_keeps_none(database: Database) -> None:
    """G11, G14: RECEIVER_REJECTIONS_KEPT is the number of rows; with 0 the earlier ones are deleted, too."""
    async with database.write() as connection:
        await sql.insert(connection, [new(number) for number in range(10)])
    async with make_site(database, rejections_kept=3) as site:
        await site.post(b"{}", {})
        await until(lambda: site.has(3))
        assert (await site.kept(3))[0]["cause"] == "no_signature"
    async with make_site(database, rejections_kept=0) as site:
        assert await site.post(b"{}", {}) == 401
        await until(lambda: site.has(0))
    assert await numbers(database) == []


# --- failures ---


async def test_a_database_that_is_away_delays_nothing(postgres: Postgres) -> None:
    """C3, G14: while the database is away requests are not kept; afterwards they are kept again."""
    url = postgres.url(template="migrated")
    name = url.rpartition("/")[2]
    database = Database(url)
    before = metric("database")
    with capture_logs() as logs:
        async with make_site(database) as site:
            await site.post(b"{}", {})
            await site.kept(1)
            postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            assert await site.post(b"{}", {}) == 401
            await until(lambda: metric("database") > before)
            postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            assert await site.post(b'{"later": 1}', {}) == 401
            rows = await site.kept(2)
            assert (await site.show(rows[0]["id"]))["body"] == '{"later": 1}'
    assert any(record["event"] == "rejected requests not kept" for record in logs)
    await database.close()


async def test_a_process_without_rejected_requests_stops_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G14: a stopping process does not wait for the time that its last write may take."""
    monkeypatch.setattr(recorder, "STOP_SECONDS", 600.0)
    async with asyncio.timeout(SECONDS), make_site(database):
        pass


async def test_a_bug_in_the_diagnosis_does_not_end_the_record(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G14: if a group cannot be diagnosed it is dropped and counted, and the next one is kept."""
    answers = itertools.chain([ZeroDivisionError()], itertools.repeat(None))
    real = diagnosis.diagnose

    def fail_once(*arguments: Any) -> Any:
        if error := next(answers):
            raise error
        return real(*arguments)

    monkeypatch.setattr(recorder, "diagnose", fail_once)
    before = metric("error")
    with capture_logs():
        async with make_site(database) as site:
            await site.post(b"{}", {})
            await until(lambda: metric("error") > before)
            await site.post(b"{}", {})
            assert len(await site.kept(1)) == 1


# --- secrets and personal data ---


async def test_no_secret_is_kept(database: Database, door: Door) -> None:
    """G8: tokens, cookies, signing secrets and the tokens in paths reach neither the table nor an answer."""
    canaries = {
        "authorization": f"Bearer {TOKEN}",
        "cookie": "session=cOoKiE-cAnArY-0123",
        "x-api-key": "kEy-cAnArY-0123456",
        "user-agent": f"agent {SECRET}",
    }
    token = "tOkEn-cAnArY-0123456789"
    content = json.dumps({"secret": SECRET, "retired": RETIRED, "note": "x" * 200, "token": TOKEN}).encode()
    async with make_site(database, door=door) as site:
        for path in (URL, f"{URL}/clipia/0f8fad5b-d9cb-469f-a165-70867728950e.{token}", f"{URL}/{SECRET}"):
            await site.post(content, canaries, path=f"{path}?key={token}")
        rows = await site.kept(3)
        shown = json.dumps([await site.show(row["id"]) for row in rows])
    async with database.read() as connection:
        stored = str((await connection.execute(select(rejections))).all())
    assert "x" * 200 in shown
    assert "x" * 200 in stored
    for canary in (SECRET, SECRET[6:], RETIRED[6:], TOKEN, token, "cOoKiE-cAnArY-0123", "kEy-cAnArY-0123456"):
        assert canary not in shown
        assert canary not in stored


async def test_old_ones_are_pruned_and_those_of_an_erased_event_are_deleted(
    database: Database, tmp_path: Path
) -> None:
    """C13, G9: `prune` deletes rejected requests by age, `erase` those with the event's `request_id`."""
    async with database.write() as connection:
        made = [new(1, age=100), new(2, age=89), new(3, content=body("r-1")), new(4, content=body("r-2"))]
        await sql.insert(connection, made)
        event = make_event("clipia", b"[]", received_at=time.time(), secret_id="a", signed_at=time.time())
        await insert_event(connection, event)
    begun = await retention.begin(database, older_than=timedelta(days=90))
    for dry_run in (True, False):
        runs = [each async for each in retention.prune(database, begun, dry_run=dry_run)]
        assert runs[-1].rejections == 1
        assert await numbers(database) == ([4, 3, 2, 1] if dry_run else [4, 3, 2])
    async with database.write() as connection:
        event = make_event(
            "clipia", body("r-1"), received_at=time.time(), secret_id="a", signed_at=time.time()
        )
        await insert_event(connection, event)
        await connection.execute(events.update().where(events.c.request_id == "r-1").values(state="ready"))
    storage = open_storage(f"file:{tmp_path}")
    assert await retention.erase(database, storage, "r-1") is not None
    await storage.close()
    assert await numbers(database) == [4, 2]


# --- commands ---


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep log lines out of the commands' output."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    with capture_logs():
        yield


async def test_the_commands_list_and_show(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet: None,  # noqa: ARG001 - a fixture
) -> None:
    """G7, G14: the commands print causes, and bodies without control characters; `check` has both."""
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database.url)
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)

    async def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["receiver", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main)
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, captured
        return captured.out + captured.err

    assert "No rejected requests." in await run("rejections", "list")
    async with make_site(database) as site:
        await site.post(b'{"a": "\x1b[31m"}', signed(b"{}"))
        await site.post(b"{}", {"user-agent": b"\xc4\x85"})
        await site.post(b"{}", signed(b"{}"), path="/elsewhere")
        rows = await site.kept(3)
    listed = await run("rejections", "list")
    for word in ("unknown_secret", "no_signature", "wrong_url", "/elsewhere"):
        assert word in listed
    page = json.loads(await run("rejections", "list", "--json", "--limit", "2"))
    assert ([row["id"] for row in page["data"]], page["next"]) == (
        [row["id"] for row in rows[:2]],
        str(rows[1]["id"]),
    )
    rest = json.loads(await run("rejections", "list", "--json", "--cursor", page["next"]))
    assert ([row["id"] for row in rest["data"]], rest["next"]) == ([rows[2]["id"]], None)
    only = json.loads(await run("rejections", "list", "--json", "--cause", "wrong_url"))
    assert [row["id"] for row in only["data"]] == [rows[0]["id"]]
    first = str(rows[2]["id"])
    shown = await run("rejections", "show", first)
    assert "forged or foreign" in shown
    assert "x-clipia-signature: t=" in shown
    assert '{"a": "\N{REPLACEMENT CHARACTER}[31m"}' in shown
    assert json.loads(await run("rejections", "show", first, "--json"))["cause"] == "unknown_secret"
    assert "The body was not read." in await run("rejections", "show", str(rows[0]["id"]))
    assert "there is no rejected request with the id 0" in await run("rejections", "show", "0", status=4)
    checked = await run("check")
    assert re.search(r"webhook secret: source clipia: 1 secret, id [0-9a-f]{8}", checked)
    assert re.search(rf"rejections: 1 with the cause wrong_url .*rejections show {rows[0]['id']}`", checked)
    monkeypatch.setenv("RECEIVER_REJECTIONS_KEPT", "0")
    assert "rejections: not kept: RECEIVER_REJECTIONS_KEPT is 0" in await run("check")
