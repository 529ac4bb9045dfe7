"""The record of operators' actions, on both databases."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import update
from starlette.applications import Starlette
from starlette.responses import Response
from structlog.testing import capture_logs
from support.payloads import SECRET
from support.specification import read_specification
from typer.testing import CliRunner

from receiver import masking, retention
from receiver.api.auth import Tokens
from receiver.api.endpoints import Call, Endpoint, guarded, json_response
from receiver.app import create_app
from receiver.cli import app as cli
from receiver.cli import terminal
from receiver.db import audit
from receiver.db.database import Database
from receiver.db.operation_tables import actions
from receiver.errors import RefusedByClipia
from receiver.setting_fields import ApiToken
from receiver.settings import Settings

OPERATOR = "operator-0123456789abcdef"
SUBMITTER = "submitter-0123456789abcdef"
TOKENS = [
    ApiToken(name="ops", token=SecretStr(OPERATOR), scopes=frozenset({"operate"})),
    ApiToken(name="shop", token=SecretStr(SUBMITTER), scopes=frozenset({"read", "submit"})),
]
NOBODY = str(uuid.UUID(int=7))


@asynccontextmanager
async def client_of(app: Starlette, token: str = OPERATOR) -> AsyncIterator[httpx.AsyncClient]:
    """Open a client of an application in this process."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver", headers=headers) as client:
        yield client


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client of a receiver without a worker."""
    settings = Settings.load(
        database_url=database.url,
        clipia_webhook_secret=SECRET,
        api_tokens=TOKENS,
        destinations=[{"name": "orders", "url": "memory:"}],
    )
    app = create_app(settings, worker=False)
    async with app.router.lifespan_context(app), client_of(app) as made:
        yield made


async def recorded(database: Database, **filters: Any) -> list[dict[str, Any]]:
    """Return the actions on record, newest first."""
    async with database.read() as connection:
        return [{**row} for row in await audit.list_actions(connection, limit=100, **filters)]


def facts(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the columns that a call determines, oldest first."""
    names = ("by", "operation", "target", "reason", "dry_run", "status", "code")
    return [tuple(row[name] for name in names) for row in reversed(rows)]


async def test_each_action_is_on_record(client: httpx.AsyncClient, database: Database) -> None:
    """An action leaves author, target, reason and outcome; a read or a job of a caller leaves nothing."""
    for path in ("/v1/events", "/v1/replays", "/v1/status", "/v1/audit"):
        await client.get(path)
    await client.post("/v1/jobs", json={}, headers={"authorization": f"Bearer {SUBMITTER}"})
    await client.post("/v1/jobs", json={})
    await client.post(f"/v1/jobs/{NOBODY}/cancel", params={"reason": " ordered\ntwice "})
    await client.delete("/v1/events/r-1")
    await client.post("/v1/deliveries/retry", json={"all": True}, params={"reason": "orders is back"})
    await client.post("/v1/replays", json={"all": True, "reason": "lost", "dry_run": True})
    ordered = await client.post("/v1/replays", json={"all": True}, params={"reason": "lost"})
    assert ordered.json()["reason"] == "lost"
    assert facts(await recorded(database)) == [
        ("ops", "cancel_job", NOBODY, "ordered twice", False, 404, "not_found"),
        ("ops", "erase_event", "r-1", None, False, 404, "not_found"),
        ("ops", "retry_dead_letters", None, "orders is back", False, 202, None),
        ("ops", "order_replay", None, "lost", True, 200, None),
        ("ops", "order_replay", None, "lost", False, 202, None),
    ]


async def test_a_wrong_reason_stops_the_action(client: httpx.AsyncClient, database: Database) -> None:
    """A reason that is too long or has a NUL is 400, and nothing is done; a secret in a reason is masked."""
    masking.register_secret("hunter2-hunter2-hunter2")
    for wrong in ("x" * 1001, "a\0b"):
        answer = await client.post(f"/v1/jobs/{NOBODY}/cancel", params={"reason": wrong})
        assert answer.status_code == 400
    assert await recorded(database) == []
    await client.post(f"/v1/jobs/{NOBODY}/cancel", params={"reason": "key hunter2-hunter2-hunter2"})
    (row,) = await recorded(database)
    assert row["reason"] == "key [masked]"


async def test_a_secret_in_a_reason_is_stored_nowhere(client: httpx.AsyncClient, database: Database) -> None:
    """A freeze and a replay keep the reason without secrets, too."""
    masking.register_secret("hunter2-hunter2-hunter2")
    body = {"reason": "key hunter2-hunter2-hunter2"}
    frozen = await client.post("/v1/freeze", json=body)
    ordered = await client.post("/v1/replays", json=body | {"all": True})
    assert frozen.json()["reason"] == ordered.json()["reason"] == "key [masked]"
    assert {row["reason"] for row in await recorded(database)} == {"key [masked]"}


