"""Authorization over HTTP: every route with every kind of credential, and access to other callers' jobs."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route
from support.commands import ReceiverProcess
from support.payloads import SECRET, body, signed

from receiver import dashboard
from receiver.app import Only, create_app
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, running
from receiver.sandbox import create_app as create_sandbox
from receiver.setting_fields import SCOPES, Scope
from receiver.settings import Settings

MODEL = "nano-banana-2"
JOB: dict[str, Any] = {"model": MODEL, "input": {"prompt": "a cat"}}
OWNER = "token-of-owner-0123456789"

OPEN = {
    "GET /livez": 200,
    "GET /readyz": 200,
    # These need a signature in place of a token.
    "POST /clipia/webhook": 401,
    "POST /clipia/webhook/{source}": 401,
    "POST /clipia/webhook/{source}/{job}": 401,
}
"""Routes that need no token, with the status of their answer."""
DOCUMENTS = {"GET /openapi.json", "GET /docs"}
"""Routes of the internal half that need no token: they have nothing that the source code does not have."""
PAGES = {f"{page.method} /dashboard{page.path}" for page in dashboard.PAGES}
"""Pages of the dashboard, which need a session."""
SESSIONLESS = {
    "GET /dashboard/login",
    "POST /dashboard/login",
    "POST /dashboard/logout",
    "GET /dashboard/static/{name}",
}
"""Routes of the dashboard that show nothing of the installation."""
GUARDED: dict[str, tuple[Scope, int]] = {
    "GET /metrics": ("read", 200),
    "POST /v1/jobs": ("submit", 201),
    "GET /v1/jobs": ("read", 200),
    "GET /v1/jobs/costs": ("read", 200),
    # The job of another caller: 404, unless the caller has the scope `operate`.
    "GET /v1/jobs/{id}": ("read", 404),
    "POST /v1/jobs/{id}/resubmit": ("operate", 409),
    "POST /v1/jobs/{id}/cancel": ("operate", 200),
    "GET /v1/freeze": ("read", 200),
    "POST /v1/freeze": ("operate", 400),
    "DELETE /v1/freeze": ("operate", 409),
    "GET /v1/models": ("read", 200),
    "GET /v1/models/{slug}": ("read", 200),
    "POST /v1/models/{slug}/estimate": ("read", 200),
    "GET /v1/account": ("operate", 200),
    "GET /v1/status": ("read", 200),
    "GET /v1/media/{id}": ("read", 404),
    "GET /v1/settings": ("operate", 200),
    "GET /v1/workers": ("read", 200),
    "GET /v1/events/{id}/route": ("operate", 404),
    "GET /v1/events/{id}/links": ("operate", 404),
    "POST /v1/events/{id}/give-up": ("operate", 404),
    "GET /v1/verification": ("operate", 200),
    "POST /v1/prune": ("operate", 400),
    "POST /v1/recovery": ("operate", 400),
    "GET /v1/events": ("operate", 200),
    "GET /v1/events/{id}": ("operate", 404),
    "DELETE /v1/events/{id}": ("operate", 404),
    "GET /v1/events/{id}/receipts": ("operate", 404),
    "POST /v1/events/{id}/receipts/{seq}/promote": ("operate", 404),
    "POST /v1/events/{id}/replay": ("operate", 404),
    "GET /v1/explain/{id}": ("operate", 200),
    # The body is that of a job.
    "POST /v1/events/fetch": ("operate", 400),
    "GET /v1/tail": ("operate", 200),
    "GET /v1/deliveries": ("operate", 200),
    "GET /v1/deliveries/failures": ("operate", 200),
    "GET /v1/deliveries/{id}": ("operate", 404),
    "GET /v1/deliveries/{id}/message": ("operate", 404),
    "POST /v1/deliveries/{id}/discard": ("operate", 404),
    # The body is that of a job.
    "POST /v1/deliveries/retry": ("operate", 400),
    "POST /v1/deliveries/{id}/retry": ("operate", 404),
    "POST /v1/deliveries/move": ("operate", 400),
    "POST /v1/deliveries/discard": ("operate", 400),
    "GET /v1/replays": ("operate", 200),
    "POST /v1/replays": ("operate", 400),
    "GET /v1/replays/{id}": ("operate", 404),
    "POST /v1/replays/{id}/cancel": ("operate", 404),
    "GET /v1/destinations": ("read", 200),
    "POST /v1/destinations/{name}/pause": ("operate", 404),
    "POST /v1/destinations/{name}/resume": ("operate", 404),
    "POST /v1/destinations/{name}/test": ("operate", 404),
    "GET /v1/alerts": ("read", 200),
    "GET /v1/audit": ("operate", 200),
    "GET /v1/retention": ("read", 200),
    "GET /v1/rejections": ("operate", 200),
    "GET /v1/rejections/causes": ("operate", 200),
    "GET /v1/rejections/{id}": ("operate", 404),
}
"""Routes that need a scope, with the status of the answer to a caller that has it."""
KNOWN = {"POST /mcp": 400}
"""Routes for each known caller, whatever its scopes, with the status of the answer to this body.

