"""Jobs that Clipia refuses for now, beside jobs that it accepts, on both databases."""

import time
from typing import Any

import orjson
import pytest
from support.clipia import (
    MODEL,
    PRICE,
    PROMPT,
    OddClipia,
    Request,
    Sandbox,
    World,
    accepted,
    answer,
    error_code,
    refusal,
    refused,
    show,
)

from receiver.api.answers import status_of
from receiver.clipia.client import boot_clock
from receiver.core import retry
from receiver.core.quota import REFUSED_SHARE
from receiver.db.clock import db_time
from receiver.db.tables import accounts, jobs
from receiver.lanes import submit_records
from receiver.submitter import Job, Submitter

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOUR = 3600.0
EXPENSIVE = "seedance-2-fast-t2v"
"""A model with a price of 80 credits for eight seconds."""
EIGHT_SECONDS = {"prompt": "a cat", "duration": 8}
BALANCE = 50


async def submit_expensive(submitter: Submitter, count: int) -> list[Job]:
    """Submit jobs that the account cannot pay."""
    return [await submitter.submit(EXPENSIVE, EIGHT_SECONDS, caller="films") for _ in range(count)]


async def submit_unattempted(world: World, submitter: Submitter, *asked: tuple[str, dict[str, Any]]) -> None:
    """Commit jobs while the account has no calls left, as in a burst."""
    for model, given in asked:
        await world.set(accounts, submits_after=time.time() + HOUR)
        job = await submitter.submit(model, given, caller="films")
        assert (job.state, job.attempts) == ("pending", ())


async def states(world: World, model: str) -> list[str]:
    """Return the states of a model's jobs."""
    return [row["state"] for row in await world.rows(jobs) if row["model"] == model]


