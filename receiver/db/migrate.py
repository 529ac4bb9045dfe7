"""Migrations: the schema's revision, the revision that this release needs, and the upgrade."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import structlog
from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from receiver.db import version
from receiver.db.connection import Transaction
from receiver.db.database import Database
from receiver.db.operation_tables import metadata
from receiver.db.requirements import require_usable
from receiver.db.transactions import sqlstate
from receiver.db.version import Version
from receiver.errors import DatabaseUnavailable, SettingsError

_PACKAGED: Final = Path(__file__).parent.parent / "migrations"
_CHECKOUT: Final = Path(__file__).parent.parent.parent / "migrations"
LOCK_ID: Final = 0x_C11F_1A
"""The PostgreSQL advisory lock that serializes migrations."""
ATTEMPTS: Final = 10
"""Attempts at a migration if it conflicts with a worker."""
STEP_PAUSE: Final = 0.02
"""Seconds between two transactions of a step, for other work."""
TELL_EVERY: Final = 10.0
"""Seconds between two log records of progress."""
_COLLISIONS: Final = {"40P01", "55P03"}
"""SQLSTATEs of a deadlock and of a lock that was not granted in time."""

T = TypeVar("T")
Step = Callable[[Connection], str | None]
"""Does a part of a migration in a transaction of its own; returns the progress, or None if it is done."""

log = structlog.get_logger()


def head() -> str:
    """Return the revision that this release needs."""
    revision = _scripts().get_current_head()
    if revision is None:
        raise SettingsError("the migrations are missing from this installation; reinstall the package")
    return revision


async def current(database: Database) -> str | None:
    """Return the database's revision, or None if it was never migrated."""
    found = await _read(database)
    return None if found is None else found.revision


async def _read(database: Database) -> Version | None:
    known = _known()
    async with database.read() as connection:
        return await connection.run_sync(lambda sync: version.read(sync, known))


async def upgrade(database: Database, revision: str = "head") -> None:
    """Migrate the schema to `revision` under a lock, so that several processes may call it.

    The migrations are one transaction. On PostgreSQL, `STEPS` of a migration run before it, in transactions
    of their own, so that other processes can go on. A newer schema on which this release can
    run is left unchanged. Raises SettingsError, which tells what to do, and DatabaseUnavailable.
    """
    for script in await _scripts_with_steps(database, revision):
        before = str(script.down_revision)
        await _retry(partial(apply, database, partial(command.upgrade, revision=before)))
        for step in steps_of(script):
            await _run_step(database, step, before=before)
    await _retry(partial(apply, database, partial(command.upgrade, revision=revision)))


async def _scripts_with_steps(database: Database, revision: str) -> list[Script]:
    if database.is_sqlite or (found := await current(database)) is None or found not in _known():
        return []
    scripts = _scripts().iterate_revisions(revision, found)
    return [script for script in reversed([*scripts]) if steps_of(script)]


def steps_of(script: Script) -> Sequence[Step]:
    """Return the steps of a migration."""
    steps: Sequence[Step] = getattr(script.module, "STEPS", ())
    return steps


async def _run_step(database: Database, step: Step, *, before: str) -> None:
    """Run a step until it is done, or until another process has finished the migration."""

    def run(connection: Connection) -> str | None:
        found = version.read(connection, _known())
        return step(connection) if found is not None and found.revision == before else None

    async def attempt() -> str | None:
        async with _locked(database) as connection:
            progress: str | None = await connection.run_sync(run)
            return progress

    told = time.monotonic()
    while (progress := await _retry(attempt)) is not None:
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            log.info("migrating", progress=progress)
        await asyncio.sleep(STEP_PAUSE)


