"""A webhook ends a job by its path, its token, or the answer to its submission; on both databases."""

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from support.clipia import (
    LIVE,
    MODEL,
    PROMPT,
    SECONDS,
    OddClipia,
    Request,
    World,
    accepted,
    error_code,
    eventually,
    path_token,
    post,
    refused,
    show,
)
from support.events import running
from support.payloads import SECRET, body

from receiver.app import create_app
from receiver.db import export_import, job_events, reads
from receiver.db.clock import db_time
from receiver.db.tables import events, jobs
from receiver.lanes.base import Lane
from receiver.lanes.worker import Wakeups, Worker
from receiver.sandbox import running as serving
from receiver.settings import Settings
from receiver.submitter import Job, Submitter

pytestmark = pytest.mark.asyncio(loop_scope="module")

Arrive = Callable[[str], Awaitable[None]]


def own_url(request: Request) -> str:
    """Return the callback URL of a submission."""
    url: str = json.loads(request.body)["webhook_url"]
    return url


def without_token(url: str) -> str:
    """Return the path without a token, as in older releases: the id is not secret."""
    return re.sub(r"\.[^./]*$", "", url)


def with_wrong_token(url: str) -> str:
    """Return the path with a token that is nearly right."""
    return url[:-1] + ("A" if url[-1] != "A" else "B")


WAYS: dict[str, Callable[[str], str]] = {
    "the job's id": without_token,
    "an empty token": lambda url: without_token(url) + ".",
    "a wrong token": with_wrong_token,
    "half a token": lambda url: url[:-8],
    "a longer token": lambda url: url + "A",
}
"""Paths that an attacker can write if he knows a job's id."""


async def linked(world: World) -> dict[str, str | None]:
    """Return the job that each event is shown and forwarded with, by `request_id`."""
    async with world.database.read() as connection:
        rows = await reads.list_events(connection, limit=100)
    data: list[Any] = [message.get_data() for message in world.destination.events]
    sent = {each["request_id"]: each["job"] and each["job"]["id"] for each in data}
    shown = {row["request_id"]: str(row["job_id"]) if row["job_id"] else None for row in rows}
    assert sent == shown
    return shown


# --- another generation's webhook ---


@pytest.mark.parametrize("way", WAYS)
async def test_a_foreign_webhook_ends_no_job_without_its_token(
    odd_world: World, odd: OddClipia, way: str
) -> None:
    """A15, C10: an attacker with a job's id cannot end it with another generation's result."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())

    async def interfere(request: Request) -> None:
        await post(WAYS[way](own_url(request)), body("r-foreign"))
        await odd_world.forward()
        assert (await odd_world.job())["state"] == "pending"
        assert len(odd_world.destination.events) == 1, "it does not name the job, so it must not wait"

    odd.on_submit, odd.script = interfere, [accepted("r-own")]
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.request_id, job.event) == ("submitted", "r-own", None)
    await post(own_url(odd.posts[0]), body("r-own"))
    await odd_world.forward()
    assert (await show(submitter, job)).state == "completed"
    assert await linked(odd_world) == {"r-foreign": None, "r-own": str(job.id)}


async def test_the_answer_decides_about_a_webhook(odd_world: World, odd: OddClipia) -> None:
    """C10: an event on the job's own path waits for the answer, which may name another generation."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())

    async def interfere(request: Request) -> None:
        await post(own_url(request), body("r-foreign"))
        await odd_world.forward()
        assert ((await odd_world.job())["state"], odd_world.destination.events) == ("pending", [])

    odd.on_submit, odd.script = interfere, [accepted("r-own")]
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.request_id) == ("submitted", "r-own")
    await odd_world.forward()
    assert await linked(odd_world) == {"r-foreign": None}
    await post(own_url(odd.posts[0]), body("r-own"))
    await odd_world.forward()
    assert await linked(odd_world) == {"r-foreign": None, "r-own": str(job.id)}
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.charged) == ("completed", "r-own", 12)