async def test_a_refused_job_holds_up_no_other(world: World, sandbox: Sandbox) -> None:
    """F6: twelve jobs that the account cannot pay wait, each on its own; one that it can pay is accepted."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter()
    expensive = await submit_expensive(submitter, 12)
    assert {(job.state, error_code(job)) for job in expensive} == {("pending", "insufficient_credits")}
    assert len(await sandbox.submits()) == 12
    assert not await submitter.paused()
    assert (await submitter.account())["limits"]["refused_jobs"] == 12
    cheap = await submitter.submit(MODEL, PROMPT)
    assert (cheap.state, cheap.cost) == ("submitted", PRICE)

    # Even if the refused ones are due again.
    await world.set(jobs, where=jobs.c.state == "pending", next_attempt_at=db_time(-HOUR))
    cheap = await submitter.submit(MODEL, PROMPT)
    assert (cheap.state, cheap.cost) == ("submitted", PRICE)
    assert {(await show(submitter, job)).state for job in expensive} == {"pending"}


CHEAP: list[tuple[str, dict[str, Any]]] = [(MODEL, PROMPT), (EXPENSIVE, {"prompt": "a dog", "duration": 4})]


@pytest.mark.parametrize(("model", "given"), CHEAP, ids=["another model", "the same model"])
async def test_a_backlog_that_cannot_be_paid_holds_up_no_job(
    world: World, sandbox: Sandbox, model: str, given: dict[str, Any]
) -> None:
    """F6: if a burst has thirty unpayable jobs without an attempt, a payable one is at most the third."""
    await sandbox.switch(credits=BALANCE, rate_limit=60)
    submitter = world.submitter()
    await submit_expensive(submitter, 1)
    await submit_unattempted(world, submitter, *[(EXPENSIVE, EIGHT_SECONDS)] * 30, (model, given))
    before = len(await sandbox.submits())
    # The refused one is due again as well.
    await world.retry(submitter)
    taken = [row for row in await world.rows(jobs) if row["state"] == "submitted"]
    assert [(row["model"], row["cost"]) for row in taken] == [(model, PRICE if model == MODEL else 40)]
    assert len(await sandbox.submits()) - before <= 3


FOUR_SECONDS = {"prompt": "a dog", "duration": 4}
"""A cheaper input of the expensive model."""


async def test_every_class_of_jobs_has_a_share(odd_world: World, odd: OddClipia) -> None:
    """F6: if there is one free place at a time, other jobs delay a payable job only by a few rounds.

    The others are jobs of other models, which the account can pay, and newer jobs of the same model.
    """
    odd.script = [lambda: refused(402, "insufficient_credits") if b":8" in odd.posts[-1].body else accepted()]
    submitter = odd_world.submitter()
    (expensive,) = await submit_expensive(submitter, 1)
    await odd_world.set(accounts, in_flight_limit=1000)
    await submit_unattempted(odd_world, submitter, *[(EXPENSIVE, FOUR_SECONDS)] * 10)
    waiting = [row["id"] for row in await odd_world.rows(jobs)][1:]
    assert submitter.lane is not None
    attempted = []
    for number in range(24):
        await submit_unattempted(odd_world, submitter, (MODEL, PROMPT), (EXPENSIVE, FOUR_SECONDS))
        newest = (await odd_world.rows(jobs))[-1]["id"]
        await odd_world.set(accounts, submits_after=0.0, submits_until=0.0)
        await odd_world.set(jobs, where=jobs.c.id == expensive.id, next_attempt_at=db_time(-HOUR + number))
        (work,) = await submitter.lane.claim(1)
        await work.run()
        attempted.append("newest" if work.claim.id == newest else work.claim.id)
    refused_rounds = [number for number, each in enumerate(attempted) if each == expensive.id]
    assert refused_rounds == [7, 15, 23]
    assert [each for each in attempted if each in waiting] == waiting[:3]
    assert [number for number, each in enumerate(attempted) if each == "newest"] == [1, 5, 9, 13, 17, 21]
    # The rest are the other jobs, in their order of arrival.
    assert len(await states(odd_world, MODEL)) == 24
    assert (await states(odd_world, MODEL))[:12] == ["submitted"] * 12


async def test_a_class_gives_away_its_share(odd_world: World, odd: OddClipia) -> None:
    """F6: no places are kept free for absent jobs."""
    odd.script = [refused(402, "insufficient_credits"), accepted]
    submitter = odd_world.submitter()
    await submit_expensive(submitter, 1)
    await odd_world.set(jobs, next_attempt_at=db_time(HOUR))
    await odd_world.set(accounts, in_flight_limit=1000)
    await submit_unattempted(odd_world, submitter, *[(EXPENSIVE, FOUR_SECONDS)] * 16)
    await odd_world.set(accounts, submits_after=0.0, submits_until=0.0)
    assert await odd_world.run_lane(submitter.lane) == 16


@pytest.mark.parametrize("was_sent", [False, True])
async def test_a_refused_job_ends_without_a_free_place(
    world: World, sandbox: Sandbox, *, was_sent: bool
) -> None:
    """F6: if there is no free place for a last attempt, a refused job still ends; others do not."""
    await sandbox.switch(refuse_submits="insufficient_credits")
    submitter = world.submitter()
    job, fresh = [await submitter.submit(MODEL, PROMPT) for _ in range(2)]
    await world.set(accounts, submits_after=time.time() + HOUR)
    overdue = {"refused_at": db_time(-retry.DAY - HOUR), "sent_at": db_time(-HOUR) if was_sent else None}
    for late, state in ((10.0, "pending"), (310.0, "unsure" if was_sent else "failed")):
        await world.set(jobs, next_attempt_at=db_time(-late))
        await world.set(jobs, where=jobs.c.id == job.id, **overdue)
        assert await world.run_lane(submitter.lane) == 0
        assert (await show(submitter, job)).state == state
    ended = await show(submitter, job)
    assert (error_code(ended), ended.charged) == ("insufficient_credits", None if was_sent else 0)
    assert (ended.next_attempt_at, ended.finished_at is not None) == (None, True)
    assert (await show(submitter, fresh)).state == "pending"
    assert len(await sandbox.submits()) == 2


async def test_refused_jobs_are_tried_last_and_rest_longer_and_longer(world: World, sandbox: Sandbox) -> None:
    """F6: a job waits about as long as it has been refused, at most five minutes."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter()
    await submit_expensive(submitter, 1)
    assert 4.9 <= await world.retry_delay() <= 10.1
    for refused_for, least, most in ((20.0, 19.0, 41.0), (100.0, 99.0, 202.0), (9 * HOUR, 149.0, 301.0)):
        await world.set(jobs, refused_at=db_time(-refused_for))
        assert await world.retry(submitter) == 1
        assert least <= await world.retry_delay() <= most
    row = await world.job()
    assert (row["sent_at"], row["state"]) == (None, "pending")
    assert json_code(row) == "insufficient_credits"


