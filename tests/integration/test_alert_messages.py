"""Alerts through the database: conditions, messages, a broker that dies, and processes that are killed."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from sqlalchemy import func, select, update
from support.events import Recorder, World, insert_event, opened, plain, running, until
from support.payloads import SECRET, failure
from support.servers_redis_nats import Redis

from receiver import alerts, disks
from receiver.app import create_app
from receiver.core import alerting
from receiver.core.retry import RetryPolicy
from receiver.db import alerts as sql
from receiver.db import destinations, retention_runs, submission_freezes
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.destinations import Circuit
from receiver.db.operation_tables import alert_messages
from receiver.db.operation_tables import alerts as alerts_table
from receiver.db.rejections import NewRejection
from receiver.db.rejections import insert as insert_rejections
from receiver.db.retention_runs import Plan
from receiver.db.rows import new_id
from receiver.db.tables import deliveries, events, probes
from receiver.destinations import Destination, open_for_work
from receiver.disks import DiskStatus
from receiver.errors import PublishFailed, PublishRejected
from receiver.ingest import make_event
from receiver.lanes.alerts import AlertLane
from receiver.lanes.fan_out import FanOut
from receiver.lanes.worker import Wakeups, Worker
from receiver.process import running_worker
from receiver.settings import Settings
from receiver.submitter import Submitter

RETRY = RetryPolicy(initial=0.05, cap=0.1)
KILLED = """
import asyncio, os, signal, sys
from datetime import timedelta
from receiver import alerts
from receiver.core import alerting
from receiver.core.lane_names import wake_no_lane
from receiver.db.database import Database
from receiver.destinations import open_for_work
from receiver.lanes.alerts import AlertLane
from receiver.settings import Settings

async def main():
    alerting.GATHER, alerts.ROUND_SECONDS = timedelta(0), 0.0
    settings = Settings.load()
    database = Database(settings.database_url.get_secret_value())
    assert await alerts.run_round(settings, database) == ["alerts:ops"]
    if sys.argv[1] == "claimed":
        lane = AlertLane(database, "ops", open_for_work(settings.alert_destinations[0]), wake=wake_no_lane)
        lane.lease_seconds = 0.5
        assert len(await lane.claim(10)) == 1
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alerts are told in the round that finds them, and each round is a turn."""
    monkeypatch.setattr(alerting, "GATHER", timedelta(0))
    monkeypatch.setattr(alerting, "QUIET", timedelta(microseconds=1))
    monkeypatch.setattr(alerts, "ROUND_SECONDS", 0.0)


def make_settings(database_url: str, *tables: dict[str, Any]) -> Settings:
    """Return the settings of a receiver; by default `ops` takes alerts alone, and `orders` events."""
    ops = {"name": "ops", "url": "memory:", "alerts": "only"}
    found = tables or ({"name": "orders", "url": "memory:"}, ops)
    return Settings.load(database_url=database_url, clipia_webhook_secret=SECRET, destinations=found)


async def freeze(database: Database) -> None:
    """Freeze submissions."""
    async with database.write() as connection:
        await submission_freezes.freeze(connection, by="ops", reason="a test", restored=False)


async def thaw(database: Database) -> None:
    """End the freeze."""
    async with database.write() as connection:
        await submission_freezes.thaw(connection, key_holds=1.0, error="{}")


async def messages(database: Database, destination: str = "ops") -> list[tuple[str, str]]:
    """Return the types and subjects of the messages that wait."""
    query = select(alert_messages.c.message).where(alert_messages.c.destination == destination)
    async with database.read() as connection:
        found = (await connection.execute(query.order_by(alert_messages.c.id))).scalars().all()
    return [(each["type"].rpartition(".")[2], each["subject"]) for each in found]


async def count_messages(database: Database) -> int:
    """Return the number of messages that wait."""
    async with database.read() as connection:
        counted = select(func.count()).select_from(alert_messages)
        return int((await connection.execute(counted)).scalar_one())


@asynccontextmanager
async def sending(database: Database, to: dict[str, Destination]) -> AsyncIterator[None]:
    """Run a worker that sends alerts."""
    wakeups = Wakeups()
    lanes = [AlertLane(database, name, each, wake=wakeups.wake, retry=RETRY) for name, each in to.items()]
    async with running(Worker(FanOut(database, [], wake=wakeups.wake), lanes, wakeups)):
        yield


async def add_rejections(database: Database, number: int) -> None:
    """Record requests with wrong signatures."""
    row = NewRejection(
        received_at=datetime.now(UTC),
        source="clipia",
        reason="mismatch",
        cause="unknown_secret",
        diagnosis="forged or foreign",
        path="/clipia/webhook",
        peer=None,
        headers=[],
        body_size=2,
        size=2,
        body=b"{}",
    )
    async with database.write() as connection:
        await insert_rejections(connection, [row] * number)


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """A database with two events that were delivered to `orders`."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("orders")
        await made.add_history(plain("r-1"), failure("r-2"))
        # Shortly before a secret is rotated wrongly, webhooks are accepted.
        await made.change(events, received_at=db_time(-60.0))
        yield made


