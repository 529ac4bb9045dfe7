"""Export and import move all rows to another database, and no event is sent twice."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import func, select
from support.events import World, opened, plain, with_files
from support.payloads import body, failure
from support.servers import Postgres

from receiver.cli import export_import as commands
from receiver.db import export_import, inbox, leases, outbox, reads, statements
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.receipts import FIRST_COLUMNS
from receiver.db.rows import Attempt, event_id
from receiver.db.tables import attempts, deliveries, events, jobs, media, receipts, replays
from receiver.errors import ReceiverError
from receiver.ingest import make_event
from receiver.lanes.replay import ReplayPace

MOVED = {"after_seq", "until_seq", "handled"}
"""Columns of a replay that change if it continues in another database."""
ODD = b"\xff\xfe\x00 not text \x00"

Line = dict[str, Any]


class Databases:
    """Creates databases and a `World` for each."""

    def __init__(self, template: Path, server: Postgres, folder: Path, stack: AsyncExitStack) -> None:
        self._template = template
        self._server = server
        self._folder = folder
        self._stack = stack
        self._count = 0

    async def world(self, kind: str) -> World:
        """Return a world with a new database of a kind and two destinations."""
        self._count += 1
        if kind == "sqlite":
            path = self._folder / f"{self._count}.db"
            path.write_bytes(self._template.read_bytes())
            url = f"sqlite:///{path}"
        else:
            url = self._server.url(template="migrated")
        database = Database(url)
        self._stack.push_async_callback(database.close)
        world = await self._stack.enter_async_context(opened(database, self._folder / f"media-{self._count}"))
        world.add_destination("main")
        world.add_destination("early", waits_for_media=False)
        return world


@pytest.fixture
async def databases(migrated_sqlite: Path, postgres: Postgres, tmp_path: Path) -> AsyncIterator[Databases]:
    """A factory of databases."""
    async with AsyncExitStack() as stack:
        yield Databases(migrated_sqlite, postgres, tmp_path, stack)


@pytest.fixture(params=["sqlite to postgresql", "postgresql to sqlite"])
async def pair(request: pytest.FixtureRequest, databases: Databases) -> tuple[World, World]:
    """The database of the export and the one of the import."""
    kinds: list[str] = request.param.split(" to ")
    here, there = [await databases.world(kind) for kind in kinds]
    return here, there


async def export(world: World, *, limit: int = 7) -> list[bytes]:
    """Return the lines of an export."""
    lines: list[bytes] = []
    for kind in export_import.KINDS:
        after = 0
        for _ in range(1000):
            async with world.database.read() as connection:
                page, after = await export_import.read(
                    connection, kind, after=after, limit=limit, since=None, until=None
                )
            if not page:
                break
            lines += [orjson.dumps(line) for line in page]
    return lines


async def load(world: World, lines: Sequence[bytes]) -> Counter[str]:
    """Import lines."""
    async with world.database.write() as connection:
        return await export_import.write(connection, [orjson.loads(line) for line in lines])


def comparable(lines: Sequence[bytes]) -> list[Line]:
    """Return lines without the columns that change if a replay continues in another database."""
    found: list[Line] = [orjson.loads(line) for line in lines]
    for line in found:
        if line["type"] == "replay" and line["state"] == "pending":
            for name in MOVED:
                line.pop(name)
    return found


async def count_rows(world: World) -> dict[str, int]:
    """Count the rows of each table."""
    found = {}
    for table in (events, receipts, media, deliveries, attempts, jobs, replays):
        async with world.database.read() as connection:
            found[table.name] = (
                await connection.execute(select(func.count()).select_from(table))
            ).scalar_one()
    return found


async def add_receipt(world: World, seq: int, outcome: Any, content: bytes | None = None) -> None:
    """Record a receipt of an event."""
    async with world.database.write() as connection:
        event = make_event(
            "clipia",
            content or b"{}",
            received_at=time.time(),
            webhook_id=None if content else "wh-1",
            secret_id="0123456789abcdef",
            signed_at=time.time(),
        )
        await inbox.record_receipts(connection, [(seq, event, outcome)])


async def fill(world: World) -> None:
    """Store events, jobs and replays in all states."""
    await world.add_history(plain("delivered"), plain("дом-1", model="größer"), failure("failed"))
    for state in ("dead", "canceled"):
        await world.add_history(plain(state))
        await world.change(
            deliveries,
            deliveries.c.event_seq == (await world.rows(events))[-1]["seq"],
            state=state,
            error="PublishRejected: 4\u00fc22",
            attempts=9,
            lost=2,
        )
    await world.change(deliveries, deliveries.c.state == "dead", restarted_at=db_time(-3600.0))
    files = {"images": [{"url": f"https://cdn.invalid/{name}.png"} for name in ("s", "g", "b", "p")]}
    await world.add(body("files", payload={"model": "m", "output": files, "cost": 3}))
    await world.fan_out()
    outcomes: list[dict[str, Any]] = [
        {"state": "stored", "size": 12, "sha256": "a" * 64, "content_type": "image/png", "storage_key": "k"},
        {"state": "gone", "error": "404", "attempts": 3, "restarted_at": db_time(-5.0)},
        {"state": "blocked", "error": "host", "finished_at": db_time(-5.0)},
        {"state": "pending", "lease": uuid.uuid4(), "attempts": 2, "next_attempt_at": db_time(60.0)},
    ]
    for position, outcome in enumerate(outcomes):
        await world.change(media, media.c.position == position, **outcome)
    await world.add(plain("waits"))
    await world.add(plain("under-way"))
    await world.fan_out()
    lane = world.delivery_lane()
    works = await lane.claim(32)
    await works[0].run()
    await world.add(plain("received"), job_id=uuid.uuid4())
    await world.add(plain("elsewhere"), source="staging")
    await world.add(ODD)
    await world.add(b"")
    seqs = {row["request_id"]: row["seq"] for row in await world.rows(events)}
    await world.change(events, events.c.request_id == "elsewhere", origin="poll")
    await add_receipt(world, seqs["delivered"], "accepted")
    await add_receipt(world, seqs["delivered"], "conflict", ODD)
    await add_receipt(world, seqs["delivered"], "conflict", plain("delivered", model="\u2028"))
    await fill_jobs(world)
    await fill_replays(world)


async def fill_jobs(world: World) -> None:
    """Store jobs in all states."""
    values: dict[str, dict[str, Any]] = {
        "pending": {"lease": uuid.uuid4(), "sent_at": db_time(-5.0), "account": "live-1"},
        "submitted": {"request_id": "open", "warnings": [{"code": "x", "message": "ü"}], "progress": 40},
        "completed": {"request_id": "delivered", "warnings": [], "charged": 12, "cost": 12},
        "failed": {"request_id": "failed", "error": '{"code": "X"}', "charged": 0},
        "canceled": {"watched_until": db_time(3.0)},
        "unsure": {"error": "nobody knows", "max_cost": 2**40},
    }
    for state, changes in values.items():
        job_id = await world.add_job(state, metadata={"order": state, "größe": "\U0001f600"})
        await world.change(jobs, jobs.c.id == job_id, state=state, request=ODD, **changes)


async def fill_replays(world: World) -> None:
    """Store replays in all states, none of them due, and deliveries of the last one."""
    selection = {"status": "OK", "since": "2026-01-01T00:00:00+02:00"}
    seqs = [row["seq"] for row in await world.rows(events)]
    for state in ("completed", "canceled", "failed", "pending"):
        order = await world.order(selection=selection, reason=f"{state} \u2603", rate=0.5)
        await world.change(
            replays,
            replays.c.id == order["id"],
            state=state,
            after_seq=2,
            handled=2,
            ordered=4,
            lease=uuid.uuid4(),
            next_attempt_at=db_time(3600.0),
        )
        async with world.database.write() as connection:
            await outbox.insert_deliveries(connection, [(seqs[0], "main")], due=True, replay_id=order["id"])
            await outbox.insert_deliveries(connection, [(seqs[1], "main")], due=False, replay_id=order["id"])


async def test_all_rows_are_moved_unchanged(pair: tuple[World, World], databases: Databases) -> None:
    """The import has each column of each row in each state, and so has an import back."""
    here, there = pair
    await fill(here)
    lines = await export(here)
    kinds = Counter(orjson.loads(line)["type"] for line in lines)
    assert kinds == {"event": 12, "job": 6, "replay": 4}
    done = await load(there, lines)
    assert done == {f"{kind} new": count for kind, count in kinds.items()}
    moved = await export(there)
    assert comparable(moved) == comparable(lines)
    assert await count_rows(there) == await count_rows(here)
    for table, name in ((events, "body"), (receipts, "body"), (jobs, "request"), (jobs, "metadata")):
        kept = [row[name] for row in await here.rows(table)]
        assert [row[name] for row in await there.rows(table)] == kept
        assert any(kept)
    async with there.database.read() as connection:
        assert await reads.show_event(connection, (await here.rows(events))[0]["request_id"]) is not None
    back = await databases.world("sqlite" if here.database.is_sqlite else "postgresql")
    await load(back, moved)
    assert comparable(await export(back)) == comparable(lines)


@pytest.mark.parametrize("errors", [(None, "answered 503"), ("answered 503", None), (None, None)])
async def test_attempts_keep_their_errors(pair: tuple[World, World], errors: tuple[str | None, ...]) -> None:
    """E12: if the attempts of a delivery had different outcomes, the import has all of them."""
    here, there = pair
    await here.add_history(plain("r-1"))
    (delivery, *_) = await here.rows(deliveries)
    tries = [
        Attempt(number=number, started_at=datetime.now(UTC), duration_ms=1, outcome="retry", error=error)
        for number, error in enumerate(errors, start=1)
    ]
    async with here.database.write() as connection:
        await leases.record_attempts(connection, [(delivery["id"], each) for each in tries])
    await load(there, await export(here))
    assert [row["error"] for row in await there.rows(attempts)] == list(errors)


async def test_no_column_is_forgotten(pair: tuple[World, World]) -> None:
    """An export has all columns but the numbers of rows and the leases."""
    here, _ = pair
    await fill(here)
    lines: list[Line] = [orjson.loads(line) for line in await export(here)]
    by_table = {
        "events": [line for line in lines if line["type"] == "event"],
        "jobs": [line for line in lines if line["type"] == "job"],
        "replays": [line for line in lines if line["type"] == "replay"],
    }
    for name in ("receipts", "media", "deliveries"):
        by_table[name] = [child for line in by_table["events"] for child in line[name]]
    works = by_table["media"] + by_table["deliveries"] + by_table["jobs"]
    by_table["attempts"] = [attempt for work in works for attempt in work["tries"]]
    for table in (events, receipts, media, deliveries, attempts, jobs, replays):
        kept = {column.name for column in table.c} - {"seq", "event_seq", "lease", "work_id"}
        if table is events:
            kept -= {*FIRST_COLUMNS}  # in the line of its first receipt
        assert by_table[table.name], table.name
        for line in by_table[table.name]:
            assert kept - line.keys() == set()
    for name in ("events", "media", "deliveries", "jobs", "replays"):
        table = next(each for each in (events, media, deliveries, jobs, replays) if each.name == name)
        assert {row["state"] for row in await here.rows(table)} == {line["state"] for line in by_table[name]}


async def test_a_repeated_import_makes_no_change(pair: tuple[World, World]) -> None:
    """If an import is repeated, all rows are known, even if they have changed meanwhile."""
    here, there = pair
    await fill(here)
    lines = await export(here)
    await load(there, lines)
    await there.change(deliveries, deliveries.c.state == "pending", state="delivered")
    before, counts = await export(there), await count_rows(there)
    assert await load(there, lines) == {"event known": 12, "job known": 6, "replay known": 4}
    assert await export(there) == before
    assert await count_rows(there) == counts
    assert await load(here, lines) == {"event known": 12, "job known": 6, "replay known": 4}
    assert await export(here) == lines


async def test_an_interrupted_import_is_continued(pair: tuple[World, World]) -> None:
    """If a batch fails, it is rolled back, and the next import takes the rest."""
    here, there = pair
    await fill(here)
    lines = await export(here)
    await load(there, lines[:5])
    counts = await count_rows(there)

    async def break_off() -> None:
        async with there.database.write() as connection:
            await export_import.write(connection, [orjson.loads(line) for line in lines[5:9]])
            raise ConnectionAbortedError

    with pytest.raises(Exception, match=r"(?i)aborted|unavailable"):
        await break_off()
    assert await count_rows(there) == counts
    done = await load(there, lines)
    assert done == {"event new": 7, "event known": 5, "job new": 6, "replay new": 4}
    assert comparable(await export(there)) == comparable(lines)


async def test_two_imports_at_once_are_one(pair: tuple[World, World]) -> None:
    """If two imports run at once, each row is inserted by one of them."""
    here, there = pair
    await fill(here)
    lines = await export(here)
    done: Counter[str] = sum(await asyncio.gather(*(load(there, lines) for _ in range(3))), Counter())
    assert done == {
        "event new": 12,
        "job new": 6,
        "replay new": 4,
        "event known": 24,
        "job known": 12,
        "replay known": 8,
    }
    assert comparable(await export(there)) == comparable(lines)


async def test_an_import_keeps_no_webhook_waiting(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C13: while an import adds a source, webhooks of the source are stored without a wait."""
    world = await databases.world("postgresql")
    insert_new, stored = statements.insert_unless_taken, 0

    async def insert_beside(*arguments: Any) -> Any:
        nonlocal stored
        found = await insert_new(*arguments)
        async with asyncio.timeout(1.0):
            await world.add(plain(f"beside-{stored}"))
        stored += 1
        return found

    monkeypatch.setattr(export_import, "insert_unless_taken", insert_beside)
    names = ("r-1", "r-2", "r-3")
    lines = [EVENT | {"id": str(event_id("clipia", name)), "request_id": name} for name in names]
    async with world.database.write() as connection:
        await export_import.write(connection, lines)
    assert stored == 3
    assert (await count_rows(world))["events"] == 6


