"""Agents at `/mcp`: the official client, and raw requests, against the shipped server on a loopback port."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from mcp.shared.exceptions import MCPError
from mcp_types import ToolAnnotations
from starlette.applications import Starlette
from support.agents import Mode, failure, http_agent, names_of, use
from support.clipia import MODEL, PROMPT, Sandbox
from support.payloads import SECRET
from support.serving import serving

from receiver.app import create_app
from receiver.mcp import http as mount
from receiver.setting_fields import SCOPES, Scope
from receiver.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

SUBSETS = list(chain.from_iterable(combinations(SCOPES, size) for size in range(len(SCOPES) + 1)))
TOOLS: dict[Scope, set[str]] = {
    "submit": {"generate_image", "generate_video"},
    "read": {"wait_generation", "get_generation", "list_models", "get_model", "status"},
    "operate": {"get_balance", "why", "list_rejections", "list_dead_letters", "replay_dry_run"},
}
ACTIONS = {
    *("retry_dead_letters", "replay_events", "discard_delivery", "pause_destination", "resume_destination"),
    "resubmit_generation",
}
PUBLIC = "http://receiver.internal:8001"
AGENT = "token-for-submit-read-operate-0123456789"
HEADERS = {
    "Authorization": f"Bearer {AGENT}",
    "Accept": "application/json, text/event-stream",
    "Content-Type": "application/json",
}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


def token_of(scopes: tuple[Scope, ...]) -> str:
    """Return the token with exactly these scopes."""
    return f"token-for-{'-'.join(scopes) or 'nothing'}-0123456789"


def make_app(
    folder: Path, template: Path, clipia: str, *, allow_write: bool = False, **settings: Any
) -> Starlette:
    """Make a receiver without a worker."""
    database = folder / "agents.db"
    database.write_bytes(template.read_bytes())
    tokens = [
        {"name": "-".join(("has", *scopes)), "token": token_of(scopes), "scopes": list(scopes)}
        for scopes in SUBSETS
    ]
    values = {
        "clipia_webhook_secret": SECRET,
        "clipia_key": "clipia_live_x",
        "clipia_base_url": clipia,
        "database_url": f"sqlite:///{database}",
        "api_tokens": tokens,
    }
    return create_app(Settings.load(**(values | settings)), worker=False, mcp_allow_write=allow_write)


@asynccontextmanager
async def receiver(folder: Path, template: Path, clipia: str, **options: Any) -> AsyncIterator[str]:
    """Serve a receiver; yield its URL."""
    async with serving(make_app(folder, template, clipia, **options)) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def url(tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox) -> AsyncIterator[str]:
    """A receiver whose agents may not act."""
    async with receiver(tmp_path, migrated_sqlite, sandbox.url, internal_url=PUBLIC) as found:
        yield found


# Tools


@pytest.mark.parametrize("allow_write", [False, True])
async def test_an_agent_has_the_tools_of_its_scopes(
    tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox, *, allow_write: bool
) -> None:
    """G1: a tool without the scope, or without the option, is neither listed nor callable."""
    async with receiver(tmp_path, migrated_sqlite, sandbox.url, allow_write=allow_write) as url:
        for scopes in SUBSETS:
            expected = set().union(*(TOOLS[scope] for scope in scopes))
            if allow_write and "operate" in scopes:
                expected |= ACTIONS
            async with http_agent(url, token_of(scopes)) as agent:
                assert await names_of(agent) == expected, scopes
                for name in ("generate_image", "status", "why", "discard_delivery"):
                    if name in expected:
                        continue
                    with pytest.raises(MCPError, match=f"there is no tool '{name}'"):
                        await agent.call_tool(name, {})


async def test_tools_say_what_they_do(tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox) -> None:
    """Each tool has a description, schemas of an object, and the hints by which a client asks its user."""
    async with (
        receiver(tmp_path, migrated_sqlite, sandbox.url, allow_write=True) as url,
        http_agent(url, AGENT) as agent,
    ):
        tools = {tool.name: tool for tool in (await agent.list_tools()).tools}
    hints = {name: tool.annotations or ToolAnnotations() for name, tool in tools.items()}
    writing = ACTIONS | TOOLS["submit"]
    assert {name for name, each in hints.items() if not each.read_only_hint} == writing
    assert {name for name, each in hints.items() if each.destructive_hint} == {
        *("discard_delivery", "pause_destination", "resubmit_generation")
    }
    assert {name for name, each in hints.items() if not each.idempotent_hint} == {
        *("retry_dead_letters", "resubmit_generation")
    }
    for name, tool in tools.items():
        assert len(tool.description or "") > 40, name
        assert tool.input_schema["type"] == "object", name
        assert tool.input_schema["additionalProperties"] is False, name
        assert (tool.output_schema or {})["type"] == "object", name
        if name in writing:
            required = {"idempotency_key", "reason"} & set(tool.input_schema["required"])
            assert required, name


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_refusal_is_an_error_result(
    tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox, mode: Mode
) -> None:
    """G1: a refusal is a result in our own words with its code, and nothing is submitted."""
    budgets = {"has-submit-read-operate": 20}
    given = {"model": MODEL, "input": PROMPT}
    async with (
        receiver(tmp_path, migrated_sqlite, sandbox.url, budgets=budgets) as url,
        http_agent(url, AGENT, mode=mode) as agent,
    ):
        for arguments, error in (
            ({**given, "idempotency_key": "k", "max_cost": 1}, "max_cost_exceeded: the job costs 12 credits"),
            ({"model": MODEL, "input": {"n": 1}, "idempotency_key": "k"}, "model_input_invalid: "),
            ({**given, "model": "nope", "idempotency_key": "k"}, "model_not_found: "),
            ({**given, "model": "../account", "idempotency_key": "k"}, "invalid_request: model: "),
            (given, "invalid_request: idempotency_key: it is missing"),
            (
                {**given, "idempotency_key": ""},
                "invalid_request: idempotency_key: write at least 1 characters",
            ),
            ({**given, "idempotency_key": "k" * 256}, "invalid_request: idempotency_key: write at most 255"),
            ({**given, "idempotency_key": "a\nb"}, "invalid_request: Idempotency-Key: write from 1 to 255"),
            ({**given, "idempotency_key": "k", "max_cst": 1}, "invalid_request: max_cst: unknown parameter"),
            ({**given, "input": "a cat", "idempotency_key": "k"}, "invalid_request: input: write an object"),
            ({**given, "idempotency_key": "k", "max_cost": "NaN"}, "invalid_request: max_cost: "),
        ):
            assert (await failure(agent, "generate_image", **arguments)).startswith(error), error
        assert await sandbox.submits() == []
        made = await use(agent, "generate_image", **given, idempotency_key="k")
        assert made["is_new"]
        assert made["cost"] == 12
        again = await use(agent, "generate_image", **given, idempotency_key="k")
        assert not again["is_new"]
        assert again["id"] == made["id"]
        other = await failure(
            agent, "generate_image", model=MODEL, input={"prompt": "b"}, idempotency_key="k"
        )
        assert other.startswith("idempotency_key_reuse: ")
        assert made["id"] in other
        over = await failure(agent, "generate_image", **given, idempotency_key="k2")
        assert over.startswith("budget_exceeded: the job costs 12 credits, but 12 of today's 20")
        unknown = await failure(agent, "get_generation", id="nope")
        assert unknown == "not_found: there is no such job"
    assert len(await sandbox.submits()) == 1


async def test_a_caller_does_not_get_another_callers_generation(url: str) -> None:
    """G3: for an agent without `operate`, another caller's generation is an unknown id."""
    async with http_agent(url, AGENT) as agent:
        made = await use(agent, "generate_image", model=MODEL, input=PROMPT, idempotency_key="k")
    async with http_agent(url, token_of(("submit", "read"))) as stranger:
        for name in ("get_generation", "wait_generation"):
            theirs = await failure(stranger, name, id=made["id"])
            assert theirs == await failure(stranger, name, id="01a1fe04-89f8-77d7-8764-432122f47fc3")
        own = await use(stranger, "generate_image", model=MODEL, input=PROMPT, idempotency_key="k")
    assert own["id"] != made["id"]


