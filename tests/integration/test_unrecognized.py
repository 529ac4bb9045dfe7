"""C9, B9: events that an older release did not recognize are found, counted, and recovered once."""

import asyncio
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert
from support.events import World, insert_event, opened, plain

from receiver.app import create_app
from receiver.cli import main
from receiver.db import inbox, reads, unrecognized
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.rows import NewEvent, event_id
from receiver.db.tables import deliveries, events
from receiver.ingest import make_event
from receiver.metrics import ROWS
from receiver.settings import Settings
from receiver.unrecognized import RecoverableCounter, recover_part

CAME = datetime.now(UTC) - timedelta(days=3)


def odd(request_id: str, value: str = "NaN") -> bytes:
    """Return a body that the release before did not recognize."""
    return f'{{"request_id":"{request_id}","status":"OK","payload":{{"output":{{"a":{value}}}}}}}'.encode()


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """A database with workers and one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


async def keep(world: World, content: bytes, *, deliveries_: int = 1, origin: Any = "webhook") -> None:
    """Store a body as the release before did: under its digest, with its receipts."""
    sha256 = hashlib.sha256(content).digest()
    request_id = f"sha256:{sha256.hex()}"
    event = make_event("clipia", b"?", received_at=CAME.timestamp(), origin=origin)._replace(
        raw_id=event_id("clipia", request_id).bytes,
        request_id=request_id,
        reason="number",
        body=content,
        body_sha256=sha256,
    )
    request = event._replace(webhook_id="hook", secret_id="one", signed_at=CAME.timestamp())
    async with world.database.write() as connection:
        seq = await insert_event(connection, request if origin == "webhook" else event)
        assert seq is not None
        repeats = deliveries_ - (origin == "webhook")
        await inbox.record_receipts(connection, [(seq, request, "unrecognized")] * repeats)


async def run(world: World, *, dry_run: bool = False) -> list[tuple[str, str]]:
    """Recover; return each request and its outcome."""
    found, _ = await recover_part(world.database, after=0, dry_run=dry_run)
    return [(each.request_id, each.outcome) for each in found]


async def facts(world: World) -> list[tuple[str, str]]:
    """Return each event's request and state."""
    return sorted((row["request_id"], row["state"]) for row in await world.rows(events))


def test_a_body_that_is_not_recognized_keeps_its_path() -> None:
    """C10: an unrecognized event keeps the job and the token of its callback's path."""
    job_id = uuid.uuid4()
    event = make_event("clipia", b"?", received_at=CAME.timestamp(), job_id=job_id, path_token="a" * 64)
    assert (event.state, event.job_id, event.path_token) == ("unrecognized", job_id, "a" * 64)


async def test_it_is_recovered_and_forwarded(world: World) -> None:
    """B9: a body that can be read now becomes the event of its request_id and is forwarded like a new one."""
    await keep(world, odd("r-1"), deliveries_=2)
    await keep(world, b"no JSON")
    before = await facts(world)
    (strange,) = [row["request_id"] for row in await world.rows(events) if row["body"] == b"no JSON"]
    assert sorted(await run(world, dry_run=True)) == [("r-1", "accepted"), (strange, "unrecognized")]
    assert await facts(world) == before
    assert sorted(await run(world)) == [("r-1", "accepted"), (strange, "unrecognized")]
    assert await facts(world) == [("r-1", "received"), (strange, "unrecognized")]
    (event,) = [row for row in await world.rows(events) if row["request_id"] == "r-1"]
    assert event["id"] == event_id("clipia", "r-1")
    assert (event["body"], event["status"], event["reason"]) == (odd("r-1"), "OK", None)
    assert abs(event["received_at"] - CAME) < timedelta(seconds=1)
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    (message,) = world.recorders["main"].published
    data = message.get_data()
    assert isinstance(data, dict)
    assert data["altered"] == ["/output/a"]
    assert [row["event_seq"] for row in await world.rows(all_receipts)].count(event["seq"]) == 2


async def test_a_second_run_changes_nothing(world: World) -> None:
    """B9: a recovered event is a normal event, and later runs do not change it."""
    await keep(world, odd("r-1"))
    await run(world)
    await world.fan_out()
    assert await run(world) == []
    assert await facts(world) == [("r-1", "ready")]
    assert len(await world.rows(deliveries)) == 1