async def test_a_known_event_is_not_changed(pair: tuple[World, World]) -> None:
    """If the new database has received an event, the import neither changes nor sends it."""
    here, there = pair
    await here.add_history(plain("both"), plain("old"))
    await there.add(plain("both"))
    assert await load(there, await export(here)) == {"event new": 1, "event known": 1}
    states = {row["request_id"]: row["state"] for row in await there.rows(events)}
    assert states == {"both": "received", "old": "ready"}
    assert len(await there.rows(deliveries)) == 2


async def test_only_pending_deliveries_are_sent(pair: tuple[World, World]) -> None:
    """E12: the new workers send the pending deliveries and no finished one."""
    here, there = pair
    await here.add_history(*(plain(f"old-{number}") for number in range(5)))
    for number in range(6):
        await here.add(plain(f"due-{number}"))
    await here.fan_out()
    under_way = await here.delivery_lane().claim(3)
    await under_way[0].run()
    await here.add(plain("new"))
    await load(there, await export(here))
    assert await there.states(deliveries) == {"delivered": 11, "pending": 11}
    await there.change(deliveries, deliveries.c.state == "pending", next_attempt_at=db_time(0.0))
    async with there.working():
        await there.until_states(deliveries, delivered=24)
    fresh = sorted(["new", *(f"due-{number}" for number in range(6))])
    assert len(here.recorders["main"].subjects) == 1
    assert sorted(here.recorders["main"].subjects + there.recorders["main"].subjects) == fresh
    assert sorted(there.recorders["early"].subjects) == fresh