async def test_the_retry_decides_after_a_lost_answer(odd_world: World, odd: OddClipia) -> None:
    """F5, C10: if an attempt gets no answer, the next one, with the same key, decides about the event."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    odd.script = [refused(504, "service_unavailable"), accepted("r-own")]
    job = await submitter.submit(MODEL, PROMPT)
    assert job.state == "pending"
    url = own_url(odd.posts[0])
    for request_id in ("r-foreign", "r-own"):
        await post(url, body(request_id))
    await odd_world.forward()
    assert ((await odd_world.job())["state"], odd_world.destination.events) == ("pending", [])
    assert await odd_world.retry(submitter) == 1
    assert len({each.headers["idempotency-key"] for each in odd.posts}) == 1
    done = await show(submitter, job)
    assert (done.state, done.request_id) == ("completed", "r-own")
    await odd_world.forward()
    assert await linked(odd_world) == {"r-foreign": None, "r-own": str(job.id)}


async def test_a_late_answer_takes_a_foreign_result_back(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: if the path has decided because there was no answer, a later answer still decides."""
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())

    async def interfere(request: Request) -> None:
        await post(own_url(request), body("r-foreign"))
        await odd_world.forward()
        row = await odd_world.job()
        assert (row["state"], row["request_id"]) == ("completed", "r-foreign")

    odd.on_submit, odd.script = interfere, [accepted("r-own", warnings=[{"code": "x"}])]
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.request_id, job.charged, job.finished_at) == ("submitted", "r-own", None, None)
    assert (job.event, job.warnings, job.next_attempt_at is None) == (None, [{"code": "x"}], False)
    await post(own_url(odd.posts[0]), body("r-own"))
    await odd_world.forward()
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.charged) == ("completed", "r-own", 12)
    assert done.event is not None


