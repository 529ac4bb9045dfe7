"""How jobs end, on both databases: by webhook or by poll; and their costs."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy import event as engine_events
from structlog.testing import capture_logs
from support.clipia import (
    DURATION,
    LIVE,
    MODEL,
    PRICE,
    PROMPT,
    SECONDS,
    TEST,
    OddClipia,
    Request,
    Sandbox,
    World,
    accepted,
    answer,
    error_code,
    eventually,
    post,
    refusal,
    refused,
    show,
)
from support.events import insert_event, running
from support.payloads import body, failure

from receiver import retention
from receiver.api.answers import status_of
from receiver.core.quota import SHARES
from receiver.db import job_events
from receiver.db.clock import db_time
from receiver.db.receipts import all_receipts
from receiver.db.tables import accounts, deliveries, events, jobs, media
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable
from receiver.ingest import make_event
from receiver.lanes.base import Lane
from receiver.lanes.worker import Wakeups, Worker
from receiver.metrics import POLLS
from receiver.sandbox import WITHOUT_LIMITS
from receiver.submitter import Job, Submitter, waiting

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOUR = 3600.0


@pytest.fixture
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make waiting callers check their jobs ten times as often."""
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)


# --- polls ---


async def test_without_a_webhook_a_job_is_polled_from_the_start(world: World, sandbox: Sandbox) -> None:
    """F10: a job without a webhook is polled from the start, and its progress is stored."""
    submitter = world.submitter()
    poll = world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    assert await world.retry_delay() == pytest.approx(2.0, abs=0.1)
    for ahead, progress, waits in ((0.0, 0, 3.0), (0.5 * DURATION, 33, 4.5), (0.9 * DURATION, 86, 6.75)):
        sandbox.ahead = ahead
        await world.make_due()
        assert await world.run_lane(poll) == 1
        shown = await show(submitter, job)
        assert (shown.state, shown.error) == ("submitted", None)
        assert progress <= (shown.progress or 0) <= progress + 10
        assert await world.retry_delay() == pytest.approx(waits, abs=0.1)
    sandbox.end_all()
    await world.make_due()
    assert await world.run_lane(poll) == 1
    shown = await show(submitter, job)
    assert (shown.state, shown.progress, shown.charged) == ("completed", 100, PRICE)
    assert await world.run_lane(poll) == 0


async def test_a_webhook_is_given_its_time(world: World, sandbox: Sandbox) -> None:
    """F10: a job with a webhook is polled only if that is overdue, and then less and less often."""
    submitter = world.submitter(public_url="https://hooks.example.com", poll_after=90.0)
    poll = world.poll_lane(submitter, poll_after=90.0)
    await submitter.submit(MODEL, PROMPT)
    assert await world.retry_delay() == pytest.approx(90.0, abs=0.1)
    assert await world.run_lane(poll) == 0
    for waits in (135.0, 202.5, 300.0, 300.0):
        await world.make_due()
        assert await world.run_lane(poll) == 1
        assert await world.retry_delay() == pytest.approx(waits, abs=0.1)
    assert len(await sandbox.submits()) == 1


