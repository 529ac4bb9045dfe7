"""The internal HTTP API over real sockets, with a sandbox for Clipia, on both databases."""

import asyncio
import json
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from sqlalchemy import delete, select, update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from structlog.testing import capture_logs
from support.payloads import SECRET
from support.servers import Postgres, free_port
from support.serving import serving

from receiver.app import create_app
from receiver.clipia.job_request import MAX_REQUEST_BYTES
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.postgresql import POOL_SIZE
from receiver.db.tables import jobs
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, running
from receiver.sandbox import create_app as create_sandbox
from receiver.settings import Settings

ALICE, BOB, ADMIN = "token-of-alice-0123456789", "token-of-bob-0123456789", "token-of-admin-0123456789"
TOKENS = f"alice:{ALICE}:submit+read,bob:{BOB}:submit+read,admin:{ADMIN}:submit+read+operate"
MODEL = "nano-banana-2"
JOB: dict[str, Any] = {"model": MODEL, "input": {"prompt": "a cat"}}
FAST = SandboxOptions(duration=0.05, webhook_backoff=0.05, **WITHOUT_LIMITS)
SLOW = SandboxOptions(duration=60.0, **WITHOUT_LIMITS)
SECONDS = 15.0
PROMISED = {
    *("id", "state", "caller", "idempotency_key", "model", "input", "metadata", "request_id", "cost"),
    *("warnings", "error", "created_at", "updated_at", "event"),
}

T = TypeVar("T")


class Site:
    """A receiver that listens, its sandbox, and access to its database."""

    def __init__(self, url: str, sandbox_url: str, database: Database) -> None:
        self.url = url
        self.database = database
        self.alice, self.bob, self.admin = (make_client(url, token) for token in (ALICE, BOB, ADMIN))
        self.sandbox = make_client(sandbox_url)

    async def close(self) -> None:
        """Close the clients."""
        for client in (self.alice, self.bob, self.admin, self.sandbox):
            await client.aclose()

    async def submit(self, key: str | None = None, **changes: Any) -> httpx.Response:
        """Submit a job as Alice."""
        return await post_job(self.alice, key, **changes)

    async def switch(self, **switches: Any) -> None:
        """Set switches of the sandbox."""
        (await self.sandbox.patch("/_sandbox/options", json=switches)).raise_for_status()

    async def generations(self) -> list[dict[str, Any]]:
        """Return the generations that Clipia made."""
        found: list[dict[str, Any]] = (await self.sandbox.get("/_sandbox/requests")).json()["requests"]
        return found

    async def sent(self) -> list[dict[str, Any]]:
        """Return all submissions that reached Clipia."""
        found: list[dict[str, Any]] = (await self.sandbox.get("/_sandbox/requests")).json()["submits"]
        return found

    async def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all jobs."""
        async with self.database.read() as connection:
            return [
                dict(row) for row in (await connection.execute(select(jobs).order_by(jobs.c.seq))).mappings()
            ]

    async def set(self, job_id: str, **values: Any) -> None:
        """Change a job's row."""
        async with self.database.write() as connection:
            await connection.execute(update(jobs).where(jobs.c.id == uuid.UUID(job_id)).values(**values))

    async def ended(self, job_id: str) -> dict[str, Any]:
        """Wait for a job's end and return it in the form of the API."""
        return await until(lambda: self._settled(job_id))

    async def _settled(self, job_id: str) -> dict[str, Any] | None:
        job: dict[str, Any] = (await self.admin.get(f"/v1/jobs/{job_id}?wait=2")).json()
        done = job["event"] is not None and job["event"]["state"] == "ready"
        return job if done and all(d["state"] == "delivered" for d in job["event"]["deliveries"]) else None


@asynccontextmanager
async def make_site(
    database: Database,
    database_url: str,
    folder: Path,
    *,
    clipia: str | None = None,
    options: SandboxOptions = FAST,
    worker: bool = True,
    **settings: Any,
) -> AsyncIterator[Site]:
    """Open a receiver; `clipia` is the address to use in place of the sandbox."""
    async with AsyncExitStack() as stack:
        sandbox_url = await stack.enter_async_context(running(create_sandbox(options, secret=SECRET)))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        # asyncio sets it only if a socket has its protocol number; without it each answer takes 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        values = {
            "database_url": database_url,
            "storage_url": f"file:{folder / 'media'}",
            "clipia_webhook_secret": SECRET,
            "clipia_key": "clipia_live_x",
            "clipia_base_url": clipia or sandbox_url,
            "public_url": url,
            "media_hosts": (clipia or sandbox_url,),
            "api_tokens": TOKENS,
            "destination_url": f"file:{folder / 'events.jsonl'}",
        }
        app = create_app(Settings.load(**(values | settings)), worker=worker)
        await stack.enter_async_context(serving(app, listener=listener))
        site = Site(url, sandbox_url, database)
        stack.push_async_callback(site.close)
        yield site


