"""SQL for presence: each worker process renews its row every few seconds."""

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import delete, select

from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.statements import insert_for
from receiver.db.tables import workers

RENEW_SECONDS: Final = 5.0
"""Seconds after which a process renews its row."""
FRESH_SECONDS: Final = 30.0
"""A process counts as running for this time after its last renewal."""
KEPT_SECONDS: Final = 3600.0
"""After this time other processes delete the row of a process that crashed."""


@dataclass(frozen=True, kw_only=True)
class WorkerRun:
    """One run of a worker process."""

    id: uuid.UUID
    host: str
    pid: int
    lanes: list[str]
    """Names of its lanes: `fanout`, `media`, `submit`, `poll`, `replay`, `destination:<name>`."""
    account: str | None
    """The Clipia account that it submits to and polls; None without CLIPIA_KEY."""


@dataclass(frozen=True, kw_only=True)
class SeenWorker(WorkerRun):
    """A run on record."""

    age: float
    """Seconds since its last renewal, by the database's clock."""

    @property
    def is_running(self) -> bool:
        """Whether its last renewal is recent."""
        return self.age < FRESH_SECONDS

    @property
    def process_name(self) -> str:
        """The process in words."""
        return f"process {self.pid} on {self.host}"


async def renew(connection: SqlConnection, run: WorkerRun) -> None:
    """Record that a process is running now."""
    new = insert_for(connection.dialect.name, workers)
    statement = new.values(**asdict(run), started_at=db_time(0.0), seen_at=db_time(0.0))
    changed = {name: statement.excluded[name] for name in ("lanes", "seen_at")}
    await connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changed))


async def delete_stale(connection: SqlConnection) -> None:
    """Delete the rows of processes that have not renewed them for `KEPT_SECONDS`."""
    await connection.execute(delete(workers).where(workers.c.seen_at < db_time(-KEPT_SECONDS)))


async def remove(connection: SqlConnection, run_id: uuid.UUID) -> None:
    """Record that a process has stopped."""
    await connection.execute(delete(workers).where(workers.c.id == run_id))


async def find_runs(connection: SqlConnection) -> Sequence[SeenWorker]:
    """Return the processes that run or crashed lately, the latest renewal first."""
    columns = [workers.c[name] for name in WorkerRun.__dataclass_fields__]
    age = seconds_since(workers.c.seen_at).label("age")
    rows = (await connection.execute(select(*columns, age).order_by(age))).mappings()
    return [SeenWorker(**row) for row in rows]
