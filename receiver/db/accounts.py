"""SQL for the quota of a Clipia account, which all processes share."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from sqlalchemy import select, update

from receiver.core.quota import Quota, RateHeaders
from receiver.db.clock import unix_time
from receiver.db.connection import SqlConnection
from receiver.db.statements import insert_for
from receiver.db.tables import accounts

_QUOTA: Final = [column for column in accounts.c if column.name != "id"]


async def lock(connection: SqlConnection, account: str) -> tuple[Quota, float]:
    """Return the quota of an account, locked until the transaction ends, and the current time.

    Lock it last: to avoid deadlocks, a transaction that holds this lock waits for no other row.
    """
    statement = select(*_QUOTA, unix_time().label("now")).where(accounts.c.id == account).with_for_update()
    row = (await connection.execute(statement)).mappings().one_or_none()
    if row is None:
        values = {"id": account} | asdict(Quota())
        new = insert_for(connection.dialect.name, accounts).values(**values).on_conflict_do_nothing()
        await connection.execute(new)
        row = (await connection.execute(statement)).mappings().one()
    found = dict(row)
    now = found.pop("now")
    return Quota(**found), now


async def save(connection: SqlConnection, account: str, quota: Quota) -> None:
    """Store the quota of a locked account."""
    await connection.execute(update(accounts).where(accounts.c.id == account).values(**asdict(quota)))


async def learn(
    connection: SqlConnection,
    account: str,
    headers: RateHeaders,
    change: Callable[[Quota, float], Quota] = lambda quota, _now: quota,
) -> None:
    """Update the quota of an account after an answer: from its headers, and then with `change`."""
    quota, now = await lock(connection, account)
    learned = change(quota.after_headers(headers, now), now)
    if learned != quota:
        await save(connection, account, learned)


async def read(connection: SqlConnection, account: str) -> Quota:
    """Return the quota of an account without a lock, for display and metrics."""
    found = await connection.execute(select(*_QUOTA).where(accounts.c.id == account))
    row = found.mappings().one_or_none()
    return Quota() if row is None else Quota(**row)