async def test_many_refused_jobs_share_few_calls(world: World, sandbox: Sandbox) -> None:
    """F7: all refused jobs together have a tenth of the requests: if there are more, each waits longer."""
    await sandbox.switch(credits=BALANCE, rate_limit=60)
    submitter = world.submitter()
    jobs_ = [job.id for job in await submit_expensive(submitter, 2)]
    await world.set(jobs, where=jobs.c.id == jobs_[0], refused_at=db_time(-1.0))
    (first,) = [row for row in await world.rows(jobs) if row["id"] == jobs_[1]]
    rests = (first["next_attempt_at"] - first["updated_at"]).total_seconds()
    assert rests >= 2 * 60.0 / (60 * REFUSED_SHARE) - 0.1


async def test_a_top_up_resumes_all_that_were_refused(world: World, sandbox: Sandbox) -> None:
    """F6: if a refused job is accepted, the other refused jobs are due at once."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter()
    expensive = await submit_expensive(submitter, 5)
    await world.set(jobs, next_attempt_at=db_time(HOUR))
    await sandbox.switch(credits=10_000)
    await world.set(accounts, in_flight_limit=50)
    # If a new job is accepted, the refused ones are not due.
    assert (await submitter.submit(MODEL, PROMPT)).state == "submitted"
    assert await world.run_lane(submitter.lane) == 0
    await world.set(jobs, where=jobs.c.id == expensive[3].id, next_attempt_at=db_time(-1.0))
    assert await world.run_lane(submitter.lane) == 1
    assert await world.run_lane(submitter.lane) == 4
    assert await states(world, EXPENSIVE) == ["submitted"] * 5
    assert [row["refused_at"] for row in await world.rows(jobs)] == [None] * 6
    assert (await submitter.account())["limits"]["refused_jobs"] == 0


@pytest.mark.parametrize("code", ["insufficient_credits", "subscription_required", "insufficient_scope"])
async def test_a_refused_job_ends(world: World, sandbox: Sandbox, code: str) -> None:
    """F6: after a day a job fails with Clipia's error, costs no credits, and does not affect the others."""
    await sandbox.switch(refuse_submits=code)
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT, idempotency_key="k")
    await submitter.submit(MODEL, PROMPT, idempotency_key="other")
    for refused_for, state in ((retry.DAY - 60, "pending"), (retry.DAY + 1, "failed")):
        await world.set(jobs, where=jobs.c.id == job.id, refused_at=db_time(-refused_for))
        await world.retry(submitter)
        job = await show(submitter, job)
        assert (job.state, error_code(job)) == (state, code)
    assert (job.charged, job.next_attempt_at) == (0, None)
    error = await refusal(submitter.submit(MODEL, PROMPT, idempotency_key="k"))
    assert (error.code, status_of(error), error.job_id) == (
        code,
        job.error and job.error["status"],
        str(job.id),
    )
    assert sorted(await states(world, MODEL)) == ["failed", "pending"]


async def test_the_last_attempt_is_at_the_end(world: World, sandbox: Sandbox) -> None:
    """F6: even if many others are refused, a job does not wait beyond its end."""
    await sandbox.switch(refuse_submits="insufficient_credits")
    submitter = world.submitter(refused_give_up_after=100.0)
    await submitter.submit(MODEL, PROMPT)
    await world.set(jobs, refused_at=db_time(-90.0))
    assert await world.retry(submitter) == 1
    assert await world.retry_delay() == pytest.approx(10.0, abs=1.0)


async def test_a_refused_job_may_end_at_once(world: World, sandbox: Sandbox) -> None:
    """F6: with a limit of 0 the caller gets Clipia's error, and a cheaper job is accepted."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter(refused_give_up_after=0.0)
    error = await refusal(submitter.submit(EXPENSIVE, EIGHT_SECONDS))
    assert (error.code, status_of(error), error.type) == ("insufficient_credits", 402, "billing_error")
    assert (await submitter.submit(MODEL, PROMPT)).state == "submitted"
    assert await states(world, EXPENSIVE) == ["failed"]


async def test_a_refused_job_that_may_have_arrived_does_not_fail(world: World, sandbox: Sandbox) -> None:
    """F4, F5: if an earlier attempt may have been carried out, the job ends as unsure and is not repeated."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter(refused_give_up_after=HOUR)
    job = await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(refuse_submits="insufficient_credits")
    await world.retry(submitter)
    await world.set(jobs, refused_at=db_time(-2 * HOUR))
    await world.retry(submitter)
    shown = await show(submitter, job)
    assert (shown.state, error_code(shown), shown.charged) == ("unsure", "insufficient_credits", None)


