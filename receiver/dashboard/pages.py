"""The table of pages: a row routes a visit, checks its session and its origin, and renders its view.

A page has no logic of its own: it calls the internal API as the caller of the session's token, so the guard
of each endpoint checks scopes and records actions.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlencode

import structlog
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from receiver.api.answers import ERROR_CODES
from receiver.api.auth import Caller
from receiver.api.endpoints import read_body
from receiver.client import Client
from receiver.client.local import LocalClients
from receiver.dashboard.origin import is_own_page
from receiver.dashboard.rendering import SAFE_HEADERS, render
from receiver.dashboard.sessions import COOKIE, Session, Sessions
from receiver.error_texts import error_text, traceback_lines
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    ReceiverUnavailable,
    RequestError,
    RequestTooLarge,
    SettingsError,
)

HOME: Final = "/dashboard"
LOGIN: Final = "/dashboard/login"
MAX_FORM_BYTES: Final = 256 * 1024
MAX_FORM_FIELDS: Final = 1000
EXPECTED: Final = (
    RequestError,
    ClipiaUnavailable,
    DatabaseUnavailable,
    SettingsError,
    ReceiverUnavailable,
)
"""Errors that a page shows; any other error is a bug."""

Form = ImmutableMultiDict[str, str]

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class View:
    """A page to render."""

    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A request of a browser whose session and origin have been checked."""

    request: Request
    caller: Caller
    client: Client
    form: Form
    """The fields of a POST."""

    @property
    def key(self) -> str:
        """The only parameter of the path."""
        (value,) = self.request.path_params.values()
        return str(value)

    def filters(self, *names: str) -> dict[str, Any]:
        """Return those query parameters that are filled in."""
        query = self.request.query_params
        return {name: query[name].strip() for name in names if query.get(name, "").strip()}

    def field(self, name: str) -> str:
        """Return a field of the form without white space around it; it is empty if it was left out."""
        return self.form.get(name, "").strip()

    @property
    def reason(self) -> str | None:
        """The reason that the form asks for."""
        return self.field("reason") or None


Handler = Callable[[Visit], Awaitable[View | Response]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A row of the table. A POST changes something, a GET never does."""

    method: Literal["GET", "POST"] = "GET"
    path: str
    """Below `/dashboard`."""
    handler: Handler


def done(path: str, notice: str, **values: object) -> Response:
    """Return the answer to an action that was carried out: the page at `path` shows the notice.

    `notice` is one of `rendering.NOTICES`, and `values` are the numbers in it.
    """
    mark = "&" if "?" in path else "?"
    return go_to(f"{path}{mark}{urlencode({'done': notice, **values})}")


def go_to(path: str) -> Response:
    """Return the answer that leads to another page."""
    return RedirectResponse(path, 303, SAFE_HEADERS)


class Guard:
    """Lets visits through to the handlers of pages."""

    def __init__(self, sessions: Sessions, clients: LocalClients) -> None:
        self._sessions = sessions
        self._clients = clients

    def routes(self, table: Sequence[Page]) -> list[Route]:
        """Return the routes of pages. A path gets one route for all its methods, or 405 would name one."""
        by_path: dict[str, dict[str, Page]] = {}
        for page in table:
            by_path.setdefault(HOME + page.path, {})[page.method] = page
        return [
            Route(path, partial(self._visit, methods), methods=list(methods))
            for path, methods in by_path.items()
        ]

    def session(self, request: Request) -> Session | None:
        """Return the session of a request."""
        return self._sessions.read(request.cookies.get(COOKIE, ""), now=time.time())

    async def _visit(self, methods: Mapping[str, Page], request: Request) -> Response:
        page = methods["GET" if request.method == "HEAD" else request.method]
        if page.method == "POST" and not is_own_page(request.headers):
            return foreign_form(request)
        session = self.session(request)
        if session is None:
            return _to_login(request)
        caller = session.token.caller
        show = partial(_show, request, caller)
        try:
            form = await read_form(request) if page.method == "POST" else Form()
            visit = Visit(request=request, caller=caller, client=self._clients.client(caller), form=form)
            response = show(await page.handler(visit))
        except EXPECTED as error:
            response = show(_error_view(error, is_action=page.method == "POST"))
        except ClientDisconnect:
            return Response(status_code=400)  # the browser is gone; Starlette needs some response
        except Exception as error:  # noqa: BLE001 - a live section would swap a bare 500 in, and be empty
            log.error("a page failed", page=page.path, error=error_text(error))
            log.debug("the failure's traceback", frames=traceback_lines(error))
            text = 'The receiver\'s log has the error: look for "a page failed".'
            response = show(_failure("A bug in the receiver", text, 500))
        if not is_live(request):
            set_cookie(response, session.renewed(time.time()))
        return response


async def missing(visit: Visit) -> View | Response:
    """Answer a visit to an address that no page has."""
    if visit.key == "":
        return go_to(HOME)
    return _failure("Not found", "The dashboard has no such page.", 404)


def is_live(request: Request) -> bool:
    """Return whether a page reads itself again, which is no visit of a person."""
    return "hx-request" in request.headers


def set_cookie(response: Response, session: Session | None) -> None:
    """Give a session's cookie to the browser."""
    if session is not None:
        response.set_cookie(COOKIE, session.cookie, path="/", secure=True, httponly=True, samesite="strict")


async def read_form(request: Request) -> Form:
    """Return the fields of a form. Raises RequestError."""
    try:
        body = await read_body(request, limit=MAX_FORM_BYTES)
    except RequestTooLarge:
        raise RequestError(
            f"The form has more than {MAX_FORM_BYTES} bytes: select less.", code="invalid_request"
        ) from None
    try:
        fields = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS, errors="strict"
        )
    except ValueError:
        raise RequestError("The form cannot be read.", code="invalid_request") from None
    if any("\0" in name + value for name, value in fields):
        raise RequestError("Remove the NUL character.", code="invalid_request")
    return Form(fields)


