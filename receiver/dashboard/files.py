"""Stored files for pages: they come from this host, because a page may load nothing from another one."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from receiver.client.local import LocalClients
from receiver.core.file_links import FILES_PATH
from receiver.dashboard.pages import Guard


class Files:
    """Passes a request on to the API's own endpoint, which knows ranges and safe headers.

    The client would read a file to its end before it returns, so this does not go through it.
    """

    def __init__(self, guard: Guard, clients: LocalClients) -> None:
        self._guard = guard
        self._clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a file."""
        request = Request(scope)
        session = self._guard.session(request)
        if session is None:
            await Response(status_code=401)(scope, receive, send)
            return
        path = f"{FILES_PATH}/{request.path_params['id']}"
        call = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"redirect=false"}
        for name in ("path_params", "endpoint", "route", "app", "router"):
            call.pop(name, None)
        await self._clients.app(session.token.caller)(call, receive, send)
