"""SQL for the hot path: one statement turns a group of requests into events and receipts.

The values go to the driver directly, because SQLAlchemy's processing of each value takes as long as SQLite
itself. On PostgreSQL each column is an array parameter, so the statement is planned once for groups of any
size.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import PoolProxiedConnection, String
from sqlalchemy.dialects import postgresql

from receiver.db.database import Database
from receiver.db.rows import Arrival, NewEvent, event_id
from receiver.db.tables import events, receipts

_OF_EVENT: Final = NewEvent._fields
_OF_RECEIPT: Final = Arrival._fields[1:]
_IN_RECEIPT: Final = (*_OF_RECEIPT, "outcome", "received_at", "body_sha256")
_VIEW: Final = "arriving"
_IN_VIEW: Final = (*_OF_EVENT, *_OF_RECEIPT, "outcome")


async def insert_new(database: Database, arrivals: Sequence[Arrival]) -> set[UUID]:
    """Insert the events that are new, each with its first receipt; return the ids of the others.

    No two arrivals may be of one event. They are sorted, because two processes that insert the same events
    in different orders would deadlock.

    The INSERT itself finds the duplicates: with a SELECT before it, two transactions could both find no row.
    An INSERT that meets the uncommitted row of another transaction waits for it. After a commit the event is
    known, and after a rollback it is new.

    Raises DatabaseUnavailable.
    """
    arrivals = sorted(arrivals, key=lambda arrival: arrival.event.id.int)
    if database.is_sqlite:
        return await database.run_with_driver(partial(_insert_rows, _in_rows(arrivals)))
    rows = await database.fetch(_INSERT, _in_columns(arrivals))
    return {row["id"] for row in rows}


async def probe(database: Database) -> None:
    """Insert an event as `insert_new` does, roll back, and commit a row of another table.

    The INSERT tests whether a webhook can be stored now, and the other row tests the commit. Raises
    DatabaseUnavailable.
    """
    now = datetime.now(UTC)
    # A unique name: the INSERT does not wait for the uncommitted row of another process's probe.
    name = f"probe-{uuid4().hex}"
    event = NewEvent(
        id=event_id(name, name),
        source=name,
        request_id=name,
        origin="webhook",
        state="received",
        body=b"{}",
        body_sha256="0" * 64,
        received_at=now,
    )
    arrival = Arrival(event, None, "probe", now)
    if database.is_sqlite:
        await database.run_with_driver(partial(_try_rows, _in_rows([arrival])))
    else:
        await database.fetch(_INSERT, _in_columns([arrival]), keep=False)
        await database.fetch(_COMMIT.format("now()"), ())


def _in_rows(arrivals: Sequence[Arrival]) -> list[Any]:
    """Return the values for SQLite: the rows of `_VIEW`, one after the other."""
    return [
        _sqlite_value(value)
        for arrival in arrivals
        for value in (*arrival.event, *arrival[1:], arrival.event.first_outcome)
    ]


def _in_columns(arrivals: Sequence[Arrival]) -> tuple[Any, ...]:
    """Return the values for PostgreSQL: one sequence for each field."""
    of_event = zip(*(arrival.event for arrival in arrivals), strict=True)
    _, *of_receipt = zip(*arrivals, strict=True)
    return (*of_event, *of_receipt, tuple(arrival.event.first_outcome for arrival in arrivals))


_COMMIT: Final = """
    INSERT INTO probes (name, at) VALUES ('write', {}) ON CONFLICT (name) DO UPDATE SET at = excluded.at
