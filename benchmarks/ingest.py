"""Webhooks per second, durably stored, compared with the bare server and a naive handler.

wrk sends requests that are signed beforehand, each of another event, over 64 connections on the same machine;
its own share of the CPU is shown. The sides are measured alternately, and a ratio is of the two sides of one
round. After each run the rows are counted: if an acked webhook has no row, the benchmark fails.

    python benchmarks/ingest.py --rounds 3 --seconds 8 --write docs
    git worktree add ../before HEAD^
    python benchmarks/ingest.py --sides postgresql sqlite --before ../before

Needs the development dependencies and the Debian packages postgresql, wrk and strace; it starts its servers.
`--write` puts the table into `performance.md` of a folder, and the chart beside it as `ingest.svg`.
"""

import argparse
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import HERE, Measured, family, run_wrk, served
from support import npm
from support.commands import run_command
from support.servers import Postgres

CONNECTIONS, MANY_CONNECTIONS = 64, 256
MOST = 90_000
"""More requests per second than the bare server reaches; no receiver reaches half of them."""
SIDES = {
    "bare": "bare uvicorn, nothing stored",
    "postgresql": "receiver, PostgreSQL",
    "postgresql-2": "receiver, PostgreSQL, 2 web processes",
    "sqlite": "receiver, SQLite",
    "ungrouped-postgresql": "receiver, PostgreSQL, a commit for each",
    "ungrouped-sqlite": "receiver, SQLite, a commit for each",
    "naive-postgresql": "naive handler, PostgreSQL",
    "naive-sqlite": "naive handler, SQLite",
    "node-postgresql": "Node.js http + pg upsert, PostgreSQL",
    "express-postgresql": "Express + pg, PostgreSQL",
}
PEERS = HERE / "peers"
PACKAGES = ("express@5.3.0", "pg@8.23.1")
BEFORE = {
    "before-postgresql": "build before, PostgreSQL",
    "before-sqlite": "build before, SQLite",
}
NAMES = SIDES | BEFORE
OURS = frozenset(side for side, name in SIDES.items() if name.startswith("receiver"))
MOST_REFUSED = 20
"""Runs in a row that other processes may disturb."""
START, END = "<!-- ingest: begin -->", "<!-- ingest: end -->"