async def _retry(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat an attempt that conflicts with other transactions."""
    for left in reversed(range(ATTEMPTS)):
        try:
            return await attempt()
        except DatabaseUnavailable as error:
            state = sqlstate(getattr(error.__cause__, "orig", None) or error)
            if state not in _COLLISIONS or not left:
                raise
            log.warning("the migration conflicted with other transactions and is tried again", sqlstate=state)
        await asyncio.sleep(random.uniform(0.5, 2.0))  # noqa: S311 - no secret
    raise AssertionError


async def apply(database: Database, change: Callable[[Config], None]) -> None:
    """Run an Alembic command in one transaction."""

    def run(connection: Connection) -> None:
        known = _known()
        found = version.read(connection, known)
        if found is not None and found.revision not in known:
            _require_runnable(found, known)
            return
        if found is None or found.revision != head():
            _require_right_to_create(connection)
        version.prepare(connection, known, frozenset(metadata.tables))
        config = _config()
        config.attributes["connection"] = connection
        change(config)
        reached = version.read(connection, known)
        if reached is not None:
            version.record(connection, _oldest_served(reached.revision))

    async with _locked(database) as connection:
        await connection.run_sync(run)
        if database.is_sqlite and (await connection.exec_driver_sql("PRAGMA foreign_key_check")).first():
            raise RuntimeError("the migration would break foreign keys")


@asynccontextmanager
async def _locked(database: Database) -> AsyncIterator[Transaction]:
    """Open a transaction that no other migration shares."""
    async with database.migrate() as connection:
        if not database.is_sqlite:
            # No limit here: another migration may take minutes.
            await connection.execute(text("SET LOCAL lock_timeout = 0"))
            await connection.execute(text("SET LOCAL statement_timeout = 0"))
            await connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
            # Webhooks queue behind a table lock that waits.
            await connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        try:
            yield connection
        except DBAPIError as error:
            if (advice := _advice(error)) is not None:
                raise advice from error
            raise


async def prepare(database: Database, *, durable_without: Collection[str] = ()) -> None:
    """Check the database before a process starts; upgrade an SQLite schema.

    Raises SettingsError, which tells what to do, and DatabaseUnavailable.
    """
    await require_usable(database, durable_without=durable_without)
    # An SQLite file belongs to this machine alone; the operator migrates a shared database.
    if database.is_sqlite:
        await upgrade(database)
    await require_current(database)


async def require_current(database: Database) -> None:
    """Raise SettingsError if this release cannot run on the schema, because it is too old or too new."""
    found, known = await _read(database), _known()
    if found is None:
        raise SettingsError("the database has no tables yet: run `receiver migrate`")
    if found.revision not in known:
        _require_runnable(found, known)
        log.info("the schema is newer than this release, which can run on it", schema=found.revision)
    elif found.revision != head():
        raise SettingsError(
            f"the database's schema ({found.revision}) is too old for this release ({head()}): run "
            "`receiver migrate`"
        )


def _advice(error: DBAPIError) -> SettingsError | None:
    """Return an error that tells how to make the migration possible, or None for another failure."""
    state = getattr(error.orig, "sqlstate", None)
    if state == "42501":
        return SettingsError(
            "the database's user may not change its tables: run `receiver migrate` as their owner"
        )
    if state == "42P07" or (state is None and str(error.orig).endswith("already exists")):
        return SettingsError(
            "a table or an index of another application has a name that this release needs: give the "
            "receiver its own database or schema"
        )
    return None


def _require_runnable(found: Version, known: Collection[str]) -> None:
    if found.serves not in known:
        raise SettingsError(
            f"the database's schema ({found.revision}) is too new for this release ({head()}): deploy the "
            "newer release"
        )


def _require_right_to_create(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    query = "SELECT current_user, current_schema(), has_schema_privilege(current_schema(), 'CREATE')"
    user, schema, may_create = connection.execute(text(query)).one()
    if schema is None:
        raise SettingsError(
            f"the database has none of the schemas in the search_path of {user}: "
            "create one with CREATE SCHEMA, or set another search_path"
        )
    if not may_create:
        raise SettingsError(
            f"{user} may not create tables in the schema {schema}: as its owner, run "
            f"GRANT CREATE ON SCHEMA {schema} TO {user}, or run `receiver migrate` as a user that may"
        )


def _oldest_served(revision: str) -> str:
    """Return the oldest revision that can run on the schema of `revision`."""
    for script in _scripts().walk_revisions("base", revision):
        if not getattr(script.module, "release_before_runs", False):
            return script.revision
    return revision


def _known() -> frozenset[str]:
    return frozenset(script.revision for script in _scripts().walk_revisions())


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    location = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    # Alembic interpolates `%` in options.
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    return config
