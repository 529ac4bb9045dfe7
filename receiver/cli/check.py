"""`receiver check`: tell whether this configuration would work."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

import structlog
import typer
from rich.text import Text
from structlog.typing import EventDict, WrappedLogger

from receiver.cli.submit import describe_error
from receiver.cli.terminal import amount, moment, stdout
from receiver.cli.waiting import find_missing, name_of
from receiver.clipia.client import Call, open_client
from receiver.core.lane_names import FAN_OUT_LANE, POLL_LANE, SUBMIT_LANE, destination_lane
from receiver.core.routing import filter_text
from receiver.db import arrivals, freezes, jobs, migrate, outbox, workers
from receiver.db.database import Database
from receiver.db.masking import mask_errors
from receiver.db.requirements import require_rights, require_usable
from receiver.db.workers import SeenWorker
from receiver.destination_settings import DestinationSettings
from receiver.destinations import open_destination
from receiver.error_texts import error_text
from receiver.errors import SettingsError
from receiver.lanes.unserved import FATE
from receiver.media import MediaHosts, open_storage, open_tls
from receiver.settings import CALLBACK_PATH, Settings, unknown_variables
from receiver.submitter.account_status import read_account_status
from receiver.submitter.job import read_error

_MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "error": "[red]error  [/]"}


def check() -> None:
    """Check settings, database, storage, destinations and the API key, and say how to fix what is wrong.

    Writes a probe to the database and to the storage, sends no event and submits no job. Masks secrets in
    errors that were recorded by earlier releases. The exit status is 0 if everything would work.
    """
    if not asyncio.run(_Check().run()):
        raise typer.Exit(1)


class _Check:
    def __init__(self) -> None:
        self._failed = False
        self._has_jobs = False

    async def run(self) -> bool:
        try:
            settings = Settings.load()
        except SettingsError as error:
            self._say("error", "settings", str(error))
            return False
        self._say("ok", "settings", "readable")
        for name in unknown_variables(os.environ):
            self._say(
                "warning", "settings", f"{name} is set but means nothing to the receiver; is it a typo?"
            )
        async with self._step("webhook secret"):
            sources = settings.require_sources()
            names = ", ".join(f"{source.name} ({len(source.secrets)})" for source in sources)
            self._say("ok", "webhook secret", f"for {names}")
        async with self._step("database"):
            await self._check_database(settings)
        async with self._step("storage"):
            await self._check_storage(settings)
        async with self._step("media hosts"):
            self._check_hosts(settings)
        if not settings.all_destinations:
            self._say(
                "warning",
                "destinations",
                "none: events are stored but forwarded nowhere; set RECEIVER_DESTINATION_URL or write "
                "[[destinations]] in receiver.toml",
            )
        for destination in settings.all_destinations:
            async with self._step(f"destination {destination.name}"):
                await self._check_destination(destination)
        if settings.public_url:
            url = f"{settings.public_url}{CALLBACK_PATH}"
            self._say("ok", "public URL", f"Clipia reaches the callback as {url}")
        async with self._step("Clipia"):
            await self._check_clipia(settings)
        if self._has_jobs:
            async with self._step("jobs"):
                await self._check_jobs(settings)
        return not self._failed

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other steps have something to tell, too
            self._say("error", name, error_text(error))

    def _say(self, verdict: Literal["ok", "warning", "error"], what: str, message: str) -> None:
        self._failed |= verdict == "error"
        stdout.print(_MARKS[verdict], f"{what}:", Text(message), soft_wrap=True)

    async def _check_database(self, settings: Settings) -> None:
        database = Database(settings.database_url.get_secret_value())
        try:
            await require_usable(database, durable_without=settings.durable_without)
            if database.is_sqlite and await migrate.current(database) is None:
                self._say("ok", "database", "SQLite, empty; `receiver serve` makes its tables")
                return
            await require_rights(database)
            await migrate.require_current(database)
            await arrivals.probe(database)
            self._has_jobs = True
            async with database.read() as connection:
                waiting = await outbox.delivery_backlog(connection)
                seen = await workers.find_runs(connection)
                frozen = await freezes.find(connection)
            masked = await mask_errors(database)
            self._say(
                "ok",
                "database",
                f"{database.dialect_name}, durable, schema {await migrate.current(database)}, writable",
            )
            if masked:
                where = ", ".join(f"{count} of {table}" for table, count in masked.items())
                self._say(
                    "warning",
                    "database",
                    f"masked secrets in errors that were on record ({where}): whoever could read them or a "
                    "backup has seen them, so replace those secrets",
                )
            for name in waiting.keys() - {each.name for each in settings.all_destinations}:
                self._say(
                    "warning",
                    "database",
                    f"{waiting[name].rows} deliveries wait for the destination {name!r}, which is not "
                    f"configured: `receiver deliveries move` or `discard`; else {FATE}",
                )
            self._check_workers(settings, seen)
            if frozen is not None:
                why = f", because the database was restored ({frozen.reason})" if frozen.restored else ""
                self._say(
                    "warning",
                    "jobs",
                    f"frozen by {frozen.by} at {moment(frozen.frozen_at)}{why}: `receiver jobs thaw` ends it",
                )
        finally:
            await database.close()

    def _check_workers(self, settings: Settings, seen: Sequence[SeenWorker]) -> None:
        for worker in seen:
            name = name_of(worker)
            if worker.is_running:
                self._say("ok", "worker", f"{name}, seen {worker.age:.0f} s ago: {', '.join(worker.lanes)}")
            else:
                self._say("warning", "worker", f"{name} was last seen {worker.age:.0f} s ago; it has crashed")
        names = [destination_lane(each.name) for each in settings.all_destinations]
        lanes = [FAN_OUT_LANE, *names, *([SUBMIT_LANE, POLL_LANE] if settings.clipia_key else [])]
        if missing := find_missing(seen, lanes):
            self._say("warning", "worker", missing)

    async def _check_jobs(self, settings: Settings) -> None:
        database = Database(settings.database_url.get_secret_value())

        async def ask() -> None:
            client = open_client(settings)
            account = None if client is None else client.account
            async with database.read() as connection:
                unserved = await jobs.count_unserved(connection, account)
                standing = None if account is None else await read_account_status(connection, account)
            if client is not None:
                await client.close()
            if unserved:
                key = (
                    "CLIPIA_KEY"
                    if account is None
                    else "a key of the other kind (clipia_test_, clipia_live_)"
                )
                self._say(
                    "warning",
                    "jobs",
                    f"open and waiting for {key}: {unserved}; `receiver jobs cancel` ends one",
                )
            if standing is not None and standing.pause is not None:
                said = describe_error(read_error(standing.pause) or {})
                self._say("warning", "jobs", f"paused: Clipia refuses the account ({said})")
            if standing is not None and standing.refused_jobs:
                self._say(
                    "warning",
                    "jobs",
                    f"refused by Clipia for now (402, 403): {standing.refused_jobs}; `receiver jobs list "
                    "--state pending` shows them",
                )

        await _and_close(ask, database.close)

    async def _check_storage(self, settings: Settings) -> None:
        storage = open_storage(settings.storage_url.get_secret_value())
        warnings: list[str | None] = []

        async def probe() -> None:
            warnings.append(await storage.check())

        await _and_close(probe, storage.close)
        self._say("ok", "storage", "writable")
        for warning in filter(None, warnings):
            self._say("warning", "storage", warning)

    def _check_hosts(self, settings: Settings) -> None:
        hosts = MediaHosts.parse(settings.media_hosts)
        self._say("ok", "media hosts", ", ".join(settings.media_hosts))
        for origin in hosts.development_origins:
            self._say("warning", "media hosts", f"{origin} is fetched unguarded: for development only")
        open_tls(settings.media_ca)
        if settings.media_proxy is not None:
            self._say(
                "ok",
                "media hosts",
                "fetched through a proxy, which must keep addresses out that are not public",
            )

    async def _check_clipia(self, settings: Settings) -> None:
        client = open_client(settings)
        if settings.clipia_key is None or client is None:
            self._say(
                "ok", "Clipia", "no CLIPIA_KEY: webhooks are received, and no job can be submitted here"
            )
            return
        if not settings.clipia_key.get_secret_value().startswith(("clipia_live_", "clipia_test_")):
            self._say(
                "warning",
                "Clipia",
                "CLIPIA_KEY starts with neither clipia_live_ nor clipia_test_: is it the whole key?",
            )

        async def ask() -> None:
            balance = (await client.balance(call=Call())).get("balance") or {}
            self._say("ok", "Clipia", f"the key works; {amount(balance.get('credits'), 'credits')} are left")

        await _and_close(ask, client.close)
        if settings.public_url is None:
            self._say(
                "warning", "Clipia", "no RECEIVER_PUBLIC_URL: jobs are submitted without a webhook and polled"
            )
        if not any("submit" in token.scopes for token in settings.api_tokens):
            self._say(
                "warning",
                "Clipia",
                "no token in RECEIVER_API_TOKENS has the scope `submit`: POST /v1/jobs refuses everybody",
            )

    async def _check_destination(self, settings: DestinationSettings) -> None:
        destination = open_destination(settings)

        async def start_and_check() -> None:
            await destination.start()
            await destination.check()

        with problems_logged() as problems:
            await _and_close(start_and_check, destination.close)
        which = filter_text(settings.filter) or "every event"
        described = f"; {settings.summary}" if settings.summary else ""
        gets = f"gets {which}, when {settings.when}{described}"
        if problems:
            self._say("warning", f"destination {settings.name}", f"{'; '.join(problems)}; {gets}")
        else:
            self._say("ok", f"destination {settings.name}", f"reachable; {gets}")


@contextmanager
def problems_logged() -> Iterator[list[str]]:
    """Collect the problems that destinations log in the block; `check` shows them as a verdict."""
    problems: list[str] = []

    def collect(_logger: WrappedLogger, _method: str, entry: EventDict) -> EventDict:
        if "problem" not in entry:
            return entry
        # Starting looks as the check itself does, and finds the same.
        if entry["problem"] not in problems:
            problems.append(entry["problem"])
        raise structlog.DropEvent

    # Loggers keep this very list from their first line on: another one in its place would not reach them.
    processors = structlog.get_config()["processors"]
    processors.insert(0, collect)
    try:
        yield problems
    finally:
        processors.remove(collect)


async def _and_close(check: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
    try:
        await check()
    finally:
        await close()
