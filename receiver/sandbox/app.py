"""The sandbox as an ASGI application."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from receiver.sandbox import agents, api, cdn
from receiver.sandbox.answers import Problem
from receiver.sandbox.control import Control
from receiver.sandbox.options import SandboxOptions
from receiver.sandbox.state import Clock, Sandbox
from receiver.sandbox.webhooks import WebhookSender


def create_app(
    options: SandboxOptions | None = None, *, secret: str | None = None, clock: Clock = time.time
) -> Starlette:
    """Make a local Clipia: its API, its CDN and the control API on one origin.

    Webhooks are signed with `secret`, or with a random one; it is in `app.state.secret`. `clock` returns unix
    seconds; a test may change it to make jobs progress and idempotency keys expire. The end of the lifespan
    cancels the webhooks that are not sent yet; everything else works without a lifespan.
    """
    sandbox = Sandbox(
        options or SandboxOptions(), secret=secret or f"whsec_{secrets.token_urlsafe(32)}", clock=clock
    )
    sender = WebhookSender(sandbox)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await sender.stop()

    app = Starlette(
        routes=[
            *api.routes(sandbox, sender),
            *agents.routes(),
            *Control(sandbox, sender).routes(),
            *cdn.routes(sandbox),
        ],
        lifespan=lifespan,
        exception_handlers={Problem: _render_problem, HTTPException: _render_http_exception},
    )
    app.state.secret = sandbox.secret
    return app


async def _render_problem(_request: Request, error: Exception) -> Response:
    return cast("Problem", error).response()


async def _render_http_exception(_request: Request, error: Exception) -> Response:
    http = cast("HTTPException", error)
    code = "not_found" if http.status_code == HTTPStatus.NOT_FOUND else "invalid_request"
    return Problem(code, f"{http.detail}.", status=http.status_code, headers=http.headers).response()
