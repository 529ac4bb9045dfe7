"""Clipia's client with answers that the sandbox never sends, and the catalogue on both databases."""

import asyncio
import base64
import gzip
import json
import time
import uuid
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote

import httpcore
import orjson
import pytest
from support.clipia import (
    LIVE,
    MODEL,
    PRICE,
    PROMPT,
    TEST,
    OddClipia,
    Request,
    Sandbox,
    World,
    accepted,
    answer,
    refusal,
    refused,
)
from support.servers import free_port

from receiver.api.answers import status_of
from receiver.clipia import catalogue
from receiver.clipia import client as client_module
from receiver.clipia.client import Accepted, Call, ClipiaClient
from receiver.core.quota import SHARES
from receiver.db.tables import accounts
from receiver.errors import (
    AccountRefused,
    ClipiaUnavailable,
    RefusedByClipia,
    RefusedForNow,
    RequestError,
    SettingsError,
)

KEY = uuid.UUID("6f2c6c52-29f6-4d1e-9a61-0d2f8e6f0c11")
BODY = b'{ "input" : {"prompt":"caf\xc3\xa9"}}'

PERMANENT = [
    (400, "invalid_request"),
    (400, "webhook_url_invalid"),
    (400, "model_input_invalid"),
    (422, "model_input_invalid"),
    (404, "not_found"),
    (404, "model_not_found"),
    (409, "idempotency_key_reuse"),
]
FOR_NOW = [
    (402, "insufficient_credits"),
    (402, "subscription_required"),
    (403, "insufficient_scope"),
    (403, "forbidden"),
]
LATER = [
    (407, "proxy_authentication_required", True),
    (408, "request_timeout", True),
    (409, "request_in_progress", True),
    (421, "misdirected_request", True),
    (423, "locked", True),
    (425, "too_early", True),
    (499, "client_closed_request", True),
    (429, "rate_limit_exceeded", False),
    (429, "concurrency_limit_exceeded", False),
    (500, "internal_error", True),
    (502, "service_unavailable", True),
    (503, "service_unavailable", True),
    (504, "service_unavailable", True),
]


@pytest.fixture
async def odd() -> AsyncIterator[OddClipia]:
    """A Clipia with scripted answers."""
    async with OddClipia().listening() as listening:
        yield listening


@pytest.fixture
async def client(odd: OddClipia) -> AsyncIterator[ClipiaClient]:
    """A client of the scripted Clipia."""
    opened = ClipiaClient(LIVE, base_url=odd.url)
    yield opened
    await opened.close()


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A sandbox."""
    async with Sandbox().listening() as listening:
        yield listening


@pytest.fixture
async def world(database_url: str, sandbox: Sandbox) -> AsyncIterator[World]:
    """A database and the sandbox."""
    async with World(database_url, sandbox.url) as made:
        yield made


@pytest.fixture
async def odd_world(database_url: str, odd: OddClipia) -> AsyncIterator[World]:
    """A database and a Clipia with scripted answers."""
    async with World(database_url, odd.url) as made:
        yield made


async def submit(client: ClipiaClient, call: Call | None = None) -> Accepted:
    """Submit the same bytes with the same key."""
    return await client.submit(MODEL, BODY, key=KEY, call=call or Call())


async def test_the_bytes_go_out_as_they_are(odd: OddClipia, client: ClipiaClient) -> None:
    """F2: Clipia receives exactly the frozen bytes, with our key, and the account's key in the header."""
    odd.script = [accepted("r-1", warnings=[{"code": "unknown_parameter"}, "odd"])]
    assert await submit(client) == Accepted(
        request_id="r-1", cost=PRICE, warnings=[{"code": "unknown_parameter"}]
    )
    (post,) = odd.posts
    assert (post.method, post.path, post.body) == ("POST", f"/v1/models/{MODEL}", BODY)
    assert post.headers["content-length"] == str(len(BODY))
    assert post.headers["content-type"] == "application/json"
    assert post.headers["idempotency-key"] == str(KEY)
    assert post.headers["authorization"] == f"Bearer {LIVE}"


async def test_calls_at_once_keep_their_bytes_apart(odd: OddClipia, client: ClipiaClient) -> None:
    """F2: each call sends its own bytes, even if many calls are in flight."""
    odd.script = [accepted()]
    bodies = {uuid.uuid4(): json.dumps({"input": {"seed": number}}).encode() for number in range(20)}
    await asyncio.gather(
        *(client.submit(MODEL, body, key=key, call=Call()) for key, body in bodies.items()),
        client.models(call=Call()),
        return_exceptions=True,
    )
    assert {uuid.UUID(post.headers["idempotency-key"]): post.body for post in odd.posts} == bodies