async def test_each_condition_in_rows_is_an_alert(world: World) -> None:
    """Rows of each condition raise its alert once, and their end resolves it."""
    database, settings = world.database, make_settings(world.database.url)
    await alerts.run_round(settings, database)
    assert await messages(database) == []
    opened_circuit = Circuit(
        destination="orders",
        process=new_id(),
        owner="web-1",
        open_since=datetime.now(UTC),
        error=None,
    )
    await world.change(deliveries, state="dead", error="refused")
    await freeze(database)
    await add_rejections(database, 3)
    async with database.write() as connection:
        await destinations.report(connection, [opened_circuit])
        plan, before = Plan(older_than_days=90), datetime.now(UTC)
        run = await retention_runs.begin(connection, plan, by="ops", host="web-1", before=before)
        await retention_runs.fail_part(connection, run, "the storage is away")
    for _ in range(3):
        await alerts.run_round(settings, database)
    kinds = ("dead_letters/orders", "destination_down/orders", "retention_failed/prune")
    expected = sorted((*kinds, "secret_mismatch/clipia", "submissions_paused/freeze"))
    assert sorted(await messages(database)) == [("raised", each) for each in expected]
    async with database.read() as connection:
        (dead,) = await sql.list_alerts(connection, limit=9, kind="dead_letters")
    assert (dead["count"], len(dead["examples"]), dead["state"]) == (2, 2, "open")

    await thaw(database)
    await world.change(deliveries, state="delivered", error=None)
    await world.add(plain("r-3"))  # its signature was right
    async with database.write() as connection:
        await destinations.withdraw(connection, opened_circuit.process, ["orders"])
        run = await retention_runs.begin(connection, plan, by="ops", host="web-1", before=before)
        await retention_runs.add_part(connection, run, counts={"events": 1}, is_last=True)
    for _ in range(3):
        await alerts.run_round(settings, database)
    assert sorted(await messages(database))[5:] == [("resolved", each) for each in expected]
    async with database.read() as connection:
        assert await sql.list_alerts(connection, limit=9, state="open") == []


