"""The printed benchmark commands run, on small sizes, so that readers can repeat the figures."""

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import command_environment, unmeasured
from support.servers import require

ROOT = Path(__file__).parents[2]
AUTHORITIES = {name: os.environ[name] for name in ("NODE_EXTRA_CA_CERTS",) if name in os.environ}
"""npm needs them to install the peers, if its registry has a certificate of its own."""


def run(*arguments: str) -> str:
    """Run a benchmark and return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=unmeasured(command_environment()) | AUTHORITIES,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ingest_is_measured_and_written_down(tmp_path: Path) -> None:
    """Both sides are measured, every ack is accounted for, and the page gets its table and its chart."""
    require("postgresql", "wrk", "strace")
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    sides = ("sqlite", "naive-sqlite", "node-postgresql", "express-postgresql")
    sizes = ("--rounds", "1", "--seconds", "1", "--others", "99", "--before", str(ROOT))
    printed = run("benchmarks/ingest.py", "--sides", *sides, *sizes, "--write", str(tmp_path))
    page = (tmp_path / "performance.md").read_text()
    assert printed.strip() in page
    assert "## Where the time goes" in page
    assert page.count("<!-- ingest: begin -->") == 1
    for line in (
        "receiver, SQLite |",
        "naive handler, SQLite |",
        "Node.js http + pg upsert, PostgreSQL |",
        "Express + pg, PostgreSQL |",
        "÷ build before, SQLite",
        "receiver, SQLite, 256 connections",
        "Flushes per acked",
    ):
        assert line in page
    assert (tmp_path / "ingest.svg").read_text().count("<rect") == 7


def test_disturbed_runs_are_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If other processes used the CPU, a run is repeated with a note; after too many the benchmark ends."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ingest = importlib.import_module("ingest")
    bench = ingest.Bench(None, tmp_path, None, 0.3)
    shares: Iterator[float] = iter([0.9, 0.31, 0.3])
    monkeypatch.setattr(bench, "_run", lambda *_, **__: SimpleNamespace(other_cpu=next(shares)))
    assert bench.run("bare", seconds=1).other_cpu == 0.3
    assert bench.refused == 2
    shares = itertools.repeat(0.31)
    with pytest.raises(SystemExit, match="--others"):
        bench.run("bare", seconds=1)


def test_downloads_are_measured() -> None:
    """Large and small files have a row, with both ratios."""
    require("curl")
    printed = run("benchmarks/download.py", "--mebibytes", "16", "--files", "8", "--rounds", "1")
    rows = printed.splitlines()[4:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| 1 of 16 MiB",
        "| 1 of 16 MiB over TLS",
        "| 8 of 1 MiB",
    ]
    assert all(row.count(" to ") == 2 for row in rows)


def test_latency_is_measured() -> None:
    """Both databases have a row for the rate, with a time in every column."""
    require("postgresql")
    rows = run("benchmarks/latency.py", "--rates", "50", "--seconds", "2", "--rounds", "1").splitlines()[4:]
    assert [row.split(" | ")[0] for row in rows] == ["| PostgreSQL", "| SQLite"]
    assert all(row.count("(") == 5 for row in rows)


def test_growth_is_measured_and_explained() -> None:
    """Both databases have their rows with a ratio in each, and no plan scans a whole table."""
    require("postgresql", "wrk")
    sizes = "--events 3000 --sqlite-events 3000 --small 500 --rounds 1 --seconds 1"
    figures, _, explained = run("benchmarks/growth.py", *sizes.split()).partition("\n-- ")
    for database in ("PostgreSQL", "SQLite"):
        _, _, rest = figures.partition(f"| | {database}, 500 events | 3,000 events | ratio |\n")
        rows = rest.partition("\n\n")[0].splitlines()[1:]
        assert all(row.count(" (") == 3 for row in rows)
        measured = [row.removeprefix("| ").partition(",")[0] for row in rows]
        for what in ("ingest", "claim of 64 deliveries", "newest page of events", "/metrics: dead letters"):
            assert what in measured
        _, _, claim = explained.partition(f"{database}, 3,000 events: claim: ")
        assert "ix_deliveries_due" in claim.partition("\n-- ")[0]
    # PostgreSQL scans a small table, and SQLite, which keeps no row counts, plans for many rows as for these.
    tables = ("events", "receipts", "media", "deliveries", "attempts", "jobs")
    assert not {f"SCAN {table}" for table in tables} & {line.strip() for line in explained.splitlines()}


def test_memory_is_measured() -> None:
    """Each round has a row with the memory of both processes, and every event has arrived."""
    require("postgresql", "wrk")
    start, *rows = run("benchmarks/soak.py", "--events", "500", "--seconds", "1").splitlines()[2:]
    assert start.startswith("| 0 | | | ")
    assert rows
    for row in rows:
        events, rate, drained, web, worker = (
            int(each.replace(",", "")) for each in row.strip("| ").split(" | ")
        )
        assert min(events, rate, drained) > 0
        assert min(web, worker) > 20


def test_publishing_is_measured() -> None:
    """Each kind of destination has a row with both sides and their ratio."""
    require("postgresql")
    printed = run("benchmarks/publish.py", "--kinds", "file", "--count", "200", "--rounds", "1")
    name, alone, outbox, ratio, _ = printed.splitlines()[-1].strip("| ").split(" | ")
    assert name == "file"
    assert int(alone.replace(",", "")) > int(outbox.replace(",", "")) > 0
    assert 0 < float(ratio) < 1


def test_isolation_is_measured() -> None:
    """Both destinations beside the frozen one have a row for each phase."""
    require("postgresql", "rabbitmq-server", "redis-server")
    sizes = "--seconds 2 --rounds 1 --rate 20 --replayed 50"
    rows = [
        row.strip("| ").split(" | ") for row in run("benchmarks/isolation.py", *sizes.split()).splitlines()
    ]
    phases = ("quiet", "frozen", "replay")
    assert [row[:2] for row in rows[-6:]] == [[to, phase] for to in ("redis", "file") for phase in phases]
    assert all(float(row[2]) > 0 for row in rows[-6:])


def test_draining_is_measured() -> None:
    """Each build has a row with its rate and its CPU time, after every event has arrived."""
    require("postgresql")
    sizes = "--count 200 --rounds 1 --others 99 --targets http"
    printed = run("benchmarks/drain.py", "backlog", *sizes.split(), "--before", str(ROOT))
    rows = [row.strip("| ").split(" | ") for row in printed.splitlines()[4:]]
    assert [row[:3] for row in rows] == [
        ["http", database, build] for database in ("postgresql", "sqlite") for build in ("before", "this")
    ]
    assert all(float(row[5]) > 0 for row in rows)


def test_ingest_beside_a_worker_is_measured() -> None:
    """The rates alone and beside the worker are told, and the time until no event is left."""
    require("postgresql", "redis-server", "wrk")
    lines = run("benchmarks/drain.py", "beside", "--seconds", "1", "--rounds", "1").splitlines()[2:]
    told = [line.removeprefix("- ").partition(": ")[0] for line in lines]
    assert told == [
        "Ingest alone",
        "Ingest beside a worker that forwards to Redis",
        "Beside a worker ÷ alone",
        "Events left at the end of the load",
        "Seconds until none was left",
    ]