async def test_a_firewall_refuses_no_account(odd_world: World, odd: OddClipia) -> None:
    """F5, F6: 401 to 403 without Clipia's error are from a proxy: the job is retried, without a pause."""
    submitter = odd_world.submitter()
    for status in (401, 402, 403):
        odd.script = [answer(status, b"<html>Blocked.</html>"), accepted]
        job = await submitter.submit(MODEL, PROMPT)
        assert (job.state, error_code(job)) == ("pending", f"http_{status}")
        await odd_world.set(jobs, where=jobs.c.id == job.id, next_attempt_at=db_time(HOUR))
        assert not await submitter.paused()
        assert (await submitter.submit(MODEL, PROMPT)).state == "submitted"
        await odd_world.retry(submitter)
        assert (await show(submitter, job)).state == "submitted"


async def test_a_new_job_is_the_probe_of_a_paused_account(odd_world: World, odd: OddClipia) -> None:
    """F6: after a 401, the probe is a job that was not refused yet."""
    odd.script = [refused(402, "insufficient_credits"), refused(401, "invalid_api_key")]
    submitter = odd_world.submitter()
    old = await submitter.submit(EXPENSIVE, EIGHT_SECONDS, caller="films")
    new = await submitter.submit(MODEL, PROMPT)
    assert await submitter.paused()
    odd.script = [accepted("r-1")]
    assert await odd_world.retry(submitter) == 1
    assert [(await show(submitter, job)).state for job in (old, new)] == ["pending", "submitted"]
    assert not await submitter.paused()


VERDICTS = {
    "a price": refused(402, "insufficient_credits"),
    "a mistake": refused(400, "invalid_request"),
    "a model": refused(404, "model_not_found"),
}


@pytest.mark.parametrize("name", VERDICTS)
async def test_a_processed_probe_ends_the_pause(odd_world: World, odd: OddClipia, name: str) -> None:
    """F6: if only the probe's job is refused, the account is accepted again, and the rest is sent."""
    odd.script = [refused(401, "invalid_api_key")]
    submitter = odd_world.submitter()
    await submitter.submit(EXPENSIVE, EIGHT_SECONDS)
    await submitter.submit(MODEL, PROMPT)
    odd.script = [VERDICTS[name], accepted("r-1")]
    assert await odd_world.retry(submitter) == 1
    assert not await submitter.paused()
    assert await odd_world.run_lane(submitter.lane) == 1
    assert await states(odd_world, MODEL) == ["submitted"]


@pytest.mark.parametrize("said", [refused(503, "service_unavailable"), answer(403, b"<html>"), b""])
async def test_a_probe_without_a_verdict_ends_no_pause(odd_world: World, odd: OddClipia, said: bytes) -> None:
    """F6: an outage, a firewall or a timeout tells nothing about the account: the next probe is later."""
    odd.script = [refused(401, "invalid_api_key"), said]
    submitter = odd_world.submitter()
    for model in (MODEL, EXPENSIVE):
        await submitter.submit(model, PROMPT)
    assert await odd_world.retry(submitter) == 1
    assert await submitter.paused()
    await odd_world.set(jobs, next_attempt_at=db_time(-1.0))
    assert await odd_world.run_lane(submitter.lane) == 0