async def test_a_claim_of_the_old_workers_is_not_carried_over(pair: tuple[World, World]) -> None:
    """E10: if a row was claimed, it is due at the end of its lease, and the attempt is counted."""
    here, there = pair
    await here.add(plain("r-1"))
    await here.fan_out()
    await here.delivery_lane().claim(1)
    await load(there, await export(here))
    (old,) = await here.rows(deliveries, deliveries.c.destination == "main")
    (new,) = await there.rows(deliveries, deliveries.c.destination == "main")
    assert (new["lease"], new["attempts"], new["lost"]) == (None, 1, 0)
    assert new["next_attempt_at"] == old["next_attempt_at"]
    assert await there.delivery_lane().claim(5) == []
    await there.change(deliveries, next_attempt_at=db_time(0.0))
    (work,) = await there.delivery_lane().claim(5)
    assert (work.claim.attempt, work.claim.id) == (2, old["id"])


async def test_an_event_with_files_stored_during_the_export_is_ready(pair: tuple[World, World]) -> None:
    """E12: if a `fetching` event has stored files, the import makes it ready and its delivery due."""
    here, there = pair
    await here.add(with_files("https://media.clipia.ai", "r-1", "/a.png"))
    await here.fan_out()
    (line,) = [orjson.loads(each) for each in await export(here)]
    line["media"][0] |= {"state": "stored", "finished_at": line["media"][0]["created_at"]}
    await load(there, [orjson.dumps(line)])
    assert await there.states(events) == {"ready": 1}
    async with there.working():
        await there.until_states(deliveries, delivered=2)


