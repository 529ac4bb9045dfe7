"""Agents: the official client of the SDK, over both transports."""

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent

from support.commands import command_environment

Mode = Literal["auto", "legacy"]
"""The protocol of 2026, without a handshake, and the one before."""


@asynccontextmanager
async def http_agent(url: str, token: str, *, mode: Mode = "auto") -> AsyncIterator[Client]:
    """Connect an agent to `/mcp` of a receiver."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60, trust_env=False) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


@asynccontextmanager
async def stdio_agent(
    *arguments: str, settings: Mapping[str, str], log: Path, mode: Mode = "auto"
) -> AsyncIterator[Client]:
    """Connect an agent to a command, such as `receiver mcp`; its standard error goes to `log`."""
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "receiver", *arguments], env=command_environment(**settings)
    )
    with log.open("w", encoding="utf-8") as errors:
        async with Client(stdio_client(command, errlog=errors), mode=mode) as client:
            yield client


async def names_of(agent: Client) -> set[str]:
    """Return the names of an agent's tools."""
    return {tool.name for tool in (await agent.list_tools()).tools}


async def use(agent: Client, name: str, /, **arguments: Any) -> Any:
    """Call a tool that succeeds; return its structured content."""
    found = await agent.call_tool(name, arguments, read_timeout_seconds=60)
    assert not found.is_error, text_of(found)
    assert found.structured_content is not None
    return found.structured_content


async def failure(agent: Client, name: str, /, **arguments: Any) -> str:
    """Call a tool that fails; return the text of its error."""
    found = await agent.call_tool(name, arguments, read_timeout_seconds=60)
    assert found.is_error, found.structured_content
    return text_of(found)


def text_of(result: CallToolResult) -> str:
    """Return the text of a result."""
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text
