"""Jobs from their caller to Clipia and back, on both databases: each is submitted once."""

import asyncio
import hashlib
import json
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy.exc import DBAPIError
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
    error_code,
    eventually,
    path_token,
    post,
    refusal,
    refused,
    show,
)
from support.payloads import body
from support.servers import Postgres, free_port

from receiver.api.answers import status_of
from receiver.clipia import catalogue
from receiver.clipia import client as client_module
from receiver.core.retry import KEY_VALID_SECONDS, SUBMIT_UNANSWERED
from receiver.db import job_events
from receiver.db.clock import db_time
from receiver.db.tables import accounts, attempts, jobs
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, RequestError, SettingsError
from receiver.sandbox.answers import CODES
from receiver.settings import Settings
from receiver.submitter import Job, Submitter, SyncSubmitter, service

pytestmark = pytest.mark.asyncio(loop_scope="module")

PUBLIC = "https://hooks.example.com"
HOUR = 3600.0


# --- keys ---


async def test_a_job_is_submitted(world: World, sandbox: Sandbox) -> None:
    """If Clipia accepts a job, all values of its answer are stored."""
    submitter = world.submitter()
    job = await submitter.submit(
        MODEL, PROMPT, idempotency_key="order-1", metadata={"order": "1"}, max_cost=20, caller="shop"
    )
    (generation,) = await sandbox.generations()
    assert (job.new, job.state, job.caller, job.idempotency_key) == (True, "submitted", "shop", "order-1")
    assert (job.model, job.input, job.metadata, job.max_cost) == (MODEL, PROMPT, {"order": "1"}, 20)
    assert (job.request_id, job.cost, job.charged) == (generation["request_id"], PRICE, None)
    assert (job.warnings, job.error, job.event, job.ended) == ([], None, None, False)
    assert job.submitted_at is not None
    assert [(each.number, each.outcome, each.error) for each in job.attempts] == [(1, "succeeded", None)]
    assert "new" not in job.as_dict()
    assert job.as_dict()["request_id"] == job.request_id


async def test_a_job_keeps_its_callers_trace(world: World) -> None:
    """The module stores a valid `traceparent` with its job, and ignores an invalid one."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    submitter = world.submitter()
    for key, given in (("valid", parent), ("invalid", parent.upper()), ("none", None)):
        await submitter.submit(MODEL, PROMPT, idempotency_key=key, traceparent=given, tracestate="a=1")
    # The first call with a key decides.
    await submitter.submit(MODEL, PROMPT, idempotency_key="none", traceparent=parent)
    rows = {row["idempotency_key"]: (row["traceparent"], row["tracestate"]) for row in await world.rows(jobs)}
    assert rows == {"valid": (parent, "a=1"), "invalid": (None, None), "none": (None, None)}


async def test_the_same_key_is_the_same_job(world: World, sandbox: Sandbox) -> None:
    """F8: a repeated call returns the existing job, even if its parameters have another order."""
    submitter = world.submitter()
    first = await submitter.submit(MODEL, {"prompt": "a", "num_images": 2}, idempotency_key="k")
    again = await submitter.submit(MODEL, {"num_images": 2, "prompt": "a"}, idempotency_key="k")
    other = await world.submitter().submit(MODEL, {"prompt": "a", "num_images": 2}, idempotency_key="k")
    assert first.new
    assert not again.new
    assert {first.id, again.id, other.id} == {first.id}
    assert again.request_id == first.request_id
    assert len(await sandbox.submits()) == 1


async def test_32_calls_with_one_key_are_one_job(world: World, sandbox: Sandbox) -> None:
    """F8: if many calls of many processes race, exactly one creates the job."""
    submitters = [world.submitter(), world.submitter()]
    made = await asyncio.gather(
        *(submitters[n % 2].submit(MODEL, PROMPT, idempotency_key="k") for n in range(32))
    )
    assert len({job.id for job in made}) == 1
    assert [job.new for job in made].count(True) == 1
    assert len(await world.rows(jobs)) == 1
    assert len(await sandbox.submits()) == 1
    assert len(await sandbox.generations()) == 1


async def test_racing_calls_with_other_bodies_get_one_job_and_refusals(
    world: World, sandbox: Sandbox
) -> None:
    """F8: the first caller owns its key, and another caller with the same key gets another job."""
    submitter = world.submitter()
    made = await asyncio.gather(
        *(submitter.submit(MODEL, {"prompt": f"cat {n}"}, idempotency_key="k") for n in range(8)),
        return_exceptions=True,
    )
    (job,) = [each for each in made if isinstance(each, Job)]
    errors = [each for each in made if isinstance(each, RequestError)]
    assert {(error.code, error.job_id) for error in errors} == {("idempotency_key_reuse", str(job.id))}
    assert len(errors) == 7
    assert [json.loads(each["body"])["input"] for each in await sandbox.submits()] == [job.input]


OTHERS: list[dict[str, Any]] = [
    {"model": "suno-music"},
    {"input": {"prompt": "a dog"}},
    {"metadata": {"order": "2"}},
    {"metadata": {}},
    {"max_cost": 13},
    {"max_cost": None},
]


async def test_a_key_stands_for_all_parameters(world: World, sandbox: Sandbox) -> None:
    """F8: if a key is used with other parameters, the call is rejected unsent, and names the job."""
    submitter = world.submitter()
    given: dict[str, Any] = {"model": MODEL, "input": PROMPT, "metadata": {"order": "1"}, "max_cost": 12}
    job = await submitter.submit(**given, idempotency_key="k")
    for other in OTHERS:
        error = await refusal(submitter.submit(**(given | other), idempotency_key="k"))
        assert (status_of(error), error.code, error.job_id) == (409, "idempotency_key_reuse", str(job.id))
    assert len(await sandbox.submits()) == len(await world.rows(jobs)) == 1


async def test_two_callers_may_use_the_same_key(world: World, sandbox: Sandbox) -> None:
    """F8: keys are separate for each caller, and Clipia sees none of them."""
    submitter = world.submitter()
    first = await submitter.submit(MODEL, PROMPT, idempotency_key="order-1", caller="shop")
    second = await submitter.submit(MODEL, PROMPT, idempotency_key="order-1", caller="blog")
    assert first.id != second.id
    assert first.request_id != second.request_id
    keys = {uuid.UUID(each["idempotency_key"]) for each in await sandbox.submits()}
    assert len(keys) == 2
    assert {key.version for key in keys} == {4}


async def test_without_a_key_each_call_is_a_job(world: World, sandbox: Sandbox) -> None:
    """If a call has no key, a random one is returned with the job and can be used to repeat the call."""
    submitter = world.submitter()
    first, second = [await submitter.submit(MODEL, PROMPT) for _ in range(2)]
    assert first.id != second.id
    assert len(await sandbox.generations()) == 2
    assert (await submitter.submit(MODEL, PROMPT, idempotency_key=first.idempotency_key)).id == first.id


async def test_a_key_that_cannot_be_kept_is_refused(world: World, sandbox: Sandbox) -> None:
    """F8: from 1 to 255 printable characters."""
    submitter = world.submitter()
    for key in ("", "k" * 256, "a\nb", "a\x00", "\u200b", "\ud800"):
        error = await refusal(submitter.submit(MODEL, PROMPT, idempotency_key=key))
        assert (status_of(error), error.code) == (400, "invalid_request")
        assert "from 1 to 255" in str(error)
    assert await sandbox.submits() == await world.rows(jobs) == []


async def test_a_key_may_be_any_text(world: World) -> None:
    """F8: a key of 255 characters of any script is stored unchanged."""
    key = "Bestellung №1 " + "ä" * 241
    job = await world.submitter().submit(MODEL, PROMPT, idempotency_key=key)
    assert len(key) == 255
    assert job.idempotency_key == key


# --- the bytes on the wire ---


async def test_every_attempt_sends_the_same_bytes(world: World, sandbox: Sandbox) -> None:
    """F1, F2: a retry sends the same bytes, even if another process with another public URL sends it."""
    await sandbox.switch(lost_answer_rate=1.0)
    given = {"prompt": "ein Kätzchen", "num_images": 1, "aspect_ratio": "1:1"}
    job = await world.submitter(public_url=PUBLIC).submit(MODEL, given, idempotency_key="order-1")
    assert job.state == "pending"
    second = world.submitter(public_url="https://moved.example.com")
    await world.retry(second)
    await sandbox.switch(lost_answer_rate=0.0)
    assert await world.retry(second) == 1

    row = await world.job()
    sent = await sandbox.submits()
    assert [each["status"] for each in sent] == [504, 504, 200]
    assert {each["body_sha256"] for each in sent} == {hashlib.sha256(row["request"]).hexdigest()}
    assert {each["idempotency_key"] for each in sent} == {str(row["provider_key"])}
    assert row["provider_key"].version == 4
    request = json.loads(row["request"])
    token = path_token(request["webhook_url"])
    assert request == {"input": given, "webhook_url": f"{PUBLIC}/clipia/webhook/clipia/{job.id}.{token}"}
    assert row["path_token"] == hashlib.sha256(token.encode()).hexdigest()
    (generation,) = await sandbox.generations()
    assert (row["state"], row["request_id"]) == ("submitted", generation["request_id"])


async def test_without_a_public_url_there_is_no_webhook(world: World) -> None:
    """If Clipia cannot reach a callback, the request has none."""
    job = await world.submitter().submit(MODEL, PROMPT)
    row = await world.job()
    assert json.loads(row["request"]) == {"input": PROMPT}
    assert row["has_webhook"] is False
    assert job.input == PROMPT


async def test_the_job_is_committed_before_the_first_attempt(odd_world: World, odd: OddClipia) -> None:
    """F1: when Clipia gets the request, key and bytes are already committed in the database."""
    found: list[dict[str, Any]] = []

    async def look(_request: Request) -> None:
        # With separate connections, which see only committed rows.
        async with World(odd_world.database_url, odd.url) as another:
            found.append(await another.job())

    odd.on_submit, odd.script = look, [accepted()]
    await odd_world.submitter(public_url=PUBLIC).submit(MODEL, PROMPT, idempotency_key="k")
    (post,) = odd.posts
    (row,) = found
    assert (row["request"], str(row["provider_key"])) == (post.body, post.headers["idempotency-key"])
    assert (row["state"], row["sent_at"] is not None, row["account"] is not None) == ("pending", True, True)


async def test_a_process_that_dies_before_the_answer_leaves_the_key(world: World, sandbox: Sandbox) -> None:
    """F1: if a process crashes, the next one sends the same request and gets the paid generation."""
    await sandbox.switch(latency=0.7)
    dying = world.submitter()
    task = asyncio.create_task(dying.submit(MODEL, PROMPT, idempotency_key="k"))
    await eventually(sandbox.generations)
    for running in [task, *dying._running]:
        running.cancel()
    await asyncio.wait([task, *dying._running])
    await sandbox.switch(latency=0.0)

    assert (await world.job())["state"] == "pending"
    another = world.submitter()

    async def submitted() -> bool:
        # Until the sandbox notices that the first client has gone, it answers `request_in_progress`.
        return await world.retry(another) == 1 and (await world.job())["state"] == "submitted"

    await eventually(submitted)
    (generation,) = await sandbox.generations()
    row = await world.job()
    assert (row["request_id"], row["lost"]) == (generation["request_id"], 0)
    assert len({each["idempotency_key"] for each in await sandbox.submits()}) == 1


async def test_a_caller_may_leave(odd_world: World, odd: OddClipia) -> None:
    """F1: if the caller is cancelled, the submission goes on, and `close` waits for it."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_request: Request) -> None:
        arrived.set()
        await go_on.wait()

    odd.on_submit, odd.script = hold, [accepted("r-1")]
    submitter = odd_world.submitter()
    caller = asyncio.create_task(submitter.submit(MODEL, PROMPT))
    await arrived.wait()
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert (await odd_world.job())["state"] == "pending"
    asyncio.get_running_loop().call_soon(go_on.set)
    await submitter.close()
    row = await odd_world.job()
    assert (row["state"], row["request_id"]) == ("submitted", "r-1")