async def test_actions_are_listed(client: httpx.AsyncClient) -> None:
    """The list has pages, newest first, and filters by author, operation, target and time."""
    for number in range(3):
        await client.delete(f"/v1/events/r-{number}")
    await client.post(f"/v1/jobs/{NOBODY}/cancel")
    first = (await client.get("/v1/audit", params={"limit": 2})).json()
    rest = (await client.get("/v1/audit", params={"limit": 2, "cursor": first["next"]})).json()
    assert [row["target"] for row in (*first["data"], *rest["data"])] == [NOBODY, "r-2", "r-1", "r-0"]
    assert rest["next"] is None
    for query, number in (
        ({"by": "ops"}, 4),
        ({"by": "shop"}, 0),
        ({"operation": "erase_event"}, 3),
        ({"operation": "erase_event", "target": "r-1"}, 1),
        ({"since": "1h"}, 4),
        ({"until": "1h"}, 0),
    ):
        assert len((await client.get("/v1/audit", params=query)).json()["data"]) == number, query


async def test_the_command_lists_actions(
    client: httpx.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`audit list` prints author, operation, target, outcome and reason, or JSON in the shape of the API."""
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database.url)
    await client.delete("/v1/events/r-1", params={"reason": "a person asked"})
    async with database.write() as connection:
        await audit.begin(connection, by="bob on the command line", operation="cancel_job")

    async def run(*arguments: str) -> str:
        with capture_logs():
            result = await asyncio.to_thread(CliRunner().invoke, cli, ["audit", "list", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    lines = (await run()).splitlines()
    assert "bob on the command line  cancel_job" in lines[1]
    assert lines[2].split()[2:] == ["ops", "erase_event", "r-1", "not_found", "a", "person", "asked"]
    page = json.loads(await run("--json", "--by", "ops"))
    assert [row["target"] for row in page["data"]] == ["r-1"]
    assert "No actions." in await run("--until", "1h")


async def test_an_action_of_a_command_is_on_record(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that acts on this machine's database is recorded with the user's name and the reason."""
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database.url)
    monkeypatch.setenv("USER", "bob")
    for arguments in ("jobs freeze --reason a", "jobs thaw --reason b", "deliveries retry --all --reason c"):
        with capture_logs():
            await asyncio.to_thread(CliRunner().invoke, cli, arguments.split())
    assert [(row["operation"], row["reason"], row["status"]) for row in await recorded(database)] == [
        ("retry_dead_letters", "c", 202),
        ("thaw_submissions", "b", 200),
        ("freeze_submissions", "a", 200),
    ]
    assert {row["by"] for row in await recorded(database)} == {terminal.operator()}


async def test_the_parts_of_an_action_are_one_record(client: httpx.AsyncClient, database: Database) -> None:
    """A call that goes on with an earlier one leaves no record if it succeeds, unless there is no earlier."""
    part = {"all": True, "not_restarted_since": (datetime.now(UTC) - timedelta(hours=1)).isoformat()}
    await client.post("/v1/deliveries/retry", json=part)
    assert len(await recorded(database)) == 1
    for _ in range(3):
        assert (await client.post("/v1/deliveries/retry", json=part)).status_code == 202
    assert len(await recorded(database)) == 1
    await client.post("/v1/deliveries/retry", json=part | {"all": False})
    (failed, _) = await recorded(database)
    assert failed["status"] == 400


async def test_another_action_is_no_part(client: httpx.AsyncClient, database: Database) -> None:
    """A call with other parameters or another reason is on record, even if it claims to go on with a run."""
    retry, prune = "/v1/deliveries/retry", "/v1/prune"
    began = (await client.post(retry, json={"ids": [NOBODY]})).json()["began"]
    one = {"ids": [NOBODY], "not_restarted_since": began}
    before = (await client.post(prune, json={"older_than_days": 90})).json()["before"]
    for path, body, number in (
        (retry, one, 0),
        (retry, one | {"reason": "x"}, 1),
        (retry, one | {"ids": [], "all": True}, 1),
        (retry, one | {"not_restarted_since": "1h"}, 1),
        (prune, {"before": before}, 0),
        (prune, {"before": before, "dry_run": True}, 1),
        (prune, {"before": before, "dead_letters": True}, 1),
        (prune, {"before": before, "dead_letters": True, "next": "records-0"}, 0),
        (prune, {"before": "60d"}, 1),
        ("/v1/recovery", {}, 1),
        ("/v1/recovery", {"cursor": "7"}, 0),
    ):
        known = len(await recorded(database))
        values = {name: value for name, value in body.items() if name != "reason"}
        query = {"reason": body["reason"]} if "reason" in body else {}
        (await client.post(path, json=values, params=query)).raise_for_status()
        assert len(await recorded(database)) == known + number, (path, body)


