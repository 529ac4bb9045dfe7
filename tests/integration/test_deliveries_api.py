"""A single delivery over HTTP: attempts, message and end; failures by cause; on both databases."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from cloudevents.core.v1.event import CloudEvent
from support.command_line import Commands
from support.events import World, opened, plain
from support.payloads import SECRET

from receiver.app import create_app
from receiver.core.retry import RetryPolicy
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import attempts, deliveries
from receiver.destinations.base import encode
from receiver.errors import PublishFailed, PublishRejected
from receiver.masking import register_secret
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"


@asynccontextmanager
async def calls(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Open a client of the receiver, as an operator."""
    settings = Settings.load(
        database_url=url, clipia_webhook_secret=SECRET, api_tokens=f"ops:{TOKEN}:operate"
    )
    app = create_app(settings, worker=False)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://receiver", headers=headers
        ) as client:
            yield client


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world with one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main", retry=RetryPolicy(initial=600, cap=600))
        yield made


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of the receiver."""
    async with calls(database_url) as made:
        yield made


async def attempt(world: World, error: Exception | None) -> dict[str, Any]:
    """Attempt the due deliveries once, each with this result; return the last row."""

    def behave(_event: CloudEvent) -> None:
        if error is not None:
            raise error

    world.recorders["main"].behave = behave
    for work in await world.delivery_lane().claim(10):
        await work.run()
    return (await world.rows(deliveries))[-1]


async def test_a_delivery_is_shown_with_answers_and_message(world: World, client: httpx.AsyncClient) -> None:
    """Each attempt has the start of the consumer's answer, and the message is that of the last one."""
    await world.add(plain("r-1"))
    await world.fan_out()
    failed = PublishFailed("answered 503", reason="status", answer='{"error": "busy"}')
    row = await attempt(world, failed)
    await world.change(deliveries, next_attempt_at=db_time(0.0))
    await attempt(world, None)
    shown = (await client.get(f"/v1/deliveries/{row['id']}")).raise_for_status().json()
    assert (shown["state"], shown["request_id"], shown["destination"]) == ("delivered", "r-1", "main")
    assert [(each["outcome"], each["answer"]) for each in shown["attempt_log"]] == [
        ("retry", '{"error": "busy"}'),
        ("succeeded", None),
    ]
    (sent,) = world.recorders["main"].published
    message = (await client.get(f"/v1/deliveries/{row['id']}/message")).raise_for_status()
    assert message.content == encode(sent)
    assert orjson.loads(message.content)["attempt"] == 2
    for path in (f"/v1/deliveries/{uuid.uuid4()}", "/v1/deliveries/x"):
        assert (await client.get(path)).status_code == 404
        assert (await client.get(f"{path}/message")).status_code == 404


async def test_a_delivery_is_discarded_once(world: World, client: httpx.AsyncClient) -> None:
    """E15: a pending or dead delivery is canceled with its masked reason on record, and no other one."""
    secret = "hunter2-hunter2-hunter2"
    register_secret(secret)
    for name in ("pending", "dead", "delivered", "under-way"):
        await world.add(plain(name))
    await world.fan_out()
    rows = dict(zip(("pending", "dead", "delivered", "under-way"), await world.rows(deliveries), strict=True))
    for name in ("dead", "delivered"):
        await world.change(deliveries, deliveries.c.id == rows[name]["id"], state=name, next_attempt_at=None)
    under_way = deliveries.c.id == rows["under-way"]["id"]
    await world.change(deliveries, under_way, lease=uuid.uuid4(), next_attempt_at=db_time(60.0))
    statuses = {}
    for name, row in rows.items():
        response = await client.post(
            f"/v1/deliveries/{row['id']}/discard", json={"reason": f"canceled order {secret}"}
        )
        statuses[name] = response.status_code
    assert statuses == {"pending": 200, "dead": 200, "delivered": 409, "under-way": 409}
    states = [row["state"] for row in await world.rows(deliveries)]
    assert states == ["canceled", "canceled", "delivered", "pending"]
    recorded = [(row["outcome"], row["error"]) for row in await world.rows(attempts)]
    assert recorded == [("canceled", "discarded by ops: canceled order [masked]")] * 2
    again = await client.post(f"/v1/deliveries/{rows['dead']['id']}/discard")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "not_cancelable")
    assert (await client.post(f"/v1/deliveries/{uuid.uuid4()}/discard")).status_code == 404
    # A worker must not send it after all.
    await attempt(world, None)
    assert world.recorders["main"].published == []