async def test_a_caller_does_not_wait_for_ever(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: if the answer takes too long, the job is returned as pending, and its submission goes on."""
    monkeypatch.setattr(service, "ANSWER_TIMEOUT_SECONDS", 0.05)
    go_on = asyncio.Event()

    async def hold(_request: Request) -> None:
        await go_on.wait()

    odd.on_submit, odd.script = hold, [accepted("r-1")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.new, job.state, job.error) == (True, "pending", None)
    go_on.set()
    await submitter.close()
    assert (await odd_world.job())["state"] == "submitted"


# --- errors ---

PERMANENT = [
    (400, "invalid_request"),
    (400, "webhook_url_invalid"),
    (400, "model_input_invalid"),
    (422, "model_input_invalid"),
    (404, "not_found"),
    (404, "model_not_found"),
]


@pytest.mark.parametrize(("status", "code"), PERMANENT)
async def test_refused_jobs_fail(odd_world: World, odd: OddClipia, status: int, code: str) -> None:
    """If Clipia refuses a job, the caller gets Clipia's error on each call, and it costs no credits."""
    odd.script = [refused(status, code, "No such cats.")]
    submitter = odd_world.submitter()
    errors = [await refusal(submitter.submit(MODEL, PROMPT, idempotency_key="k")) for _ in range(2)]
    assert await odd_world.retry(submitter) == 0
    row = await odd_world.job()
    for error in errors:
        assert (status_of(error), error.code, error.type) == (status, code, "some_error")
        assert (str(error), error.job_id) == ("No such cats.", str(row["id"]))
    assert len(odd.posts) == 1
    assert (row["state"], row["charged"], row["request_id"]) == ("failed", 0, None)
    assert row["finished_at"] is not None
    (job,) = (await submitter.list_jobs()).jobs
    assert job.ended
    job = await show(submitter, job)
    said = {"type": "some_error", "code": code, "message": "No such cats.", "status": status}
    assert job.error == said
    assert [(each.outcome, each.error) for each in job.attempts] == [("failed", said)]


async def test_the_sandbox_refuses_likewise(world: World, sandbox: Sandbox) -> None:
    """Each documented refusal of a request ends the job, with its status."""
    submitter = world.submitter()
    codes = [code for code, (status, _type) in CODES.items() if status in (400, 404)]
    for code in codes:
        await sandbox.switch(refuse_submits=code)
        error = await refusal(submitter.submit(MODEL, PROMPT))
        assert (error.code, (status_of(error), error.type)) == (code, CODES[code])
    assert len(await sandbox.submits()) == len(codes) == 5
    assert [row["state"] for row in await world.rows(jobs)] == ["failed"] * 5


TROUBLE = {
    "in progress": (refused(409, "request_in_progress"), "request_in_progress"),
    "rate limit": (refused(429, "rate_limit_exceeded"), "rate_limit_exceeded"),
    "concurrency": (refused(429, "concurrency_limit_exceeded"), "concurrency_limit_exceeded"),
    "500": (refused(500, "internal_error"), "internal_error"),
    "502": (refused(502, "service_unavailable"), "service_unavailable"),
    "503": (refused(503, "service_unavailable"), "service_unavailable"),
    "504": (refused(504, "service_unavailable"), "service_unavailable"),
    "a proxy's 502": (answer(502, b"<html>"), "http_502"),
    "a proxy's 404": (answer(404, b"<html>"), "http_404"),
    "no answer": (b"", "no_answer"),
    "half an answer": (accepted("r-1")[:-10], "no_answer"),
    "no JSON": (answer(content=b"OK"), "unreadable"),
    "no request_id": (answer(content={"status": "IN_QUEUE"}), "unreadable"),
    "a number for an id": (answer(content={"request_id": 7, "status": "IN_QUEUE"}), "unreadable"),
    "endless nesting": (answer(content=b"[" * 100_000), "unreadable"),
    "an endless id": (accepted("r" * 300), "unreadable"),
}


NEVER_ARRIVED = ("rate_limit_exceeded", "concurrency_limit_exceeded")


@pytest.mark.parametrize("name", TROUBLE)
async def test_temporary_failures_are_retried(odd_world: World, odd: OddClipia, name: str) -> None:
    """F3, F4, F5, F7: the job stays pending, attempts are equal, and the first sent one is recorded."""
    trouble, code = TROUBLE[name]
    odd.script = [trouble, trouble, accepted("r-1", warnings=[{"code": "unknown_parameter"}])]
    submitter = odd_world.submitter(public_url=PUBLIC)
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (job.state, error_code(job), job.request_id) == ("pending", code, None)
    assert job.next_attempt_at is not None
    first_sent_at = (await odd_world.job())["sent_at"]
    assert (first_sent_at is None) is (code in NEVER_ARRIVED)
    assert await odd_world.retry(submitter) == 1
    assert (await odd_world.job())["sent_at"] == first_sent_at
    assert (await submitter.submit(MODEL, PROMPT, idempotency_key="k")).state == "pending"
    assert await odd_world.retry(submitter) == 1
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.cost, done.error) == ("submitted", "r-1", PRICE, None)
    assert done.warnings == [{"code": "unknown_parameter"}]
    assert [each.outcome for each in done.attempts] == ["retry", "retry", "succeeded"]
    assert [each.number for each in done.attempts] == [1, 2, 3]
    assert len(odd.posts) == 3
    assert len({(post.headers["idempotency-key"], post.body) for post in odd.posts}) == 1


