"""The two ways of opening a transaction that writes do the same, on both databases."""

import asyncio
import contextlib
from functools import partial
from itertools import pairwise

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import probes


async def count(database: Database) -> int:
    """Return how many rows are committed."""
    async with database.read() as connection:
        return int((await connection.execute(select(func.count()).select_from(probes))).scalar_one())


async def add(connection: AsyncConnection, name: str = "one") -> str:
    """Add a row; a name can be taken once."""
    await connection.execute(insert(probes).values(name=name, at=db_time(0.0)))
    return name


async def test_what_was_done_at_once_is_there(database: Database) -> None:
    """The transaction is committed when the result is returned."""
    assert await database.run_transaction(add) == "one"
    assert await count(database) == 1


async def test_what_fails_leaves_nothing(database: Database) -> None:
    """A transaction that raises is rolled back whole, and the error comes through as it is."""

    async def twice(connection: AsyncConnection) -> None:
        await add(connection, "two")
        await add(connection, "two")

    with pytest.raises(IntegrityError):
        await database.run_transaction(twice)
    assert await count(database) == 0
    await database.run_transaction(add)
    assert await count(database) == 1


async def test_a_part_may_fail(database: Database) -> None:
    """What is done in a savepoint is undone by itself."""

    async def work(connection: AsyncConnection) -> None:
        await add(connection, "kept")
        with contextlib.suppress(ZeroDivisionError):
            async with connection.begin_nested():
                await add(connection, "undone")
                raise ZeroDivisionError

    await database.run_transaction(work)
    assert await count(database) == 1


async def test_both_ways_keep_out_of_each_other_on_sqlite(database: Database) -> None:
    """C14: many of both at once: each sees what those before it have committed, and none is refused."""
    if not database.is_sqlite:
        return

    async def add_next(connection: AsyncConnection) -> None:
        number = (await connection.execute(select(func.count()).select_from(probes))).scalar_one()
        await add(connection, str(number))

    async def at_once() -> None:
        await database.run_transaction(add_next)

    async def step_by_step() -> None:
        async with database.write() as connection:
            await add_next(connection)

    await asyncio.gather(*(way() for _ in range(50) for way in (at_once, step_by_step)))
    assert await count(database) == 100


async def test_nothing_but_the_connection_is_waited_for_on_sqlite(database: Database) -> None:
    """The thread of SQLite has no event loop: what would want one is told so, and nothing is committed."""
    if not database.is_sqlite:
        return

    async def wait(connection: AsyncConnection) -> None:
        await add(connection)
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="an object other than its connection"):
        await database.run_transaction(wait)
    assert await count(database) == 0
    await database.run_transaction(add)


async def test_a_webhook_waits_for_one_other_on_sqlite(database: Database) -> None:
    """C13: the worker's transactions do not line up before it; and webhooks do not keep them out for ever."""
    if not database.is_sqlite:
        return
    order: list[str] = []

    async def work(connection: AsyncConnection, name: str) -> None:
        await connection.execute(select(1))
        order.append(name)

    async def others() -> None:
        await asyncio.gather(*(database.run_transaction(partial(work, name="other")) for _ in range(5)))

    async def webhooks() -> None:
        for _ in range(5):
            await database.run_transaction(partial(work, name="webhook"), is_webhook=True)

    await asyncio.gather(others(), webhooks())
    assert len(order) == 10
    assert all(one != other for one, other in pairwise(order))
