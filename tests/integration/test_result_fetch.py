"""A result that never arrived is fetched from Clipia, on both databases."""

import uuid

import orjson
import pytest
from support.clipia import MODEL, PROMPT, Sandbox, World, show

from receiver.clipia.client import Call
from receiver.core.lane_names import FAN_OUT_LANE, wake_no_lane
from receiver.db.tables import events
from receiver.errors import RequestError, SettingsError
from receiver.result_fetch import ResultFetch
from receiver.submitter import Submitter

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def submit_elsewhere(submitter: Submitter) -> str:
    """Submit a generation that the database does not know."""
    content = orjson.dumps({"input": PROMPT})
    accepted = await submitter.client.submit(MODEL, content, key=uuid.uuid4(), call=Call())
    return accepted.request_id


def fetching(world: World, submitter: Submitter, *sources: str) -> ResultFetch:
    """Return the service of a receiver with these sources."""
    return ResultFetch(world.database, submitter, sources=sources, wake=wake_no_lane)


async def test_a_result_of_another_submitter_becomes_an_event(world: World, sandbox: Sandbox) -> None:
    """F10: the result is stored once and forwarded; until the generation ends, the error says so."""
    submitter = world.submitter()
    woken: list[str] = []
    service = ResultFetch(world.database, submitter, sources=["clipia"], wake=woken.append)
    request_id = await submit_elsewhere(submitter)
    with pytest.raises(RequestError, match="has not finished") as open_:
        await service.fetch(request_id)
    assert open_.value.code == "not_finished"
    sandbox.end_all()
    first = await service.fetch(request_id)
    again = await service.fetch(request_id)
    assert (first.is_new, again.is_new, woken) == (True, False, [FAN_OUT_LANE])
    assert first.event_id == again.event_id
    await world.forward()
    (message,) = world.destination.events
    assert (message.get_subject(), message.get_id()) == (request_id, first.event_id)


async def test_the_job_of_a_fetched_result_ends(world: World, sandbox: Sandbox) -> None:
    """F10: a job whose webhook was lost is completed by the fetched result."""
    await sandbox.switch(webhook_loss_rate=1.0)
    submitter = world.submitter(public_url="https://hooks.example.com")
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    assert job.request_id is not None
    await fetching(world, submitter).fetch(job.request_id)
    await world.forward()
    assert (await show(submitter, job)).state == "completed"


async def test_a_fetched_result_has_the_source_of_its_webhook(world: World, sandbox: Sandbox) -> None:
    """F10: of several sources the caller names one, except for a job of this receiver; one alone is taken."""
    submitter = world.submitter(public_url="https://hooks.example.com")
    elsewhere = [await submit_elsewhere(submitter) for _ in range(2)]
    own = (await submitter.submit(MODEL, PROMPT)).request_id
    sandbox.end_all()
    assert own is not None
    service = fetching(world, submitter, "clipia", "shop")
    for source, request_id, error in (
        (None, elsewhere[0], "would have brought the result: clipia, shop"),
        ("shoo", elsewhere[0], "no source has this name; the settings have clipia, shop"),
        ("shop", own, "its source is clipia"),
    ):
        with pytest.raises(RequestError, match=error) as wrong:
            await service.fetch(request_id, source=source)
        assert wrong.value.code == "invalid_request"
    await service.fetch(elsewhere[0], source="shop")
    assert not (await service.fetch(elsewhere[0])).is_new
    await fetching(world, submitter, "shop").fetch(elsewhere[1])
    await service.fetch(own)
    stored = {row["request_id"]: row["source"] for row in await world.rows(events)}
    assert stored == dict.fromkeys(elsewhere, "shop") | {own: "clipia"}


async def test_an_unknown_request_and_a_missing_key_are_named(world: World, sandbox: Sandbox) -> None:
    """F10: the errors tell an unknown id, an impossible id and a receiver without CLIPIA_KEY apart."""
    del sandbox
    service = fetching(world, world.submitter())
    with pytest.raises(RequestError, match="does not know the request 'absent'") as unknown:
        await service.fetch("absent")
    assert unknown.value.code == "unknown_request"
    with pytest.raises(RequestError, match="no id of Clipia's"):
        await service.fetch("a b")
    with pytest.raises(SettingsError, match="CLIPIA_KEY is not set"):
        await fetching(world, world.submitter(key=None)).fetch("absent")
