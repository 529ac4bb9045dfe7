"""Times of an ack, and from a signed POST until its line is in the destination's file, at a fixed rate.

The receiver runs as in production, a web process and a worker on PostgreSQL, or as one process on SQLite; the
worker forwards the same events meanwhile. The client keeps to its rate whatever the answers take, and counts
from the moment at which a request was due. Client, servers and database share the machine.

    python benchmarks/latency.py --rates 200 500 --seconds 15 --rounds 3

Needs the development dependencies and the Debian package postgresql.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import orjson

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import PATH, cpu_seconds, family, forwarding, result, served, signed_request, working
from servers import Postgres

CONNECTIONS = 32
WARM_UP = 1.0
"""Seconds at the start that do not count."""
IDLE = 5.0
"""Seconds for which the idle receiver is watched."""
ARRIVED = 30.0
"""Seconds that the last event may take."""

Times = dict[str, float]


class Load:
    """Sends events at a rate, and notes when they were due, acked and there."""

    def __init__(self, port: int, destination: Path, *, rate: int, seconds: float) -> None:
        self._port = port
        self._destination = destination
        self._rate = rate
        self._names = [str(uuid.uuid4()) for _ in range(round(rate * seconds))]
        self._due: dict[str, float] = {}
        self._acked: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self._idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def run(self) -> Times:
        """Return the times in milliseconds."""
        for _ in range(CONNECTIONS):
            self._idle.put_nowait(await asyncio.open_connection("127.0.0.1", self._port))
        watch = asyncio.create_task(self._watch())
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, name in enumerate(self._names):
                due = began + number / self._rate
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                self._due[name] = due
                group.create_task(self._post(name))
        await asyncio.wait_for(watch, ARRIVED)
        while not self._idle.empty():
            self._idle.get_nowait()[1].close()
        counted = self._names[round(self._rate * WARM_UP) :]
        found = {}
        for what, moments in (("ack", self._acked), ("end to end", self._arrived)):
            times = sorted((moments[name] - self._due[name]) * 1000 for name in counted)
            for share in (50, 95, 99):
                found[f"{what} p{share}"] = times[min(len(times) - 1, len(times) * share // 100)]
        return found

    async def _post(self, name: str) -> None:
        reader, writer = await self._idle.get()
        writer.write(signed_request(result(name)))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{PATH} answered {head[:80]!r}")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        self._acked[name] = time.perf_counter()
        self._idle.put_nowait((reader, writer))

    async def _watch(self) -> None:
        """Note when each event's line is in the file."""
        rest = b""
        with self._destination.open("rb") as lines:
            while len(self._arrived) < len(self._names):
                if not (data := lines.read()):
                    await asyncio.sleep(0.001)
                    continue
                now = time.perf_counter()
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    self._arrived.setdefault(orjson.loads(line)["subject"], now)


def measure(url: str, *, rate: int, seconds: float) -> tuple[Times, float]:
    """Return the times of one run, and the idle receiver's CPU as a share of one core."""
    split = url.startswith("postgresql")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = url if split else f"sqlite:///{folder / 'receiver.db'}"
        settings = forwarding(folder, database)
        role = ["--no-worker"] if split else []
        port, web = stack.enter_context(served(folder, "-m", "receiver", "serve", *role, settings=settings))
        processes = family(web)
        if split:
            processes += family(stack.enter_context(working(folder, settings)))
        before = cpu_seconds(processes)
        time.sleep(IDLE)
        idle = (cpu_seconds(processes) - before) / IDLE
        load = Load(port, folder / "events.jsonl", rate=rate, seconds=seconds)
        return asyncio.run(load.run()), idle


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", type=int, default=[200, 500], help="webhooks per second")
    parser.add_argument("--seconds", type=float, default=15, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{options.rounds} rounds of {options.seconds:.0f} s, {os.cpu_count()} cores for everything; "
        "medians of the rounds, in milliseconds; in brackets the worst round\n"
    )
    names = ("ack p50", "ack p99", "end to end p50", "end to end p95", "end to end p99")
    print(f"| Database | webhooks/s | {' | '.join(names)} | idle CPU |")
    print(f"|{'---|' * (len(names) + 3)}")
    with Postgres() as postgres:
        for database in ("PostgreSQL", "SQLite"):
            for rate in options.rates:
                runs = [
                    measure(
                        postgres.url() if database == "PostgreSQL" else "sqlite",
                        rate=rate,
                        seconds=options.seconds,
                    )
                    for _ in range(options.rounds)
                ]
                columns = []
                for name in names:
                    values = [times[name] for times, _ in runs]
                    columns.append(f"{statistics.median(values):.1f} ({max(values):.1f})")
                idle = statistics.median(share for _, share in runs)
                print(f"| {database} | {rate} | {' | '.join(columns)} | {idle:.1%} |", flush=True)


if __name__ == "__main__":
    main()
