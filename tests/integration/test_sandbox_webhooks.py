"""The sandbox's webhooks, downloads and server over real sockets."""

import asyncio
import json
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from receiver.core.signature import Secret, verify
from receiver.errors import SignatureError
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, create_app, running
from receiver.sandbox.webhooks import WebhookSender

# One pair of servers for the whole module: starting and stopping them takes longer than most tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")
module = pytest_asyncio.fixture(scope="module", loop_scope="module")
each = pytest_asyncio.fixture(loop_scope="module")

SECRET = "whsec_sandbox_webhooks"
LIVE = {"Authorization": "Bearer clipia_live_x"}
TEST = {"Authorization": "Bearer clipia_test_x"}
FAST = SandboxOptions(duration=0.05, webhook_backoff=0.01, webhook_timeout=5, **WITHOUT_LIMITS)

T = TypeVar("T")
Answer = Callable[[int], Awaitable[Response]]


async def until(check: Callable[[], Awaitable[T]]) -> T:
    """Poll until the result is true, and return it."""
    async with asyncio.timeout(10):
        while True:
            if answer := await check():
                return answer
            await asyncio.sleep(0.005)


class Receiver:
    """Records every webhook; the test chooses the answer by the number of the call, from 1."""

    def __init__(self) -> None:
        self.url = ""
        self.forget()
        self.app = Starlette(routes=[Route("/hook", self._take, methods=["GET", "POST"])])

    async def _take(self, request: Request) -> Response:
        self.calls.append((dict(request.headers), await request.body()))
        return await self.answer(len(self.calls))

    @staticmethod
    async def _ok(_number: int) -> Response:
        return Response(status_code=204)

    def forget(self) -> None:
        """Delete the recorded webhooks, and accept again."""
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.answer: Answer = self._ok

    def statuses(self) -> list[str]:
        """Return the status in each webhook."""
        return [json.loads(body)["status"] for _, body in self.calls]

    async def count(self, number: int) -> None:
        """Wait until a number of webhooks have arrived."""

        async def arrived() -> bool:
            return len(self.calls) >= number

        await until(arrived)


@module
async def servers() -> AsyncIterator[tuple[str, Receiver]]:
    """The base URL of a running sandbox, and a running receiver."""
    receiver = Receiver()
    async with running(create_app(FAST, secret=SECRET)) as url, running(receiver.app) as receiver_url:
        receiver.url = f"{receiver_url}/hook"
        yield url, receiver


