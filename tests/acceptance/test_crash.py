"""kill -9 under load, many times: no acked event is lost or stored twice, and every file is whole."""

import asyncio
import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from support.commands import ReceiverProcess, always, command_environment
from support.payloads import body, signed
from support.servers import Postgres, end, free_port, wait_for_port

from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, media

CYCLES = int(os.environ.get("RECEIVER_TEST_KILL_CYCLES", "30"))
CLIENTS = 4


@pytest.fixture
def clipia(tmp_path: Path) -> Iterator[str]:
    """A sandbox process; its CDN serves the files."""
    port = free_port()
    with (tmp_path / "sandbox.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "sandbox", "--port", str(port)],
            env=command_environment(),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    wait_for_port(port, process)
    yield f"http://127.0.0.1:{port}"
    end(process)


class Load:
    """Clients that post events like Clipia: each until it is answered, and each twice in parallel."""

    def __init__(self, clipia: str) -> None:
        self.acked: set[str] = set()
        self.attempted: set[str] = set()
        self.repeated: set[str] = set()
        self.url = ""
        self._image = f"{clipia}/sandbox/sample-image.png"
        self._stop = threading.Event()

    def run(self, client: int) -> None:
        """Post until stopped."""
        number = 0
        address = self.url.removeprefix("http://")
        # http.client: a full client would take more of the processor than the receiver.
        pair = [http.client.HTTPConnection(address, timeout=10) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            while not self._stop.is_set():
                number += 1
                request_id = f"kill-{client}-{number}"
                output = {"images": [{"url": self._image}]} if number % 5 == 0 else {}
                content = body(request_id, payload={"model": "m", "output": output, "cost": 1})
                self.attempted.add(request_id)
                list(pool.map(self._post, pair, [request_id] * 2, [content] * 2))
        for connection in pair:
            connection.close()

    def _post(self, connection: http.client.HTTPConnection, request_id: str, content: bytes) -> None:
        broken = False
        while not self._stop.is_set():
            try:
                connection.request("POST", "/clipia/webhook", content, signed(content))
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                broken = True
                connection.close()
                time.sleep(0.02)
                continue
            if response.status == 200:
                self.acked.add(request_id)
                if broken:
                    self.repeated.add(request_id)
            return

    def stop(self) -> None:
        """Stop the clients."""
        self._stop.set()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_kill_cycles_lose_no_event(
    request: pytest.FixtureRequest, tmp_path: Path, clipia: str, kind: str
) -> None:
    """T1, T2, C5, D10, E3: 30 cycles of kill -9 at a random moment, with the worker embedded."""
    messages = tmp_path / "events.jsonl"
    settings = {"RECEIVER_DESTINATION_URL": f"file:{messages}", "RECEIVER_MEDIA_HOSTS": clipia}
    if kind == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        settings["RECEIVER_DATABASE_URL"] = server.url(template="migrated")
    receiver = ReceiverProcess(tmp_path, "serve", "--port", str(free_port()), **settings)
    receiver.measured = False
    load = Load(clipia)
    chance = random.Random(kind)
    with ThreadPoolExecutor(CLIENTS) as pool, always(load.stop):
        receiver.start()
        load.url = receiver.url
        clients = [pool.submit(load.run, client) for client in range(CLIENTS)]
        for _ in range(CYCLES):
            time.sleep(chance.uniform(0.05, 0.8))
            receiver.kill()
            receiver.start()
        load.stop()
        for client in clients:
            client.result()
    receiver.kill()
    asyncio.run(end_leases(receiver.settings["RECEIVER_DATABASE_URL"]))
    with receiver:
        ledger = asyncio.run(wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"]))
    found = Counter(ledger["request_ids"])
    assert len(load.acked) >= 5 * CYCLES, "too little was acked to prove anything"
    assert load.repeated, "no webhook was sent again after a kill"
    assert load.acked - found.keys() == set()
    assert found.keys() - load.attempted == set()
    assert set(found.values()) == {1}
    for file in ledger["media"]:
        content = Path(file["uri"].removeprefix("file://")).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
    forwarded = Counter(json.loads(line)["subject"] for line in messages.read_text().splitlines())
    assert found.keys() - forwarded.keys() == set()
    temporary = [path for path in (tmp_path / "media").rglob("*") if path.is_file() and path.suffix != ".png"]
    print(  # noqa: T201 - the figures that the documentation quotes
        f"{kind}: {CYCLES} kills, {len(load.acked)} acked, 0 lost, {sum(forwarded.values()) - len(found)} "
        f"forwarded twice, {len(ledger['media'])} files whole, {len(temporary)} temporary files left"
    )


async def end_leases(url: str) -> None:
    """Expire the leases of the killed processes now; this would take a minute."""
    database = Database(url)
    async with database.write() as connection:
        for table in (media, deliveries):
            await connection.execute(
                update(table).where(table.c.lease.is_not(None)).values(next_attempt_at=db_time(0.0))
            )
    await database.close()


async def wait_until_done(url: str) -> dict[str, Any]:
    """Wait until no work is pending, and return all rows."""
    database = Database(url)
    received = select(func.count()).select_from(events).where(events.c.state == "received")
    pending = select(func.count()).select_from(deliveries).where(deliveries.c.state == "pending")
    deadline = time.monotonic() + 180
    left = [1]
    while any(left):
        assert time.monotonic() < deadline, f"still pending: {left}"
        await asyncio.sleep(0.2)
        async with database.read() as connection:
            left = [(await connection.execute(query)).scalar_one() for query in (received, pending)]
    async with database.read() as connection:
        files = await connection.execute(select(media.c.uri, media.c.size, media.c.sha256, media.c.state))
        found = [dict(row) for row in files.mappings()]
        ids = (await connection.execute(select(events.c.request_id))).scalars().all()
    await database.close()
    assert {file["state"] for file in found} == {"stored"}
    return {"request_ids": ids, "media": found}