async def test_a_disk_of_each_process_is_watched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose turn it is not records its own disk, and the next turn tells it."""
    monkeypatch.setattr(alerts, "LEAST_FREE_SHARE", 1.1)
    settings = make_settings(world.database.url)
    monkeypatch.setattr(alerts, "ROUND_SECONDS", 1000.0)
    assert await alerts.run_round(settings, world.database) == ["alerts:ops"]
    first = await messages(world.database)
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    assert await alerts.run_round(settings, world.database) == []
    async with world.database.read() as connection:
        rows = await sql.list_alerts(connection, limit=9)
    assert len(rows) == 2 * len(first)
    assert {row["alert"] for row in rows} == {"disk_nearly_full"}


async def test_a_disk_that_does_not_answer_resolves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alert of a full disk stays open while the disk hangs."""
    settings, silent = make_settings(world.database.url), list[DiskStatus]()
    with monkeypatch.context() as full:
        full.setattr(alerts, "LEAST_FREE_SHARE", 1.1)
        await alerts.run_round(settings, world.database)
        for disk in await disks.read_disks(settings, world.database):
            silent.append({**disk, "free_bytes": None, "total_bytes": None})

    async def read_disks(_settings: Settings, _database: Database) -> list[DiskStatus]:
        return silent

    monkeypatch.setattr(alerts, "read_disks", read_disks)
    monkeypatch.setattr(alerting, "QUIET", timedelta(microseconds=1))
    await alerts.run_round(settings, world.database)
    async with world.database.read() as connection:
        rows = await sql.list_alerts(connection, limit=9)
    assert rows
    assert {row["state"] for row in rows} == {"open"}


async def test_two_workers_write_one_message(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that run their rounds at the same time, one writes the message of an alert."""
    settings, load = make_settings(database.url), sql.load

    async def load_slowly(connection: SqlConnection) -> Any:
        found = await load(connection)
        await asyncio.sleep(0.05)  # the others reach this point, unless a lock holds them
        return found

    monkeypatch.setattr(sql, "load", load_slowly)
    await freeze(database)
    others = [Database(database.url) for _ in range(3)]
    for _ in range(2):
        await asyncio.gather(*(alerts.run_round(settings, each) for each in (database, *others)))
    assert await messages(database) == [("raised", "submissions_paused/freeze")]
    for each in others:
        await each.close()


async def test_an_alert_outlives_the_downtime_of_all_workers(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time without a round an alert is open until rounds have missed its condition for a minute."""
    monkeypatch.setattr(alerting, "QUIET", timedelta(seconds=60))
    settings = make_settings(database.url)
    await freeze(database)
    await alerts.run_round(settings, database)
    await thaw(database)

    async def go_back(*names: str) -> None:
        """Let all workers have been away for two minutes."""
        async with database.write() as connection:
            await connection.execute(update(alerts_table).values(seen_at=db_time(-120.0)))
            rows = update(probes).where(probes.c.name.in_(names))
            await connection.execute(rows.values(at=db_time(-120.0)))

    raised = ("raised", "submissions_paused/freeze")
    await go_back("alerts", "alerts_since")
    for _ in range(2):
        await alerts.run_round(settings, database)
        assert await messages(database) == [raised]
    await go_back("alerts_since")
    await alerts.run_round(settings, database)
    assert await messages(database) == [raised, ("resolved", "submissions_paused/freeze")]


async def test_a_broker_that_dies_loses_no_alert(tmp_path: Path, migrated_sqlite: Path) -> None:
    """While the broker is down alerts are raised and resolved; when it is back it gets each message."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{path}")
    with Redis() as server:
        table = {"name": "orders", "url": server.url("stream=events"), "alerts": True}
        settings = make_settings(database.url, table)
        (marked,) = settings.alert_destinations
        destination = open_for_work(marked)
        async with sending(database, {"orders": destination}):
            await freeze(database)
            await alerts.run_round(settings, database)
            await until(lambda: _is_empty(database))
            server.crash()
            await thaw(database)
            await alerts.run_round(settings, database)
            await freeze(database)
            await until(lambda: _has_failed(database))
            assert await messages(database, "orders") == [("resolved", "submissions_paused/freeze")]
            server.start()
            await until(lambda: _is_empty(database))
        await destination.close()
        client = redis.asyncio.Redis(port=server.port)
        rows: Any = await client.xrange("events")
        entries = [json.loads(fields[b"event"]) for _, fields in rows]
        await client.aclose()
    types = [each["type"] for each in entries]
    assert sorted({*types}) == sorted(alerts.TYPES.values())
    assert len({each["id"] for each in entries}) == 2
    assert len({each["data"]["id"] for each in entries}) == 1
    await database.close()


async def _is_empty(database: Database) -> bool:
    return await count_messages(database) == 0


async def _has_failed(database: Database) -> bool:
    """Return whether the message that waits has been attempted twice."""
    async with database.read() as connection:
        attempts = (await connection.execute(select(alert_messages.c.attempts))).scalars().all()
    return any(number >= 2 for number in attempts)


@pytest.mark.parametrize("when", ["written", "claimed"])
def test_a_killed_process_loses_no_alert(when: str, tmp_path: Path, migrated_sqlite: Path) -> None:
    """If the process is killed after it wrote or claimed a message, another one sends it."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    tmp_path.joinpath("receiver.toml").write_text(
        '[[destinations]]\nname = "ops"\nurl = "file:alerts.jsonl"\nalerts = "only"\n'
    )
    url = f"sqlite:///{path}"

    async def go_on() -> list[str]:
        database = Database(url)
        await freeze(database)
        killed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", KILLED, when],
            cwd=tmp_path,
            env={"RECEIVER_DATABASE_URL": url, "CLIPIA_WEBHOOK_SECRET": SECRET},
            timeout=60,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        recorder = Recorder()
        async with sending(database, {"ops": recorder}):
            await until(lambda: _is_empty(database))
        await database.close()
        return recorder.subjects

    assert asyncio.run(go_on()) == ["submissions_paused/freeze"]


