"""Webhooks that are stored in one transaction, on both databases: new ones, repeats and errors."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text
from support.events import insert_event
from support.payloads import SECRET, body, signed
from support.servers import Postgres

from receiver.core.signature import Secret
from receiver.db import inbox, reads
from receiver.db.database import Database
from receiver.db.postgresql import Statements
from receiver.db.receipts import all_receipts
from receiver.db.rows import NewEvent, event_id
from receiver.db.sessions import Sessions
from receiver.db.tables import events
from receiver.errors import DatabaseUnavailable
from receiver.ingest import Ingest, Received, SignedRequest, make_event

NOW = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC).timestamp()


def arrival(content: bytes, **changes: Any) -> NewEvent:
    """Return an event as ingest makes it."""
    return make_event(
        "clipia", content, received_at=NOW, webhook_id="wh-1", secret_id="0123abcd", signed_at=NOW - 7
    )._replace(**changes)


def make_ingest(database: Database) -> Ingest:
    """Return an ingest with one source."""
    return Ingest(
        database,
        secrets={"clipia": [Secret.from_text(SECRET)]},
        tolerance=300,
        clock=time.time,
        on_accepted=lambda: None,
    )


async def deliver(ingest: Ingest, contents: Sequence[bytes]) -> list[Received | BaseException]:
    """Send bodies concurrently; the first is a group of its own, and the others share the next."""
    return await asyncio.gather(
        *(
            ingest.receive(SignedRequest("clipia", [signed(content)["X-Clipia-Signature"].encode()], content))
            for content in contents
        ),
        return_exceptions=True,
    )


def outcomes(results: Sequence[Received | BaseException]) -> list[str]:
    """Return the outcomes by name."""
    return [each.outcome if isinstance(each, Received) else type(each).__name__ for each in results]


async def count(database: Database) -> tuple[int, int]:
    """Return the numbers of events and receipts."""
    async with database.read() as connection:
        found = [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (events, all_receipts)
        ]
    return found[0], found[1]


async def test_a_group_is_one_transaction(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """All waiting webhooks are inserted by one call, each with its receipt."""
    groups: list[int] = []
    insert = Database.insert_arrivals

    async def counted(one: Database, group: Sequence[NewEvent]) -> Any:
        groups.append(len(group))
        return await insert(one, group)

    monkeypatch.setattr(Database, "insert_arrivals", counted)
    names = [f"r-{number}" for number in range(50)]
    results = await deliver(make_ingest(database), [body(name) for name in names])
    assert outcomes(results) == ["accepted"] * 50
    assert sum(groups) == 50
    async with database.read() as connection:
        for name in names:
            shown = await reads.show_event(connection, name)
            assert shown is not None
            assert [receipt["outcome"] for receipt in shown["receipts"]] == ["accepted"]
    assert len(groups) <= 2
    assert await count(database) == (50, 50)


async def test_the_same_event_twice_in_a_group(database: Database) -> None:
    """C6: of equal webhooks in one group one is new; if the bodies differ, the first is stored."""
    other = body("r-1", payload={"model": "another"})
    strange = b"not json"
    results = await deliver(
        make_ingest(database), [body("r-0"), body("r-1"), body("r-1"), other, strange, strange]
    )
    assert outcomes(results) == [
        *("accepted", "accepted", "duplicate", "conflict"),
        *("unrecognized", "unrecognized"),
    ]
    assert await count(database) == (3, 6)
    async with database.read() as connection:
        kept = await connection.execute(select(all_receipts.c.outcome, all_receipts.c.body))
        found = [tuple(row) for row in kept]
        stored = await connection.execute(select(events.c.body).where(events.c.request_id == "r-1"))
        assert stored.scalar_one() == body("r-1")
    assert Counter(found) == Counter(
        {
            ("accepted", None): 2,
            ("duplicate", None): 1,
            ("conflict", other): 1,
            ("unrecognized", None): 2,
        }
    )


async def test_a_bad_row_fails_alone(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the database refuses a row, its webhook is not acked; the rest of the group is stored and acked."""
    good, insert = "gut", Database.insert_arrivals

    async def spoiled(one: Database, group: Sequence[NewEvent]) -> Any:
        return await insert(
            one,
            [
                each._replace(state=None)  # type: ignore[arg-type]  # an invalid value on purpose
                if each.request_id == "bad"
                else each
                for each in group
            ],
        )

    monkeypatch.setattr(Database, "insert_arrivals", spoiled)
    results = await deliver(make_ingest(database), [body(each) for each in (good, "r-1", "bad", "r-2")])
    assert [each == "accepted" for each in outcomes(results)] == [True, True, False, True]
    assert await count(database) == (3, 3)


