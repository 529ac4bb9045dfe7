"""The version table: the schema's revision, and the oldest revision that can run on the schema.

An older release cannot know whether it can run on a newer schema, so the newer release records that.
Alembic's own table is `alembic_version`, which earlier releases used. The table has another name now, because
another application in the same schema may use Alembic too.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, inspect, text

from receiver.errors import SettingsError

VERSION_TABLE: Final = "clipia_receiver_version"
_FORMER: Final = "alembic_version"
_FIRST_TABLES: Final = frozenset({"attempts", "deliveries", "events", "media", "probes", "receipts"})
"""The tables of the first migration. With a known revision they show that a version table is ours."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A schema's version."""

    revision: str
    serves: str | None = None
    """The oldest revision that can run on the schema; None if only `revision` itself can."""


def read(connection: Connection, known: frozenset[str]) -> Version | None:
    """Return the schema's version, or None without one; `known` are the revisions of this release."""
    names = _tables(connection)
    if VERSION_TABLE in names:
        row = connection.execute(text(f"SELECT version_num, serves FROM {VERSION_TABLE}")).one_or_none()
        return None if row is None else Version(revision=row.version_num, serves=row.serves)
    revision = _former(connection, names, known)
    return None if revision is None else Version(revision=revision)


def prepare(connection: Connection, known: frozenset[str], created: frozenset[str]) -> None:
    """Create the version table, or take over the one of an earlier release.

    `created` are the tables of the migrations. Raises SettingsError without a change if another application
    has a table of one of these names.
    """
    names = _tables(connection)
    if VERSION_TABLE in names:
        return
    if _former(connection, names, known) is not None:
        connection.execute(text(f"ALTER TABLE {_FORMER} RENAME TO {VERSION_TABLE}"))
        if connection.dialect.name == "postgresql":
            # The index has the same name as the constraint, and would block another application's table.
            rename = f"RENAME CONSTRAINT {_FORMER}_pkc TO {VERSION_TABLE}_pkc"
            connection.execute(text(f"ALTER TABLE {VERSION_TABLE} {rename}"))
        connection.execute(text(f"ALTER TABLE {VERSION_TABLE} ADD COLUMN serves VARCHAR(32)"))
        return
    if taken := sorted(created & frozenset(inspect(connection).get_table_names(_schema(connection)))):
        raise SettingsError(
            f"another application has tables with the names that the receiver needs ({', '.join(taken)}): "
            "give the receiver its own database, or on PostgreSQL its own schema "
            "(CREATE SCHEMA receiver; ALTER ROLE name SET search_path = receiver)"
        )
    columns = (
        f"version_num VARCHAR(32) CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY NOT NULL, serves VARCHAR(32)"
    )
    connection.execute(text(f"CREATE TABLE {VERSION_TABLE} ({columns})"))


def record(connection: Connection, serves: str) -> None:
    """Record the oldest revision that can run on the schema."""
    connection.execute(text(f"UPDATE {VERSION_TABLE} SET serves = :serves"), {"serves": serves})


def _tables(connection: Connection) -> frozenset[str]:
    """Return the names of the tables that a statement finds without a schema name."""
    return frozenset(inspect(connection).get_table_names())


def _schema(connection: Connection) -> str | None:
    """Return the schema in which tables are created; SQLite has one only."""
    if connection.dialect.name == "sqlite":
        return None
    name: str = connection.execute(text("SELECT current_schema()")).scalar_one()
    return name


def _former(connection: Connection, names: frozenset[str], known: frozenset[str]) -> str | None:
    """Return the revision in the version table of an earlier release, if there is one."""
    # Other applications may number their revisions from 0001 too, so the tables are compared as well.
    if _FORMER not in names or not names >= _FIRST_TABLES:
        return None
    revisions = connection.execute(text(f"SELECT version_num FROM {_FORMER}")).scalars().all()
    return str(revisions[0]) if len(revisions) == 1 and revisions[0] in known else None
