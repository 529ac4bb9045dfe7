"""What this service needs of a database: confirmed commits are durable, and any text can be stored."""

from collections.abc import Callable, Collection
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.database import Database
from receiver.db.tables import metadata
from receiver.db.version import VERSION_TABLE
from receiver.errors import SettingsError

_STORAGE: Final = ("fsync", "full_page_writes")
"""Settings that some storage does without: it confirms a write once it is durable, and never tears a page."""
_RIGHTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")


async def require_usable(database: Database, *, durable_without: Collection[str] = ()) -> None:
    """Raise SettingsError if the database would lose commits that it has confirmed, or not take every text.

    `durable_without` names settings of PostgreSQL that may be off. Raises DatabaseUnavailable.
    """
    async with database.read() as connection:
        if database.is_sqlite:
            await _require_durable_sqlite(connection)
        else:
            await _require_usable_postgresql(connection, durable_without)


async def _require_usable_postgresql(connection: AsyncConnection, durable_without: Collection[str]) -> None:
    names = (*_STORAGE, "synchronous_commit", "server_encoding")
    # One statement, because a readiness probe asks, too.
    query = ", ".join(f"current_setting('{name}')" for name in names)
    row = (await connection.execute(text(f"SELECT {query}"))).one()
    values = dict(zip(names, row, strict=True))
    if values["server_encoding"] != "UTF8":
        raise SettingsError(
            f"the database's encoding is {values['server_encoding']}, which cannot hold every text: create "
            "one with CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0, and name it in "
            "RECEIVER_DATABASE_URL"
        )
    # Every value of synchronous_commit but `off` flushes here before it confirms.
    if values["synchronous_commit"] == "off":
        raise SettingsError(
            "PostgreSQL runs with synchronous_commit = off: it would confirm events that a crash then loses. "
            "Set synchronous_commit = on, such as with ALTER ROLE name SET synchronous_commit = on, and "
            "connect anew."
        )
    off = [name for name in _STORAGE if values[name] == "off" and name not in durable_without]
    if off:
        raise SettingsError(
            f"PostgreSQL runs with {' and '.join(f'{name} = off' for name in off)}: it would confirm events "
            f"that a power cut then loses. Set {' and '.join(f'{name} = on' for name in off)} in "
            "postgresql.conf and reload. If the storage is durable without, which is for the provider of a "
            f"hosted database to say, set RECEIVER_DURABLE_WITHOUT={','.join((*durable_without, *off))}."
        )


async def require_rights(database: Database) -> None:
    """Raise SettingsError if the user lacks a right on a table or a sequence of the service's.

    Raises DatabaseUnavailable. SQLite knows no rights.
    """
    if database.is_sqlite:
        return
    async with database.read() as connection:
        given = {
            "tables": [*metadata.tables, VERSION_TABLE],
            "rights": list(_RIGHTS),
            "read_only": VERSION_TABLE,
        }
        missing = list((await connection.execute(_MISSING_RIGHTS, given)).scalars())
        user, schema = (await connection.execute(text("SELECT current_user, current_schema()"))).one()
    if missing:
        raise SettingsError(
            f"the database's user lacks rights: {', '.join(missing)}. As the owner of the tables, run "
            f"GRANT {', '.join(_RIGHTS)} ON ALL TABLES IN SCHEMA {schema} TO {user}; "
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {user};"
        )


_MISSING_RIGHTS: Final = text("""
    SELECT wanted || ' on ' || name
    FROM unnest(CAST(:tables AS text[])) AS name, unnest(CAST(:rights AS text[])) AS wanted
    WHERE NOT has_table_privilege(to_regclass(name), wanted) AND (name <> :read_only OR wanted = 'SELECT')
    UNION ALL
    SELECT 'USAGE on ' || sequence.relname
    FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_depend AS owned ON owned.refobjid = to_regclass(name) AND owned.deptype IN ('a', 'i')
    JOIN pg_class AS sequence ON sequence.oid = owned.objid
    -- The planner may swap conditions, and the function raises an error for what is no sequence.
    WHERE CASE WHEN sequence.relkind = 'S' THEN NOT has_sequence_privilege(sequence.oid, 'USAGE') END
    ORDER BY 1
""")


async def _require_durable_sqlite(connection: AsyncConnection) -> None:
    checks: tuple[tuple[str, Callable[[Any], bool]], ...] = (
        ("journal_mode", lambda value: value == "wal"),
        ("synchronous", lambda value: value >= 2),
    )
    for name, holds in checks:
        value = (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
        if not holds(value):
            raise SettingsError(
                f"SQLite refuses the durable setting for {name} (it reports {value!r}); "
                "is the database on a network filesystem? Use a local disk, or PostgreSQL."
            )