async def test_one_that_vanishes_fails_alone(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an event is pruned before its repeat is recorded, only that webhook must be sent again."""
    ingest = make_ingest(database)
    names = ("r-1", "r-2", "r-3")
    assert outcomes(await deliver(ingest, [body(each) for each in names])) == ["accepted"] * 3
    find = inbox.find_events

    async def pruned(*arguments: Any) -> dict[UUID, inbox.KnownEvent]:
        found = await find(*arguments)
        found.pop(event_id("clipia", "r-2"), None)
        return found

    monkeypatch.setattr(inbox, "find_events", pruned)
    results = await deliver(ingest, [body(each) for each in names])
    assert outcomes(results) == ["duplicate", "DatabaseUnavailable", "duplicate"]
    assert await count(database) == (3, 5)


async def test_one_that_is_gone_is_new_again(database: Database) -> None:
    """An event that was stored for an earlier group may be pruned; the next group inserts it again."""
    one = arrival(body("r-1"))
    assert await database.insert_arrivals([one]) == set()
    assert await database.insert_arrivals([one, arrival(body("r-2"))]) == {one.raw_id}
    async with database.write() as connection:
        await connection.execute(text("DELETE FROM receipts"))
        await connection.execute(text("DELETE FROM events"))
    assert await database.insert_arrivals([one]) == set()
    assert await count(database) == (1, 1)


async def test_rows_are_written_as_by_sqlalchemy(database: Database) -> None:
    """The raw statement writes the same values as the types of the tables."""
    content = body("r-1")
    short = arrival(content, job_id=uuid4())
    await database.insert_arrivals([short])
    columns = ", ".join(column.name for column in events.c if column.name != "seq")
    async with database.write() as connection:
        one = (await connection.execute(text(f"SELECT {columns} FROM events"))).one()
        await connection.execute(text("DELETE FROM events"))
        await insert_event(connection, short)
        other = (await connection.execute(text(f"SELECT {columns} FROM events"))).one()
    assert tuple(one) == tuple(other)


@pytest.fixture
async def on_postgresql(postgres: Postgres) -> AsyncIterator[Database]:
    """A fresh PostgreSQL database."""
    opened = Database(postgres.url(template="migrated"))
    yield opened
    await opened.close()


async def test_groups_that_overlap_do_not_deadlock(on_postgresql: Database) -> None:
    """C6: two processes may insert the same events in opposite orders at the same time."""
    database = on_postgresql
    other = Database(database.url)
    group = sorted((arrival(body(f"r-{number}")) for number in range(41)), key=lambda each: each.raw_id)
    with contextlib.suppress(asyncio.CancelledError):
        async with database.write() as connection:
            # In either order both reach this event after half of theirs, and wait.
            await insert_event(connection, group[20])
            one = asyncio.create_task(database.insert_arrivals(group))
            two = asyncio.create_task(other.insert_arrivals(group[::-1]))
            await asyncio.sleep(0.3)
            raise asyncio.CancelledError
    known = await asyncio.gather(one, two)
    assert sorted(map(len, known)) == [0, 41]
    await other.close()
    assert await count(database) == (41, 41)


async def test_too_long_is_an_error_and_not_cut(on_postgresql: Database) -> None:
    """A value that is too long for its column is an error on PostgreSQL; SQLite's columns have no length."""
    database = on_postgresql
    with pytest.raises(Exception, match="too long"):
        await database.insert_arrivals([arrival(body("r-1"), request_id="x" * 256)])
    assert await count(database) == (0, 0)
    assert not await database.insert_arrivals([arrival(body("r-2"))])


async def test_a_mistake_of_ours_is_no_outage(
    on_postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error other than the database's is raised as it is, and only for its own webhook."""
    database, fetch = on_postgresql, Statements.fetch

    async def spoiled(one: Statements, statement: str, arguments: Any) -> list[Any]:
        mistake: Any = None
        is_bad = len(arguments) > 8 and "bad" in arguments[8]
        return await fetch(one, statement, mistake if is_bad else arguments)

    monkeypatch.setattr(Statements, "fetch", spoiled)
    results = await deliver(make_ingest(database), [body(each) for each in ("r-0", "r-1", "bad", "r-2")])
    assert [each == "accepted" for each in outcomes(results)] == [True, True, False, True]
    assert isinstance(results[2], TypeError)
    assert await count(database) == (3, 3)


@contextlib.asynccontextmanager
async def between(port: int) -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """Proxy a server: yield a port, and the clients that have connected to it."""
    clients: list[asyncio.StreamWriter] = []
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def meet(reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection("127.0.0.1", port)
        clients.append(client)
        pumps.extend([asyncio.create_task(pump(reader, server)), asyncio.create_task(pump(answers, client))])

    listener = await asyncio.start_server(meet, "127.0.0.1", 0)
    yield listener.sockets[0].getsockname()[1], clients
    listener.close()
    for task in pumps:
        task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)


def fatal() -> bytes:
    """Return PostgreSQL's message before it ends a connection."""
    fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


@pytest.mark.parametrize("way", ["statement", "transaction"])
async def test_a_connection_that_is_about_to_end(postgres: Postgres, way: str) -> None:
    """C3: if the server ends the sessions at that moment, the first statement runs in a new session."""
    url = postgres.url(template="migrated")
    async with between(postgres.port) as (port, clients):
        database = Database(url.replace(f":{postgres.port}/", f":{port}/"))
        assert not await database.insert_arrivals([arrival(body("r-1"))])
        async with database.read() as connection:
            await connection.execute(select(events.c.id))
        for client in clients:
            client.write(fatal())
        await asyncio.sleep(0.1)
        if way == "statement":
            assert not await database.insert_arrivals([arrival(body("r-2"))])
        else:
            async with database.write() as connection:
                await insert_event(connection, arrival(body("r-2")))
        async with database.read() as connection:
            assert len((await connection.execute(select(events.c.id))).all()) == 2
        await database.close()


async def test_a_connection_that_has_ended(on_postgresql: Database) -> None:
    """C3: a restart between two webhooks fails neither of them."""
    database = on_postgresql
    assert not await database.insert_arrivals([arrival(body("r-1"))])
    async with database.write() as connection:
        await connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND datname = current_database()"
            )
        )
    await asyncio.sleep(0.5)
    assert not await database.insert_arrivals([arrival(body("r-2"))])


async def test_sessions_that_are_lost_again_and_again(
    on_postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3: if each new session is lost, the database is unavailable, and the retries end."""
    monkeypatch.setattr(Sessions, "is_current", lambda _sessions, _info: False)
    for transaction in (on_postgresql.read, on_postgresql.write):
        with pytest.raises(DatabaseUnavailable):
            await transaction().__aenter__()
    with pytest.raises(DatabaseUnavailable):
        await on_postgresql.insert_arrivals([arrival(body("r-1"))])
