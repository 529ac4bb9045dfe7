"""The official SDK, unmodified, against the sandbox under a real uvicorn.

`Clipia` blocks, so it runs in a thread while the server runs in the test's event loop.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import httpx
import pytest
import pytest_asyncio
from clipia import AsyncClipia, Clipia, ClipiaApiError, ClipiaTimeoutError, StatusResponse, verify_signature
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, create_app, running

T = TypeVar("T")

# One pair of servers for the whole module: starting and stopping them takes longer than most tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")
module = pytest_asyncio.fixture(scope="module", loop_scope="module")
each = pytest_asyncio.fixture(loop_scope="module")

SECRET = "whsec_sandbox_sdk"
LIVE = "clipia_live_sdk"
TEST = "clipia_test_sdk"
IMAGE = {"prompt": "a cat"}


@module
async def servers() -> AsyncIterator[tuple[str, "Inbox"]]:
    """The base URL of a running sandbox, and a running receiver of webhooks."""
    inbox = Inbox()
    options = SandboxOptions(duration=0.3, retry_after=0, **WITHOUT_LIMITS)
    async with running(create_app(options, secret=SECRET)) as url, running(inbox.app) as inbox_url:
        inbox.url = f"{inbox_url}/hook"
        yield url, inbox


@each
async def url(servers: tuple[str, "Inbox"]) -> str:
    """The base URL of the sandbox after its start, with generations of 0.3 s."""
    async with httpx.AsyncClient(base_url=servers[0]) as control:
        await control.post("/_sandbox/reset")
    return servers[0]


@each
async def live(url: str) -> AsyncIterator[AsyncClipia]:
    """An asynchronous client with a live key."""
    async with AsyncClipia(LIVE, base_url=url, retry_delay=0.01) as client:
        yield client


@each
async def inbox(servers: tuple[str, "Inbox"]) -> "Inbox":
    """The receiver of webhooks."""
    return servers[1]


class Inbox:
    """Stores every webhook as it was received."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: asyncio.Queue[tuple[dict[str, str], bytes]] = asyncio.Queue()
        self.app = Starlette(routes=[Route("/hook", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        await self.requests.put((dict(request.headers), await request.body()))
        return Response()

    async def next(self) -> tuple[dict[str, str], bytes]:
        """Return headers and body of the next webhook."""
        async with asyncio.timeout(10):
            return await self.requests.get()


async def switch(url: str, **changes: Any) -> None:
    """Set switches while the sandbox runs."""
    async with httpx.AsyncClient() as control:
        (await control.patch(f"{url}/_sandbox/options", json=changes)).raise_for_status()


async def blocking(url: str, key: str, call: Callable[[Clipia], T]) -> T:
    """Run a function with the blocking client."""

    def run() -> T:
        with Clipia(key, base_url=url, retry_delay=0.01) as client:
            return call(client)

    return await asyncio.to_thread(run)


async def test_blocking_client_goes_the_whole_way(url: str) -> None:
    """`Clipia` submits, follows status and result, subscribes, and reads catalogue, price and account."""

    def whole_way(client: Clipia) -> None:
        before = client.account.get()["balance"]["credits"]
        assert {"nano-banana-2", "suno-music"} <= {
            model.get("slug") for model in client.models.list()["data"]
        }
        assert client.models.get("nano-banana-2")["pricing"]["credits"] == 12
        estimate = client.models.estimate("nano-banana-2", IMAGE | {"num_images": 2, "promt": "typo"})
        job = client.submit("nano-banana-2", IMAGE | {"num_images": 2, "promt": "typo"})
        assert (job.status, job.cost) == ("IN_QUEUE", estimate.credits)
        assert job.status_url == f"{url}/v1/requests/{job.request_id}/status"
        assert job.response_url == f"{url}/v1/requests/{job.request_id}"
        assert [warning.code for warning in job.warnings] == ["unknown_parameter"]
        assert [warning.parameter for warning in estimate.warnings] == ["promt"]
        assert client.status(job.request_id).status == "IN_QUEUE"
        pending = client.result(job.request_id)
        assert (pending.pending, pending.is_terminal, pending.cost) == (True, False, 24)

        seen: list[StatusResponse] = []
        result = client.subscribe(
            "suno-music", IMAGE, on_queue_update=seen.append, poll_interval=0.02, timeout=10
        )
        assert [status.status for status in seen if status.is_terminal] == ["COMPLETED"]
        assert {status.status for status in seen} == {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
        assert [status.progress for status in seen] == sorted(status.progress or 0 for status in seen)
        assert result.output is not None
        assert result.output["audio"] == result.output["audios"][0]
        assert (result.model, result.cost, result.error) == ("suno-music", 30, None)
        assert client.account.get()["balance"]["credits"] == before - 54

    await blocking(url, LIVE, whole_way)


async def test_async_client_goes_the_whole_way(live: AsyncClipia, url: str) -> None:
    """`AsyncClipia` does the same, and the files of its outputs can be downloaded."""
    before = (await live.account.get())["balance"]["credits"]
    listed = (await live.models.list())["data"]
    for model in listed:
        described = await live.models.get(model.get("slug") or model["id"])
        assert described.items() >= model.items()
    assert (await live.models.get("gemini-3-1-flash-tts"))["text_limits"] == {
        "min_chars": 1,
        "max_chars": 20000,
    }
    assert (await live.models.estimate("video-upscale", {"video_url": "https://x/y"})).credits == 20
    assert (await live.models.get("seedance-2-fast-i2v"))["input_schema"]
    assert (await live.models.estimate("seedance-2-fast-t2v", IMAGE | {"duration": 8})).credits == 80
    seen: list[str] = []

    async def note(status: StatusResponse) -> None:
        seen.append(status.status)

    result = await live.subscribe("seedance-2-fast-t2v", IMAGE, on_queue_update=note, poll_interval=0.02)
    assert seen[0] == "IN_QUEUE"
    assert seen[-1] == "COMPLETED"
    assert result.output is not None
    assert (await live.status(result.request_id)).progress == 100
    assert (await live.account.get())["balance"]["credits"] == before - 40
    async with httpx.AsyncClient() as cdn:
        video = await cdn.get(result.output["video"]["url"])
    assert video.url.host == httpx.URL(url).host
    assert (video.status_code, video.content[4:8]) == (200, b"ftyp")


async def test_test_key_answers_at_once(url: str) -> None:
    """With a test key both clients get a finished generation from the submission, free of charge."""

    def at_once(client: Clipia) -> int:
        assert client.submit("nano-banana-2", IMAGE).status == "COMPLETED"
        credits_left: int = client.account.get()["balance"]["credits"]
        return credits_left

    assert await blocking(url, TEST, at_once) == SandboxOptions().credits
    async with AsyncClipia(TEST, base_url=url) as client:
        job = await client.submit("nano-banana-2", IMAGE)
        assert (job.status, job.cost) == ("COMPLETED", 12)
        result = await client.result(job.request_id)
    assert result.output is not None
    assert result.output == {
        "images": [{"url": f"{url}/sandbox/sample-image.png", "width": 1024, "height": 1024}]
    }
    assert result.created_at is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.created_at)


async def test_failed_generation(live: AsyncClipia, url: str) -> None:
    """A generation that fails ends `subscribe` with its error and costs nothing."""
    await switch(url, fail_rate=1)
    result = await live.subscribe("nano-banana-2", IMAGE, poll_interval=0.02)
    assert (result.status, result.output, result.cost) == ("FAILED", None, 0)
    assert result.error == {"code": "GENERATION_FAILED", "message": "The model could not produce a result."}


async def test_canceled_generation(live: AsyncClipia, url: str) -> None:
    """A generation that is canceled from outside ends `subscribe`, too."""
    await switch(url, duration=60)

    async def cancel(status: StatusResponse) -> None:
        if not status.is_terminal:
            async with httpx.AsyncClient() as control:
                await control.post(f"{url}/_sandbox/requests/{status.request_id}/cancel")

    result = await live.subscribe("nano-banana-2", IMAGE, poll_interval=0.02, on_queue_update=cancel)
    assert (result.status, result.cost) == ("CANCELED", 0)


@pytest.mark.parametrize("status", ["OK", "ERROR"])
@pytest.mark.parametrize("key", [LIVE, TEST])
async def test_webhook_passes_the_sdks_check(url: str, inbox: Inbox, key: str, status: str) -> None:
    """A webhook passes `verify_signature` with the right secret only, and agrees with the poll."""
    await switch(url, fail_rate=float(status == "ERROR"))
    async with AsyncClipia(key, base_url=url) as client:
        job = await client.submit("nano-banana-2", IMAGE, webhook_url=inbox.url)
        headers, body = await inbox.next()
        result = await client.result(job.request_id)
    assert verify_signature(SECRET, headers, body)
    assert not verify_signature(SECRET + "x", headers, body)
    assert not verify_signature(SECRET, headers, body + b" ")
    assert not verify_signature(SECRET, headers, body, now=float(headers["x-clipia-timestamp"]) + 301)
    event = httpx.Response(200, content=body).json()
    ok = {"payload": {"model": "nano-banana-2", "output": result.output, "cost": 12}}
    assert event == {"request_id": job.request_id, "status": status} | (
        ok if status == "OK" else {"error": result.error}
    )
    assert str(uuid.UUID(headers["x-clipia-webhook-id"])) == headers["x-clipia-webhook-id"]
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"].startswith("Clipia-Webhooks/")


@pytest.mark.parametrize(
    ("key", "model", "given", "expected"),
    [
        ("sk_wrong", "nano-banana-2", IMAGE, (401, "invalid_api_key", "authentication_error")),
        (LIVE, "no/such model", IMAGE, (404, "model_not_found", "invalid_request_error")),
        (LIVE, "no-such-model", IMAGE, (404, "model_not_found", "invalid_request_error")),
        (LIVE, "nano-banana-2", {}, (400, "model_input_invalid", "invalid_request_error")),
        (LIVE, "nano-banana-2", IMAGE | {"webhook_url": "x"}, None),
    ],
)
async def test_errors_of_a_call(
    url: str, key: str, model: str, given: dict[str, Any], expected: tuple[int, str, str] | None
) -> None:
    """An invalid call is a `ClipiaApiError` with status, code and type, in both clients."""
    async with AsyncClipia(key, base_url=url) as client:
        if expected is None:
            assert (await client.submit(model, given)).warnings[0].parameter == "webhook_url"
            return
        with pytest.raises(ClipiaApiError) as caught:
            await client.submit(model, given)
    with pytest.raises(ClipiaApiError) as blocked:
        await blocking(url, key, lambda client: client.submit(model, given))
    for error in (caught.value, blocked.value):
        assert (error.status, error.code, error.type) == expected
        assert error.message
        assert error.retry_after is None


async def test_unknown_request_and_bad_webhook_url(live: AsyncClipia) -> None:
    """The other documented errors have their codes, too."""
    with pytest.raises(ClipiaApiError) as caught:
        await live.result(str(uuid.uuid4()))
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    with pytest.raises(ClipiaApiError) as caught:
        await live.submit("nano-banana-2", IMAGE, webhook_url="http://example.com/")
    assert (caught.value.status, caught.value.code) == (400, "webhook_url_invalid")


async def test_out_of_credits(live: AsyncClipia, url: str) -> None:
    """F6: no credits left is 402 of the billing type."""
    await switch(url, credits=11)
    with pytest.raises(ClipiaApiError) as caught:
        await live.submit("nano-banana-2", IMAGE)
    assert (caught.value.status, caught.value.code, caught.value.type) == (
        402,
        "insufficient_credits",
        "billing_error",
    )


async def test_limits_carry_retry_after(live: AsyncClipia, url: str) -> None:
    """F7: both 429 codes have a `retry_after`, also from a date."""
    await switch(url, concurrency_limit=1, duration=40, rate_limit=3, retry_after_date=True)
    live.max_retries = 0
    await live.submit("nano-banana-2", IMAGE)
    with pytest.raises(ClipiaApiError) as caught:
        await live.submit("nano-banana-2", IMAGE)
    assert (caught.value.status, caught.value.code) == (429, "concurrency_limit_exceeded")
    assert caught.value.retry_after is not None
    assert 30 < caught.value.retry_after <= 41
    await live.models.list()
    with pytest.raises(ClipiaApiError) as caught:
        await live.models.list()
    assert (caught.value.status, caught.value.code, caught.value.type) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 60


async def test_retries_of_the_sdk_pay_once(live: AsyncClipia, url: str) -> None:
    """F1: the SDK's own retries after lost answers make one generation and one charge."""
    live.max_retries = 50
    await switch(url, lost_answer_rate=0.4, throttle_rate=0.2, error_rate=0.2, seed=2)
    jobs = [await live.submit("nano-banana-2", IMAGE) for _ in range(10)]
    await switch(url, lost_answer_rate=0, throttle_rate=0, error_rate=0)
    async with httpx.AsyncClient() as control:
        happened = (await control.get(f"{url}/_sandbox/requests")).json()
    keys = happened["idempotency_keys"].values()
    assert [key["generations"] for key in keys] == [1] * 10
    assert max(key["submits"] for key in keys) > 1
    assert [request["request_id"] for request in happened["requests"]] == [job.request_id for job in jobs]
    assert (await live.account.get())["balance"]["credits"] == SandboxOptions().credits - 120


async def test_key_reuse_is_an_error(live: AsyncClipia) -> None:
    """F2: the SDK gets 409 for a key with other parameters, and the same request for the same ones."""
    first = await live.submit("nano-banana-2", IMAGE, idempotency_key="order-42")
    again = await live.submit("nano-banana-2", IMAGE, idempotency_key="order-42")
    assert again.data == first.data
    with pytest.raises(ClipiaApiError) as caught:
        await live.submit("nano-banana-2", {"prompt": "a dog"}, idempotency_key="order-42")
    assert (caught.value.status, caught.value.code) == (409, "idempotency_key_reuse")


async def test_subscribe_gives_up(url: str) -> None:
    """If a generation takes longer than the timeout, it is a `ClipiaTimeoutError` with its request id."""
    await switch(url, duration=60)
    with pytest.raises(ClipiaTimeoutError) as caught:
        await blocking(
            url,
            LIVE,
            lambda client: client.subscribe("nano-banana-2", IMAGE, timeout=0.05, poll_interval=0.02),
        )
    assert (caught.value.status, caught.value.code) == (0, "poll_timeout")
    assert str(uuid.UUID(caught.value.request_id)) == caught.value.request_id


async def test_in_process_without_a_server() -> None:
    """The SDK also runs against the application itself, without sockets."""
    transport = httpx.ASGITransport(create_app(SandboxOptions(duration=0.05)))
    async with AsyncClipia(LIVE, base_url="http://127.0.0.1:9000", transport=transport) as client:
        result = await client.subscribe("nano-banana-2", IMAGE, poll_interval=0.01)
    assert result.status == "COMPLETED"