def foreign_form(request: Request) -> Response:
    """Return the answer to a form of another site."""
    text = (
        "This form was not sent by a page of the dashboard, so nothing was done. Open the page again and "
        "repeat the action. A proxy in front must leave Host, Origin and Sec-Fetch-Site as they are."
    )
    return render(
        request, "error.html", {"title": "Not done", "text": text, "tries_again": False}, status=403
    )


def _show(request: Request, caller: Caller, answer: View | Response) -> Response:
    if isinstance(answer, Response):
        return answer
    return render(request, answer.template, answer.values, status=answer.status, caller=caller)


def _to_login(request: Request) -> Response:
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    login = f"{LOGIN}?{urlencode({'next': target if request.method == 'GET' else HOME})}"
    if is_live(request):
        return Response(status_code=401, headers={"hx-redirect": login, **SAFE_HEADERS})
    return go_to(login)


_DATABASE: Final = (
    "The database does not answer. Webhooks are answered 503 until it does, and Clipia sends them again."
)
_AGAIN: Final = "This page tries again by itself."
_LOOK: Final = "The action may have been carried out: look before you repeat it."
_TITLES: Final[Mapping[int, str]] = {
    400: "This input is not valid",
    402: "Too expensive",
    403: "Not allowed",
    404: "Not found",
    409: "Not possible now",
    410: "Gone",
    503: "Not available now",
}


def _error_view(error: ReceiverError, *, is_action: bool) -> View:
    status = status_of(error)
    text = str(error)
    if isinstance(error, DatabaseUnavailable):
        text = f"{_DATABASE} {_LOOK if is_action else _AGAIN}"
    tries_again = status == HTTPStatus.SERVICE_UNAVAILABLE and not is_action
    return _failure(_TITLES.get(status, "An error"), text, status, tries_again=tries_again)


def _failure(title: str, text: str, status: int, *, tries_again: bool = False) -> View:
    values = {"title": title, "text": text, "tries_again": tries_again}
    return View(template="error.html", values=values, status=status)


def status_of(error: ReceiverError) -> int:
    """Return the status of the page that shows an error."""
    if isinstance(error, RequestError):
        known = ERROR_CODES.get(error.code)
        return known.status if known else 400
    return 503