@pytest.fixture
async def site(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    """A receiver with its worker, on each database."""
    async with make_site(database, database_url, tmp_path) as opened:
        yield opened


@pytest.fixture
async def idle(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    """A receiver without a worker, on each database; its jobs never end."""
    async with make_site(database, database_url, tmp_path, options=SLOW, worker=False) as opened:
        yield opened


@pytest.fixture
async def sqlite(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[tuple[Database, str, Path]]:
    """The arguments of `make_site`, if the database does not matter."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{path}")
    yield database, f"sqlite:///{path}", tmp_path
    await database.close()


@pytest.fixture
async def local(sqlite: tuple[Database, str, Path]) -> AsyncIterator[Site]:
    """A receiver without a worker, if the database does not matter."""
    async with make_site(*sqlite, options=SLOW, worker=False) as opened:
        yield opened


# Submitting


async def test_a_job_is_submitted_and_ends_with_its_event(site: Site) -> None:
    """A new job is 201 with its location and key; its event has the files and the deliveries."""
    response = await site.submit("order-4711", metadata={"order": "4711"})
    job = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["idempotency-key"] == "order-4711"
    assert response.headers["cache-control"] == "no-store"
    assert job.keys() >= PROMISED
    assert (job["caller"], job["idempotency_key"], job["model"]) == ("alice", "order-4711", MODEL)
    assert (job["input"], job["metadata"]) == (JOB["input"], {"order": "4711"})
    assert (job["cost"], job["warnings"], job["error"]) == (12, [], None)
    (generation,) = await site.generations()
    assert job["request_id"] == generation["request_id"]

    ended = await site.ended(job["id"])
    assert ended.keys() == job.keys()
    assert (ended["id"], ended["state"], ended["charged"], ended["progress"]) == (
        job["id"],
        "completed",
        12,
        100,
    )
    assert (ended["event"]["status"], ended["event"]["origin"]) == ("OK", "webhook")
    assert {(file["variant"], file["state"]) for file in ended["event"]["media"]} == {
        ("original", "stored"),
        ("display", "stored"),
    }
    assert all(file["sha256"] and file["size"] and file["uri"] for file in ended["event"]["media"])
    (delivery,) = ended["event"]["deliveries"]
    assert (delivery["destination"], delivery["state"], delivery["attempts"]) == ("default", "delivered", 1)
    (attempt,) = ended["attempts"]
    assert (attempt["number"], attempt["outcome"], attempt["error"]) == (1, "succeeded", None)
    assert datetime.fromisoformat(ended["created_at"]) <= datetime.fromisoformat(ended["updated_at"])
    assert (await site.alice.get(response.headers["location"])).json() == ended


async def test_a_failed_generation_is_a_failed_job(site: Site) -> None:
    """If a generation fails, it is charged no credits, and its job has the reason."""
    await site.switch(fail_rate=1)
    job = await site.ended((await site.submit("k")).json()["id"])
    assert (job["state"], job["charged"], job["event"]["status"]) == ("failed", 0, "ERROR")
    assert job["error"]["code"] == "GENERATION_FAILED"
    assert job["event"]["media"] == []
    # Clipia accepted it, so a repeated call returns the job and no error.
    repeat = await site.submit("k")
    assert (repeat.status_code, repeat.json()["id"]) == (200, job["id"])


async def test_a_key_is_generated_if_absent(idle: Site) -> None:
    """Each call without a key creates a job, and the generated key can be used to repeat the call."""
    first, second = await idle.submit(), await idle.submit()
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    key = first.headers["idempotency-key"]
    assert key == first.json()["idempotency_key"]
    again = await idle.submit(key)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert len(await idle.generations()) == 2


async def test_a_repeat_is_the_same_job(idle: Site) -> None:
    """The same key and parameters, in any order, are one job and one generation."""
    first = await idle.submit("k", metadata={"a": "1", "b": "2"})
    content = (
        b'{"metadata":{"b":"2","a":"1"},"max_cost":null,"wait":0,"input":{"prompt":"a cat"},"model":"%s"}'
    )
    again = await idle.alice.post(
        "/v1/jobs", content=content % MODEL.encode(), headers={"Idempotency-Key": "k"}
    )
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert len(await idle.sent()) == 1


async def test_a_key_does_not_stand_for_other_parameters(local: Site) -> None:
    """F8: if a key is used with other parameters, the answer is 409, names the job, and sends no request."""
    first = (await local.submit("k")).json()
    for changes in (
        {"model": "suno-music"},
        {"input": {"prompt": "a dog"}},
        {"input": {"prompt": "a cat", "num_images": 1}},
        {"metadata": {"a": "1"}},
        {"max_cost": 100},
    ):
        response = await local.submit("k", **changes)
        assert problem(response) == (409, "invalid_request_error", "idempotency_key_reuse"), changes
        assert response.json()["job_id"] == first["id"]
    assert len(await local.sent()) == 1


async def test_two_callers_may_use_one_key(idle: Site) -> None:
    """F8: each caller has its own keys; Clipia gets ours, and never the callers'."""
    jobs_ = [(await post_job(client, "k")).json() for client in (idle.alice, idle.bob)]
    assert [job["caller"] for job in jobs_] == ["alice", "bob"]
    assert jobs_[0]["id"] != jobs_[1]["id"]
    keys = [generation["idempotency_key"] for generation in await idle.generations()]
    assert len({*keys, "k"}) == 3
    assert all(uuid.UUID(key).version == 4 for key in keys)


async def test_concurrent_calls_with_one_key_make_one_job(idle: Site) -> None:
    """F8: of 32 concurrent calls exactly one is 201; there is one job and one generation."""
    responses = await asyncio.gather(*(idle.submit("k") for _ in range(32)))
    assert Counter(response.status_code for response in responses)[201] == 1
    assert {response.status_code for response in responses} <= {200, 201, 202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len(await idle.rows()) == len(await idle.generations()) == len(await idle.sent()) == 1


async def test_concurrent_calls_with_other_parameters_are_refused(idle: Site) -> None:
    """F8: if two sets of parameters race for a key, one wins, and all calls with the other are 409."""
    prompts = ["a cat", "a dog"] * 8
    responses = await asyncio.gather(*(idle.submit("k", input={"prompt": prompt}) for prompt in prompts))
    (row,) = await idle.rows()
    winner = json.loads(row["request"])["input"]["prompt"]
    assert [response.status_code == 409 for response in responses] == [prompt != winner for prompt in prompts]
    assert len(await idle.generations()) == 1


async def test_a_job_waits_for_a_clipia_that_is_away(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """F5: 202 if Clipia cannot be reached; the worker submits the job once it can."""
    port = free_port()
    async with make_site(database, database_url, tmp_path, clipia=f"http://127.0.0.1:{port}") as site:
        response = await site.submit("k")
        job = response.json()
        assert (response.status_code, job["state"], job["request_id"]) == (202, "pending", None)
        assert job["error"]["code"] == "unreachable"
        again = await site.submit("k")
        assert (again.status_code, again.json()["id"]) == (202, job["id"])
        async with (
            running(create_sandbox(FAST, secret=SECRET), port=port) as clipia,
            httpx.AsyncClient(base_url=clipia) as control,
        ):
            await site.set(job["id"], next_attempt_at=db_time(0.0))
            ended = await site.ended(job["id"])
            made = (await control.get("/_sandbox/requests")).json()["idempotency_keys"]
        assert (ended["state"], ended["error"]) == ("completed", None)
        assert [attempt["outcome"] for attempt in ended["attempts"]][-2:] == ["retry", "succeeded"]
        assert [key["generations"] for key in made.values()] == [1]


async def test_a_job_outlives_errors_of_clipia(site: Site) -> None:
    """F5: if Clipia answers 5xx, the call is 202, and the worker retries with the same key."""
    await site.switch(error_rate=1)
    response = await site.submit("k")
    assert (response.status_code, response.json()["state"]) == (202, "pending")
    await site.switch(error_rate=0)
    await site.set(response.json()["id"], next_attempt_at=db_time(0.0))
    job = await site.ended(response.json()["id"])
    assert job["state"] == "completed"
    assert (await site.submit("k")).status_code == 200
    assert len(await site.generations()) == 1


async def test_a_lost_answer_is_requested_again(site: Site) -> None:
    """F5: if Clipia's answer was lost, the retry finds the same generation."""
    await site.switch(lost_answer_rate=1, webhook_loss_rate=1)
    response = await site.submit("k")
    assert (response.status_code, response.json()["request_id"]) == (202, None)
    await site.switch(lost_answer_rate=0)
    await site.set(response.json()["id"], next_attempt_at=db_time(0.0))
    job = await until(lambda: found(site, response.json()["id"], "submitted"))
    (generation,) = await site.generations()
    assert job["request_id"] == generation["request_id"]
    assert generation["submits"] == 2


async def test_an_account_that_is_refused_is_not_the_job_s_fault(local: Site) -> None:
    """F6: after 402 and the like, the job is pending with Clipia's error; the call does not fail."""
    await local.switch(refuse_submits="insufficient_credits")
    response = await local.submit("k")
    job = response.json()
    assert (response.status_code, job["state"]) == (202, "pending")
    assert (job["error"]["code"], job["error"]["status"]) == ("insufficient_credits", 402)
    limits = (await local.admin.get("/v1/account")).json()["limits"]
    assert (limits["paused"], limits["refused_jobs"]) == (None, 1)
    await local.switch(refuse_submits="invalid_api_key")
    assert (await local.submit("other")).status_code == 202
    limits = (await local.admin.get("/v1/account")).json()["limits"]
    assert (limits["paused"]["code"], limits["refused_jobs"]) == ("invalid_api_key", 1)
    metrics = (await local.admin.get("/metrics")).text
    assert "receiver_submissions_paused 1.0" in metrics
    assert "receiver_jobs_refused 1.0" in metrics


SEED = {"prompt": "a cat", "seed": 7}


async def test_a_key_that_the_schema_does_not_have_passes_with_a_warning(local: Site) -> None:
    """Clipia accepts undeclared keys, so a stale schema rejects no job: `seed` is sent with a warning."""
    estimate = await local.alice.post(f"/v1/models/{MODEL}/estimate", json={"input": SEED})
    response = await local.submit("k", input=SEED)
    assert (estimate.status_code, response.status_code) == (200, 201)
    for answer in (estimate, response):
        (warning,) = answer.json()["warnings"]
        assert (warning["code"], warning["parameter"]) == ("unknown_parameter", "seed")
    (sent,) = await local.sent()
    assert json.loads(sent["body"])["input"] == SEED
    # Strict mode does not belong to the job.
    again = await local.submit("k", input=SEED, strict=True)
    assert (again.status_code, again.json()["id"]) == (200, response.json()["id"])
    for wrong in ({"num_images": 9}, {"aspect_ratio": "7:5"}, {"prompt": 1}):
        response = await local.submit(input=SEED | wrong)
        assert problem(response) == (400, "invalid_request_error", "model_input_invalid")
    assert len(await local.sent()) == 1


async def test_a_strict_call_refuses_such_a_key(local: Site) -> None:
    """If `strict` is true, unknown keys are invalid; if it is not a boolean, the call is."""
    price = f"/v1/models/{MODEL}/estimate"
    for response in (
        await local.submit(input=SEED, strict=True),
        await local.alice.post(price, json={"input": SEED, "strict": True}),
    ):
        assert problem(response) == (400, "invalid_request_error", "model_input_invalid")
        assert '"seed" is not known to this model' in response.json()["error"]["message"]
    odd: list[Any] = [1, "true", []]
    for strict in odd:
        for response in (
            await local.submit(input=JOB["input"], strict=strict),
            await local.alice.post(price, json=JOB | {"strict": strict}),
        ):
            assert problem(response) == (400, "invalid_request_error", "invalid_request")
    assert await local.sent() == await local.rows() == []


async def test_the_setting_says_how_inputs_are_checked(sqlite: tuple[Database, str, Path]) -> None:
    """RECEIVER_INPUT_CHECK is `strict` or `off`, unless a call overrides it; Clipia always checks."""
    async with make_site(*sqlite, options=SLOW, worker=False, input_check="strict") as site:
        assert problem(await site.submit(input=SEED))[2] == "model_input_invalid"
        assert (await site.submit(input=SEED, strict=False)).status_code == 201
    async with make_site(*sqlite, options=SLOW, worker=False, input_check="off") as site:
        response = await site.submit(input=SEED | {"num_images": 9})
        assert problem(response)[2] == "model_input_invalid"
        assert "job_id" in response.json(), "Clipia refuses it"
        assert problem(await site.submit(input=SEED, strict=True))[2] == "model_input_invalid"
        assert (
            (await site.submit(input=SEED))
            .json()["warnings"][0]["message"]
            .endswith("num_images, image_url.")
        )


async def test_a_job_can_be_canceled(idle: Site) -> None:
    """F6: an operator ends a job; if Clipia has it, it is unsure, and canceled the second time."""
    job = (await idle.submit("k")).json()
    for state, charged in (("unsure", None), ("canceled", 0)):
        response = await idle.admin.post(f"/v1/jobs/{job['id']}/cancel")
        assert (response.status_code, response.json()["state"]) == (200, state)
        assert (response.json()["charged"], response.json()["error"]["code"]) == (charged, "canceled")
    response = await idle.admin.post(f"/v1/jobs/{job['id']}/cancel")
    assert problem(response) == (409, "invalid_request_error", "not_cancelable")
    assert response.json()["error"]["message"].startswith("the job is canceled")


async def test_a_refusal_of_clipia_is_passed_on(local: Site) -> None:
    """If Clipia refuses a job, each call is answered with Clipia's error and the job's id."""
    statuses = {"invalid_request": 400, "webhook_url_invalid": 400, "model_not_found": 404}
    for code, status in statuses.items():
        await local.switch(refuse_submits=code)
        first, again = await local.submit(code), await local.submit(code)
        assert problem(first) == (status, "invalid_request_error", code)
        assert first.json()["error"]["message"] == "Ordered by the switch refuse_submits."
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        job = (await local.alice.get(f"/v1/jobs/{first.json()['job_id']}")).json()
        assert (job["state"], job["charged"], job["error"]["code"]) == ("failed", 0, code)
    assert len(await local.sent()) == len(statuses)


async def test_an_invalid_job_is_not_made(local: Site) -> None:
    """Unknown models, invalid inputs, and prices above max_cost are rejected without a job."""
    refused = [
        (await local.submit(model="no-such-model"), (404, "invalid_request_error", "model_not_found")),
        (await local.submit(input={}), (400, "invalid_request_error", "model_input_invalid")),
        (await local.submit(input={"promt": "x"}), (400, "invalid_request_error", "model_input_invalid")),
        (await local.submit(max_cost=11), (402, "billing_error", "max_cost_exceeded")),
    ]
    for response, expected in refused:
        assert problem(response) == expected
        assert "job_id" not in response.json()
    assert await local.rows() == []
    assert await local.sent() == []
    assert (await local.submit(max_cost=12)).status_code == 201


async def test_a_budget_limits_a_caller(sqlite: tuple[Database, str, Path]) -> None:
    """F12: a job beyond the caller's budget of the day is 402 and not stored; other callers are free."""
    async with make_site(*sqlite, options=SLOW, worker=False, budgets="alice:24,*:12") as site:
        assert [(await site.submit()).status_code for _ in range(2)] == [201, 201]
        assert problem(await site.submit("k")) == (402, "billing_error", "budget_exceeded")
        assert (await post_job(site.bob)).status_code == 201
        assert problem(await post_job(site.bob)) == (402, "billing_error", "budget_exceeded")
        assert len(await site.rows()) == len(await site.generations()) == 3


@pytest.mark.parametrize("setting", [{"max_cost": 100}, {}])
async def test_an_unavailable_price_is_503(
    sqlite: tuple[Database, str, Path], setting: dict[str, Any]
) -> None:
    """F12: if a price is needed and Clipia is unavailable, the answer is 503, without a job."""
    clipia = f"http://127.0.0.1:{free_port()}"
    budgets = "" if setting else "alice:100"
    async with make_site(*sqlite, clipia=clipia, worker=False, budgets=budgets) as site:
        response = await site.submit("k", **setting)
        assert problem(response) == (503, "api_error", "unreachable")
        assert int(response.headers["retry-after"]) > 0
        assert await site.rows() == []


# Reading requests


BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": json.dumps(JOB).encode("utf-16"),
    "no UTF-8": b'{"model":"\xff","input":{}}',
    "a list": b"[]",
    "null": b"null",
    "an unknown field": b'{"model":"m","input":{},"inputs":{}}',
    "no model": b'{"input":{}}',
    "an empty model": b'{"model":"","input":{}}',
    "a model that is a number": b'{"model":1,"input":{}}',
    "a model with NUL": b'{"model":"m\\u0000","input":{}}',
    "a model with a line end": b'{"model":"m\\n","input":{}}',
    "a model that is too long": b'{"model":"%s","input":{}}' % (b"m" * 256),
    "no input": b'{"model":"m"}',
    "an input that is a list": b'{"model":"m","input":[]}',
    "an input that is null": b'{"model":"m","input":null}',
    "NaN": b'{"model":"nano-banana-2","input":{"prompt":"x","num_images":NaN}}',
    "Infinity": b'{"model":"nano-banana-2","input":{"prompt":"x","num_images":-Infinity}}',
    "a number beyond all bounds": b'{"model":"nano-banana-2","input":{"prompt":"x","num_images":1e999}}',
    "thousands of digits": b'{"model":"nano-banana-2","input":{"prompt":"x","num_images":%s}}'
    % (b"9" * 5000),
    "a lone surrogate": b'{"model":"nano-banana-2","input":{"prompt":"\\ud800"}}',
    "a lone surrogate in a key": b'{"model":"nano-banana-2","input":{"prompt":"x","\\udfff":1}}',
    "a surrogate in UTF-8": b'{"model":"nano-banana-2","input":{"prompt":"\xed\xa0\x80"}}',
    "a surrogate in an unknown field": b'{"model":"m","input":{},"\\ud800":1}',
    "a surrogate in metadata": b'{"model":"m","input":{},"metadata":{"\\ud800":"a"}}',
    "an endless unknown field": b'{"model":"m","input":{},"%s":1}' % (b"k" * 100_000),
    "nesting without end": b'{"model":"m","input":{"a":%s' % (b"[" * 100_000),
    "deep nesting": b'{"model":"nano-banana-2","input":{"prompt":%s1%s}}' % (b"[" * 900, b"]" * 900),
    "metadata that is a list": b'{"model":"m","input":{},"metadata":[]}',
    "metadata that is null": b'{"model":"m","input":{},"metadata":null}',
    "a number in metadata": b'{"model":"m","input":{},"metadata":{"a":1}}',
    "NUL in metadata": b'{"model":"m","input":{},"metadata":{"a":"\\u0000"}}',
    "NUL in a key of metadata": b'{"model":"m","input":{},"metadata":{"\\u0000":"a"}}',
    "an empty key of metadata": b'{"model":"m","input":{},"metadata":{"":"a"}}',
    "a long key of metadata": b'{"model":"m","input":{},"metadata":{"%s":"a"}}' % (b"k" * 65),
    "a long value of metadata": b'{"model":"m","input":{},"metadata":{"a":"%s"}}' % (b"v" * 513),
    "too much metadata": json.dumps(JOB | {"metadata": {str(n): "" for n in range(33)}}).encode(),
    "a negative max_cost": b'{"model":"m","input":{},"max_cost":-1}',
    "true for max_cost": b'{"model":"m","input":{},"max_cost":true}',
    "a text for max_cost": b'{"model":"m","input":{},"max_cost":"1"}',
    "a huge max_cost": b'{"model":"m","input":{},"max_cost":9007199254740992}',
    "a negative wait": b'{"model":"m","input":{},"wait":-1}',
    "a wait that is too long": b'{"model":"m","input":{},"wait":301}',
    "a wait beyond all bounds": b'{"model":"m","input":{},"wait":%s}' % (b"9" * 400),
    "true for a wait": b'{"model":"m","input":{},"wait":true}',
    "null for a wait": b'{"model":"m","input":{},"wait":null}',
    "a word for a wait": b'{"model":"m","input":{},"wait":"soon"}',
}


async def test_bad_bodies_are_400(local: Site) -> None:
    """If a body is not a job, it is 400 in Clipia's format; no job is made and no request is sent."""
    for name, content in BAD_BODIES.items():
        response = await local.alice.post("/v1/jobs", content=content, headers={"Idempotency-Key": "k"})
        assert response.status_code == 400, (name, response.text)
        assert problem(response)[2] in ("invalid_request", "model_input_invalid"), name
        assert 0 < len(response.json()["error"]["message"]) < 1000, name
    assert await local.rows() == []
    assert await local.sent() == []


async def test_bad_bodies_are_400_while_clipia_is_away(sqlite: tuple[Database, str, Path]) -> None:
    """Even if Clipia's schema is unknown, a body that could not be sent or shown is rejected."""
    async with make_site(*sqlite, clipia=f"http://127.0.0.1:{free_port()}", worker=False) as site:
        await site.submit("k")
        for name, content in BAD_BODIES.items():
            for headers in ({}, {"Idempotency-Key": "k"}):
                response = await site.alice.post("/v1/jobs", content=content, headers=headers)
                assert response.status_code == 400, (name, response.text)


async def test_bad_keys_are_400(local: Site) -> None:
    """If a key cannot be stored or shown unchanged, it is rejected, and so are two keys."""
    for keys in ([b""], [b"k" * 256], [b"a\tb"], [b"\x80"], [b"\xa0"], ["\ufeff".encode()], [b"a", b"a"]):
        headers = [(b"Idempotency-Key", key) for key in keys]
        response = await local.alice.post("/v1/jobs", json=JOB, headers=headers)
        assert problem(response) == (400, "invalid_request_error", "invalid_request"), keys
    assert await local.rows() == []


async def test_a_key_comes_back_as_it_was_given(idle: Site) -> None:
    """Up to 255 printable characters are a key, in UTF-8 or else in Latin-1."""
    texts = {
        key.encode(): key for key in ("k" * 255, "a b, c", "'; DROP TABLE jobs; --", "日本 😀", "é" * 255)
    }
    texts[b"\xe9\xff"] = "éÿ"
    for key, text in texts.items():
        headers = [(b"Idempotency-Key", key)]
        responses = [await idle.alice.post("/v1/jobs", json=JOB, headers=headers) for _ in range(2)]
        assert [response.status_code for response in responses] == [201, 200]
        assert dict(responses[0].headers.raw)[b"idempotency-key"] == key
        assert responses[0].json()["idempotency_key"] == text


async def test_every_answer_names_the_key(sqlite: tuple[Database, str, Path], tmp_path: Path) -> None:
    """Even an error and a 503 have the generated key, so that the call can be repeated."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database " * 100)
    async with make_site(sqlite[0], f"sqlite:///{broken}", sqlite[2], worker=False) as site:
        away = await site.submit()
        made = away.headers["idempotency-key"]
        assert (away.status_code, uuid.UUID(made).version) == (503, 7)
        assert (await site.submit("mine")).headers["idempotency-key"] == "mine"
    async with make_site(*sqlite, options=SLOW, worker=False) as site:
        refused = await site.alice.post("/v1/jobs", content=b"{")
        assert (refused.status_code, uuid.UUID(refused.headers["idempotency-key"]).version) == (400, 7)
        again = await site.submit(made)
        assert (again.status_code, again.json()["idempotency_key"]) == (201, made)


async def test_a_body_that_is_too_large_is_413(local: Site) -> None:
    """A request beyond the limit is 413 in Clipia's format, with or without a declared length."""
    content = json.dumps({"model": MODEL, "input": {"prompt": "x" * (2 * MAX_REQUEST_BYTES)}}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]

    for path in ("/v1/jobs", f"/v1/models/{MODEL}/estimate"):
        for body in (content, chunks()):
            response = await local.alice.post(path, content=body)
            assert problem(response)[:2] == (413, "invalid_request_error")
    assert await local.rows() == []


async def test_an_input_that_is_too_large_is_413(local: Site) -> None:
    """If only the request for Clipia exceeds the limit, it is 413 too, and no job is made."""
    given = {"prompt": "x", "image_url": "x" * (MAX_REQUEST_BYTES - 20)}
    assert problem(await local.submit(input=given)) == (413, "invalid_request_error", "invalid_request")
    assert await local.rows() == []
    fits = {"prompt": "x", "image_url": "x" * (MAX_REQUEST_BYTES - 200)}
    assert (await local.submit(input=fits)).status_code == 201


ODD = "a\x00\x01\x1b\x7f\x85\u2028\u202e\ufeff\uffff\U0001f600é'\"\\%_"


async def test_stored_jobs_can_be_read(idle: Site) -> None:
    """Odd characters in an input and in metadata are returned unchanged by all endpoints."""
    metadata = {'a"b': "1", "a\\b": "2", "é": ODD[1:].replace("\x00", ""), "😀": "", " ": "\n\t"}
    given = {"prompt": ODD, "num_images": 4, "aspect_ratio": "16:9"}
    response = await idle.submit("k", input=given, metadata=metadata)
    assert response.status_code == 201
    shown = (await idle.alice.get(response.headers["location"])).json()
    (listed,) = (await idle.alice.get("/v1/jobs")).json()["data"]
    for job in (
        response.json(),
        shown,
        listed,
        (await idle.submit("k", input=given, metadata=metadata)).json(),
    ):
        assert (job["input"], job["metadata"]) == (given, metadata)
    (sent,) = await idle.sent()
    assert json.loads(sent["body"])["input"] == given


async def test_a_nested_input_is_readable_or_refused(sqlite: tuple[Database, str, Path]) -> None:
    """If a job is accepted, it can be shown and listed, even if its input is deep."""
    async with make_site(*sqlite, clipia=f"http://127.0.0.1:{free_port()}", worker=False) as site:
        await site.submit("known")
        for depth in (1, 100, 127, 128, 129, 250, 251, 252, 253, 254, 900):
            nested: Any = 1
            for _ in range(depth):
                nested = [nested]
            response = await site.submit(input={"prompt": nested})
            assert response.status_code in ((202,) if depth <= 100 else (202, 400)), depth
            for path in ("/v1/jobs", response.headers.get("location", "/v1/jobs")):
                assert (await site.alice.get(path)).status_code == 200, depth
            # A call with a known key takes another path, and so does an estimate.
            assert (await site.submit("known", input={"prompt": nested})).status_code in (400, 409), depth
            given = {"input": {"prompt": nested}}
            estimate = await site.alice.post(f"/v1/models/{MODEL}/estimate", json=given)
            assert estimate.status_code in (400, 503), depth


async def test_a_number_is_never_changed(sqlite: tuple[Database, str, Path]) -> None:
    """If a JSON library would round an integer, the job is rejected, and not sent changed."""
    async with make_site(*sqlite, clipia=f"http://127.0.0.1:{free_port()}", worker=False) as site:
        for seed in (-(2**63), 0, 2**63, 2**64 - 1):
            assert (await site.submit(input={"prompt": "x", "seed": seed})).json()["input"]["seed"] == seed
        for seed in (2**64, -(2**63) - 1, 10**30):
            response = await site.submit(input={"prompt": "x", "seed": seed})
            assert problem(response) == (400, "invalid_request_error", "invalid_request")


async def test_a_model_s_name_is_not_a_path(local: Site) -> None:
    """A model's name is sent as one segment of a path, so that it cannot name another endpoint."""
    for model in ("../account", "../requests/x", "nano-banana-2?x=1", "a/b", "#", ".", ".."):
        assert problem(await local.submit(model=model)) in (
            (400, "invalid_request_error", "invalid_request"),
            (404, "invalid_request_error", "model_not_found"),
            (404, "invalid_request_error", "not_found"),
        ), model
    assert await local.rows() == []
    for path in ("%2e", "%2e%2e", "%2e%2e/estimate", "%2f", "%3f", "%23"):
        method = "POST" if path.endswith("estimate") else "GET"
        content = JOB if method == "POST" else None
        response = await local.alice.request(method, f"/v1/models/{path}", json=content)
        assert response.status_code in (400, 404), path


async def test_a_disconnect_is_not_an_error(local: Site, caplog: pytest.LogCaptureFixture) -> None:
    """If a connection ends in the middle of a body, there is no job and no traceback."""
    async with connection(local.url, "POST /v1/jobs", '{"model"', length=99):
        await until(lambda: requests_under_way(1))
    await until(lambda: requests_under_way(0))
    assert [record for record in caplog.records if record.exc_info] == []
    assert await local.rows() == []


async def test_an_answer_before_the_body_says_that_it_closes(local: Site) -> None:
    """If a request is rejected before its body was read, the answer closes the connection."""
    async with make_client(local.url, "nobody's token") as client:
        response = await client.post("/v1/jobs", json=JOB)
    assert (response.status_code, response.headers.get("connection")) == (401, "close")


async def test_a_body_that_is_too_slow_is_408(local: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a body does not arrive in time, there is an answer, and the connection is closed."""
    monkeypatch.setattr("receiver.api.endpoints.BODY_SECONDS", 0.1)
    async with connection(local.url, "POST /v1/jobs", '{"model"', length=99) as reader:
        async with asyncio.timeout(3):
            answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert await local.rows() == []


# Without a database, without a key


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_database_that_is_away_is_503(
    sqlite: tuple[Database, str, Path], tmp_path: Path, kind: str
) -> None:
    """C3: without its database, each endpoint that needs it is 503 with Retry-After, without details."""
    database, _, folder = sqlite
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database " * 100)
    url = f"sqlite:///{broken}" if kind == "sqlite" else f"postgresql://x@127.0.0.1:{free_port()}/x"
    async with make_site(database, url, folder, worker=False) as site:
        job = f"/v1/jobs/{uuid.uuid4()}"
        calls = [("GET", path) for path in ("/v1/jobs", "/v1/jobs/costs", job, f"{job}?wait=1", "/v1/models")]
        calls += [
            ("POST", f"{job}/resubmit"),
            ("POST", f"{job}/cancel"),
            ("GET", f"/v1/models/{MODEL}"),
            ("GET", "/v1/account"),
        ]
        responses = [await site.admin.request(method, path) for method, path in calls]
        responses += [await site.submit(), await site.submit("k")]
        responses.append(await site.alice.post(f"/v1/models/{MODEL}/estimate", json=JOB))
        for response in responses:
            assert problem(response) == (503, "api_error", "service_unavailable")
            assert int(response.headers["retry-after"]) > 0
            message = response.json()["error"]["message"]
            assert message.startswith("The database is unavailable; send it again")
            assert "Error" not in message
        assert await site.sent() == []


async def test_without_a_key_no_job_is_submitted(idle: Site, database_url: str, tmp_path: Path) -> None:
    """Without CLIPIA_KEY, endpoints that need Clipia are 503 and name the setting; others work."""
    job = (await idle.submit("k")).json()
    async with make_site(idle.database, database_url, tmp_path, worker=False, clipia_key=None) as site:
        responses = [
            await site.submit("new"),
            await site.alice.get("/v1/models"),
            await site.alice.get(f"/v1/models/{MODEL}"),
            await site.alice.post(f"/v1/models/{MODEL}/estimate", json=JOB),
            await site.admin.get("/v1/account"),
            await site.admin.post(f"/v1/jobs/{job['id']}/resubmit"),
        ]
        for response in responses:
            assert problem(response) == (503, "api_error", "not_configured")
            assert int(response.headers["retry-after"]) > 0
            assert "CLIPIA_KEY" in response.json()["error"]["message"]
        assert (await site.submit("k")).json() == job
        assert (await site.alice.get(f"/v1/jobs/{job['id']}")).json() == job
        assert [each["id"] for each in (await site.alice.get("/v1/jobs")).json()["data"]] == [job["id"]]


# Reading jobs


async def test_an_unknown_job_is_404(local: Site) -> None:
    """If an id is unknown or invalid, the answer is 404 and never a 500."""
    nobody = str(uuid.UUID(int=0))
    for key in ("x", nobody, "%00", "..%2f", "%ff", "-" * 36, "f" * 33, "costs%20", "1" * 5000):
        for method, path in (("GET", ""), ("GET", "?wait=1"), ("POST", "/resubmit"), ("POST", "/cancel")):
            response = await local.admin.request(method, f"/v1/jobs/{key}{path}")
            assert problem(response) == (404, "invalid_request_error", "not_found"), key


async def test_the_body_of_a_get_is_not_read(local: Site) -> None:
    """A GET is answered at once, even if it announces a body."""
    job = (await local.submit()).json()
    for path in ("/v1/jobs", f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}?wait=0.05", "/v1/models"):
        async with connection(local.url, f"GET {path}", "x", length=10**9) as reader:
            async with asyncio.timeout(5):
                answer = await reader.readline()
        assert answer == b"HTTP/1.1 200 OK\r\n", path


async def test_a_job_s_id_in_any_spelling(local: Site) -> None:
    """An id in upper case or without hyphens is the same id."""
    job = (await local.submit()).json()
    for spelling in (job["id"].upper(), job["id"].replace("-", "")):
        assert (await local.alice.get(f"/v1/jobs/{spelling}")).json() == job


async def test_lists_are_filtered(idle: Site) -> None:
    """Each filter finds exactly its jobs, newest first, and several filters are combined with and."""
    made = [
        (await idle.submit("1", metadata={"order": "1", "lang": "de"})).json(),
        (await idle.submit("2", metadata={"order": "2", "lang": "de"})).json(),
        (await idle.submit("3", model="suno-music", metadata={"order": "1"})).json(),
        (await post_job(idle.bob, "4", metadata={"order": "1"})).json(),
    ]
    ids = [job["id"] for job in made]
    days = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)]
    for job_id, day in zip(ids, days, strict=True):
        await idle.set(job_id, created_at=day)
    await idle.set(ids[1], state="completed")
    expected = {
        "": [4, 3, 2, 1],
        "state=submitted": [4, 3, 1],
        "state=completed": [2],
        "state=canceled": [],
        f"model={MODEL}": [4, 2, 1],
        "model=": [],
        "caller=alice": [3, 2, 1],
        "caller=bob": [4],
        "caller=nobody": [],
        "since=2026-01-02": [4, 3, 2],
        "since=2026-01-02T00:00:00Z&until=2026-01-04T00:00:00Z": [3, 2],
        "since=2026-01-02T01:00:00%2B01:00": [4, 3, 2],
        "until=2026-01-01T23:59:59.999999": [1],
        "metadata.order=1": [4, 3, 1],
        "metadata.order=1&metadata.lang=de": [1],
        "metadata.order=3": [],
        "metadata.nothing=": [],
        "limit=2": [4, 3],
        f"metadata.order=1&caller=alice&model={MODEL}&state=submitted&since=2026-01-01&limit=200": [1],
    }
    for query, numbers in expected.items():
        page = (await idle.admin.get(f"/v1/jobs?{query}")).json()
        assert [job["id"] for job in page["data"]] == [ids[number - 1] for number in numbers], query
    page = (await idle.admin.get("/v1/jobs")).json()
    assert page["next"] is None
    assert page["data"][-1].keys() == made[0].keys()


async def test_a_time_without_a_zone_is_utc(local: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter means the same in any time zone of the machine."""
    job_id = (await local.submit()).json()["id"]
    await local.set(job_id, created_at=datetime(2026, 1, 2, 12, tzinfo=UTC))
    try:
        with monkeypatch.context() as there:
            there.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            for path in ("/v1/jobs", "/v1/jobs/costs"):
                times = ("2026-01-02T11:59:59", "2026-01-02T12:00:01")
                found = [(await local.alice.get(f"{path}?since={each}")).json()["data"] for each in times]
                assert [len(rows) for rows in found] == [1, 0], path
    finally:
        time.tzset()


BAD_FILTERS = [
    *("foo=1", "metadata=1", "wait=1", "%00=1", "%ff=1", "State=pending", "limit=1&foo"),
    *("state=", "state=done", "state=Pending", "state=pending%00"),
    *("limit=0", "limit=201", "limit=", "limit=-1", "limit=1.0", "limit=%C2%B2", "limit=1000", "limit=+1"),
    *("cursor=", "cursor=x", "cursor=-1", "cursor=1.0", "cursor=%C2%B2", f"cursor={'9' * 19}"),
    *("since=", "since=yesterday", "since=2026-13-01", "until=1760000000000000", "until=%00"),
    # A time that exists in its zone but not in UTC.
    *("since=0001-01-01T00:00:00%2B14:00", "until=9999-12-31T23:59:59-14:00"),
]


async def test_bad_filters_are_400(idle: Site) -> None:
    """If a filter or its value is invalid, the answer is 400 and never an empty list."""
    for query in BAD_FILTERS:
        response = await idle.alice.get(f"/v1/jobs?{query}")
        assert response.status_code == 400, (query, response.text)
        assert problem(response) == (400, "invalid_request_error", "invalid_request"), query
    for query in (*(bad for bad in BAD_FILTERS if bad.startswith(("since", "until"))), "by=hour", "state=x"):
        response = await idle.alice.get(f"/v1/jobs/costs?{query}")
        assert response.status_code == 400, (query, response.text)


async def test_a_filter_with_any_characters_is_answered(idle: Site) -> None:
    """If no job can match a filter, the list is empty, and never a 503."""
    await idle.submit()
    for value in (
        "%00",
        "a%00b",
        "%ff",
        "%ED%A0%80",
        "'",
        "%22",
        "%5C",
        "$",
        "%25",
        "%F0%9F%98%80",
        "x" * 5000,
    ):
        for query in (f"model={value}", f"caller={value}", f"metadata.a={value}", f"metadata.{value}=a"):
            response = await idle.admin.get(f"/v1/jobs?{query}")
            assert response.status_code in (200, 400), (query, response.text)
            assert response.json().get("data", []) == []
    query = "&".join(f"metadata.{number}=" for number in range(1100))
    assert (await idle.admin.get(f"/v1/jobs?{query}")).status_code in (200, 400)


async def test_any_metadata_can_be_filtered_by(idle: Site) -> None:
    """For any name and value of metadata, the filter finds the job."""
    for name in ("a", "a.b", "a[0]", "$", "0", "a'b", "%", "a b", "[0]", 'a"b', "a\\b", "é", "😀"):
        value = f'ü "{name}" 😀'
        job = (await idle.submit(metadata={name: value, "other": "x"})).json()
        await idle.submit(metadata={"other": value})
        params = {f"metadata.{name}": value, "metadata.other": "x"}
        page = (await idle.alice.get("/v1/jobs", params=params)).json()
        assert [each["id"] for each in page["data"]] == [job["id"]], name


async def test_pages_show_each_job_once_while_others_arrive(idle: Site) -> None:
    """The cursor leads to each existing job exactly once, in order, even if jobs are added meanwhile."""
    there = [(await idle.submit()).json()["id"] for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    sizes = []
    for _ in range(20):
        page = (
            await idle.alice.get("/v1/jobs", params={"limit": 3} | ({"cursor": cursor} if cursor else {}))
        ).json()
        seen += [job["id"] for job in page["data"]]
        sizes.append(len(page["data"]))
        cursor = page["next"]
        if cursor is None:
            break
        await asyncio.gather(*(idle.submit() for _ in range(2)))
    assert seen == there[::-1]
    assert sizes == [3, 3, 1]


async def test_a_full_last_page_has_no_next(local: Site) -> None:
    """A cursor is returned only if there is another page."""
    for _ in range(2):
        await local.submit()
    page = (await local.alice.get("/v1/jobs?limit=2")).json()
    assert (len(page["data"]), page["next"]) == (2, None)


# Waiting


async def test_a_wait_returns_when_the_job_ends(site: Site) -> None:
    """A long poll, in the body or in the URL, returns the ended job with its finished files."""
    response = await site.submit("k", wait=SECONDS)
    assert (response.status_code, response.json()["state"]) == (201, "completed")
    assert {file["state"] for file in response.json()["event"]["media"]} == {"stored"}
    repeat = await site.submit("k", wait=SECONDS)
    assert (repeat.status_code, repeat.json()["state"]) == (200, "completed")
    job_id = (await site.submit()).json()["id"]
    job = (await site.alice.get(f"/v1/jobs/{job_id}?wait={SECONDS:.0f}")).json()
    assert (job["state"], job["event"]["state"]) == ("completed", "ready")


async def test_a_wait_that_is_over_returns_the_open_job(idle: Site) -> None:
    """If the time is over, the job is returned in its present state, without an error."""
    first = await idle.submit("k", wait=0.05)
    assert (first.status_code, first.json()["state"]) == (201, "submitted")
    repeat = await idle.submit("k", wait="0.05")
    assert (repeat.status_code, repeat.json()["id"]) == (200, first.json()["id"])
    shown = await idle.alice.get(f"/v1/jobs/{first.json()['id']}?wait=0.05")
    assert (shown.status_code, shown.json()["state"]) == (200, "submitted")


async def test_a_bad_wait_is_400(local: Site) -> None:
    """A wait must be a number of seconds up to the limit, even if the job does not exist."""
    for value in ("", "-1", "301", "nan", "inf", "1e9", "soon", "%00", "0x1"):
        response = await local.alice.get(f"/v1/jobs/{uuid.uuid4()}?wait={value}")
        assert problem(response) == (400, "invalid_request_error", "invalid_request"), value


async def test_a_hundred_waiters_delay_no_request(idle: Site) -> None:
    """Waiting callers hold no database connection: others are answered meanwhile, and all return."""
    job_id = (await idle.submit()).json()["id"]
    waiting = [asyncio.create_task(idle.alice.get(f"/v1/jobs/{job_id}?wait=60")) for _ in range(100)]
    assert len(waiting) > 5 * POOL_SIZE
    await until(lambda: requests_under_way(100))
    assert (await idle.bob.get("/v1/jobs")).status_code == 200
    assert (await idle.bob.get("/readyz")).status_code == 200
    assert (await post_job(idle.bob)).status_code == 201
    assert not any(task.done() for task in waiting)
    await idle.set(job_id, state="canceled", updated_at=db_time(0.0))
    responses = await asyncio.gather(*waiting)
    assert {response.status_code for response in responses} == {200}
    assert {response.json()["state"] for response in responses} == {"canceled"}


async def test_a_disconnected_waiter_is_removed(idle: Site) -> None:
    """If a client disconnects, its wait ends: its job is no longer polled, here or at Clipia."""
    job_id = (await idle.submit()).json()["id"]
    async with connection(idle.url, f"GET /v1/jobs/{job_id}?wait=60"):
        await until(lambda: requests_under_way(1))
        await until(lambda: looking(wanted=True))
    await until(lambda: requests_under_way(0), seconds=5)
    await until(lambda: looking(wanted=False), seconds=5)
    (row,) = await idle.rows()
    assert row["state"] == "submitted"


async def test_a_submitter_that_disconnects_leaves_its_job(idle: Site) -> None:
    """If a client disconnects during the wait of its POST, it still has its job, and the wait ends."""
    content = json.dumps(JOB | {"wait": 60})
    async with connection(idle.url, "POST /v1/jobs", content, length=len(content)):
        await until(lambda: looking(wanted=True))
    await until(lambda: requests_under_way(0), seconds=5)
    (row,) = await idle.rows()
    assert (row["state"], len(await idle.generations())) == ("submitted", 1)


async def test_a_database_that_fails_ends_no_wait(
    postgres: Postgres, sqlite: tuple[Database, str, Path]
) -> None:
    """C3: if a query for waiting jobs fails, it is repeated; the caller does not notice."""
    url = postgres.url(template="migrated")
    name = url.rpartition("/")[2]
    async with make_site(sqlite[0], url, sqlite[2], options=SLOW, worker=False) as site:
        job_id = (await site.submit()).json()["id"]
        waiting = asyncio.create_task(site.alice.get(f"/v1/jobs/{job_id}?wait=60"))
        await until(lambda: looking(wanted=True))
        with capture_logs() as logs:
            # If only the session were ended, it would be replaced unnoticed.
            postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            await until(lambda: logged(logs, "waiting jobs not polled"))
            postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        postgres.sql("UPDATE jobs SET state = 'canceled'", database=name)
        response = await waiting
        assert (response.status_code, response.json()["state"]) == (200, "canceled")


# Costs, models, prices, the account


async def test_costs_are_summed_up(idle: Site) -> None:
    """Each credit is reserved, charged or refunded; by caller, model and UTC day, in the given time."""
    made = [
        (await idle.submit()).json()["id"],
        (await idle.submit(model="suno-music")).json()["id"],
        (await post_job(idle.bob)).json()["id"],
    ]
    await idle.set(
        made[0], state="completed", charged=12, created_at=datetime(2026, 1, 1, 23, 59, tzinfo=UTC)
    )
    await idle.set(made[1], state="failed", charged=0, created_at=datetime(2026, 1, 2, tzinfo=UTC))
    await idle.set(made[2], created_at=datetime(2026, 1, 2, 12, tzinfo=UTC))

    async def costs(query: str, client: httpx.AsyncClient = idle.admin) -> list[list[Any]]:
        rows = (await client.get(f"/v1/jobs/costs?{query}")).json()["data"]
        assert all(list(row)[1:] == ["jobs", "reserved", "charged", "refunded"] for row in rows)
        return [list(row.values()) for row in rows]

    assert await costs("by=caller") == [["alice", 2, 0, 12, 30], ["bob", 1, 12, 0, 0]]
    assert await costs("by=model") == [[MODEL, 2, 12, 12, 0], ["suno-music", 1, 0, 0, 30]]
    by_day = [["2026-01-01", 1, 0, 12, 0], ["2026-01-02", 2, 12, 0, 30]]
    assert await costs("by=day") == await costs("") == by_day
    assert await costs("since=2026-01-02") == by_day[1:]
    assert await costs("by=day&until=2026-01-02T01:00:00%2B01:00") == by_day[:1]
    assert await costs("by=caller", idle.bob) == [["bob", 1, 12, 0, 0]]
    assert await costs("by=day", idle.bob) == [["2026-01-02", 1, 12, 0, 0]]
    assert await costs("since=2027-01-01") == []


async def test_test_keys_are_free(sqlite: tuple[Database, str, Path]) -> None:
    """Jobs of a sandbox key are counted and add no credits."""
    async with make_site(*sqlite, clipia_key="clipia_test_x") as site:
        job = await site.ended((await site.submit()).json()["id"])
        assert (job["state"], job["cost"], job["charged"]) == ("completed", 12, 0)
        (row,) = (await site.alice.get("/v1/jobs/costs?by=caller")).json()["data"]
        assert row == {"caller": "alice", "jobs": 1, "reserved": 0, "charged": 0, "refunded": 0}


async def test_models_and_prices_come_through_our_key(local: Site) -> None:
    """The catalogue, one model with its schema, and the price of an input; no job is queued for it."""
    models = (await local.alice.get("/v1/models")).json()["data"]
    assert MODEL in [model.get("slug") for model in models]
    model = (await local.alice.get(f"/v1/models/{MODEL}")).json()
    assert (model["slug"], model["pricing"]["credits"]) == (MODEL, 12)
    assert "prompt" in model["input_schema"]
    given = {"input": {"prompt": "x", "num_images": 3}}
    estimate = await local.alice.post(f"/v1/models/{MODEL}/estimate", json=given)
    assert (estimate.status_code, estimate.json()["credits"]) == (200, 36)
    assert await local.sent() == []


async def test_unknown_models_and_bad_inputs_are_refused(local: Site) -> None:
    """An unknown model is 404; there is a price only if the input is valid."""
    unknown = [
        await local.alice.get("/v1/models/no-such-model"),
        await local.alice.get("/v1/models/%00"),
        await local.alice.post("/v1/models/no-such-model/estimate", json=JOB),
    ]
    assert {problem(response)[0] for response in unknown} == {404}
    for content in (b"{}", b"[]", b'{"input":1}', b'{"input":null}', b"{", b""):
        response = await local.alice.post(f"/v1/models/{MODEL}/estimate", content=content)
        assert problem(response) == (400, "invalid_request_error", "invalid_request"), content
    for given in ({}, {"prompt": 1}, {"prompt": "x", "num_images": 5}):
        response = await local.alice.post(f"/v1/models/{MODEL}/estimate", json={"input": given})
        assert problem(response) == (400, "invalid_request_error", "model_input_invalid")


async def test_a_model_that_is_known_outlives_clipia_s_absence(local: Site) -> None:
    """A model is requested once and cached; if it is not cached and Clipia is unavailable, it is 503."""
    await local.alice.get(f"/v1/models/{MODEL}")
    await local.switch(error_rate=1)
    assert (await local.alice.get(f"/v1/models/{MODEL}")).json()["slug"] == MODEL
    for path in ("/v1/models", "/v1/models/suno-music", "/v1/account"):
        response = await local.admin.get(path)
        assert problem(response)[:2] == (503, "api_error")
        assert int(response.headers["retry-after"]) > 0


async def test_clipia_s_limit_is_passed_on(local: Site) -> None:
    """F7: a 429 becomes 503 with Clipia's wait, and until then no request is sent."""
    await local.switch(throttle_rate=1, retry_after=30)
    first = await local.alice.get("/v1/models")
    assert problem(first) == (503, "api_error", "rate_limit_exceeded")
    assert first.headers["retry-after"] == "30"
    await local.switch(throttle_rate=0)
    second = await local.alice.get("/v1/models")
    assert problem(second) == (503, "api_error", "rate_limit_exceeded")
    assert 25 < int(second.headers["retry-after"]) <= 30


async def test_the_account_and_our_sums(local: Site) -> None:
    """F13: Clipia's balance, our own sums for the same time, and the learned limits."""
    await local.submit()
    account = (await local.admin.get("/v1/account")).json()
    assert account["balance"]["credits"] == FAST.credits - 12
    assert account["ledger_30d"] == {"jobs": 1, "reserved": 12, "charged": 0, "refunded": 0}
    assert account["limits"]["requests_per_minute"] == FAST.rate_limit
    assert account["limits"]["in_flight"] >= 1
    assert account["limits"]["paused"] is None


# Submitting again


async def test_a_job_without_a_result_can_be_submitted_again(idle: Site) -> None:
    """F4: an operator may order a new generation if a job ended without one; the record has the name."""
    for state in ("unsure", "failed", "canceled"):
        job = (await idle.submit(state)).json()
        await idle.set(job["id"], state=state, next_attempt_at=None)
        response = await idle.admin.post(f"/v1/jobs/{job['id']}/resubmit")
        assert response.status_code == 202
        assert (response.json()["id"], response.json()["state"]) == (job["id"], "pending")
        assert response.json()["request_id"] is None
        first, order = response.json()["attempts"]
        assert (first["outcome"], order["outcome"]) == ("succeeded", "resubmitted")
        assert order["error"]["message"].startswith("by admin")
        # For its caller it is the same job, and its key does not make another one.
        assert (await idle.submit(state)).json()["id"] == job["id"]
        await idle.set(job["id"], state="canceled")
    rows = await idle.rows()
    sent = {generation["idempotency_key"] for generation in await idle.generations()}
    assert len(rows) == len(sent) == 3
    assert not {str(row["provider_key"]) for row in rows} & sent


async def test_a_job_that_is_open_or_done_is_not_submitted_again(idle: Site) -> None:
    """F1: a second order, or one for a job that has or may get its result, is 409 and has no effect."""
    job = (await idle.submit("k")).json()
    for state in ("submitted", "pending", "completed"):
        await idle.set(job["id"], state=state)
        (before,) = await idle.rows()
        response = await idle.admin.post(f"/v1/jobs/{job['id']}/resubmit")
        assert problem(response) == (409, "invalid_request_error", "not_resubmittable")
        assert await idle.rows() == [before]


async def test_of_two_orders_to_submit_again_one_counts(idle: Site) -> None:
    """F1: if two operators order the same at once, there is one new generation."""
    job = (await idle.submit("k")).json()
    await idle.set(job["id"], state="unsure", next_attempt_at=None)
    orders = [idle.admin.post(f"/v1/jobs/{job['id']}/resubmit") for _ in range(8)]
    statuses = [response.status_code for response in await asyncio.gather(*orders)]
    assert sorted(statuses) == [202] + [409] * 7


# A Clipia with wrong answers


ODD_ANSWERS: dict[str, tuple[int, bytes]] = {
    "a refusal with a lone surrogate": (400, b'{"error":{"code":"bad","message":"\\ud800"}}'),
    "a code with a lone surrogate": (400, b'{"error":{"type":"\\ud800","code":"\\ud800","message":"x"}}'),
    "a refusal with NUL": (400, b'{"error":{"code":"bad","message":"\\u0000"}}'),
    "a refusal of megabytes": (
        400,
        b'{"error":{"type":"%s","code":"%s","message":"%s"}}' % ((b"x" * 500_000,) * 3),
    ),
    "a warning with a lone surrogate": (200, b'{"request_id":"r","status":"x","warnings":[{"m":"\\ud800"}]}'),
    "a warning with NUL": (200, b'{"request_id":"r","status":"x","warnings":[{"m":"\\u0000"}]}'),
    "a warning with a huge number": (
        200,
        b'{"request_id":"r","status":"x","warnings":[{"m":%s}]}' % (b"9" * 40),
    ),
    "a warning with NaN": (200, b'{"request_id":"r","status":"x","warnings":[{"m":NaN}]}'),
    "a deep warning": (
        200,
        b'{"request_id":"r","status":"x","warnings":[{"m":%s%s}]}' % (b"[" * 300, b"]" * 300),
    ),
    "warnings of another kind": (200, b'{"request_id":"r","status":"x","warnings":"x"}'),
    "a long request_id": (200, b'{"request_id":"%s","status":"x"}' % (b"r" * 200)),
    "a request_id with NUL": (200, b'{"request_id":"\\u0000","status":"x"}'),
    "a request_id with a lone surrogate": (200, b'{"request_id":"\\ud800","status":"x"}'),
    "a huge cost": (200, b'{"request_id":"r","status":"x","cost":%s}' % (b"9" * 40)),
    "no JSON": (200, b"<html>"),
    "nesting without end": (200, b"[" * 100_000),
    "an error that is none": (500, b"[" * 100_000),
}


async def test_no_answer_of_clipia_s_makes_a_job_unreadable(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: for any answer to a submission, the caller gets a job or an error, and can read it."""
    monkeypatch.setattr("receiver.submitter.service.ANSWER_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("receiver.submitter.service.CALL_TIMEOUT_SECONDS", 0.1)
    unreadable: dict[str, Any] = {}
    clipia = OddClipia(to="POST")
    async with (
        clipia.running() as url,
        make_site(database, database_url, tmp_path, clipia=url, worker=False) as site,
    ):
        for name, clipia.answer in ODD_ANSWERS.items():
            responses = [await site.submit(name), await site.submit(name), await site.alice.get("/v1/jobs")]
            statuses = [response.status_code for response in responses]
            (row,) = await site.rows()
            if (
                not set(statuses) <= {200, 201, 202, 400}
                or any(len(response.content) > 10_000 for response in responses)
                # The answer is recorded in any case: the lease is released at once.
                or row["lease"] is not None
            ):
                unreadable[name] = statuses, row["lease"]
            async with database.write() as connection_:
                await connection_.execute(delete(jobs))
    assert unreadable == {}
    assert clipia.asked["POST"] == len(ODD_ANSWERS)


ODD_CATALOGUES: dict[str, tuple[int, bytes]] = {
    "a lone surrogate": (200, b'{"data":[{"slug":"\\ud800"}],"credits":1,"x":"\\ud800"}'),
    "a huge number": (200, b'{"data":[{"x":%s}],"credits":1,"x":%s}' % (b"9" * 40, b"9" * 40)),
    "deep nesting": (200, b'{"data":[{"x":1}],"credits":1,"x":%s%s}' % (b"[" * 300, b"]" * 300)),
    "nesting without end": (200, b"[" * 100_000),
    "no JSON": (200, b"<html>"),
    "a list": (200, b"[1]"),
    "null": (200, b"null"),
    "a refusal with a lone surrogate": (404, b'{"error":{"code":"not_found","message":"\\ud800"}}'),
    "an error with a lone surrogate": (500, b'{"error":{"code":"\\ud800","message":"\\ud800"}}'),
}


async def test_no_answer_of_clipia_s_is_an_error_of_ours(sqlite: tuple[Database, str, Path]) -> None:
    """For any answer about models and the account, it is passed on, rejected or 503, in readable JSON."""
    wrong: dict[str, Any] = {}
    clipia = OddClipia()
    async with clipia.running() as url, make_site(*sqlite, clipia=url, worker=False) as site:
        for number, (name, clipia.answer) in enumerate(ODD_CATALOGUES.items()):
            for path in (
                "/v1/models",
                f"/v1/models/{number}",
                "/v1/account",
                f"/v1/models/{number}/estimate",
            ):
                method = "POST" if path.endswith("estimate") else "GET"
                response = await site.admin.request(method, path, json=JOB if method == "POST" else None)
                if response.status_code not in (200, 404, 503):
                    wrong[name] = path, response.status_code
    assert wrong == {}


# Helpers


def make_client(url: str, token: str | None = None) -> httpx.AsyncClient:
    """Return a client that sends a token and opens any number of connections."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30, verify=False)


async def post_job(client: httpx.AsyncClient, key: str | None = None, **changes: Any) -> httpx.Response:
    """Submit a job."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return await client.post("/v1/jobs", json=JOB | changes, headers=headers)


def problem(response: httpx.Response) -> tuple[int, str, str]:
    """Return an error's status, type and code; it must have Clipia's format."""
    assert response.headers["content-type"] == "application/json", response.text
    error = response.json()["error"]
    assert error.keys() == {"type", "code", "message"}
    return response.status_code, error["type"], error["code"]


async def until(check: Callable[[], Awaitable[T | None]], *, seconds: float = SECONDS) -> T:
    """Repeat until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := await check():
            return answer
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)


async def found(site: Site, job_id: str, state: str) -> dict[str, Any] | None:
    """Return a job if it is in this state."""
    job: dict[str, Any] = (await site.admin.get(f"/v1/jobs/{job_id}")).json()
    return job if job["state"] == state else None


async def requests_under_way(number: int) -> bool:
    """Tell whether this many requests are being answered in this process."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return names.count("RequestResponseCycle.run_asgi") == number


async def looking(*, wanted: bool) -> bool:
    """Tell whether jobs are polled for waiting callers, or not."""
    return any(task.get_name() == "job waiting" for task in asyncio.all_tasks()) is wanted


async def logged(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    """Tell whether a record is in the logs."""
    return any(record["event"] == event for record in logs)


@asynccontextmanager
async def connection(
    url: str, line: str, content: str = "", *, length: int = 0
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request as Alice over a separate socket, and close that at the end of the block."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    headers = f"Host: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: {length}\r\n\r\n"
    writer.write(f"{line} HTTP/1.1\r\n{headers}{content}".encode())
    await writer.drain()
    yield reader
    writer.close()
    await writer.wait_closed()


class OddClipia:
    """A Clipia that gives one answer to all requests, or only to those with the method `to`."""

    def __init__(self, *, to: str | None = None) -> None:
        self.answer = (200, b"{}")
        self.asked: Counter[str] = Counter()
        self._to = to

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve it and return its URL."""
        async with running(
            Starlette(routes=[Route("/{path:path}", self._take, methods=["GET", "POST"])])
        ) as url:
            yield url

    async def _take(self, request: Request) -> Response:
        self.asked[request.method] += 1
        odd = self._to in (None, request.method)
        status, content = self.answer if odd else (200, b'{"slug": "nano-banana-2"}')
        headers = {"RateLimit-Limit": "6000", "RateLimit-Remaining": "6000", "RateLimit-Reset": "60"}
        return Response(content, status, headers, "application/json")