async def test_a_pending_replay_goes_on_without_doubles(pair: tuple[World, World]) -> None:
    """E12: a replay that continues there orders and sends only the events that it has not handled yet."""
    here, there = pair
    here.replay_pace = there.replay_pace = ReplayPace(step_events=10)
    await here.add_history(*(plain(f"r-{number}") for number in range(35)))
    order = await here.order(to=["main"])
    lane = here.replay_lane()
    for _ in range(2):
        (work,) = await lane.claim(1)
        await work.run()
    for delivery in await here.delivery_lane().claim(6):
        await delivery.run()
    assert len(here.recorders["main"].subjects) == 6
    await load(there, await export(here))
    async with there.working():
        done = await there.until_replayed(order)
    sent = here.recorders["main"].subjects + there.recorders["main"].subjects
    assert sorted(sent) == sorted(f"r-{number}" for number in range(35))
    assert (done["state"], done["ordered"], done["matched"]) == ("completed", 35, 35)
    assert done["deliveries"] == {"main": {"delivered": 35}}


async def test_an_imported_replay_leaves_later_events_alone(pair: tuple[World, World]) -> None:
    """E12: an event that the new database received after the order is delivered live and not replayed."""
    here, there = pair
    await here.add_history(plain("old"))
    order = await here.order(to=["main"])
    await there.add(plain("live"))
    async with there.working():
        await there.until_states(deliveries, delivered=2)
    await load(there, await export(here))
    async with there.working():
        await there.until_replayed(order)
    assert there.recorders["main"].subjects == ["live", "old"]


