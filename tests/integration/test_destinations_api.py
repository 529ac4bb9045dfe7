"""`/v1/destinations` and `receiver destinations`, on both databases, with real files and servers."""

import asyncio
import json
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from support.events import World, opened, plain
from support.payloads import SECRET

from receiver import destination_control
from receiver.app import create_app
from receiver.cli import main
from receiver.db import audit
from receiver.db import destinations as sql
from receiver.db.database import Database
from receiver.db.destinations import Circuit
from receiver.db.tables import deliveries
from receiver.destination_control import TEST_TYPE
from receiver.settings import Settings

OPERATOR = "operator-0123456789abcdef"
TOKENS = f"ops:{OPERATOR}:read+operate"
Run = Callable[..., Awaitable[str]]


@pytest.fixture
async def world(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Settings with the destinations `orders`, which works, and `mail`, which no server serves; a backlog.

    Each of the two, and the removed destination `old`, has a delivery that waits.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        tmp_path.joinpath("receiver.toml").write_text(
            '[[destinations]]\nname = "orders"\nurl = "file:orders.jsonl"\nfilter.status = "OK"\n'
            f'[[destinations]]\nname = "mail"\nurl = "{url}"\nwhen = "received"\n'
        )
        monkeypatch.setenv("RECEIVER_DATABASE_URL", database.url)
        monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)
        monkeypatch.setenv("RECEIVER_API_TOKENS", TOKENS)
        async with opened(database, tmp_path / "media") as made:
            for name in ("orders", "mail", "old"):
                made.add_destination(name)
            await made.add(plain("r-1"))
            await made.fan_out()
            yield made


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client of a receiver without a worker."""
    settings = Settings.load(database_url=world.database.url)
    app = create_app(settings, worker=False)
    headers = {"authorization": f"Bearer {OPERATOR}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://receiver", headers=headers
        ) as made,
    ):
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process and return its output."""

    async def command(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["receiver", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main)
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, captured
        return captured.out + captured.err

    return command


async def test_a_pause_is_shown_with_its_author_and_the_next_command(
    client: httpx.AsyncClient, world: World
) -> None:
    """A pause and its end are on record; list and status show author, reason, waiting and the command."""
    paused = await client.post("/v1/destinations/orders/pause", json={"reason": "orders\nmoves"})
    assert paused.status_code == 200
    again = await client.post("/v1/destinations/orders/pause", params={"reason": "another"})
    assert again.json()["pause"] == paused.json()["pause"]
    assert (paused.json()["pause"]["by"], paused.json()["pause"]["reason"]) == ("ops", "orders moves")
    rows = {row["name"]: row for row in (await client.get("/v1/destinations")).json()["data"]}
    assert rows["orders"]["pause"] == paused.json()["pause"]
    assert (rows["orders"]["kind"], rows["orders"]["gets"]) == ("file", "status OK")
    assert (rows["mail"]["kind"], rows["mail"]["when"]) == ("http", "received")
    assert {name: row["command"] for name, row in rows.items()} == {
        "orders": "receiver destinations resume orders",
        "mail": None,
        "old": "receiver deliveries move old NEW",
    }
    assert (rows["old"]["configured"], rows["old"]["pending"]) == (False, 1)
    problems = (await client.get("/v1/status")).json()["problems"]
    (problem,) = [each for each in problems if each["text"].startswith("orders")]
    assert problem["command"] == "receiver destinations resume orders"
    assert problem["text"].startswith("orders is paused by ops since 20")
    assert problem["text"].endswith("(orders moves): 1 wait")
    resumed = await client.post("/v1/destinations/orders/resume")
    assert resumed.json()["pause"] is None
    assert (await client.post("/v1/destinations/orders/resume")).status_code == 200
    async with world.database.read() as connection:
        actions = await audit.list_actions(connection, limit=10)
    assert [(each["operation"], each["target"], each["reason"]) for each in reversed(actions)] == [
        ("pause_destination", "orders", "orders moves"),
        ("pause_destination", "orders", "another"),
        ("resume_destination", "orders", None),
        ("resume_destination", "orders", None),
    ]


async def test_an_unknown_destination_is_named_with_the_configured_ones(client: httpx.AsyncClient) -> None:
    """A wrong name is 404 and changes nothing; a pause of a destination removed since can be ended."""
    for verb in ("pause", "resume", "test"):
        answer = await client.post(f"/v1/destinations/old/{verb}")
        assert answer.status_code == 404
        message = "there is no such destination; configured: orders, mail"
        assert answer.json()["error"]["message"] == message


async def test_the_pause_of_a_removed_destination_can_be_ended(
    client: httpx.AsyncClient, world: World
) -> None:
    """A destination that was removed during its pause is listed, and resumed."""
    async with world.database.write() as connection:
        await sql.pause(connection, "gone", by="mia", reason=None)
    rows = {row["name"]: row for row in (await client.get("/v1/destinations")).json()["data"]}
    assert rows["gone"]["command"] == "receiver destinations resume gone"
    resumed = (await client.post("/v1/destinations/gone/resume")).json()
    assert (resumed["configured"], resumed["pause"], resumed["command"]) == (False, None, None)
    assert (await client.post("/v1/destinations/gone/resume")).status_code == 404
    assert "gone" not in (await client.get("/v1/destinations")).text


async def test_a_destination_that_is_down_is_shown_with_its_error(
    client: httpx.AsyncClient, world: World
) -> None:
    """An open circuit of any process is in the list and among the problems, with its time and error."""
    since = datetime(2026, 1, 31, 14, 2, tzinfo=UTC)
    circuit = Circuit(
        destination="mail", process=uuid.uuid4(), owner="web-1:41", open_since=since, error="no answer"
    )
    async with world.database.write() as connection:
        await sql.report(connection, [circuit])
    rows = {row["name"]: row for row in (await client.get("/v1/destinations")).json()["data"]}
    shown = {"since": "2026-01-31T14:02:00+00:00", "processes": ["web-1:41"], "error": "no answer"}
    assert rows["mail"]["circuit"] == shown
    assert rows["mail"]["command"] == "receiver destinations test mail"
    assert rows["orders"]["circuit"] is None
    problems = (await client.get("/v1/status")).json()["problems"]
    assert {
        "text": "mail is down since 14:02:00Z, 1 pending: no answer",
        "command": "receiver destinations test mail",
    } in problems


async def test_a_test_checks_the_connection_and_sends_if_wanted(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """A test sends only with `send`, and names the error of a destination without a server."""
    answer = (await client.post("/v1/destinations/orders/test")).json()
    assert (answer["reachable"], answer["error"], answer["event_id"]) == (True, None, None)
    file = tmp_path / "orders.jsonl"
    assert file.read_text() == ""
    answer = (await client.post("/v1/destinations/orders/test", json={"send": True})).json()
    message = json.loads(file.read_text())
    assert (message["id"], message["type"]) == (answer["event_id"], TEST_TYPE)
    assert message["data"] == {"destination": "orders"}
    answer = (await client.post("/v1/destinations/mail/test", json={"send": True})).json()
    assert (answer["reachable"], answer["event_id"]) == (False, None)
    assert "connection refused" in answer["error"]
    answer = await client.post("/v1/destinations/mail/test", json={"send": "yes"})
    assert answer.status_code == 400


async def test_a_test_ends_even_if_the_server_is_silent(
    client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts the connection and never answers ends the test after its time."""
    monkeypatch.setattr(destination_control, "TEST_SECONDS", 0.3)
    monkeypatch.setattr(destination_control, "CLOSE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        tmp_path.joinpath("receiver.toml").write_text(
            f'[[destinations]]\nname = "silent"\nurl = "amqp://127.0.0.1:{port}/?queue=q"\n'
        )
        app = create_app(Settings.load(), worker=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://receiver", headers=client.headers
            ) as other,
            asyncio.timeout(5.0),
        ):
            answer = (await other.post("/v1/destinations/silent/test")).json()
        assert (answer["reachable"], answer["error"]) == (False, "no answer within 0 s")


async def test_the_commands_show_and_change_destinations(world: World, run: Run) -> None:
    """The commands print the state, a sentence with its command, and exit with 1 if a test fails."""
    found = await run("destinations", "list")
    assert "old is not configured any more: move its deliveries, or discard them" in found
    assert "$ receiver deliveries move old NEW" in found
    found = await run("destinations", "pause", "orders", "--reason", "orders moves")
    assert "orders is paused by " in found
    assert "(orders moves): 1 wait" in found
    rows = json.loads(await run("destinations", "list", "--json"))["data"]
    assert [row["name"] for row in rows if row["pause"]] == ["orders"]
    assert "orders (paused)" in await run("status")
    assert "orders is not paused: 1 delivery is pending" in await run("destinations", "resume", "orders")
    assert "orders: reachable, and confirmed the message " in await run(
        "destinations", "test", "orders", "--send"
    )
    assert "mail: not reachable: " in await run("destinations", "test", "mail", status=1)
    assert "configured: orders, mail" in await run("destinations", "pause", "old", status=4)
    assert await world.states(deliveries) == {"pending": 3}
