"""Migration 0013 on databases that an earlier release has filled: first receipts move into their events."""

import asyncio
import hashlib
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
from alembic import command
from alembic.script import Script
from sqlalchemy import Connection, LargeBinary, column, insert, select, table, text
from support.commands import command_environment, run_command
from support.payloads import body
from support.servers import PgBouncer, Postgres

from receiver.db import migrate, reads
from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.tables import PlainUuid, UtcDateTime, events, receipts

CAME: Final = datetime(2026, 9, 1, 12, 0, 0, 123456, UTC)
OLD_EVENTS: Final = table(
    "events",
    *(column(name) for name in ("seq", "source", "request_id", "origin", "state", "reason", "status")),
    column("id", PlainUuid),
    column("body", LargeBinary),
    column("body_sha256"),
    column("received_at", UtcDateTime),
)
OLD_RECEIPTS: Final = table(
    "receipts",
    *(column(name) for name in ("seq", "event_seq", "webhook_id", "secret_id", "body_sha256", "outcome")),
    column("signed_at", UtcDateTime),
    column("received_at", UtcDateTime),
    column("body", LargeBinary),
    column("repeated"),
)
OLD_INSERT: Final = """
    WITH arrived AS (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::text[])
            AS arrays (id, request_id, body, body_sha256)
    ),
    new AS (
        INSERT INTO events (id, source, request_id, origin, state, status, body, body_sha256, received_at)
        SELECT id, 'clipia', request_id, 'webhook', 'received', 'OK', body, body_sha256, $5 FROM arrived
        ON CONFLICT DO NOTHING RETURNING seq, id
    ),
    on_record AS (
        INSERT INTO receipts (event_seq, webhook_id, secret_id, signed_at, outcome, received_at, body_sha256)
        SELECT new.seq, request_id, 'one', $5, 'accepted', $5, body_sha256 FROM new JOIN arrived USING (id)
    )
    SELECT id FROM arrived WHERE id NOT IN (SELECT id FROM new)
"""
"""The statement for webhooks of the release before."""
OLD_REPEAT: Final = """
    INSERT INTO receipts (event_seq, secret_id, body_sha256, signed_at, received_at, outcome)
    VALUES ($1, 'one', $2, $3, $3, 'duplicate')
"""

Shown = dict[str, list[dict[str, Any]]]
"""The receipts of each event, by its `request_id`, without their numbers."""


def sha256(content: bytes) -> str:
    """Return a digest as the release before stored it."""
    return hashlib.sha256(content).hexdigest()


# The outcomes of an event's receipts, and columns that are not as usual.
KINDS: Final[dict[str, tuple[list[str], dict[str, Any]]]] = {
    "plain": (["accepted"], {}),
    "repeated": (["accepted", "duplicate", "duplicate"], {}),
    "conflict": (["accepted", "conflict", "duplicate"], {"state": "ready"}),
    "polled": (["duplicate", "conflict"], {"origin": "poll"}),
    "silent": ([], {"origin": "poll"}),
    "unrecognized": (["unrecognized"] * 3, {"state": "unrecognized", "status": None, "reason": "status"}),
    "recovered": (["unrecognized"] * 2, {"state": "ready"}),
    "erased": (["accepted", "duplicate"], {"state": "erased", "body": b""}),
    "merged": (["duplicate", "accepted"], {}),
    "without": ([], {}),
}


