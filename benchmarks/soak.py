"""The memory of the receiver, and its rate, over a million events that arrive at full speed.

A web process and a worker run on PostgreSQL, as in production; the worker forwards every event to a file.
wrk sends load for a while, the worker catches up, the memory is read; this is repeated until the number of
events is reached. If a stored event is not in the file at the end, the benchmark fails.

    python benchmarks/soak.py --events 1000000

Needs the development dependencies and the Debian packages postgresql and wrk; it starts its servers.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import orjson
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import family, forwarding, run_wrk, served, working
from support.servers import Postgres

CONNECTIONS = 64
MOST = 20_000
"""An upper bound of the requests per second."""
CAUGHT_UP = 600.0
"""Seconds that the worker may take after a round."""


def megabytes(process: psutil.Process) -> str:
    """Return the resident memory of a process and its children."""
    return f"{sum(each.memory_info().rss for each in (process, *process.children())) / 2**20:.0f}"


UNFINISHED = """
    SELECT (SELECT count(*) FROM events WHERE state = 'received')
         + (SELECT count(*) FROM deliveries WHERE state = 'pending')
"""


def main() -> None:
    """Load in rounds and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20, help="of each turn")
    options = parser.parse_args()
    print("| events | webhooks/s | drained with the rest, events/s | web process, MiB | worker, MiB |")
    print("|---|---|---|---|---|")
    with Postgres() as postgres, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = forwarding(folder, postgres.url())
        file = folder / "events.jsonl"
        port, web = stack.enter_context(
            served(folder, "-m", "receiver", "serve", "--no-worker", settings=settings)
        )
        worker = stack.enter_context(working(folder, settings))
        processes = [psutil.Process(web.pid), psutil.Process(worker.pid)]
        print(f"| 0 | | | {' | '.join(map(megabytes, processes))} |", flush=True)
        database = settings["RECEIVER_DATABASE_URL"].rpartition("/")[2]
        stored = 0
        while stored < options.events:
            began = time.monotonic()
            measured = run_wrk(
                port,
                folder,
                connections=CONNECTIONS,
                seconds=options.seconds,
                most=MOST,
                servers=lambda: [*family(web), *family(worker), *postgres.processes()],
            )
            if measured.failed:
                sys.exit(f"{measured.failed} requests failed")
            late = time.monotonic() + CAUGHT_UP
            before, rows = -1, stored
            # If wrk ends with requests under way, they are stored later: wait until the count is stable.
            while rows != before or int(postgres.sql(UNFINISHED, database=database).stdout):
                if time.monotonic() > late:
                    sys.exit("the worker has not caught up")
                time.sleep(0.5)
                before, rows = (
                    rows,
                    int(postgres.sql("SELECT count(*) FROM events", database=database).stdout),
                )
            if not stored + measured.acked <= rows <= stored + measured.acked + CONNECTIONS:
                sys.exit(f"{measured.acked} acked, {rows - stored} stored")
            drained = (rows - stored) / (time.monotonic() - began)
            stored = rows
            memory = " | ".join(map(megabytes, processes))
            print(f"| {stored:,} | {measured.rate:,.0f} | {drained:,.0f} | {memory} |", flush=True)
        with file.open("rb") as lines:
            found = {orjson.loads(line)["subject"] for line in lines}
        if len(found) != stored:
            sys.exit(f"{stored:,} stored, {len(found):,} in the file")


if __name__ == "__main__":
    main()
