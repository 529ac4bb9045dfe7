"""Deliveries per second while a worker drains a backlog, and ingest beside a worker.

    git worktree add ../before HEAD^
    python benchmarks/drain.py backlog --count 50000 --rounds 5 --before ../before
    python benchmarks/drain.py beside --seconds 20 --rounds 3

`backlog`: webhooks are stored while no worker runs. Then a worker process publishes them and records the
results. The backlog is of due deliveries, as after the outage of a destination; with `--received` it is of
events that the worker has to fan out, as after its own outage. The time is from the first claim or fan-out to
the last result. In the end the destination must have every event. A build before and this one alternate on
copies of the same backlog, and a ratio is of the two runs of one round; CPU times are of the processes, so
they hold on a machine that other processes use, too.

`beside`: webhooks per second while a worker forwards them to Redis on the same cores, compared with the web
process alone, and the seconds until the worker has caught up after the load.

Needs the development dependencies and the Debian packages postgresql, redis-server, rabbitmq-server and wrk;
it starts its servers.
"""

import argparse
import asyncio
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import asyncpg
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import sinks
from load import busy_seconds, cpu_seconds, family, result, run_wrk, served, signed_request
from support.commands import command_environment
from support.payloads import SECRET
from support.servers import Postgres, end

from receiver.db.rows import new_id

DATABASES = ("postgresql", "sqlite")
CLIENTS = 64
MOST = 45_000
"""More webhooks per second than the receiver reaches."""
MOST_REFUSED = 20
"""Runs in a row that other processes may disturb."""
DEADLINE = 900.0
"""Seconds for a run."""

_BEGUN = "SELECT EXISTS (SELECT 1 FROM deliveries WHERE attempts > 0 OR {received})"
_UNFINISHED = """
    SELECT EXISTS (SELECT 1 FROM events WHERE state = 'received')
        OR EXISTS (SELECT 1 FROM deliveries WHERE state = 'pending')
"""
_BEGAN = {
    "postgresql": "SELECT extract(epoch FROM min({column}))::float8 FROM {table}",
    "sqlite": "SELECT (julianday(min({column})) - 2440587.5) * 86400.0 FROM {table}",
}
_ENDED = {
    "postgresql": "SELECT extract(epoch FROM max(finished_at))::float8, count(*) FROM deliveries",
    "sqlite": "SELECT (julianday(max(finished_at)) - 2440587.5) * 86400.0, count(*) FROM deliveries",
}
_ADD_DUE = (
    "INSERT INTO deliveries (id, event_seq, destination, state, next_attempt_at, created_at) "
    "VALUES ({}, {}, 'default', 'pending', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP)"
)


@dataclass(frozen=True, kw_only=True)
class Drained:
    """The figures of a run; CPU times are in microseconds per event."""

    rate: float
    worker: float
    database: float
    """0 on SQLite, which runs in the worker."""
    others: float
    """Of one core: other processes than the worker, its database and its destination."""

    @property
    def cpu(self) -> float:
        """Of the worker and its database."""
        return self.worker + self.database


@dataclass(frozen=True, kw_only=True)
class Build:
    """A checkout of the receiver."""

    name: str
    folder: Path | None
    """None for the installed package."""

    def settings(self, database: str, folder: Path) -> dict[str, str]:
        """Return the environment of its processes."""
        settings = {
            "RECEIVER_DATABASE_URL": database,
            "RECEIVER_STORAGE_URL": f"file:{folder / 'media'}",
            "CLIPIA_WEBHOOK_SECRET": SECRET,
        }
        # Python finds this package before the one that is installed.
        return settings if self.folder is None else settings | {"PYTHONPATH": str(self.folder)}

    def migrate(self, database: str, folder: Path) -> None:
        """Make the tables."""
        settings = command_environment(**self.settings(database, folder))
        command = [sys.executable, "-m", "receiver", "migrate"]
        # Python would find a package in the present folder first.
        subprocess.run(command, env=settings, cwd=folder, check=True, capture_output=True)


