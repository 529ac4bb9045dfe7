"""The sandbox's API v1: keys, limits, idempotency, progress, money and the faults of the switches."""

import asyncio
import email.utils
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, create_app
from receiver.sandbox.answers import CODES

LIVE = {"Authorization": "Bearer clipia_live_one"}
TEST = {"Authorization": "Bearer clipia_test_one"}
IMAGE = {"input": {"prompt": "a cat"}}
DAY = 86_400.0


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        """Return the time in unix seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of the sandbox."""
    return Clock()


@pytest.fixture
def app(clock: Clock) -> Starlette:
    """A sandbox with generations of 100 s by its clock."""
    return create_app(SandboxOptions(duration=100, **WITHOUT_LIMITS), clock=clock)


@pytest.fixture
async def api(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a live key."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:9000", headers=LIVE
    ) as client:
        yield client


async def submit(
    api: httpx.AsyncClient,
    body: Any = IMAGE,
    *,
    model: str = "nano-banana-2",
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """POST a generation."""
    extra = {"Idempotency-Key": key} if key is not None else {}
    return await api.post(f"/v1/models/{model}", json=body, headers=(headers or {}) | extra)


async def switch(api: httpx.AsyncClient, **changes: Any) -> None:
    """Set switches through the control API."""
    answer = await api.patch("/_sandbox/options", json=changes)
    assert answer.status_code == 200, answer.text


async def balance(api: httpx.AsyncClient, headers: dict[str, str] | None = None) -> int:
    """Return the remaining credits."""
    credits_left: int = (await api.get("/v1/account", headers=headers)).json()["balance"]["credits"]
    return credits_left


def error(response: httpx.Response) -> tuple[int, str]:
    """Return the status and the code of an error in Clipia's shape."""
    content = response.json()["error"]
    assert set(content) == {"type", "code", "message"}
    assert all(isinstance(value, str) and value for value in content.values())
    return response.status_code, content["code"]


# Keys and limits


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer clipia_live_abc"},
        {"Authorization": "bearer clipia_test_A-b_9"},
        {"Authorization": "Key clipia_live_abc"},
        {"X-Api-Key": "clipia_test_abc"},
    ],
)
async def test_key_is_taken_from_every_documented_header(app: Starlette, headers: dict[str, str]) -> None:
    """A well-formed key is accepted as Bearer, as Key and in X-Api-Key."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as api:
        assert (await api.get("/v1/account", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk_live_abc"},
        {"Authorization": "Bearer clipia_live_"},
        {"Authorization": "Bearer clipia_prod_abc"},
        {"Authorization": "Bearer clipia_live_abc def"},
        {"Authorization": "Bearer clipia_live_" + "a" * 201},
        {"Authorization": "Basic clipia_live_abc"},
        {"X-Api-Key": "nonsense"},
    ],
)
async def test_bad_key_is_rejected(app: Starlette, headers: dict[str, str]) -> None:
    """A missing or malformed key is 401 on every path, with the headers of the rate limit."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://x", headers=headers
    ) as api:
        for answer in (await api.get("/v1/models"), await submit(api), await api.get("/v1/no/such/path")):
            assert error(answer) == (401, "invalid_api_key")
            assert "RateLimit-Limit" in answer.headers


async def test_rate_limit_counts_down_and_starts_again(api: httpx.AsyncClient, clock: Clock) -> None:
    """Every answer has the calls left in this minute; a call over the limit is 429 until the next minute."""
    await switch(api, rate_limit=2)
    answers = []
    for path in ("/v1/account", "/v1/requests/unknown", "/v1/models"):
        answers.append(await api.get(path))
        clock.now += 10
    names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
    assert [(answer.status_code, *(answer.headers[name] for name in names)) for answer in answers] == [
        (200, "2", "1", "60"),
        (404, "2", "0", "50"),
        (429, "2", "0", "40"),
    ]
    assert error(answers[-1]) == (429, "rate_limit_exceeded")
    assert answers[-1].headers["Retry-After"] == "40"
    assert (await api.get("/v1/models", headers=TEST)).status_code == 200, "limits are per key"
    clock.now += 30
    assert (await api.get("/v1/models")).headers["RateLimit-Remaining"] == "1"