async def test_only_a_generation_without_a_result_is_submitted_again(
    tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox
) -> None:
    """E1: a generation that Clipia has is not submitted again; an unsure one is, for an operator's reason."""
    async with (
        receiver(tmp_path, migrated_sqlite, sandbox.url, allow_write=True) as url,
        http_agent(url, AGENT) as agent,
        httpx.AsyncClient(base_url=url, headers=HEADERS) as client,
    ):
        made = await use(agent, "generate_image", model=MODEL, input=PROMPT, idempotency_key="k")
        order = {"id": made["id"], "reason": "not in the console"}
        assert (await failure(agent, "resubmit_generation", **order)).startswith("not_resubmittable: ")
        (await client.post(f"/v1/jobs/{made['id']}/cancel")).raise_for_status()
        assert (await use(agent, "get_generation", id=made["id"]))["state"] == "unsure"
        assert (await use(agent, "resubmit_generation", **order))["state"] == "pending"
        actions = (await client.get("/v1/audit?operation=resubmit_job")).json()["data"]
    assert [each["reason"] for each in actions] == ["not in the console"] * 2


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_wait_is_bounded_and_reports_progress(
    url: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait ends after its time, says that the generation goes on, and reports progress meanwhile."""
    monkeypatch.setattr("receiver.mcp.generation.REPORT_SECONDS", 0.1)
    reports: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, total, message))

    async with http_agent(url, AGENT, mode=mode) as agent:
        made = await use(agent, "generate_image", model=MODEL, input=PROMPT, idempotency_key="k")
        found = await agent.call_tool(
            "wait_generation", {"id": made["id"], "timeout_seconds": 0.5}, progress_callback=note
        )
        assert (await failure(agent, "wait_generation", id=made["id"], timeout_seconds=301)).startswith(
            "invalid_request: timeout_seconds: write 300 or less"
        )
    assert found.structured_content is not None
    assert (found.structured_content["state"], found.structured_content["finished"]) == ("submitted", False)
    assert reports
    assert all(total == 100 and "submitted" in (message or "") for _, total, message in reports)


async def test_a_wait_ends_when_the_receiver_stops(
    tmp_path: Path, migrated_sqlite: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait answers in the drain period, so the agent can wait at another process: nothing is cut off."""
    monkeypatch.setattr("receiver.mcp.generation.REPORT_SECONDS", 0.05)
    app = make_app(tmp_path, migrated_sqlite, sandbox.url)
    async with serving(app) as url, http_agent(url, AGENT) as agent:
        made = await use(agent, "generate_image", model=MODEL, input=PROMPT, idempotency_key="k")
        waiting = asyncio.create_task(use(agent, "wait_generation", id=made["id"], timeout_seconds=300))
        await use(agent, "get_generation", id=made["id"])
        assert not waiting.done()
        app.state.draining = True
        async with asyncio.timeout(20):
            assert (await waiting)["finished"] is False


# Requests


@pytest.mark.parametrize(
    ("public", "host", "origin", "status", "code"),
    [
        (PUBLIC, None, None, 200, None),
        (PUBLIC, "receiver.internal:8001", None, 200, None),
        (PUBLIC, "receiver.internal", None, 200, None),
        (PUBLIC, "receiver.internal:8001", PUBLIC, 200, None),
        (PUBLIC, "localhost:9", "http://localhost:9", 200, None),
        ("https://Receiver.example/base", "receiver.example", "https://receiver.example", 200, None),
        (PUBLIC, "evil.example", None, 421, "unknown_host"),
        (PUBLIC, "evil.example:8001", PUBLIC, 421, "unknown_host"),
        (PUBLIC, "receiver.internal.evil.example", None, 421, "unknown_host"),
        (PUBLIC, "receiver.internal:8001", "http://evil.example", 403, "unknown_origin"),
        (PUBLIC, "receiver.internal:8001", "null", 403, "unknown_origin"),
        (PUBLIC, None, "http://receiver.internal.evil.example", 403, "unknown_origin"),
        (None, "receiver.internal:8001", None, 421, "unknown_host"),
        (None, "127.0.0.1:8001", None, 200, None),
        (None, "[::1]:8001", "http://[::1]:8001", 200, None),
    ],
)
async def test_only_known_hosts_and_origins_are_served(
    tmp_path: Path,
    migrated_sqlite: Path,
    sandbox: Sandbox,
    public: str | None,
    host: str | None,
    origin: str | None,
    status: int,
    code: str | None,
) -> None:
    """G1: a page of another site cannot reach it, even if its name points at the receiver (DNS rebinding).

    The error names the setting, also to an agent that uses the listener's real name before it is set.
    """
    headers = HEADERS | {name: value for name, value in (("Host", host), ("Origin", origin)) if value}
    async with (
        receiver(tmp_path, migrated_sqlite, sandbox.url, internal_url=public) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        response = await client.post("/mcp", json=LIST, headers=headers)
        assert response.status_code == status, response.text
        if code is not None:
            assert response.json()["error"]["code"] == code
            assert "RECEIVER_INTERNAL_URL" in response.json()["error"]["message"]
        # The token is checked first: a stranger learns nothing about hosts.
        stranger = await client.post("/mcp", json=LIST, headers=headers | {"Authorization": "Bearer x"})
        assert stranger.status_code == 401


async def test_ill_requests_are_answered(url: str) -> None:
    """B3, B9: any body gets an answer without a crash, and the next request is served."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    async with httpx.AsyncClient(base_url=url, headers=HEADERS) as client:
        for content, status in (
            (b"", 400),
            (b"{", 400),
            (b"[" * 100_000, 400),
            (b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": ' + b"[" * 90_000, 400),
            (b"9" * 5000, 400),
            (b"\xff\xfe", 400),
            (json.dumps([LIST, LIST]).encode(), 400),
            (b"x" * 3_000_000, 413),
            (json.dumps(call).encode(), 200),
            (json.dumps(call | {"params": {"name": 5}}).encode(), 200),
            (json.dumps(call | {"params": {"name": "status", "arguments": []}}).encode(), 200),
            (
                json.dumps(call | {"params": {"name": "status", "arguments": {"x": "y" * 900_000}}}).encode(),
                200,
            ),
            (json.dumps(call | {"params": {"name": "why", "arguments": {"id": "\0"}}}).encode(), 200),
        ):
            response = await client.post("/mcp", content=content)
            assert response.status_code == status, (content[:60], response.text[:200])
            assert len(response.content) < 20_000
        for method in ("GET", "DELETE", "PUT", "HEAD", "OPTIONS"):
            assert (await client.request(method, "/mcp")).status_code == 405
        assert (await client.post("/mcp", json=LIST)).status_code == 200


async def begin(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request without the rest of its body."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    head = [f"{name}: {value}" for name, value in (HEADERS | {"Host": "localhost"}).items()]
    writer.write("\r\n".join(("POST /mcp HTTP/1.1", *head, "Content-Length: 9", "", "{")).encode())
    return reader, writer


async def test_a_client_that_hangs_up_is_no_bug(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """B5: a client that disconnects before the end of its body leaves no traceback in the log."""
    _, writer = await begin(url)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS) as client:
        assert (await client.post("/mcp", json=LIST)).status_code == 200
        writer.close()
        await writer.wait_closed()
        assert (await client.post("/mcp", json=LIST)).status_code == 200
    assert "Exception in ASGI application" not in caplog.text


async def test_no_result_is_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """G8: at DEBUG, too, the libraries of the protocol log no result: it may have prompts and answers."""
    with caplog.at_level("DEBUG"):
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.post(f"{url}/mcp", headers=HEADERS, json=LIST)
    assert "generate_image" in response.text
    assert "generate_image" not in caplog.text


async def test_a_slow_body_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2: a body that does not come to its end holds no memory for ever."""
    monkeypatch.setattr("receiver.api.endpoints.BODY_SECONDS", 0.2)
    reader, writer = await begin(url)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


async def test_without_the_extra_the_answer_names_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, a known caller gets 404 and the command that installs it."""
    monkeypatch.setattr(mount, "find_spec", lambda _name: None)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS) as client:
        response = await client.post("/mcp", json=LIST)
        assert response.status_code == 404
        assert "pip install 'clipia-receiver[mcp]'" in response.json()["error"]["message"]
        assert (await client.post("/mcp", json=LIST, headers={"Authorization": ""})).status_code == 401