class Query:
    """Runs statements on a database, beside the worker."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.kind = url.partition(":")[0]

    async def __aenter__(self) -> Self:
        if self.kind == "sqlite":
            self._file = sqlite3.connect(self._url.removeprefix("sqlite:///"), isolation_level=None)
        else:
            self._session: Any = await asyncpg.connect(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.kind == "sqlite":
            self._file.close()
        else:
            await self._session.close()

    async def run(self, statement: str) -> None:
        """Run a statement without a result."""
        if self.kind == "sqlite":
            self._file.execute(statement).close()
        else:
            await self._session.execute(statement)

    async def add_due(self) -> None:
        """Add a due delivery of each event."""
        if self.kind == "sqlite":
            seqs = [row[0] for row in self._file.execute("SELECT seq FROM events ORDER BY seq")]
            self._file.executemany(_ADD_DUE.format("?", "?"), [(new_id().hex, seq) for seq in seqs])
        else:
            seqs = [row[0] for row in await self._session.fetch("SELECT seq FROM events ORDER BY seq")]
            await self._session.executemany(_ADD_DUE.format("$1", "$2"), [(new_id(), seq) for seq in seqs])
        await self.run("UPDATE events SET state = 'ready'")

    async def row(self, statement: str) -> tuple[float, ...]:
        """Return the only row of a result."""
        if self.kind == "sqlite":
            found: tuple[float, ...] = self._file.execute(statement).fetchone()
            return found
        return tuple(await self._session.fetchrow(statement))


class Bench:
    """The servers, the backlogs of each build, and the runs."""

    def __init__(
        self, postgres: Postgres, folder: Path, count: int, others: float, *, received: bool = False
    ) -> None:
        """`received` is for a backlog of events without deliveries."""
        self._postgres = postgres
        self._folder = folder
        self._count = count
        self._received = received
        self._others = others
        self._backlogs: dict[tuple[str, str], str] = {}
        self.sinks = sinks.Sinks()
        self.refused = 0

    def drain(self, build: Build, kind: str, target: str) -> Drained:
        """Measure runs until one is quiet."""
        for _ in range(MOST_REFUSED):
            drained = self._drain(build, kind, target)
            if drained.others <= self._others:
                return drained
            self.refused += 1
            tell(f"{build.name}, {target}, {kind}: not counted, others used {drained.others:.2f} of a core")
        sys.exit(f"Other processes disturbed {MOST_REFUSED} runs in a row: stop them, or raise --others")

    def _drain(self, build: Build, kind: str, target: str) -> Drained:
        with tempfile.TemporaryDirectory(dir=self._folder) as name, self._backlog(build, kind) as url:
            folder = Path(name)
            with self.sinks.open(target, folder) as sink:
                settings = build.settings(url, folder) | {"RECEIVER_DESTINATION_URL": sink.url}
                with self._working(folder, settings) as worker:
                    drained = uvloop.run(self._watch(worker, url, sink))
                if len(ids := sink.ids()) != self._count:
                    sys.exit(f"{build.name}: {len(ids):,} of {self._count:,} events are in {target}")
        return drained

    async def _watch(self, worker: psutil.Process, url: str, sink: sinks.Sink) -> Drained:
        """Wait until everything is delivered; the start of the worker is not counted."""
        late = time.monotonic() + DEADLINE
        async with Query(url) as query:
            servers = self._postgres.processes if query.kind == "postgresql" else list
            before = _Use(worker, servers, sink)
            begun = _BEGUN.format(received="TRUE" if self._received else "FALSE")
            while not (await query.row(begun))[0]:
                _check(worker, late)
                before = _Use(worker, servers, sink)
                await asyncio.sleep(0.02)
            while (await query.row(_UNFINISHED))[0]:
                _check(worker, late)
                await asyncio.sleep(0.1)
            after = _Use(worker, servers, sink)
            column = ("created_at", "deliveries") if self._received else ("started_at", "attempts")
            [began] = await query.row(_BEGAN[query.kind].format(column=column[0], table=column[1]))
            ended, count = await query.row(f"{_ENDED[query.kind]} WHERE state = 'delivered'")
        if count != self._count:
            sys.exit(f"{count:,} of {self._count:,} events are recorded as delivered")
        used = after - before
        return Drained(
            rate=self._count / (ended - began),
            worker=used["worker"] / self._count * 1e6,
            database=used["database"] / self._count * 1e6,
            others=max(0.0, used["others"]) / used["time"],
        )

    @contextmanager
    def _backlog(self, build: Build, kind: str) -> Iterator[str]:
        """Copy the build's database with the backlog for the block; make the original first if necessary."""
        if (build.name, kind) not in self._backlogs:
            self._backlogs[build.name, kind] = self._fill(build, kind)
        original = self._backlogs[build.name, kind]
        if kind == "sqlite":
            copy = self._folder / "drained.db"
            shutil.copy(original.removeprefix("sqlite:///"), copy)
            yield f"sqlite:///{copy}"
            for path in self._folder.glob("drained.db*"):
                path.unlink()
            return
        url = self._postgres.url(template=original.rpartition("/")[2])
        # Otherwise the writes of the copy would be flushed during the run.
        self._postgres.sql("CHECKPOINT")
        yield url
        self._postgres.drop(url)

    def _fill(self, build: Build, kind: str) -> str:
        folder = self._folder / f"{build.name}-{kind}"
        folder.mkdir()
        url = f"sqlite:///{folder / 'receiver.db'}" if kind == "sqlite" else self._postgres.url()
        build.migrate(url, folder)
        command = ("-m", "receiver", "serve", "--no-worker")
        with served(folder, *command, settings=build.settings(url, folder)) as (port, _):
            uvloop.run(post(port, self._count))
        uvloop.run(self._settle(url))
        return url

    async def _settle(self, url: str) -> None:
        """Add the due deliveries, and tidy up as the database does after a while."""
        async with Query(url) as query:
            if not self._received:
                await query.add_due()
            await query.run("PRAGMA wal_checkpoint(TRUNCATE)" if query.kind == "sqlite" else "VACUUM ANALYZE")

    @contextmanager
    def _working(self, folder: Path, settings: dict[str, str]) -> Iterator[psutil.Process]:
        with (folder / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "receiver", "worker"],
                env=command_environment(**settings),
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        try:
            yield psutil.Process(worker.pid)
        finally:
            end(worker)

    def beside(self, seconds: float, *, forwards: bool) -> tuple[float, float, int]:
        """Return webhooks per second, the seconds until no event is left, and the backlog at the end."""
        build = Build(name="this", folder=None)
        url = self._postgres.url()
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            build.migrate(url, folder)
            with self.sinks.open("redis", folder) as sink:
                settings = build.settings(url, folder) | {"RECEIVER_DESTINATION_URL": sink.url}
                command = ("-m", "receiver", "serve", "--no-worker")
                with served(folder, *command, settings=settings) as (port, process):

                    def load() -> float:
                        measured = run_wrk(
                            port,
                            folder,
                            connections=CLIENTS,
                            seconds=seconds,
                            most=MOST,
                            servers=lambda: [*family(process), *self._postgres.processes()],
                        )
                        if measured.failed:
                            sys.exit(f"{measured.failed} requests failed")
                        return measured.rate

                    if not forwards:
                        return load(), 0.0, 0
                    with self._working(folder, settings) as worker:
                        time.sleep(2)
                        rate = load()
                        caught_up, left = uvloop.run(_catch_up(worker, url))
        self._postgres.drop(url)
        return rate, caught_up, left