async def test_a_slug_stays_one_part_of_the_path(odd: OddClipia, client: ClipiaClient) -> None:
    """If a model's name looks like a path, the request still goes to the same address."""
    odd.script = [accepted()]
    await client.submit("../account?x#y", BODY, key=KEY, call=Call())
    assert odd.posts[0].path == "/v1/models/..%2Faccount%3Fx%23y"


@pytest.mark.parametrize(("status", "code"), PERMANENT)
async def test_an_invalid_request_is_refused(
    odd: OddClipia, client: ClipiaClient, status: int, code: str
) -> None:
    """If the request is invalid, the error is permanent and has Clipia's own text."""
    odd.script = [refused(status, code, "The model takes no cats.")]
    with pytest.raises(RequestError, match=r"^The model takes no cats\.$") as caught:
        await submit(client)
    assert (status_of(caught.value), caught.value.code, caught.value.type) == (status, code, "some_error")


async def test_an_account_is_refused_apart(odd: OddClipia, client: ClipiaClient) -> None:
    """F6: 401 is about the account, and the submission did not arrive."""
    odd.script = [refused(401, "invalid_api_key")]
    with pytest.raises(AccountRefused) as caught:
        await submit(client)
    error = caught.value
    assert (error.status, error.reason, error.may_have_arrived) == (401, "invalid_api_key", False)


@pytest.mark.parametrize(("status", "code"), FOR_NOW)
async def test_a_job_is_refused_for_now(odd: OddClipia, client: ClipiaClient, status: int, code: str) -> None:
    """F6: 402 and 403 are about a price, a model or a scope, not the account; the job did not arrive."""
    odd.script = [refused(status, code, "Not that one.")]
    with pytest.raises(RefusedForNow, match=r"^Not that one\.$") as caught:
        await submit(client)
    error = caught.value
    assert (error.status, error.reason, error.type) == (status, code, "some_error")
    assert error.may_have_arrived is False


NULLS: list[tuple[int, Any, type[Exception], str]] = [
    (402, {"type": "billing_error", "code": None, "message": None}, RefusedForNow, "http_402"),
    (400, {"type": "invalid_request_error", "code": None, "message": "No."}, RefusedByClipia, "http_400"),
    (400, {"type": None, "code": "invalid_request", "message": None}, RefusedByClipia, "invalid_request"),
    (401, {"type": "authentication_error", "code": None, "message": None}, AccountRefused, "http_401"),
    (401, {"type": None, "code": None, "message": None}, ClipiaUnavailable, "http_401"),
    (409, {"type": "invalid_request_error", "code": None}, ClipiaUnavailable, "http_409"),
    (429, {"type": "rate_limit_error", "code": None}, ClipiaUnavailable, "rate_limit_exceeded"),
    (500, {"type": "api_error", "code": None, "message": None}, ClipiaUnavailable, "http_500"),
    (403, {"code": 403, "message": "Forbidden"}, ClipiaUnavailable, "http_403"),
    (403, {"code": " ", "type": ""}, ClipiaUnavailable, "http_403"),
    (402, "no credits", ClipiaUnavailable, "http_402"),
]


@pytest.mark.parametrize(("status", "error", "kind", "reason"), NULLS)
async def test_absent_parts_of_an_error_are_not_text(
    odd: OddClipia, client: ClipiaClient, status: int, error: Any, kind: type[Exception], reason: str
) -> None:
    """F5: if Clipia's code, type or message is null or a number, it is not the text "None"."""
    odd.script = [answer(status, {"error": error})]
    with pytest.raises(kind) as caught:
        await submit(client)
    assert type(caught.value) is kind
    told = vars(caught.value)
    assert told["reason"] == reason
    assert "None" not in (str(caught.value), told.get("type"))
    assert str(caught.value).strip()


