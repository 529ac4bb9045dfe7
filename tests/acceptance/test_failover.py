"""Databases that move, or that end sessions, under a running receiver."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import orjson
import pytest
from support.commands import ReceiverProcess, run_command
from support.payloads import body, signed
from support.servers import Postgres, Standby, Switch

RECOVERY = 30.0
"""Seconds after the switch within which everything has to work again.

It takes less than 5 s on an idle machine; a pool that keeps its dead sessions never recovers.
"""


@pytest.fixture
def primary() -> Iterator[Postgres]:
    """A PostgreSQL server that the test may stop."""
    with Postgres() as server:
        yield server


def post(client: httpx.Client, url: str, request_id: str) -> int:
    """Post one authentic webhook without files and return the answer's status."""
    content = body(request_id, payload={"model": "m", "output": {}, "cost": 1})
    return client.post(f"{url}/clipia/webhook", content=content, headers=signed(content)).status_code


def forwarded(file: Path) -> list[str]:
    """Return the request ids that were forwarded."""
    return [orjson.loads(line)["subject"] for line in file.read_bytes().splitlines()] if file.exists() else []


def wait_until(condition: Callable[[], bool], deadline: float, what: str) -> None:
    """Wait until a condition holds, at most until `deadline`."""
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Load:
    """Webhooks without a pause, and the ones that were acked."""

    def __init__(self, url: str) -> None:
        self.acked: set[str] = set()
        self._url = url
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(4)
        self._clients = [self._pool.submit(self._run, number) for number in range(4)]

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=20, verify=False) as client:
            count = 0
            while not self._stop.is_set():
                count += 1
                name = f"load-{number}-{count}"
                if post(client, self._url, name) == 200:
                    self.acked.add(name)
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop; raise an exception of the task."""
        self._stop.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()


@pytest.mark.parametrize("old", ["read-only", "frozen"])
def test_a_failover_needs_no_restart(primary: Postgres, tmp_path: Path, old: str) -> None:
    """C3: if the name moves to another server and old sessions stay open, work goes on and no ack is lost."""
    database_url = primary.url()
    name = database_url.rpartition("/")[2]
    assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": database_url}).returncode == 0
    events = tmp_path / "events.jsonl"
    with Standby(primary) as standby, Switch(primary.port) as switch:
        # With this setting an ack means that the standby has the event, too.
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.sql("SELECT pg_reload_conf()")
        settings = {
            "RECEIVER_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{switch.port}/{name}",
            "RECEIVER_DESTINATION_URL": f"file:{events}",
        }
        with (
            ReceiverProcess(tmp_path, **settings) as receiver,
            httpx.Client(timeout=20, verify=False) as client,
        ):
            load = Load(receiver.url)
            try:
                time.sleep(2)
                wait_until(lambda: bool(forwarded(events)), time.monotonic() + 20, "nothing is forwarded")
                assert client.get(f"{receiver.url}/readyz").status_code == 200
                frozen = primary.processes() if old == "frozen" else []
                if old == "read-only":
                    primary.sql("ALTER SYSTEM SET default_transaction_read_only = on")
                    primary.sql("SELECT pg_reload_conf()")
                for process in frozen:
                    process.suspend()
                standby.promote()
                switch.target = standby.port
                # A silent server is given up only after the statement timeout.
                deadline = time.monotonic() + RECOVERY + (10 if frozen else 0)
                wait_until(
                    lambda: post(client, receiver.url, "after") == 200, deadline, "no webhook is stored"
                )
                wait_until(lambda: "after" in forwarded(events), deadline, "nothing is forwarded")
                wait_until(
                    lambda: client.get(f"{receiver.url}/readyz").status_code == 200,
                    deadline,
                    "it is not ready",
                )
            finally:
                load.stop()
                for process in frozen:
                    process.resume()
            assert len(load.acked) > 50
            found = set(standby.sql("SELECT request_id FROM events", database=name).stdout.split())
            assert load.acked <= found
            # If the answer to a committed claim got lost, the work is free again after its lease of 60 s.
            deadline = time.monotonic() + 90
            wait_until(lambda: load.acked <= set(forwarded(events)), deadline, "an ack is not forwarded")


def test_sessions_that_the_server_ends_fail_no_call(primary: Postgres, tmp_path: Path) -> None:
    """C3: PostgreSQL ends idle sessions all the time, and no call fails because of it."""
    database_url = primary.url()
    name = database_url.rpartition("/")[2]
    assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": database_url}).returncode == 0
    primary.sql(f"ALTER DATABASE {name} SET idle_session_timeout = '200ms'")
    settings = {"RECEIVER_DATABASE_URL": database_url, "RECEIVER_API_TOKENS": "ops:0123456789abcdef"}
    paths = ("/v1/events", "/readyz", "/metrics", "/v1/deliveries/dead")
    statuses: list[tuple[str, int]] = []
    with (
        ReceiverProcess(tmp_path, **settings) as receiver,
        httpx.Client(
            timeout=20, verify=False, headers={"Authorization": "Bearer 0123456789abcdef"}
        ) as client,
    ):
        for number in range(40):
            # Pauses around the limit, so that some statements come just when the server ends the session.
            time.sleep(0.17 + 0.005 * (number % 12))
            statuses.append(("webhook", post(client, receiver.url, f"r-{number}")))
            statuses += [(path, client.get(f"{receiver.url}{path}").status_code) for path in paths]
    assert [each for each in statuses if each[1] >= 500] == []
    assert ("webhook", 200) in statuses
