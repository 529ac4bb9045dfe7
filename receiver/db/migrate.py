"""The schema's version: what the database has, what this code needs, and the way there."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from receiver.db.engine import Database
from receiver.db.requirements import require_usable
from receiver.errors import SettingsError

_PACKAGED: Final = Path(__file__).parent.parent / "migrations"
_CHECKOUT: Final = Path(__file__).parent.parent.parent / "migrations"
LOCK_ID: Final = 0x_C11F_1A
"""PostgreSQL advisory lock that serializes migrations."""


def head() -> str:
    """Return the revision that this code needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise SettingsError("the migrations are missing from this installation; reinstall the package")
    return revision


async def current(database: Database) -> str | None:
    """Return the database's revision, or None where it was never migrated."""
    async with database.read() as connection:
        return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())


async def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema to `revision`, in one transaction and under a lock: any number may run at once.

    Raises DatabaseUnavailable where the database cannot be reached.
    """
    await apply(database, lambda config: command.upgrade(config, revision))


async def apply(database: Database, change: Callable[[Config], None]) -> None:
    """Run a command of Alembic's as `upgrade` does."""

    def run(connection: Connection) -> None:
        config = _config()
        config.attributes["connection"] = connection
        change(config)

    async with database.migrate() as connection:
        if not database.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
            await connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        await connection.run_sync(run)
        if database.is_sqlite and (await connection.exec_driver_sql("PRAGMA foreign_key_check")).first():
            raise RuntimeError("the migration would leave rows that refer to nothing")


async def prepare(database: Database, *, durable_without: Collection[str] = ()) -> None:
    """Check what a process relies on before it starts; bring an SQLite schema up to date.

    Raises SettingsError, which says what to do, and DatabaseUnavailable.
    """
    await require_usable(database, durable_without=durable_without)
    # One machine's own file has nobody else to migrate it; a shared database is migrated on purpose.
    if database.is_sqlite:
        await upgrade(database)
    await require_current(database)


async def require_current(database: Database) -> None:
    """Raise SettingsError where the schema is not the one that this code needs."""
    found, needed = await current(database), head()
    if found == needed:
        return
    if found is None:
        raise SettingsError("the database has no tables yet: run `receiver migrate`")
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found in known:
        raise SettingsError(
            f"the database's schema is old ({found}, needed {needed}): run `receiver migrate`"
        )
    raise SettingsError(
        f"the database's schema ({found}) is newer than this release: deploy the newer release"
    )


def _config() -> Config:
    config = Config()
    location = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    # Alembic interpolates `%` in options.
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    return config
