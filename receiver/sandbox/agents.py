"""Clipia's server for agents, at `/mcp`: the eight documented tools over the sandbox's API.

They act with the caller's key. The arguments and results of Clipia's tools are not documented, so the ones
here are those of its API.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

import httpx
import orjson
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from receiver.sandbox.answers import Problem
from receiver.sandbox.gate import api_key_of

if TYPE_CHECKING:
    import mcp_types as types

POLL_SECONDS: Final = 1.0
MAX_WAIT_SECONDS: Final = 300.0
TEMPLATES: Final = (
    {
        "id": "product-photo",
        "title": "Product photo on a plain background",
        "model": "nano-banana-2",
        "input": {"prompt": "A product photo on a plain white background, soft light"},
    },
    {
        "id": "cat-portrait",
        "title": "Portrait of a cat",
        "model": "nano-banana-2",
        "input": {"prompt": "A studio portrait of a cat"},
    },
    {
        "id": "city-flight",
        "title": "Flight over a city at night",
        "model": "seedance-2-fast-t2v",
        "input": {"prompt": "A flight over a city at night", "duration": 4},
    },
)

Given = Mapping[str, Any]


class _Refused(Exception):
    """The API answered with an error."""


class Api:
    """Calls the sandbox's own API with the key of an agent."""

    def __init__(self, request: Request) -> None:
        headers = {name: request.headers[name] for name in _KEY_HEADERS if name in request.headers}
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(request.app), base_url=str(request.base_url), headers=headers
        )

    async def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return the answer to a call. Raises _Refused."""
        response = await self._client.request(method, path, **options)
        found: dict[str, Any] = response.json()
        if not response.is_success:
            raise _Refused(f"{found['error']['code']}: {found['error']['message']}")
        return found


_KEY_HEADERS: Final = ("authorization", "x-api-key")


async def _generate(api: Api, given: Given, *, default: str) -> dict[str, Any]:
    content = {"input": given.get("input") or {"prompt": given.get("prompt")}}
    if "webhook_url" in given:
        content["webhook_url"] = given["webhook_url"]
    key = given.get("idempotency_key")
    headers = {} if key is None else {"Idempotency-Key": str(key)}
    path = f"/v1/models/{quote(str(given.get('model', default)))}"
    return await api.call("POST", path, json=content, headers=headers)


async def _wait(api: Api, given: Given) -> dict[str, Any]:
    path = _request_path(given)
    seconds = given.get("timeout_seconds", 60)
    if not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise _Refused(f"invalid_request: timeout_seconds must be from 0 to {MAX_WAIT_SECONDS:.0f}.")
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        found = await api.call("GET", path)
        left = deadline - asyncio.get_running_loop().time()
        if "output" in found or left <= 0:
            return found
        await asyncio.sleep(min(POLL_SECONDS, left))


async def _get(api: Api, given: Given) -> dict[str, Any]:
    return await api.call("GET", _request_path(given))


async def _list_models(api: Api, _given: Given) -> dict[str, Any]:
    return await api.call("GET", "/v1/models")


async def _get_model(api: Api, given: Given) -> dict[str, Any]:
    return await api.call("GET", f"/v1/models/{quote(str(given.get('model')))}")


async def _get_balance(api: Api, _given: Given) -> dict[str, Any]:
    return await api.call("GET", "/v1/account")


async def _search_templates(_api: Api, given: Given) -> dict[str, Any]:
    words = str(given.get("query", "")).lower().split()
    found = [each for each in TEMPLATES if all(word in str(each["title"]).lower() for word in words)]
    return {"templates": found}


def _request_path(given: Given) -> str:
    return f"/v1/requests/{quote(str(given.get('request_id')), safe='')}"


class _Tool(NamedTuple):
    description: str
    run: Callable[[Api, Given], Awaitable[dict[str, Any]]]
    required: tuple[str, ...] = ()
    properties: Mapping[str, Any] = {}


_TEXT: Final = {"type": "string"}
_GENERATION: Final = {
    "model": _TEXT,
    "prompt": _TEXT,
    "input": {"type": "object"},
    "idempotency_key": _TEXT,
    "webhook_url": _TEXT,
}
_TOOLS: Final[Mapping[str, _Tool]] = {
    "generate_image": _Tool("Start an image.", partial(_generate, default="nano-banana-2"), (), _GENERATION),
    "generate_video": _Tool(
        "Start a video.", partial(_generate, default="seedance-2-fast-t2v"), (), _GENERATION
    ),
    "wait_generation": _Tool(
        "Wait for a generation, up to timeout_seconds.",
        _wait,
        ("request_id",),
        {"request_id": _TEXT, "timeout_seconds": {"type": "number"}},
    ),
    "get_generation": _Tool("Show a generation.", _get, ("request_id",), {"request_id": _TEXT}),
    "list_models": _Tool("List the models.", _list_models),
    "get_model": _Tool("Show a model with its parameters.", _get_model, ("model",), {"model": _TEXT}),
    "get_balance": _Tool("Show the account's credits.", _get_balance),
    "search_templates": _Tool("Find templates by words.", _search_templates, (), {"query": _TEXT}),
}


def routes() -> list[BaseRoute]:
    """Return the route."""
    return [Route("/mcp", _Endpoint(), methods=["POST"])]


class _Endpoint:
    """Stateless Streamable HTTP. The first request imports the SDK."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if api_key_of(request) is None:
            raise Problem("invalid_api_key", "The API key is missing or malformed.")
        if find_spec("mcp") is None:
            raise Problem("not_found", "Agents need the package mcp: pip install 'clipia-receiver[mcp]'.")
        from mcp.server.lowlevel import Server  # noqa: PLC0415 - an extra
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager  # noqa: PLC0415 - an extra

        # It logs each request.
        logging.getLogger("mcp").setLevel(logging.WARNING)
        api = Api(request)

        async def call_tool(_context: Any, params: "types.CallToolRequestParams") -> "types.CallToolResult":
            return await _call(api, params.name, params.arguments or {})

        server: Server[Any] = Server("clipia-sandbox", on_list_tools=_list_tools, on_call_tool=call_tool)
        manager = StreamableHTTPSessionManager(server, stateless=True)
        async with manager.run():
            await manager.handle_request(scope, receive, send)


async def _list_tools(_context: Any, _params: Any) -> "types.ListToolsResult":
    import mcp_types as types  # noqa: PLC0415 - an extra

    return types.ListToolsResult(
        tools=[
            types.Tool(
                name=name,
                description=tool.description,
                input_schema={
                    "type": "object",
                    "properties": dict(tool.properties),
                    "required": list(tool.required),
                },
            )
            for name, tool in _TOOLS.items()
        ]
    )


async def _call(api: Api, name: str, given: Given) -> "types.CallToolResult":
    import mcp_types as types  # noqa: PLC0415 - an extra

    try:
        found = await _find_tool(name, given).run(api, given)
    except _Refused as error:
        return types.CallToolResult(content=[types.TextContent(text=str(error))], is_error=True)
    text = types.TextContent(text=orjson.dumps(found).decode())
    return types.CallToolResult(content=[text], structured_content=found)


def _find_tool(name: str, given: Given) -> _Tool:
    """Return a tool. Raises _Refused, also if an argument is missing."""
    tool = _TOOLS.get(name)
    if tool is None:
        raise _Refused(f"not_found: There is no tool {name[:64]}.")
    if missing := [each for each in tool.required if each not in given]:
        raise _Refused(f"invalid_request: {missing[0]} is missing.")
    return tool
