"""`X-Request-Id` of the internal API."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import structlog
from structlog.testing import LogCapture
from support.payloads import SECRET

from receiver.app import create_app
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"
PATHS = ("/v1/events", "/v1/absent", "/v1/jobs/x/cancel", "/metrics", "/livez", "/docs", "/openapi.json")


@pytest.fixture
async def client(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a receiver."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    settings = Settings.load(
        database_url=f"sqlite:///{path}", clipia_webhook_secret=SECRET, api_tokens=f"ops:{TOKEN}:operate"
    )
    app = create_app(settings, worker=False)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://receiver") as made,
    ):
        yield made


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_has_a_request_id(client: httpx.AsyncClient, path: str) -> None:
    """An answer has the client's id, or a new one if that is missing, repeated or not well-formed."""
    given = await client.get(path, headers={"X-Request-Id": "trace-1/a:b"})
    assert given.headers.get_list("x-request-id") == ["trace-1/a:b"]
    made = set()
    for headers in ([], [("X-Request-Id", "a b")], [("X-Request-Id", "")], [("X-Request-Id", "x" * 129)]):
        (answer,) = (await client.get(path, headers=headers)).headers.get_list("x-request-id")
        made.add(answer)
        assert re.fullmatch(r"[0-9a-f]{32}", answer)
    twice = await client.get(path, headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    made |= {*twice.headers.get_list("x-request-id")}
    assert len(made) == 5


async def test_the_callback_has_none(client: httpx.AsyncClient) -> None:
    """Clipia's requests have ids of their own."""
    response = await client.post("/clipia/webhook", content=b"{}")
    assert "x-request-id" not in response.headers


async def test_log_lines_of_a_request_have_its_id(client: httpx.AsyncClient) -> None:
    """The field is `x_request_id`: `request_id` is Clipia's."""
    capture = LogCapture()
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    try:
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "first"}
        await client.post("/v1/deliveries/retry", json={"all": True}, headers=headers)
        await client.post("/v1/deliveries/retry", json={"all": True}, headers=headers | {"X-Request-Id": "b"})
    finally:
        structlog.configure(processors=before)
    lines = [entry for entry in capture.entries if entry["event"] == "dead letters restarted"]
    assert [line["x_request_id"] for line in lines] == ["first", "b"]