class Bench:
    """A PostgreSQL server, a folder, and the sides on them."""

    def __init__(self, postgres: Postgres, folder: Path, before: Path | None, others: float) -> None:
        self._postgres = postgres
        self._folder = folder
        self._before = before
        self._others = others
        self._turn = 0
        self.refused = 0

    def run(self, side: str, *, connections: int = CONNECTIONS, seconds: float) -> Measured:
        """Measure a side until a run is quiet: other processes use `others` of a core at most."""
        for _ in range(MOST_REFUSED):
            measured = self._run(side, connections=connections, seconds=seconds)
            if measured.other_cpu <= self._others:
                return measured
            self.refused += 1
            print(
                f"{NAMES[side]}: not counted, others used {measured.other_cpu:.2f} of a core", file=sys.stderr
            )
        sys.exit(f"Other processes disturbed {MOST_REFUSED} runs in a row: stop them, or raise --others")

    def _run(self, side: str, *, connections: int, seconds: float) -> Measured:
        """Measure a side on a fresh database, and count its rows."""
        with self._serving(side) as (port, process, url):
            database = self._postgres.processes if "postgresql" in side else list
            most = MOST if side == "bare" else MOST / 2
            measured = run_wrk(
                port,
                self._folder,
                connections=connections,
                seconds=seconds,
                most=most,
                servers=lambda: [*family(process), *database()],
            )
        if measured.failed:
            sys.exit(f"{side}: {measured.failed} requests failed; see {self._folder}")
        if url is not None:
            stored = self._count(url, "events" if side.removeprefix("before-") in OURS else "results")
            # wrk leaves up to a request of each connection behind: stored, and its answer not counted.
            if not measured.acked <= stored <= measured.acked + connections:
                sys.exit(f"{side}: {measured.acked} acked, {stored} stored")
        return measured

    def flushes(self, *, seconds: float) -> tuple[int, int]:
        """Return the number of flushes of SQLite's log and of acks, at 64 connections."""
        trace = self._folder / "trace"
        with self._serving("sqlite") as (port, process, _url):
            command = ["strace", "-f", "-y", "-e", "trace=fdatasync,fsync", "-o", str(trace)]
            with subprocess.Popen([*command, "-p", str(process.pid)], stderr=subprocess.PIPE) as strace:
                assert strace.stderr is not None
                strace.stderr.readline()
                measured = run_wrk(
                    port,
                    self._folder,
                    connections=CONNECTIONS,
                    seconds=seconds,
                    most=MOST / 2,
                    servers=lambda: family(process),
                )
                strace.terminate()
        return trace.read_text(errors="replace").count("-wal>"), measured.acked

    @contextmanager
    def _serving(self, side: str) -> Iterator[tuple[int, subprocess.Popen[bytes], str | None]]:
        self._turn += 1
        folder = self._folder / f"{self._turn}-{side}"
        folder.mkdir()
        url = None
        if side != "bare":
            url = self._postgres.url() if "postgresql" in side else f"sqlite:///{folder / 'receiver.db'}"
        settings = {} if url is None else {"RECEIVER_DATABASE_URL": url}
        if side in BEFORE:
            # Python finds this package before the one that is installed.
            settings["PYTHONPATH"] = str(self._before)
        program, name = sys.executable, side.partition("-")[0]
        if name in {"node", "express"}:
            program, arguments = "node", [str(self._peer(f"{name}.mjs"))]
        elif name in {"bare", "naive"}:
            arguments = [str(HERE / "sides.py"), name]
        else:
            # In a folder of its own: Python would prefer a package in the current one.
            assert run_command("migrate", settings=settings, cwd=folder).returncode == 0
            if side.startswith("ungrouped"):
                arguments = [str(HERE / "sides.py"), "ungrouped"]
            else:
                workers = ["--workers", "2"] if side.endswith("-2") else []
                arguments = ["-m", "receiver", "serve", "--no-worker", *workers]
        with served(folder, *arguments, program=program, settings=settings) as (port, process):
            yield port, process, url

    def _peer(self, file: str) -> Path:
        # Node.js looks for packages beside the file that imports them.
        folder = npm.install(self._folder, *PACKAGES)
        for each in PEERS.glob("*.mjs"):
            shutil.copy(each, folder)
        return folder / file

    def _count(self, url: str, table: str) -> int:
        statement = f"SELECT count(*) FROM {table}"
        if url.startswith("postgresql"):
            return int(self._postgres.sql(statement, database=url.rpartition("/")[2]).stdout)
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return int(connection.execute(statement).fetchone()[0])


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of values and, in brackets, the least and the greatest."""
    low, middle, high = (
        format(value, form) for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def table(found: dict[str, list[Measured]]) -> list[str]:
    """Return the lines of the table of sides."""
    lines = [
        "| Side | webhooks/s | of bare uvicorn | ack p50 / p99, ms | CPU of client / servers |",
        "|---|---|---|---|---|",
    ]
    for side, runs in found.items():
        ratios = [ours.rate / one.rate for ours, one in zip(runs, found["bare"], strict=True)]
        p50, p99, client, servers = (
            statistics.median(getattr(each, name) for each in runs)
            for name in ("p50", "p99", "client_cpu", "server_cpu")
        )
        times, cpu = f"{p50:.1f} / {p99:.1f}", f"{client:.2f} / {servers:.2f}"
        rates = spread([each.rate for each in runs], ",.0f")
        lines.append(f"| {NAMES[side]} | {rates} | {spread(ratios, '.2f')} | {times} | {cpu} |")
    return lines


def compared(found: dict[str, list[Measured]]) -> list[str]:
    """Return the ratios of the receiver to the peers and to the build before, on each database."""
    lines = []
    for database in ("postgresql", "sqlite"):
        for other in ("naive", "node", "express", "before"):
            side = f"{other}-{database}"
            if found.keys() >= {database, side}:
                pairs = zip(found[database], found[side], strict=True)
                ratios = spread([ours.rate / theirs.rate for ours, theirs in pairs], ".2f")
                name, kind = NAMES[side].split(", ")
                lines.append(f"Receiver ÷ {name}, {kind}: {ratios}")
    return lines


def of_many(side: str, found: dict[str, list[Measured]]) -> str:
    """Return the rate of a side at many connections, and its ratio to the bare server's."""
    runs = found[side]
    ratios = [ours.rate / bare.rate for ours, bare in zip(runs, found["bare"], strict=True)]
    p50, p99 = (statistics.median(getattr(each, name) for each in runs) for name in ("p50", "p99"))
    return (
        f"{NAMES[side]}, {MANY_CONNECTIONS} connections: {spread([each.rate for each in runs], ',.0f')}/s, "
        f"{spread(ratios, '.2f')} of bare uvicorn, ack p50 {p50:.1f}, p99 {p99:.1f} ms"
    )


