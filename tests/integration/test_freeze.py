"""While submissions are frozen, new jobs are rejected and none are submitted; on both databases."""

import asyncio

import pytest
from support.clipia import MODEL, PROMPT, OddClipia, Sandbox, World, accepted, error_code, post, refused, show
from support.payloads import body

from receiver.core.retry import KEY_VALID_SECONDS
from receiver.db import submission_freezes
from receiver.db.clock import db_time
from receiver.db.tables import jobs
from receiver.errors import ClipiaUnavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def freeze(world: World, *, restored: bool = False) -> None:
    """Freeze submissions, as the command does."""
    async with world.database.write() as connection:
        await submission_freezes.freeze(connection, by="me", reason="a test", restored=restored)


async def thaw(world: World) -> list[str] | None:
    """Thaw them and return the ids of jobs that become unsure."""
    async with world.database.write() as connection:
        unsure = await submission_freezes.thaw(
            connection, key_holds=KEY_VALID_SECONDS, error='{"code":"restored","message":"x"}'
        )
    return None if unsure is None else list(map(str, unsure))


async def test_a_new_key_is_refused_and_a_known_one_answered(world: World, sandbox: Sandbox) -> None:
    """F1: a new key creates no job and is free afterwards; a known key returns its job."""
    submitter = world.submitter()
    known = await submitter.submit(MODEL, PROMPT, idempotency_key="known")
    assert not await submitter.paused()
    await freeze(world)
    assert await submitter.paused()
    for key in ("new", None):
        with pytest.raises(ClipiaUnavailable) as caught:
            await submitter.submit(MODEL, PROMPT, idempotency_key=key)
        error = caught.value
        assert (error.reason, error.may_have_arrived, error.retry_after) == (
            "submissions_frozen",
            False,
            60.0,
        )
        assert "receiver jobs thaw" in str(error)
    assert (await submitter.submit(MODEL, PROMPT, idempotency_key="known")).id == known.id
    assert len(await world.rows(jobs)) == len(await sandbox.submits()) == 1
    assert await thaw(world) == []
    assert await thaw(world) is None
    assert (await submitter.submit(MODEL, PROMPT, idempotency_key="new")).state == "submitted"


async def test_pending_jobs_rest_and_accepted_ones_go_on(odd_world: World, odd: OddClipia) -> None:
    """F1: while submissions are frozen, none are sent; a webhook still ends its job."""
    callback = await odd_world.serve_callback()
    submitter = odd_world.submitter(public_url=callback)
    odd.script = [accepted("r-1"), refused(503, "service_unavailable"), accepted("r-2")]
    done, waiting = [await submitter.submit(MODEL, PROMPT) for _ in range(2)]
    await freeze(odd_world)
    assert await odd_world.retry(submitter) == 0
    await post(f"{callback}/clipia/webhook", body("r-1"))
    await odd_world.forward()
    assert (await show(submitter, done)).state == "completed"
    assert (await show(submitter, waiting)).state == "pending"
    await thaw(odd_world)
    assert await odd_world.retry(submitter) == 1
    assert (await show(submitter, waiting)).request_id == "r-2"


async def test_after_a_restore_old_pending_jobs_are_unsure(odd_world: World, odd: OddClipia) -> None:
    """F4: if a dump has a pending job, it may have been sent since, perhaps just after it was made."""
    submitter = odd_world.submitter()
    odd.script = [refused(429, "rate_limit_exceeded")]
    old, young = [await submitter.submit(MODEL, PROMPT) for _ in range(2)]
    await odd_world.set(jobs, where=jobs.c.id == old.id, created_at=db_time(-KEY_VALID_SECONDS - 60))
    await odd_world.set(jobs, where=jobs.c.id == young.id, created_at=db_time(-KEY_VALID_SECONDS + 600))
    await freeze(odd_world)
    assert await thaw(odd_world) == [], "without a restore the sent jobs are known"
    await freeze(odd_world)
    await freeze(odd_world, restored=True)
    odd.script = [accepted("r-1")]
    assert await thaw(odd_world) == [str(old.id)]
    (row,) = [row for row in await odd_world.rows(jobs) if row["id"] == young.id]
    assert row["sent_at"] == row["created_at"], "its key may be used since then, and is no longer valid"
    assert await odd_world.retry(submitter) == 1
    assert (await show(submitter, young)).state == "submitted"
    shown = await show(submitter, old)
    assert (shown.state, error_code(shown), shown.next_attempt_at) == ("unsure", "restored", None)
    await submitter.resubmit(old.id, by="me")


async def test_a_freeze_races_submissions(world: World, sandbox: Sandbox) -> None:
    """F1: in a race, each call creates a whole job or no rows."""
    submitter = world.submitter()
    calls = [submitter.submit(MODEL, PROMPT, idempotency_key=str(number)) for number in range(4)]
    *made, _ = await asyncio.gather(*calls, freeze(world), return_exceptions=True)
    refusals = [each for each in made if isinstance(each, ClipiaUnavailable)]
    assert {each.reason for each in refusals} <= {"submissions_frozen"}
    assert len(await world.rows(jobs)) == 4 - len(refusals)
    assert len(await sandbox.generations()) <= 4 - len(refusals)
