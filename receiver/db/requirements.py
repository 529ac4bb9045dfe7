"""Checks of the database: commits are durable, every text can be stored, and the user has all rights."""

from collections.abc import Collection
from typing import Final

from sqlalchemy import text

from receiver.db.connection import Transaction
from receiver.db.database import Database
from receiver.db.operation_tables import metadata
from receiver.db.version import VERSION_TABLE
from receiver.errors import SettingsError

_STORAGE: Final = ("fsync", "full_page_writes")
"""Settings that may be off on a storage that confirms only durable writes and never tears a page."""
_RIGHTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")


async def require_usable(database: Database, *, durable_without: Collection[str] = ()) -> None:
    """Raise SettingsError if the database may lose committed data or cannot store every text.

    `durable_without` names settings of PostgreSQL that may be off. Raises DatabaseUnavailable.
    """
    async with database.read() as connection:
        if database.is_sqlite:
            await _require_durable_sqlite(connection)
        else:
            await _require_usable_postgresql(connection, durable_without)


async def _require_usable_postgresql(connection: Transaction, durable_without: Collection[str]) -> None:
    names = (*_STORAGE, "synchronous_commit", "server_encoding")
    # One statement, because each readiness probe runs it.
    query = ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    values = (await connection.execute(text(f"SELECT {query}"))).mappings().one()
    if values["server_encoding"] != "UTF8":
        raise SettingsError(
            f"the database's encoding is {values['server_encoding']}, which cannot store every text: create "
            "a database with CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0 and set "
            "RECEIVER_DATABASE_URL to it"
        )
    # With any value but `off`, the server flushes the write-ahead log before it confirms a commit.
    if values["synchronous_commit"] == "off":
        raise SettingsError(
            "PostgreSQL runs with synchronous_commit = off: a crash would lose events that were accepted. "
            "Run ALTER ROLE name SET synchronous_commit = on, and start the receiver again."
        )
    off = [name for name in _STORAGE if values[name] == "off" and name not in durable_without]
    if off:
        raise SettingsError(
            f"PostgreSQL runs with {' and '.join(f'{name} = off' for name in off)}: a power cut would lose "
            f"events that were accepted. Set {' and '.join(f'{name} = on' for name in off)} in "
            "postgresql.conf and reload. If the provider of a hosted database says that storage is durable "
            f"without it, set RECEIVER_DURABLE_WITHOUT={','.join((*durable_without, *off))}."
        )


async def require_rights(database: Database) -> None:
    """Raise SettingsError if the user lacks a right on a table or sequence; SQLite has no rights.

    Raises DatabaseUnavailable.
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
    -- CASE, because the planner may swap conditions, and the function fails for a table.
    WHERE CASE WHEN sequence.relkind = 'S' THEN NOT has_sequence_privilege(sequence.oid, 'USAGE') END
    ORDER BY 1
""")


async def _require_durable_sqlite(connection: Transaction) -> None:
    for name, durable in (("journal_mode", {"wal"}), ("synchronous", {2, 3})):
        value = (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
        if value not in durable:
            raise SettingsError(
                f"SQLite does not accept the durable setting of {name} (it reports {value!r}); "
                "is the database on a network filesystem? Use a local disk, or PostgreSQL."
            )
