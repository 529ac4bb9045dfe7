"""The client's errors, its pages and its URLs; answers come from a function in place of a network."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.specification import read_specification

from receiver.api.endpoints import expected_error_response
from receiver.api.examples import EVENT_SUMMARY, STATUS
from receiver.client import Client
from receiver.client.calls import escaped
from receiver.config_file import read_remote
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    ReceiverUnavailable,
    RefusedByClipia,
    RequestError,
    RequestTooLarge,
    SettingsError,
)

TOKEN = "operator-0123456789abcdef"
URL = "http://receiver.internal:8000"
Answer = Callable[[httpx.Request], httpx.Response]


def client(answer: Answer, *, url: str = URL) -> Client:
    """Return a client whose calls `answer` answers."""
    return Client(url, TOKEN, transport=httpx.MockTransport(answer))


async def failure(response: httpx.Response) -> ReceiverError:
    """Return the error of a call that gets this answer."""
    async with client(lambda _request: response) as calls:
        with pytest.raises(ReceiverError) as caught:
            await calls.show_event("r-1")
    return caught.value


RAISED = [
    RequestError("there is no such event", code="not_found"),
    RequestError("it has ended", code="not_cancelable", job_id="5"),
    ClipiaUnavailable("no job was made", reason="submissions_frozen", retry_after=60.0),
    RequestTooLarge("the body is larger", code="invalid_request"),
    RefusedByClipia("no such model", code="model_gone", status=404, type_="invalid_request_error"),
    ClipiaUnavailable("Clipia is away", reason="overloaded", retry_after=7.0),
    SettingsError("CLIPIA_KEY is not set"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda each: type(each).__name__)
async def test_an_error_arrives_as_the_handler_raised_it(error: ReceiverError) -> None:
    """Class, message, code, type, job_id and Retry-After are those of the error in the receiver."""
    response = expected_error_response(error)
    sent = httpx.Response(response.status_code, headers=response.raw_headers, content=bytes(response.body))
    found = await failure(sent)
    assert (type(found), str(found)) == (type(error), str(error))
    for name in ("code", "type", "job_id", "reason", "retry_after"):
        assert getattr(found, name, None) == getattr(error, name, None), name


async def test_an_unavailable_database_is_an_error_of_the_database() -> None:
    """The database's own message stays in the receiver's log."""
    response = expected_error_response(DatabaseUnavailable("host db-1", reason="connection"))
    found = await failure(httpx.Response(503, headers=response.raw_headers, content=bytes(response.body)))
    assert isinstance(found, DatabaseUnavailable)
    assert "db-1" not in str(found)


PAGE = "<html>\x1b[2J it works </html>"
FOREIGN = {
    "a web page": (httpx.Response(200, html=PAGE), "not one of a receiver's internal API"),
    "a web page, 404": (httpx.Response(404, html=PAGE), "not one of a receiver's internal API"),
    "another program's JSON": (httpx.Response(200, json={"data": 5}), "not one of a receiver's"),
    "another program's error": (httpx.Response(400, json={"error": "no"}), "not one of a receiver's"),
    "an array": (httpx.Response(400, json=["x"]), "not one of a receiver's"),
    "a redirect": (httpx.Response(307, headers={"location": "https://x.test/"}), "redirects the call"),
    "a proxy": (httpx.Response(502, html=PAGE), "does the receiver behind it run"),
    "a bug": (
        httpx.Response(
            500,
            json={"error": {"type": "api_error", "code": "internal_error", "message": "x"}},
            headers={"x-request-id": "ab12"},
        ),
        "x_request_id ab12",
    ),
    "an unknown token": (
        httpx.Response(401, json={"error": {"type": "t", "code": "invalid_token", "message": "x"}}),
        "does not know the token",
    ),
    "another release": (
        httpx.Response(405, json={"error": {"type": "t", "code": "method_not_allowed", "message": "x"}}),
        "as new as this client",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_an_answer_of_something_else_names_the_origin_and_the_next_step(name: str) -> None:
    """Neither the answer's text nor the token is in the error."""
    response, text = FOREIGN[name]
    found = str(await failure(response))
    assert text in found
    assert URL in found
    assert "it works" not in found
    assert TOKEN not in found


async def test_a_wrong_listener_is_named() -> None:
    """A path without a key exists in each receiver: 404 means that another listener answers."""
    error = {"error": {"type": "t", "code": "not_found", "message": "Not Found"}}
    async with client(lambda _request: httpx.Response(404, json=error)) as calls:
        with pytest.raises(ReceiverUnavailable, match="has no GET /v1/status"):
            await calls.show_status()


async def test_text_of_the_other_side_cannot_change_the_terminal() -> None:
    """Escape sequences and secrets in a message are not printed."""
    message = f"\x1b]0;x\x07 {TOKEN}"
    found = await failure(
        httpx.Response(400, json={"error": {"type": "t", "code": "invalid_request", "message": message}})
    )
    assert str(found).isprintable()
    assert TOKEN not in str(found)


