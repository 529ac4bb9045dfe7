"""Latency of live events while another broker is frozen, and beside a replay.

One receiver on PostgreSQL forwards events that come in at a steady rate to RabbitMQ, Redis and a file. A
round has three phases: quiet; RabbitMQ stopped with SIGSTOP; a replay of the whole history to Redis and the
file. The time of an event is from its receipt to the record of its delivery, by the database's clock.

    python benchmarks/isolation.py --seconds 60 --rounds 3 --replayed 10000

Needs the development dependencies and the Debian packages of the servers; it starts them itself.
"""

import argparse
import asyncio
import http
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.commands import ReceiverProcess, run_command
from support.payloads import body, signed
from support.servers import Postgres, free_port
from support.servers_rabbitmq import RabbitMq
from support.servers_redis_nats import Redis

from receiver.db.database import Database
from receiver.db.tables import events
from receiver.ingest import make_event

CLIENTS = 5
MEASURED = ("redis", "file")
TOKEN = "0123456789abcdef0123456789abcdef"


def result(request_id: str) -> bytes:
    """Return a finished generation without files."""
    return body(request_id, payload={"model": "m", "output": {}, "cost": 1})


class Run:
    """A receiver, its destinations, and the measured ones among them."""

    def __init__(self, folder: Path, postgres: Postgres, rabbitmq: RabbitMq, redis: Redis) -> None:
        url = postgres.url()
        self._postgres, self._database = postgres, url.rpartition("/")[2]
        assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": url}).returncode == 0
        destinations = {
            "rabbitmq": rabbitmq.url("?queue=bench"),
            "redis": redis.url("stream=bench"),
            "file": f"file:{folder / 'events.jsonl'}",
        }
        (folder / "receiver.toml").write_text(
            "".join(
                f'[[destinations]]\nname = "{name}"\nurl = "{url}"\n' for name, url in destinations.items()
            )
        )
        self.url = url
        self.port = free_port()
        self.receiver = ReceiverProcess(
            folder,
            "serve",
            "--port",
            str(self.port),
            RECEIVER_DATABASE_URL=url,
            RECEIVER_API_TOKENS=f"bench:{TOKEN}",
        )

    def query(self, sql: str) -> list[str]:
        """Return the lines that a query finds."""
        return self._postgres.sql(sql, database=self._database).stdout.split()

    async def add_history(self, count: int) -> None:
        """Store events that are still to be forwarded."""
        database = Database(self.url)
        rows = []
        for number in range(count):
            event = make_event("clipia", result(f"old-{number}"), received_at=time.time())
            rows.append(event.columns())
        async with database.write() as connection:
            await connection.execute(insert(events), rows)
        await database.close()

    def settle(self) -> None:
        """Wait until no delivery is pending."""
        while self.query("SELECT 1 FROM events WHERE state = 'received' LIMIT 1") or self.query(
            "SELECT 1 FROM deliveries WHERE state = 'pending' LIMIT 1"
        ):
            time.sleep(0.5)

    @contextmanager
    def load(self, label: str, rate: float) -> Iterator[None]:
        """Post `rate` events a second inside the block."""
        stop = threading.Event()

        def run(client: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            number = 0
            while not stop.wait(CLIENTS / rate):
                number += 1
                content = result(f"{label}-{client}-{number}")
                connection.request("POST", "/clipia/webhook", content, signed(content))
                response = connection.getresponse()
                response.read()
                assert response.status == http.HTTPStatus.OK, response.status
            connection.close()

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(run, client) for client in range(CLIENTS)]
            try:
                yield
            finally:
                stop.set()
            for client in clients:
                client.result()

    def order_replay(self) -> str:
        """Order a replay of the history to the measured destinations; return its id."""
        response = httpx.post(
            f"http://127.0.0.1:{self.port}/v1/replays",
            json={"all": True, "to": list(MEASURED), "reason": "benchmark"},
            headers={"authorization": f"Bearer {TOKEN}", "idempotency-key": str(uuid4())},
        )
        return str(response.raise_for_status().json()["id"])

    def replay(self) -> tuple[int, float]:
        """Order a replay and wait until it is done; return its deliveries and the seconds it took."""
        began = time.monotonic()
        replay_id = self.order_replay()
        while not self.query(f"SELECT 1 FROM replays WHERE id = '{replay_id}' AND state = 'completed'"):
            time.sleep(0.2)
        mine = f"FROM deliveries WHERE replay_id = '{replay_id}'"
        while self.query(f"SELECT 1 {mine} AND state = 'pending' LIMIT 1"):
            time.sleep(0.2)
        seconds = time.monotonic() - began
        return int(self.query(f"SELECT count(*) {mine}")[0]), seconds

    def latencies(self, label: str) -> dict[str, list[float]]:
        """Return the milliseconds of each live event of a phase, by destination."""
        lines = self.query(
            "SELECT destination || ',' || extract(epoch FROM d.finished_at - e.received_at) * 1000 "
            "FROM deliveries d JOIN events e ON e.seq = d.event_seq "
            f"WHERE e.request_id LIKE '{label}-%' AND d.replay_id IS NULL AND d.state = 'delivered'"
        )
        found = defaultdict(list)
        for line in lines:
            destination, value = line.split(",")
            found[destination].append(float(value))
        return found


def measure(
    run: Run, rabbitmq: RabbitMq, options: argparse.Namespace
) -> list[dict[str, dict[str, list[float]]]]:
    """Return for each round the latencies by phase and destination."""
    rounds = []
    for number in range(options.rounds):
        with run.load(f"quiet{number}", options.rate):
            time.sleep(options.seconds)
        run.settle()
        rabbitmq.freeze()
        with run.load(f"frozen{number}", options.rate):
            time.sleep(options.seconds)
        rabbitmq.thaw()
        run.settle()
        with run.load(f"replay{number}", options.rate):
            count, seconds = run.replay()
        print(f"round {number + 1}: {count} replayed deliveries in {seconds:.0f} s", flush=True)
        run.settle()
        rounds.append({phase: run.latencies(f"{phase}{number}") for phase in ("quiet", "frozen", "replay")})
    return rounds


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of the quiet and the frozen phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=50, help="events per second")
    parser.add_argument("--replayed", type=int, default=10_000, help="events of the history")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Postgres() as postgres,
        RabbitMq() as rabbitmq,
        Redis() as redis,
    ):
        run = Run(Path(folder), postgres, rabbitmq, redis)
        asyncio.run(run.add_history(options.replayed))
        with run.receiver:
            run.settle()
            rounds = measure(run, rabbitmq, options)
    print("| Destination | phase | p50 ms | p95 ms | p95 to quiet | spread |")
    print("|---|---|---|---|---|---|")
    for destination in MEASURED:
        for phase in ("quiet", "frozen", "replay"):
            found = [each[phase][destination] for each in rounds]
            ratios = [p95(each[phase][destination]) / p95(each["quiet"][destination]) for each in rounds]
            print(
                f"| {destination} | {phase} | {statistics.median(map(statistics.median, found)):.1f} "
                f"| {statistics.median(map(p95, found)):.1f} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
            )


if __name__ == "__main__":
    main()
