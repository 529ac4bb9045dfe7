"""Sessions and forms of the dashboard over HTTP: a client may send requests that no browser sends."""

import asyncio
import base64
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from receiver import dashboard
from receiver.api.auth import Tokens
from receiver.app import create_app
from receiver.dashboard import login, sessions
from receiver.dashboard.rendering import CONTENT_SECURITY_POLICY
from receiver.settings import Settings

SECRET = "whsec_test-0123456789abcdef"
TOKEN = "token-of-ann-0123456789"
OWN = {"sec-fetch-site": "same-origin"}
HOST = "receiver.test"


def settings(
    tmp_path: Path, tokens: str = f"ann:{TOKEN}:read+operate,reader:reads-only-0123456789:read"
) -> Settings:
    """Return settings with tokens."""
    return Settings.load(
        database_url=f"sqlite:///{tmp_path / 'receiver.db'}", clipia_webhook_secret=SECRET, api_tokens=tokens
    )


@asynccontextmanager
async def visiting(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """Open the client of a person."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=f"https://{HOST}") as client:
        yield client


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A browser's client on a receiver."""
    async with visiting(create_app(settings(tmp_path), worker=False)) as opened:
        yield opened


async def log_in(client: httpx.AsyncClient, token: str = TOKEN, **headers: str) -> httpx.Response:
    """Send the form of the login."""
    return await client.post("/dashboard/login", data={"token": token}, headers=headers or OWN)


async def test_the_cookie_is_this_hosts_alone(client: httpx.AsyncClient) -> None:
    """G4: the session's cookie is Secure, HttpOnly and SameSite=Strict; it holds no token."""
    response = await log_in(client)
    cookie = response.headers["set-cookie"]
    assert response.status_code == 303
    assert cookie.startswith("__Host-receiver-session=")
    assert {each.strip().lower() for each in cookie.split(";")[1:]} == {
        "path=/",
        "secure",
        "httponly",
        "samesite=strict",
    }
    assert TOKEN not in cookie


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "same-origin"}, 303),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": f"https://{HOST}"}, 403),
        ({"origin": f"https://{HOST}"}, 303),
        ({"origin": "https://evil.test"}, 403),
        ({"origin": f"https://{HOST}.evil.test"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://[" + HOST}, 403),
        ({"x": "y"}, 403),
    ],
)
async def test_only_our_own_pages_send_forms(
    client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    """G4: a form of another site, or of none, is refused, the login's and the logout's too."""
    assert (await log_in(client, **headers)).status_code == status
    assert (await client.post("/dashboard/logout", headers=headers)).status_code == status


async def test_every_answer_is_guarded(client: httpx.AsyncClient) -> None:
    """G5: each page has the policy without inline code, may not be framed, and is kept by no cache."""
    await log_in(client)
    paths = [
        "/dashboard/login",
        *(f"/dashboard{page.path}" for page in dashboard.PAGES if page.method == "GET"),
    ]
    for path in paths:
        headers = (await client.get(path)).headers
        assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY, path
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff"), path
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "frame-ancestors 'none'" in CONTENT_SECURITY_POLICY


def test_no_template_marks_text_as_safe() -> None:
    """G5: each value of a template is escaped, and none has code or styles in an attribute."""
    folder = Path(dashboard.__file__).parent / "templates"
    templates = list(folder.rglob("*.html"))
    assert templates
    for path in templates:
        text = path.read_text(encoding="utf-8")
        wrong = re.findall(
            r"\|\s*safe\b|autoescape|\son\w+=|\sstyle=|hx-on|js:|javascript:|<style|\|\s*tojson", text
        )
        assert not wrong, (path.name, wrong)


def test_htmx_is_the_published_file() -> None:
    """The file is `dist/htmx.min.js` of the package htmx.org 4.0.1, byte for byte."""
    content = (Path(dashboard.__file__).parent / "static" / "htmx.min.js").read_bytes()
    assert b'this.version="4.0.1"' in content
    published = "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"
    assert hashlib.sha256(content).hexdigest() == published


async def test_wrong_tokens_are_limited(client: httpx.AsyncClient) -> None:
    """G6: after ten wrong tokens from one address, the right one has to wait, too."""
    for _ in range(login.MAX_FAILURES):
        assert (await log_in(client, "wrong")).status_code == 401
    response = await log_in(client)
    assert response.status_code == 429
    assert "wait 60 seconds" in response.text
    assert "set-cookie" not in response.headers


async def test_logins_at_the_same_time_are_limited(client: httpx.AsyncClient) -> None:
    """G6: logins whose forms arrive late, all at once, are counted like those one after the other."""
    sent = asyncio.Event()
    begun = asyncio.Semaphore(0)

    async def late() -> AsyncIterator[bytes]:
        begun.release()
        yield b"token="
        await sent.wait()
        yield b"wrong"

    logins = [
        asyncio.ensure_future(client.post("/dashboard/login", content=late(), headers=OWN)) for _ in range(30)
    ]
    async with asyncio.timeout(10):
        for _ in logins:
            await begun.acquire()
        sent.set()
        statuses = Counter([response.status_code for response in await asyncio.gather(*logins)])
    assert statuses == {401: login.MAX_FAILURES, 429: 30 - login.MAX_FAILURES}


async def test_a_form_that_does_not_arrive_is_not_awaited(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: a client without a session cannot hold a connection with a form that it never finishes."""
    monkeypatch.setattr("receiver.api.endpoints.BODY_SECONDS", 0.05)

    async def endless() -> AsyncIterator[bytes]:
        yield b"token="
        await asyncio.Event().wait()

    async with asyncio.timeout(5):
        response = await client.post("/dashboard/login", content=endless(), headers=OWN)
    assert response.status_code == 408
    assert "send it again" in response.text


async def test_a_form_that_is_broken_off_is_no_bug(tmp_path: Path) -> None:
    """A client that hangs up within the login's form is no error of the receiver."""
    received = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"token=", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        return received.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/dashboard/login",
        "query_string": b"",
        "headers": [(b"host", b"x"), (b"sec-fetch-site", b"same-origin")],
        "client": ("127.0.0.1", 1),
    }
    await create_app(settings(tmp_path), worker=False)(scope, receive, send)
    assert sent[0]["status"] == 400


def test_failures_are_forgotten() -> None:
    """G6: after a minute an address may try again; another address may at once."""
    failed = login.FailedLogins()
    for second in range(login.MAX_FAILURES):
        failed.note("10.0.0.1", now=float(second))
    assert failed.wait("10.0.0.2", now=10.0) == 0
    assert failed.wait("10.0.0.1", now=10.0) == 50
    assert failed.wait("10.0.0.1", now=60.0) == 0


def tokens_of(tmp_path: Path, text: str) -> Tokens:
    """Return the tokens of a setting."""
    return Tokens(settings(tmp_path, text).api_tokens)


def test_a_session_ends(tmp_path: Path) -> None:
    """G6: a session ends after an hour without a visit, after twelve hours, and with its token."""
    known = tokens_of(tmp_path, f"ann:{TOKEN}")
    ours = sessions.Sessions(known)
    begun = ours.begin(TOKEN, now=1000.0)
    assert begun is not None
    hour = sessions.IDLE_SECONDS
    assert ours.read(begun.cookie, now=1000.0 + hour) == begun
    assert ours.read(begun.cookie, now=1001.0 + hour) is None
    assert begun.renewed(1030.0) is None
    visit, now = begun, 1000.0
    while now + hour <= 1000.0 + sessions.LONGEST_SECONDS:
        now += hour
        found = visit.renewed(now)
        assert found is not None
        visit = found
        assert ours.read(visit.cookie, now=now) == visit
    assert ours.read(visit.cookie, now=1001.0 + sessions.LONGEST_SECONDS) is None
    rotated = sessions.Sessions(tokens_of(tmp_path, "ann:another-token-0123456789"))
    assert rotated.read(begun.cookie, now=1000.0) is None


def test_each_login_has_another_cookie(tmp_path: Path) -> None:
    """G6: a cookie that was planted before the login is not the session's."""
    ours = sessions.Sessions(tokens_of(tmp_path, f"ann:{TOKEN}"))
    cookies = {begun.cookie for _ in range(2) if (begun := ours.begin(TOKEN, now=1000.0))}
    assert len(cookies) == 2


@pytest.mark.parametrize(
    "cookie", ["", ".", "x", "x.y.z", "é.x", "W10.x", "bnVsbA.x", "." * 3000, "WyJhbm4iXQ.x"]
)
def test_odd_cookies_are_no_session(tmp_path: Path, cookie: str) -> None:
    """G6: a cookie that was not made here is no session, and no error."""
    assert sessions.Sessions(tokens_of(tmp_path, f"ann:{TOKEN}")).read(cookie, now=1000.0) is None


def test_a_strangers_cookie_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G6: 2 KB of a cookie may unpack to megabytes, so its signature is checked first."""
    unpacked: list[bytes] = []
    monkeypatch.setattr("itsdangerous.url_safe.zlib.decompress", unpacked.append)
    packed = base64.urlsafe_b64encode(zlib.compress(b"[" + b"[]," * 400_000 + b"[]]", 9)).decode().rstrip("=")
    cookie = f".{packed}.x"
    assert len(cookie) < 2048
    assert sessions.Sessions(tokens_of(tmp_path, f"ann:{TOKEN}")).read(cookie, now=1000.0) is None
    assert not unpacked


def test_a_token_of_two_callers_keeps_its_name(tmp_path: Path) -> None:
    """G1: a session belongs to the caller that the login found, even if two callers have one token."""
    ours = sessions.Sessions(tokens_of(tmp_path, f"ann:{TOKEN}:read,bob:{TOKEN}"))
    begun = ours.begin(TOKEN, now=1000.0)
    assert begun is not None
    assert ours.read(begun.cookie, now=1000.0) == begun


def test_a_changed_cookie_is_no_session(tmp_path: Path) -> None:
    """G6: each character of a cookie is signed, the claimed name too."""
    ours = sessions.Sessions(tokens_of(tmp_path, f"ann:{TOKEN},bob:token-of-bob-0123456789"))
    begun = ours.begin("token-of-bob-0123456789", now=1000.0)
    assert begun is not None
    whole: Any = begun.cookie
    for place in range(0, len(whole) - 1, 3):
        other = "A" if whole[place] != "A" else "B"
        assert ours.read(whole[:place] + other + whole[place + 1 :], now=1000.0) is None


@pytest.mark.parametrize(
    "address",
    ["https://evil.test", "//evil.test", "/\\evil.test", "/dashboard.evil", "javascript:x", "/dashboard\\x"],
)
async def test_login_leads_to_our_pages_alone(client: httpx.AsyncClient, address: str) -> None:
    """G4: the login sends nobody to another site."""
    data = {"token": TOKEN, "next": address}
    response = await client.post("/dashboard/login", data=data, headers=OWN)
    assert response.headers["location"] == "/dashboard/login?next=%2Fdashboard&after_login="
    response = await client.get(response.headers["location"])
    assert response.headers["location"] == "/dashboard"


async def test_a_token_without_the_scopes_opens_nothing(client: httpx.AsyncClient) -> None:
    """G1: the login names the scopes that a token lacks."""
    response = await log_in(client, "reads-only-0123456789")
    assert response.status_code == 403
    assert "`read` and `operate`" in response.text.replace("&#34;", '"')
    assert "set-cookie" not in response.headers


async def test_a_browser_that_keeps_no_cookie_is_told_so(client: httpx.AsyncClient) -> None:
    """The login over plain http explains why it does not last."""
    response = await log_in(client)
    client.cookies.clear()
    shown = await client.get(response.headers["location"])
    assert "did not keep the session" in shown.text


async def test_without_tokens_the_login_says_how_to_make_one(tmp_path: Path) -> None:
    """An installation without tokens has a login that nobody can pass; it says what to do."""
    async with visiting(create_app(settings(tmp_path, ""), worker=False)) as client:
        assert "RECEIVER_API_TOKENS=" in (await client.get("/dashboard/login")).text


async def test_odd_forms_are_errors(client: httpx.AsyncClient) -> None:
    """A form that is too large, or no form, gets a sentence."""
    for content in (b"token=" + b"x" * 300_000, b"\xff=1", b"a=1&" * 2000):
        response = await client.post("/dashboard/login", content=content, headers=OWN)
        assert response.status_code == 400


async def test_an_unknown_page_is_a_page(client: httpx.AsyncClient) -> None:
    """An address that no page has shows a page with the way on; without a session it leads to the login."""
    assert (await client.get("/dashboard/nothing")).status_code == 303
    await log_in(client)
    response = await client.get("/dashboard/nothing")
    assert (response.status_code, "no such page" in response.text) == (404, True)
    assert (await client.get("/dashboard/")).headers["location"] == "/dashboard"


async def test_a_bug_is_a_page(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that fails answers with a page, and never with the text of its error."""

    async def fail(_self: object) -> None:
        raise ZeroDivisionError("a text of a library")

    monkeypatch.setattr("receiver.client.Client.show_status", fail)
    await log_in(client)
    response = await client.get("/dashboard")
    assert (response.status_code, "a text of a library" in response.text) == (500, False)
    assert "A bug in the receiver" in response.text