"""


def _insert_columns() -> str:
    """Return the statement for PostgreSQL; its parameters are one array for each field."""
    fields = {name: events.c[name] for name in _OF_EVENT}
    fields |= {name: receipts.c[name] for name in (*_OF_RECEIPT, "outcome")}
    dialect = postgresql.dialect()
    arrays = [
        # A cast to VARCHAR(n) would truncate a longer text; the INSERT raises an error instead.
        f"${number}::{'text' if isinstance(column.type, String) else column.type.compile(dialect)}[]"
        for number, column in enumerate(fields.values(), 1)
    ]
    return f"""
        WITH arrived AS (SELECT * FROM unnest({", ".join(arrays)}) AS arrays ({", ".join(fields)})),
        new AS (
            INSERT INTO events ({", ".join(_OF_EVENT)}) SELECT {", ".join(_OF_EVENT)} FROM arrived
            ON CONFLICT DO NOTHING RETURNING seq, id
        ),
        on_record AS (
            INSERT INTO receipts (event_seq, {", ".join(_IN_RECEIPT)})
            SELECT new.seq, {", ".join(_IN_RECEIPT)} FROM new JOIN arrived USING (id)
        ),
        remembered AS (
            INSERT INTO sources (name) SELECT DISTINCT source FROM arrived ORDER BY 1 ON CONFLICT DO NOTHING
        )
        SELECT id FROM arrived WHERE id NOT IN (SELECT id FROM new)
    """


_INSERT: Final = _insert_columns()


def _try_rows(values: Sequence[Any], connection: PoolProxiedConnection) -> None:
    """Insert and roll back, and commit a row of another table, as `probe` does."""
    _known_ids(connection)  # before the transaction, because the rollback would remove the view
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    try:
        _insert_rows(values, connection)
    finally:
        cursor.execute("ROLLBACK")
    cursor.execute(_COMMIT.format("?"), (_sqlite_value(datetime.now(UTC)),))


def _known_ids(connection: PoolProxiedConnection) -> list[str]:
    if _VIEW not in connection.info:
        connection.info[_VIEW] = _make_view(connection)
    known: list[str] = connection.info[_VIEW]
    return known


def _insert_rows(values: Sequence[Any], connection: PoolProxiedConnection) -> set[UUID]:
    """Insert on SQLite; `values` are the rows of `_VIEW`, one after the other."""
    known = _known_ids(connection)
    known.clear()
    rows = len(values) // len(_IN_VIEW)
    # Padded to a power of two, so that SQLite parses few different statements.
    size = 1 << (rows - 1).bit_length()
    padding = [None] * ((size - rows) * len(_IN_VIEW))
    connection.cursor().execute(_insert_into_view(size), [*values, *padding])
    return {UUID(id_) for id_ in known}


def _make_view(connection: PoolProxiedConnection) -> list[str]:
    """Create the temporary view that takes arrivals; return the list that gets the ids of known events.

    A trigger on the view writes all tables, so a group is one statement and one transaction. Several
    statements would be simpler. But the thread releases the GIL during each statement, and a busy event loop
    gives it back so briefly that each further statement waits longer for the GIL than it runs.
    """
    known: list[str] = []
    driver: Any = connection.driver_connection
    driver.create_function("is_known", 1, known.append)
    for statement in _MAKE_VIEW:
        driver.execute(statement)
    return known


def _new(names: Sequence[str]) -> str:
    return ", ".join(f"NEW.{name}" for name in names)


_MAKE_VIEW: Final = (
    # SQLite first copies the rows of a statement with triggers to a temporary table; /tmp may be read-only.
    "PRAGMA temp_store=MEMORY",
    f"CREATE TEMP VIEW IF NOT EXISTS {_VIEW} AS SELECT {', '.join(f'NULL AS {name}' for name in _IN_VIEW)}",
    f"""
    CREATE TEMP TRIGGER IF NOT EXISTS {_VIEW}_insert INSTEAD OF INSERT ON {_VIEW}
    WHEN NEW.id IS NOT NULL BEGIN
        INSERT INTO events ({", ".join(_OF_EVENT)}) VALUES ({_new(_OF_EVENT)}) ON CONFLICT DO NOTHING;
        SELECT is_known(NEW.id) WHERE changes() = 0;
        INSERT INTO receipts (event_seq, {", ".join(_IN_RECEIPT)})
            SELECT last_insert_rowid(), {_new(_IN_RECEIPT)} WHERE changes() > 0;
        INSERT INTO sources (name) VALUES (NEW.source) ON CONFLICT DO NOTHING;
    END
    """,
)


@cache
def _insert_into_view(rows: int) -> str:
    row = f"({', '.join('?' * len(_IN_VIEW))})"
    return f"INSERT INTO {_VIEW} VALUES {', '.join([row] * rows)}"


def _sqlite_value(value: Any) -> Any:
    """Return a value as the column types of the tables write it to SQLite."""
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    return value