ENDINGS = {
    "COMPLETED": ("completed", PRICE, None, "OK"),
    "FAILED": ("failed", 0, "GENERATION_FAILED", "ERROR"),
    "CANCELED": ("canceled", 0, "CANCELED", "ERROR"),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_lost_webhook_is_made_up_for(world: World, sandbox: Sandbox, ending: str) -> None:
    """F10: a polled result is stored like a webhook's, and the webhook that comes later is a duplicate."""
    await sandbox.switch(webhook_loss_rate=1.0, fail_rate=1.0 if ending == "FAILED" else 0.0)
    callback = await world.serve_callback()
    submitter = world.submitter(public_url=callback)
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k", metadata={"order": "1"})
    request_id = str(job.request_id)
    if ending == "CANCELED":
        await sandbox.cancel(request_id)
    sandbox.end_all()
    await world.make_due()
    assert await world.run_lane(world.poll_lane(submitter)) == 1
    await world.forward()

    state, charged, said, status = ENDINGS[ending]
    done = await show(submitter, job)
    assert (done.state, done.charged, done.cost) == (state, charged, PRICE)
    assert error_code(done) == said
    assert done.finished_at is not None
    assert done.next_attempt_at is None
    assert done.event is not None
    assert (done.event.origin, done.event.status) == ("poll", status)
    assert await world.rows(all_receipts) == []
    (message,) = world.destination.events
    data: Any = message.get_data()
    assert (data["request_id"], data["status"]) == (request_id, status)
    assert data["job"] == {"id": str(job.id), "idempotency_key": "k", "metadata": {"order": "1"}}

    finished = await show(submitter, job)
    if ending == "CANCELED":  # the sandbox sends no webhook for it, and Clipia may not either
        await post(f"{callback}/clipia/webhook/clipia/{job.id}", failure(request_id))
    else:
        assert await sandbox.send_webhook(request_id) == 200
    await world.forward()
    (receipt,) = await world.rows(all_receipts)
    assert receipt["outcome"] == "duplicate"
    assert len(await world.rows(events)) == len(await world.rows(deliveries)) == 1
    assert len(world.destination.events) == 1
    assert await show(submitter, job) == finished


async def test_a_webhook_that_contradicts_a_poll_changes_nothing(world: World, sandbox: Sandbox) -> None:
    """F10: the first result stands; a different one is kept as a conflict and not forwarded."""
    await sandbox.switch(webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    await world.make_due()
    await world.run_lane(world.poll_lane(submitter))
    await world.forward()
    assert await sandbox.send_webhook(str(job.request_id), conflicting=True) == 200
    await world.forward()
    (receipt,) = await world.rows(all_receipts)
    assert receipt["outcome"] == "conflict"
    assert (await show(submitter, job)).state == "completed"
    assert len(world.destination.events) == 1


async def test_a_job_that_its_webhook_ended_is_not_polled(world: World, sandbox: Sandbox) -> None:
    """F10: only open jobs are polled."""
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    assert await sandbox.send_webhook(str(job.request_id)) == 200
    await world.forward()
    done = await show(submitter, job)
    assert (done.state, done.charged, done.progress) == ("completed", PRICE, 100)
    assert done.event is not None
    assert done.event.origin == "webhook"
    assert await world.run_lane(world.poll_lane(submitter)) == 0


async def test_a_job_outlives_its_event(world: World, sandbox: Sandbox) -> None:
    """C16: if its event is pruned, a job is shown without it, and is neither polled nor submitted again."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    sandbox.end_all()
    poll = world.poll_lane(submitter)
    await world.make_due()
    assert await world.run_lane(poll) == 1
    await world.forward()
    done = await show(submitter, job)
    assert done.event is not None
    await world.set(media, state="gone")
    await world.set(events, state="ready", received_at=db_time(-100 * 24 * HOUR))
    begun = await retention.begin(world.database, older_than=timedelta(days=90))
    assert [each.events async for each in retention.prune(world.database, begun)][-1] == 1
    await world.set(jobs, next_attempt_at=db_time(-1.0))
    assert await world.run_lane(poll) == 0
    await world.set(jobs, next_attempt_at=None)
    shown = await show(submitter, job)
    assert shown == replace(done, event=None)
    assert shown.ended
    assert [each.event for each in (await submitter.list_jobs()).jobs] == [None]
    assert await submitter.wait(job.id, seconds=5.0) == shown
    again = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    assert (again.id, again.new) == (job.id, False)
    assert len(await sandbox.submits()) == 1
    # A webhook that comes now is a new event, is forwarded again, and does not change the job.
    await post(f"{await world.serve_callback()}/clipia/webhook", failure(str(job.request_id)))
    await world.forward()
    assert len(world.destination.events) == 2
    assert replace(await show(submitter, job), event=None) == shown


async def test_webhook_and_poll_at_once_are_one_event(world: World, sandbox: Sandbox) -> None:
    """F11: if webhook and poll come at once, each job ends once, and each result is forwarded once."""
    await sandbox.switch(webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    poll = world.poll_lane(submitter)
    made = [await submitter.submit(MODEL, PROMPT) for _ in range(8)]
    sandbox.end_all()
    await world.make_due()
    results: list[Any] = await asyncio.gather(
        *(sandbox.send_webhook(str(job.request_id)) for job in made), world.run_lane(poll)
    )
    await world.forward()
    assert results == [200] * 8 + [8]
    assert {(await show(submitter, job)).state for job in made} == {"completed"}
    stored = await world.rows(events)
    assert sorted(row["request_id"] for row in stored) == sorted(str(job.request_id) for job in made)
    forwarded = [str(event.get_subject()) for event in world.destination.events]
    assert sorted(forwarded) == sorted(str(job.request_id) for job in made)
    (total,) = await submitter.costs(by="caller")
    assert total["charged"] == 8 * PRICE


async def test_a_poll_that_is_late_takes_nothing_back(world: World, sandbox: Sandbox) -> None:
    """F11: if a webhook ends the job during a poll, the poll's result does not change it."""
    callback = await world.serve_callback()
    submitter = world.submitter(public_url=callback)
    job = await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(latency=0.3)
    await world.make_due()
    polling = asyncio.create_task(world.run_lane(world.poll_lane(submitter)))

    async def claimed() -> bool:
        return (await world.job())["lease"] is not None

    await eventually(claimed)
    await post(f"{callback}/clipia/webhook/clipia/{job.id}", body(job.request_id))
    await world.forward()
    ended = await show(submitter, job)
    assert await polling == 1
    assert ended.state == "completed"
    assert await show(submitter, job) == ended


NO_STATUS = {
    "unreachable": b"",
    "half an answer": answer(content={"request_id": "r-1", "status": "COMPLETED"})[:-5],
    "500": refused(500, "internal_error"),
    "a proxy's": answer(502, b"<html>"),
    "no JSON": answer(content=b"OK"),
    "no status": answer(content={"request_id": "r-1"}),
    "not found": refused(404, "not_found"),
    "a refused account": refused(401, "invalid_api_key"),
}


async def test_a_poll_that_fails_is_made_again(odd_world: World, odd: OddClipia) -> None:
    """F10: after any error of a poll the job stays open and is polled again."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    for name, said in NO_STATUS.items():
        odd.others = lambda _request, said=said: said  # type: ignore[misc]  # mypy infers no type for a default
        await odd_world.make_due()
        assert await odd_world.run_lane(poll) == 1, name
        shown = await show(submitter, job)
        assert (shown.state, shown.error is not None) == ("submitted", True), name
        assert shown.next_attempt_at is not None, name
    unknown = answer(content={"request_id": "r-1", "status": "PAUSED", "progress": 5})
    early = answer(202, {"request_id": "r-1", "status": "IN_PROGRESS"})
    end = answer(content={"request_id": "r-1", "status": "COMPLETED"})
    for status, result, state in (
        (unknown, end, "submitted"),
        (end, early, "submitted"),
        (end, b"", "submitted"),
        (end, end, "completed"),
    ):
        odd.others = lambda request, pair=(status, result): pair[not request.path.endswith("/status")]  # type: ignore[misc]  # mypy infers no type for a default
        await odd_world.make_due()
        assert await odd_world.run_lane(poll) == 1
        assert (await show(submitter, job)).state == state
    # The result has no cost, so the reserved credits are charged.
    assert (await show(submitter, job)).charged == PRICE
    assert (await show(submitter, job)).error is None


async def test_a_throttled_poll_waits(world: World, sandbox: Sandbox) -> None:
    """F7: Retry-After delays the job and all other calls of the account."""
    submitter = world.submitter()
    poll = world.poll_lane(submitter)
    for _ in range(2):
        await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(throttle_rate=1.0, retry_after=400)
    await world.make_due()
    (first, _second) = await poll.claim(2)
    await first.run()
    rests = [row["next_attempt_at"] - datetime.now(UTC) for row in await world.rows(jobs)]
    assert max(rests).total_seconds() > 300
    await sandbox.switch(throttle_rate=0.0)
    await world.set(jobs, next_attempt_at=db_time(-1.0), lease=None)
    assert await world.run_lane(poll) == 0
    job = await submitter.submit(MODEL, PROMPT)
    assert job.state == "pending"
    await world.make_due()
    assert await world.run_lane(poll) == 2


async def test_polls_keep_to_their_share(world: World, sandbox: Sandbox) -> None:
    """F7, F10: polls use at most a fifth of the rate limit, however many jobs are overdue."""
    submitter = world.submitter()
    poll = world.poll_lane(submitter)
    for _ in range(4):
        await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(rate_limit=20)
    await world.make_due()
    await world.set(accounts, requests_per_minute=20)
    interval = 60.0 / (20 * SHARES["poll"].steady)
    (work,) = await poll.claim(4)
    (before,) = await world.rows(accounts)
    assert await poll.claim(4) == []
    assert before["polls_until"] - time.time() == pytest.approx(interval, abs=interval / 2)
    assert before["submits_until"] <= time.time()
    sandbox.end_all()
    await work.run()
    (after,) = await world.rows(accounts)
    assert after["polls_until"] - before["polls_until"] == pytest.approx(interval, abs=0.1)
    assert [row["state"] for row in await world.rows(jobs)].count("completed") == 1


async def test_a_poll_learns_the_rate(world: World, sandbox: Sandbox) -> None:
    """F7: the rate limit in the answer to a poll counts for all calls."""
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(rate_limit=300)
    await world.make_due()
    await world.run_lane(world.poll_lane(submitter))
    (account,) = await world.rows(accounts)
    assert account["requests_per_minute"] == 300


async def test_a_job_is_polled_more_often_while_a_caller_waits(world: World, sandbox: Sandbox) -> None:
    """While a caller waits for a job, it is polled every three seconds, with or without a webhook."""
    submitter = world.submitter(public_url="https://hooks.example.com")
    poll = world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    waiting = asyncio.create_task(submitter.wait(job.id, seconds=SECONDS))
    await eventually(lambda: world.watched(job.id))
    assert await world.retry_delay() < 59.0
    for _ in range(2):
        await world.make_due()
        await world.run_lane(poll)
        assert await world.retry_delay() == pytest.approx(3.0, abs=0.1)
    sandbox.end_all()
    await world.make_due()
    await world.run_lane(poll)
    await world.set(events, state="ready")
    done = await waiting
    assert done is not None
    assert done.state == "completed"


async def test_a_result_that_is_unreadable_ends_no_job(odd_world: World, odd: OddClipia) -> None:
    """B9, F10: if a result is unreadable, the job shows the reason and stays open for a day."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    status = {"request_id": "r-1", "status": "COMPLETED"}
    cut = b'{"request_id":"r-1","status":"COMPLETED","output":{"te'
    odd.others = lambda request: answer(content=status if request.path.endswith("/status") else cut)
    for _ in range(2):
        await odd_world.make_due()
        assert await odd_world.run_lane(poll) == 1
    shown = await show(submitter, job)
    assert (shown.state, shown.charged, error_code(shown)) == ("submitted", None, "unreadable")
    assert await odd_world.rows(events) == []
    await odd_world.make_due()
    await odd_world.set(jobs, submitted_at=db_time(-25 * HOUR))
    assert await odd_world.run_lane(poll) == 1
    shown = await show(submitter, job)
    assert (shown.state, error_code(shown), shown.next_attempt_at) == ("unsure", "unreadable", None)


async def test_a_job_that_clipia_does_not_know_is_given_up(odd_world: World, odd: OddClipia) -> None:
    """F10: after a day of `not_found` the operator has to decide; a webhook that comes later still counts."""
    odd.script = [accepted("r-1")]
    callback = await odd_world.serve_callback()
    submitter = odd_world.submitter(public_url=callback)
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    odd.others = lambda _request: refused(404, "not_found")
    for hours, state in ((23, "submitted"), (25, "unsure")):
        await odd_world.make_due()
        await odd_world.set(jobs, submitted_at=db_time(-hours * HOUR))
        assert await odd_world.run_lane(poll) == 1
        shown = await show(submitter, job)
        assert (shown.state, error_code(shown), shown.request_id) == (state, "not_found", "r-1")
    await odd_world.make_due()
    assert await odd_world.run_lane(poll) == 0
    await post(f"{callback}/clipia/webhook/clipia/{job.id}", body("r-1"))
    await odd_world.forward()
    assert (await show(submitter, job)).state == "completed"


NOT_UNDERSTOOD = {
    "unknown_status": answer(content={"request_id": "r-1", "status": "EXPIRED", "progress": 5}),
    "no_result": answer(content={"request_id": "r-1", "status": "COMPLETED"}),
    "request_expired": refused(410, "request_expired", "It is too old."),
    "insufficient_scope": refused(403, "insufficient_scope", "Not with this key."),
}
WORDS = {
    "unknown_status": "EXPIRED",
    "no_result": "COMPLETED",
    "request_expired": "It is too old.",
    "insufficient_scope": "Not with this key.",
}


@pytest.mark.parametrize("code", NOT_UNDERSTOOD)
async def test_a_job_with_an_unknown_status_is_given_up(odd_world: World, odd: OddClipia, code: str) -> None:
    """F10: after a day of an undocumented status, no result or a refusal, the job is unsure."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    early = answer(202, {"request_id": "r-1", "status": "IN_PROGRESS"})
    odd.others = lambda request: NOT_UNDERSTOOD[code] if request.path.endswith("/status") else early
    outcome = code if code in ("unknown_status", "no_result") else "failed"
    counter = POLLS.labels(outcome)._value
    before, logged, given_up = counter.get(), 0, []
    for hours, state in ((1, "submitted"), (23, "submitted"), (25, "unsure")):
        await odd_world.make_due()
        await odd_world.set(jobs, submitted_at=db_time(-hours * HOUR))
        with capture_logs() as log:
            assert await odd_world.run_lane(poll) == 1
        logged += sum(entry["event"] == "job without a usable status" for entry in log)
        given_up += [entry["log_level"] for entry in log if entry["event"] == "job given up"]
        shown = await show(submitter, job)
        assert (shown.state, error_code(shown), shown.request_id) == (state, code, "r-1")
        assert shown.error is not None
        assert WORDS[code] in shown.error["message"]
    assert counter.get() == before + 3
    assert given_up == ["error"]
    assert logged == (0 if outcome == "failed" else 1), "only the first one is logged"
    await odd_world.make_due()
    assert await odd_world.run_lane(poll) == 0


SILENCE = {
    "a refused account": refused(401, "invalid_api_key"),
    "an outage": refused(503, "service_unavailable"),
    "a proxy's 401": answer(401, b"<html>"),
    "a proxy's 410": answer(410, b"<html>"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", SILENCE)
async def test_polls_of_a_refused_account_or_an_outage_end(
    odd_world: World, odd: OddClipia, name: str
) -> None:
    """F10: an error that is not about the job ends it after a week."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    odd.others = lambda _request: SILENCE[name]
    for days, state in ((2, "submitted"), (6, "submitted"), (8, "unsure")):
        await odd_world.make_due()
        await odd_world.set(jobs, submitted_at=db_time(-24 * days * HOUR))
        assert await odd_world.run_lane(poll) == 1
        assert (await show(submitter, job)).state == state
    await odd_world.make_due()
    assert await odd_world.run_lane(poll) == 0


async def test_a_failure_after_days_at_rest_ends_no_job(odd_world: World, odd: OddClipia) -> None:
    """F10: if a worker was stopped for a week, a short outage at its first poll ends no job."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    odd.others = lambda _request: refused(503, "service_unavailable")
    await odd_world.make_due()
    await odd_world.set(jobs, submitted_at=db_time(-9 * 24 * HOUR))
    assert await odd_world.run_lane(odd_world.poll_lane(submitter)) == 1
    assert (await show(submitter, job)).state == "submitted"


async def test_a_status_that_is_understood_again_is_forgotten(odd_world: World, odd: OddClipia) -> None:
    """F10: an unknown status leaves no error on a job that goes on."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    for status, code in (("THROTTLED", "unknown_status"), ("IN_PROGRESS", None)):
        content = {"request_id": "r-1", "status": status, "progress": 40}
        odd.others = lambda _request, content=content: answer(content=content)  # type: ignore[misc]  # mypy infers no type for a default
        await odd_world.make_due()
        await odd_world.run_lane(poll)
        shown = await show(submitter, job)
        assert (shown.state, error_code(shown), shown.progress) == ("submitted", code, 40)


@pytest.mark.parametrize("ending", ["FAILED", "CANCELED"])
async def test_a_job_without_a_result_shows_no_progress(world: World, sandbox: Sandbox, ending: str) -> None:
    """A failed job shows no progress."""
    await sandbox.switch(fail_rate=1.0)
    submitter = world.submitter()
    poll = world.poll_lane(submitter)
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.ahead = 0.5 * DURATION
    await world.make_due()
    await world.run_lane(poll)
    assert (await show(submitter, job)).progress
    if ending == "CANCELED":
        await sandbox.cancel(str(job.request_id))
    sandbox.end_all()
    await world.make_due()
    await world.run_lane(poll)
    shown = await show(submitter, job)
    assert (shown.state, shown.progress) == (ending.lower(), None)


async def test_a_request_id_of_other_characters_finds_its_result(odd_world: World, odd: OddClipia) -> None:
    """F5, F10: a job with an unusual request_id is submitted once, and polled by that id."""
    request_id = "req/7%2F?#ü"
    odd.script = [accepted(request_id)]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.request_id) == ("submitted", request_id)
    done = {"request_id": request_id, "status": "COMPLETED", "cost": PRICE, "output": {}}
    odd.others = lambda _request: answer(content=done)
    await odd_world.make_due()
    assert await odd_world.run_lane(odd_world.poll_lane(submitter)) == 1
    await odd_world.forward()
    shown = await show(submitter, job)
    assert (shown.state, shown.charged) == ("completed", PRICE)
    assert len(odd.posts) == 1


async def test_a_request_id_that_cannot_be_stored_ends_the_job(odd_world: World, odd: OddClipia) -> None:
    """F5: if the request_id of an accepted job cannot be stored, the operator has to decide, at once."""
    odd.script = [accepted("req 7")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, error_code(job), job.charged) == ("unsure", "request_id_unusable", None)
    assert job.error is not None
    assert "req 7" in job.error["message"]
    assert await odd_world.retry(submitter) == 0
    assert len(odd.posts) == 1


async def test_a_poll_that_lost_its_lease_gives_up_no_job(odd_world: World, odd: OddClipia) -> None:
    """F11: a poll whose lease was lost does not give up the job."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT)
    lease = uuid.uuid4()

    async def take_over(_request: Request) -> None:
        await odd_world.set(jobs, lease=lease)

    odd.on_question = take_over
    odd.others = lambda _request: refused(404, "not_found")
    await odd_world.make_due()
    await odd_world.set(jobs, submitted_at=db_time(-25 * HOUR))
    assert await odd_world.run_lane(odd_world.poll_lane(submitter)) == 1
    row = await odd_world.job()
    assert (row["state"], row["lease"], row["error"]) == ("submitted", lease, None)


async def test_an_outage_of_days_gives_up_no_job(odd_world: World, odd: OddClipia) -> None:
    """F10: a job is given up only if Clipia does not know it, not if Clipia does not answer."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    poll = odd_world.poll_lane(submitter)
    await submitter.submit(MODEL, PROMPT)
    for said in (
        refused(503, "service_unavailable"),
        answer(404, b"<html>"),
        refused(401, "invalid_api_key"),
    ):
        odd.others = lambda _request, said=said: said  # type: ignore[misc]  # mypy infers no type for a default
        await odd_world.make_due()
        await odd_world.set(jobs, submitted_at=db_time(-72 * HOUR))
        assert await odd_world.run_lane(poll) == 1
        assert (await odd_world.job())["state"] == "submitted"


async def test_words_in_a_result_are_cleaned(odd_world: World, odd: OddClipia) -> None:
    """B9: a NUL or half an emoji in a polled result does not make it unusable."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    content = {"request_id": "r-1", "status": "COMPLETED", "output": {"text": "a\x00b\ud800"}}
    odd.others = lambda _request: answer(content=content)
    await odd_world.make_due()
    await odd_world.run_lane(odd_world.poll_lane(submitter))
    await odd_world.forward()
    assert (await show(submitter, job)).state == "completed"
    assert [data["altered"] for data in messages(odd_world)] == [["/output/text"]]
    assert [data["output"] for data in messages(odd_world)] == [{"text": "a\ufffdb\ufffd"}]


async def test_an_error_in_plain_words_is_shown(world: World) -> None:
    """B10: an error that is a plain text is shown as an error."""
    callback = await world.serve_callback()
    submitter = world.submitter(public_url=callback)
    job = await submitter.submit(MODEL, PROMPT)
    said = {"request_id": job.request_id, "status": "ERROR", "error": "no cats today"}
    await post(f"{callback}/clipia/webhook", json.dumps(said).encode())
    await world.forward()
    failed = await show(submitter, job)
    assert (failed.state, failed.charged) == ("failed", 0)
    assert failed.error == {"code": "generation_failed", "message": "no cats today"}


async def test_the_final_cost_is_charged(odd_world: World, odd: OddClipia) -> None:
    """F13: a final cost that differs from the reserved one is the one that is charged."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    odd.others = lambda _request: answer(content={"request_id": "r-1", "status": "COMPLETED", "cost": 10})
    await odd_world.make_due()
    await odd_world.run_lane(odd_world.poll_lane(submitter))
    done = await show(submitter, job)
    assert (done.cost, done.charged) == (PRICE, 10)
    (total,) = await submitter.costs(by="caller")
    assert (total["reserved"], total["charged"], total["refunded"]) == (0, 10, 2)


# --- webhooks and answers ---


@pytest.mark.parametrize("fails", [False, True], ids=["OK", "ERROR"])
async def test_a_webhook_may_be_faster_than_the_answer(
    world: World, sandbox: Sandbox, *, fails: bool
) -> None:
    """C10: an event that is stored before its request_id is known ends the job when the answer comes."""
    await sandbox.switch(webhook_first=True, fail_rate=float(fails))
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    (generation,) = await sandbox.generations()
    (event,) = await world.rows(events)
    assert (event["state"], event["job_id"]) == ("received", job.id)
    assert (job.state, job.charged) == (("failed", 0) if fails else ("completed", PRICE))
    assert (job.new, job.request_id, job.cost) == (True, generation["request_id"], PRICE)
    await world.forward()
    assert (await show(submitter, job)).state == job.state
    assert (await submitter.submit(MODEL, PROMPT, idempotency_key="k")).id == job.id
    assert len(world.destination.events) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["OK", "ERROR"])