An agent's scopes decide which tools it has: tests/integration/test_agents.py.
"""
ALLOWED_WITH_ALL = {"GET /v1/jobs/{id}": 200}

SUBSETS = list(chain.from_iterable(combinations(SCOPES, size) for size in range(len(SCOPES) + 1)))


def token_of(scopes: tuple[Scope, ...]) -> str:
    """Return the token with exactly these scopes."""
    return f"token-for-{'-'.join(scopes) or 'nothing'}-0123456789"


TOKENS = [
    {"name": "owner", "token": OWNER, "scopes": ["submit", "read"]},
    *(
        {"name": "-".join(("has", *scopes)), "token": token_of(scopes), "scopes": list(scopes)}
        for scopes in SUBSETS
    ),
]

BAD_CREDENTIALS: dict[str, list[tuple[str, str | bytes]]] = {
    "nothing": [],
    "an empty header": [("Authorization", "")],
    "a scheme alone": [("Authorization", "Bearer")],
    "a scheme and a space": [("Authorization", b"Bearer ")],
    "a token alone": [("Authorization", OWNER)],
    "another scheme": [("Authorization", f"Basic {OWNER}")],
    "Clipia's scheme": [("Authorization", f"Key {OWNER}")],
    "Clipia's header": [("X-Api-Key", OWNER)],
    "a cookie": [("Cookie", f"token={OWNER}; Authorization=Bearer {OWNER}")],
    "a tab": [("Authorization", f"Bearer\t{OWNER}")],
    "a wrong token": [("Authorization", "Bearer wrong-token-0123456789")],
    "a token too short": [("Authorization", f"Bearer {OWNER[:-1]}")],
    "a token too long": [("Authorization", f"Bearer {OWNER}0")],
    "a token in capitals": [("Authorization", f"Bearer {OWNER.upper()}")],
    "a token in quotes": [("Authorization", f'Bearer "{OWNER}"')],
    "two tokens": [("Authorization", f"Bearer {OWNER}, {OWNER}")],
    "a name and a token": [("Authorization", f"Bearer owner:{OWNER}")],
    "no ASCII": [("Authorization", b"Bearer \xff\xfe")],
    "a long one": [("Authorization", f"Bearer {'x' * 12_000}")],
    "a wrong one before a right one": [
        ("Authorization", "Bearer wrong-token-0123456789"),
        ("Authorization", f"Bearer {OWNER}"),
    ],
}


class Site:
    """A receiver without a worker inside the test, and a sandbox that it submits to over HTTP."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        # Answers are compared with all their headers, so their requests have one id.
        headers = {"X-Request-Id": "test"}
        self.client = httpx.AsyncClient(transport=transport, base_url="http://receiver", headers=headers)

    async def call(self, route: str, *, job_id: str = "x", headers: Any = ()) -> httpx.Response:
        """Call a route as its table writes it."""
        method, path = route.split()
        for name, value in {
            "source": "clipia",
            "job": job_id,
            "id": job_id,
            "slug": MODEL,
            "seq": "1",
        }.items():
            path = path.replace(f"{{{name}}}", value)
        content = JOB if method == "POST" else None
        return await self.client.request(method, path, json=content, headers=list(headers))

    async def as_(self, token: str, method: str, path: str, **options: Any) -> httpx.Response:
        """Make a request with a token."""
        return await self.client.request(method, path, headers=bearer(token), **options)

    async def submit(self, token: str, key: str | None = None, **changes: Any) -> dict[str, Any]:
        """Submit a job and return it."""
        headers = dict(bearer(token)) | ({} if key is None else {"Idempotency-Key": key})
        response = await self.client.post("/v1/jobs", json=JOB | changes, headers=headers)
        assert response.status_code == 201, response.text
        job: dict[str, Any] = response.json()
        return job


