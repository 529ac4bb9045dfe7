"""The memory that clients without a secret can take from a web process.

Each attack holds connections with requests that are never finished, or that are rejected, while genuine
webhooks come ten times a second. The table shows the growth of the process's memory, at its peak and a minute
later, and the number of genuine webhooks that were stored.

    python benchmarks/memory.py --connections 2000

Needs the development dependencies, the Debian package postgresql, and a limit of open files (`ulimit -n`) of
twice the connections; it starts its servers.
"""

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from support import attacks
from support.commands import ReceiverProcess, run_command
from support.servers import Postgres

HEADS = (
    *("database", "attack", "MiB before", "peak", "after the rest", "genuine stored", "slowest"),
    "connections",
    "CPU",
)


@contextmanager
def frozen_sqlite(file: Path) -> Iterator[None]:
    """Hold the lock of an SQLite file for the block."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


async def attack(
    process: ReceiverProcess,
    name: str,
    options: argparse.Namespace,
    frozen: AbstractContextManager[None] | None,
) -> str:
    """Attack a process and return a row of the table; `frozen` freezes its database."""
    assert process.process is not None
    port = int(process.url.rpartition(":")[2])
    async with attacks.genuine_webhooks(port):
        await asyncio.sleep(2)
    meter = attacks.Meter(process.process.pid)
    with frozen or nullcontext():
        async with meter.watching(), attacks.genuine_webhooks(port) as genuine:
            done = await attacks.flood(
                port,
                name,
                connections=options.connections,
                seconds=60 if frozen else options.seconds,
                total=options.signed if frozen else None,
            )
    await meter.wait_until(below=0, seconds=options.rest)
    used = psutil.Process(process.process.pid).cpu_times()
    answers = ", ".join(f"{status.decode() or 'none'}: {n}" for status, n in done.answers.most_common())
    return (
        f"| {name} | {meter.before:.0f} | {meter.peak:+.0f} | {meter.now:+.0f} |"
        f" {genuine.statuses[b'200']} of {genuine.sent} | {genuine.slowest:.1f} s |"
        f" {done.connections} ({answers}), {done.slowest:.1f} s | {used.user + used.system:.1f} s |"
    )


def main() -> None:
    """Run every attack against a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--signed", type=int, default=4500, help="signed bodies while the database is frozen")
    parser.add_argument("--seconds", type=float, default=20, help="of each attack")
    parser.add_argument("--rest", type=float, default=60, help="seconds until the memory is read again")
    parser.add_argument("--only", default="", help="only attacks with this in their names")
    parser.add_argument("--databases", nargs="*", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres()) if "postgresql" in options.databases else None
        for kind in options.databases:
            for name in attacks.ATTACKS:
                if options.only in name:
                    row = run(postgres if kind == "postgresql" else None, name, options)
                    print(f"| {kind} {row}", flush=True)


def run(postgres: Postgres | None, name: str, options: argparse.Namespace) -> str:
    """Start a process on a database of its own, attack it and return a row of the table."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        folder = Path(directory)
        url = postgres.url() if postgres else f"sqlite:///{folder / 'receiver.db'}"
        run_command("migrate", settings={"RECEIVER_DATABASE_URL": url})
        process = ReceiverProcess(
            folder, "serve", "--port", "0", "--no-worker", RECEIVER_DATABASE_URL=url
        ).start()
        stack.callback(process.stop)
        frozen = None
        if name == attacks.SIGNED:
            frozen = attacks.frozen_postgres(postgres) if postgres else frozen_sqlite(folder / "receiver.db")
        return asyncio.run(attack(process, name, options, frozen))


if __name__ == "__main__":
    main()