async def _catch_up(worker: psutil.Process, url: str) -> tuple[float, int]:
    """Return the seconds until no event is left, and the events that are left now."""
    began = time.monotonic()
    waiting = "SELECT (SELECT count(*) FROM events) - count(*) FROM deliveries WHERE state = 'delivered'"
    async with Query(url) as query:
        left = int((await query.row(waiting))[0])
        while (await query.row(_UNFINISHED))[0]:
            _check(worker, began + DEADLINE)
            await asyncio.sleep(0.2)
    return time.monotonic() - began, left


class _Use:
    """CPU times and the time of day at a moment."""

    def __init__(
        self, worker: psutil.Process, servers: Callable[[], list[psutil.Process]], sink: sinks.Sink
    ) -> None:
        self.seconds = {
            "worker": cpu_seconds([worker]),
            "database": cpu_seconds(servers()),
            "sink": cpu_seconds(sink.processes()),
            "own": time.process_time(),
            "all": busy_seconds(),
            "time": time.monotonic(),
        }

    def __sub__(self, before: "_Use") -> dict[str, float]:
        used = {name: value - before.seconds[name] for name, value in self.seconds.items()}
        known = sum(used[name] for name in ("worker", "database", "sink", "own"))
        return used | {"others": used["all"] - known}


def _check(worker: psutil.Process, late: float) -> None:
    if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
        sys.exit("the worker has ended")
    if time.monotonic() > late:
        sys.exit("the worker has not finished")


async def post(port: int, count: int) -> None:
    """Send `count` webhooks of different events over some connections, one after the other on each."""
    left = iter(range(count))

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(signed_request(result(str(uuid.uuid4()))))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                sys.exit(f"a webhook was not stored: {head.decode()}")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
        writer.close()

    await asyncio.gather(*(send() for _ in range(CLIENTS)))


def tell(message: str) -> None:
    """Print progress."""
    print(message, file=sys.stderr, flush=True)