def row_lines(file: Path) -> list[bytes]:
    """Return the lines of an export without its head and its end."""
    lines = file.read_bytes().splitlines()
    return [line for line in lines if orjson.loads(line)["type"] in export_import.KINDS]


@pytest.fixture
def commanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process and do not configure logging."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setattr(commands, "BATCH_LINES", 4)


async def run_export(world: World, file: Path, **bounds: datetime) -> None:
    """Run `receiver events export` on a world's database."""
    await run_on(world, commands.export, str(file), bounds.get("since"), bounds.get("until"))


async def run_import(world: World, file: Path) -> None:
    """Run `receiver events import` on a world's database."""
    await run_on(world, commands.import_, str(file))


async def run_on(world: World, command: Callable[..., None], *arguments: Any) -> None:
    """Run a command in a thread, because it runs its own event loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECEIVER_DATABASE_URL", world.database.url)
        await asyncio.to_thread(command, *arguments)


@pytest.mark.usefixtures("commanded")
async def test_the_commands_move_all_rows(
    pair: tuple[World, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In batches of four, both print the number of rows, and a repeated import prints that they are known."""
    here, there = pair
    await fill(here)
    await run_export(here, tmp_path / "ledger")
    assert "12 events, 6 jobs, 4 replays exported" in capsys.readouterr().err
    head, *_ = (tmp_path / "ledger").read_bytes().splitlines()
    assert orjson.loads(head) == {"type": "ledger", "version": export_import.VERSION}
    lines = row_lines(tmp_path / "ledger")
    assert lines == await export(here)
    await run_import(there, tmp_path / "ledger")
    assert "12 event new, 6 job new, 4 replay new" in capsys.readouterr().err
    assert comparable(await export(there)) == comparable(lines)
    await run_import(there, tmp_path / "ledger")
    assert "12 event known, 6 job known, 4 replay known" in capsys.readouterr().err


@pytest.mark.usefixtures("commanded")
async def test_an_export_can_be_cut_to_a_time(pair: tuple[World, World], tmp_path: Path) -> None:
    """`--since` and `--until` bound the time of receipt or creation, and two such exports have all rows."""
    here, there = pair
    await here.add_history(*(plain(f"r-{number}") for number in range(6)))
    cut = datetime(2026, 3, 1, 12, tzinfo=UTC)
    before, after = (cut + timedelta(hours=hours) for hours in (-1, 1))
    await here.change(events, received_at=after)
    await here.change(events, events.c.request_id.in_(["r-0", "r-4"]), received_at=before)
    await run_export(here, tmp_path / "early", until=cut)
    await run_export(here, tmp_path / "late", since=cut)
    counts = {}
    for name in ("early", "late"):
        await run_import(there, tmp_path / name)
        counts[name] = {row["request_id"] for row in await there.rows(events)}
    assert counts["early"] == {"r-0", "r-4"}
    assert counts["late"] == {f"r-{number}" for number in range(6)}


