"""A replay of ten thousand events beside live traffic; the receiver is killed twice meanwhile."""

import asyncio
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nats
from sqlalchemy import insert, update
from support.commands import ReceiverProcess, always
from support.events import plain
from support.kinds_redis_nats import NATS_STREAM, SUBJECT, structured
from support.payloads import signed
from support.servers import Postgres, free_port
from support.servers_redis_nats import Nats

from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, replays
from receiver.ingest import make_event

EVENTS = 10_000
CLIENTS = 3
PACE = 0.1
"""Seconds between the events of a client."""
TOKEN = "0123456789abcdef0123456789abcdef"


class Live:
    """Clients that post events one after the other and go on if the receiver is killed."""

    def __init__(self, port: int) -> None:
        self.acked: set[str] = set()
        self._port = port
        self._stop = threading.Event()

    def run(self, client: int) -> None:
        """Post until stopped."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        number = 0
        while not self._stop.wait(PACE):
            number += 1
            content = plain(f"live-{client}-{number}")
            try:
                connection.request("POST", "/clipia/webhook", content, signed(content))
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            if response.status == 200:
                self.acked.add(f"live-{client}-{number}")
        connection.close()

    def stop(self) -> None:
        """Stop the clients."""
        self._stop.set()


async def add_events(url: str) -> None:
    """Store events like ingest."""
    database = Database(url)
    rows = []
    for number in range(EVENTS):
        event = make_event("clipia", plain(f"old-{number}"), received_at=time.time())
        rows.append(event.columns())
    async with database.write() as connection:
        await connection.execute(insert(events), rows)
    await database.close()


async def end_leases(url: str) -> None:
    """Expire the leases of a killed process, which last a minute."""
    database = Database(url)
    async with database.write() as connection:
        for table in (deliveries, replays):
            await connection.execute(
                update(table).where(table.c.lease.is_not(None)).values(next_attempt_at=db_time(0.0))
            )
    await database.close()


async def read_stream(server: Nats) -> list[dict[str, Any]]:
    """Return all events of the stream, as structured CloudEvents."""
    client = await nats.connect(f"nats://127.0.0.1:{server.port}")
    stream = client.jetstream()
    count = (await client.jsm().stream_info(NATS_STREAM)).state.messages
    subscription = await stream.pull_subscribe(SUBJECT, stream=NATS_STREAM)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        for message in await subscription.fetch(1000, timeout=10):
            found.append(structured(dict(message.headers or {}), message.data))
            await message.ack()
    await client.close()
    return found


def wait_until(condition: Callable[[], Any], *, seconds: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def test_a_replay_beside_live_traffic_makes_each_delivery_once(postgres: Postgres, tmp_path: Path) -> None:
    """E3, E9, E12: each of 10,000 events arrives once more, also at a broker that drops duplicates.

    The receiver is killed twice meanwhile, and live events arrive in time; a repeated order starts no second
    replay.
    """
    url = postgres.url(template="migrated")
    with Nats() as server:
        main = server.url(f"subject={SUBJECT}&stream={NATS_STREAM}")
        (tmp_path / "receiver.toml").write_text(
            f'[[destinations]]\nname = "main"\nurl = "{main}"\n'
            f'[[destinations]]\nname = "archive"\nurl = "file:{tmp_path / "events.jsonl"}"\n'
        )
        port = free_port()
        receiver = ReceiverProcess(
            tmp_path,
            "serve",
            "--port",
            str(port),
            RECEIVER_DATABASE_URL=url,
            RECEIVER_API_TOKENS=f"ops:{TOKEN}:operate",
        )
        receiver.measured = False
        database = url.rpartition("/")[2]

        def count(condition: str) -> int:
            found = postgres.sql(f"SELECT count(*) FROM deliveries WHERE {condition}", database=database)
            return int(found.stdout)

        def has(condition: str, share: float) -> bool:
            return count(condition) >= share * 2 * EVENTS

        def order() -> dict[str, Any]:
            response = httpx.post(
                f"http://127.0.0.1:{port}/v1/replays",
                json={"all": True, "reason": "the consumer lost its data"},
                headers={"authorization": f"Bearer {TOKEN}", "idempotency-key": "once"},
                timeout=20,
            )
            assert response.status_code in {200, 202}, response.text
            found: dict[str, Any] = response.json()
            return found

        asyncio.run(add_events(url))
        live = Live(port)
        with receiver:
            wait_until(lambda: count("state = 'delivered'") == 2 * EVENTS, seconds=180)
            replay = order()
            with ThreadPoolExecutor(CLIENTS) as pool, always(live.stop):
                clients = [pool.submit(live.run, client) for client in range(CLIENTS)]
                done = f"replay_id = '{replay['id']}' AND state = 'delivered'"
                for share in (0.2, 0.6):
                    wait_until(partial(has, done, share), seconds=180)
                    receiver.kill()
                    assert count(done) < 2 * EVENTS, "it was not killed in the middle"
                    asyncio.run(end_leases(url))
                    receiver.start()
                assert order()["id"] == replay["id"]
                wait_until(lambda: count(done) == 2 * EVENTS, seconds=180)
                assert order()["id"] == replay["id"]
                live.stop()
                for client in clients:
                    client.result()
            wait_until(lambda: count("state = 'pending'") == 0, seconds=60)
        found = {
            "main": asyncio.run(read_stream(server)),
            "archive": [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()],
        }

    old = {f"old-{number}" for number in range(EVENTS)}
    for name, messages in found.items():
        copies = Counter((event["subject"], event["deliveryid"], event.get("replayid")) for event in messages)
        replayed = Counter(subject for subject, _, replay_id in copies if replay_id == replay["id"])
        assert replayed == Counter(old), f"{name}: once more each"
        assert Counter(subject for subject, _, replay_id in copies if replay_id is None) == Counter(
            old | {event["subject"] for event in messages}
        ), f"{name}: each once as ever"
        assert live.acked <= {subject for subject, _, _ in copies}, name
        if name == "main":
            assert set(copies.values()) == {1}, "a stream drops a message that a worker sent twice"
    ids = {(event["subject"], event["id"]) for messages in found.values() for event in messages}
    assert len(ids) == len({subject for subject, _ in ids}), "an event keeps its id"
