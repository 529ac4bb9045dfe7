"""Login with an API token, and logout."""

import math
import time
from collections import OrderedDict
from typing import Final
from urllib.parse import urlencode

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.api.auth import Tokens
from receiver.dashboard.origin import is_own_page
from receiver.dashboard.pages import HOME, LOGIN, foreign_form, go_to, read_form, set_cookie, status_of
from receiver.dashboard.rendering import render
from receiver.dashboard.sessions import COOKIE, Sessions
from receiver.errors import RequestError

MAX_FAILURES: Final = 10
"""Wrong tokens from one address within the time below; further logins from there are refused."""
FAILURE_SECONDS: Final = 60.0
SCOPES: Final = frozenset({"read", "operate"})
"""The scopes that the pages need."""
AFTER_LOGIN: Final = "after_login"
_MAX_ADDRESSES: Final = 10_000

log = structlog.get_logger()


class FailedLogins:
    """Counts wrong tokens by address: a token cannot be guessed quickly."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def wait(self, address: str, *, now: float) -> float:
        """Return the seconds until the next login from an address is allowed."""
        times = [each for each in self._times.get(address, ()) if now - each < FAILURE_SECONDS]
        return 0.0 if len(times) < MAX_FAILURES else times[-MAX_FAILURES] + FAILURE_SECONDS - now

    def note(self, address: str, *, now: float) -> None:
        """Count a wrong token."""
        times = self._times.pop(address, [])
        self._times[address] = [*times[1 - MAX_FAILURES :], now]
        while len(self._times) > _MAX_ADDRESSES:
            self._times.popitem(last=False)


class Login:
    """The pages before a session."""

    def __init__(self, tokens: Tokens, sessions: Sessions) -> None:
        self._tokens = tokens
        self._sessions = sessions
        self._failed = FailedLogins()

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(LOGIN, self._login, methods=["GET", "POST"]),
            Route(f"{HOME}/logout", self._logout, methods=["POST"]),
        ]

    async def _login(self, request: Request) -> Response:
        try:
            return await (self._begin(request) if request.method == "POST" else self._show(request))
        except ClientDisconnect:
            return Response(status_code=400)  # the browser is gone; Starlette needs some response

    async def _show(self, request: Request) -> Response:
        next_ = _own_path(request.query_params.get("next", HOME))
        if self._sessions.read(request.cookies.get(COOKIE, ""), now=time.time()) is not None:
            return go_to(next_)
        return self._page(request, next_=next_, is_lost=AFTER_LOGIN in request.query_params)

    async def _begin(self, request: Request) -> Response:
        if not is_own_page(request.headers):
            return foreign_form(request)
        try:
            form = await read_form(request)
        except RequestError as error:
            return self._page(request, error=str(error), status=status_of(error))
        # After the form: between this look and the note below, no other login from the address may pass.
        now, address = time.time(), request.client.host if request.client else ""
        wait = self._failed.wait(address, now=now)
        if wait > 0:
            text = f"Too many wrong tokens from this address: wait {math.ceil(wait)} seconds."
            return self._page(request, error=text, status=429)
        token, next_ = str(form.get("token", "")), str(form.get("next", HOME))
        session = self._sessions.begin(token, now=now)
        if session is None:
            self._failed.note(address, now=now)
            log.warning("dashboard login refused", client=address)
            text = "This token is unknown: use one of RECEIVER_API_TOKENS."
            return self._page(request, next_=next_, error=text, status=401)
        if not session.token.caller.scopes >= SCOPES:
            text = "This token cannot open the dashboard: it needs the scopes `read` and `operate`."
            return self._page(request, next_=next_, error=text, status=403)
        log.info("dashboard login", by=session.token.caller.name, client=address)
        # By way of this page, which sees whether the browser sends the cookie back.
        query = urlencode({"next": _own_path(next_), AFTER_LOGIN: ""})
        response = go_to(f"{LOGIN}?{query}")
        set_cookie(response, session)
        return response

    async def _logout(self, request: Request) -> Response:
        if not is_own_page(request.headers):
            return foreign_form(request)
        response = go_to(f"{LOGIN}?done=logged_out")
        response.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return response

    def _page(
        self,
        request: Request,
        *,
        next_: str = HOME,
        error: str | None = None,
        is_lost: bool = False,
        status: int = 200,
    ) -> Response:
        values = {
            "next": _own_path(next_),
            "error": error,
            "is_lost": is_lost,
            "has_tokens": bool(self._tokens),
        }
        return render(request, "login.html", values, status=status)


def _own_path(path: str) -> str:
    """Return the path of a page of the dashboard; an address of another site becomes the first page."""
    is_own = path == HOME or path.startswith((f"{HOME}/", f"{HOME}?"))
    return path if is_own and path.isascii() and path.isprintable() and "\\" not in path else HOME
