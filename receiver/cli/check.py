"""`receiver check`: check whether this configuration works."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import typer
from rich.text import Text

from receiver.cli.database import opened_database, opened_storage
from receiver.cli.options import Json
from receiver.cli.remote import local_only
from receiver.cli.submit import reason_text
from receiver.cli.terminal import amount, count, moment, print_json, stdout
from receiver.cli.waiting import find_missing, process_name
from receiver.clipia.client import Call, open_client
from receiver.config_file import otlp_endpoint
from receiver.core.lane_names import (
    FAN_OUT_LANE,
    POLL_LANE,
    RETENTION_LANE,
    SUBMIT_LANE,
    destination_lane,
)
from receiver.core.signature import Secret
from receiver.db import jobs, migrate, outbox, rejections, submission_freezes
from receiver.db.masking import mask_errors
from receiver.db.requirements import require_rights, require_usable
from receiver.destination_control import check_destination, content_text
from receiver.destination_settings import DestinationSettings
from receiver.destinations import open_destination
from receiver.error_texts import error_text
from receiver.errors import SettingsError
from receiver.exit_status import FAILED
from receiver.lanes.removed_destinations import FATE
from receiver.media import MediaHosts, open_tls
from receiver.private_files import open_to_others
from receiver.settings import CALLBACK_PATH, Settings, unknown_variables
from receiver.status import WorkerStatus, read_workers
from receiver.submitter.account_status import AccountStatus, read_account_status
from receiver.submitter.job import read_error
from receiver.tracing import check_collector, require_tracing

REJECTIONS_SHOWN: Final = timedelta(days=1)
"""The age of the rejected requests that are counted."""


@local_only("it checks this machine's settings; `receiver status` shows the state of a receiver elsewhere")
def check(json: Json = False) -> None:
    """Check the settings, database, storage, destinations and API key, and print how to fix each problem.

    It prints the ids of the webhook secrets and the latest rejected requests, too. It writes a probe to the
    database and to the storage, sends no event and submits no job. It also masks secrets in errors that
    earlier releases stored. The exit status is 0 if everything works.
    """
    checks = _Check(json=json)
    asyncio.run(checks.run())
    if json:
        print_json({"data": checks.found, "next": None})
    if any(each["level"] == "error" for each in checks.found):
        raise typer.Exit(FAILED)


Level = Literal["ok", "warning", "error"]
_COLORS: Final[Mapping[Level, str]] = MappingProxyType({"ok": "green", "warning": "yellow", "error": "red"})


class _Check:
    def __init__(self, *, json: bool) -> None:
        self.found: list[dict[str, str]] = []
        self._json = json

    async def run(self) -> None:
        try:
            settings = Settings.load()
        except SettingsError as error:
            self._fail("settings", str(error))
            return
        self._ok("settings", "readable")
        for name, closest in unknown_variables().items():
            hint = f"do you mean {closest}?" if closest else "is it a typo?"
            self._warn("settings", f"{name} is not a setting of the receiver: {hint}")
        async with self._step("webhook secret"):
            self._check_secrets(settings)
        has_tables = False
        async with self._step("database"):
            has_tables = await self._check_database(settings)
        async with self._step("storage"):
            await self._check_storage(settings)
        async with self._step("media hosts"):
            self._check_hosts(settings)
        await self._check_destinations(settings)
        if settings.public_url:
            self._ok("public URL", f"Clipia sends webhooks to {settings.public_url}{CALLBACK_PATH}")
        async with self._step("Clipia"):
            await self._check_clipia(settings)
        async with self._step("traces"):
            await self._check_traces()
        if has_tables:
            async with self._step("jobs"):
                await self._check_jobs(settings)
            async with self._step("rejections"):
                await self._check_rejections(settings)

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other steps are still checked
            self._fail(name, error_text(error))

    def _fail(self, step: str, message: str) -> None:
        self._add("error", step, message)

    def _ok(self, step: str, message: str) -> None:
        self._add("ok", step, message)

    def _warn(self, step: str, message: str) -> None:
        self._add("warning", step, message)

    def _add(self, level: Level, step: str, message: str) -> None:
        self.found.append({"level": level, "step": step, "message": message})
        if not self._json:
            mark = f"[{_COLORS[level]}]{level:<7}[/]"
            stdout.print(mark, f"{step}:", Text(message), soft_wrap=True)

    def _check_account(self, status: AccountStatus) -> None:
        if status.pause is not None:
            reason = reason_text(read_error(status.pause) or {})
            self._warn("jobs", f"paused: Clipia refuses the account ({reason})")
        if status.refused_jobs:
            self._warn(
                "jobs",
                f"refused by Clipia for now (402, 403): {status.refused_jobs}; see `receiver jobs list "
                "--state pending`",
            )

    async def _check_database(self, settings: Settings) -> bool:
        """Return whether the database has its tables."""
        async with opened_database(settings) as database:
            await require_usable(database, durable_without=settings.durable_without)
            self._check_modes(database.file)
            if database.is_sqlite and await migrate.current(database) is None:
                self._ok("database", "SQLite, empty; `receiver serve` makes its tables")
                return False
            await require_rights(database)
            await migrate.require_current(database)
            await database.probe()
            async with database.read() as connection:
                waiting = await outbox.delivery_backlog(connection)
                seen = await read_workers(connection)
                frozen = await submission_freezes.find(connection)
            masked = await mask_errors(database)
            schema = await migrate.current(database)
        self._ok("database", f"{database.dialect_name}, durable, schema {schema}, writable")
        if masked:
            tables = ", ".join(f"{number} of {table}" for table, number in masked.items())
            self._warn(
                "database",
                f"masked secrets in stored errors ({tables}): replace these secrets, because anyone with "
                "access to the database or to a backup could read them",
            )
        for name in waiting.keys() - {each.name for each in settings.all_destinations}:
            number = count(waiting[name].rows, "delivery", "deliveries")
            self._warn(
                "database",
                f"{number} to {name!r}, a destination that is not configured: run `receiver deliveries move` "
                f"or `discard`; otherwise {FATE}",
            )
        self._check_workers(settings, seen)
        if frozen is not None:
            why = f", because the database was restored ({frozen.reason})" if frozen.restored else ""
            self._warn(
                "jobs", f"frozen by {frozen.by} at {moment(frozen.frozen_at)}{why}: see `receiver jobs thaw`"
            )
        return True

    def _check_modes(self, file: Path | None) -> None:
        if file is None:
            return
        readable = open_to_others(Path(f"{file}{ending}") for ending in ("", "-wal", "-shm"))
        if readable:
            names = " ".join(shlex.quote(str(path)) for path in readable)
            self._warn(
                "database",
                f"every user of this machine can open it, with all prompts: run `chmod o= {names}`",
            )

    def _check_workers(self, settings: Settings, seen: Sequence[WorkerStatus]) -> None:
        for worker in seen:
            name, age = process_name(worker), f"{worker['seen_seconds_ago']:.0f} s ago"
            if worker["running"]:
                self._ok("worker", f"{name}, seen {age}: {', '.join(worker['lanes'])}")
            else:
                self._warn("worker", f"{name} was last seen {age}; it has crashed")
        names = [destination_lane(each.name) for each in settings.all_destinations]
        lanes = [FAN_OUT_LANE, *names, *([SUBMIT_LANE, POLL_LANE] if settings.clipia_key else [])]
        lanes += [RETENTION_LANE] if settings.retention_days is not None else []
        if missing := find_missing(seen, lanes):
            self._warn("worker", missing)

    def _check_secrets(self, settings: Settings) -> None:
        for source in settings.require_sources():
            ids = ", ".join(Secret.from_text(text).id for text in source.secrets)
            self._ok(
                "webhook secret", f"source {source.name}: {count(len(source.secrets), 'secret')}, id {ids}"
            )

    async def _check_rejections(self, settings: Settings) -> None:
        """Print the rejected requests of the last day by their cause, with the last one of each."""
        if not settings.rejections_kept:
            self._ok("rejections", "not kept: RECEIVER_REJECTIONS_KEPT is 0")
            return
        since = datetime.now(UTC) - REJECTIONS_SHOWN
        async with opened_database(settings) as database, database.read() as connection:
            found = await rejections.count_since(connection, since)
            latest = [
                (await rejections.list_rejections(connection, limit=1, cause=cause))[0] for cause in found
            ]
        if not found:
            self._ok("rejections", "none in the last day")
        for last in sorted(latest, key=itemgetter("id"), reverse=True):
            self._warn(
                "rejections",
                f"{found[last['cause']]} with the cause {last['cause']} in the last day, the last one at "
                f"{moment(last['received_at'])}: {last['diagnosis']} See `receiver rejections show "
                f"{last['id']}`.",
            )

    async def _check_jobs(self, settings: Settings) -> None:
        client = open_client(settings)
        account = None if client is None else client.account
        if client is not None:
            await client.close()
        async with opened_database(settings) as database, database.read() as connection:
            unserved = await jobs.count_unserved(connection, account)
            status = None if account is None else await read_account_status(connection, account)
        if unserved:
            key = "CLIPIA_KEY" if account is None else "a key of the other kind (clipia_test_, clipia_live_)"
            self._warn("jobs", f"open jobs that need {key}: {unserved}; `receiver jobs cancel` cancels one")
        if status is not None:
            self._check_account(status)

    async def _check_storage(self, settings: Settings) -> None:
        async with opened_storage(settings) as storage:
            warning = await storage.check()
        self._ok("storage", "writable")
        if warning:
            self._warn("storage", warning)

    def _check_hosts(self, settings: Settings) -> None:
        hosts = MediaHosts.parse(settings.media_hosts)
        self._ok("media hosts", ", ".join(settings.media_hosts))
        for origin in hosts.development_origins:
            self._warn("media hosts", f"{origin} may have a private address: use it for development only")
        open_tls(settings.media_ca)
        if settings.media_proxy is not None:
            self._ok("media hosts", "media is fetched through a proxy, which has to reject private addresses")

    async def _check_clipia(self, settings: Settings) -> None:
        client = open_client(settings)
        if settings.clipia_key is None or client is None:
            self._ok("Clipia", "no CLIPIA_KEY: webhooks are received, but jobs cannot be submitted")
            return
        if not settings.clipia_key.get_secret_value().startswith(("clipia_live_", "clipia_test_")):
            self._warn(
                "Clipia", "CLIPIA_KEY starts with neither clipia_live_ nor clipia_test_: is it complete?"
            )
        try:
            balance = (await client.balance(call=Call())).get("balance") or {}
        finally:
            await client.close()
        self._ok("Clipia", f"the key works; {amount(balance.get('credits'), 'credits')} are left")
        if settings.public_url is None:
            self._warn("Clipia", "no RECEIVER_PUBLIC_URL: jobs are submitted without a webhook and polled")
        if not any("submit" in token.scopes for token in settings.api_tokens):
            self._warn(
                "Clipia", "no token of RECEIVER_API_TOKENS has the scope `submit`, which POST /v1/jobs needs"
            )

    async def _check_traces(self) -> None:
        if otlp_endpoint() is None:
            self._ok("traces", "off: OTEL_EXPORTER_OTLP_ENDPOINT is not set, or OpenTelemetry is disabled")
            return
        require_tracing()
        # In a thread: the library waits.
        origin = await asyncio.to_thread(check_collector)
        self._ok("traces", f"on; the collector at {origin} takes spans")

    async def _check_destinations(self, settings: Settings) -> None:
        if not settings.all_destinations:
            self._warn(
                "destinations",
                "none: events are stored and not forwarded; set RECEIVER_DESTINATION_URL or write "
                "[[destinations]] in receiver.toml",
            )
        for destination in settings.every_destination:
            async with self._step(f"destination {destination.name}"):
                await self._check_destination(destination)

    async def _check_destination(self, settings: DestinationSettings) -> None:
        destination = open_destination(settings)
        try:
            problems = await check_destination(destination)
        finally:
            await destination.close()
        when = "" if settings.alerts == "only" else f", when {settings.when}"
        summary = f"; {settings.summary}" if settings.summary else ""
        gets = f"gets {content_text(settings)}{when}{summary}"
        if problems:
            self._warn(f"destination {settings.name}", f"{'; '.join(problems)}; {gets}")
        else:
            self._ok(f"destination {settings.name}", f"reachable; {gets}")
