"""Claims, leases and results, on both databases."""

import asyncio
import time
import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import select, update
from support.events import insert_event, plain

from receiver.db import inbox, leases, outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import Attempt, Claim, DeliveryClaim, NewMedia
from receiver.db.tables import attempts, deliveries, events, media
from receiver.ingest import make_event

LEASE = 60.0


async def add_event(database: Database, request_id: str = "r1") -> int:
    """Store an event as ingest would and return its `seq`."""
    async with database.write() as connection:
        seq = await insert_event(connection, make_event("clipia", plain(request_id), received_at=time.time()))
    assert seq is not None
    return seq


async def add_deliveries(database: Database, count: int, *, due: bool = True) -> None:
    """Add `count` deliveries to the destination `d`, each for an event of its own."""
    for index in range(count):
        seq = await add_event(database, f"r{index}")
        async with database.write() as connection:
            await outbox.insert_deliveries(connection, [(seq, "d")], due=due)


async def claim(database: Database, *, limit: int = 10, lease: float = LEASE) -> list[DeliveryClaim]:
    """Claim deliveries."""
    async with database.write() as connection:
        return await leases.claim_deliveries(connection, "d", limit=limit, lease=lease, replayed=False)


async def test_a_row_is_claimed_once(database: Database) -> None:
    """E9: while a lease holds, no other worker gets the row; the attempt is counted at the claim (E8)."""
    await add_deliveries(database, 1)
    (held,) = await claim(database)
    assert held.attempt == 1
    assert held.lost == 0
    assert await claim(database) == []


async def test_concurrent_claims_share_the_rows(database: Database) -> None:
    """C13: if many workers claim at once, each row is claimed exactly once."""
    await add_deliveries(database, 40)
    claims = await asyncio.gather(*(claim(database, limit=7) for _ in range(8)))
    ids = [held.id for batch in claims for held in batch]
    assert len(ids) == len(set(ids)) == 40


async def test_a_claim_takes_no_more_than_its_limit(database: Database) -> None:
    """C13: the limit holds, and the rows that were due first come first."""
    await add_deliveries(database, 5)
    first = await claim(database, limit=2)
    rest = await claim(database, limit=10)
    assert len(first) == 2
    assert len(rest) == 3


async def test_an_expired_lease_makes_the_row_due_and_counts_a_crash(database: Database) -> None:
    """E8, E9: if a worker crashes, the next one gets its row, and the crash is counted."""
    await add_deliveries(database, 1)
    (first,) = await claim(database, lease=-1)
    (second,) = await claim(database, lease=-1)
    (third,) = await claim(database)
    assert (second.id, second.attempt, second.lost) == (first.id, 2, 1)
    assert (third.attempt, third.lost) == (3, 2)
    assert third.lease != second.lease


async def test_a_result_of_a_lost_lease_is_not_recorded(database: Database) -> None:
    """E10: if a worker sleeps longer than its lease, its result changes no row."""
    await add_deliveries(database, 1)
    (zombie,) = await claim(database, lease=-1)
    (owner,) = await claim(database)
    async with database.write() as connection:
        assert not await leases.finish(connection, deliveries, zombie, state="delivered")
        assert not await leases.retry(connection, deliveries, zombie, delay=0, error="late")
        assert await leases.renew(connection, deliveries, [zombie], lease=LEASE) == set()
        await leases.release(connection, deliveries, [zombie])
    assert await claim(database) == []
    async with database.write() as connection:
        assert await leases.finish(connection, deliveries, owner, state="delivered")
        assert not await leases.finish(connection, deliveries, owner, state="dead")


async def test_a_released_row_is_due_and_its_attempt_not_counted(database: Database) -> None:
    """E16: a shutdown is not a failure."""
    await add_deliveries(database, 1)
    held = await claim(database)
    async with database.write() as connection:
        await leases.release(connection, deliveries, held)
    (again,) = await claim(database)
    assert (again.attempt, again.lost) == (1, 0)