def make_row(handler: Any) -> Endpoint:
    """Make an action."""
    return Endpoint(
        method="POST",
        path="/v1/things/{id}",
        scope="operate",
        handler=handler,
        name="change_thing",
        summary="Change it",
        answer=None,
        example=None,
    )


async def test_an_outcome_that_cannot_be_recorded_changes_no_answer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code of Clipia's is cut to the column; if the record fails for any reason, the answer stays.

    The log has our words and the exception's class.
    """

    async def change(_call: Call[None, None]) -> Response:
        raise RefusedByClipia("no", code="c" * 64, status=422)

    async def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("a library's text")

    app = Starlette(routes=guarded([make_row(change)], Tokens(TOKENS), database))
    async with client_of(app) as client:
        answer = await client.post("/v1/things/1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "c" * 64)
        (row,) = await recorded(database)
        assert (row["status"], row["code"]) == (422, "c" * 63)
        monkeypatch.setattr(audit, "end", fail)
        with capture_logs() as logs:
            assert (await client.post("/v1/things/1")).status_code == 422
        (logged,) = (each["error"] for each in logs if each["event"].startswith("outcome of an action"))
        assert "ZeroDivisionError" in logged
        assert "library" not in logged


async def test_the_record_is_written_first(database: Database) -> None:
    """The row is committed before the action begins; if the action crashes, it says so."""
    seen = []

    async def change(call: Call[None, None]) -> Response:
        seen.extend(await recorded(database))
        if call.key == "bad":
            raise ZeroDivisionError
        if call.key == "killed":
            raise asyncio.CancelledError
        return json_response({})

    app = Starlette(routes=guarded([make_row(change)], Tokens(TOKENS), database))
    async with client_of(app) as client:
        await client.post("/v1/things/good")
        assert [(row["target"], row["status"]) for row in seen] == [("good", None)]
        assert (await client.post("/v1/things/bad")).status_code == 500
        with pytest.raises(asyncio.CancelledError):
            await client.post("/v1/things/killed")
    assert [(row["target"], row["status"], row["code"]) for row in await recorded(database)] == [
        ("killed", None, None),
        ("bad", 500, "internal_error"),
        ("good", 200, None),
    ]


async def test_without_a_record_nothing_is_done() -> None:
    """If the record cannot be written, the answer is 503 and the action does not begin."""
    done = []

    async def change(call: Call[None, None]) -> Response:
        done.append(call.key)
        return json_response({})

    database = Database("postgresql://nobody@127.0.0.1:1/x")
    async with client_of(Starlette(routes=guarded([make_row(change)], Tokens(TOKENS), database))) as client:
        answer = await client.post("/v1/things/1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert done == []
    await database.close()


def test_each_action_takes_a_reason(tmp_path: Path) -> None:
    """In the specification, each call that acts with the scope `operate` has the parameter `reason`."""
    acting = []
    for path, methods in read_specification(tmp_path)["paths"].items():
        for method, operation in methods.items():
            if operation.get("security") == [{"token": ["operate"]}] and method != "get":
                names = [each["name"] for each in operation["parameters"] if each["in"] == "query"]
                assert names.count("reason") == 1, path
                acting.append(operation["operationId"])
    assert {"cancel_job", "erase_event", "order_replay"} <= {*acting}


async def test_records_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning deletes records of the age of the events, and the newest rows are kept up to a number."""
    async with database.write() as connection:
        first, *_ = [await audit.begin(connection, by="ops", operation="x") for _ in range(3)]
        old = datetime.now(UTC) - timedelta(days=40)
        await connection.execute(update(actions).where(actions.c.id == first).values(at=old))
    for dry_run in (True, False):
        done = await retention.begin(database, older_than=timedelta(days=30))
        *_, last_batch = [each async for each in retention.prune(database, done, dry_run=dry_run)]
        assert last_batch.actions == 1
    assert len(await recorded(database)) == 2
    monkeypatch.setattr(audit, "MAX_ROWS", 2)
    async with database.write() as connection:
        last = await audit.begin(connection, by="ops", operation="x")
    assert [row["id"] for row in await recorded(database)] == [last, last - 1]