def one_connection(side: str, measured: Measured) -> str:
    """Return the rate and the latency of a side at one connection."""
    return (
        f"{NAMES[side]}, 1 connection: {measured.rate:,.0f}/s, "
        f"ack p50 {measured.p50:.1f}, p95 {measured.p95:.1f}, p99 {measured.p99:.1f} ms"
    )


def chart(found: dict[str, list[Measured]]) -> str:
    """Return the rates as an SVG bar chart."""
    rates = {NAMES[side]: statistics.median(each.rate for each in runs) for side, runs in found.items()}
    width, left, row = 760, 300, 30
    scale = (width - left - 90) / max(rates.values())
    height = row * len(rates) + 40
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="Webhooks per second by side">'
    )
    parts = [
        drawing,
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="10" y="20" font-weight="bold">Webhooks per second, 64 connections (medians)</text>',
    ]
    for index, (name, rate) in enumerate(rates.items()):
        y = 32 + row * index
        colour = "#2563eb" if name.startswith("receiver") else "#9ca3af"
        length = max(1.0, rate * scale)
        parts += [
            f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y + 3}" width="{length:.0f}" height="20" fill="{colour}"/>',
            f'<text x="{left + length + 6:.0f}" y="{y + 17}">{rate:,.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the sides in the order in which a round runs them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="bare is always one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each run")
    parser.add_argument(
        "--others", type=float, default=0.3, help="share of a core that other processes may use in a run"
    )
    parser.add_argument("--before", type=Path, help="checkout of another commit, which is measured, too")
    parser.add_argument("--write", type=Path, help="folder whose performance.md and ingest.svg are written")
    options = parser.parse_args()
    sides = [side for side in SIDES if side == "bare" or side in options.sides]
    if options.before:
        if not (options.before / "receiver" / "__main__.py").is_file():
            parser.error(f"--before: {options.before} is no checkout of the receiver")
        sides += [side for side in BEFORE if side.removeprefix("before-") in sides]
    return options, sides


def measure(options: argparse.Namespace, sides: Sequence[str]) -> tuple[dict[str, list[Measured]], list[str]]:
    """Run the sides alternately; return their runs, and a line for each further result."""
    receivers: list[str] = [side for side in ("postgresql", "sqlite") if side in sides]
    found: dict[str, list[Measured]] = defaultdict(list)
    many: dict[str, list[Measured]] = defaultdict(list)
    lines: list[str] = []
    with Postgres() as postgres, tempfile.TemporaryDirectory() as folder:
        bench = Bench(postgres, Path(folder), options.before and options.before.resolve(), options.others)
        for number in range(options.rounds):
            for side in sides:
                measured = bench.run(side, seconds=options.seconds)
                found[side].append(measured)
                print(
                    f"round {number + 1}: {NAMES[side]}: {measured.rate:,.0f}/s, p99 {measured.p99:.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
            for side in receivers and ["bare", *receivers]:
                many[side].append(bench.run(side, connections=MANY_CONNECTIONS, seconds=options.seconds))
        for side in receivers:
            lines += [
                of_many(side, many),
                one_connection(side, bench.run(side, connections=1, seconds=options.seconds)),
            ]
        if "sqlite" in sides:
            flushes, acked = bench.flushes(seconds=options.seconds)
            lines.append(
                f"Flushes per acked event on SQLite at {CONNECTIONS} connections: 1/{acked / flushes:.0f} "
                f"({flushes:,} for {acked:,}, traced)"
            )
    if bench.refused:
        lines.append(f"Runs that were not counted, because other processes used the CPU: {bench.refused}")
    return found, lines


def main() -> None:
    """Run the sides alternately and print the table."""
    options, sides = read_options()
    found, lines = measure(options, sides)
    where = (
        f"{options.rounds} rounds of {options.seconds:.0f} s, {psutil.cpu_count()} cores for everything, "
        f"Python {platform.python_version()}; medians, in brackets the least and the greatest round."
    )
    text = "\n".join(
        [where, "", *table(found), "", *(f"- {line}" for line in [*compared(found), *sorted(lines)])]
    )
    print(text)
    if options.write:
        page = options.write / "performance.md"
        before, _, rest = page.read_text().partition(START)
        page.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
        (options.write / "ingest.svg").write_text(chart(found))


if __name__ == "__main__":
    main()
