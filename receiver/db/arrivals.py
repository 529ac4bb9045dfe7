"""SQL of the hot path: a group of inbound deliveries becomes events and receipts in one statement.

Its values go to the driver as they are: SQLAlchemy's handling of each of them takes as long as SQLite itself.
On PostgreSQL there is an array for each column, so that the statement is parsed and planned once, whatever
the size of the group.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from itertools import chain
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

    The arrivals are of different events. They are inserted in one order by every process: two that insert the
    same events at once would else wait for each other in a circle.

    One statement decides who was first, because a SELECT before it would let two deliveries both find
    nothing. An insert that meets the uncommitted row of another transaction waits for it: the event is not
    new after that commit, and new after its rollback.

    Raises DatabaseUnavailable.
    """
    arrivals = sorted(arrivals, key=lambda arrival: arrival.event.id.int)
    if database.is_sqlite:
        return await database.run_with_driver(partial(_insert_rows, _in_rows(arrivals)))
    rows = await database.fetch(_INSERT, _in_columns(arrivals))
    return {row["id"] for row in rows}


async def probe(database: Database) -> None:
    """Insert an event as webhooks are inserted, roll that back, and commit a row of another table.

    The insert shows whether a webhook could be stored now, the commit whether a commit succeeds. Raises
    DatabaseUnavailable, and what `insert_new` raises.
    """
    now = datetime.now(UTC)
    # Each has names of its own: it waits for no other process that probes or hangs while it does.
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
    """Return SQLite's values: the rows of `_VIEW`, one after the other."""
    return [_sqlite_value(value) for arrival in arrivals for value in _in_view(arrival)]


def _in_columns(arrivals: Sequence[Arrival]) -> tuple[Any, ...]:
    """Return PostgreSQL's values: one sequence for each field."""
    of_event = zip(*(arrival.event for arrival in arrivals), strict=True)
    _, *of_receipt = zip(*arrivals, strict=True)
    return (*of_event, *of_receipt, tuple(arrival.event.first_outcome for arrival in arrivals))


_COMMIT: Final = """
    INSERT INTO probes (name, at) VALUES ('write', {}) ON CONFLICT (name) DO UPDATE SET at = excluded.at
"""


def _insert_columns() -> str:
    """Return PostgreSQL's statement; its parameters are an array for each field, in their order."""
    fields = {name: events.c[name] for name in _OF_EVENT}
    fields |= {name: receipts.c[name] for name in (*_OF_RECEIPT, "outcome")}
    dialect = postgresql.dialect()
    arrays = [
        # A cast to a text of limited length would cut what is longer, where an insert refuses it.
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
    """Do what `probe` does on SQLite."""
    _known_ids(connection)  # before the transaction, which would take the view along when it is rolled back
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    try:
        _insert_rows(values, connection)
    finally:
        cursor.execute("ROLLBACK")
    cursor.execute(_COMMIT.format("?"), (_sqlite_value(datetime.now(UTC)),))


def _known_ids(connection: PoolProxiedConnection) -> list[str]:
    known = connection.info.get(_VIEW)
    if known is None:
        known = connection.info[_VIEW] = _make_view(connection)
    found: list[str] = known
    return found


def _insert_rows(values: Sequence[Any], connection: PoolProxiedConnection) -> set[UUID]:
    """Insert on SQLite; `values` are those of the rows of `_VIEW`, one after the other."""
    known = _known_ids(connection)
    known.clear()
    rows = len(values) // len(_IN_VIEW)
    # SQLite has to parse few different statements when their sizes are powers of two.
    size = 1 << (rows - 1).bit_length()
    padding = [None] * ((size - rows) * len(_IN_VIEW))
    connection.cursor().execute(_insert_into_view(size), [*values, *padding])
    return {UUID(id_) for id_ in known}


def _make_view(connection: PoolProxiedConnection) -> list[str]:
    """Make a view of this connection's that takes arrivals; return the list that gets the ids of known ones.

    With a trigger on a view a group is one statement, which is a transaction by itself. The thread leaves the
    interpreter to the event loop while a statement runs, and may wait longer than that to get it back: a busy
    loop lets go of it only for moments, too short to wake up in.
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
    # A statement with triggers keeps its rows in a temporary table first, and not everybody has a /tmp.
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


def _in_view(arrival: Arrival) -> Iterator[Any]:
    event, *of_receipt = arrival
    return chain(event, of_receipt, (event.first_outcome,))


@cache
def _insert_into_view(rows: int) -> str:
    row = f"({', '.join('?' * len(_IN_VIEW))})"
    return f"INSERT INTO {_VIEW} VALUES {', '.join([row] * rows)}"


def _sqlite_value(value: Any) -> Any:
    """Return a value in the form in which the tables' types write it to SQLite."""
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    return value