async def test_concurrency_limit(api: httpx.AsyncClient, clock: Clock) -> None:
    """F7: live generations over the limit are 429 until one ends; test keys have no limit."""
    await switch(api, concurrency_limit=2)
    assert [(await submit(api)).status_code for _ in range(2)] == [200, 200]
    clock.now += 9.5
    refused = await submit(api)
    assert error(refused) == (429, "concurrency_limit_exceeded")
    assert refused.headers["Retry-After"] == "91", "never too early"
    assert [(await submit(api, headers=TEST)).status_code for _ in range(3)] == [200] * 3
    clock.now += 90.5
    assert (await submit(api)).status_code == 200


async def test_limits_are_clipias_unless_lifted(clock: Clock) -> None:
    """F7: by default a key has 120 calls per minute and ten generations in flight."""
    transport = httpx.ASGITransport(create_app(clock=clock))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=LIVE) as api:
        answers = [await submit(api) for _ in range(11)]
        assert [answer.status_code for answer in answers] == [200] * 10 + [429]
        assert error(answers[-1]) == (429, "concurrency_limit_exceeded")
        assert answers[-1].headers["RateLimit-Limit"] == "120"
        answers = [await api.get("/v1/account") for _ in range(110)]
        assert [answer.status_code for answer in answers] == [200] * 109 + [429]
        await switch(api, **WITHOUT_LIMITS)
        assert [(await submit(api)).status_code for _ in range(11)] == [200] * 11


async def test_undocumented_paths_and_methods_are_not_found(api: httpx.AsyncClient) -> None:
    """An undocumented path is 404 in Clipia's shape, below /v1 and elsewhere."""
    assert error(await api.get("/v1/generations")) == (404, "not_found")
    assert error(await api.delete("/v1/account")) == (404, "not_found")
    assert error(await api.get("/elsewhere")) == (404, "not_found")
    assert error(await api.post("/_sandbox/options")) == (405, "invalid_request")


# Submissions


async def test_test_key_is_done_at_once(api: httpx.AsyncClient) -> None:
    """With a test key the submission is answered COMPLETED with its price, and a fixed sample is ready."""
    before = await balance(api, TEST)
    answer = (await submit(api, headers=TEST)).json()
    request_id = answer["request_id"]
    assert str(uuid.UUID(request_id)) == request_id
    assert answer == {
        "request_id": request_id,
        "status": "COMPLETED",
        "queue_position": 0,
        "status_url": f"http://127.0.0.1:9000/v1/requests/{request_id}/status",
        "response_url": f"http://127.0.0.1:9000/v1/requests/{request_id}",
        "cost": 12,
        "warnings": [],
    }
    result = (await api.get(answer["response_url"], headers=TEST)).json()
    image = "http://127.0.0.1:9000/sandbox/sample-image.png"
    assert result["output"] == {"images": [{"url": image, "width": 1024, "height": 1024}]}
    assert (await api.get(answer["status_url"], headers=TEST)).json()["queue_position"] is None
    assert await balance(api, TEST) == before


async def test_test_key_has_samples_of_every_kind(api: httpx.AsyncClient) -> None:
    """A test key's video and tracks are fixed samples too."""
    outputs = []
    for model in ("seedance-2-fast-t2v", "suno-music"):
        answer = (await submit(api, model=model, headers=TEST)).json()
        outputs.append((await api.get(answer["response_url"], headers=TEST)).json()["output"])
    assert outputs[0]["video"]["url"] == "http://127.0.0.1:9000/sandbox/sample-video.mp4"
    assert [track["url"] for track in outputs[1]["audios"]] == [
        "http://127.0.0.1:9000/sandbox/sample-audio.mp3",
        "http://127.0.0.1:9000/sandbox/sample-audio-2.mp3",
    ]