async def test_a_job_that_ends_without_an_answer_ends_no_pause(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4, F6: if a probe is the last attempt at its job and gets no answer, the account stays paused."""
    odd.script = [refused(503, "service_unavailable"), refused(401, "invalid_api_key")]
    submitter = odd_world.submitter()
    job = await submitter.submit(EXPENSIVE, PROMPT)
    await odd_world.set(jobs, next_attempt_at=db_time(HOUR))
    await submitter.submit(MODEL, PROMPT)
    assert await submitter.paused()
    await odd_world.make_due()
    await odd_world.set(jobs, where=jobs.c.id != job.id, next_attempt_at=db_time(HOUR))
    await odd_world.set(jobs, where=jobs.c.id == job.id, sent_at=db_time(60.0 - retry.KEY_VALID_SECONDS))
    ahead = [0.0]
    monkeypatch.setattr(submit_records, "boot_clock", lambda: boot_clock() + ahead[0])

    async def take_long(_request: Request) -> None:
        ahead[0] = HOUR

    odd.on_submit, odd.script = take_long, [refused(503, "service_unavailable")]
    assert await odd_world.run_lane(submitter.lane) == 1
    assert (await show(submitter, job)).state == "unsure"
    assert await submitter.paused()


MODELS = (MODEL, EXPENSIVE, "suno-music")


async def test_an_account_counts_as_refused_if_all_jobs_are(odd_world: World, odd: OddClipia) -> None:
    """F6: a pause begins after several models and prices without a success, and ends with a success."""
    odd.script = [refused(402, "insufficient_credits", "Top up.")]
    submitter = odd_world.submitter()
    for _ in range(4):
        await submitter.submit(MODEL, PROMPT)
    assert not await submitter.paused()
    for model in MODELS[1:]:
        await submitter.submit(model, PROMPT)
    standing = await submitter.standing()
    assert (standing.paused, standing.refused_jobs) == (True, 6)
    assert standing.pause is not None
    assert "Top up." in standing.pause

    # Even so, a job that the account can pay is accepted at once.
    odd.script = [accepted("r-1"), refused(402, "insufficient_credits")]
    assert (await submitter.submit(MODEL, PROMPT, caller="other")).state == "submitted"
    assert not await submitter.paused()
    for model in MODELS:
        await submitter.submit(model, PROMPT)
    assert await submitter.paused()
    await odd_world.set(jobs, where=jobs.c.state == "pending", state="failed", next_attempt_at=None)
    assert not await submitter.paused()


async def test_a_test_keys_refusals_are_not_the_live_accounts(odd_world: World, odd: OddClipia) -> None:
    """A17: refusals of a test key neither delay nor count for the live one."""
    odd.script = [refused(402, "insufficient_credits")]
    tests = odd_world.submitter(key="clipia_test_kit")
    for model in MODELS:
        await tests.submit(model, PROMPT)
    live = odd_world.submitter()
    assert await tests.paused()
    assert not await live.paused()
    assert (await live.standing()).refused_jobs == 0


# --- the end that a person decides ---


async def test_a_job_that_was_never_sent_can_be_canceled(world: World, sandbox: Sandbox) -> None:
    """F6: an operator can cancel a job that Clipia refuses, or that waits for another key."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter()
    (job,) = await submit_expensive(submitter, 1)
    done = await submitter.cancel(job.id, by="ops")
    assert (done.state, done.charged, error_code(done), done.next_attempt_at) == (
        "canceled",
        0,
        "canceled",
        None,
    )
    assert [(each.outcome, each.error and each.error["message"]) for each in done.attempts][-1] == (
        "canceled",
        "by ops",
    )
    assert await world.retry(submitter) == 0
    assert (await submitter.standing()).refused_jobs == 0
    again = await refusal(submitter.cancel(job.id, by="ops"))
    assert (again.code, status_of(again)) == ("not_cancelable", 409)
    await sandbox.switch(credits=10_000)
    await submitter.resubmit(job.id, by="ops")
    await world.retry(submitter)
    assert (await show(submitter, job)).state == "submitted"


async def test_a_job_that_clipia_may_have_becomes_unsure(world: World, sandbox: Sandbox) -> None:
    """F5: Clipia has no cancel: a canceled job that may be running is unsure, and its event ends it."""
    await sandbox.switch(lost_answer_rate=1.0)
    submitter = world.submitter()
    sent = await submitter.submit(MODEL, PROMPT)
    await sandbox.switch(lost_answer_rate=0.0)
    await world.set(jobs, next_attempt_at=db_time(HOUR))
    taken = await submitter.submit(MODEL, PROMPT, caller="other")
    for job in (sent, taken):
        done = await submitter.cancel(job.id, by="ops")
        assert (done.state, done.charged, error_code(done)) == ("unsure", None, "canceled")
    assert await world.retry(submitter) == 0
    assert await world.run_lane(world.poll_lane(submitter)) == 0
    # An operator has checked whether it exists.
    done = await submitter.cancel(sent.id, by="ops")
    assert (done.state, done.charged) == ("canceled", 0)


async def test_a_job_that_is_at_clipia_just_now_is_not_canceled(world: World, sandbox: Sandbox) -> None:
    """F1: the answer to a submission in flight decides first; a lost claim does not prevent it."""
    await sandbox.switch(credits=BALANCE)
    submitter = world.submitter()
    (job,) = await submit_expensive(submitter, 1)
    await world.make_due()
    assert submitter.lane is not None
    (work,) = await submitter.lane.claim(1)
    assert (await refusal(submitter.cancel(job.id, by="ops"))).code == "not_cancelable"
    await world.set(jobs, next_attempt_at=db_time(-1.0))
    assert (await submitter.cancel(job.id, by="ops")).state == "unsure"
    await work.run()
    assert (await show(submitter, job)).state == "unsure"


def json_code(row: dict[str, Any]) -> Any:
    """Return the code of a row's error."""
    return orjson.loads(row["error"])["code"]