async def test_a_long_list_takes_several_calls() -> None:
    """The API's page has 200 rows at most; `next` is that of the last page that was read."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.params.get("limit"), request.url.params.get("cursor")))
        rows = [EVENT_SUMMARY] * int(request.url.params["limit"])
        return httpx.Response(200, json={"data": rows, "next": f"c{len(asked)}"})

    async with client(answer) as calls:
        page = await calls.list_events(limit=450)
    assert asked == [("200", None), ("200", "c1"), ("50", "c2")]
    assert (len(page.data), page.next) == (450, "c3")
    assert page.data[0]["received_at"] == datetime(2026, 1, 31, 12, tzinfo=UTC)


async def test_a_request_id_of_several_sources_names_no_event() -> None:
    """A request_id with a slash is looked up first: if two events have it, none of them is erased."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        rows = [EVENT_SUMMARY] * min(2, int(request.url.params["limit"]))
        return httpx.Response(200, json={"data": rows, "next": None})

    async with client(answer) as calls:
        with pytest.raises(RequestError) as caught:
            await calls.erase_event("a/b")
    assert (caught.value.code, asked) == ("ambiguous", ["GET"])


async def test_parameters_are_sent_as_the_api_reads_them() -> None:
    """None is left out, a time is ISO 8601, and metadata is a parameter for each name."""
    urls = []

    def answer(request: httpx.Request) -> httpx.Response:
        urls.append(request.url)
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        return httpx.Response(200, json={"data": [], "next": "7"})

    async with client(answer, url=f"{URL}/behind") as calls:
        await calls.list_events(
            since=datetime(2026, 1, 31, tzinfo=UTC), metadata={"a&b": "c d"}, after="5", wait=30
        )
    assert urls[0].path == "/behind/v1/events"
    assert dict(urls[0].params) == {
        "since": "2026-01-31T00:00:00+00:00",
        "metadata.a&b": "c d",
        "after": "5",
        "wait": "30",
        "limit": "50",
    }


@pytest.mark.parametrize(
    ("key", "text"),
    [("..", "%2E%2E"), (".", "%2E"), ("a/../b", "a%2F..%2Fb"), ("a?b#c", "a%3Fb%23c"), ("é", "%C3%A9")],
)
async def test_a_key_stays_one_segment_of_the_path(key: str, text: str) -> None:
    """A key cannot name another call."""
    paths = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(200, json=STATUS)

    async with client(answer) as calls:
        await calls._get(Any, f"/v1/events/{escaped(key)}")
    assert paths == [f"/v1/events/{text}".encode()]


@pytest.mark.parametrize(
    "url",
    [
        *("receiver.internal", "ftp://x", "http://", "http://x:0", "http://x:99999", "http://x/?a=b"),
        *("http://x/#y", "http://user:a-long-password@x", "http://x y", "http://x/\u00e9", "http://[::1"),
    ],
)
def test_a_wrong_url_is_an_error_without_its_password(url: str) -> None:
    """Only http and https URLs without a login are taken."""
    with pytest.raises(SettingsError, match="http:// or https://") as caught:
        Client(url, TOKEN)
    assert "a-long-password" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "\u00e9"])
def test_a_wrong_token_is_an_error(token: str) -> None:
    """A header could not carry it."""
    with pytest.raises(SettingsError, match="token"):
        Client(URL, token)


def test_a_missing_certificate_file_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads SSL_CERT_FILE."""
    monkeypatch.setenv("SSL_CERT_FILE", "/absent/ca.pem")
    with pytest.raises(SettingsError, match="SSL_CERT_FILE"):
        Client("https://receiver.internal", TOKEN)


def test_options_take_the_place_of_variables() -> None:
    """Without a URL the command works with this machine's database, and a URL needs a token."""
    variables = {"RECEIVER_URL": f" {URL}\n", "RECEIVER_TOKEN": TOKEN}
    assert read_remote({}) is None
    assert read_remote({"RECEIVER_TOKEN": TOKEN}) is None
    assert read_remote(variables) == (URL, TOKEN)
    assert read_remote(variables, url="http://other", token="another-token") == (
        "http://other",
        "another-token",
    )
    assert read_remote(variables, url="") is None
    with pytest.raises(SettingsError, match="RECEIVER_TOKEN"):
        read_remote({"RECEIVER_URL": URL})


async def _raw_server(content: bytes) -> tuple[asyncio.Server, str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(content)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, "http://{}:{}".format(*server.sockets[0].getsockname())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nabcd",
    ],
    ids=["closed", "no HTTP", "cut off", "broken gzip"],
)
async def test_an_answer_that_is_cut_off_is_no_answer(content: bytes) -> None:
    """The error is ours, and names the origin."""
    server, url = await _raw_server(content)
    async with server, Client(url, TOKEN) as calls:
        with pytest.raises(ReceiverUnavailable, match="no answer from the receiver at") as caught:
            await calls.show_status()
    assert url in str(caught.value)


async def test_nobody_listens() -> None:
    """A receiver that does not run is named by its origin."""
    server, url = await _raw_server(b"")
    server.close()
    await server.wait_closed()
    async with Client(url, TOKEN) as calls:
        with pytest.raises(ReceiverUnavailable, match=f"{url} .*connection refused"):
            await calls.show_status()


async def test_an_endless_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer above the bound is not read to its end."""
    monkeypatch.setattr("receiver.client.calls.MAX_ANSWER_BYTES", 10)
    found = await failure(httpx.Response(200, content=b"x" * 11))
    assert "more than 10 bytes" in str(found)


def test_every_operation_has_a_method_of_its_name(tmp_path: Path) -> None:
    """A call of the API without a method would be out of reach for commands and for Python programs."""
    ids = {
        operation["operationId"]
        for path, methods in read_specification(tmp_path)["paths"].items()
        if path.startswith("/v1/")
        for operation in methods.values()
    }
    # A file is for programs that follow the link of a message.
    assert {name for name in ids - {"get_file"} if not hasattr(Client, name)} == set()
