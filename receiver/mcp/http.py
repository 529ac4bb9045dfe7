"""`/mcp` of the internal API: stateless Streamable HTTP, with the bearer tokens of the other calls."""

import asyncio
from functools import cached_property
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from receiver.api.answers import error_response
from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import MAX_BODY_BYTES, read_body
from receiver.client.local import LocalClients
from receiver.errors import RequestError
from receiver.mcp.table import tools_for

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server
    from mcp.server.transport_security import TransportSecuritySettings

PATH: Final = "/mcp"
MISSING: Final = "Agents need the package mcp; install it with: pip install 'clipia-receiver[mcp]'"
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")


class Agents:
    """Serves the tools to agents, each with those of its token's scopes.

    The SDK takes 0.4 s of CPU to import, so the first request imports it, in a thread. It keeps nothing
    between requests: each has a session manager of its own, which ends with it.
    """

    def __init__(
        self,
        clients: LocalClients,
        tokens: Tokens,
        *,
        internal_url: str | None,
        allow_write: bool,
    ) -> None:
        self._tokens = tokens
        self._clients = clients
        self._internal_url = internal_url
        self._allow_write = allow_write
        self._servers: dict[Caller, Server[Any]] = {}

    def routes(self) -> list[BaseRoute]:
        """Return the route."""
        return [Route(PATH, self, methods=["POST"])]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request = Request(scope, receive)
        try:
            caller = self._tokens.identify(request.headers)
            await asyncio.to_thread(_import_sdk)
            await self._check_origin(request)
            body = await read_body(request)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self._serve(caller, scope, _with_body(body, receive), send)

    async def _serve(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager  # noqa: PLC0415 - as the class says

        manager = StreamableHTTPSessionManager(
            self._server(caller, scope["app"]),
            stateless=True,
            security_settings=self._security,
            max_request_body_size=MAX_BODY_BYTES,
        )
        async with manager.run():
            await manager.handle_request(scope, receive, send)

    def _server(self, caller: Caller, app: Starlette) -> "Server[Any]":
        from receiver.mcp.server import make_server  # noqa: PLC0415 - as the class says

        if caller not in self._servers:
            tools = tools_for(caller.scopes, allow_write=self._allow_write)
            client = self._clients.client(caller)
            self._servers[caller] = make_server(
                tools,
                client,
                internal_url=self._internal_url,
                is_stopping=lambda: bool(app.state.draining),
            )
        return self._servers[caller]

    @cached_property
    def _security(self) -> "TransportSecuritySettings":
        """The hosts and origins that the SDK accepts: those of loopback, and that of the setting."""
        from mcp.server.transport_security import TransportSecuritySettings  # noqa: PLC0415 - as the class says

        hosts, origins = list(LOOPBACK), [f"http://{host}" for host in LOOPBACK]
        if self._internal_url is not None:
            parts = urlsplit(self._internal_url.lower())
            host = parts.netloc.rpartition(":")[0] if parts.port else parts.netloc
            hosts.append(host)
            origins.append(f"{parts.scheme}://{host}")
        return TransportSecuritySettings(
            allowed_hosts=[*hosts, *(f"{host}:*" for host in hosts)],
            allowed_origins=[*origins, *(f"{origin}:*" for origin in origins)],
        )

    async def _check_origin(self, request: Request) -> None:
        """Raise RequestError, in our own words, if the SDK would reject the host or the origin.

        A page in a browser could otherwise reach the receiver through a name of its own that it points at the
        receiver's address (DNS rebinding).
        """
        from mcp.server.transport_security import TransportSecurityMiddleware  # noqa: PLC0415 - as the class says

        rejected = await TransportSecurityMiddleware(self._security).validate_request(request)
        if rejected is None:
            return
        known = self._internal_url or "not set"
        if rejected.status_code == HTTPStatus.FORBIDDEN:
            raise RequestError(
                f"The Origin header is not that of RECEIVER_INTERNAL_URL ({known}): pages of other sites "
                "must not call this.",
                code="unknown_origin",
            )
        raise RequestError(
            f"The Host header is neither that of RECEIVER_INTERNAL_URL ({known}) nor a loopback address: set "
            "RECEIVER_INTERNAL_URL to the URL under which agents reach this listener.",
            code="unknown_host",
        )


def _import_sdk() -> None:
    """Import the SDK, once. Raises RequestError if it is not installed."""
    if find_spec("mcp") is None:
        raise RequestError(MISSING, code="not_found")
    import_module("receiver.mcp.server")
    import_module("mcp.server.streamable_http_manager")


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that begins with a body that was read before."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
