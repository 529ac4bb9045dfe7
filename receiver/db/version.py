"""The row in which a database keeps its schema's version.

The table has a name of our own, because another application of the same schema may use Alembic, too, whose
own name for it is `alembic_version`. Earlier releases used that one. Beside the revision stands which
releases the schema serves: a release that is older than a migration cannot know.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, inspect, text

from receiver.errors import SettingsError

VERSION_TABLE: Final = "clipia_receiver_version"
_FORMER: Final = "alembic_version"
_FIRST_TABLES: Final = frozenset({"attempts", "deliveries", "events", "media", "probes", "receipts"})
"""The tables of the first migration. With a revision of ours they show that a version is ours."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A schema's version."""

    revision: str
    serves: str | None = None
    """The oldest revision whose release can run on the schema; None if only that of `revision` itself can."""


def read(connection: Connection, known: frozenset[str]) -> Version | None:
    """Return the schema's version, or None if it was never migrated; `known` are our revisions."""
    names = _tables(connection)
    if VERSION_TABLE in names:
        row = connection.execute(text(f"SELECT version_num, serves FROM {VERSION_TABLE}")).one_or_none()
        return None if row is None else Version(revision=row.version_num, serves=row.serves)
    revision = _former(connection, names, known)
    return None if revision is None else Version(revision=revision)


def prepare(connection: Connection, known: frozenset[str], created: frozenset[str]) -> None:
    """Make the table, or take over the one of an earlier release; `created` are the tables of the migrations.

    Raises SettingsError if a table of another application is in the way, and touches nothing then.
    """
    names = _tables(connection)
    if VERSION_TABLE in names:
        return
    if _former(connection, names, known) is not None:
        connection.execute(text(f"ALTER TABLE {_FORMER} RENAME TO {VERSION_TABLE}"))
        if connection.dialect.name == "postgresql":
            # Its index has this name, too, and would be in the way of another application's table.
            rename = f"RENAME CONSTRAINT {_FORMER}_pkc TO {VERSION_TABLE}_pkc"
            connection.execute(text(f"ALTER TABLE {VERSION_TABLE} {rename}"))
        connection.execute(text(f"ALTER TABLE {VERSION_TABLE} ADD COLUMN serves VARCHAR(32)"))
        return
    if taken := sorted(created & frozenset(inspect(connection).get_table_names(_schema(connection)))):
        raise SettingsError(
            f"the database has {'a table' if len(taken) == 1 else 'tables'} of another application with the "
            f"name of ours ({', '.join(taken)}): give the receiver a database of its own, or on PostgreSQL a "
            "schema of its own (CREATE SCHEMA receiver; ALTER ROLE name SET search_path = receiver)"
        )
    columns = (
        f"version_num VARCHAR(32) CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY NOT NULL, serves VARCHAR(32)"
    )
    connection.execute(text(f"CREATE TABLE {VERSION_TABLE} ({columns})"))


def record(connection: Connection, serves: str) -> None:
    """Note the oldest revision whose release can run on the schema."""
    connection.execute(text(f"UPDATE {VERSION_TABLE} SET serves = :serves"), {"serves": serves})


def _tables(connection: Connection) -> frozenset[str]:
    """Return the names of the tables that a statement finds without naming their schema."""
    return frozenset(inspect(connection).get_table_names())


def _schema(connection: Connection) -> str | None:
    """Return the schema in which tables are created; on SQLite there is one."""
    if connection.dialect.name == "sqlite":
        return None
    name: str = connection.execute(text("SELECT current_schema()")).scalar_one()
    return name


def _former(connection: Connection, names: frozenset[str], known: frozenset[str]) -> str | None:
    """Return the revision in the version table of an earlier release, if that is what the table is."""
    # Other applications count their revisions from 0001, too.
    if _FORMER not in names or not names >= _FIRST_TABLES:
        return None
    revisions = connection.execute(text(f"SELECT version_num FROM {_FORMER}")).scalars().all()
    return str(revisions[0]) if len(revisions) == 1 and revisions[0] in known else None
