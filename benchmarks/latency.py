"""Times of an ack, and from a signed POST until its line is in the destination's file, at a fixed rate.

The receiver runs as in production, a web process and a worker on PostgreSQL, or as one process on SQLite; the
worker forwards the same events meanwhile. The client keeps its rate even if answers are slow, and counts from
the moment at which a request was due. Client, servers and database share the machine.

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
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import PATH, cpu_seconds, family, forwarding, result, served, signed_request, working
from support.servers import Postgres

CONNECTIONS = 32
WARM_UP = 1.0
"""Seconds at the start that do not count."""
IDLE = 5.0
"""Seconds for which the idle receiver is watched."""
ARRIVED = 30.0
"""Seconds that the last event may take."""

Times = dict[str, float]


class Connection(asyncio.Protocol):
    """A connection that sends one request after the other."""

    def __init__(self, free: "asyncio.Queue[Connection]") -> None:
        self._free = free
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be there for the first request."""
        self._transport = cast("asyncio.Transport", transport)
        self._free.put_nowait(self)

    def send(self, request: bytes, on_ack: Callable[[], None]) -> None:
        """Send a request; `on_ack` is called with its answer."""
        self._on_ack = on_ack
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Tell of an answer once it is complete."""
        self._answer += data
        head, _, body = self._answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or -1)
        if len(body) != length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            # The connection stays busy, so the load ends with a TimeoutError.
            print(f"{PATH} answered {head[:80]!r}", file=sys.stderr)
            return
        self._answer = b""
        self._on_ack()
        self._free.put_nowait(self)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


class Load:
    """Sends events at a rate, and notes when they were due, acked and there."""

    def __init__(self, port: int, destination: Path, *, rate: int, seconds: float) -> None:
        self._port = port
        self._destination = destination
        self._rate = rate
        # Signed beforehand: if the client signed during the load, it would take CPU time from the receiver.
        self._requests = {
            name: signed_request(result(name))
            for name in (str(uuid.uuid4()) for _ in range(round(rate * seconds)))
        }
        self._due: dict[str, float] = {}
        self._acked: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self._free: asyncio.Queue[Connection] = asyncio.Queue()

    async def run(self) -> Times:
        """Return the times in milliseconds."""
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: Connection(self._free), "127.0.0.1", self._port)
        watch = asyncio.create_task(self._watch())
        began = time.perf_counter()
        for number, (name, request) in enumerate(self._requests.items()):
            due = began + number / self._rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self._due[name] = due
            connection = await asyncio.wait_for(self._free.get(), ARRIVED)
            connection.send(request, partial(self._note_ack, name))
        await asyncio.wait_for(watch, ARRIVED)
        for _ in range(CONNECTIONS):
            (await asyncio.wait_for(self._free.get(), ARRIVED)).close()
        counted = list(self._requests)[round(self._rate * WARM_UP) :]
        found = {}
        for what, moments in (("ack", self._acked), ("end to end", self._arrived)):
            times = sorted((moments[name] - self._due[name]) * 1000 for name in counted)
            for share in (50, 95, 99):
                found[f"{what} p{share}"] = times[min(len(times) - 1, len(times) * share // 100)]
        return found

    def _note_ack(self, name: str) -> None:
        self._acked[name] = time.perf_counter()

    async def _watch(self) -> None:
        """Note when each event's line is in the file."""
        rest = b""
        with self._destination.open("rb") as lines:
            while len(self._arrived) < len(self._requests):
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
        return uvloop.run(load.run()), idle


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