async def test_a_rejected_alert_is_tried_again(database: Database) -> None:
    """A destination that rejects a message and is repaired gets it, with the same id."""
    settings = make_settings(database.url)
    await freeze(database)
    await alerts.run_round(settings, database)
    recorder = Recorder()
    seen = []

    def reject_twice(event: Any) -> None:
        seen.append(event.get_id())
        if len(seen) < 3:
            raise PublishRejected("no queue", reason="rejected")

    recorder.behave = reject_twice
    async with sending(database, {"ops": recorder}):
        await until(lambda: _is_empty(database))
    assert len(seen) == 3
    assert len({*seen}) == 1


async def test_resolved_does_not_overtake_raised(database: Database) -> None:
    """While `raised` fails, `resolved` of the same alert waits, and that of no other destination does."""
    settings = make_settings(
        database.url, *({"name": name, "url": "memory:", "alerts": "only"} for name in ("ops", "mail"))
    )
    await freeze(database)
    await alerts.run_round(settings, database)
    await thaw(database)
    await alerts.run_round(settings, database)
    recorders = {"ops": Recorder(), "mail": Recorder()}
    failures: list[str] = []

    def fail_early(event: Any) -> None:
        is_early = len(failures) < 2 or len(recorders["mail"].published) < 2
        if event.get_type() == alerts.TYPES["raised"] and is_early:
            failures.append(event.get_id())
            raise PublishFailed("down", reason="connection")

    recorders["ops"].behave = fail_early
    async with sending(database, {**recorders}):
        await until(lambda: _is_empty(database))
    assert len(failures) >= 2
    for recorder in recorders.values():
        assert [each.get_type() for each in recorder.published] == list(alerts.TYPES.values())