async def test_a_released_row_keeps_its_place(database: Database) -> None:
    """E16: rows that were given back come before the newer ones."""
    await add_deliveries(database, 3)
    first = await claim(database, limit=1)
    async with database.write() as connection:
        await leases.release(connection, deliveries, first)
    assert [held.id for held in await claim(database, limit=1)] == [first[0].id]


async def test_a_retry_waits_for_its_delay(database: Database) -> None:
    """E4: a row that was put back is due after its delay, and a recorded failure is no crash."""
    await add_deliveries(database, 1)
    (held,) = await claim(database)
    async with database.write() as connection:
        assert await leases.retry(connection, deliveries, held, delay=LEASE, error="503")
    assert await claim(database) == []
    async with database.write() as connection:
        await connection.execute(update(deliveries).values(next_attempt_at=db_time(-0.1)))
    (again,) = await claim(database)
    assert (again.attempt, again.lost) == (2, 0)


async def test_renewal_extends_the_lease(database: Database) -> None:
    """E9: work that takes longer than a lease keeps its row."""
    await add_deliveries(database, 1)
    held = await claim(database, lease=0.3)
    async with database.write() as connection:
        assert await leases.renew(connection, deliveries, held, lease=LEASE) == {held[0].id}
    await asyncio.sleep(0.5)
    assert await claim(database) == []


async def test_a_held_delivery_is_not_claimed(database: Database) -> None:
    """A delivery that waits for media is not due before the files are stored."""
    await add_deliveries(database, 1, due=False)
    assert await claim(database) == []


async def test_attempts_are_put_on_record(database: Database) -> None:
    """Each attempt has its number, time, outcome and error on record."""
    attempt = Attempt(
        number=3,
        started_at=datetime.now(UTC),
        duration_ms=12,
        outcome="retry",
        error="503 from the destination",
    )
    work_id = uuid.uuid4()
    async with database.write() as connection:
        await leases.record_attempt(connection, work_id, attempt)
    async with database.read() as connection:
        row = (await connection.execute(select(attempts))).mappings().one()
    assert row["work_id"] == work_id
    assert row["started_at"] == attempt.started_at
    assert (row["number"], row["duration_ms"], row["outcome"]) == (3, 12, "retry")
    assert row["error"] == "503 from the destination"


@pytest.mark.parametrize("files", [2, 8])
async def test_files_that_finish_at_once_release_the_deliveries(database: Database, files: int) -> None:
    """C12: if the last two files finish at the same moment, the held deliveries become due nevertheless."""
    for round_ in range(10):
        seq = await add_event(database, f"race{round_}")
        async with database.write() as connection:
            added = [
                NewMedia(position=index, variant="original", kind="image", url=f"https://x/{index}")
                for index in range(files)
            ]
            await outbox.insert_media(connection, [(seq, file) for file in added])
            await outbox.insert_deliveries(connection, [(seq, "d")], due=False)
            await inbox.set_state(connection, [seq], "fetching")
            claims = await leases.claim_media(connection, limit=files, lease=LEASE)

        async def finish(held: Claim, event_seq: int = seq) -> list[str]:
            async with database.write() as connection:
                assert await leases.finish(connection, media, held, state="stored")
                return list(await outbox.release_held(connection, event_seq))

        released = await asyncio.gather(*(finish(held) for held in claims))
        assert sorted(name for names in released for name in names) == ["d"]
        async with database.read() as connection:
            state = (await connection.execute(select(events.c.state).where(events.c.seq == seq))).scalar_one()
        assert state == "ready"
        assert len(await claim(database)) == 1


async def test_due_times_are_those_of_the_database_clock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E11: a process with a clock that is an hour off neither claims early nor delays work."""
    await add_deliveries(database, 1)
    await claim(database, lease=30)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert await claim(database) == []