async def test_live_key_goes_through_the_queue(api: httpx.AsyncClient, clock: Clock) -> None:
    """With a live key the generation waits, makes progress and completes; its result is 202 until then."""
    job = (await submit(api, {"input": {"prompt": "x", "num_images": 2}})).json()
    assert (job["status"], job["queue_position"], job["cost"]) == ("IN_QUEUE", 0, 24)
    seen = []
    for step in (0, 24, 2, 34, 39, 1):
        clock.now += step
        status = (await api.get(job["status_url"])).json()
        assert (status.pop("request_id"), status.pop("logs")) == (job["request_id"], [])
        result = await api.get(job["response_url"])
        seen.append((result.status_code, *status.values()))
    assert seen == [
        (202, "IN_QUEUE", 3, 0),
        (202, "IN_QUEUE", 1, 0),
        (202, "IN_PROGRESS", None, 1),
        (202, "IN_PROGRESS", None, 46),
        (202, "IN_PROGRESS", None, 98),
        (200, "COMPLETED", None, 100),
    ]
    content = (await api.get(job["response_url"])).json()
    works = f"http://127.0.0.1:9000/works/{job['request_id']}"
    assert [image["url"] for image in content["output"]["images"]] == [f"{works}-1.webp", f"{works}-2.webp"]
    assert [image["original_url"] for image in content["output"]["images"]] == [
        f"{works}-1.png",
        f"{works}-2.png",
    ]
    assert (content["status"], content["model"], content["cost"]) == ("COMPLETED", "nano-banana-2", 24)
    assert content["created_at"] == "2026-09-21T14:13:20Z"
    assert content["completed_at"] == "2026-09-21T14:15:00Z"


async def test_running_result_has_the_reserved_price(api: httpx.AsyncClient) -> None:
    """The 202 answer has the reserved price and no output."""
    job = (await submit(api)).json()
    assert (await api.get(job["response_url"])).json() == {
        "request_id": job["request_id"],
        "status": "IN_QUEUE",
        "model": "nano-banana-2",
        "cost": 12,
        "created_at": "2026-09-21T14:13:20Z",
    }


async def test_clock_set_back_does_not_reopen_an_instant_generation(
    api: httpx.AsyncClient, clock: Clock
) -> None:
    """A test key's generation stays completed if the clock is set back."""
    job = (await submit(api, headers=TEST)).json()
    clock.now -= 3600
    assert (await api.get(job["status_url"], headers=TEST)).json()["status"] == "COMPLETED"