async def test_a_job_may_end_before_its_answer(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """C10: without an answer the path finds the job, and a late answer adds its own fields."""
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    ended: list[Job] = []
    content = failure("r-1") if fails else body("r-1", payload={"model": MODEL, "output": {}, "cost": None})

    async def finish_first(request: Request) -> None:
        await post(json.loads(request.body)["webhook_url"], content)
        await odd_world.forward()
        ended.extend((await submitter.list_jobs()).jobs)

    odd.on_submit = finish_first
    odd.script = [accepted("r-1", warnings=[{"code": "unknown_parameter"}])]
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    state = "failed" if fails else "completed"
    assert [(each.state, each.request_id, each.warnings) for each in ended] == [(state, "r-1", [])]
    assert (job.state, job.request_id, job.cost) == (state, "r-1", PRICE)
    assert job.warnings == [{"code": "unknown_parameter"}]
    assert job.submitted_at is not None
    assert [each.outcome for each in job.attempts] == ["succeeded"]
    (message,) = odd_world.destination.events
    data: Any = message.get_data()
    assert data["job"]["id"] == str(job.id)


async def test_an_event_without_a_path_finds_its_job(odd_world: World, odd: OddClipia) -> None:
    """C10: a webhook to the plain callback ends the job too, before the answer or after it."""
    callback = await odd_world.serve_callback()
    content = {
        name: body(name, payload={"model": MODEL, "output": {}, "cost": 11}) for name in ("r-1", "r-2")
    }

    async def send(_request: Request) -> None:
        await post(f"{callback}/clipia/webhook", content["r-1"])

    odd.on_submit, odd.script = send, [accepted("r-1"), accepted("r-2")]
    submitter = odd_world.submitter(public_url=callback)
    first = await submitter.submit(MODEL, PROMPT)
    second = await submitter.submit(MODEL, PROMPT)
    assert (first.state, first.cost, first.charged) == ("completed", PRICE, 11)
    assert second.state == "submitted"
    await post(f"{callback}/clipia/webhook", content["r-2"])
    await odd_world.forward()
    assert (await show(submitter, second)).charged == 11


async def test_a_path_that_names_another_job_is_not_believed(world: World, sandbox: Sandbox) -> None:
    """A15, C10: the path is not signed: if the request_id is known, it alone decides."""
    callback = await world.serve_callback()
    submitter = world.submitter(public_url=callback)
    mine = await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(refuse_submits="service_unavailable")
    other = await submitter.submit(MODEL, PROMPT)
    await post(f"{callback}/clipia/webhook/clipia/{other.id}", body(mine.request_id))
    await world.forward()
    assert (await show(submitter, mine)).state == "completed"
    assert (await show(submitter, other)).state == "pending"


async def test_an_event_without_a_job_is_an_event(world: World) -> None:
    """C11: a result that no job of this receiver asked for is forwarded as an event without a job."""
    callback = await world.serve_callback()
    submitter = world.submitter(public_url=callback)
    job = await submitter.submit(MODEL, PROMPT)
    for path in ("clipia", f"clipia/{uuid.uuid4()}", "clipia/nonsense"):
        await post(f"{callback}/clipia/webhook/{path}", failure())
    await world.forward()
    seen: list[Any] = [message.get_data() for message in world.destination.events]
    assert [data["job"] for data in seen] == [None] * 3
    assert (await show(submitter, job)).state == "submitted"


async def test_an_event_that_is_read_more_strictly_now_leaves_the_job_open(
    odd_world: World, odd: OddClipia
) -> None:
    """C10: if a newer release cannot parse an event, its job stays open and is polled."""

    async def store(_request: Request) -> None:
        event = make_event("clipia", body("r-1"), received_at=time.time())
        async with odd_world.database.write() as connection:
            await insert_event(connection, event)
            await connection.execute(update(events).values(body=b"strange"))

    odd.on_submit, odd.script = store, [accepted("r-1")]
    job = await odd_world.submitter().submit(MODEL, PROMPT)
    assert (job.state, job.request_id) == ("submitted", "r-1")
    assert job.next_attempt_at is not None


@pytest.mark.parametrize(("key", "count"), [(LIVE, 50), (TEST, 20)], ids=["live", "test"])
async def test_webhooks_race_their_answers(world: World, sandbox: Sandbox, key: str, count: int) -> None:
    """C10, F11: in either order of webhook and answer each job ends, and no field of the answer is lost."""
    await sandbox.switch(duration=0.0, latency=0.01)
    async with working(world, key=key) as submitter:
        made = await asyncio.gather(*(submitter.submit(MODEL, PROMPT | {"sead": n}) for n in range(count)))
        await world.until(submitter, *["completed"] * count)

        async def forwarded() -> bool:
            return len(world.destination.events) == count

        await eventually(forwarded)
    assert all(job.new for job in made)
    generations = await sandbox.generations()
    done = (await submitter.list_jobs(limit=100)).jobs
    assert {job.request_id for job in done} == {each["request_id"] for each in generations}
    assert {(job.cost, job.charged) for job in done} == {(PRICE, PRICE if key == LIVE else 0)}
    assert {warning["parameter"] for job in done for warning in job.warnings} == {"sead"}
    assert [len(job.warnings) for job in done] == [1] * count
    assert {job.event.origin for job in done if job.event} == {"webhook"}
    named = [data["job"]["id"] for data in messages(world)]
    assert sorted(named) == sorted(str(job.id) for job in made)


async def test_a_test_key_is_done_at_once(world: World) -> None:
    """C10: Clipia's sandbox answers COMPLETED; without a webhook the first poll brings the result."""
    submitter = world.submitter(key=TEST)
    job = await submitter.submit(MODEL, PROMPT)
    await world.make_due()
    assert await world.run_lane(world.poll_lane(submitter)) == 1
    await world.forward()
    done = await show(submitter, job)
    assert (done.state, done.cost, done.charged) == ("completed", PRICE, 0)
    assert done.event is not None
    assert [(file.variant, file.state) for file in done.event.media] == [("original", "pending")]
    assert len(await world.rows(media)) == 1


# --- looking at jobs ---


async def test_a_job_is_found(world: World) -> None:
    """F8: a job is found by its id or by Clipia's; if a caller is given, only that caller's."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, caller="shop")
    assert job.request_id is not None
    for found in (
        await submitter.get(job.id),
        await submitter.get(job.id, caller="shop"),
        await submitter.find(job.request_id),
        await submitter.wait(job.id, seconds=0, caller="shop"),
    ):
        assert found is not None
        assert (found.id, found.new) == (job.id, False)
        assert orjson.loads(orjson.dumps(found.as_dict()))["id"] == str(job.id)
    assert await submitter.get(uuid.uuid4()) is None
    assert await submitter.get(job.id, caller="blog") is None
    assert await submitter.wait(job.id, seconds=1, caller="blog") is None
    assert await submitter.find("nobody") is None
    with pytest.raises(ClipiaUnavailable, match="vanished"):
        await submitter._show_or_raise(uuid.uuid4())


async def test_another_caller_s_job_takes_the_same_statements_as_none(world: World) -> None:
    """G3: the caller is part of the query, so its time does not tell a foreign job from a missing one."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, caller="shop")
    with statements() as theirs:
        assert await submitter.wait(job.id, seconds=60, caller="blog") is None
    with statements() as none:
        assert await submitter.wait(uuid.uuid4(), seconds=60, caller="blog") is None
    assert theirs == none
    assert len(theirs) == 1
    assert not await world.watched(job.id)
    with statements() as own:
        assert await submitter.get(job.id, caller="shop") is not None
    assert len(own) > 1


@contextmanager
def statements() -> Iterator[list[str]]:
    """Collect the statements that SQLAlchemy sends inside the block, except those that open connections."""
    found: list[str] = []

    def collect(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "jobs" in statement or "events" in statement or "attempts" in statement:
            found.append(statement)

    engine_events.listen(Engine, "before_cursor_execute", collect)
    try:
        yield found
    finally:
        engine_events.remove(Engine, "before_cursor_execute", collect)


async def test_jobs_are_listed_page_by_page(world: World) -> None:
    """Newest first, each once, and the last page says that it is the last."""
    submitter = world.submitter()
    made = [await submitter.submit(MODEL, PROMPT, metadata={"n": str(n)}) for n in range(5)]
    pages, cursor = [], None
    for _ in range(10):
        page = await submitter.list_jobs(limit=2, cursor=cursor)
        pages.append([job.metadata["n"] for job in page.jobs])
        cursor = page.next
        if cursor is None:
            break
    assert pages == [["4", "3"], ["2", "1"], ["0"]]
    whole = await submitter.list_jobs(limit=5)
    assert (len(whole.jobs), whole.next) == (5, None)
    assert whole.jobs[0].attempts == ()
    assert whole.jobs[0].request_id == made[-1].request_id
    for bad in ("-1", "x", "", "1" * 19, "\u0661"):
        error = await refusal(submitter.list_jobs(cursor=bad))
        assert (status_of(error), error.code) == (400, "invalid_request")


async def test_jobs_are_filtered(world: World, sandbox: Sandbox) -> None:
    """By caller, state, model, metadata and time, and by all of them together."""
    submitter = world.submitter()
    a = await submitter.submit(MODEL, PROMPT, caller="shop", metadata={"order": "1", "kind": "x"})
    b = await submitter.submit("suno-music", PROMPT, caller="blog", metadata={"order": "1"})
    await sandbox.switch(refuse_submits="service_unavailable")
    c = await submitter.submit(MODEL, PROMPT, caller="shop", metadata={"order": "2"})
    await world.set(jobs, where=jobs.c.id == a.id, created_at=db_time(-2 * HOUR))
    hour_ago = datetime.now(UTC) - timedelta(hours=1)

    async def found(**filters: Any) -> set[uuid.UUID]:
        return {job.id for job in (await submitter.list_jobs(**filters)).jobs}

    assert await found() == {a.id, b.id, c.id}
    assert await found(caller="shop") == {a.id, c.id}
    assert await found(caller="nobody") == set()
    assert await found(state="pending") == {c.id}
    assert await found(model="suno-music") == {b.id}
    assert await found(metadata={"order": "1"}) == {a.id, b.id}
    assert await found(metadata={"order": "1", "kind": "x"}) == {a.id}
    assert await found(metadata={"kind": "y"}) == set()
    assert await found(since=hour_ago) == {b.id, c.id}
    assert await found(until=hour_ago) == {a.id}
    assert await found(since=hour_ago, caller="shop", state="pending", model=MODEL) == {c.id}


async def test_metadata_may_have_any_name(world: World) -> None:
    """A metadata filter matches the literal name, even if the database has a special meaning for it."""
    submitter = world.submitter()
    names = ["a.b", "$[0]", "0", "a'b", "%", "ключ", 'a"b', "a\\b"]
    made = {name: (await submitter.submit(MODEL, PROMPT, metadata={name: f"ä{name}"})).id for name in names}
    found = {}
    for name in names:
        try:
            page = await submitter.list_jobs(metadata={name: f"ä{name}"})
            found[name] = [job.id for job in page.jobs]
        except DatabaseUnavailable:
            found[name] = []
    assert found == {name: [job_id] for name, job_id in made.items()}


@pytest.mark.usefixtures("frequent_checks")
async def test_waiting_ends_with_the_job_or_with_the_time(world: World, sandbox: Sandbox) -> None:
    """A waiting caller gets the job when it has ended, or when the seconds are over."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    began = time.monotonic()
    still = await submitter.wait(job.id, seconds=0.2)
    assert time.monotonic() - began >= 0.2
    assert still is not None
    assert (still.state, still.ended) == ("submitted", False)
    assert await submitter.wait(uuid.uuid4(), seconds=SECONDS) is None

    waiting = asyncio.create_task(submitter.wait(job.id, seconds=SECONDS))
    await eventually(lambda: world.watched(job.id))
    await sandbox.cancel(str(job.request_id))
    # Waiting changes when the job is due, too.
    while not waiting.done():
        await world.make_due()
        await world.run_lane(world.poll_lane(submitter))
        await world.forward()
        await asyncio.sleep(0.05)
    done = await waiting
    assert done is not None
    assert (done.state, done.ended) == ("canceled", True)
    async with asyncio.timeout(SECONDS):
        again = await submitter.wait(job.id, seconds=HOUR)
    assert again is not None
    assert (again.state, again.finished_at) == (done.state, done.finished_at)


@pytest.mark.usefixtures("frequent_checks")
async def test_waiting_includes_the_files(world: World, sandbox: Sandbox) -> None:
    """A job has not ended while its files are being downloaded."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    await world.make_due()
    await world.run_lane(world.poll_lane(submitter))
    await world.forward()
    began = time.monotonic()
    waited = await submitter.wait(job.id, seconds=0.3)
    assert time.monotonic() - began >= 0.3
    assert waited is not None
    assert (waited.state, waited.ended) == ("completed", False)
    assert waited.event is not None
    assert (waited.event.state, {file.state for file in waited.event.media}) == ("fetching", {"pending"})
    waiting = asyncio.create_task(submitter.wait(job.id, seconds=SECONDS))
    await world.set(events, state="ready")
    done = await waiting
    assert done is not None
    assert done.ended


@pytest.mark.usefixtures("frequent_checks")
async def test_any_number_may_wait(world: World, sandbox: Sandbox) -> None:
    """All waiting callers share one query, and hold no connection meanwhile."""
    submitter = world.submitter()
    made = [await submitter.submit(MODEL, PROMPT) for _ in range(3)]
    waiting: list[asyncio.Task[Job | None]] = []

    async def all_wait() -> bool:
        return sum(submitter._waiting._waiters.values()) == len(waiting)

    for _ in range(10):
        waiting += [asyncio.create_task(submitter.wait(job.id, seconds=SECONDS)) for job in made]
        await eventually(all_wait)
    async with AsyncExitStack() as stack:
        # The pooler of the tests allows two transactions at once.
        for _ in range(1 if world.database.statements and world.database.statements.is_pooled else 4):
            await stack.enter_async_context(world.database.read())
    async with world.database.write() as connection:
        await connection.execute(select(func.count()).select_from(jobs))
    for job in made:
        await sandbox.cancel(str(job.request_id))
    await world.make_due()
    await world.run_lane(world.poll_lane(submitter))
    await world.forward()
    done = await asyncio.gather(*waiting)
    assert [job.state for job in done if job is not None] == ["canceled"] * 30


@pytest.mark.parametrize("error", [DatabaseUnavailable("away", reason="database"), ZeroDivisionError("bug")])
@pytest.mark.usefixtures("frequent_checks")
async def test_waiting_outlives_an_outage(world: World, error: Exception) -> None:
    """If the database is away for a moment, or a bug occurs, callers go on waiting."""
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    waiting = asyncio.create_task(submitter.wait(job.id, seconds=SECONDS))
    await eventually(lambda: world.watched(job.id))
    looked = asyncio.Event()
    read = world.database.read

    def away() -> Any:
        looked.set()
        raise error

    world.database.read = away  # type: ignore[method-assign]  # replaced on purpose
    await looked.wait()
    world.database.read = read  # type: ignore[method-assign]  # replaced on purpose
    await world.set(jobs, state="unsure")
    done = await waiting
    assert done is not None
    assert done.state == "unsure"


# --- the ledger ---


async def test_the_costs_add_up(world: World, sandbox: Sandbox) -> None:
    """F13: each credit is reserved, then charged or refunded, by caller, model and day, as at Clipia."""
    submitter = world.submitter()
    poll = world.poll_lane(submitter)
    done = await submitter.submit(MODEL, PROMPT | {"num_images": 2}, caller="shop")
    canceled = await submitter.submit("suno-music", PROMPT, caller="shop")
    await sandbox.switch(fail_rate=1.0)
    failed = await submitter.submit(MODEL, PROMPT, caller="blog")
    await sandbox.switch(fail_rate=0.0)
    await sandbox.cancel(str(canceled.request_id))
    sandbox.end_all()
    await world.make_due()
    assert await world.run_lane(poll) == 3
    await sandbox.switch(duration=HOUR)
    open_ = await submitter.submit(MODEL, PROMPT, caller="blog")
    await sandbox.switch(refuse_submits="invalid_request")
    await refusal(submitter.submit(MODEL, PROMPT, caller="blog", max_cost=99))
    await sandbox.switch(refuse_submits="service_unavailable")
    await submitter.submit(MODEL, PROMPT, caller="blog", max_cost=99)

    charged = {job.id: (await show(submitter, job)).charged for job in (done, canceled, failed, open_)}
    assert charged == {done.id: 24, canceled.id: 0, failed.id: 0, open_.id: None}
    assert await submitter.costs(by="caller") == [
        {"caller": "blog", "jobs": 4, "reserved": 12, "charged": 0, "refunded": 12},
        {"caller": "shop", "jobs": 2, "reserved": 0, "charged": 24, "refunded": 30},
    ]
    assert await submitter.costs(by="model") == [
        {"model": MODEL, "jobs": 5, "reserved": 12, "charged": 24, "refunded": 12},
        {"model": "suno-music", "jobs": 1, "reserved": 0, "charged": 0, "refunded": 30},
    ]
    day = {"day": done.created_at.strftime("%Y-%m-%d"), "jobs": 6, "reserved": 12}
    assert await submitter.costs(by="day") == [day | {"charged": 24, "refunded": 42}]
    assert await submitter.costs(by="model", caller="shop") == [
        {"model": MODEL, "jobs": 1, "reserved": 0, "charged": 24, "refunded": 0},
        {"model": "suno-music", "jobs": 1, "reserved": 0, "charged": 0, "refunded": 30},
    ]

    account = await submitter.account()
    assert account["ledger_30d"] == {"jobs": 6, "reserved": 12, "charged": 24, "refunded": 42}
    assert (account["usage_30d"]["credits_spent"], account["difference_30d"]) == (24, 0)
    assert account["balance"] == {"credits": 100_000 - 24 - 12}
    assert account["limits"]["requests_per_minute"] == WITHOUT_LIMITS["rate_limit"]


async def test_costs_are_of_a_time(world: World) -> None:
    """F13: days are UTC days, and a range of time includes its start but not its end."""
    submitter = world.submitter()
    made = [await submitter.submit(MODEL, PROMPT) for _ in range(3)]
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    moments = [midnight - timedelta(seconds=1), midnight, midnight + timedelta(hours=23)]
    for job, moment in zip(made, moments, strict=True):
        await world.set(jobs, where=jobs.c.id == job.id, created_at=moment)
    days = [(row["day"], row["jobs"]) for row in await submitter.costs(by="day")]
    assert days == [("2026-02-28", 1), ("2026-03-01", 2)]
    of_march = await submitter.costs(by="caller", since=midnight)
    of_february = await submitter.costs(by="caller", until=midnight)
    assert [row["reserved"] for row in of_march + of_february] == [24, 12]
    assert await submitter.costs(by="caller", since=midnight + timedelta(days=1)) == []


async def test_charges_of_other_clients_show(odd_world: World, odd: OddClipia) -> None:
    """F13: a difference between the charges at Clipia and those of the jobs is shown."""
    submitter = odd_world.submitter()
    odd.others = lambda _request: answer(content={"account_id": "a", "usage_30d": {"credits_spent": 30}})
    assert (await submitter.account())["difference_30d"] == 30
    odd.others = lambda _request: answer(content={"account_id": "a", "usage_30d": None})
    assert (await submitter.account())["difference_30d"] is None
    odd.others = lambda _request: answer(content={"account_id": "a"})
    assert (await submitter.account())["difference_30d"] is None


async def test_a_test_key_spends_nothing(world: World) -> None:
    """F13: jobs of a test key have a price, but are not charged."""
    submitter = world.submitter(key=TEST)
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.cost) == ("submitted", PRICE)
    await world.make_due()
    await world.run_lane(world.poll_lane(submitter))
    assert (await show(submitter, job)).charged == 0
    (row,) = await submitter.costs(by="caller")
    assert row == {"caller": "local", "jobs": 1, "reserved": 0, "charged": 0, "refunded": 0}


# --- helpers ---


def messages(world: World) -> list[Any]:
    """Return the data of the messages that were delivered."""
    return [message.get_data() for message in world.destination.events]


@asynccontextmanager
async def working(world: World, *, key: str) -> AsyncIterator[Submitter]:
    """Run a worker with the lanes of jobs and of one destination inside the block."""
    wakeups = Wakeups()
    submitter = world.submitter(key=key, public_url=await world.serve_callback(), wake=wakeups.wake)
    # The schema of this model is unknown, so the check passes and Clipia warns.
    submitter.catalogue._cache._answers[f"model {MODEL}"] = (time.monotonic(), {"slug": MODEL})
    assert submitter.lane is not None
    lanes: list[Lane] = [submitter.lane, world.poll_lane(submitter), world.delivery_lane(wake=wakeups.wake)]
    async with running(Worker(world.fan_out(wake=wakeups.wake), lanes, wakeups)):
        yield submitter