@pytest.mark.parametrize(
    ("came", "outcome"),
    [
        (odd("r-1"), "duplicate"),
        (b'{"status":"OK", "request_id":"r-1","payload":{"output":{"a":NaN}}}', "duplicate"),
        (plain("r-1"), "conflict"),
        (b'{"request_id":"r-1","status":"ERROR"}', "conflict"),
    ],
)
@pytest.mark.parametrize("first", ["event", "unrecognized"])
async def test_there_is_one_event_per_request(world: World, came: bytes, outcome: str, first: str) -> None:
    """C9: an event that has come meanwhile is kept, and the old body is a repeated receipt of it."""
    if first == "event":
        await world.add(came)
        await keep(world, odd("r-1"), deliveries_=2)
    else:
        await keep(world, odd("r-1"), deliveries_=2)
        await world.add(came)
    await world.fan_out()
    assert await run(world, dry_run=True) == [("r-1", outcome)]
    assert await run(world) == [("r-1", outcome)]
    assert await run(world) == []
    (event,) = await world.rows(events)
    assert (event["body"], event["state"]) == (came, "ready")
    kept = None if outcome == "duplicate" else odd("r-1")
    assert [(row["event_seq"], row["outcome"], row["body"]) for row in await world.rows(all_receipts)] == [
        (event["seq"], outcome, kept)
    ] * 2
    assert len(await world.rows(deliveries)) == 1


async def test_several_bodies_of_one_request(world: World) -> None:
    """C9: of several bodies the oldest is the event, and a dry run has the same results as the run."""
    for content in (odd("r-1"), odd("r-1") + b" ", odd("r-1", "Infinity"), odd("r-1", "1e400") + b" "):
        await keep(world, content)
    planned = await run(world, dry_run=True)
    assert planned == [("r-1", each) for each in ("accepted", "duplicate", "duplicate", "duplicate")]
    assert await run(world) == planned
    (event,) = await world.rows(events)
    assert event["body"] == odd("r-1")


async def test_a_worker_of_an_older_release_did_not_recognize_it(world: World) -> None:
    """B9: an event that a worker did not recognize, under its own request_id, goes back to its fan-out."""
    await world.add(odd("r-1"))
    await world.change(events, state="unrecognized")
    assert await run(world) == [("r-1", "accepted")]
    assert await facts(world) == [("r-1", "received")]


async def test_a_polled_result(world: World) -> None:
    """B9: a polled result is recovered without receipts; if the event has come, it is a duplicate."""
    await keep(world, odd("r-1"), deliveries_=0, origin="poll")
    await keep(world, odd("r-2"), deliveries_=0, origin="poll")
    await world.add(plain("r-2"))
    assert await run(world) == [("r-1", "accepted"), ("r-2", "duplicate")]
    assert await facts(world) == [("r-1", "received"), ("r-2", "received")]


async def test_runs_at_once(world: World) -> None:
    """C1: concurrent runs and webhooks of the same requests leave one event each, and its body stays."""
    ids = [f"r-{number}" for number in range(12)]
    for id_ in ids:
        await keep(world, odd(id_))
        await keep(world, odd(id_) + b"\n")

    async def post() -> None:
        for id_ in ids[::-1]:
            event = make_event("clipia", odd(id_), received_at=time.time())
            async with world.database.write() as connection:
                await insert_event(connection, event)

    found = await asyncio.gather(run(world), run(world), run(world), post())
    assert await facts(world) == sorted((id_, "received") for id_ in ids)
    total = Counter(id_ for results in found[:3] for id_, _ in results or ())
    assert set(total.values()) == {2}
    assert all(outcome in ("accepted", "duplicate") for results in found[:3] for _, outcome in results or ())
    assert len(await world.rows(all_receipts)) == 24