async def test_messages_for_a_destination_that_is_away_do_not_pile_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later message about an open alert takes the place of one that was not sent."""
    monkeypatch.setattr(alerting, "LIMIT", timedelta(0))
    settings = make_settings(world.database.url)
    for number in (1, 2):
        await world.change(
            deliveries, deliveries.c.event_seq == number, state="dead", finished_at=db_time(0.0)
        )
        await alerts.run_round(settings, world.database)
    async with world.database.read() as connection:
        (found,) = (await connection.execute(select(alert_messages.c.message))).scalars()
    assert found["data"]["count"] == 2


async def test_old_rows_are_deleted(database: Database) -> None:
    """Alerts that were resolved a month ago are deleted, and messages that no lane has taken for days."""
    settings = make_settings(database.url)
    await freeze(database)
    await alerts.run_round(settings, database)
    await thaw(database)
    await alerts.run_round(settings, database)
    assert len(await messages(database)) == 2
    async with database.write() as connection:
        await connection.execute(update(alerts_table).values(resolved_at=db_time(-31 * 86_400.0)))
        first = select(alert_messages.c.id).order_by(alert_messages.c.id).limit(1).scalar_subquery()
        late = update(alert_messages).where(alert_messages.c.id == first)
        await connection.execute(late.values(created_at=db_time(-4 * 86_400.0)))
    await alerts.run_round(settings, database)
    assert await messages(database) == [("resolved", "submissions_paused/freeze")]
    async with database.read() as connection:
        assert await sql.list_alerts(connection, limit=9) == []


async def test_destinations_of_alerts_get_alerts_alone(
    tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `alerts = "only"` a destination gets alerts and no event, with `true` both, by default events."""
    monkeypatch.setattr(alerts, "ROUND_SECONDS", 0.2)
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    tables: list[dict[str, Any]] = [
        {"name": name, "url": f"file:{tmp_path / name}", "when": "received", **more}
        for name, more in (("events", {}), ("both", {"alerts": True}), ("ops", {"alerts": "only"}))
    ]
    settings = make_settings(f"sqlite:///{path}", *tables)
    database = Database(f"sqlite:///{path}")
    await freeze(database)
    async with database.write() as connection:
        await insert_event(connection, make_event("clipia", failure("r-1"), received_at=0.0))
    submitter = Submitter.configured(settings, database)

    async def found() -> dict[str, set[str]] | None:
        lines = {
            name: {json.loads(line)["type"].rpartition(".")[2] for line in open_lines(tmp_path / name)}
            for name in ("events", "both", "ops")
        }
        wanted = {"events": {"failed"}, "both": {"failed", "raised"}, "ops": {"raised"}}
        return lines if lines == wanted else None

    async with running_worker(settings, database, Wakeups(), submitter) as worker:
        assert {"alerts:both", "alerts:ops"} <= {*worker.lanes}
        assert "destination:ops" not in worker.lanes
        await until(found)
        tables[1]["alerts"] = False

        async def fail() -> None:
            raise RuntimeError("the library fails to close")

        # An error of the old destination does not stop the reload.
        monkeypatch.setattr(worker.live.targets[1].destination, "close", fail)
        await worker.replace(make_settings(f"sqlite:///{path}", *tables[:2]))
        assert [lane for lane in worker.lanes if ":" in lane] == ["destination:events", "destination:both"]
        assert settings.alert_destinations == ()
    await submitter.close()
    await database.close()


async def test_a_destination_of_alerts_is_listed_and_tested(migrated_sqlite: Path, tmp_path: Path) -> None:
    """It is listed with its messages in words, it can be tested, and a pause says that it stops no alert."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    token = "operator-0123456789abcdef"
    tables: list[dict[str, Any]] = [
        {"name": name, "url": f"file:{tmp_path / name}", **more}
        for name, more in (("events", {}), ("both", {"alerts": True}), ("ops", {"alerts": "only"}))
    ]
    settings = make_settings(f"sqlite:///{path}", *tables).model_copy(
        update={"api_tokens": Settings.load(api_tokens=f"ops:{token}:read+operate").api_tokens}
    )
    app = create_app(settings, worker=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://receiver",
            headers={"authorization": f"Bearer {token}"},
        ) as client,
    ):
        rows = (await client.get("/v1/destinations")).json()["data"]
        assert {row["name"]: row["gets"] for row in rows} == {
            "both": "every event, and alerts",
            "events": "every event",
            "ops": "alerts alone",
        }
        tested = await client.post("/v1/destinations/ops/test", json={"send": True})
        assert tested.json()["reachable"] is True
        paused = await client.post("/v1/destinations/ops/pause")
        assert (paused.status_code, "no pause stops" in paused.text) == (400, True)


def open_lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it is missing."""
    return path.read_text().splitlines() if path.exists() else []