async def test_unexpected_errors_are_retried(odd_world: World, odd: OddClipia) -> None:
    """F5: an internal error in an attempt, here a closed connection pool, ends no job."""
    odd.script = [refused(503, "service_unavailable"), accepted("r-1")]
    closing = odd_world.submitter()
    await closing.submit(MODEL, PROMPT)
    await closing.client.close()
    assert await odd_world.retry(closing) == 1
    row = await odd_world.job()
    assert (row["state"], json.loads(row["error"])["code"]) == ("pending", "internal_error")
    assert await odd_world.retry(odd_world.submitter()) == 1
    assert (await odd_world.job())["request_id"] == "r-1"
    assert len({post.headers["idempotency-key"] for post in odd.posts}) == 1


async def test_an_answer_that_does_not_come_is_tried_again(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: a timeout is an unknown outcome."""
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_SECONDS", 0.2)
    hanging = [asyncio.Event()]

    async def hang_once(_request: Request) -> None:
        if hanging:
            await hanging.pop().wait()

    odd.on_submit, odd.script = hang_once, [accepted("r-1")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, error_code(job)) == ("pending", "no_answer")
    assert (await odd_world.job())["sent_at"] is not None
    await odd_world.retry(submitter)
    assert (await odd_world.job())["request_id"] == "r-1"
    assert len({post.headers["idempotency-key"] for post in odd.posts}) == 1


async def test_a_lost_answer_is_found_again(world: World, sandbox: Sandbox) -> None:
    """F5: if the answer was lost, the retry gets the same generation, which is paid for once."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, error_code(job)) == ("pending", "service_unavailable")
    await sandbox.switch(lost_answer_rate=0.0)
    await world.retry(submitter)
    (generation,) = await sandbox.generations()
    row = await world.job()
    assert (row["state"], row["request_id"], row["cost"]) == ("submitted", generation["request_id"], PRICE)
    assert generation["submits"] == 2


async def test_a_webhook_spares_the_retry(
    world: World, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5, C10: if no answer comes for a while, the event on its path ends the job; no retry is sent."""
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    await sandbox.switch(lost_answer_rate=1.0, duration=0.0, webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    (generation,) = await sandbox.generations()
    assert await sandbox.send_webhook(generation["request_id"]) == 200
    await world.forward()
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.cost) == ("completed", generation["request_id"], PRICE)
    assert await world.retry(submitter) == 0
    assert len(await sandbox.submits()) == 1


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
@pytest.mark.parametrize("code", ["rate_limit_exceeded", "concurrency_limit_exceeded"])
async def test_retry_after_holds_the_account_back(
    world: World, sandbox: Sandbox, code: str, *, as_date: bool
) -> None:
    """F7: neither the job nor any other one is sent before Clipia's time."""
    await sandbox.switch(refuse_submits=code, retry_after=400, retry_after_date=as_date)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    assert 300 < await world.retry_delay() <= 401
    (account,) = await world.rows(accounts)
    held = account["calls_after" if code == "rate_limit_exceeded" else "submits_after"]
    assert 300 < held - time.time() <= 401
    await sandbox.switch(refuse_submits="")
    other = await submitter.submit(MODEL, PROMPT)
    assert other.state == "pending"
    await world.set(jobs, next_attempt_at=db_time(-1.0))
    assert await world.run_lane(submitter.lane) == 0
    assert len(await sandbox.submits()) == 1
    await world.make_due()
    assert await world.run_lane(submitter.lane) >= 1
    assert len(await sandbox.generations()) >= 1


async def test_refused_places_make_the_window_smaller(world: World, sandbox: Sandbox) -> None:
    """F7: Clipia's in-flight limit is found and kept: the other jobs wait here."""
    await sandbox.switch(concurrency_limit=2)
    submitter = world.submitter()
    for _ in range(4):
        await submitter.submit(MODEL, PROMPT)
    assert [each["status"] for each in await sandbox.submits()] == [200, 200, 429]
    assert await world.retry(submitter) == 1
    assert await world.retry(submitter) == 0
    assert [each["status"] for each in await sandbox.submits()] == [200, 200, 429, 429]
    (account,) = await world.rows(accounts)
    assert account["in_flight_limit"] == 2


async def test_a_key_that_clipia_knows_otherwise_is_never_changed(odd_world: World, odd: OddClipia) -> None:
    """F2: after `idempotency_key_reuse` a new key could pay twice; an operator has to check."""
    odd.script = [refused(409, "idempotency_key_reuse", "Used with other parameters."), accepted()]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (job.state, error_code(job), job.charged) == ("unsure", "idempotency_key_reuse", None)
    for _ in range(3):
        assert await odd_world.retry(submitter) == 0
        assert (await submitter.submit(MODEL, PROMPT, idempotency_key="k")).state == "unsure"
    assert len(odd.posts) == 1
    assert str((await odd_world.job())["provider_key"]) == odd.posts[0].headers["idempotency-key"]


async def test_a_refusal_after_an_unknown_outcome_is_unsure(world: World, sandbox: Sandbox) -> None:
    """F5: if a generation may be running, the job is not failed; its caller could pay for another one."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    await sandbox.switch(refuse_submits="model_not_found")
    await world.retry(submitter)
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (job.state, error_code(job), job.charged) == ("unsure", "model_not_found", None)


async def test_a_webhook_corrects_a_refusal(world: World, sandbox: Sandbox) -> None:
    """F5, F13: if a job was accepted after all, it ends with its event's status and price."""
    await sandbox.switch(lost_answer_rate=1.0, duration=0.0, webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    (generation,) = await sandbox.generations()
    await sandbox.switch(refuse_submits="model_not_found")
    await world.retry(submitter)
    assert await sandbox.send_webhook(generation["request_id"]) == 200
    await world.forward()
    done = await show(submitter, job)
    assert (done.state, done.request_id) == ("completed", generation["request_id"])
    assert (done.cost, done.charged, done.error) == (PRICE, PRICE, None)


async def test_a_path_makes_no_result_of_a_refusal(odd_world: World, odd: OddClipia) -> None:
    """A15, C11: if Clipia refused the first attempt, an event on an unsigned path does not end the job."""
    callback = await odd_world.serve_callback()
    odd.script = [refused(400, "invalid_request")]
    await refusal(odd_world.submitter(public_url=callback).submit(MODEL, PROMPT))
    job_id = (await odd_world.job())["id"]
    await post(f"{callback}/clipia/webhook/clipia/{job_id}", body("r-of-another"))
    await odd_world.forward()
    row = await odd_world.job()
    assert (row["state"], row["request_id"], row["charged"]) == ("failed", None, 0)


async def test_words_that_no_database_takes_are_cleaned(odd_world: World, odd: OddClipia) -> None:
    """If Clipia's text has a NUL or half an emoji, the refusal still counts and can be shown."""
    strange = "a\x00b\ud800c"
    odd.script = [
        refused(400, "invalid_request", strange),
        accepted("r-1", warnings=[{"code": "unknown_parameter", "message": strange}]),
    ]
    submitter = odd_world.submitter()
    error = await refusal(submitter.submit(MODEL, PROMPT))
    assert (error.code, str(error)) == ("invalid_request", "a\ufffdb\ufffdc")
    assert (await odd_world.job())["state"] == "failed"
    job = await submitter.submit(MODEL, PROMPT)
    assert job.warnings == [{"code": "unknown_parameter", "message": "a\ufffdb\ufffdc"}]
    assert orjson.loads(orjson.dumps(job.as_dict()))["id"] == str(job.id)


async def test_a_refused_account_pauses_all_submissions(world: World, sandbox: Sandbox) -> None:
    """F6: a pause ends no job; single probes find its end, and then all jobs are sent."""
    code = "invalid_api_key"
    await sandbox.switch(refuse_submits=code)
    submitter = world.submitter()
    first = await submitter.submit(MODEL, PROMPT)
    assert (first.state, error_code(first)) == ("pending", code)
    assert await submitter.paused()
    (account,) = await world.rows(accounts)
    assert account["submits_after"] - account["paused_at"] == pytest.approx(5.0, abs=0.1)
    await world.set(accounts, submits_after=time.time() + HOUR)
    for _ in range(3):
        assert (await submitter.submit(MODEL, PROMPT)).state == "pending"
    assert await world.run_lane(submitter.lane) == 0
    assert len(await sandbox.submits()) == 1
    paused = (await submitter.account())["limits"]["paused"]
    assert paused is not None
    assert (paused["code"], paused["status"]) == (code, CODES[code][0])

    # Still refused: one probe, even if many jobs are due, and the next one is later.
    assert await world.retry(submitter) == 1
    (account,) = await world.rows(accounts)
    assert account["probes"] == 2
    assert account["submits_after"] - account["paused_at"] > 9.9
    assert [row["state"] for row in await world.rows(jobs)] == ["pending"] * 4

    await sandbox.switch(refuse_submits="")
    assert await world.retry(submitter) == 1
    assert not await submitter.paused()
    assert (await submitter.account())["limits"]["paused"] is None
    assert await world.retry(submitter) == 3
    assert len(await sandbox.generations()) == 4
    assert {row["state"] for row in await world.rows(jobs)} == {"submitted"}


async def test_an_account_that_is_refused_never_had_the_job(world: World, sandbox: Sandbox) -> None:
    """F4, F6: a pause of days does not use up a key's lifetime if the job was never sent."""
    await sandbox.switch(refuse_submits="invalid_api_key")
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    row = await world.job()
    assert row["sent_at"] is None
    assert 4.9 < await world.retry_delay() < 10.1
    await world.set(jobs, created_at=db_time(-30 * 24 * HOUR))
    await sandbox.switch(refuse_submits="")
    await world.retry(submitter)
    assert (await world.job())["state"] == "submitted"


async def test_an_account_refused_near_the_end_of_the_key_ends_unsure(world: World, sandbox: Sandbox) -> None:
    """F4, F6: if an attempt may have arrived, a pause does not extend the key's lifetime."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(refuse_submits="insufficient_credits")
    await world.retry(submitter)
    row = await world.job()
    assert (row["state"], row["sent_at"] is not None) == ("pending", True)
    await world.set(jobs, sent_at=db_time(-KEY_VALID_SECONDS - 60))
    await sandbox.switch(refuse_submits="")
    await world.retry(submitter)
    assert (await world.job())["state"] == "unsure"
    assert len(await sandbox.submits()) == 2


async def test_processes_that_end_end_no_job(world: World, sandbox: Sandbox) -> None:
    """F1: if several processes crash during a submission, the next one sends it, with the same key."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(lost_answer_rate=0.0)
    await world.set(jobs, lost=20, lease=uuid.uuid4())
    await world.retry(submitter)
    row = await world.job()
    assert (row["state"], row["lost"]) == ("submitted", 0)
    assert len(await sandbox.generations()) == 1


async def test_a_process_that_slept_does_not_send(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: if a claimed job is sent half a minute late, its lease may be lost: it is not sent."""
    odd.script = [refused(503, "service_unavailable"), accepted("r-1")]
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await odd_world.make_due()
    assert submitter.lane is not None
    (work,) = await submitter.lane.claim(1)
    now = client_module.boot_clock
    with monkeypatch.context() as patched:
        patched.setattr(client_module, "boot_clock", lambda: now() + 31.0)
        await work.run()
    assert len(odd.posts) == 1
    row = await odd_world.job()
    assert (row["state"], json.loads(row["error"])["code"]) == ("pending", "unreachable")
    await odd_world.retry(submitter)
    assert (await odd_world.job())["state"] == "submitted"


@pytest.mark.parametrize(
    "said",
    [accepted("r-1"), refused(400, "invalid_request"), refused(503, "service_unavailable")],
    ids=["accepted", "refused", "unavailable"],
)
async def test_a_result_without_its_lease_does_not_count(
    odd_world: World, odd: OddClipia, said: bytes
) -> None:
    """If a process was stopped for too long, it changes no rows: another one has the job."""
    lease = uuid.uuid4()

    async def take_over(_request: Request) -> None:
        await odd_world.set(jobs, lease=lease)

    odd.on_submit, odd.script = take_over, [said]
    job = await odd_world.submitter().submit(MODEL, PROMPT)
    row = await odd_world.job()
    assert (job.state, row["lease"], row["request_id"], row["error"]) == ("pending", lease, None, None)
    assert await odd_world.rows(attempts) == []


async def test_an_empty_claim_uses_no_quota(world: World) -> None:
    """F7: if another worker was faster, no call of the quota is used."""
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    before = await world.rows(accounts)
    assert submitter.lane is not None
    async with world.database.write() as connection:
        assert await submitter.lane.claim_in(connection, limit=1, job_id=uuid.uuid4()) == []
    assert await world.rows(accounts) == before


async def test_a_value_that_cannot_be_stored_is_not_an_outage(world: World) -> None:
    """If a database cannot store a value, it never will: the job must not wait for it."""
    await world.submitter().submit(MODEL, PROMPT)
    outages = []
    values: list[dict[str, Any]] = [{"request_id": "r" * 300}, {"request_id": "\x00"}, {"progress": 10**9}]
    for value in values:
        try:
            await world.set(jobs, **value)
        except DBAPIError:
            pass
        except DatabaseUnavailable as error:
            outages.append(str(error))
    assert outages == []


# --- the life of a provider key ---


async def test_a_callers_key_holds_for_ever(world: World, sandbox: Sandbox) -> None:
    """F9: if a call is repeated after a month, it returns the existing job, without a call to Clipia."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    month = db_time(-30 * 24 * HOUR)
    await world.set(jobs, created_at=month, sent_at=month, submitted_at=month)
    again = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (again.id, again.new) == (job.id, False)
    assert len(await sandbox.submits()) == 1


async def test_a_key_is_used_for_23_hours(world: World, sandbox: Sandbox) -> None:
    """F4: at 22 h 59 min after the first attempt there is another one, with the same key."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(lost_answer_rate=0.0)
    await world.set(jobs, sent_at=db_time(-22 * HOUR - 59 * 60))
    await world.retry(submitter)
    assert len(await sandbox.submits()) == 2
    assert len(await sandbox.generations()) == 1
    assert (await world.job())["state"] == "submitted"


async def test_a_key_is_not_used_after_23_hours(world: World, sandbox: Sandbox) -> None:
    """F4: at 23 h 01 min no request is sent; the job is unsure and waits for an operator."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    await sandbox.switch(lost_answer_rate=0.0)
    await world.set(jobs, sent_at=db_time(-23 * HOUR - 60))
    for _ in range(3):
        await world.retry(submitter)
        await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert len(await sandbox.submits()) == 1
    shown = await show(submitter, job)
    assert (shown.state, error_code(shown), shown.ended) == ("unsure", "outcome_unknown", True)
    assert "23 hours" in str(shown.error)
    assert [each.outcome for each in shown.attempts] == ["retry", "failed"]
    assert shown.next_attempt_at is None


async def test_the_last_attempt_is_the_last(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: if an attempt ends unanswered after the deadline, there is no other one."""
    submitter = odd_world.submitter()
    odd.script = [refused(503, "service_unavailable")]
    await submitter.submit(MODEL, PROMPT)
    await odd_world.set(jobs, sent_at=db_time(100.0 - SUBMIT_UNANSWERED.give_up_after))
    now = client_module.boot_clock

    async def answer_late(_request: Request) -> None:
        monkeypatch.setattr("receiver.lanes.submit_records.boot_clock", lambda: now() + 200.0)

    odd.on_submit = answer_late
    await odd_world.retry(submitter)
    row = await odd_world.job()
    assert (row["state"], json.loads(row["error"])["code"]) == ("unsure", "outcome_unknown")
    assert "No." in row["error"]
    assert len(odd.posts) == 2


async def test_a_webhook_ends_an_unsure_job(world: World, sandbox: Sandbox) -> None:
    """F4, F13: the event finds its job by the callback's path and has its price."""
    await sandbox.switch(lost_answer_rate=1.0, duration=0.0, webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    await world.set(jobs, sent_at=db_time(-KEY_VALID_SECONDS - 60))
    await world.retry(submitter)
    assert (await world.job())["state"] == "unsure"
    (generation,) = await sandbox.generations()
    assert await sandbox.send_webhook(generation["request_id"]) == 200
    await world.forward()
    done = await show(submitter, job)
    assert (done.state, done.request_id) == ("completed", generation["request_id"])
    assert (done.cost, done.charged, done.error, done.progress) == (PRICE, PRICE, None, 100)
    assert done.event is not None
    assert len(await sandbox.submits()) == 1


async def test_an_operator_may_submit_it_again(odd_world: World, odd: OddClipia) -> None:
    """F4: the new attempt has a new key, today's callback, and a record of the operator."""
    odd.script = [refused(409, "idempotency_key_reuse"), accepted("r-2")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    moved = odd_world.submitter(public_url=PUBLIC)
    again = await moved.resubmit(job.id, by="alice")
    assert (again.state, again.error) == ("pending", None)
    assert await odd_world.run_lane(submitter.lane) == 1
    done = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (done.id, done.state, done.request_id) == (job.id, "submitted", "r-2")
    assert [each.outcome for each in done.attempts] == ["failed", "resubmitted", "succeeded"]
    assert "alice" in str(done.attempts[1].error)
    first, second = odd.posts
    assert json.loads(first.body) == {"input": PROMPT}
    sent = json.loads(second.body)
    token = path_token(sent["webhook_url"])
    assert sent == {"input": PROMPT, "webhook_url": f"{PUBLIC}/clipia/webhook/clipia/{job.id}.{token}"}
    assert (await odd_world.job())["request"] == second.body
    keys = [uuid.UUID(post.headers["idempotency-key"]) for post in (first, second)]
    assert keys[0] != keys[1]
    assert keys[1].version == 4


@pytest.mark.parametrize("state", ["failed", "canceled", "unsure"])
async def test_a_job_without_a_result_may_be_submitted_again(
    world: World, sandbox: Sandbox, state: str
) -> None:
    """F13: the job starts again, without the price of its first submission."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    await world.set(
        jobs, state=state, charged=0, progress=70, error='{"code":"x","message":"y"}', next_attempt_at=None
    )
    again = await submitter.resubmit(job.id, by="alice")
    assert (again.state, again.request_id, again.charged, again.progress) == ("pending", None, None, None)
    assert (again.submitted_at, again.finished_at, again.error) == (None, None, None)
    assert await world.run_lane(submitter.lane) == 1
    first, second = await sandbox.generations()
    done = await show(submitter, job)
    assert done.request_id == second["request_id"] != first["request_id"]
    assert first["request_id"] in str(done.attempts[1].error)


async def test_a_result_of_the_first_life_does_not_end_the_second(odd_world: World, odd: OddClipia) -> None:
    """F1, F13: the webhook of the old request is a separate event; the job waits for the new one."""
    callback = await odd_world.serve_callback()
    submitter = odd_world.submitter(public_url=callback)
    odd.script = [refused(409, "idempotency_key_reuse"), accepted("r-2")]
    job = await submitter.submit(MODEL, PROMPT)
    old_url = json.loads(odd.posts[0].body)["webhook_url"]
    await submitter.resubmit(job.id, by="alice")

    async def finish_the_old_one(_request: Request) -> None:
        await post(old_url, body("r-1"))
        await odd_world.forward()
        assert len(odd_world.destination.events) == 1

    odd.on_submit = finish_the_old_one
    assert await odd_world.run_lane(submitter.lane) == 1
    new_url = json.loads(odd.posts[1].body)["webhook_url"]
    assert path_token(new_url) != path_token(old_url)
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.charged) == ("submitted", "r-2", None)
    await post(new_url, body("r-2"))
    await odd_world.forward()
    assert (await show(submitter, job)).state == "completed"
    data: list[Any] = [message.get_data() for message in odd_world.destination.events]
    assert [each["job"] and each["job"]["id"] for each in data] == [None, str(job.id)]


@pytest.mark.parametrize("state", ["pending", "submitted", "completed"])
async def test_a_job_with_a_result_is_not_submitted_again(world: World, sandbox: Sandbox, state: str) -> None:
    """F4: an operator cannot pay twice by accident."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    await world.set(jobs, state=state)
    error = await refusal(submitter.resubmit(job.id, by="alice"))
    assert (status_of(error), error.code) == (409, "not_resubmittable")
    assert state in str(error)
    assert (await world.job())["state"] == state
    assert len(await sandbox.submits()) == 1
    error = await refusal(submitter.resubmit(uuid.uuid4(), by="alice"))
    assert (status_of(error), error.code) == (404, "not_found")


# --- another account ---


async def test_another_account_does_not_get_sent_jobs(world: World, sandbox: Sandbox) -> None:
    """F1: idempotency keys are unknown to another account, so the job waits for an operator."""
    await sandbox.switch(lost_answer_rate=1.0)
    await world.submitter().submit(MODEL, PROMPT)
    await sandbox.switch(lost_answer_rate=0.0)
    await world.retry(world.submitter(key="clipia_live_another"))
    row = await world.job()
    assert (row["state"], json.loads(row["error"])["code"]) == ("unsure", "account_changed")
    assert "CLIPIA_KEY" in row["error"]
    assert len(await sandbox.submits()) == 1


@pytest.mark.parametrize("code", ["insufficient_credits", "rate_limit_exceeded"])
async def test_another_account_gets_unsent_jobs(world: World, sandbox: Sandbox, code: str) -> None:
    """F6: if a refused key is replaced, the queue is sent with the new one."""
    await sandbox.switch(refuse_submits=code)
    await world.submitter().submit(MODEL, PROMPT)
    await sandbox.switch(refuse_submits="")
    another = world.submitter(key="clipia_live_another")
    await world.set(jobs, next_attempt_at=db_time(-1.0))
    assert await world.run_lane(another.lane) == 1
    row = await world.job()
    assert (row["state"], row["account"]) == ("submitted", another.client.account)


async def test_live_and_test_do_not_mix(world: World, sandbox: Sandbox) -> None:
    """F1: a job of a live key is neither sent nor polled with a test key, or the reverse."""
    await sandbox.switch(refuse_submits="rate_limit_exceeded")
    live, test = world.submitter(), world.submitter(key=TEST)
    await live.submit(MODEL, PROMPT)
    await test.submit(MODEL, PROMPT)
    await sandbox.switch(refuse_submits="")
    await world.make_due()
    assert await world.run_lane(test.lane) == 1
    assert [row["state"] for row in await world.rows(jobs)] == ["pending", "submitted"]
    await world.make_due()
    assert await world.run_lane(live.lane) == 1
    assert [each["mode"] for each in await sandbox.generations()] == ["test", "live"]
    await world.make_due()
    assert await world.run_lane(world.poll_lane(test)) == 1
    assert [row["state"] for row in await world.rows(jobs)] == ["submitted", "completed"]


async def test_a_refused_connection_leaves_the_key_unused(world: World, sandbox: Sandbox) -> None:
    """F5: if the connection was refused, no job arrived, so it may be sent to another address."""
    closed = world.submitter(url=f"http://127.0.0.1:{free_port()}")
    job = await closed.submit(MODEL, PROMPT)
    row = await world.job()
    assert (job.state, error_code(job), row["sent_at"]) == ("pending", "unreachable", None)
    assert await world.retry(world.submitter()) == 1
    (generation,) = await sandbox.generations()
    assert (await world.job())["request_id"] == generation["request_id"]


async def test_a_job_that_cannot_be_written_was_not_sent(world: World, sandbox: Sandbox) -> None:
    """G8: if httpx rejects a header, the job is unsent, and no row or answer has the key."""
    broken = world.submitter()
    broken.client._sdk._http.headers["authorization"] = "Bearer cAnArY8f3b61\n"
    job = await broken.submit(MODEL, PROMPT)
    row = await world.job()
    assert (job.state, error_code(job), row["sent_at"]) == ("pending", "not_sent", None)
    for table in (jobs, attempts):
        assert "cAnArY" not in repr(await world.rows(table))
    assert await world.retry(world.submitter()) == 1
    assert len(await sandbox.generations()) == 1


# --- what a job may cost ---


async def test_max_cost_holds(world: World, sandbox: Sandbox) -> None:
    """F12: if a job costs more than its max_cost, it is rejected before it is sent."""
    submitter = world.submitter()
    given = {"prompt": "a cat", "num_images": 3}
    error = await refusal(submitter.submit(MODEL, given, max_cost=35))
    assert (status_of(error), error.code, error.type) == (402, "max_cost_exceeded", "billing_error")
    assert "36" in str(error)
    assert "35" in str(error)
    assert await sandbox.submits() == await world.rows(jobs) == []
    job = await submitter.submit(MODEL, given, max_cost=36)
    assert (job.state, job.cost, job.max_cost) == ("submitted", 36, 36)


async def test_a_price_is_known_before_clipia_takes_the_job(world: World, sandbox: Sandbox) -> None:
    """F12: the estimate counts until Clipia reserves credits."""
    await sandbox.switch(refuse_submits="service_unavailable")
    job = await world.submitter().submit(MODEL, PROMPT, max_cost=100)
    assert (job.state, job.cost) == ("pending", PRICE)
    job = await world.submitter().submit(MODEL, PROMPT)
    assert (job.state, job.cost) == ("pending", None)


async def test_a_price_that_cannot_be_known_makes_no_job(world: World, sandbox: Sandbox) -> None:
    """F12: if there is a limit and no price, the job is not accepted; the caller can send it again."""
    await sandbox.switch(error_rate=1.0)
    submitter = world.submitter(budgets={"shop": 100})
    with pytest.raises(ClipiaUnavailable):
        await submitter.submit(MODEL, PROMPT, max_cost=100)
    with pytest.raises(ClipiaUnavailable):
        await submitter.submit(MODEL, PROMPT, caller="shop")
    assert await world.rows(jobs) == []
    assert (await submitter.submit(MODEL, PROMPT)).state == "pending"


async def age(world: World, seconds: float) -> None:
    """Age jobs by some seconds and make them due."""
    await world.make_due()
    await world.set(jobs, created_at=db_time(-seconds))


async def test_max_cost_holds_for_a_job_that_has_waited(odd_world: World, odd: OddClipia) -> None:
    """F12: if the price has risen since the job was made, the job ends unsent."""
    price = [12]
    odd.others = lambda request: (
        answer(content={"credits": price[0]})
        if request.path.endswith("/estimate")
        else answer(content={"slug": MODEL})
    )
    odd.script = [refused(402, "insufficient_credits"), accepted]
    submitter = odd_world.submitter(public_url="https://hooks.example.com")
    held, free = [await submitter.submit(MODEL, PROMPT, max_cost=most) for most in (20, None)]
    price[0] = 40
    # Another process claims it.
    other = odd_world.submitter()
    await odd_world.set(jobs, where=jobs.c.id == free.id, state="canceled", next_attempt_at=None)
    await age(odd_world, 61.0)
    assert await odd_world.run_lane(other.lane) == 1
    shown = await show(submitter, held)
    assert (shown.state, error_code(shown), shown.charged) == ("failed", "max_cost_exceeded", 0)
    assert "costs 40 credits, more than its max_cost of 20" in str(shown.error)
    assert len(odd.posts) == 2
    assert {request.path for request in odd.requests if request.path.endswith("/estimate")} == {
        f"/v1/models/{MODEL}/estimate"
    }
    # The price request has the job's own input.
    assert json.loads(odd.requests[-1].body)["input"] == PROMPT


async def test_max_cost_after_an_attempt_that_may_have_arrived(odd_world: World, odd: OddClipia) -> None:
    """F3, F12: if an earlier attempt may have been accepted at the old price, the job is unsure."""
    price = [12]
    odd.others = lambda request: (
        answer(content={"credits": price[0]})
        if request.path.endswith("/estimate")
        else answer(content={"slug": MODEL})
    )
    odd.script = [b"", accepted]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT, max_cost=12)
    price[0] = 40
    await age(odd_world, 61.0)
    assert await odd_world.run_lane(odd_world.submitter().lane) == 1
    shown = await show(submitter, job)
    assert (shown.state, error_code(shown), shown.charged) == ("unsure", "max_cost_exceeded", None)
    assert len(odd.posts) == 1


async def test_a_job_waits_for_a_price_that_is_not_known(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F12: if the price is not available, a job with a limit waits unsent, and delays no other."""
    monkeypatch.setattr(catalogue, "PRICE_CACHE_SECONDS", 0.0)
    odd.others = lambda _request: answer(content={"credits": 12})
    odd.script = [refused(503, "service_unavailable"), accepted]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT, max_cost=12)
    await odd_world.set(jobs, sent_at=None)
    odd.others = lambda _request: refused(429, "rate_limit_exceeded", Retry_After="100")
    await age(odd_world, 61.0)
    # The cached answer is too old.
    assert await odd_world.run_lane(submitter.lane) == 1
    row = await odd_world.job()
    assert (row["state"], row["sent_at"], json.loads(row["error"])["code"]) == (
        "pending",
        None,
        "price_unknown",
    )
    assert len(odd.posts) == 1
    odd.others = lambda _request: answer(content={"credits": 12})
    await age(odd_world, 61.0)
    assert await odd_world.run_lane(odd_world.submitter().lane) == 1
    assert (await show(submitter, job)).state == "submitted"


async def test_budgets_hold(world: World, sandbox: Sandbox) -> None:
    """F12: a caller's own budget counts, or else the default one; jobs beyond it are not sent."""
    submitter = world.submitter(budgets={"shop": 24, "*": 12, "idle": 0})
    for caller, jobs_each in (("shop", 2), ("blog", 1), ("press", 1), ("idle", 0)):
        for _ in range(jobs_each):
            assert (await submitter.submit(MODEL, PROMPT, caller=caller)).state == "submitted"
        error = await refusal(submitter.submit(MODEL, PROMPT, idempotency_key="last", caller=caller))
        assert (status_of(error), error.code, error.type) == (402, "budget_exceeded", "billing_error")
        assert f"but {jobs_each * 12} of today's {jobs_each * 12} for '{caller}' are" in str(error)
    assert len(await sandbox.submits()) == len(await world.rows(jobs)) == 4


async def test_racing_jobs_do_not_overshoot_a_budget(world: World, sandbox: Sandbox) -> None:
    """F12: if several processes submit at once, the accepted jobs still fit into the budget."""
    submitters = [world.submitter(budgets={"shop": 40}) for _ in range(2)]
    made = await asyncio.gather(
        *(submitters[n % 2].submit(MODEL, PROMPT, caller="shop") for n in range(10)), return_exceptions=True
    )
    assert sum(isinstance(each, Job) for each in made) == 3
    assert [each.code for each in made if isinstance(each, RequestError)] == ["budget_exceeded"] * 7
    assert len(await world.rows(jobs)) == 3
    while await world.retry(submitters[0]):
        pass
    assert len(await sandbox.generations()) == 3


async def test_a_budget_is_for_a_day(world: World, sandbox: Sandbox) -> None:
    """F12, F13: jobs that ended yesterday, or cost no credits in the end, do not count."""
    submitter = world.submitter(budgets={"shop": 12})
    await submitter.submit(MODEL, PROMPT, caller="shop")
    ended = {"state": "completed", "charged": PRICE, "next_attempt_at": None}
    yesterday = dict.fromkeys(("created_at", "sent_at", "submitted_at"), db_time(-24 * HOUR))
    await world.set(jobs, **ended, **yesterday)
    second = await submitter.submit(MODEL, PROMPT, caller="shop")
    assert (await refusal(submitter.submit(MODEL, PROMPT, caller="shop"))).code == "budget_exceeded"
    await world.set(jobs, where=jobs.c.id == second.id, charged=0)
    assert (await submitter.submit(MODEL, PROMPT, caller="shop")).state == "submitted"
    await sandbox.switch(refuse_submits="invalid_request")
    await world.set(jobs, **ended, **yesterday)
    for _ in range(2):
        assert (await refusal(submitter.submit(MODEL, PROMPT, caller="shop"))).code == "invalid_request"


@pytest.mark.parametrize("becomes", ["pending", "submitted", "completed", "unsure"])
async def test_a_budget_counts_older_open_jobs(world: World, sandbox: Sandbox, becomes: str) -> None:
    """F12: a job of yesterday counts if it is open, or if Clipia accepted or may have accepted it today."""
    await sandbox.switch(refuse_submits="insufficient_credits")
    submitter = world.submitter(budgets={"shop": PRICE + 1, "blog": PRICE + 1})
    await submitter.submit(MODEL, PROMPT, caller="shop")
    await world.set(jobs, created_at=db_time(-24 * HOUR))
    await sandbox.switch(refuse_submits="")
    if becomes != "pending":
        assert await world.retry(submitter) == 1
    if becomes == "completed":
        await world.set(jobs, state=becomes, charged=PRICE, next_attempt_at=None)
    if becomes == "unsure":
        await world.set(jobs, state=becomes, submitted_at=None, next_attempt_at=None)
    assert (await world.job())["state"] == becomes
    assert (await refusal(submitter.submit(MODEL, PROMPT, caller="shop"))).code == "budget_exceeded"
    assert (await submitter.submit(MODEL, PROMPT, caller="blog")).cost == PRICE


# --- inputs ---


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (MODEL, {"promt": "a cat"}, "prompt"),
        (MODEL, {"prompt": "a cat", "aspect_ratio": "2:1"}, "16:9"),
        (MODEL, {"prompt": "a cat", "num_images": 9}, "from 1 to 4"),
        ("seedance-2-fast-i2v", {"prompt": "a cat"}, "image_url"),
    ],
)
async def test_a_wrong_input_is_refused_before_it_is_sent(
    world: World, sandbox: Sandbox, model: str, given: dict[str, Any], said: str
) -> None:
    """If a key has a typo, the message says so, and no job is made."""
    error = await refusal(world.submitter().submit(model, given))
    assert (status_of(error), error.code) == (400, "model_input_invalid")
    assert said in str(error)
    assert await sandbox.submits() == await world.rows(jobs) == []


async def test_an_unknown_model_is_refused(world: World, sandbox: Sandbox) -> None:
    """If Clipia does not have a model, the job is rejected before it is sent."""
    error = await refusal(world.submitter().submit("nano-banana-3", PROMPT))
    assert (status_of(error), error.code) == (404, "model_not_found")
    assert await sandbox.submits() == await world.rows(jobs) == []


DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]

STRANGE: dict[str, dict[str, Any]] = {
    "no model": {"model": ""},
    "two lines": {"model": "a\nb"},
    "a path": {"model": "../account"},
    "a long model": {"model": "m" * 256},
    "metadata is no text": {"metadata": {"order": 1}},
    "metadata with NUL": {"metadata": {"order": "\x00"}},
    "metadata without a name": {"metadata": {"": "x"}},
    "too much metadata": {"metadata": {str(number): "" for number in range(33)}},
    "long metadata": {"metadata": {"order": "x" * 513}},
    "a negative price": {"max_cost": -1},
    "a price that is none": {"max_cost": True},
    "a price without end": {"max_cost": float("inf")},
    "no number": {"max_cost": float("nan")},
    "more than anything costs": {"max_cost": 10**12 + 1},
    "a number for a name": {"input": {1: "a"}},
    "no JSON": {"input": {"prompt": "a", "image_url": {b"x"}}},
    "a lone surrogate": {"input": {"prompt": "\ud800"}},
    "a huge number": {"input": {"prompt": "a", "seed": 2**70}},
    "too deep": {"input": {"prompt": "a", "list": DEEP}},
}


@pytest.mark.parametrize("limits", [{}, {"max_cost": 5}], ids=["", "with max_cost"])
async def test_an_invalid_request_is_rejected(
    odd_world: World, odd: OddClipia, limits: dict[str, Any]
) -> None:
    """For any values, a request that cannot be stored or sent is rejected as invalid."""
    odd.others = lambda _request: answer(content={"slug": MODEL, "credits": 1})
    submitter = odd_world.submitter()
    outcomes: dict[str, object] = {}
    for name, strange in STRANGE.items():
        given = {"model": MODEL, "input": PROMPT} | limits | strange
        try:
            await submitter.submit(**given, idempotency_key="k")
        except RequestError as error:
            outcomes[name] = (status_of(error), error.code)
        except ClipiaUnavailable as error:
            outcomes[name] = error.reason
    assert outcomes == dict.fromkeys(STRANGE, (400, "invalid_request"))
    assert odd.posts == []
    assert await odd_world.rows(jobs) == []


async def test_a_strange_repeat_is_refused(odd_world: World, odd: OddClipia) -> None:
    """F8: a known key does not bypass the checks of an input."""
    odd.script = [accepted]
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    for given in ({"prompt": "a", "list": DEEP}, {"prompt": {b"x"}}):
        error = await refusal(submitter.submit(MODEL, given, idempotency_key="k"))
        assert error.code in ("invalid_request", "idempotency_key_reuse")


@pytest.mark.parametrize("caller", ["c" * 64, "a\x00b"], ids=["long", "NUL"])
async def test_a_caller_has_a_name(world: World, sandbox: Sandbox, caller: str) -> None:
    """F8: if a database cannot store a value, the request is invalid on both, and not an outage."""
    error = await refusal(world.submitter().submit(MODEL, PROMPT, caller=caller))
    assert (status_of(error), error.code) == (400, "invalid_request")
    assert await sandbox.submits() == []


async def test_a_request_has_a_size(odd_world: World, odd: OddClipia) -> None:
    """If an input has more than a megabyte, it is rejected before it is sent: pass files by URL."""
    odd.script = [accepted]
    submitter = odd_world.submitter()
    error = await refusal(submitter.submit(MODEL, {"prompt": "x" * 1024 * 1024}))
    assert (status_of(error), error.code) == (413, "invalid_request")
    assert odd.posts == []
    assert await odd_world.rows(jobs) == []
    largest = "x" * (1024 * 1024 - len(b'{"input":{"prompt":""}}'))
    assert (await submitter.submit(MODEL, {"prompt": largest})).state == "submitted"


async def test_an_unreachable_catalogue_loses_no_job(world: World, sandbox: Sandbox) -> None:
    """F5: if an input cannot be checked, the job is accepted; Clipia's warnings are stored."""
    await sandbox.switch(error_rate=1.0)
    submitter = world.submitter()
    job = await submitter.submit(MODEL, {"prompt": "a cat", "sead": 1}, idempotency_key="k")
    assert (job.state, await world.rows(jobs) != []) == ("pending", True)
    await sandbox.switch(error_rate=0.0)
    assert await world.retry(submitter) == 1
    done = await submitter.submit(MODEL, {"prompt": "a cat", "sead": 1}, idempotency_key="k")
    assert done.state == "submitted"
    assert [(each["code"], each["parameter"]) for each in done.warnings] == [("unknown_parameter", "sead")]
    assert "sead" in done.warnings[0]["message"]
    assert (await submitter.list_jobs()).jobs[0].warnings == done.warnings


async def test_a_refused_account_does_not_stop_the_check(odd_world: World, odd: OddClipia) -> None:
    """F6: if a key may not read the catalogue, it may still submit."""
    odd.script = [accepted("r-1")]
    odd.others = lambda _request: refused(403, "insufficient_scope")
    job = await odd_world.submitter().submit(MODEL, PROMPT)
    assert (job.state, job.request_id) == ("submitted", "r-1")


# --- opening it ---


async def test_a_submitter_is_opened_by_the_settings(
    database_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment has all settings: database, key, address, public URL and budgets."""
    environment = {
        "RECEIVER_DATABASE_URL": database_url,
        "CLIPIA_KEY": LIVE,
        "CLIPIA_BASE_URL": sandbox.url,
        "RECEIVER_PUBLIC_URL": PUBLIC,
        "RECEIVER_BUDGETS": "local:12",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    async with Submitter.open() as submitter:
        job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
        assert (await refusal(submitter.submit(MODEL, PROMPT))).code == "budget_exceeded"
    (generation,) = await sandbox.generations()
    assert (job.state, job.request_id) == ("submitted", generation["request_id"])
    assert generation["webhook"]["url"].startswith(f"{PUBLIC}/clipia/webhook/clipia/{job.id}.")
    async with Submitter.open() as submitter:
        assert (await submitter.submit(MODEL, PROMPT, idempotency_key="k")).id == job.id


async def test_without_a_key_jobs_can_only_be_read(world: World, sandbox: Sandbox) -> None:
    """If Clipia is needed, the error names the missing setting; all other methods work."""
    job = await world.submitter().submit(MODEL, PROMPT, idempotency_key="k")
    settings = Settings.load(database_url=world.database_url)
    async with Submitter.open(settings) as submitter:
        assert submitter.lane is None
        assert (await show(submitter, job)).id == job.id
        assert not await submitter.paused()
        assert (await submitter.submit(MODEL, PROMPT, idempotency_key="k")).id == job.id
        calls = [
            submitter.submit(MODEL, PROMPT, idempotency_key="new"),
            submitter.resubmit(job.id, by="alice"),
            submitter.account(),
        ]
        for call in calls:
            with pytest.raises(SettingsError, match="CLIPIA_KEY is not set"):
                await call
    assert len(await world.rows(jobs)) == len(await sandbox.submits()) == 1


async def test_a_database_without_tables_is_refused(postgres: Postgres) -> None:
    """A shared database is migrated by a command; the message names it."""
    settings = Settings.load(database_url=postgres.url(), clipia_key=LIVE)
    with pytest.raises(SettingsError, match="run `receiver migrate`"):
        async with Submitter.open(settings):
            pass


async def test_a_file_of_ones_own_is_made(tmp_path: Path, sandbox: Sandbox) -> None:
    """SQLite needs no preparation."""
    settings = Settings.load(
        database_url=f"sqlite:///{tmp_path}/new/jobs.db", clipia_key=LIVE, clipia_base_url=sandbox.url
    )
    async with Submitter.open(settings) as submitter:
        assert (await submitter.submit(MODEL, PROMPT)).state == "submitted"


async def test_a_database_that_is_away_is_an_error(sandbox: Sandbox) -> None:
    """If no transaction can be committed, no job is sent."""
    settings = Settings.load(
        database_url=f"postgresql://nobody@127.0.0.1:{free_port()}/none",
        clipia_key=LIVE,
        clipia_base_url=sandbox.url,
    )
    with pytest.raises(DatabaseUnavailable):
        async with Submitter.open(settings):
            pass
    assert await sandbox.submits() == []


async def test_plain_threads_submit_too(world: World, sandbox: Sandbox) -> None:
    """F8: code without an event loop has the same guarantees, in any number of threads."""
    settings = Settings.load(
        database_url=world.database_url, clipia_key=LIVE, clipia_base_url=sandbox.url, budgets={"poor": 1}
    )

    def work() -> tuple[list[Job], str]:
        made: list[Job] = []
        with SyncSubmitter(settings) as submitter:
            given: dict[str, Any] = {"idempotency_key": "k", "metadata": {"order": "1"}, "max_cost": 12}
            threads = [
                threading.Thread(target=lambda: made.append(submitter.submit(MODEL, PROMPT, **given)))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            job = submitter.get(made[0].id)
            waited = submitter.wait(made[0].id, seconds=0.05)
            page = submitter.list_jobs(metadata={"order": "1"}, limit=10)
            assert job is not None
            assert waited is not None
            assert submitter.get(uuid.uuid4()) is None
            with pytest.raises(RequestError) as caught:
                submitter.submit(MODEL, PROMPT, caller="poor")
        return [*made, job, waited, *page.jobs], caught.value.code

    found, code = await asyncio.to_thread(work)
    assert len(found) == 7
    assert len({job.id for job in found}) == 1
    assert [job.new for job in found].count(True) == 1
    assert code == "budget_exceeded"
    assert len(await sandbox.generations()) == 1


async def test_a_thread_gets_the_same_errors(tmp_path: Path) -> None:
    """If it is opened in a thread, it raises the same errors, even for the environment's settings."""
    settings = Settings.load(database_url="mysql://127.0.0.1/x", clipia_key=LIVE)
    (tmp_path / "receiver.toml").write_text("nonsense = 1")

    def work() -> None:
        with pytest.raises(SettingsError, match="RECEIVER_DATABASE_URL"), SyncSubmitter(settings):
            pass
        with pytest.raises(SettingsError, match="nonsense"), SyncSubmitter():
            pass

    await asyncio.to_thread(work)
