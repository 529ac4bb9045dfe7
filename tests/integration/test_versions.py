"""The schema's version: its table, and the releases that may run on it."""

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, inspect, text
from support.commands import ReceiverProcess, run_command
from support.payloads import SECRET, body, signed
from support.servers import Postgres

from receiver.db import migrate
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.version import VERSION_TABLE
from receiver.errors import SettingsError
from receiver.settings import Settings
from receiver.submitter import Submitter

MIGRATIONS = Path(__file__).parents[2] / "migrations"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url()


async def run(database: Database, *statements: str) -> None:
    """Run statements in a transaction."""
    async with database.write() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def tables(database: Database) -> dict[str, list[str]]:
    """Return the tables and their columns."""

    def look(connection: Connection) -> dict[str, list[str]]:
        found = inspect(connection)
        return {
            name: [column["name"] for column in found.get_columns(name)] for name in found.get_table_names()
        }

    async with database.read() as connection:
        return await connection.run_sync(look)


async def make_former(database: Database) -> None:
    """Give a database the version table that earlier releases made."""
    columns = "version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)"
    await run(
        database,
        f"CREATE TABLE alembic_version ({columns})",
        f"INSERT INTO alembic_version SELECT version_num FROM {VERSION_TABLE}",
        f"DROP TABLE {VERSION_TABLE}",
    )


async def test_the_version_of_an_earlier_release_is_taken_over(database: Database) -> None:
    """C15: the table is renamed and keeps its revision, and Alembic's own name is free for others."""
    await make_former(database)
    await migrate.require_current(database)
    await migrate.upgrade(database)
    found = await tables(database)
    assert "alembic_version" not in found
    assert found[VERSION_TABLE] == ["version_num", "serves"]
    assert await migrate.current(database) == migrate.head()
    await run(
        database, "CREATE TABLE alembic_version (version_num TEXT CONSTRAINT alembic_version_pkc PRIMARY KEY)"
    )
    await migrate.upgrade(database)
    await migrate.require_current(database)


async def test_the_version_of_another_application_is_left_alone(empty_url: str) -> None:
    """C15: `alembic_version` of another application, which also counts from 0001, is not taken for ours."""
    database = Database(empty_url)
    await run(
        database,
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('0002')",
        "CREATE TABLE customers (id INTEGER)",
    )
    with pytest.raises(SettingsError, match="no tables yet"):
        await migrate.require_current(database)
    await migrate.upgrade(database)
    await migrate.require_current(database)
    async with database.read() as connection:
        query = text("SELECT version_num FROM alembic_version")
        assert (await connection.execute(query)).scalars().all() == ["0002"]
    await database.close()


@pytest.mark.parametrize("name", ["jobs", "events"])
async def test_a_table_of_another_application_is_left_alone(
    empty_url: str, name: str, tmp_path: Path
) -> None:
    """C15: if one of our tables would collide, one sentence names it, and the schema is unchanged."""
    database = Database(empty_url)
    await run(
        database,
        f"CREATE TABLE {name} (id INTEGER, title TEXT)",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('0003')",
    )
    before = await tables(database)
    result = run_command("migrate", settings={"RECEIVER_DATABASE_URL": empty_url}, cwd=tmp_path)
    assert result.returncode == 2
    assert (
        f"another application has tables with the names that the receiver needs ({name})".encode()
        in result.stderr
    )
    assert result.stderr.count(b"\n") == 1
    assert await tables(database) == before
    await database.close()


async def test_a_schema_of_ones_own_is_enough(postgres: Postgres) -> None:
    """C15: the advice of that sentence works: our tables go to a schema that is first in the search_path."""
    url = postgres.url()
    name = url.rpartition("/")[2]
    for statement in (
        "CREATE TABLE jobs (id INTEGER)",
        "CREATE SCHEMA receiver",
        f"ALTER DATABASE {name} SET search_path = receiver, public",
    ):
        postgres.sql(statement, database=name)
    database = Database(url)
    await migrate.upgrade(database)
    await migrate.require_current(database)
    await database.probe()
    async with database.read() as connection:
        query = text("SELECT count(*) FROM pg_tables WHERE schemaname = 'receiver' AND tablename = 'jobs'")
        assert (await connection.execute(query)).scalar_one() == 1
    await database.close()


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_user_without_the_right_to_create_tables(
    postgres: Postgres, tmp_path: Path, *, is_new: bool
) -> None:
    """C15: without the right to create tables, or to change another owner's, one sentence has the GRANT."""
    url = postgres.url(template="template1" if is_new else "migrated")
    name, role = url.rpartition("/")[2], f"role_{uuid.uuid4().hex[:12]}"
    postgres.sql(f"CREATE ROLE {role} LOGIN")
    if not is_new:
        database = Database(url)
        await make_former(database)
        await database.close()
        postgres.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}", database=name)
    url = url.replace("postgres@", f"{role}@")
    result = run_command("migrate", settings={"RECEIVER_DATABASE_URL": url}, cwd=tmp_path)
    assert result.returncode == 2
    wanted = f"GRANT CREATE ON SCHEMA public TO {role}" if is_new else "run `receiver migrate` as their owner"
    assert wanted.encode() in result.stderr
    assert result.stderr.count(b"\n") == 1