@each
async def sandbox(servers: tuple[str, Receiver]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the sandbox after its start."""
    async with httpx.AsyncClient(base_url=servers[0], headers=LIVE) as client:
        await client.post("/_sandbox/reset")
        yield client


@each
async def receiver(servers: tuple[str, Receiver], sandbox: httpx.AsyncClient) -> Receiver:
    """The receiver without webhooks; those of earlier tests are not sent any more."""
    assert not sandbox.is_closed
    servers[1].forget()
    return servers[1]


async def submit(sandbox: httpx.AsyncClient, webhook_url: str, headers: dict[str, str] | None = None) -> str:
    """Submit an image and return its request id."""
    body = {"input": {"prompt": "x"}, "webhook_url": webhook_url}
    answer = await sandbox.post("/v1/models/nano-banana-2", json=body, headers=headers)
    request_id: str = answer.json()["request_id"]
    return request_id


async def switch(sandbox: httpx.AsyncClient, **changes: Any) -> None:
    """Set switches while the sandbox runs."""
    (await sandbox.patch("/_sandbox/options", json=changes)).raise_for_status()


async def webhook(sandbox: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    """Return the webhook of a request, as the control API shows it."""
    shown: dict[str, Any] = (await sandbox.get(f"/_sandbox/requests/{request_id}")).json()["webhook"]
    return shown


async def attempts(sandbox: httpx.AsyncClient, request_id: str, number: int) -> list[dict[str, Any]]:
    """Wait until a number of attempts are recorded, and return all of them."""

    async def made() -> list[dict[str, Any]]:
        so_far: list[dict[str, Any]] = (await webhook(sandbox, request_id))["attempts"]
        return so_far if len(so_far) >= number else []

    return await until(made)


# Attempts


async def test_webhook_comes_when_the_generation_ends(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """A live generation's webhook is sent after its end, once, and the attempt is recorded."""
    request_id = await submit(sandbox, receiver.url)
    await receiver.count(1)
    assert (await sandbox.get(f"/v1/requests/{request_id}")).status_code == 200
    (attempt,) = await attempts(sandbox, request_id, 1)
    await asyncio.sleep(0.1)
    assert len(receiver.calls) == 1
    headers, body = receiver.calls[0]
    assert json.loads(body)["request_id"] == request_id
    assert (attempt["kind"], attempt["number"], attempt["status_code"], attempt["error"]) == (
        "result",
        1,
        204,
        None,
    )
    assert attempt["webhook_id"] == headers["x-clipia-webhook-id"]
    assert 0 <= attempt["seconds"] < 5


async def test_six_attempts_each_freshly_signed(receiver: Receiver) -> None:
    """A webhook that is never accepted has six attempts: the same bytes, each signed at its own time."""

    async def refuse(_number: int) -> Response:
        moments[0] += 400
        return Response(status_code=500)

    moments = [1_790_000_000.0]
    receiver.answer = refuse
    app = create_app(FAST, secret=SECRET, clock=lambda: moments[0])
    async with running(app) as url, httpx.AsyncClient(base_url=url, headers=TEST) as sandbox:
        made = await attempts(sandbox, await submit(sandbox, receiver.url), 6)
        await asyncio.sleep(0.1)
    assert len(receiver.calls) == 6
    assert [(attempt["number"], attempt["status_code"]) for attempt in made] == [
        (n, 500) for n in range(1, 7)
    ]
    for number, (headers, body) in enumerate(receiver.calls):
        signed = headers["x-clipia-signature"].encode()
        now = 1_790_000_000 + 400 * number
        assert (
            verify([signed], body, secrets=[Secret.from_text(SECRET)], now=now, tolerance=0).timestamp == now
        )
        assert headers["x-clipia-timestamp"] == str(now)
    assert len({body for _, body in receiver.calls}) == 1
    assert len({headers["x-clipia-webhook-id"] for headers, _ in receiver.calls}) == 1


async def test_another_secret_does_not_verify(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """The signature is valid for the sandbox's secret only."""
    await submit(sandbox, receiver.url, TEST)
    await receiver.count(1)
    headers, body = receiver.calls[0]
    signed = [headers["x-clipia-signature"].encode()]
    verify(signed, body, secrets=[Secret.from_text(SECRET)], now=time.time(), tolerance=60)
    with pytest.raises(SignatureError):
        verify(signed, body, secrets=[Secret.from_text("other")], now=time.time(), tolerance=60)


async def test_waits_double(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """The waits between attempts start at `webhook_backoff` and double."""
    moments: list[float] = []

    async def refuse(_number: int) -> Response:
        moments.append(time.monotonic())
        return Response(status_code=503)

    receiver.answer = refuse
    await switch(sandbox, webhook_backoff=0.02)
    await attempts(sandbox, await submit(sandbox, receiver.url, TEST), 6)
    waits = [later - earlier for earlier, later in pairwise(moments)]
    # A busy machine makes waits longer, never shorter.
    assert [wait >= 0.95 * 0.02 * 2**number for number, wait in enumerate(waits)] == [True] * 5


async def test_acceptance_ends_the_attempts(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """The first 2xx ends the attempts; redirects, which are not followed, and client errors do not."""

    async def stumble(number: int) -> Response:
        answers = {
            1: RedirectResponse(receiver.url),
            2: Response(status_code=401),
            3: Response(status_code=299),
        }
        return answers[number]

    receiver.answer = stumble
    made = await attempts(sandbox, await submit(sandbox, receiver.url), 3)
    await asyncio.sleep(0.1)
    assert [attempt["status_code"] for attempt in made] == [307, 401, 299]
    assert len(receiver.calls) == 3


async def test_number_of_attempts_is_a_switch(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """`webhook_attempts` limits the attempts."""

    async def refuse(_number: int) -> Response:
        return Response(status_code=500)

    receiver.answer = refuse
    await switch(sandbox, webhook_attempts=2)
    await attempts(sandbox, await submit(sandbox, receiver.url), 2)
    await asyncio.sleep(0.1)
    assert len(receiver.calls) == 2


async def test_slow_and_dead_receivers(sandbox: httpx.AsyncClient) -> None:
    """An answer that drips past the timeout, and a failed connection, are failed attempts with a reason."""

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1000):
            writer.write(b"X-%d: y\r\n" % number)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    await switch(sandbox, webhook_timeout=0.1, webhook_attempts=2)
    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    slow = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    late, refused = [await attempts(sandbox, await submit(sandbox, url), 2) for url in (slow, dead)]
    server.close()
    assert [(attempt["status_code"], attempt["error"]) for attempt in late] == [
        (None, "no answer within 0.1 s")
    ] * 2
    assert all(attempt["status_code"] is None for attempt in refused)
    assert all(attempt["error"].startswith("ConnectError") for attempt in refused)


async def test_environment_proxy_is_not_used(
    sandbox: httpx.AsyncClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment is not used between sandbox and receiver."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    (attempt,) = await attempts(sandbox, await submit(sandbox, receiver.url), 1)
    assert attempt["status_code"] == 204


# Faults


async def test_lost_webhook(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """F10: a lost webhook is never sent, although the generation ends."""
    await switch(sandbox, webhook_loss_rate=1)
    request_id = await submit(sandbox, receiver.url)

    async def lost() -> bool:
        return (await webhook(sandbox, request_id))["lost"] is True

    await until(lost)
    assert (await sandbox.get(f"/v1/requests/{request_id}")).json()["status"] == "COMPLETED"
    await asyncio.sleep(0.1)
    assert receiver.calls == []


async def test_webhook_sent_twice(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """A13: a duplicate has the same bytes and another id."""
    await switch(sandbox, webhook_duplicate_rate=1)
    made = await attempts(sandbox, await submit(sandbox, receiver.url), 2)
    assert [attempt["kind"] for attempt in made] == ["result", "duplicate"]
    assert made[0]["webhook_id"] != made[1]["webhook_id"]
    assert receiver.calls[0][1] == receiver.calls[1][1]


@pytest.mark.parametrize(("fail_rate", "statuses"), [(0, ["OK", "ERROR"]), (1, ["ERROR", "OK"])])
async def test_conflicting_webhook(
    sandbox: httpx.AsyncClient, receiver: Receiver, fail_rate: float, statuses: list[str]
) -> None:
    """C9: a conflict is a second authentic webhook of the request, with the opposite status."""
    await switch(sandbox, webhook_conflict_rate=1, fail_rate=fail_rate)
    request_id = await submit(sandbox, receiver.url)
    made = await attempts(sandbox, request_id, 2)
    assert [attempt["kind"] for attempt in made] == ["result", "conflict"]
    assert receiver.statuses() == statuses
    for headers, body in receiver.calls:
        assert json.loads(body)["request_id"] == request_id
        signed = [headers["x-clipia-signature"].encode()]
        verify(signed, body, secrets=[Secret.from_text(SECRET)], now=time.time(), tolerance=60)


async def test_nothing_follows_a_webhook_that_was_not_accepted(
    sandbox: httpx.AsyncClient, receiver: Receiver
) -> None:
    """Duplicates and conflicts are sent only if the result was accepted."""

    async def refuse(_number: int) -> Response:
        return Response(status_code=500)

    receiver.answer = refuse
    await switch(sandbox, webhook_duplicate_rate=1, webhook_conflict_rate=1, webhook_attempts=2)
    made = await attempts(sandbox, await submit(sandbox, receiver.url), 2)
    await asyncio.sleep(0.1)
    assert {attempt["kind"] for attempt in made} == {"result"}
    assert len(receiver.calls) == 2


@pytest.mark.parametrize("headers", [LIVE, TEST])
async def test_webhook_before_the_answer(
    sandbox: httpx.AsyncClient, receiver: Receiver, headers: dict[str, str]
) -> None:
    """C10: with `webhook_first` the submission is answered after the receiver has answered the webhook."""
    dealt_with = asyncio.Event()

    async def take_time(_number: int) -> Response:
        await dealt_with.wait()
        return Response()

    receiver.answer = take_time
    await switch(sandbox, webhook_first=True, duration=60)
    submitting = asyncio.create_task(submit(sandbox, receiver.url, headers))
    await receiver.count(1)
    done, _ = await asyncio.wait({submitting}, timeout=0.1)
    assert not done
    dealt_with.set()
    assert [json.loads(body)["request_id"] for _, body in receiver.calls] == [await submitting]


async def test_webhook_first_does_not_wait_for_ever(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """C10: if the webhook cannot be sent, the submission is answered after the timeout."""

    async def refuse(_number: int) -> Response:
        return Response(status_code=500)

    receiver.answer = refuse
    await switch(sandbox, webhook_first=True, webhook_timeout=0.1, webhook_backoff=60)
    assert await submit(sandbox, receiver.url)
    assert len(receiver.calls) == 1


async def test_cancelled_generation_sends_nothing(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """F10: a canceled generation has no webhook."""
    await switch(sandbox, duration=0.1)
    request_id = await submit(sandbox, receiver.url)
    await sandbox.post(f"/_sandbox/requests/{request_id}/cancel")
    await asyncio.sleep(0.25)
    assert receiver.calls == []
    assert (await webhook(sandbox, request_id))["attempts"] == []


async def test_webhook_by_hand(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """A webhook can be sent by hand, also a lost or a conflicting one; the answer is the attempt."""
    await switch(sandbox, webhook_loss_rate=1)
    request_id = await submit(sandbox, receiver.url, TEST)
    sent = [
        (await sandbox.post(f"/_sandbox/requests/{request_id}/webhook", content=body)).json()
        for body in (b"", b'{"conflicting": false}', b'{"conflicting": true}')
    ]
    assert receiver.statuses() == ["OK", "OK", "ERROR"]
    assert [(attempt["kind"], attempt["number"], attempt["status_code"]) for attempt in sent] == [
        ("manual", 1, 204)
    ] * 3
    assert (await webhook(sandbox, request_id))["attempts"] == sent


# Start and end


async def test_end_cancels_what_is_waiting(receiver: Receiver) -> None:
    """The end of the lifespan cancels webhooks that wait for a generation or for another attempt."""

    async def refuse(_number: int) -> Response:
        return Response(status_code=500)

    receiver.answer = refuse
    app = create_app(SandboxOptions(duration=60, webhook_backoff=60, **WITHOUT_LIMITS), secret=SECRET)
    async with running(app) as url, httpx.AsyncClient(base_url=url) as sandbox:
        await submit(sandbox, receiver.url, LIVE)
        await submit(sandbox, receiver.url, TEST)
        await receiver.count(1)
        assert len(webhook_tasks()) == 2
    assert webhook_tasks() == []


def webhook_tasks() -> list[str]:
    """Return the names of the tasks that send webhooks."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("webhook of")]


async def test_reset_cancels_what_is_waiting(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """After a reset no earlier webhook arrives."""
    await switch(sandbox, duration=0.1)
    await submit(sandbox, receiver.url)
    await sandbox.post("/_sandbox/reset")
    await asyncio.sleep(0.25)
    assert receiver.calls == []


async def test_death_of_a_webhook_is_loud(
    sandbox: httpx.AsyncClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in sending is logged as an error with its cause; the sandbox goes on."""

    async def burst(*_: Any, **__: Any) -> bool:
        raise RuntimeError("planted")

    with capture_logs() as logs:
        monkeypatch.setattr(WebhookSender, "_deliver", burst)
        request_id = await submit(sandbox, receiver.url, TEST)
        await asyncio.sleep(0.05)
        monkeypatch.undo()
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert (entry["event"], entry["task"]) == ("webhook task failed", f"webhook of {request_id}")
    assert str(entry["exc_info"]) == "planted"
    await submit(sandbox, receiver.url, TEST)
    await receiver.count(1)


async def test_logs_have_no_secrets(sandbox: httpx.AsyncClient, receiver: Receiver) -> None:
    """G8: the log has request ids, but no secret, key, URL or prompt."""
    with capture_logs() as logs:
        await attempts(sandbox, await submit(sandbox, f"{receiver.url}?token=canary", TEST), 1)
    text = str(logs)
    assert {entry["event"] for entry in logs} == {"generation submitted", "webhook sent"}
    assert [word for word in (SECRET, "clipia_test_x", "canary", "prompt") if word in text] == []


async def test_taken_port_is_an_error() -> None:
    """A port in use is an `OSError` immediately."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        async with running(create_app(), port=taken.getsockname()[1]):
            pytest.fail("started on a taken port")


async def test_signals_stay_with_the_program_around_it() -> None:
    """The sandbox does not change the signal handlers of the surrounding program."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with running(create_app()):
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# Downloads


@pytest.mark.parametrize("path", ["/works/x-1.png", "/sandbox/sample-video.mp4", "/works/blob/3000000.mp4"])
async def test_truncated_download(sandbox: httpx.AsyncClient, path: str) -> None:
    """D9: a truncated download declares its whole length and breaks in the middle; the next one is whole."""
    whole = await sandbox.get(path)
    await switch(sandbox, media_truncate_rate=1)
    received = bytearray()

    async def download() -> None:
        async with sandbox.stream("GET", path) as response:
            assert response.headers["Content-Length"] == whole.headers["Content-Length"]
            async for chunk in response.aiter_raw():
                received.extend(chunk)

    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        await download()
    assert received == whole.content[: len(whole.content) // 2]
    assert (await sandbox.head(path)).status_code == 200
    await switch(sandbox, media_truncate_rate=0)
    assert (await sandbox.get(path)).content == whole.content


async def test_slow_download(sandbox: httpx.AsyncClient) -> None:
    """`media_latency` delays downloads only."""
    await switch(sandbox, media_latency=30)
    with pytest.raises(httpx.ReadTimeout):
        await sandbox.get("/works/x-1.png", timeout=0.1)
    assert (await sandbox.get("/v1/models")).status_code == 200


async def test_huge_video_in_constant_memory(sandbox: httpx.AsyncClient) -> None:
    """D7: a huge video is streamed: memory does not grow with its size."""
    size, seen, peak = 400_000_000, 0, 0
    before = resident()
    async with sandbox.stream("GET", f"/works/blob/{size}.mp4") as response:
        async for chunk in response.aiter_raw():
            seen += len(chunk)
            peak = max(peak, resident())
    assert seen == size
    assert peak - before < 32_000_000


def resident() -> int:
    """Return the memory in use by this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