@asynccontextmanager
async def make_site(
    database_url: str, clipia: str, *, only: Only | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """Open a receiver."""
    values = {"clipia_webhook_secret": SECRET, "clipia_key": "clipia_live_x", "api_tokens": TOKENS}
    values |= {"database_url": database_url, "clipia_base_url": clipia, "internal_url": "http://receiver"}
    app = create_app(Settings.load(**(values | settings)), only=only, worker=False)
    async with app.router.lifespan_context(app):
        site = Site(app)
        yield site
        await site.client.aclose()


@pytest.fixture
async def clipia() -> AsyncIterator[str]:
    """A sandbox whose generations do not end."""
    async with running(create_sandbox(SandboxOptions(duration=60, **WITHOUT_LIMITS), secret=SECRET)) as url:
        yield url


@pytest.fixture
async def site(database_url: str, clipia: str) -> AsyncIterator[Site]:
    """A receiver, on each database."""
    async with make_site(database_url, clipia) as opened:
        yield opened


@pytest.fixture
async def local(migrated_sqlite: Path, tmp_path: Path, clipia: str) -> AsyncIterator[Site]:
    """A receiver on SQLite, for tests that do not depend on the database."""
    async with make_site(copy_of(migrated_sqlite, tmp_path), clipia) as opened:
        yield opened


# Routes


@pytest.mark.parametrize("only", [None, *get_args(Only)])
def test_every_route_has_a_row(tmp_path: Path, only: Only | None) -> None:
    """G1, G2: every route is declared in a table here, and the public half has those of `OPEN` alone."""
    settings = Settings.load(
        database_url=f"sqlite:///{tmp_path / 'receiver.db'}", clipia_webhook_secret=SECRET, api_tokens=TOKENS
    )
    health = {"GET /livez", "GET /readyz"}
    internal = {*GUARDED, *KNOWN, *DOCUMENTS, *PAGES, *SESSIONLESS, "GET /dashboard/media/{id}"}
    expected = {None: {*OPEN, *internal}, "webhook": {*OPEN}, "internal": {*internal, *health}}
    assert routes_of(create_app(settings, only=only, worker=False)) == expected[only]


def routes_of(app: Starlette) -> set[str]:
    """Return an application's routes; fail if one is of another kind than `Route`."""
    found = set()
    for route in app.routes:
        assert isinstance(route, Route), route
        methods = route.methods or set()
        assert "HEAD" not in methods or "GET" in methods
        found |= {f"{method} {route.path}" for method in methods - {"HEAD"}}
    return found


@pytest.mark.parametrize("only", get_args(Only))
async def test_the_other_half_is_404(migrated_sqlite: Path, tmp_path: Path, clipia: str, only: Only) -> None:
    """G2: a route of the other listener is 404 on this one, even with a token that has all scopes."""
    internal = [*GUARDED, *KNOWN, *DOCUMENTS, *PAGES, *SESSIONLESS]
    foreign = internal if only == "webhook" else [route for route in OPEN if "webhook" in route]
    content = body()
    async with make_site(copy_of(migrated_sqlite, tmp_path), clipia, only=only) as site:
        for route in foreign:
            response = await site.call(route, headers=bearer(token_of(SCOPES)))
            assert response.status_code == 404, route
        delivered = await site.client.post("/clipia/webhook", content=content, headers=signed(content))
        assert delivered.status_code == (200 if only == "webhook" else 404)
        assert (await site.client.get("/livez")).status_code == 200


# Pages


def address(route: str) -> str:
    """Return a route with values in the place of its parameters."""
    return re.sub(r"\{[^}]*\}", "x", re.sub(r"\{[^}]*:uuid\}", str(uuid.UUID(int=7)), route))


async def test_a_page_needs_a_session(local: Site) -> None:
    """G1, G4: without a session a page leads to the login, and a form is refused; a token is no session."""
    token = dict(bearer(token_of(SCOPES)))
    for route in sorted(PAGES):
        method, path = address(route).split(" ")
        for headers in ({}, token, token | {"cookie": "__Host-receiver-session=x.y"}):
            response = await local.client.request(method, path, headers=headers)
            assert response.status_code == (303 if method == "GET" else 403), route
            if method == "GET":
                assert response.headers["location"].startswith("/dashboard/login?next=")
    own = {"sec-fetch-site": "same-origin"}
    for route in sorted(each for each in PAGES if each.startswith("POST")):
        response = await local.client.post(address(route).split(" ")[1], headers=token | own)
        assert (response.status_code, response.headers["location"]) == (
            303,
            "/dashboard/login?next=%2Fdashboard",
        )
    assert (await local.client.get("/dashboard/media/x", headers=token)).status_code == 401


# Tokens


@pytest.mark.parametrize("scopes", SUBSETS, ids=lambda scopes: "+".join(scopes) or "none")
async def test_a_scope_opens_its_routes_and_no_others(local: Site, scopes: tuple[Scope, ...]) -> None:
    """G1: the matrix of every route and every set of scopes; a rejected request's body is not read."""
    job_id = (await local.submit(OWNER))["id"]
    headers = bearer(token_of(scopes))
    for route, (scope, status) in GUARDED.items():
        response = await local.call(route, job_id=job_id, headers=headers)
        expected = ALLOWED_WITH_ALL.get(route, status) if "operate" in scopes else status
        assert response.status_code == (expected if scope in scopes else 403), (route, response.text)
        if scope not in scopes:
            assert response.json() == {
                "error": {
                    "type": "permission_error",
                    "code": "insufficient_scope",
                    "message": f"This needs the scope `{scope}`.",
                }
            }
    for route, status in (OPEN | KNOWN).items():
        assert (await local.call(route, headers=headers)).status_code == status, route
    submitted = (await local.as_(token_of(SCOPES), "GET", "/v1/jobs")).json()["data"]
    assert len(submitted) == (2 if "submit" in scopes else 1)


async def test_invalid_credentials_open_no_route(local: Site) -> None:
    """G1: without a known token every guarded route answers the same 401, whichever credential was sent."""
    job_id = (await local.submit(OWNER))["id"]
    for route in (*GUARDED, *KNOWN):
        answers = {
            name: await local.call(route, job_id=job_id, headers=headers)
            for name, headers in BAD_CREDENTIALS.items()
        }
        for name, answer in answers.items():
            assert answer.status_code == 401, (route, name, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json() == {
                "error": {
                    "type": "authentication_error",
                    "code": "invalid_token",
                    "message": "Send Authorization: Bearer <token>.",
                }
            }
        # The answer does not depend on how close the token was.
        assert len({tuple(sorted(answer.headers.items())) for answer in answers.values()}) == 1
    for route, status in OPEN.items():
        for headers in BAD_CREDENTIALS.values():
            assert (await local.call(route, headers=headers)).status_code == status
    assert len((await local.as_(token_of(SCOPES), "GET", "/v1/jobs")).json()["data"]) == 1


async def test_a_token_s_scheme_may_be_spelled_in_any_way(local: Site) -> None:
    """The case of the scheme and the number of spaces after it do not matter (RFC 9110, section 11.1)."""
    for value in (f"Bearer {OWNER}", f"bearer {OWNER}", f"BEARER   {OWNER}", f"Bearer {OWNER} "):
        response = await local.client.get("/v1/jobs", headers=[(b"Authorization", value.encode())])
        assert response.status_code == 200


async def test_head_is_guarded_like_get(local: Site) -> None:
    """G1: HEAD needs the same token and scope as GET."""
    for route, (scope, _) in GUARDED.items():
        if not route.startswith("GET"):
            continue
        head = route.replace("GET", "HEAD")
        assert (await local.call(head)).status_code == 401
        without = tuple(each for each in SCOPES if each != scope)
        assert (await local.call(head, headers=bearer(token_of(without)))).status_code == 403


async def test_other_methods_and_paths_are_405_and_404(local: Site) -> None:
    """Other methods and paths are 405 and 404 in Clipia's shape, with or without a token; no job changes."""
    job_id = (await local.submit(OWNER))["id"]
    for headers in ((), bearer(token_of(SCOPES))):
        for route in (*OPEN, *GUARDED, *KNOWN):
            _, path = route.split()
            for method in {"PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods_of(path):
                response = await local.call(f"{method} {path}", job_id=job_id, headers=headers)
                assert response.status_code == 405, (method, path)
                assert response.json()["error"]["code"] == "method_not_allowed"
                allowed = response.headers["allow"].split(", ")
                assert sorted(allowed) == sorted(methods_of(path)), (method, path)
        for path in ("/", "/v1", "/v1/jobs/", "//v1/jobs", "/V1/jobs", f"/v1/jobs/{job_id}/", "/v1/jobs/x/y"):
            response = await local.client.get(path, headers=list(headers))
            assert response.status_code == 404, path
            assert response.json()["error"]["code"] == "not_found"
    assert (await local.as_(OWNER, "GET", f"/v1/jobs/{job_id}")).json()["state"] == "submitted"


def methods_of(path: str) -> set[str]:
    """Return the methods of a path, which a 405 has to name (RFC 9110, section 15.5.6)."""
    methods = {
        method for method, each in (route.split() for route in (*OPEN, *GUARDED, *KNOWN)) if each == path
    }
    return methods | {"HEAD"} if "GET" in methods else methods


async def test_without_tokens_the_internal_api_is_closed(
    migrated_sqlite: Path, tmp_path: Path, clipia: str
) -> None:
    """G1: if no token is configured, every request is rejected; the answer names the setting."""
    async with make_site(copy_of(migrated_sqlite, tmp_path), clipia, api_tokens=()) as site:
        for route in (*GUARDED, *KNOWN):
            for headers in BAD_CREDENTIALS.values():
                response = await site.call(route, headers=headers)
                if route == "GET /metrics":  # open until there is a token, as documented
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, route
                assert "RECEIVER_API_TOKENS" in response.json()["error"]["message"]


async def test_a_request_is_rejected_before_its_body_is_read(local: Site) -> None:
    """G1: if a caller may not submit, the answer is the same for a broken or too large body."""
    for content in (b"{", b"x" * 3_000_000):
        for headers, status in (((), 401), (bearer(token_of(("read",))), 403)):
            response = await local.client.post("/v1/jobs", content=content, headers=list(headers))
            assert response.status_code == status
            assert response.json()["error"]["code"] in ("invalid_token", "insufficient_scope")


# Callers and each other's jobs


READER, STRANGER, OPERATOR = (
    token_of(("read",)),
    token_of(("submit", "read")),
    token_of(("submit", "read", "operate")),
)


async def test_a_caller_does_not_see_another_callers_job(site: Site) -> None:
    """G3: for another caller's job every route answers at once, and the same as for an unknown id."""
    job_id = (await site.submit(OWNER, "k", metadata={"a": "1"}))["id"]
    nobody = "01a1fe04-89f8-77d7-8764-432122f47fc3"
    for token in (READER, STRANGER):
        for query in ("", "?wait=300"):
            # If the answer waited for the other caller's job, its delay would show that the job exists.
            async with asyncio.timeout(60):
                theirs = await site.as_(token, "GET", f"/v1/jobs/{job_id}{query}")
                none = await site.as_(token, "GET", f"/v1/jobs/{nobody}{query}")
            assert theirs.status_code == none.status_code == 404
            assert (theirs.content, theirs.headers) == (none.content, none.headers)
        for order in ("resubmit", "cancel"):
            theirs = await site.as_(token, "POST", f"/v1/jobs/{job_id}/{order}")
            none = await site.as_(token, "POST", f"/v1/jobs/{nobody}/{order}")
            assert theirs.status_code == none.status_code == 403
            assert theirs.content == none.content


async def test_a_caller_lists_its_own_jobs_alone(site: Site) -> None:
    """G3: no filter, cursor or sum shows a job of another caller."""
    theirs = [await site.submit(OWNER, metadata={"a": "1"}) for _ in range(2)]
    own = await site.submit(STRANGER, metadata={"a": "1"})
    for query in ("", "caller=has-submit-read", "metadata.a=1", f"model={MODEL}", "cursor=999999", "limit=1"):
        page = (await site.as_(STRANGER, "GET", f"/v1/jobs?{query}")).json()
        assert [job["id"] for job in page["data"]] == [own["id"]], query
        assert page["next"] is None
    for query in ("caller=owner", "caller=owner&metadata.a=1", "caller=", "caller=nobody"):
        page = (await site.as_(STRANGER, "GET", f"/v1/jobs?{query}")).json()
        assert page == {"data": [], "next": None}, query
    assert (await site.as_(READER, "GET", "/v1/jobs")).json()["data"] == []
    costs = (await site.as_(STRANGER, "GET", "/v1/jobs/costs?by=caller")).json()["data"]
    assert [(row["caller"], row["jobs"]) for row in costs] == [("has-submit-read", 1)]
    assert (await site.as_(STRANGER, "GET", "/v1/jobs/costs?caller=owner")).json()["data"] == []
    # Clipia's id finds a job, too.
    path = f"/v1/jobs/{theirs[0]['request_id']}"
    assert [(await site.as_(each, "GET", path)).status_code for each in (STRANGER, OWNER)] == [404, 200]
    assert (await site.as_(READER, "GET", "/v1/jobs/costs")).json()["data"] == []
    listed = (await site.as_(OWNER, "GET", "/v1/jobs")).json()["data"]
    assert [job["id"] for job in listed] == [job["id"] for job in theirs[::-1]]


async def test_a_key_belongs_to_its_caller(site: Site) -> None:
    """F8, G3: two callers may use the same key; it neither finds nor reveals the other caller's job."""
    first = await site.submit(OWNER, "k")
    second = await site.submit(STRANGER, "k")
    assert first["id"] != second["id"]
    headers = {**dict(bearer(STRANGER)), "Idempotency-Key": "k"}
    response = await site.client.post("/v1/jobs", json=JOB | {"metadata": {"a": "1"}}, headers=headers)
    assert (response.status_code, response.json()["job_id"]) == (409, second["id"])


async def test_operate_sees_every_job(site: Site) -> None:
    """G3: a caller with `operate` lists, waits for, sums up and resubmits the jobs of all callers."""
    jobs = [await site.submit(OWNER), await site.submit(STRANGER)]
    listed = (await site.as_(OPERATOR, "GET", "/v1/jobs")).json()["data"]
    assert [job["id"] for job in listed] == [job["id"] for job in jobs[::-1]]
    listed = (await site.as_(OPERATOR, "GET", "/v1/jobs?caller=owner")).json()["data"]
    assert [job["id"] for job in listed] == [jobs[0]["id"]]
    for job in jobs:
        for query in ("", "?wait=0.05"):
            shown = await site.as_(OPERATOR, "GET", f"/v1/jobs/{job['id']}{query}")
            assert (shown.status_code, shown.json()["caller"]) == (200, job["caller"])
        again = await site.as_(OPERATOR, "POST", f"/v1/jobs/{job['id']}/resubmit")
        assert again.json()["error"]["code"] == "not_resubmittable"
    costs = (await site.as_(OPERATOR, "GET", "/v1/jobs/costs?by=caller")).json()["data"]
    assert [row["caller"] for row in costs] == ["has-submit-read", "owner"]


async def test_operate_alone_reads_and_submits_nothing(local: Site) -> None:
    """G1: no scope includes another one, and neither does `operate`."""
    job_id = (await local.submit(OWNER))["id"]
    token = token_of(("operate",))
    for method, path in (("GET", f"/v1/jobs/{job_id}"), ("GET", "/v1/jobs"), ("POST", "/v1/jobs")):
        assert (await local.as_(token, method, path)).status_code == 403


# Secrets

CANARIES = {
    "a token": "canary-token-0123456789",
    "a wrong token": "canary-wrong-0123456789",
    "Clipia's key": "clipia_live_canary-key",
    "the webhook secret": "whsec_canary-0123456789",
}
CONTENTS = {
    "a prompt": "canary prompt",
    "metadata": "canary metadata",
    "an invalid body": "canary invalid",
    "a webhook": "canary webhook",
}


@dataclass(frozen=True)
class Traces:
    """The log, the answers and the database after requests with canaries."""

    log: str
    answers: str
    database: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """The traces of a receiver at log level DEBUG that has served good and bad requests and ended."""
    folder = tmp_path_factory.mktemp("canaries")
    secret = CANARIES["the webhook secret"]
    async with running(
        create_sandbox(SandboxOptions(duration=60, **WITHOUT_LIMITS), secret=secret)
    ) as clipia:
        receiver = ReceiverProcess(
            folder,
            RECEIVER_LOG_LEVEL="DEBUG",
            RECEIVER_API_TOKENS=f"canary:{CANARIES['a token']}",
            CLIPIA_KEY=CANARIES["Clipia's key"],
            CLIPIA_WEBHOOK_SECRET=secret,
            CLIPIA_BASE_URL=clipia,
        )
        await asyncio.to_thread(receiver.start)
        try:
            async with (
                httpx.AsyncClient(base_url=receiver.url, verify=False, timeout=30) as client,
                httpx.AsyncClient(base_url=clipia) as sandbox,
            ):
                answers = await _leave_traces(client, secret)
                await sandbox.patch("/_sandbox/options", json={"refuse_submits": "invalid_api_key"})
                answers += await _leave_traces(client, secret)
        finally:
            await asyncio.to_thread(receiver.stop)
    files = sorted(folder.glob("receiver.db*"))
    return Traces(
        log=receiver.log.read_text(),
        answers="\n".join(f"{answer.status_code} {answer.headers} {answer.text}" for answer in answers),
        database="".join(path.read_bytes().decode("latin-1") for path in files),
    )


async def _leave_traces(client: httpx.AsyncClient, secret: str) -> list[httpx.Response]:
    job = JOB | {"input": {"prompt": CONTENTS["a prompt"]}, "metadata": {"m": CONTENTS["metadata"]}}
    rejected = JOB | {"input": {"prompt": 1, CONTENTS["an invalid body"]: 1}}
    paths = ("/v1/jobs", "/v1/jobs/x", "/v1/account", "/v1/models", "/metrics", "/v1/jobs?m=x")
    calls: list[tuple[str, str, Any]] = [("GET", path, None) for path in paths]
    calls += [("POST", "/v1/jobs", content) for content in (job, rejected, job | {"max_cost": 1})]
    answers = [
        await client.request(method, path, json=content, headers=bearer(token))
        for token in (CANARIES["a token"], CANARIES["a wrong token"])
        for method, path, content in calls
    ]
    webhook = body(note=CONTENTS["a webhook"])
    for key in (secret, "whsec_other-0123456789"):
        headers = signed(webhook, secret=key)
        answers += [await client.post("/clipia/webhook", content=webhook, headers=headers)]
    return answers


def test_secrets_are_in_no_log_answer_or_database(traces: Traces) -> None:
    """G8: tokens, Clipia's key and the webhook secret are in no log, no answer and no database."""
    assert "job issued" in traces.log
    assert "insufficient_scope" not in traces.answers
    assert "submissions paused" in traces.log
    for name, canary in CANARIES.items():
        assert canary not in traces.log, name
        assert canary not in traces.answers, name
        assert canary not in traces.database, name


def test_contents_are_not_in_the_log(traces: Traces) -> None:
    """G8, G9: inputs, metadata and webhooks are in the database, and not in the log, even at DEBUG."""
    for name in ("a prompt", "metadata", "a webhook"):
        assert CONTENTS[name] in traces.database, name
    for name, canary in CONTENTS.items():
        assert canary not in traces.log, name


# Helpers


def bearer(token: str) -> list[tuple[str, str]]:
    """Return the header that carries a token."""
    return [("Authorization", f"Bearer {token}")]


def copy_of(template: Path, folder: Path) -> str:
    """Return the URL of a copy of an SQLite file."""
    path = folder / "receiver.db"
    path.write_bytes(template.read_bytes())
    return f"sqlite:///{path}"
