"""The sandbox's control API: its switches and records, and actions by hand."""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import httpx
import pytest

from receiver.sandbox import SandboxOptions, create_app

LIVE = {"Authorization": "Bearer clipia_live_one"}
SECRET = "whsec_never_shown"


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    """A client with a live key, for a sandbox with generations of 0.2 s."""
    app = create_app(SandboxOptions(duration=0.2, seed=5), secret=SECRET)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9000", headers=LIVE) as client,
    ):
        yield client


async def submit(api: httpx.AsyncClient, **more: Any) -> str:
    """Submit an image and return its request id."""
    answer = await api.post("/v1/models/nano-banana-2", json={"input": {"prompt": "x"}} | more)
    request_id: str = answer.json()["request_id"]
    return request_id


async def happened(api: httpx.AsyncClient) -> dict[str, Any]:
    """Return all records of the sandbox."""
    content: dict[str, Any] = (await api.get("/_sandbox/requests")).json()
    return content


async def test_options_are_shown_and_changed(api: httpx.AsyncClient) -> None:
    """PATCH sets the given switches only, and answers like GET."""
    before = (await api.get("/_sandbox/options")).json()
    assert before == asdict(SandboxOptions(duration=0.2, seed=5))
    changed = await api.patch("/_sandbox/options", json={"fail_rate": 0.5, "webhook_first": True})
    assert changed.json() == before | {"fail_rate": 0.5, "webhook_first": True}
    assert (await api.get("/_sandbox/options")).json() == changed.json()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"fail_rate": 2}', "fail_rate must be from 0 to 1, not 2."),
        (b'{"latency": 1, "fail_rate": "often"}', "fail_rate must be of type float, not str."),
        (b'{"fail-rate": 1}', "unknown switch 'fail-rate'; there are: "),
        (b"[]", "The body must be a JSON object."),
        (b"", "The body is not valid JSON"),
    ],
)
async def test_bad_options_change_nothing(api: httpx.AsyncClient, body: bytes, message: str) -> None:
    """A PATCH with one invalid switch changes none, and the error names it."""
    before = (await api.get("/_sandbox/options")).json()
    answer = await api.patch("/_sandbox/options", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
    assert answer.json()["error"]["message"].startswith(message)
    assert (await api.get("/_sandbox/options")).json() == before


async def test_submits_are_recorded_as_received(api: httpx.AsyncClient) -> None:
    """F1: every POST is recorded with its exact bytes and its key, even if it was refused."""
    bodies = [b'{"input":  {"prompt":"\xc3\xa9"}}', b"\xff\x00", b'{"input":{"prompt":"\\u00e9"}}']
    for body in bodies:
        await api.post("/v1/models/nano-banana-2", content=body, headers={"Idempotency-Key": "k"})
    await api.post("/v1/models/suno-music", content=bodies[0], headers={"Authorization": "none"})
    seen = await happened(api)
    assert [entry["body_sha256"] for entry in seen["submits"]] == [
        hashlib.sha256(body).hexdigest() for body in (*bodies, bodies[0])
    ]
    assert [entry["body"] for entry in seen["submits"]][:2] == ['{"input":  {"prompt":"é"}}', "\ufffd\x00"]
    assert [(entry["status"], entry["idempotency_key"]) for entry in seen["submits"]] == [
        (200, "k"),
        (400, "k"),
        (200, "k"),
        (401, None),
    ]
    assert seen["idempotency_keys"] == {"k": {"submits": 3, "generations": 1}}
    assert [request["submits"] for request in seen["requests"]] == [2]
    assert seen["requests"][0]["body"] == bodies[0].decode()


async def test_one_request(api: httpx.AsyncClient) -> None:
    """One generation has the same attributes as in the list; an unknown one is 404."""
    request_id = await submit(api)
    shown = (await api.get(f"/_sandbox/requests/{request_id}")).json()
    assert shown == (await happened(api))["requests"][0]
    assert (shown["mode"], shown["status"], shown["ended_at"], shown["webhook"]) == (
        "live",
        "IN_QUEUE",
        None,
        None,
    )
    assert (await api.get("/_sandbox/requests/unknown")).json()["error"]["code"] == "not_found"


async def test_cancel(api: httpx.AsyncClient) -> None:
    """F10: a canceled generation stays CANCELED, costs 0 credits and cannot be canceled again."""
    request_id = await submit(api)
    answer = await api.post(f"/_sandbox/requests/{request_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "CANCELED")
    result = await api.get(f"/v1/requests/{request_id}")
    assert (result.status_code, result.json()["cost"], result.json()["output"]) == (200, 0, None)
    assert "error" not in result.json()
    assert (await api.get("/v1/account")).json()["balance"]["credits"] == SandboxOptions().credits
    again = await api.post(f"/_sandbox/requests/{request_id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "invalid_state")
    assert again.json()["error"]["message"] == "The request is already CANCELED."
    assert (await api.post("/_sandbox/requests/unknown/cancel")).status_code == 404


async def test_webhook_by_hand_needs_one_to_send(api: httpx.AsyncClient) -> None:
    """A webhook can be sent by hand only if the request has a URL and has completed or failed."""
    silent, running, cancelled = [
        await submit(api),
        await submit(api, webhook_url="http://127.0.0.1:1/"),
        await submit(api, webhook_url="http://127.0.0.1:1/"),
    ]
    await api.post(f"/_sandbox/requests/{cancelled}/cancel")
    messages = []
    for request_id in (silent, running, cancelled):
        answer = await api.post(f"/_sandbox/requests/{request_id}/webhook")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
        # On a busy machine the state may have changed by now.
        messages.append(answer.json()["error"]["message"].replace("IN_PROGRESS", "IN_QUEUE"))
    assert messages == [
        "The request was submitted without a webhook_url.",
        "The request is IN_QUEUE; only COMPLETED and FAILED have a webhook.",
        "The request is CANCELED; only COMPLETED and FAILED have a webhook.",
    ]


@pytest.mark.parametrize("body", [b"[]", b"x", b'{"conflicting": 1}', b'{"conflict": true}'])
async def test_webhook_by_hand_checks_its_body(api: httpx.AsyncClient, body: bytes) -> None:
    """The body may have the field `conflicting` only."""
    request_id = await submit(api, webhook_url="http://127.0.0.1:1/")
    answer = await api.post(f"/_sandbox/requests/{request_id}/webhook", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_reset(api: httpx.AsyncClient) -> None:
    """A reset deletes requests, keys, charges and changed switches."""
    await api.patch("/_sandbox/options", json={"duration": 9})
    await api.post("/v1/models/suno-music", json={"input": {"prompt": "x"}}, headers={"Idempotency-Key": "k"})
    assert (await api.post("/_sandbox/reset")).status_code == 204
    assert await happened(api) == {"requests": [], "submits": [], "idempotency_keys": {}}
    assert (await api.get("/_sandbox/options")).json() == asdict(SandboxOptions(duration=0.2, seed=5))
    assert (await api.get("/v1/account")).json()["balance"]["credits"] == SandboxOptions().credits


async def test_secrets_are_not_shown(api: httpx.AsyncClient) -> None:
    """G8: the control API shows neither the signing secret nor an API key."""
    await submit(api)
    for path in ("/_sandbox/options", "/_sandbox/requests"):
        text = (await api.get(path)).text
        assert SECRET not in text
        assert "clipia_live_one" not in text


def test_secret_is_given_or_made() -> None:
    """The signing secret is the given one or a random one, and can be read."""
    assert create_app(secret=SECRET).state.secret == SECRET
    made = {create_app().state.secret for _ in range(3)}
    assert len(made) == 3
    assert all(len(secret) > 32 for secret in made)