@pytest.mark.usefixtures("commanded")
async def test_an_export_that_was_cut_off_is_an_error(pair: tuple[World, World], tmp_path: Path) -> None:
    """If a file ends within a line, the error tells so; the lines before are imported."""
    here, there = pair
    await fill(here)
    await run_export(here, tmp_path / "whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    events_at = [number for number, line in enumerate(lines) if orjson.loads(line)["type"] == "event"]
    cut = events_at[len(events_at) * 2 // 3]
    (tmp_path / "part").write_bytes(b"".join(lines[:cut]) + lines[cut][:-20])
    with pytest.raises(ReceiverError, match="cut off"):
        await run_import(there, tmp_path / "part")
    imported = len(await there.rows(events))
    assert 0 < imported < 12
    assert imported % 4 == 0, "whole batches"
    await run_import(there, tmp_path / "whole")
    assert comparable(await export(there)) == comparable(row_lines(tmp_path / "whole"))


@pytest.mark.usefixtures("commanded")
async def test_an_export_without_its_end_is_an_error(pair: tuple[World, World], tmp_path: Path) -> None:
    """If the last lines of a file are missing, as after a full disk, the import reports it."""
    here, there = pair
    await here.add_history(plain("r-1"), plain("r-2"))
    await run_export(here, tmp_path / "whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        (tmp_path / "part").write_bytes(b"".join(lines[:kept]))
        with pytest.raises(ReceiverError):
            await run_import(there, tmp_path / "part")


EVENT: dict[str, Any] = {
    "type": "event",
    "id": str(event_id("clipia", "r-1")),
    "source": "clipia",
    "request_id": "r-1",
    "origin": "webhook",
    "state": "ready",
    "status": "OK",
    "model": "m",
    "cost": 1,
    "body": "e30=",
    "body_sha256": "0" * 64,
    "received_at": "2026-03-01T12:00:00+00:00",
    **{name: [] for name in export_import.CHILDREN},
}
RECEIPT: dict[str, Any] = {
    "webhook_id": None,
    "secret_id": "one",
    "signed_at": "2026-03-01T11:59:59+00:00",
    "received_at": EVENT["received_at"],
    "body_sha256": EVENT["body_sha256"],
    "outcome": "accepted",
    "body": None,
    "repeated": 0,
}
GARBAGE: list[dict[str, Any]] = [
    {},
    {"type": "evnet"},
    {"type": None},
    {"type": ["event"]},
    {"type": "event"},
    {"type": "job"},
    {"type": "replay"},
    *(
        {name: value for name, value in EVENT.items() if name != missing}
        for missing in ("id", "body", "media")
    ),
    EVENT | {"id": "no id"},
    EVENT | {"id": 7},
    # It would be a second event with the `request_id`.
    EVENT | {"id": "7c9e6679-7425-40de-944b-e07fc1f90ae7"},
    EVENT | {"id": None},
    EVENT | {"body": "no base64!"},
    EVENT | {"body": 7},
    EVENT | {"received_at": "yesterday"},
    EVENT | {"received_at": 7},
    EVENT | {"received_at": "2026-03-01T12:00:00"},
    EVENT | {"source": {"a": 1}},
    EVENT | {"media": None},
    EVENT | {"media": 7},
    EVENT | {"media": "x"},
    EVENT | {"receipts": [7]},
    EVENT | {"receipts": [{}]},
    EVENT | {"deliveries": [{"id": "7c9e6679-7425-40de-944b-e07fc1f90ae8"}]},
    EVENT | {"deliveries": [{"tries": [{}]}]},
]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize(
    ("of_event", "of_receipt"),
    [
        ({}, {}),
        ({}, {"repeated": 7}),
        ({}, {"body": "e30="}),
        ({"status": ""}, {}),
        ({"status": ""}, {"outcome": "unrecognized"}),
        ({"status": None}, {"outcome": "unrecognized"}),
        ({"status": None}, {}),
    ],
)
async def test_first_receipts_are_imported_unchanged(
    databases: Databases, kind: str, of_event: Line, of_receipt: Line
) -> None:
    """The first receipt of an event is exported as it was imported."""
    world = await databases.world(kind)
    line = EVENT | of_event | {"receipts": [RECEIPT | of_receipt]}
    await load(world, [orjson.dumps(line)])
    (found,) = map(orjson.loads, await export(world))
    assert found["receipts"] == line["receipts"]


@pytest.mark.parametrize("text", ["no digest", "0g", "abc", "ab " * 32])
async def test_texts_that_are_no_digests_are_imported_as_empty(databases: Databases, text: str) -> None:
    """An earlier release took any text for a digest; it becomes empty, as in migration 0013."""
    world = await databases.world("sqlite")
    digest = {"body_sha256": text}
    await load(world, [orjson.dumps(EVENT | digest | {"receipts": [RECEIPT | digest]})])
    (found,) = map(orjson.loads, await export(world))
    assert (found["body_sha256"], found["receipts"]) == ("", [RECEIPT | {"body_sha256": ""}])


@pytest.mark.usefixtures("commanded")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_lines_of_another_program_are_one_clear_error(
    databases: Databases, tmp_path: Path, kind: str
) -> None:
    """If a line is damaged or of another program, the error names its batch, which is rolled back."""
    world = await databases.world(kind)
    wrong: list[tuple[Line, str]] = []
    head = {"type": "ledger", "version": export_import.VERSION}
    for number, line in enumerate(GARBAGE):
        file = tmp_path / f"{number}"
        name = f"good-{number}"
        good = EVENT | {"id": str(event_id("clipia", name)), "request_id": name}
        file.write_bytes(b"\n".join(map(orjson.dumps, [head, good, line])) + b"\n")
        try:
            await run_import(world, file)
        except ReceiverError as error:
            if "lines 2 to 3" not in str(error) or "\n" in str(error):
                wrong.append((line, str(error)))
        except Exception as error:  # noqa: BLE001 - what would be a traceback for the user
            wrong.append((line, repr(error)[:200]))
        else:
            wrong.append((line, "imported"))
    assert wrong == []
    assert await world.rows(events) == []


@pytest.mark.usefixtures("commanded")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an export"),
        (b"\n", "not JSON"),
        (b"{}\n", "not an export"),
        (b'{"type": "ledger", "version": 2}\n', "version 1"),
        (b'{"type": "event"}\n', "not an export"),
        (b"[]\n", "not a JSON object"),
        (b"\xff\xfe\n", "not JSON"),
        (b"\x1f\x8b\x08 gzip", "not JSON"),
        (b'{"type": "ledger", "version": 1}\n7\n', "not a JSON object"),
        (b'{"type": "ledger", "version": 1}\n{"type": "event"', "cut off"),
    ],
)
async def test_files_of_another_kind_are_errors(
    databases: Databases, tmp_path: Path, content: bytes, said: str
) -> None:
    """If a file has another kind or version, the error tells so and the database is unchanged."""
    world = await databases.world("sqlite")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ReceiverError, match=said):
        await run_import(world, tmp_path / "file")
    assert await world.rows(events) == []


