"""The dashboard at `/dashboard`: pages over the internal API, for people on call."""

from collections.abc import Sequence

from starlette.routing import BaseRoute, Route

from receiver.api.auth import Tokens
from receiver.client.local import LocalClients
from receiver.dashboard import (
    audit,
    dead_letters,
    destinations,
    events,
    generation,
    jobs,
    overview,
    rejections,
    replays,
    settings,
)
from receiver.dashboard.files import Files
from receiver.dashboard.login import Login
from receiver.dashboard.pages import HOME, Guard, Page, missing
from receiver.dashboard.rendering import send_static
from receiver.dashboard.sessions import Sessions

PAGES: Sequence[Page] = (
    *overview.PAGES,
    *events.PAGES,
    *generation.PAGES,
    *destinations.PAGES,
    *dead_letters.PAGES,
    *rejections.PAGES,
    *replays.PAGES,
    *jobs.PAGES,
    *audit.PAGES,
    *settings.PAGES,
    Page(path="/{path:path}", handler=missing),
)
"""All pages that need a session."""


def dashboard_routes(clients: LocalClients, tokens: Tokens) -> list[BaseRoute]:
    """Return the routes of the dashboard."""
    sessions = Sessions(tokens)
    guard = Guard(sessions, clients)
    return [
        Route(f"{HOME}/static/{{name}}", send_static, methods=["GET"]),
        Route(f"{HOME}/media/{{id}}", Files(guard, clients), methods=["GET"]),
        *Login(tokens, sessions).routes(),
        *guard.routes(PAGES),
    ]