async def test_a_webhook_in_between(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: a webhook that is stored between the query and the write is not overwritten, and no error."""
    await keep(world, odd("r-1"))
    take_up = unrecognized.recognize
    came: list[bool] = []

    async def late(connection: Any, seq: int, event: NewEvent) -> None:
        if not came:
            came.append(True)
            new = make_event("clipia", plain("r-1"), received_at=time.time())
            values = new.columns()
            if world.database.is_sqlite:
                await connection.execute(insert(events).values(**values))
            else:
                async with world.database.write() as other:
                    await other.execute(insert(events).values(**values))
        await take_up(connection, seq, event)

    monkeypatch.setattr(unrecognized, "recognize", late)
    if world.database.is_sqlite:
        # No other transaction can write meanwhile, so this one inserts the event, and its rollback
        # removes it.
        assert await run(world) == [("r-1", "accepted")]
    else:
        assert await run(world) == [("r-1", "conflict")]
        assert [row["body"] for row in await world.rows(events)] == [plain("r-1")]
    assert len(await world.rows(events)) == 1


@pytest.mark.parametrize("request_id", ["r-1", "é/😀", "a%_'b"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
async def test_it_is_found_by_its_request_id(world: World, request_id: str, *, ensure_ascii: bool) -> None:
    """B9: an event that this release can read is found by its request_id, and shown as recoverable."""
    content = json.dumps(
        {"request_id": request_id, "status": "OK", "x": float("nan")}, ensure_ascii=ensure_ascii
    )
    await keep(world, content.encode())
    await keep(world, odd("r-10"))
    await keep(world, b'"%b"' % request_id.encode())
    async with world.database.read() as connection:
        shown = await reads.show_event(connection, request_id)
        other = await reads.show_event(connection, f"sha256:{hashlib.sha256(b'x').hexdigest()}")
    assert shown is not None
    assert (shown["body"], shown["state"], shown["recoverable"]) == (
        content.encode(),
        "unrecognized",
        True,
    )
    assert other is None
    await world.add(plain(request_id))
    async with world.database.read() as connection:
        found = await reads.show_event(connection, request_id)
    assert found is not None
    assert (found["state"], "recoverable" in found) == ("received", False)


async def test_they_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """B9: a gauge has the number of events and of recoverable ones, and reads each body once."""
    for number in range(25):
        await keep(world, odd(f"r-{number}"))
    await keep(world, b"no JSON")
    count = RecoverableCounter(world.database)
    assert await count() == {True: 25, False: 1}
    monkeypatch.setattr(unrecognized, "read_request_id", lambda _body: pytest.fail("read again"))
    assert await count() == {True: 25, False: 1}
    monkeypatch.undo()
    await run(world)
    assert await count() == {True: 0, False: 1}


async def test_the_gauge_follows(world: World, database_url: str) -> None:
    """B9: /metrics has both counts, for alerts."""
    await keep(world, odd("r-1"))
    await keep(world, b"no JSON")
    app = create_app(Settings.load(database_url=database_url, clipia_webhook_secret="whsec_x"), worker=False)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            assert (
                'receiver_unrecognized_events{recoverable="true"} 1.0' in (await client.get("/metrics")).text
            )
            await run(world)
            text = (await client.get("/metrics")).text
    assert 'receiver_unrecognized_events{recoverable="true"} 0.0' in text
    assert ROWS.get_sample_value("receiver_unrecognized_events", {"recoverable": "false"}) == 1.0


async def test_the_command(
    world: World, database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9: a dry run shows the results; the run has the same ones; the next run finds no event."""
    await keep(world, odd("r-1"))
    await keep(world, odd("r-2"))
    await world.add(plain("r-2"))
    await keep(world, b"no JSON")
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)

    async def command(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["receiver", "events", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            await asyncio.to_thread(main)
        captured = capsys.readouterr()
        return captured.out, " ".join(captured.err.split())

    ids = [event_id("clipia", name) for name in ("r-1", "r-2")]
    lines = f"accepted   r-1  event {ids[0]}\nconflict   r-2  event {ids[1]}\n"
    rest = "0 had arrived again, 1 with another body; 1 cannot be read"
    shown, _ = await command("show", "r-1")
    assert "receiver events recover" in shown
    before = await facts(world)
    out, err = await command("recover", "--dry-run")
    assert (out, err) == (lines, f"1 event to recover; {rest}")
    assert await facts(world) == before
    out, err = await command("recover")
    assert set(lines.splitlines()) <= set(out.splitlines())  # the log is printed between them
    assert f"1 event recovered; {rest}" in err
    found = json.loads((await command("recover", "--json"))[0])
    assert ([each["outcome"] for each in found["data"]], found["next"]) == (["unrecognized"], None)
    assert json.loads((await command("show", "r-1", "--json"))[0])["state"] == "received"