@pytest.mark.usefixtures("commanded")
async def test_files_that_cannot_be_used_are_named(databases: Databases, tmp_path: Path) -> None:
    """An export does not overwrite a file; if a folder or file is missing, the error names it."""
    world = await databases.world("sqlite")
    (tmp_path / "mine").write_text("precious")
    for file, said in ((tmp_path / "mine", "exists"), (tmp_path / "absent" / "x", "No such")):
        with pytest.raises(ReceiverError, match=f"{file.name} cannot be written: .*{said}"):
            await run_export(world, file)
    assert (tmp_path / "mine").read_text() == "precious"
    with pytest.raises(ReceiverError, match="absent cannot be read: No such file"):
        await run_import(world, tmp_path / "absent")


async def test_events_may_have_very_many_deliveries(pair: tuple[World, World]) -> None:
    """After a hundred replays a page of an export has more rows than a statement may have parameters."""
    here, _ = pair
    await fill(here)
    works = {row["work_id"] for row in await here.rows(attempts)}
    assert works
    async with here.database.read() as connection:
        found = await export_import._read_attempts(
            connection, [*(uuid.uuid4() for _ in range(40_000)), *works]
        )
    assert found.keys() == works


@pytest.mark.usefixtures("commanded")
async def test_an_empty_database_is_exported_and_imported(
    pair: tuple[World, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If an export is empty, the import tells so and succeeds."""
    here, there = pair
    await run_export(here, tmp_path / "empty")
    assert "0 events, 0 jobs, 0 replays exported" in capsys.readouterr().err
    await run_import(there, tmp_path / "empty")
    assert "an empty export" in capsys.readouterr().err
