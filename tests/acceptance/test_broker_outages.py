"""Brokers that freeze and are killed under load, beside a healthy receiver and a healthy destination."""

import asyncio
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.commands import ReceiverProcess
from support.kinds_rabbitmq import drain, open_channel, to_structured
from support.kinds_redis_nats import NATS_STREAM, STREAM, SUBJECT, read_nats, read_redis
from support.payloads import body, signed
from support.servers import Postgres, free_port
from support.servers_rabbitmq import RabbitMq
from support.servers_redis_nats import Broker, Nats, Redis

FROZEN = float(os.environ.get("RECEIVER_TEST_FROZEN_SECONDS", "25"))
"""Seconds for which each broker is stopped with SIGSTOP: longer than the 15 s of a publish."""
KILLS = 10
CLIENTS = 4
PACE = 0.15
"""Seconds between the events of a client."""
QUEUE = "outages"

Server = RabbitMq | Broker


class Brokers:
    """One server of each kind, and the messages that a consumer finds there."""

    def __init__(self, rabbitmq: RabbitMq, redis: Redis, nats: Nats) -> None:
        self.rabbitmq, self.redis, self.nats = rabbitmq, redis, nats

    def configuration(self, folder: Path) -> str:
        """Return a `receiver.toml`: each broker, a routing key without a queue, and a file."""
        urls = {
            "rabbitmq": self.rabbitmq.url(f"?queue={QUEUE}"),
            "redis": self.redis.url(f"stream={STREAM}"),
            "nats": self.nats.url(f"subject={SUBJECT}&stream={NATS_STREAM}"),
            "unrouted": self.rabbitmq.url("?exchange=amq.direct&routing_key=unrouted"),
            "file": f"file:{folder / 'events.jsonl'}",
        }
        return "".join(
            f'[[destinations]]\nname = "{name}"\nurl = "{url}"\nretry = {{ initial = 0.2, cap = 2.0 }}\n\n'
            for name, url in urls.items()
        )

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Return the events that each broker holds; reading those of RabbitMQ removes them."""
        return {
            "rabbitmq": asyncio.run(self._read_rabbitmq()),
            "redis": read_redis(self.redis),
            "nats": asyncio.run(read_nats(self.nats)),
        }

    async def _read_rabbitmq(self) -> list[dict[str, Any]]:
        async with open_channel(self.rabbitmq) as channel:
            return [to_structured(message) for message in await drain(channel, QUEUE)]


@pytest.fixture
def brokers() -> Iterator[Brokers]:
    """Servers that the test may stop and kill."""
    with ExitStack() as stack:
        rabbitmq = stack.enter_context(RabbitMq())
        redis, nats = Redis(), Nats()
        stack.enter_context(redis)
        stack.enter_context(nats)
        yield Brokers(rabbitmq, redis, nats)


class Load:
    """Clients that post events one after the other, and record which were acked and which rejected."""

    def __init__(self, url: str) -> None:
        self.acked: set[str] = set()
        self.rejected: list[int] = []
        self._address = url.removeprefix("http://")
        self._stop = threading.Event()

    def run(self, client: int) -> None:
        """Post until stopped."""
        connection = http.client.HTTPConnection(self._address, timeout=20)
        number = 0
        while not self._stop.wait(PACE):
            number += 1
            request_id = f"outage-{client}-{number}"
            content = body(request_id, payload={"model": "m", "output": {}, "cost": 1})
            connection.request("POST", "/clipia/webhook", content, signed(content))
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                self.acked.add(request_id)
            else:
                self.rejected.append(response.status)
        connection.close()

    def stop(self) -> None:
        """Stop the clients."""
        self._stop.set()


def freeze(server: Server) -> None:
    """Stop a server's execution for a while; its sockets stay open."""
    server.freeze()
    time.sleep(FROZEN)
    server.thaw()


def kill(server: Server) -> None:
    """Kill a server and start it again, several times."""
    chance = random.Random(str(type(server)))
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.2, 1.0))
        server.crash()
        server.start()


def break_all(brokers: Brokers) -> None:
    """Break every broker in both ways: while some are frozen, the others are killed."""
    with ThreadPoolExecutor(3) as pool:

        def plan(server: Server, *steps: Any) -> None:
            for step in steps:
                step(server)

        for done in [
            pool.submit(plan, brokers.rabbitmq, freeze, kill),
            pool.submit(plan, brokers.redis, kill, freeze),
            pool.submit(plan, brokers.nats, kill, freeze),
        ]:
            done.result()


def rows(postgres: Postgres, database: str, sql: str) -> list[list[str]]:
    """Return the rows of a query."""
    return [line.split("|") for line in postgres.sql(sql, database=database).stdout.split()]


def test_broken_brokers_lose_no_event_and_delay_no_other_destination(
    postgres: Postgres, brokers: Brokers, tmp_path: Path
) -> None:
    """E1, E4, E7, T8: with brokers frozen or killed ten times each, under load, all acked events arrive.

    Meanwhile every event is acked and the healthy destination gets it at once. A delivery is marked as
    delivered only if the broker has the event, and never if no queue takes it.
    """
    url = postgres.url(template="migrated")
    database = url.rpartition("/")[2]
    (tmp_path / "receiver.toml").write_text(brokers.configuration(tmp_path))
    receiver = ReceiverProcess(tmp_path, "serve", "--port", str(free_port()), RECEIVER_DATABASE_URL=url)
    receiver.measured = False
    with receiver, ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as ending:
        load = Load(receiver.url)
        ending.callback(load.stop)
        clients = [pool.submit(load.run, client) for client in range(CLIENTS)]
        wait_until(lambda: len(load.acked) > 20, seconds=30)
        brokers.rabbitmq.remember_queues()
        try:
            break_all(brokers)
        finally:
            load.stop()
        for client in clients:
            client.result()
        assert load.rejected == []

        pending = "SELECT count(*) FROM deliveries WHERE state = 'pending' AND destination <> 'unrouted'"
        wait_until(lambda: rows(postgres, database, pending) == [["0"]], seconds=180)
    found = brokers.read()
    found["file"] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    states = rows(postgres, database, "SELECT destination, state, id FROM deliveries")
    for name, events in found.items():
        assert load.acked == {event["subject"] for event in events}, name
        marked = {id_ for destination, _, id_ in states if destination == name}
        assert marked == {event["deliveryid"] for event in events}, name
    assert {state for destination, state, _ in states if destination == "unrouted"} == {"pending"}

    slowest = (
        "SELECT max(extract(epoch FROM finished_at - created_at)) FROM deliveries WHERE destination = 'file'"
    )
    # A publish to a frozen broker takes 15 s.
    assert float(rows(postgres, database, slowest)[0][0]) < 10, "the file waited for a broker"


def wait_until(holds: Any, *, seconds: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.2)