def spread(values: list[float], form: str) -> str:
    """Return the median of values and, in brackets, the least and the greatest."""
    low, middle, high = (
        format(value, form) for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def rows(builds: list[Build], kind: str, target: str, found: dict[str, list[Drained]]) -> list[str]:
    """Return the lines of the table for one destination on one database."""
    lines = []
    for build in builds:
        runs, base = found[build.name], found[builds[0].name]
        ratios = [ours.rate / theirs.rate for ours, theirs in zip(runs, base, strict=True)]
        cpu = [theirs.cpu / ours.cpu for ours, theirs in zip(runs, base, strict=True)]
        worker, database = (
            statistics.median(getattr(each, name) for each in runs) for name in ("worker", "database")
        )
        lines.append(
            f"| {target} | {kind} | {build.name} | {spread([each.rate for each in runs], ',.0f')} "
            f"| {spread(ratios, '.2f')} | {worker:.0f} | {database:.0f} | {spread(cpu, '.2f')} |"
        )
    return lines


def backlog(bench: Bench, options: argparse.Namespace) -> None:
    """Measure builds alternately and print a table."""
    builds = [Build(name="this", folder=None)]
    if options.before:
        builds.insert(0, Build(name="before", folder=options.before.resolve()))
    kind = "events in received" if options.received else "due deliveries"
    print(
        f"{options.count:,} {kind}, {options.rounds} rounds, {psutil.cpu_count()} cores for everything, "
        f"Python {platform.python_version()}; medians, in brackets the least and the greatest round\n\n"
        "| Destination | database | build | deliveries/s | ÷ first build "
        "| CPU of the worker, µs each | of the database | CPU of the first build ÷ |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for kind in options.databases:
        for target in options.targets:
            found: dict[str, list[Drained]] = defaultdict(list)
            for number in range(options.rounds):
                for build in builds:
                    drained = bench.drain(build, kind, target)
                    found[build.name].append(drained)
                    tell(
                        f"round {number + 1}: {build.name}, {target}, {kind}: {drained.rate:,.0f}/s, worker "
                        f"{drained.worker:.0f} µs, database {drained.database:.0f} µs, "
                        f"others {drained.others:.2f}"
                    )
            print("\n".join(rows(builds, kind, target, found)), flush=True)
    if bench.refused:
        print(f"\nRuns that were not counted, because other processes used the CPU: {bench.refused}")


def beside(bench: Bench, options: argparse.Namespace) -> None:
    """Measure ingest alone and beside a worker alternately, and print the result."""
    alone, both, caught_up, left = [], [], [], []
    for number in range(options.rounds):
        alone.append(bench.beside(options.seconds, forwards=False)[0])
        rate, seconds, events = bench.beside(options.seconds, forwards=True)
        both.append(rate)
        caught_up.append(seconds)
        left.append(float(events))
        tell(
            f"round {number + 1}: {alone[-1]:,.0f}/s alone, {rate:,.0f}/s beside the worker, "
            f"{events:,} left, caught up after {seconds:.1f} s"
        )
    ratios = [one / other for one, other in zip(both, alone, strict=True)]
    print(
        f"{options.rounds} rounds of {options.seconds:.0f} s, {psutil.cpu_count()} cores for everything, "
        f"PostgreSQL and Redis; medians, in brackets the least and the greatest round\n\n"
        f"- Ingest alone: {spread(alone, ',.0f')}/s\n"
        f"- Ingest beside a worker that forwards to Redis: {spread(both, ',.0f')}/s\n"
        f"- Beside a worker ÷ alone: {spread(ratios, '.2f')}\n"
        f"- Events left at the end of the load: {spread(left, ',.0f')}\n"
        f"- Seconds until none was left: {spread(caught_up, '.1f')}"
    )


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("backlog")
    first.add_argument("--targets", nargs="+", choices=sinks.NAMES, default=list(sinks.NAMES))
    first.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    first.add_argument("--count", type=int, default=50_000, help="events of a backlog")
    first.add_argument("--rounds", type=int, default=5)
    first.add_argument("--received", action="store_true", help="the worker has to fan out the events, too")
    first.add_argument("--before", type=Path, help="checkout of another commit, which is measured, too")
    first.add_argument(
        "--others", type=float, default=0.3, help="share of a core that other processes may use in a run"
    )
    first.set_defaults(run=backlog)
    second = commands.add_parser("beside")
    second.add_argument("--seconds", type=float, default=20, help="of each load")
    second.add_argument("--rounds", type=int, default=3)
    second.set_defaults(run=beside, count=0, others=0.0, before=None, received=False)
    options = parser.parse_args()
    if options.before and not (options.before / "receiver" / "__main__.py").is_file():
        parser.error(f"--before: {options.before} is no checkout of the receiver")
    os.environ.pop("PYTHONPATH", None)
    with Postgres() as postgres, tempfile.TemporaryDirectory() as folder:
        bench = Bench(postgres, Path(folder), options.count, options.others, received=options.received)
        try:
            options.run(bench, options)
        finally:
            bench.sinks.close()


if __name__ == "__main__":
    main()