async def test_a_late_answer_with_a_result_that_is_there_ends_the_job(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: if both results arrive before the answer, the job ends with the one in the answer."""
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())

    async def interfere(request: Request) -> None:
        for request_id in ("r-foreign", "r-own"):
            await post(own_url(request), body(request_id))
            await odd_world.forward()

    odd.on_submit, odd.script = interfere, [accepted("r-own")]
    job = await submitter.submit(MODEL, PROMPT)
    assert (job.state, job.request_id) == ("completed", "r-own")


async def test_a_job_that_has_its_request_takes_no_other(odd_world: World, odd: OddClipia) -> None:
    """C10: after the answer, an event on the path with another request_id is separate."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    odd.script = [accepted("r-own")]
    job = await submitter.submit(MODEL, PROMPT)
    for url in (own_url(odd.posts[0]), without_token(own_url(odd.posts[0]))):
        await post(url, body())
    await odd_world.forward()
    assert set((await linked(odd_world)).values()) == {None}
    assert (await show(submitter, job)).state == "submitted"


# --- unsure ---


async def make_unsure(world: World, odd: OddClipia, submitter: Submitter) -> Job:
    """Return a job in the state `unsure`, which is not submitted again."""
    odd.script = [refused(504, "service_unavailable"), refused(400, "invalid_request")]
    job = await submitter.submit(MODEL, PROMPT)
    assert await world.retry(submitter) == 1
    unsure = await show(submitter, job)
    assert (unsure.state, unsure.request_id) == ("unsure", None)
    return unsure


@pytest.mark.parametrize("way", WAYS)
async def test_a_foreign_webhook_ends_no_unsure_job(odd_world: World, odd: OddClipia, way: str) -> None:
    """A15, F4: if a job is unsure, an attacker with its id cannot end it."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    job = await make_unsure(odd_world, odd, submitter)
    await post(WAYS[way](own_url(odd.posts[0])), body("r-foreign"))
    await odd_world.forward()
    assert (await show(submitter, job)).state == "unsure"
    assert await linked(odd_world) == {"r-foreign": None}


async def test_the_token_ends_an_unsure_job(odd_world: World, odd: OddClipia) -> None:
    """F4: if no answer is possible, the event on the path with the token belongs to the job."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    job = await make_unsure(odd_world, odd, submitter)
    await post(own_url(odd.posts[0]), body("r-own"))
    await odd_world.forward()
    done = await show(submitter, job)
    assert (done.state, done.request_id, done.error) == ("completed", "r-own", None)
    assert await linked(odd_world) == {"r-own": str(job.id)}


# --- jobs of releases before ---


async def test_jobs_of_the_release_before_find_their_results(odd_world: World, odd: OddClipia) -> None:
    """C10: if a job has no token, its path is the id alone, and ends it, answered, unanswered or unsure."""
    callback = await odd_world.serve_callback()
    submitter = odd_world.submitter(public_url=callback)
    odd.script = [accepted("r-0"), refused(504, "service_unavailable"), refused(504, "service_unavailable")]
    odd.script.append(accepted("r-1"))
    made = []
    for _ in range(3):
        made.append(await submitter.submit(MODEL, PROMPT))
        # The third is sent only if the second is not due again: older jobs go first.
        await odd_world.set(jobs, where=jobs.c.next_attempt_at.is_not(None), next_attempt_at=db_time(60.0))
    await odd_world.set(jobs, path_token=None)
    await odd_world.set(jobs, where=jobs.c.id == made[2].id, state="unsure", next_attempt_at=None)
    for number, job in enumerate(made):
        await post(f"{callback}/clipia/webhook/clipia/{job.id}", body(f"r-{number}"))
    await odd_world.forward()
    assert [(await show(submitter, job)).state for job in made] == ["completed", "pending", "completed"]
    assert await odd_world.retry(submitter) == 1
    await odd_world.forward()
    assert [(await show(submitter, job)).state for job in made] == ["completed"] * 3
    assert await linked(odd_world) == {f"r-{number}": str(job.id) for number, job in enumerate(made)}


# --- two jobs, one request_id ---


async def test_a_request_id_of_two_jobs(odd_world: World, odd: OddClipia) -> None:
    """C10, F5: if Clipia answers two jobs alike, the second is unsure with a reason, and never a 500."""
    odd.script = [accepted("r-1")]
    submitter = odd_world.submitter()
    first = await submitter.submit(MODEL, PROMPT, idempotency_key="a")
    second = await submitter.submit(MODEL, PROMPT, idempotency_key="b")
    assert (first.state, first.request_id) == ("submitted", "r-1")
    assert (second.state, error_code(second), second.request_id) == ("unsure", "request_id_taken", None)
    assert "r-1" in str(second.error)
    again = await submitter.submit(MODEL, PROMPT, idempotency_key="b")
    assert (again.id, again.state, len(odd.posts)) == (second.id, "unsure", 2)


async def test_racing_answers_with_one_request_id_make_one_job_its_owner(
    odd_world: World, odd: OddClipia
) -> None:
    """C10: if four concurrent answers have one request_id, one job gets it, and the others are unsure."""
    everybody = asyncio.Barrier(4)  # the in-flight limit at the start

    async def together(_request: Request) -> None:
        await everybody.wait()

    odd.on_submit, odd.script = together, [accepted("r-1")]
    submitters = [odd_world.submitter(), odd_world.submitter()]
    async with asyncio.timeout(SECONDS * 2):
        made = await asyncio.gather(*(submitters[n % 2].submit(MODEL, PROMPT) for n in range(4)))
    assert sorted(job.state for job in made) == ["submitted"] + ["unsure"] * 3
    assert {error_code(job) for job in made} == {None, "request_id_taken"}


async def test_the_api_answers_a_taken_request_id(odd: OddClipia, database_url: str) -> None:
    """F5: over HTTP the second job is a 202 with the state `unsure` and the reason."""
    odd.script = [accepted("r-1")]
    settings = Settings.load(
        database_url=database_url,
        clipia_webhook_secret=SECRET,
        clipia_key=LIVE,
        clipia_base_url=odd.url,
        api_tokens="shop:token-of-the-shop-0123456789:submit+read",
    )
    async with (
        serving(create_app(settings, worker=False)) as url,
        httpx.AsyncClient(
            base_url=url, headers={"Authorization": "Bearer token-of-the-shop-0123456789"}, timeout=60
        ) as client,
    ):
        answers = [await client.post("/v1/jobs", json={"model": MODEL, "input": PROMPT}) for _ in range(2)]
    assert [each.status_code for each in answers] == [201, 202]
    shown = answers[1].json()
    assert (shown["state"], shown["error"]["code"]) == ("unsure", "request_id_taken")


async def test_a_request_that_a_path_gave_away_is_given_back(
    odd_world: World, odd: OddClipia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: if a job got another job's result by its path, it loses it to the job that the answer names."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    odd.script = [refused(504, "service_unavailable"), accepted("r-2"), accepted("r-1")]
    first = await submitter.submit(MODEL, PROMPT)
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    await post(own_url(odd.posts[0]), body("r-2"))
    await odd_world.forward()
    assert (await show(submitter, first)).request_id == "r-2"
    second = await submitter.submit(MODEL, PROMPT)
    assert (second.state, second.request_id) == ("completed", "r-2")
    again = await show(submitter, first)
    assert (again.state, again.request_id, again.event, again.charged) == ("pending", None, None, None)
    assert await odd_world.retry(submitter) == 1
    assert (await show(submitter, first)).request_id == "r-1"
    assert odd.posts[2].headers["idempotency-key"] == odd.posts[0].headers["idempotency-key"]


# --- races ---


async def test_foreign_webhooks_race_answers_and_results(odd_world: World, odd: OddClipia) -> None:
    """C10, F11: 24 jobs get a foreign webhook and their own near the answer: each ends with its own."""
    callback = await odd_world.serve_callback()
    wakeups = Wakeups()
    submitter = odd_world.submitter(public_url=callback, wake=wakeups.wake)
    own: dict[str, str] = {}
    late: list[asyncio.Task[None]] = []

    async def interfere(request: Request) -> None:
        url, number = own_url(request), len(own)
        own[url] = f"own-{number}"
        foreign = post(url if number % 2 else without_token(url), body(f"foreign-{number}"))
        mine = post(url, body(own[url]))
        if number % 3 == 0:
            await asyncio.gather(foreign, mine)
        elif number % 3 == 1:
            await foreign
            late.append(asyncio.create_task(mine))
        else:
            late.extend(map(asyncio.create_task, (foreign, mine)))
        # The request gets this answer next, because there is no await in between.
        odd.script = [accepted(own[url])]

    odd.on_submit = interfere
    assert submitter.lane is not None
    lanes: list[Lane] = [submitter.lane, odd_world.delivery_lane(wake=wakeups.wake)]
    async with running(Worker(odd_world.fan_out(wake=wakeups.wake), lanes, wakeups)):
        made: list[Job] = []
        for _ in range(6):
            made += await asyncio.gather(*(submitter.submit(MODEL, PROMPT) for _ in range(4)))
        await asyncio.gather(*late)
        await odd_world.until(submitter, *["completed"] * 24)

        async def forwarded() -> bool:
            return len(odd_world.destination.events) == 48

        await eventually(forwarded)
    found = await linked(odd_world)
    assert {name: id_ for name, id_ in found.items() if name.startswith("foreign")} == dict.fromkeys(
        (f"foreign-{number}" for number in range(24)), None
    )
    assert {found[f"own-{number}"] for number in range(24)} == {str(job.id) for job in made}


# --- the token itself ---


async def test_the_token_is_a_secret_of_each_job(odd_world: World, odd: OddClipia) -> None:
    """A15: tokens have at least 128 bits, are unique, and are absent from answers, lists, logs and rows."""
    callback = await odd_world.serve_callback()
    submitter = odd_world.submitter(public_url=callback)
    odd.script = [accepted]
    with capture_logs() as logged:
        made = [await submitter.submit(MODEL, PROMPT) for _ in range(4)]
        tokens = [path_token(own_url(each)) for each in odd.posts]
        for each in odd.posts:
            await post(own_url(each), body())
        await odd_world.forward()
        again = await submitter.resubmit((await make_unsure(odd_world, odd, submitter)).id, by="me")
        odd.script = [accepted()]
        assert await odd_world.retry(submitter) == 1
    tokens.append(path_token(own_url(odd.posts[-1])))
    assert len(set(tokens)) == len(tokens)
    assert all(re.fullmatch(r"[\w-]{22,}", token) for token in tokens)
    async with odd_world.database.read() as connection:
        rows = await reads.list_events(connection, limit=100)
        one = await reads.show_event(connection, str(rows[0]["id"]))
        lines, _ = await export_import.read(connection, "event", after=0, limit=10, since=None, until=None)
    shown = [(await show(submitter, job)).as_dict() for job in (*made, again)]
    listed = [job.as_dict() for job in (await submitter.list_jobs()).jobs]
    seen = repr(
        [logged, rows, one, lines, shown, listed, [m.get_data() for m in odd_world.destination.events]]
    )
    assert not [token for token in tokens if token in seen]
    assert "path_token" not in repr([logged, rows, one, shown, listed])
    assert {row["path_token"] for row in await odd_world.rows(events)} <= {
        row["path_token"] for row in await odd_world.rows(jobs)
    }


async def test_the_token_is_committed_before_the_first_call(odd_world: World, odd: OddClipia) -> None:
    """F1: when Clipia receives the path, each process can already match it to the job."""
    found: list[bool] = []

    async def look(request: Request) -> None:
        async with World(odd_world.database_url, odd.url) as another:
            row = await another.job()
            found.append(row["request"] == request.body and row["path_token"] is not None)

    odd.on_submit, odd.script = look, [accepted()]
    await odd_world.submitter(public_url="https://hooks.example.com").submit(MODEL, PROMPT)
    assert found == [True]


async def test_an_event_waits_for_an_answer_for_a_while_only(odd_world: World, odd: OddClipia) -> None:
    """C10: if an event has waited for the answer for a minute, it is forwarded."""
    submitter = odd_world.submitter(public_url=await odd_world.serve_callback())
    odd.script = [refused(504, "service_unavailable")]
    job = await submitter.submit(MODEL, PROMPT)
    await post(own_url(odd.posts[0]), body("r-own"))
    await odd_world.set(events, received_at=db_time(-job_events.ANSWER_WAIT_SECONDS + 20))
    await odd_world.forward()
    assert odd_world.destination.events == []
    await odd_world.set(events, received_at=db_time(-job_events.ANSWER_WAIT_SECONDS - 1))
    await odd_world.forward()
    assert await linked(odd_world) == {"r-own": str(job.id)}
    assert (await show(submitter, job)).state == "completed"
    assert uuid.UUID(str((await odd_world.job())["provider_key"])).version == 4