async def test_origin_follows_the_request(app: Starlette) -> None:
    """URLs in answers start with the host and port that the client used."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), headers=TEST) as api:
        answer = (await api.post("http://localhost:1234/v1/models/suno-music", json=IMAGE)).json()
    assert answer["status_url"].startswith("http://localhost:1234/v1/requests/")


async def test_requests_of_another_key_are_not_found(api: httpx.AsyncClient) -> None:
    """A request is visible only to the key that submitted it."""
    job = (await submit(api)).json()
    for url in (job["status_url"], job["response_url"]):
        assert error(await api.get(url, headers={"Authorization": "Bearer clipia_live_two"})) == (
            404,
            "not_found",
        )
    assert error(await api.get("/v1/requests/unknown/status")) == (404, "not_found")


@pytest.mark.parametrize(
    ("body", "model", "expected"),
    [
        ([], "nano-banana-2", (400, "invalid_request")),
        ({}, "nano-banana-2", (400, "invalid_request")),
        ({"input": "a cat"}, "nano-banana-2", (400, "invalid_request")),
        (IMAGE, "no-such-model", (404, "model_not_found")),
        (IMAGE, "gpt-5.6-sol", (404, "model_not_found")),
        ({"input": {}}, "nano-banana-2", (400, "model_input_invalid")),
    ],
)
async def test_bad_submit(api: httpx.AsyncClient, body: Any, model: str, expected: tuple[int, str]) -> None:
    """A refused submission has its documented code and makes no generation."""
    assert error(await submit(api, body, model=model)) == expected
    assert (await api.get("/_sandbox/requests")).json()["requests"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"input": NaN}', b'{"input":{"prompt":"\\ud800"}}'])
async def test_body_that_is_not_json(api: httpx.AsyncClient, body: bytes) -> None:
    """A body that is not JSON is `invalid_request`, not a crash."""
    assert error(await api.post("/v1/models/nano-banana-2", content=body)) == (400, "invalid_request")


async def test_body_nested_too_deeply(api: httpx.AsyncClient) -> None:
    """A deeply nested body is `invalid_request`, not a crash."""
    for depth in (300, 100_000):
        body = b'{"input":' + b"[" * depth + b"]" * depth + b"}"
        assert error(await api.post("/v1/models/nano-banana-2", content=body)) == (400, "invalid_request")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "http://localhost.example.com/hook",
        "http://127.0.0.1@example.com/hook",
        "http://127.0.0.2/hook",
        "ftp://127.0.0.1/hook",
        "https://",
        "https:///hook",
        "https://exa\x00mple.com",
        "https://example.com:port/",
        "/hook",
        "",
        "https://example.com/" + "a" * 2048,
        17,
        {"url": "https://example.com"},
    ],
)
async def test_bad_webhook_url(api: httpx.AsyncClient, url: Any) -> None:
    """A webhook URL that is neither https nor local http is `webhook_url_invalid`."""
    assert error(await submit(api, IMAGE | {"webhook_url": url})) == (400, "webhook_url_invalid")


@pytest.mark.parametrize(
    "url", [None, "https://example.com/hook", "http://127.0.0.1:8000/x", "http://LOCALHOST:1/"]
)
async def test_good_webhook_url(app: Starlette, api: httpx.AsyncClient, url: str | None) -> None:
    """A webhook URL may be https anywhere and http on this machine."""
    async with app.router.lifespan_context(app):
        assert (await submit(api, IMAGE | {"webhook_url": url})).status_code == 200


async def test_ignored_parameters_are_named(api: httpx.AsyncClient) -> None:
    """Submission and estimate warn of the same ignored keys and are accepted."""
    body = {"input": {"prompt": "x", "promt": "y"}}
    job = (await submit(api, body)).json()
    estimate = (await api.post("/v1/models/nano-banana-2/estimate", json=body)).json()
    assert [warning["parameter"] for warning in job["warnings"]] == ["promt"]
    assert estimate == {"credits": 12, "warnings": job["warnings"]}


# Idempotency


async def test_same_key_same_parameters(api: httpx.AsyncClient) -> None:
    """F1: a repeat finds the first request, with the same answer, one generation and one charge."""
    first = await submit(api, {"input": {"prompt": "x", "num_images": 1}}, key="k")
    again = await submit(api, {"input": {"num_images": 1, "prompt": "x"}}, key="k")
    assert (again.status_code, again.json()) == (200, first.json())
    happened = (await api.get("/_sandbox/requests")).json()
    assert happened["idempotency_keys"] == {"k": {"submits": 2, "generations": 1}}
    assert [request["submits"] for request in happened["requests"]] == [2]
    assert await balance(api) == SandboxOptions().credits - 12


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({"input": {"prompt": "a dog"}}, "nano-banana-2"),
        (IMAGE | {"webhook_url": "https://example.com/"}, "nano-banana-2"),
        (IMAGE, "suno-music"),
    ],
)
async def test_same_key_other_parameters(api: httpx.AsyncClient, body: Any, model: str) -> None:
    """F2: another input, webhook URL or model under a used key is 409 and makes no generation."""
    await submit(api, key="k")
    assert error(await submit(api, body, model=model, key="k")) == (409, "idempotency_key_reuse")
    happened = (await api.get("/_sandbox/requests")).json()
    assert happened["idempotency_keys"] == {"k": {"submits": 2, "generations": 1}}
    assert [entry["status"] for entry in happened["submits"]] == [200, 409]


async def test_retry_while_the_first_is_in_progress(api: httpx.AsyncClient) -> None:
    """F3: until the first call is answered, its key is 409; after that it finds the first request."""
    await switch(api, latency=60)
    first = asyncio.create_task(submit(api, key="k"))
    await asyncio.sleep(0)
    (made,) = (await api.get("/_sandbox/requests")).json()["requests"]
    assert error(await submit(api, key="k")) == (409, "request_in_progress")
    assert error(await submit(api, {"input": {"prompt": "a dog"}}, key="k")) == (409, "idempotency_key_reuse")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await switch(api, latency=0)
    assert (await submit(api, key="k")).json()["request_id"] == made["request_id"]


async def test_key_expires_after_24_hours(api: httpx.AsyncClient, clock: Clock) -> None:
    """F4: 24 h after its first use a key starts a new generation, with a new charge."""
    first = (await submit(api, key="k")).json()["request_id"]
    clock.now += DAY - 1
    assert (await submit(api, key="k")).json()["request_id"] == first
    clock.now += 1
    second = (await submit(api, {"input": {"prompt": "other"}}, key="k")).json()["request_id"]
    assert second != first
    assert await balance(api) == SandboxOptions().credits - 24
    assert (await api.get("/_sandbox/requests")).json()["idempotency_keys"]["k"]["generations"] == 2
    clock.now += DAY - 1
    assert (await submit(api, {"input": {"prompt": "other"}}, key="k")).json()["request_id"] == second


async def test_refused_submission_leaves_the_key_free(api: httpx.AsyncClient) -> None:
    """A refused submission makes no generation, so its key can be used again."""
    assert error(await submit(api, {"input": {}}, key="k")) == (400, "model_input_invalid")
    assert (await submit(api, key="k")).status_code == 200


async def test_keys_of_two_accounts_do_not_meet(api: httpx.AsyncClient) -> None:
    """The same idempotency key under another API key is another request."""
    one = await submit(api, key="k")
    two = await submit(api, {"input": {"prompt": "a dog"}}, key="k", headers=TEST)
    assert two.status_code == 200
    assert two.json()["request_id"] != one.json()["request_id"]


async def test_without_a_key_every_submit_is_new(api: httpx.AsyncClient) -> None:
    """Calls without Idempotency-Key are never repeats."""
    assert (await submit(api)).json()["request_id"] != (await submit(api)).json()["request_id"]


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_bad_idempotency_key(api: httpx.AsyncClient, key: str) -> None:
    """An empty key and one of more than 255 characters are refused."""
    assert error(await submit(api, key=key)) == (400, "invalid_request")
    assert (await submit(api, key="k" * 255)).status_code == 200


# Money


async def test_credits_are_reserved_charged_and_refunded(api: httpx.AsyncClient, clock: Clock) -> None:
    """F13: the price is reserved at the submission, charged on success and refunded on failure."""
    start = await balance(api)
    await submit(api)
    await switch(api, fail_rate=1)
    failed = (await submit(api, model="suno-music")).json()
    assert await balance(api) == start - 42
    clock.now += 100
    assert await balance(api) == start - 12
    assert await balance(api) == start - 12, "charged once"
    result = (await api.get(failed["response_url"])).json()
    assert (result["status"], result["cost"], result["output"]) == ("FAILED", 0, None)
    assert result["error"]["code"] == "GENERATION_FAILED"


async def test_credits_run_out(api: httpx.AsyncClient, clock: Clock) -> None:
    """F6: a live generation that costs more than the balance is 402; test keys and top-ups are accepted."""
    await switch(api, credits=24, fail_rate=1)
    assert [(await submit(api)).status_code for _ in range(2)] == [200, 200]
    assert await balance(api) == 0
    assert error(await submit(api)) == (402, "insufficient_credits")
    await switch(api, credits=36)
    assert (await submit(api)).status_code == 200
    clock.now += 100
    assert await balance(api) == 36
    await switch(api, credits=0)
    assert await balance(api) == 0
    assert (await submit(api, headers=TEST)).status_code == 200


async def test_usage_of_30_days(api: httpx.AsyncClient, clock: Clock) -> None:
    """The account counts its requests and charges of the last 30 days, without running generations."""
    await submit(api)
    clock.now += 100
    await submit(api, headers=TEST)
    await submit(api)
    account = (await api.get("/v1/account")).json()
    assert account["usage_30d"] == {"requests": 2, "credits_spent": 12}
    other = (await api.get("/v1/account", headers=TEST)).json()
    assert other["usage_30d"] == {"requests": 1, "credits_spent": 0}
    assert other["account_id"] != account["account_id"]
    clock.now += 30 * DAY - 50
    assert (await api.get("/v1/account")).json()["usage_30d"] == {"requests": 1, "credits_spent": 12}


# Catalogue


async def test_catalogue(api: httpx.AsyncClient) -> None:
    """The list has every model with its price, including a text model; one model has its schema, too."""
    listed = (await api.get("/v1/models")).json()["data"]
    assert [model.get("slug") for model in listed][-1] is None
    assert listed[-1]["id"] == "gpt-5.6-sol"
    for model in listed[:-1]:
        described = (await api.get(f"/v1/models/{model['slug']}")).json()
        schema = described.pop("input_schema")
        assert described == model
        assert schema
    assert {model["type"] for model in listed[:-1]} == {"image", "video", "audio"}
    assert (await api.get("/v1/models/gpt-5.6-sol")).json() == listed[-1]
    assert error(await submit(api, model="gpt-5.6-sol")) == (404, "model_not_found")


@pytest.mark.parametrize(
    "slug", ["no-such-model", "no/such/model", "no%2Fsuch%2Fmodel", "nano-banana-2%2F", "%2F"]
)
async def test_unknown_model_of_any_spelling(api: httpx.AsyncClient, slug: str) -> None:
    """An unknown slug is `model_not_found` for every call, also with a slash, encoded or not."""
    assert error(await api.get(f"/v1/models/{slug}")) == (404, "model_not_found")
    assert error(await submit(api, model=slug)) == (404, "model_not_found")
    assert error(await api.post(f"/v1/models/{slug}/estimate", json=IMAGE)) == (404, "model_not_found")


async def test_estimate_checks_the_input(api: httpx.AsyncClient) -> None:
    """An estimate prices the input, refuses the same inputs as a submission, and starts no generation."""
    body = {"input": {"prompt": "x", "num_images": 4}}
    assert (await api.post("/v1/models/nano-banana-2/estimate", json=body)).json()["credits"] == 48
    assert error(await api.post("/v1/models/nano-banana-2/estimate", json={"input": {}})) == (
        400,
        "model_input_invalid",
    )
    assert error(await api.post("/v1/models/nano-banana-2/estimate", json={})) == (400, "invalid_request")
    assert error(await api.post("/v1/models/no-such-model/estimate", json=body)) == (404, "model_not_found")
    assert (await api.get("/_sandbox/requests")).json()["requests"] == []


# Faults


async def test_throttling_on_order(api: httpx.AsyncClient, clock: Clock) -> None:
    """F7: `throttle_rate` answers 429 with Retry-After in seconds or as a date, without effect."""
    await switch(api, throttle_rate=1, retry_after=7)
    answer = await submit(api, key="k")
    assert error(answer) == (429, "rate_limit_exceeded")
    assert answer.headers["Retry-After"] == "7"
    await switch(api, retry_after_date=True)
    when = email.utils.parsedate_to_datetime((await api.get("/v1/models")).headers["Retry-After"])
    assert when.timestamp() == clock.now + 7
    await switch(api, throttle_rate=0)
    assert (await api.get("/_sandbox/requests")).json()["requests"] == []
    assert (await submit(api, key="k")).status_code == 200


async def test_server_errors_on_order(api: httpx.AsyncClient) -> None:
    """F5: `error_rate` answers with each of the documented 5xx at random, without effect."""
    await switch(api, error_rate=1)
    seen = {error(await submit(api)) for _ in range(60)}
    assert seen == {
        (500, "internal_error"),
        (502, "service_unavailable"),
        (503, "service_unavailable"),
        (504, "service_unavailable"),
    }
    assert (await api.get("/_sandbox/requests")).json()["requests"] == []


async def test_rates_are_shares(api: httpx.AsyncClient) -> None:
    """A rate between 0 and 1 strikes some calls, and the same ones after a reset or with the same seed."""

    async def run() -> list[bool]:
        return [(await api.get("/v1/models")).status_code < 500 for _ in range(40)]

    await switch(api, error_rate=0.5, seed=3)
    first = await run()
    assert 8 < sum(first) < 32
    assert await run() != first
    await switch(api, seed=3)
    assert await run() == first
    runs = []
    for _ in range(2):
        await api.post("/_sandbox/reset")
        await switch(api, error_rate=0.5)
        runs.append(await run())
    assert runs[0] == runs[1] != first


async def test_lost_answer(api: httpx.AsyncClient) -> None:
    """F5: a lost answer is 504 although the generation exists; a repeat with the key finds it."""
    await switch(api, lost_answer_rate=1)
    assert error(await submit(api, key="k")) == (504, "service_unavailable")
    await switch(api, lost_answer_rate=0)
    found = (await submit(api, key="k")).json()["request_id"]
    happened = (await api.get("/_sandbox/requests")).json()
    assert [request["request_id"] for request in happened["requests"]] == [found]
    assert [(entry["status"], entry["request_id"]) for entry in happened["submits"]] == [
        (504, found),
        (200, found),
    ]


@pytest.mark.parametrize("code", CODES)
async def test_every_documented_error_can_be_ordered(api: httpx.AsyncClient, code: str) -> None:
    """F6: `refuse_submits` answers submissions, and only these, with any documented code."""
    await switch(api, refuse_submits=code)
    answer = await submit(api)
    assert error(answer) == (CODES[code][0], code)
    assert ("Retry-After" in answer.headers) is (answer.status_code == 429)
    assert (await api.get("/v1/account")).status_code == 200


async def test_latency_holds_answers_back(api: httpx.AsyncClient) -> None:
    """`latency` delays every answer of the API and none of the control API."""
    await switch(api, latency=30)
    waiting = [asyncio.create_task(call) for call in (api.get("/v1/models"), submit(api), submit(api, {}))]
    done, pending = await asyncio.wait(waiting, timeout=0.1)
    assert len(pending) == 2, "a refused submission is answered without delay"
    assert [error(task.result()) for task in done] == [(400, "invalid_request")]
    assert len((await api.get("/_sandbox/requests")).json()["requests"]) == 1
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def test_failed_test_generation(api: httpx.AsyncClient) -> None:
    """If a test key's generation fails by a switch, the answer to the submission has that state."""
    await switch(api, fail_rate=1)
    assert (await submit(api, headers=TEST)).json()["status"] == "FAILED"


async def test_big_videos_on_order(api: httpx.AsyncClient) -> None:
    """`video_bytes` sets the size of videos of new generations only."""
    await switch(api, video_bytes=100_000)
    urls = []
    for model in ("seedance-2-fast-t2v", "suno-music"):
        job = (await submit(api, model=model, headers=TEST)).json()
        urls.append(json.dumps((await api.get(job["response_url"], headers=TEST)).json()["output"]))
    assert "http://127.0.0.1:9000/works/blob/100000.mp4" in urls[0]
    assert "sample-audio.mp3" in urls[1]