async def upgrade_to_the_future(
    database: Database, folder: Path, patch: pytest.MonkeyPatch, runs: Sequence[bool]
) -> None:
    """Migrate as a later release would; `runs` says if the release before each migration may run after it."""
    shutil.copytree(MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = migrate.head()
    for number, each in enumerate(runs, int(before) + 1):
        (folder / "versions" / f"{number:04}_future.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n\n"
            f'revision = "{number:04}"\ndown_revision = "{number - 1:04}"\n'
            f"branch_labels = None\ndepends_on = None\nrelease_before_runs = {each}\n\n\n"
            f'def upgrade() -> None:\n    op.add_column("events", sa.Column("later_{number}", sa.Text()))\n'
        )
    with patch.context() as only:
        only.setattr(migrate, "_CHECKOUT", folder)
        await migrate.upgrade(database)


@pytest.mark.parametrize("runs", [[True, True]])
async def test_an_older_process_runs_on_a_newer_schema_that_serves_it(
    database: Database,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: Sequence[bool],
) -> None:
    """C15: after a rollback `migrate`, `check`, `serve` and `worker` start on the newer schema, and work."""
    await upgrade_to_the_future(database, tmp_path / "future", monkeypatch, runs)
    settings = {
        "RECEIVER_DATABASE_URL": database_url,
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "RECEIVER_STORAGE_URL": f"file:{tmp_path / 'media'}",
        "RECEIVER_DESTINATION_URL": f"file:{tmp_path / 'events.jsonl'}",
    }
    for _ in range(2):
        result = run_command("migrate", settings=settings, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, b"")
        assert b"is newer than this release" in result.stdout
    result = run_command("check", settings=settings, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert f"schema {int(migrate.head()) + len(runs):04}".encode() in result.stdout
    with ReceiverProcess(tmp_path, **settings) as receiver:
        content = body("r-1")
        async with httpx.AsyncClient(base_url=receiver.url) as client:
            answer = await client.post("/clipia/webhook", content=content, headers=signed(content))
            assert answer.json()["status"] == "accepted"
            assert (await client.get("/readyz")).status_code == 200
    with ReceiverProcess(tmp_path, "worker", **settings):
        pass
    async with Submitter.open(Settings.load(database_url=database_url)) as submitter:
        assert (await submitter.list_jobs()).jobs == []


@pytest.mark.parametrize("runs", [[True, False], [False, True]])
async def test_an_older_process_is_rejected_by_a_newer_schema_that_serves_it_no_more(
    database: Database,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: Sequence[bool],
) -> None:
    """C15: if one later migration does not allow it, each command ends with the same sentence."""
    await upgrade_to_the_future(database, tmp_path / "future", monkeypatch, runs)
    settings = {"RECEIVER_DATABASE_URL": database_url, "CLIPIA_WEBHOOK_SECRET": SECRET}
    before = await tables(database)
    for command in ("migrate", "serve", "worker", "check"):
        result = run_command(command, settings=settings, cwd=tmp_path)
        said = (result.stdout if command == "check" else result.stderr).decode()
        assert result.returncode == (1 if command == "check" else 2), said
        assert "is too new for this release" in said
        assert "deploy the newer release" in said
        assert "Traceback" not in said + result.stderr.decode()
    assert await tables(database) == before


async def test_the_releases_that_a_schema_serves_are_noted(database: Database) -> None:
    """C15: the version row names the oldest revision that each later step allows."""

    async def serves(connection: SqlConnection) -> str:
        query = text(f"SELECT version_num, serves FROM {VERSION_TABLE}")
        return str((await connection.execute(query)).one().serves)

    async with database.read() as connection:
        noted = await serves(connection)
    assert "0005" <= noted <= migrate.head()