@pytest.mark.parametrize(("status", "code", "may_have_arrived"), LATER)
async def test_temporary_errors_are_transient(
    odd: OddClipia, client: ClipiaClient, status: int, code: str, *, may_have_arrived: bool
) -> None:
    """F3, F5, F7: if another attempt may help, the error tells whether this one may have been carried out."""
    odd.script = [refused(status, code)]
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    error = caught.value
    assert not isinstance(error, AccountRefused)
    assert (error.status, error.reason, error.may_have_arrived) == (status, code, may_have_arrived)
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (400, ClipiaUnavailable, "http_400"),
        (401, ClipiaUnavailable, "http_401"),
        (402, ClipiaUnavailable, "http_402"),
        (403, ClipiaUnavailable, "http_403"),
        (404, ClipiaUnavailable, "http_404"),
        (413, ClipiaUnavailable, "http_413"),
        (429, ClipiaUnavailable, "rate_limit_exceeded"),
        (500, ClipiaUnavailable, "http_500"),
    ],
)
async def test_a_proxys_error_is_not_clipias(
    odd: OddClipia, client: ClipiaClient, status: int, kind: type[Exception], reason: str
) -> None:
    """F5: an error without Clipia's code is from a proxy or a firewall, and ends no job."""
    odd.script = [answer(status, b"<html>Nope.</html>")]
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert type(caught.value) is kind
    assert caught.value.reason == reason


RETRY_AFTER = [
    ("7", 7.0),
    ("0", 0.0),
    ("1.5", 1.5),
    ("999999999", 86_400.0),
    ("inf", 86_400.0),
    ("nan", None),
    ("-3", None),
    ("soon", None),
    ("", None),
    ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ("Mon, 01 Jan 2027 00:00:00 +99999999999999", None),
]


@pytest.mark.parametrize(("text", "seconds"), RETRY_AFTER)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_read(
    odd: OddClipia, client: ClipiaClient, text: str, seconds: float | None, status: int
) -> None:
    """F7: seconds count as they are, up to a day; if the value is not a number, it is ignored."""
    odd.script = [refused(status, "x", Retry_After=text)]
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert caught.value.retry_after == seconds


