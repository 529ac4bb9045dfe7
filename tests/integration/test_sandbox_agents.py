"""The sandbox's server for agents: the official client and the eight documented tools, in both modes."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from support.agents import Mode, failure, http_agent, names_of, use

from receiver.sandbox import SandboxOptions, agents, create_app, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "clipia_live_agent"
TOOLS = {
    *("generate_image", "generate_video", "wait_generation", "get_generation"),
    *("list_models", "get_model", "get_balance", "search_templates"),
}


DURATION = 100.0
ahead = 0.0
"""Seconds that the clock of the sandbox is ahead."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url() -> AsyncIterator[str]:
    """A sandbox whose generations end when the test sets its clock."""
    options = SandboxOptions(duration=DURATION, rate_limit=10_000)
    async with running(create_app(options, clock=lambda: time.time() + ahead)) as found:
        yield found


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_agent_generates(url: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool answers what the API answers, over the generations and the account of the agent's key."""
    async with http_agent(url, f"{KEY}-{mode}", mode=mode) as agent:
        assert await names_of(agent) == TOOLS
        before = (await use(agent, "get_balance"))["balance"]["credits"]
        given = {"prompt": "a cat", "idempotency_key": f"k-{mode}"}
        made = await use(agent, "generate_image", **given)
        assert (await use(agent, "generate_image", **given))["request_id"] == made["request_id"]
        assert "output" not in await use(agent, "get_generation", request_id=made["request_id"])
        short = await use(agent, "wait_generation", request_id=made["request_id"], timeout_seconds=0)
        assert "output" not in short
        waiting = asyncio.create_task(
            use(agent, "wait_generation", request_id=made["request_id"], timeout_seconds=30)
        )
        await use(agent, "get_generation", request_id=made["request_id"])
        assert not waiting.done()
        monkeypatch.setattr(sys.modules[__name__], "ahead", DURATION)
        done = await waiting
        assert (done["status"], done["cost"]) == ("COMPLETED", 12)
        async with httpx.AsyncClient() as client:
            assert (await client.get(done["output"]["images"][0]["original_url"])).status_code == 200
        video = await use(agent, "generate_video", input={"prompt": "a city", "duration": 4})
        assert video["cost"] == 40
        assert (await use(agent, "get_balance"))["balance"]["credits"] == before - 52
        slugs = {each.get("slug") for each in (await use(agent, "list_models"))["data"]}
        assert "nano-banana-2" in slugs
        assert "prompt" in (await use(agent, "get_model", model="nano-banana-2"))["input_schema"]
        found = (await use(agent, "search_templates", query="Cat portrait"))["templates"]
        assert [each["id"] for each in found] == ["cat-portrait"]
        assert len((await use(agent, "search_templates"))["templates"]) == len(agents.TEMPLATES)


async def test_errors_are_those_of_the_api(url: str) -> None:
    """A refusal has Clipia's code; another key's generation is unknown; ill arguments are errors."""
    async with http_agent(url, KEY) as agent:
        made = await use(agent, "generate_image", prompt="a cat")
        for name, arguments, error in (
            ("generate_image", {}, "model_input_invalid: "),
            ("generate_image", {"model": "nope", "prompt": "x"}, "model_not_found: "),
            ("generate_image", {"prompt": "x", "webhook_url": "http://example.com"}, "webhook_url_invalid: "),
            ("get_generation", {"request_id": "../account"}, "not_found: "),
            ("wait_generation", {}, "invalid_request: request_id is missing."),
            ("wait_generation", {"request_id": "x", "timeout_seconds": "soon"}, "invalid_request: "),
            ("get_model", {"model": "nope"}, "model_not_found: "),
            ("erase_everything", {}, "not_found: There is no tool erase_everything."),
        ):
            assert (await failure(agent, name, **arguments)).startswith(error), name
    async with http_agent(url, "clipia_live_other") as other:
        assert (await failure(other, "get_generation", request_id=made["request_id"])).startswith("not_found")


async def test_the_key_is_checked_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a well-formed key, or without the extra, the answer is an error in Clipia's shape."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    monkeypatch.setattr(agents, "find_spec", lambda _name: None)
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/mcp", json=call)).json()["error"]["code"] == "invalid_api_key"
        missing = await client.post("/mcp", json=call, headers={"X-Api-Key": KEY})
        assert missing.status_code == 404
        assert "clipia-receiver[mcp]" in missing.json()["error"]["message"]
        assert (await client.get("/mcp")).status_code == 405