async def test_failures_are_grouped_by_cause(world: World, client: httpx.AsyncClient) -> None:
    """Errors that differ in ids are one cause; each group has its size, its times and an example."""
    for number in range(4):
        await world.add(plain(f"r-{number}"))
        await world.fan_out()
        text = f"http://a answered 503 to {uuid.uuid4()}"
        error = PublishRejected("too large", reason="x") if number == 3 else PublishFailed(text, reason="x")
        await attempt(world, error)
    rows = await world.rows(deliveries)
    logged = await world.rows(attempts)
    found = (await client.get("/v1/deliveries/failures")).raise_for_status().json()["data"]
    shown = [(each["destination"], each["state"], each["cause"], each["count"]) for each in found]
    assert shown == [("main", "pending", "answered 503 to …", 3), ("main", "dead", "too large", 1)]
    assert found[0]["example"] == str(rows[0]["id"])
    times = [datetime.fromisoformat(found[0][name]) for name in ("first", "last")]
    assert times == [logged[0]["started_at"], logged[2]["started_at"]]
    other = await client.get("/v1/deliveries/failures", params={"destination": "other"})
    assert other.status_code == 400


async def test_a_group_of_failures_is_listed_and_retried(world: World, client: httpx.AsyncClient) -> None:
    """The deliveries of one cause are listed, and only the dead letters of this cause are retried."""
    for number, reason in enumerate(("no order {}", "no order {}", "too large")):
        await world.add(plain(f"r-{number}"))
        await world.fan_out()
        await attempt(world, PublishRejected(reason.format(uuid.uuid4()), reason="x"))
    for which in ({"cause": "too large"}, {"cause": "too large", "destination": "main"}):
        listed = (await client.get("/v1/deliveries", params=which)).json()["data"]
        assert [row["request_id"] for row in listed] == ["r-2"]
    assert (await client.get("/v1/deliveries", params={"cause": "no order"})).json()["data"] == []
    unknown = await client.post("/v1/deliveries/retry", json={"cause": "no order"})
    assert unknown.json()["restarted"] == {}
    done = await client.post("/v1/deliveries/retry", json={"cause": "no order …"})
    assert done.json()["restarted"] == {"main": 2}
    assert [row["state"] for row in await world.rows(deliveries)] == ["pending", "pending", "dead"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_commands_show_group_and_discard(
    world: World,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,  # noqa: ARG001 - a fixture
) -> None:
    """`deliveries show`, `failures` and `discard ID` are views of the API; a dry run of one is an error."""
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    commands = Commands(world, capsys, monkeypatch)
    await world.add(plain("r-1"))
    await world.fan_out()
    row = await attempt(world, PublishRejected("answered 422", reason="status", answer="no such order"))
    shown = await commands.run("deliveries", "show", str(row["id"]))
    assert "attempt 1" in shown
    assert "answer: no such order" in shown
    message = await commands.run("deliveries", "show", str(row["id"]), "--message")
    assert orjson.loads(message)["data"]["request_id"] == "r-1"
    grouped = await commands.json("deliveries", "failures")
    assert (grouped["data"][0]["count"], grouped["data"][0]["cause"]) == (1, "answered 422")
    command = "$ receiver deliveries retry --destination main --cause 'answered 422'"
    assert command in await commands.run("deliveries", "failures")
    listed = await commands.json("deliveries", "list", "--cause", "answered 422")
    assert [each["id"] for each in listed["data"]] == [str(row["id"])]
    said = await commands.error("deliveries", "retry", "--cause", "another", status=1)
    assert "No dead letter matches." in said
    for option in ("--dry-run", "--dead"):
        said = await commands.error("deliveries", "discard", str(row["id"]), option, status=2)
        assert f"{option} is for the deliveries of a destination" in said
    assert (await world.rows(deliveries))[-1]["state"] == "dead"
    assert await commands.run("deliveries", "discard", str(row["id"]), "--reason", "gone") == "1 discarded\n"
    assert "the delivery is canceled" in await commands.error(
        "deliveries", "discard", str(row["id"]), status=5
    )
    assert "there is no delivery" in await commands.error("deliveries", "show", str(uuid.uuid4()), status=4)