async def test_retry_after_may_be_a_date(
    odd: OddClipia, client: ClipiaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: a date counts from now; if it is in the past, it is now."""
    now = 1_800_000_000.0
    monkeypatch.setattr("clipia._client.time.time", lambda: now)
    for ahead, seconds in ((90, 90.0), (-90, 0.0), (10**7, 86_400.0)):
        odd.script = [refused(429, "rate_limit_exceeded", Retry_After=formatdate(now + ahead, usegmt=True))]
        with pytest.raises(ClipiaUnavailable) as caught:
            await submit(client)
        assert caught.value.retry_after == seconds


UNREADABLE = {
    "no JSON": answer(content=b"OK"),
    "nothing": answer(content=b""),
    "not UTF-8": answer(content=b'{"request_id":"\xff"}'),
    "null": answer(content=None),
    "a list": answer(content=[1]),
    "no request_id": answer(content={"status": "IN_QUEUE"}),
    "no status": answer(content={"request_id": "r-1"}),
    "a number for an id": answer(content={"request_id": 7, "status": "IN_QUEUE"}),
    "null for an id": answer(content={"request_id": None, "status": "IN_QUEUE"}),
    "an empty id": answer(content={"request_id": "", "status": "IN_QUEUE"}),
    "an endless id": answer(content={"request_id": "r" * 300, "status": "IN_QUEUE"}),
    "an id with a NUL": answer(content={"request_id": "r\x00", "status": "IN_QUEUE"}),
    "another place": answer(302, b"", Location="/elsewhere"),
    "nothing to say": answer(204, b""),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_a_missing_answer_is_a_timeout(odd: OddClipia, client: ClipiaClient, name: str) -> None:
    """F5: if a 2xx has no usable request_id, it is unknown whether there is a generation."""
    odd.script = [UNREADABLE[name]]
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert (caught.value.reason, caught.value.may_have_arrived) == ("unreadable", True)
    assert len(odd.requests) == 1


ODD_IDS = ["req/7", "req:7", "req%7", "req%2F7", "req?7#x", "заказ-7", "../account", "a\\b", "..."]


@pytest.mark.parametrize("request_id", ODD_IDS)
async def test_an_id_of_other_characters_is_one(
    odd: OddClipia, client: ClipiaClient, request_id: str
) -> None:
    """F5: a submission with an unusual id is accepted, and queried with exactly that id."""
    odd.script = [accepted(request_id)]
    assert (await submit(client)).request_id == request_id
    odd.others = lambda _request: answer(content={"request_id": request_id, "status": "IN_QUEUE"})
    if request_id == "../account":
        # If a server decodes the path before it resolves it, it finds another resource.
        assert (await refusal(client.status(request_id, call=Call()))).code == "not_found"
        assert odd.other_paths == []
        return
    assert (await client.status(request_id, call=Call())).status == "IN_QUEUE"
    (path,) = odd.other_paths
    assert unquote(path) == f"/v1/requests/{request_id}/status"
    assert path.count("/") == 4


@pytest.mark.parametrize("request_id", ["req 7", "req\n7", "req\u200b7", f"sha256:{'0' * 64}"])
async def test_an_unusable_id_is_final(odd: OddClipia, client: ClipiaClient, request_id: str) -> None:
    """F5: an unusable id is final, because another attempt would get the same one."""
    odd.script = [accepted(request_id)]
    error = await refusal(submit(client))
    assert error.code == "request_id_unusable"
    assert ascii(request_id) in str(error)


async def test_a_null_status_is_unreadable(odd: OddClipia, client: ClipiaClient) -> None:
    """F10: if the status is null, it is not the text "None"."""
    odd.others = lambda _request: answer(content={"request_id": "r-1", "status": None})
    with pytest.raises(ClipiaUnavailable) as caught:
        await client.status("r-1", call=Call())
    assert caught.value.reason == "unreadable"


async def test_warnings_of_another_shape_spoil_no_answer(odd: OddClipia, client: ClipiaClient) -> None:
    """A paid submission is accepted even if its warnings are malformed."""
    strange: list[Any] = [None, [], {"code": "x"}, "x", 7, True]
    for warnings in strange:
        odd.script = [accepted("r-1", warnings=warnings)]
        assert (await submit(client)).warnings == []


async def test_an_answer_may_be_cut_anywhere(odd: OddClipia, client: ClipiaClient) -> None:
    """F5: if an answer is cut after any number of bytes, the outcome is unknown."""
    whole = accepted("r-1")
    for length in range(len(whole)):
        odd.script = [whole[:length]]
        with pytest.raises(ClipiaUnavailable) as caught:
            await submit(client)
        assert (caught.value.reason, caught.value.may_have_arrived) == ("no_answer", True), whole[:length]
    odd.script = [whole]
    assert (await submit(client)).request_id == "r-1"


async def test_a_call_has_a_deadline(odd: OddClipia, monkeypatch: pytest.MonkeyPatch) -> None:
    """F5: if an answer does not arrive, the call is given up, and may have been carried out."""
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_SECONDS", 0.1)
    never = asyncio.Event()

    async def hang(_request: Request) -> None:
        await never.wait()

    odd.on_submit = hang
    client = ClipiaClient(LIVE, base_url=odd.url)
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    await client.close()
    assert (caught.value.reason, caught.value.may_have_arrived) == ("no_answer", True)


async def test_a_drip_does_not_stretch_the_deadline(
    odd: OddClipia, client: ClipiaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: if single bytes arrive now and then, the connection stays alive, but the call times out."""
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_SECONDS", 0.2)
    odd.script, odd.pause = [accepted()], 0.01
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert caught.value.reason == "no_answer"


async def test_a_refused_connection_sent_no_bytes() -> None:
    """F5: if the connection is refused, the submission did not arrive."""
    client = ClipiaClient(LIVE, base_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    await client.close()
    assert (caught.value.reason, caught.value.may_have_arrived) == ("unreachable", False)


@pytest.mark.parametrize("end", ["\n", " ", "\t", "\0", "\u00e9", "\n\n"])
def test_a_key_that_no_header_carries_is_refused_unseen(end: str) -> None:
    """G8: httpx would reject the key and quote it; we reject it first and name the setting."""
    with pytest.raises(SettingsError, match="CLIPIA_KEY") as caught:
        ClipiaClient(f"clipia_live_cAnArY8f3b61{end}x", base_url="https://api.clipia.ai")
    assert "cAnArY" not in str(caught.value)


async def test_a_request_that_cannot_be_written_is_not_sent(odd: OddClipia, client: ClipiaClient) -> None:
    """G8: if httpx rejects a header, the request was not sent, and httpx's text is not shown."""
    client._sdk._http.headers["authorization"] = "Bearer cAnArY8f3b61\n"
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert (caught.value.reason, caught.value.may_have_arrived) == ("not_sent", False)
    assert str(caught.value) == ("the request is invalid and was not sent to Clipia (LocalProtocolError)")
    assert odd.posts == []


async def test_a_connection_timeout_sent_no_bytes(
    client: ClipiaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: if a call ends before it is connected, it was not sent."""

    async def hang(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(client_module, "CALL_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", hang)
    with pytest.raises(ClipiaUnavailable) as caught:
        await submit(client)
    assert (caught.value.reason, caught.value.may_have_arrived) == ("unreachable", False)


@pytest.mark.parametrize("status", [400, 401, 429, 503])
async def test_a_key_that_clipia_repeats_is_masked(odd: OddClipia, status: int) -> None:
    """G8: if Clipia's error repeats the Authorization header, whole or in half, the key is masked."""
    key = "clipia_live_cAnArY8f3b61d2e9b7c4"
    encoded = base64.b64encode(key.encode()).decode()
    odd.script = [refused(status, key[12:], f"Bearer {key} is bad; {key[:24]}…; {'x' * 960}{key}; {encoded}")]
    client = ClipiaClient(key, base_url=odd.url)
    with pytest.raises((RequestError, ClipiaUnavailable)) as caught:
        await submit(client)
    await client.close()
    told = str(caught.value) + str(vars(caught.value))
    assert "[masked]" in told
    assert "cAnArY8f" not in told
    assert "d2e9b7c4" not in told
    assert encoded[:16] not in told


async def test_a_key_in_a_warning_is_masked(odd: OddClipia, client: ClipiaClient) -> None:
    """G8: warnings are stored with the job and shown to callers, so that they are masked."""
    odd.script = [accepted("r-1", warnings=[{"code": "x", "message": "sent with clipia_live_0123456789"}])]
    answer = await submit(client)
    assert answer.warnings == [{"code": "x", "message": "sent with clipia_live_[masked]"}]


async def test_no_proxy_of_the_environment_sees_the_key(
    odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is sent only to Clipia."""
    proxy = f"http://127.0.0.1:{free_port()}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    odd.script = [accepted("r-1")]
    fresh = ClipiaClient(LIVE, base_url=odd.url)
    assert (await submit(fresh)).request_id == "r-1"
    await fresh.close()


async def test_limits_are_read_from_every_answer(odd: OddClipia, client: ClipiaClient) -> None:
    """F7: errors have these headers too; if a value is not a plain number, it is ignored."""
    odd.script = [refused(503, "x", RateLimit_Remaining=" 3 ", RateLimit_Reset="12")]
    call = Call()
    with pytest.raises(ClipiaUnavailable):
        await submit(client, call)
    assert (call.headers.limit, call.headers.remaining, call.headers.reset) == (6000, 3, 12)
    odd.script = [accepted()]
    for limit in ("-1", "1_0", "1.5", "1" * 10, "", "many"):
        odd.script = [answer(content={"request_id": "r", "status": "X"}, RateLimit_Limit=limit)]
        await submit(client, call)
        assert call.headers.limit is None
        assert call.headers.remaining is None


COSTS = [
    (12, 12),
    (0, 0),
    (12.0, 12),
    (11.2, 11.2),
    (0.0000001, 0),
    (True, None),
    (-1, None),
    ("12", None),
    (None, None),
    (2**53, None),
    (float("nan"), None),
    ([], None),
]


@pytest.mark.parametrize(("said", "read"), COSTS)
async def test_credits_are_exact(odd: OddClipia, client: ClipiaClient, said: Any, read: float | None) -> None:
    """F13: 12.0 is 12, a fraction is kept; if a cost is not a number of credits, it is unknown."""
    odd.script = [accepted(cost=said)]
    assert repr((await submit(client)).cost) == repr(read)
    odd.others = lambda _request: answer(content={"credits": said, "warnings": []})
    if read is None:
        with pytest.raises(ClipiaUnavailable) as caught:
            await client.estimate(MODEL, {}, call=Call())
        assert caught.value.reason == "unreadable"
    else:
        assert await client.estimate(MODEL, {}, call=Call()) == {"credits": read, "warnings": []}


@pytest.mark.parametrize(
    ("progress", "read"),
    [(40, 40), (0, 0), (None, None), (40.5, 40), ("40", None), (True, None), (10**9, 100), (-1, 0)],
)
async def test_progress_is_a_percentage_or_unknown(
    odd: OddClipia, client: ClipiaClient, progress: Any, read: int | None
) -> None:
    """A poll has the progress of a generation, if Clipia sends it."""
    content = {"request_id": "r-1", "status": "IN_PROGRESS", "progress": progress}
    odd.others = lambda _request: answer(content=content)
    status = await client.status("r-1", call=Call())
    assert (status.status, status.progress, status.terminal) == ("IN_PROGRESS", read, False)


async def test_a_result_that_is_not_there_yet(odd: OddClipia, client: ClipiaClient) -> None:
    """202 is not a result, with any body; 200 is one, byte for byte."""
    content = {"request_id": "r-1", "status": "COMPLETED", "new": 1}
    odd.others = lambda _request: answer(202, content)
    assert await client.result("r-1", call=Call()) is None
    odd.others = lambda _request: answer(200, content)
    found = await client.result("r-1", call=Call())
    assert found is not None
    assert json.loads(found) == content


@pytest.mark.parametrize(
    "odd_value",
    [
        b"NaN",
        b"-Infinity",
        b"1e400",
        b"1" * 5000,
        b"[" * 100_000 + b"]" * 100_000,
        b'"\\ud83d\\u0000"',
        b'"\xff\x00\t"',
        b'{"a":1,"a":2}',
    ],
    ids=lambda value: ascii(value[:24]),
)
async def test_any_answer_can_be_read(odd: OddClipia, client: ClipiaClient, odd_value: bytes) -> None:
    """B9: for any character in an answer, it can be read, and a result is returned byte for byte."""
    body = b'\xef\xbb\xbf{"request_id":"r-1","status":"COMPLETED","cost":1,"credits":12,"odd":%b}' % odd_value
    odd.others = lambda _request: answer(content=body)
    assert (await client.status("r-1", call=Call())).terminal
    assert await client.result("r-1", call=Call()) == body
    for found in (await client.model("m", call=Call()), await client.estimate("m", {}, call=Call())):
        assert "odd" in found
        assert orjson.loads(orjson.dumps(found)) == found
        assert "\\u0000" not in json.dumps(found)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_an_endless_answer_is_not_read_to_its_end(
    odd: OddClipia, client: ClipiaClient, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """If an answer is too large, even if it is small on the wire, the call fails and may have arrived."""
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 65_536)
    body = orjson.dumps({"request_id": "r-1", "status": "IN_QUEUE", "cost": PRICE, "more": "x" * 1_000_000})
    content = gzip.compress(body) if encoding == "gzip" else body
    odd.script = [answer(content=content, Content_Encoding=encoding)]
    with pytest.raises(ClipiaUnavailable, match="not in Clipia's format") as caught:
        await submit(client)
    assert caught.value.may_have_arrived
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 2_000_000)
    assert (await submit(client)).request_id == "r-1"


async def test_a_cookie_is_not_returned(odd: OddClipia, client: ClipiaClient) -> None:
    """If an answer sets a cookie, later calls do not send it."""
    odd.script = [
        answer(content={"request_id": "r-1", "status": "IN_QUEUE", "cost": PRICE}, Set_Cookie="a=1; Path=/")
    ]
    for _ in range(2):
        await submit(client)
    assert [request.headers.get("cookie") for request in odd.requests] == [None, None]


async def test_the_catalogue_is_open_ended(odd: OddClipia, client: ClipiaClient) -> None:
    """If an entry is not an object, it is dropped; all others are kept unchanged."""
    odd.others = lambda _request: answer(content={"data": [{"slug": "a", "new": 1}, {"id": "b"}, None, "c"]})
    assert await client.models(call=Call()) == [{"slug": "a", "new": 1}, {"id": "b"}]
    odd.others = lambda _request: answer(content={"models": []})
    with pytest.raises(ClipiaUnavailable):
        await client.models(call=Call())
    odd.others = lambda _request: answer(content=None)
    with pytest.raises(ClipiaUnavailable):
        await client.model(MODEL, call=Call())


async def test_an_account_stands_for_key_and_api(client: ClipiaClient, odd: OddClipia) -> None:
    """The account's id depends on the key and the API, and does not reveal the key."""
    others = [
        ClipiaClient("clipia_live_other", base_url=odd.url),
        ClipiaClient(LIVE, base_url="https://api.clipia.ai"),
        ClipiaClient(TEST, base_url=odd.url),
    ]
    same = ClipiaClient(LIVE, base_url=f"{odd.url}/")
    assert same.account == client.account
    assert len({each.account for each in [client, *others]}) == 4
    assert [each.account[:5] for each in [client, *others]] == ["live-", "live-", "live-", "test-"]
    assert LIVE not in client.account
    for each in [same, *others]:
        await each.close()


@pytest.mark.parametrize("url", ["http://api.clipia.ai", "http://localhost.evil.example", "api.clipia.ai"])
def test_a_key_never_travels_in_the_clear(url: str) -> None:
    """Plain http is allowed for this machine only; the message has the setting, and not the key."""
    with pytest.raises(SettingsError, match="CLIPIA_BASE_URL: write https://") as caught:
        ClipiaClient(LIVE, base_url=url)
    assert LIVE not in str(caught.value)


# --- the catalogue ---


async def test_a_burst_asks_for_its_model_once(odd_world: World, odd: OddClipia) -> None:
    """F7: concurrent jobs of one model share one request for it."""
    odd.script = [accepted]
    submitter = odd_world.submitter()
    await asyncio.gather(*(submitter.submit(MODEL, PROMPT) for _ in range(16)))
    assert odd.other_paths == [f"/v1/models/{MODEL}"]


async def test_a_model_is_rechecked_before_an_input_is_rejected(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a parameter is new at Clipia, it is accepted although the cached model does not have it."""
    schema: dict[str, Any] = {"prompt": {"type": "string"}}
    odd.others = lambda _request: answer(content={"slug": MODEL, "input_schema": schema})
    odd.script = [accepted]
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT)
    schema["seed"] = {"type": "integer"}
    given = {"prompt": "a cat", "seed": 1}
    strictly = submitter.submit(MODEL, given, strict=True)
    assert (await refusal(strictly)).code == "model_input_invalid"
    assert len(odd.other_paths) == 1
    monkeypatch.setattr(catalogue, "RECHECK_AGE_SECONDS", 0.0)
    assert (await submitter.submit(MODEL, given, strict=True)).input == given
    odd.others = lambda _request: refused(503, "service_unavailable")
    strictly = submitter.submit(MODEL, {"prompt": "a", "seat": 1}, strict=True)
    assert (await refusal(strictly)).code == "model_input_invalid"


async def test_a_model_is_cached_if_clipia_is_unavailable(world: World, sandbox: Sandbox) -> None:
    """F5: if Clipia is unavailable, an old answer is used."""
    models = world.submitter().catalogue
    known = await models.model(MODEL)
    await sandbox.switch(error_rate=1.0)
    assert await models.model(MODEL) is known
    assert await models.model(MODEL, max_age=0.0) is known
    with pytest.raises(ClipiaUnavailable):
        await models.model("suno-music")


async def test_the_catalogue_is_clipias(world: World) -> None:
    """Models, prices and the account are returned unchanged."""
    offered = world.submitter().catalogue
    assert {MODEL, "suno-music"} <= {each.get("slug") for each in await offered.models()}
    assert (await offered.model(MODEL))["input_schema"]["prompt"]["required"] is True
    assert await offered.estimate(MODEL, PROMPT | {"num_images": 4}) == {"credits": 48, "warnings": []}
    assert (await offered.balance())["balance"] == {"credits": 100_000}
    assert (await refusal(offered.estimate("nano-banana-3", PROMPT))).code == "model_not_found"


async def test_queries_respect_a_rate_limit(world: World, sandbox: Sandbox) -> None:
    """F7: after a 429 neither queries nor submissions are sent before Clipia's time."""
    submitter = world.submitter()
    await sandbox.switch(throttle_rate=1.0, retry_after=400)
    for _ in range(2):
        with pytest.raises(ClipiaUnavailable) as caught:
            await submitter.catalogue.models()
        assert (caught.value.reason, caught.value.may_have_arrived) == ("rate_limit_exceeded", False)
        assert 300 < (caught.value.retry_after or 0) <= 400
    await sandbox.switch(throttle_rate=0.0)
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.error) == ("pending", None)
    assert await sandbox.submits() == []
    (account,) = await world.rows(accounts)
    assert 300 < account["calls_after"] - time.time() <= 401


async def test_the_rate_is_learned_from_answers(odd_world: World, odd: OddClipia) -> None:
    """F7: the limits in an answer, even an error, are stored for all processes."""
    odd.script = [refused(503, "x", RateLimit_Limit="300", RateLimit_Remaining="2", RateLimit_Reset="100")]
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT)
    limits = (await submitter.standing()).quota.requests_per_minute
    (account,) = await odd_world.rows(accounts)
    assert (limits, account["requests_per_minute"]) == (300, 300)
    assert 60 < account["calls_after"] - time.time() <= 101


async def test_a_price_is_requested_once_a_minute(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7, F12: many jobs with one input cause one price request; another input causes another one."""
    odd.script = [accepted]
    odd.others = lambda _request: answer(content={"slug": MODEL, "credits": PRICE})
    submitter = odd_world.submitter()
    for _ in range(3):
        await submitter.submit(MODEL, PROMPT, max_cost=PRICE)
    prices = [path for path in odd.other_paths if path.endswith("/estimate")]
    assert len(prices) == 1
    await submitter.submit(MODEL, {"prompt": "a dog"}, max_cost=PRICE)
    monkeypatch.setattr(catalogue, "PRICE_CACHE_SECONDS", 0.0)
    await submitter.submit(MODEL, PROMPT, max_cost=PRICE)
    assert len([path for path in odd.other_paths if path.endswith("/estimate")]) == 3


async def test_failures_are_cached(odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch) -> None:
    """F7: if Clipia is unavailable, not each job causes a request."""
    odd.others = lambda _request: refused(503, "service_unavailable")
    models = odd_world.submitter().catalogue
    for _ in range(3):
        with pytest.raises(ClipiaUnavailable):
            await models.model(MODEL)
    assert len(odd.other_paths) == 1
    monkeypatch.setattr(catalogue, "FAILURE_CACHE_SECONDS", 0.0)
    odd.others = lambda _request: answer(content={"slug": MODEL})
    assert await models.model(MODEL) == {"slug": MODEL}


async def test_a_catalogue_that_is_slow_holds_up_no_job(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: if the check of an input takes too long, the job is submitted unchecked."""
    monkeypatch.setattr(catalogue, "CHECK_TIMEOUT_SECONDS", 0.1)
    go_on = asyncio.Event()

    async def hold(_request: Request) -> None:
        await go_on.wait()

    odd.on_question, odd.script = hold, [accepted]
    submitter = odd_world.submitter()
    assert (await submitter.submit(MODEL, PROMPT)).state == "submitted"
    # The request goes on, and its answer is used for the next job.
    go_on.set()
    assert await submitter.catalogue.model(MODEL) == {"slug": MODEL}
    assert len(odd.other_paths) == 1


async def test_concurrent_callers_share_a_request(odd_world: World, odd: OddClipia) -> None:
    """F7: all callers share one answer; if they are all cancelled, its failure is not logged."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_request: Request) -> None:
        arrived.set()
        await go_on.wait()

    odd.on_question = hold
    models = odd_world.submitter().catalogue
    first, second = [asyncio.create_task(models.model(MODEL)) for _ in range(2)]
    await arrived.wait()
    first.cancel()
    go_on.set()
    assert await second == {"slug": MODEL}
    assert first.cancelled()

    arrived.clear()
    go_on.clear()
    odd.others = lambda _request: refused(503, "service_unavailable")
    alone = asyncio.create_task(models.model("suno-music"))
    await arrived.wait()
    alone.cancel()
    go_on.set()
    with pytest.raises(ClipiaUnavailable):
        await models.model("suno-music")
    assert len(odd.other_paths) == 2


async def test_a_query_waits_for_its_share(odd_world: World, odd: OddClipia) -> None:
    """F7: queries have their own share; if one would wait too long, the error has the time to retry."""
    models = odd_world.submitter().catalogue
    await models.balance()
    share = SHARES["query"]
    interval, burst = 60.0 / (6000 * share.steady), 6000 * share.burst
    now = time.time()
    await odd_world.set(accounts, asks_until=now + (burst - 1) * interval + 0.4)
    await models.balance()
    assert time.time() - now >= 0.39
    await odd_world.set(accounts, asks_until=now + 1000.0)
    with pytest.raises(ClipiaUnavailable) as caught:
        await models.balance()
    error = caught.value
    assert (error.reason, error.status, error.may_have_arrived) == ("rate_limit_exceeded", 429, False)
    assert (error.retry_after or 0) > 800
    assert len(odd.other_paths) == 2


async def test_a_catalogue_has_a_size(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If callers use very many inputs, the oldest answers are dropped from the cache."""
    monkeypatch.setattr(catalogue, "MAX_CACHE_ENTRIES", 2)
    models = odd_world.submitter().catalogue
    for slug in ("a", "b", "c", "c", "b", "a"):
        await models.model(slug)
    assert [path.rpartition("/")[2] for path in odd.other_paths] == ["a", "b", "c", "a"]
