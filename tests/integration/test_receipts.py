"""The number of receipts per event, and the count of all repeats."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import insert, select
from support.payloads import SECRET, body, failure, signed

from receiver.core.signature import Secret
from receiver.db import inbox, reads
from receiver.db.database import Database
from receiver.db.inbox import KEPT_RECEIPTS
from receiver.db.receipts import all_receipts
from receiver.db.tables import receipts
from receiver.ingest import Ingest, SignedRequest


def open_ingest(database: Database) -> Ingest:
    """Return an ingest, as a web process has it."""
    return Ingest(
        database,
        secrets={"clipia": [Secret.from_text(SECRET)]},
        tolerance=300,
        clock=lambda: 1_800_000_000.0,
        on_accepted=lambda: None,
    )


async def post(ingest: Ingest, content: bytes) -> str:
    """Store a webhook; return its outcome."""
    header = signed(content, at=1_800_000_000)["X-Clipia-Signature"]
    received = await ingest.receive(SignedRequest("clipia", [header.encode()], content))
    return received.outcome


async def rows(database: Database) -> Sequence[Any]:
    """Return all receipts, oldest first."""
    async with database.read() as connection:
        return (await connection.execute(select(all_receipts).order_by(all_receipts.c.seq))).all()


async def test_repetitions_are_kept_up_to_a_limit_and_counted_beyond_it(database: Database) -> None:
    """A13: a webhook that is repeated again and again adds no more rows, but is counted."""
    ingest = open_ingest(database)
    outcomes = [await post(ingest, body("r-1")) for _ in range(KEPT_RECEIPTS + 8)]
    assert outcomes == ["accepted", *["duplicate"] * (KEPT_RECEIPTS + 7)]
    kept = await rows(database)
    assert Counter(row.outcome for row in kept) == {"accepted": 1, "duplicate": KEPT_RECEIPTS}
    assert [row.repeated for row in kept] == [*[0] * KEPT_RECEIPTS, 7]


async def test_a_group_of_repetitions_is_cut_to_the_limit(database: Database) -> None:
    """A13: the limit holds for repeats in one transaction, too; another event has its own."""
    ingest = open_ingest(database)
    await asyncio.gather(post(ingest, body("r-1")), post(ingest, body("r-2")))
    contents = [body("r-1")] * 60 + [body("r-2")] * 3
    assert set(await asyncio.gather(*(post(ingest, each) for each in contents))) == {"duplicate"}
    kept = Counter((row.event_seq, row.outcome) for row in await rows(database))
    assert sorted(kept.values()) == [1, 1, 3, KEPT_RECEIPTS]
    assert sum(row.repeated for row in await rows(database)) == 60 - KEPT_RECEIPTS


async def test_conflicts_keep_a_limited_number_of_bodies(database: Database) -> None:
    """C9: conflicting bodies are stored up to the limit, beside any number of duplicates; then counted."""
    ingest = open_ingest(database)
    await post(ingest, body("r-1"))
    for _ in range(KEPT_RECEIPTS + 2):
        await post(ingest, body("r-1"))
    different = [failure("r-1", f"reason {number}") for number in range(KEPT_RECEIPTS + 3)]
    assert {await post(ingest, each) for each in different} == {"conflict"}
    kept = [row for row in await rows(database) if row.outcome == "conflict"]
    assert [row.body for row in kept] == different[:KEPT_RECEIPTS]
    assert kept[-1].repeated == 3


async def test_processes_that_repeat_at_once_lose_no_count(database_url: str, database: Database) -> None:
    """A13: four writers send two webhooks 50 times each; every request has a row or is counted on one."""
    await asyncio.gather(*(post(open_ingest(database), body(name)) for name in ("r-1", "r-2")))
    writers = [Database(database_url) for _ in range(4)]
    try:
        ingests = [open_ingest(each) for each in writers]
        async with asyncio.timeout(120):
            for _ in range(5):
                await asyncio.gather(
                    *(post(each, body(name)) for name in ("r-1", "r-2") * 10 for each in ingests)
                )
    finally:
        for each in writers:
            await each.close()
    kept = await rows(database)
    assert sum(1 + row.repeated for row in kept) == 2 + 4 * 5 * 2 * 10
    assert len(kept) <= 2 + 2 * KEPT_RECEIPTS * len(writers)


async def test_an_event_is_shown_with_a_limited_number_of_receipts(database: Database) -> None:
    """An older database, with a row for each repeat, shows the first ones, the sum, and pages."""
    await post(open_ingest(database), body("r-1"))
    (first,) = await rows(database)
    values = {name: value for name, value in first._mapping.items() if name not in ("seq", "outcome")}
    async with database.write() as connection:
        await connection.execute(insert(receipts), [values | {"outcome": "duplicate"}] * 119)
        event = await reads.show_event(connection, "r-1")
        assert event is not None
        assert (len(event["receipts"]), event["receipts_total"]) == (reads.SHOWN_RECEIPTS, 120)
        seen: list[int] = []
        after = None
        while page := await reads.list_receipts(connection, first.event_seq, limit=50, after=after):
            seen += [row["seq"] for row in page]
            assert len(seen) <= 120
            after = seen[-1]
        assert seen == sorted({row.seq for row in await connection.execute(select(all_receipts.c.seq))})


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_limit_counts_all_kept_rows(
    database: Database, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The count is on the last row."""
    monkeypatch.setattr(inbox, "KEPT_RECEIPTS", limit)
    ingest = open_ingest(database)
    for _ in range(limit + 5):
        await post(ingest, body("r-1"))
    kept = await rows(database)
    assert [row.repeated for row in kept if row.outcome == "duplicate"] == [*[0] * (limit - 1), 4]
