"""Confirmed messages per second to each kind of destination: through the outbox, and by its adapter alone.

Both sides publish the same messages with the same client, alternately, in one run. Through the outbox means:
N deliveries are due in a database, and a worker claims, publishes and records each of them. The adapter alone
publishes them from memory, with the same in-flight limit (the destination's own `concurrency`), and writes no
records. SQS is moto, a server in Python that bounds both sides.

    python benchmarks/publish.py --kinds file rabbitmq redis --count 50000 --rounds 3

Needs the development dependencies and the brokers' Debian packages; it starts the servers itself.
"""

import argparse
import asyncio
import platform
import statistics
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from sqlalchemy import insert, select

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import result
from support.kinds import ALL_KINDS
from support.servers import Postgres

from receiver.core.retry import RetryPolicy
from receiver.db import migrate, outbox
from receiver.db.database import Database
from receiver.db.rows import DeliveryClaim, StoredEvent, new_id
from receiver.db.tables import deliveries, events, in_state, is_live
from receiver.destinations import Destination
from receiver.ingest import make_event
from receiver.lanes import envelope
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.fan_out import FanOut
from receiver.lanes.targets import Target
from receiver.lanes.worker import Wakeups, Worker
from receiver.logs import configure_logging
from receiver.process import collect_garbage_less

BATCH = 1000
FEWER = {"sqs": 100}
"""Messages of a round, if the destination is too slow for more."""


def stored(number: int) -> StoredEvent:
    """Return a finished generation."""
    event = make_event("clipia", result(str(uuid.uuid4())), received_at=time.time())
    return StoredEvent(
        seq=number,
        id=event.id,
        source=event.source,
        request_id=event.request_id,
        status="OK",
        body=event.body,
        received_at=datetime.now(UTC),
        job_id=None,
        path_token=None,
    )


async def adapter_alone(destination: Destination, count: int) -> float:
    """Return messages per second from memory."""
    messages = [
        envelope.build(
            DeliveryClaim(
                id=new_id(), lease=uuid.uuid4(), attempt=1, lost=0, age=0.0, event_seq=number, replay_id=None
            ),
            stored(number),
            (),
            None,
        )
        for number in range(count)
    ]
    places = asyncio.Semaphore(destination.concurrency)

    async def publish(number: int) -> None:
        async with places:
            await destination.publish(messages[number])

    began = time.perf_counter()
    await asyncio.gather(*(publish(number) for number in range(count)))
    return count / (time.perf_counter() - began)


async def fill(database: Database, count: int) -> None:
    """Add events with one delivery each that is due."""
    for start in range(0, count, BATCH):
        made = [
            make_event("clipia", result(str(uuid.uuid4())), received_at=time.time())
            for _ in range(min(BATCH, count - start))
        ]
        rows = [event.columns() | {"state": "ready"} for event in made]
        async with database.write() as connection:
            seqs = (await connection.execute(insert(events).returning(events.c.seq), rows)).scalars()
            await outbox.insert_deliveries(connection, [(seq, "bench") for seq in seqs], due=True)


async def through_outbox(database: Database, destination: Destination, count: int) -> float:
    """Return messages per second until the last delivery is on record as delivered."""
    await fill(database, count)
    target = Target(name="bench", destination=destination, waits_for_media=True, retry=RetryPolicy())
    wakeups = Wakeups()
    lane = DeliveryLane(database, target, wake=wakeups.wake)
    worker = Worker(FanOut(database, [target], wake=wakeups.wake), [lane], wakeups)
    began = time.perf_counter()
    task = asyncio.create_task(worker.run())
    waiting = select(deliveries.c.id).where(in_state(deliveries, "pending"), is_live).limit(1)
    while True:
        await asyncio.sleep(0.05)
        async with database.read() as connection:
            if (await connection.execute(waiting)).first() is None:
                break
    rate = count / (time.perf_counter() - began)
    worker.stop()
    await task
    return rate


async def measure(kind: str, url: str, *, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the rates of both sides, measured alternately."""
    alone, through = [], []
    database = Database(url)
    with tempfile.TemporaryDirectory() as folder:
        async with ALL_KINDS[kind](Path(folder)) as place:
            destination = place.open()
            await destination.start()
            await adapter_alone(destination, count // 10)
            for _ in range(rounds):
                alone.append(await adapter_alone(destination, count))
                through.append(await through_outbox(database, destination, count))
            await destination.close()
    await database.close()
    return alone, through


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = [kind for kind in ALL_KINDS if kind != "memory"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--count", type=int, default=5000, help="messages of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{options.count} messages a round (SQS: {FEWER['sqs']}), {options.rounds} rounds; "
        f"Python {platform.python_version()}, PostgreSQL on the same machine; medians, messages per second"
    )
    print("| Destination | adapter alone | through the outbox | ratio | spread of the ratio |")
    print("|---|---|---|---|---|")
    # As in a worker; the adapter alone becomes faster, too.
    collect_garbage_less()
    configure_logging(level="WARNING")
    with Postgres() as server:
        for kind in options.kinds:
            url = server.url()
            asyncio.run(_migrate(url))
            count = min(options.count, FEWER.get(kind, options.count))
            alone, through = uvloop.run(measure(kind, url, count=count, rounds=options.rounds))
            ratios = [ours / bare for ours, bare in zip(through, alone, strict=True)]
            print(
                f"| {kind} | {statistics.median(alone):,.0f} | {statistics.median(through):,.0f} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
                flush=True,
            )


async def _migrate(url: str) -> None:
    database = Database(url)
    await migrate.upgrade(database)
    await database.close()


if __name__ == "__main__":
    main()
