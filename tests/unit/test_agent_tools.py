"""The tools for agents: their page, their results and their errors."""

import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    RequestError,
    SettingsError,
)
from receiver.masking import register_secret
from receiver.mcp.generation import NoArguments
from receiver.mcp.results import MAX_RESULT_BYTES, MAX_TEXT_CHARACTERS, bounded, error_of
from receiver.mcp.server import call_tool
from receiver.mcp.table import TOOLS
from receiver.mcp.tool import Session

PAGE = Path(__file__).parents[2] / "docs" / "mcp.md"


def test_the_page_has_every_tool() -> None:
    """The table has each tool with its scope, in the order of the list, and says which of them act."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`(, acts)? \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(tool.name, tool.scope, ", acts" if tool.acts else "") for tool in TOOLS]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_schemas_stand_alone(tool: Any) -> None:
    """Every reference in a schema leads to a definition in it, and each argument has a type."""
    schemas = (tool.arguments.model_json_schema(), TypeAdapter(tool.answer).json_schema(mode="serialization"))
    for schema in schemas:
        text = str(schema)
        for name in re.findall(r"#/\$defs/([\w-]+)", text):
            assert name in schema["$defs"]
        assert schema["type"] == "object"


def test_results_are_bounded() -> None:
    """A long text is cut, at any depth; a result that is too large as a whole is an error that says so."""
    long = "x" * (MAX_TEXT_CHARACTERS + 1)
    cut = "x" * MAX_TEXT_CHARACTERS + "…"
    assert bounded({"a": [{"b": long}], "c": 1, "d": None}) == {"a": [{"b": cut}], "c": 1, "d": None}
    with pytest.raises(RequestError, match="ask for less") as caught:
        bounded(["x" * 1000] * (MAX_RESULT_BYTES // 1000))
    assert caught.value.code == "result_too_large"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RequestError("no", code="not_found"), "not_found: no"),
        (RequestError("no", code="x", job_id="j"), "x: no The generation is j."),
        (
            ClipiaUnavailable("away", reason="overloaded", retry_after=7.4),
            "overloaded: away Try again in 7 s, a generation with the same idempotency_key.",
        ),
        (
            DatabaseUnavailable("away", reason="service_unavailable"),
            "service_unavailable: away Try again, a generation with the same idempotency_key.",
        ),
        (SettingsError("CLIPIA_KEY is not set"), "not_configured: CLIPIA_KEY is not set"),
        (ReceiverError("a bug"), "internal_error: a bug"),
        (ValueError("password=hunter2"), "internal_error: a bug in the receiver; its log has the traceback"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_an_error_is_a_code_and_our_words(error: Exception, text: str) -> None:
    """G8: a library's text, which may quote a secret, does not reach an agent."""
    assert error_of(error) == text


def test_a_secret_in_an_error_is_masked() -> None:
    """G8: an error of a peer that quotes our key is masked."""
    register_secret("clipia_live_0123456789abcdef")
    assert "0123456789" not in error_of(RequestError("bad clipia_live_0123456789abcdef", code="x"))


def test_no_package_of_agents_is_imported() -> None:
    """Without the extra, the receiver and the sandbox start; with it, they do not import it."""
    code = """
import sys
import receiver.app, receiver.cli.mcp, receiver.mcp.http, receiver.mcp.table, receiver.sandbox
from receiver.settings import Settings
app = receiver.app.create_app(Settings.load(clipia_webhook_secret="whsec_test"), worker=False)
receiver.sandbox.create_app()
assert "/mcp" in [route.path for route in app.routes]
found = [name for name in ("mcp", "mcp_types", "httpx2", "opentelemetry") if name in sys.modules]
sys.exit(str(found) if found else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PATH": "/usr/bin:/bin"})


async def test_an_action_goes_on_if_its_agent_hangs_up() -> None:
    """An action is carried out and recorded to its end; a tool that only reads ends with its agent."""
    begun, released = asyncio.Event(), asyncio.Event()
    done: list[bool] = []

    async def run(_session: Session, _given: object) -> dict[str, int]:
        begun.set()
        await released.wait()
        done.append(True)
        return {}

    session = Session(client=None, internal_url=None, report=None, is_stopping=bool)  # type: ignore[arg-type]  # not used
    for read_only, expected in ((True, []), (False, [True])):
        tool = replace(TOOLS[-1], arguments=NoArguments, answer=dict[str, int], run=run, read_only=read_only)
        begun.clear()
        released.clear()
        call = asyncio.create_task(call_tool(tool, session, {}))
        await asyncio.wait_for(begun.wait(), 5)
        call.cancel()
        await asyncio.wait({call}, timeout=5)
        assert call.cancelled()
        released.set()
        await asyncio.sleep(0.01)
        assert done == expected


async def test_an_unexpected_error_says_nothing() -> None:
    """G8: a bug is an error result without the exception's text."""

    async def run(_session: Session, _given: object) -> object:
        raise ValueError("password=hunter2")

    session = Session(client=None, internal_url=None, report=None, is_stopping=bool)  # type: ignore[arg-type]  # not used
    result = await call_tool(replace(TOOLS[-1], arguments=NoArguments, run=run), session, {})
    assert result.is_error
    assert "hunter2" not in str(result.content)