def old_rows(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of events and receipts as the release before stored them."""
    made: list[dict[str, Any]] = []
    noted: list[dict[str, Any]] = []
    for number in range(count):
        kind = [*KINDS][number % len(KINDS)]
        outcomes, changes = KINDS[kind]
        name = f"{kind}-{number}"
        moment = CAME + timedelta(seconds=number)
        content = body(name)
        event = {
            "seq": number + 1,
            "id": event_id("clipia", name),
            "source": "clipia",
            "request_id": name,
            "origin": "webhook",
            "state": "received",
            "reason": None,
            "status": "OK",
            "body": content,
            "body_sha256": sha256(content),
            "received_at": moment,
        }
        made.append(event | changes)
        for index, outcome in enumerate(outcomes):
            other = body(name, note=outcome) if outcome == "conflict" else None
            noted.append(
                {
                    "event_seq": number + 1,
                    "webhook_id": None if index else f"hook-{number}",
                    "secret_id": "0123abcd",
                    "signed_at": moment - timedelta(seconds=7),
                    "received_at": moment + timedelta(minutes=index),
                    "body_sha256": sha256(other or content),
                    "outcome": outcome,
                    "body": other,
                }
            )
    return made, noted


async def fill(database: Database, count: int) -> None:
    """Make a database of the schema 0005, with rows."""
    await migrate.upgrade(database, "0005")
    made, noted = old_rows(count)
    async with database.write() as connection:
        for start in range(0, len(made), 1000):
            await connection.execute(insert(OLD_EVENTS), made[start : start + 1000])
        for start in range(0, len(noted), 1000):
            await connection.execute(insert(OLD_RECEIPTS), noted[start : start + 1000])
        await connection.execute(text("INSERT INTO sources (name) VALUES ('clipia')"))
        if not database.is_sqlite:
            await connection.execute(text(f"SELECT setval('events_seq_seq', {count})"))
    await migrate.upgrade(database, "0012")
    async with database.write() as connection:
        # The last receipt of an outcome counts the later ones.
        last = "SELECT max(seq) FROM receipts WHERE outcome = 'duplicate' GROUP BY event_seq"
        await connection.execute(text(f"UPDATE receipts SET repeated = 7 WHERE seq IN ({last})"))


async def shown_before(database: Database) -> Shown:
    """Return the receipts as the release before shows them."""
    joined = (
        select(OLD_RECEIPTS, OLD_EVENTS.c.request_id)
        .join(OLD_EVENTS, OLD_EVENTS.c.seq == OLD_RECEIPTS.c.event_seq)
        .order_by(OLD_RECEIPTS.c.seq)
    )
    found: Shown = {}
    async with database.read() as connection:
        for name in (await connection.execute(select(OLD_EVENTS.c.request_id))).scalars():
            found[name] = []
        for row in (await connection.execute(joined)).mappings():
            values = dict(row)
            name = values.pop("request_id")
            found[name].append({key: values[key] for key in values.keys() - {"seq", "event_seq"}})
    return found


async def shown_now(database: Database, *, every: int = 1) -> Shown:
    """Return the receipts as this release shows them, of some events."""
    found: Shown = {}
    async with database.read() as connection:
        for seq, name in (await connection.execute(select(events.c.seq, events.c.request_id))).all()[::every]:
            rows = await reads.list_receipts(connection, seq, limit=100)
            assert [row["seq"] for row in rows] == sorted({row["seq"] for row in rows})
            found[name] = [{key: value for key, value in row.items() if key != "seq"} for row in rows]
    return found


async def count_moved(database: Database) -> tuple[int, int]:
    """Return the numbers of first receipts in events, and of receipts in their table."""
    async with database.read() as connection:
        firsts = select(events.c.seq).where(events.c.secret_id.is_not(None))
        return (
            len((await connection.execute(firsts)).all()),
            len((await connection.execute(select(receipts.c.seq))).all()),
        )


@pytest.fixture(params=["sqlite", "postgresql", "pgbouncer"])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """A database without tables."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    if request.param != "sqlite":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.url()
    if request.param == "pgbouncer":
        pooler: PgBouncer = request.getfixturevalue("pgbouncer")
        url = pooler.through(url)
    database = Database(url)
    yield database
    await database.close()


async def test_all_receipts_are_shown_as_before(empty: Database) -> None:
    """C15: after the migration each event shows the same receipts, in the same order."""
    count = 60
    await fill(empty, count)
    before = await shown_before(empty)
    assert sum(map(len, before.values())) == count * 1.8
    await migrate.upgrade(empty)
    await migrate.require_current(empty)
    assert await shown_now(empty) == before
    # Of each ten events seven have a first receipt, and of `merged` it is no longer the first one.
    assert await count_moved(empty) == (36, count * 1.8 - 36)
    async with empty.read() as connection:
        digests = (await connection.execute(select(events.c.body_sha256, events.c.request_id))).all()
    for digest, name in digests:
        assert digest == hashlib.sha256(body(name)).digest()


async def test_a_downgrade_gives_all_receipts_back(empty: Database) -> None:
    """C15: a downgrade moves the first receipts back to their table; another upgrade folds none wrongly."""
    await fill(empty, 30)
    before = await shown_before(empty)
    await migrate.upgrade(empty)
    await migrate.apply(empty, lambda config: command.downgrade(config, "0012"))

    def in_any_order(shown: Shown) -> dict[str, list[str]]:
        return {name: sorted(repr(sorted(row.items())) for row in rows) for name, rows in shown.items()}

    assert in_any_order(await shown_before(empty)) == in_any_order(before)
    await migrate.upgrade(empty)
    assert in_any_order(await shown_now(empty)) == in_any_order(before)


class Inserter:
    """A process of the release before: it stores webhooks and repeats of them, one after the other."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stored: list[str] = []
        self.slowest = 0.0

    async def insert(self, connection: Any) -> None:
        """Store a webhook, and a repeat of an event in the database."""
        name = f"new-{uuid.uuid4()}"
        content = body(name)
        began = time.monotonic()
        id_, digest, now = event_id("clipia", name), sha256(content), datetime.now(UTC)
        await connection.fetch(OLD_INSERT, [id_], [name], [content], [digest], now)
        async with connection.transaction():
            seq = await connection.fetchval("SELECT seq FROM events WHERE id = $1 FOR KEY SHARE", id_)
            await connection.execute(OLD_REPEAT, seq, digest, datetime.now(UTC))
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.stored.append(name)

    async def run(self) -> None:
        """Store webhooks until the schema is another one."""
        connection = await asyncpg.connect(self.url)
        try:
            while True:
                await self.insert(connection)
        except asyncpg.SyntaxOrAccessError:
            pass
        finally:
            await connection.close()

    def insert_once(self) -> None:
        """Store one, in a thread of its own."""

        async def once() -> None:
            connection = await asyncpg.connect(self.url, command_timeout=5)
            await self.insert(connection)
            await connection.close()

        asyncio.run(once())


def after_each(step: migrate.Step, action: Callable[[], None]) -> migrate.Step:
    """Return a step that calls `action` before its transaction ends."""

    def run(connection: Connection) -> str | None:
        progress = step(connection)
        action()
        return progress

    return run


def small_pages(script: Script) -> Iterator[migrate.Step]:
    """Return the steps of a migration, which take 20 events at a time."""
    vars(script.module)["PAGE"] = 20
    yield from script.module.STEPS


async def test_webhooks_are_stored_while_it_runs(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15: a process of the release before stores webhooks within each page, and none of them is lost."""
    url = postgres.url()
    database = Database(url)
    await fill(database, 300)
    before = await shown_before(database)
    inserter = Inserter(url)
    called: list[str] = []

    def steps(script: Script) -> list[migrate.Step]:
        def insert_now() -> None:
            called.append("")
            with ThreadPoolExecutor(1) as thread:
                thread.submit(inserter.insert_once).result()

        return [
            # `prepare` and `check` hold a short lock on the tables.
            after_each(step, insert_now) if step.__name__ in ("fold_page", "validate") else step
            for step in small_pages(script)
        ]

    monkeypatch.setattr(
        migrate, "steps_of", lambda script: steps(script) if script.revision == "0013" else ()
    )
    running = asyncio.create_task(inserter.run())
    await migrate.upgrade(database)
    async with asyncio.timeout(20):
        await running
    assert len(called) >= 15
    assert len(inserter.stored) >= len(called)
    found = await shown_now(database)
    assert {name: found[name] for name in before} == before
    new = {name: [row["outcome"] for row in rows] for name, rows in found.items() if name not in before}
    # The last one may be stored without its repeat: the statements are two transactions.
    assert new.keys() >= set(inserter.stored)
    assert all(new[name] == ["accepted", "duplicate"] for name in inserter.stored)
    assert len(new) <= len(inserter.stored) + 1
    assert await count_moved(database) == (180 + len(new), 540 - 180 + len(inserter.stored))
    assert inserter.slowest < 2.5
    await database.close()


async def steps_in_small_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[migrate.Step]:
    """Return the steps of the migration, and have it run these."""
    made: list[migrate.Step] = []

    def steps(script: Script) -> list[migrate.Step]:
        if script.revision != "0013":
            return []
        made[:] = small_pages(script)
        return made

    monkeypatch.setattr(migrate, "steps_of", steps)
    await migrate._scripts_with_steps(database, "head")
    return made


async def test_locked_events_are_converted_later(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15: an event that a worker has locked is not waited for, and its page is repeated until it is free."""
    url = postgres.url()
    database, other = Database(url), Database(url)
    await fill(database, 40)
    before = await shown_before(database)
    made = await steps_in_small_pages(database, monkeypatch)
    await migrate._run_step(database, made[0], before="0012")
    async with other.write() as connection:
        await connection.execute(text("SELECT seq FROM events WHERE seq IN (3, 4) FOR UPDATE"))
        migrating = asyncio.create_task(migrate.upgrade(database))
        deadline = time.monotonic() + 30
        while await unconverted(database) != [3, 4, *range(21, 41)]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert await unconverted(database) == [3, 4, *range(21, 41)]
        assert not migrating.done()
    async with asyncio.timeout(20):
        await migrating
    assert await shown_now(database) == before
    for each in (database, other):
        await each.close()


async def test_events_recognized_while_it_runs_keep_their_outcomes(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C15: if the release before recognizes an event whose receipt was moved, its outcome stays."""
    database = Database(postgres.url())
    await fill(database, 40)
    made = await steps_in_small_pages(database, monkeypatch)
    prepare, fold_page, *_ = made
    await migrate._run_step(database, prepare, before="0012")
    (event, *_), (receipt, *_) = old_rows(1)
    async with database.write() as connection:
        other = {"id": event_id("clipia", "other"), "request_id": "other"}
        unrecognized = {"seq": 41, "state": "unrecognized", "status": None}
        await connection.execute(insert(OLD_EVENTS), [event | other | unrecognized])
        await connection.execute(
            insert(OLD_RECEIPTS), [receipt | {"event_seq": 41, "outcome": "unrecognized"}]
        )
    await migrate._run_step(database, fold_page, before="0012")
    async with database.write() as connection:
        await connection.execute(
            text("UPDATE events SET state = 'ready', status = 'OK' WHERE state = 'unrecognized'")
        )
    await migrate.upgrade(database)
    found = await shown_now(database)
    outcomes = {name: [row["outcome"] for row in rows] for name, rows in found.items()}
    assert outcomes == {"other": ["unrecognized"]} | {
        row["request_id"]: KINDS[row["request_id"].split("-")[0]][0] for row in old_rows(40)[0]
    }
    await database.close()


async def unconverted(database: Database) -> list[int]:
    """Return the events that the migration has yet to convert."""
    async with database.read() as connection:
        found = await connection.execute(text("SELECT seq FROM events WHERE digest IS NULL ORDER BY seq"))
        return [*found.scalars()]


async def test_a_killed_migration_goes_on(postgres: Postgres, tmp_path: Path) -> None:
    """C15: if `receiver migrate` is killed between pages, the next run goes on after the last one."""
    url, count = postgres.url(), 10_000
    database = Database(url)
    await fill(database, count)
    before = await shown_before(database)
    settings = {"RECEIVER_DATABASE_URL": url}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "receiver", "migrate"),
        env=command_environment(**settings),
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 60
    while not (reached := await progress(database)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    process.kill()
    await process.wait()
    assert reached < count
    inserter = Inserter(url)
    await asyncio.to_thread(inserter.insert_once)
    assert await migrate.current(database) == "0012"
    done = run_command("migrate", settings=settings, cwd=tmp_path)
    assert (done.returncode, f"to {migrate.head()}".encode() in done.stdout) == (0, True), done.stderr
    found = await shown_now(database, every=101)
    assert found.items() <= before.items()
    assert await count_moved(database) == (count * 0.6 + 1, count * 1.2 + 1)
    await database.close()


async def progress(database: Database) -> int:
    """Return the last event that the migration has converted; 0 before its first page."""
    async with database.read() as connection:
        if (await connection.execute(text("SELECT to_regclass('fold_progress')"))).scalar_one() is None:
            return 0
        return int((await connection.execute(text("SELECT after FROM fold_progress"))).scalar_one())
