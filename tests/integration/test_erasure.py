"""Files and inputs are pruned with old events, and one event is erased, on both databases."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import select
from support.events import World, opened, plain
from support.history import DAY
from support.payloads import SECRET, body, signed

from receiver import retention
from receiver.api.answers import status_of
from receiver.clipia.client import ClipiaClient
from receiver.core.signature import Secret
from receiver.db import export_import, leases, outbox, pruning, reads
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import NO_INPUT, Attempt, JobState, NewMedia, event_id
from receiver.db.tables import attempts, deliveries, events, jobs, media, receipts
from receiver.db.views import EventDetails
from receiver.errors import RequestError, StorageUnavailable
from receiver.ingest import Ingest, SignedRequest
from receiver.media import Storage, open_storage
from receiver.retention import Erased, Limits, Pruned
from receiver.submitter import Submitter


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """All but the web process, with one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


@pytest.fixture
def ingest(database: Database) -> Ingest:
    """The ingest, as a process has it."""
    secrets = {"clipia": [Secret.from_text(SECRET)], "staging": [Secret.from_text(SECRET)]}
    return Ingest(database, secrets=secrets, tolerance=300, clock=time.time, on_accepted=lambda: None)


class Unreliable:
    """A storage with deletions that fail while `fails` is set."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.fails = True
        self.uri = storage.uri

    async def delete(self, key: str) -> None:
        """Delete a file, or fail."""
        if self.fails and "r-2" in key:
            raise StorageUnavailable("no answer", reason="error")
        await self._storage.delete(key)


async def prune(world: World, **options: Any) -> Pruned:
    """Prune to the end."""
    begun = await retention.begin(world.database, older_than=timedelta(days=90))
    return [done async for done in retention.prune(world.database, begun, **options)][-1]


async def erase(world: World, key: str) -> Erased | None:
    """Erase an event."""
    return await retention.erase(world.database, world.storage, key)


async def deliver(ingest: Ingest, content: bytes, *, source: str = "clipia") -> str:
    """Send a webhook; return its outcome."""
    signature = signed(content)["X-Clipia-Signature"].encode()
    return (await ingest.receive(SignedRequest(source, [signature], content))).outcome


async def add_file(world: World, name: str) -> str:
    """Add a stored file to an event; return its key."""
    key = f"{name}/00-original.png"

    async def content() -> AsyncIterator[bytes]:
        yield b"a private picture"

    await world.storage.put(key, content())
    async with world.database.write() as connection:
        seq = (await connection.execute(select(events.c.seq).where(events.c.request_id == name))).scalar_one()
        file = NewMedia(
            position=0, variant="original", kind="image", url="https://media.clipia.ai/private.png"
        )
        await outbox.insert_media(connection, [(seq, file)])
    of_event = media.c.event_seq == seq
    said = dict.fromkeys(("field", "warning", "seen_sha256", "sha256", "error"), "private")
    await world.change(media, of_event, state="stored", storage_key=key, uri=world.storage.uri(key), **said)
    return key


async def add_old(world: World, *names: str) -> list[str]:
    """Store events of 100 days ago, each delivered and with a file; return the files' keys."""
    await world.add_history(*map(plain, names))
    await world.change(events, events.c.request_id.in_(names), received_at=db_time(-100 * DAY))
    return [await add_file(world, name) for name in names]


async def stored(world: World, *keys: str) -> set[str]:
    """Return the keys of existing files."""
    return {key for key in keys if await world.storage.stat(key) is not None}


async def show(world: World, key: str) -> EventDetails:
    """Return an event as the API shows it."""
    async with world.database.read() as connection:
        found = await reads.show_event(connection, key)
    assert found is not None
    return found


# --- files ---


@pytest.mark.parametrize("asked", [True, False])
async def test_files_go_with_their_events_where_that_is_asked_for(world: World, *, asked: bool) -> None:
    """C16: if a storage is given, the files of pruned events are deleted, and those of kept events stay."""
    keys = await add_old(world, "r-1", "r-2", "r-3")
    seq = select(events.c.seq).where(events.c.request_id == "r-3").scalar_subquery()
    await world.change(deliveries, deliveries.c.event_seq == seq, state="pending")
    storage = world.storage if asked else None
    counted = await prune(world, storage=storage, dry_run=True)
    assert await stored(world, *keys) == set(keys)
    done = await prune(world, storage=storage)
    assert asdict(done) | {"before": 0} == asdict(counted) | {"before": 0}
    assert (done.events, done.kept, done.files) == (2, 1, 2 if asked else 0)
    assert await stored(world, *keys) == ({keys[2]} if asked else set(keys))
    assert [row["request_id"] for row in await world.rows(events)] == ["r-3"]
    assert (await show(world, "r-3"))["media"][0]["state"] == "stored"


async def test_files_in_another_storage_are_counted_and_stay(world: World, tmp_path: Path) -> None:
    """C16: files of an earlier storage are kept, and so is another file under the same key."""
    (key,) = await add_old(world, "r-1")
    elsewhere = open_storage(f"file:{tmp_path / 'elsewhere'}")
    done = await prune(world, storage=elsewhere)
    assert (done.events, done.files, done.files_elsewhere) == (1, 0, 1)
    assert await stored(world, key) == {key}


async def test_a_run_that_fails_leaves_no_file_that_is_not_on_record(world: World) -> None:
    """C13: if a file cannot be deleted, its record is kept, and the next run deletes the file."""
    keys = await add_old(world, "r-1", "r-2", "r-3")
    unreliable: Any = Unreliable(world.storage)
    with pytest.raises(StorageUnavailable):
        await prune(world, storage=unreliable)
    assert await stored(world, *keys) == {keys[1]}
    assert {row["state"] for row in await world.rows(events)} == {"erased"}
    assert await world.order(selection={}) is not None, "a replay in between finds no event"
    unreliable.fails = False
    await world.replays.cancel((await world.replays.list_orders(limit=1, before=None))[0]["id"], by="me")
    done = await prune(world, storage=unreliable)
    assert (done.events, done.kept, done.files) == (3, 0, 3)
    assert await stored(world, *keys) == set()
    assert await world.rows(events) == await world.rows(media) == []


# --- inputs of jobs ---


async def test_ended_jobs_lose_their_input(world: World) -> None:
    """G9: a job that ended long ago keeps its key, price, model and metadata, and loses its input."""
    names = [f"{age}-{state}" for age in ("old", "young") for state in get_args(JobState)]
    for name in names:
        job_id = await world.add_job(name, request_id=name, metadata={"order": name})
        age, state = name.split("-")
        ended_at = db_time((-91 if age == "old" else -89) * DAY)
        values = {"request": b'{"input":{"prompt":"a private cat"}}', "cost": 12, "charged": 12}
        await world.change(jobs, jobs.c.id == job_id, state=state, finished_at=ended_at, **values)
    before = await world.rows(jobs)
    limits = Limits(events=2, jobs=5)
    counted = await prune(world, limits=limits, dry_run=True)
    assert await world.rows(jobs) == before
    assert counted.jobs == (await prune(world, limits=limits)).jobs == 3
    ended = {"old-completed", "old-failed", "old-canceled"}
    assert [row | {"request": b""} for row in await world.rows(jobs)] == [
        row | {"request": b""} for row in before
    ]
    emptied = [row["idempotency_key"] for row in await world.rows(jobs) if row["request"] == NO_INPUT]
    assert set(emptied) == ended
    assert (await prune(world, limits=limits)).jobs == 0


async def test_a_job_without_its_input(world: World) -> None:
    """G9: a job without its input is shown, but not submitted again: that would be another generation."""
    job_id = await world.add_job("k", request_id="r-1")
    await world.change(
        jobs, state="failed", finished_at=db_time(-91 * DAY), request=b'{"input":{"prompt":"x"}}'
    )
    submitter = Submitter(world.database, ClipiaClient("clipia_live_x", base_url="http://127.0.0.1:1"))
    try:
        job = await submitter.get(job_id)
        assert job is not None
        assert job.input == {"prompt": "x"}
        assert (await prune(world)).jobs == 1
        job = await submitter.get(job_id)
        assert job is not None
        assert (job.input, job.idempotency_key, job.model, job.state) == (None, "k", "m", "failed")
        with pytest.raises(RequestError, match="input was deleted") as caught:
            await submitter.resubmit(job_id, by="me")
        assert (status_of(caught.value), caught.value.code) == (409, "not_resubmittable")
        again = await submitter.get(job_id)
        assert again is not None
        assert again.state == "failed"
    finally:
        await submitter.close()


async def test_a_job_that_is_submitted_again_meanwhile_keeps_its_input(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16: if a job of the page is open again before the deletion, it keeps its input."""
    job_id = await world.add_job("k", request_id="r-1")
    await world.change(jobs, state="failed", finished_at=db_time(-91 * DAY))
    delete_inputs = pruning.delete_inputs

    async def resubmitted_first(connection: Any, *arguments: Any, **options: Any) -> None:
        await connection.execute(jobs.update().values(state="pending", finished_at=None))
        await delete_inputs(connection, *arguments, **options)

    monkeypatch.setattr(pruning, "delete_inputs", resubmitted_first)
    await prune(world)
    (row,) = await world.rows(jobs, jobs.c.id == job_id)
    assert row["request"] == b"{}"


# --- erasing one event ---

PRIVATE = body("r-1", payload={"model": "m", "output": {"text": "a private word"}, "cost": 7})
OTHER = body("r-1", payload={"model": "m", "output": {"text": "another private word"}, "cost": 7})


async def add_private(world: World, ingest: Ingest) -> str:
    """Store an event with rows in all tables; return the key of its file."""
    job_id = await world.add_job("k", request_id="r-1", metadata={"customer": "a private name"})
    said = {"error": '{"code":"x","message":"a private wish"}', "warnings": [{"message": "a private key"}]}
    request = b'{"input":{"prompt":"a private wish"}}'
    await world.change(jobs, jobs.c.id == job_id, request=request, **said)
    records = [
        Attempt(number=1, started_at=datetime.now(UTC), duration_ms=1, outcome="retry", error="private")
    ]
    records += [replace(records[0], outcome="resubmitted", error="by me")]
    async with world.database.write() as connection:
        await leases.record_attempts(connection, [(job_id, each) for each in records])
    assert await deliver(ingest, PRIVATE) == "accepted"
    assert await deliver(ingest, OTHER) == "conflict"
    await world.fan_out()
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    await world.change(jobs, **said)
    return await add_file(world, "r-1")


async def everything(world: World) -> str:
    """Return the whole database as text."""
    tables = (events, receipts, media, deliveries, attempts, jobs)
    return repr([await world.rows(table) for table in tables])


@pytest.mark.parametrize("by", ["request_id", "id"])
async def test_an_erased_event_leaves_a_tombstone(world: World, ingest: Ingest, by: str) -> None:
    """G9: the content of an erased event is deleted, and each late webhook is a duplicate without a body."""
    key = await add_private(world, ingest)
    await world.add_history(plain("r-2"))
    other = await show(world, "r-2")
    assert "private" in await everything(world)
    id_ = event_id("clipia", "r-1")
    erased = await erase(world, "r-1" if by == "request_id" else str(id_))
    assert erased == Erased(id=id_, request_id="r-1", files=1, files_elsewhere=[])
    assert "private" not in await everything(world)
    assert await stored(world, key) == set()
    shown = await show(world, "r-1")
    assert (shown["state"], shown["body"], shown["cost"]) == ("erased", b"", 7)
    assert (shown["media"], shown["deliveries"]) == ([], [])
    assert [await deliver(ingest, each) for each in (PRIVATE, OTHER)] == ["duplicate", "duplicate"]
    assert (await ingest.record_result("clipia", OTHER)).outcome == "duplicate"
    assert "private" not in await everything(world)
    assert await show(world, "r-2") == other
    (job,) = await world.rows(jobs)
    assert (job["idempotency_key"], job["model"], job["charged"]) == ("k", "m", 7)
    assert (job["state"], job["request"], job["metadata"]) == ("completed", NO_INPUT, {})
    assert [row["error"] for row in await world.rows(attempts)] == [None, "by me"]


async def test_an_erased_event_goes_nowhere(world: World, ingest: Ingest) -> None:
    """G9: a replay of all events leaves an erased one out, and its export is imported as a tombstone."""
    await add_private(world, ingest)
    await erase(world, "r-1")
    assert (await world.dry_run(selection={}))["events"] == 0
    async with world.database.read() as connection:
        lines, _ = await export_import.read(connection, "event", after=0, limit=9, since=None, until=None)
    async with world.database.write() as connection:
        await pruning.delete_events(connection, [row["seq"] for row in await world.rows(events)])
        assert await export_import.write(connection, lines) == {"event new": 1}
    assert (await show(world, "r-1"))["state"] == "erased"
    assert await deliver(ingest, OTHER) == "duplicate"


async def test_a_tombstone_is_pruned_when_it_is_old(world: World, ingest: Ingest) -> None:
    """C16: a tombstone is kept for as long as an event."""
    await add_private(world, ingest)
    await erase(world, "r-1")
    assert (await prune(world)).events == 0
    await world.change(events, received_at=db_time(-91 * DAY))
    assert (await prune(world)).events == 1


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ("fan-out", "it waits for its fan-out or its files"),
        ("file", "a file is pending"),
        ("delivery", "a delivery is pending"),
        ("job", "its job is open"),
        ("replay", "a replay has yet to reach it"),
    ],
)
async def test_an_event_is_not_erased_while_something_is_left_to_do(
    world: World, ingest: Ingest, left: str, words: str
) -> None:
    """G9: an unfinished event is rejected with the reason, and unchanged."""
    key = await add_private(world, ingest)
    match left:
        case "fan-out":
            await world.change(events, state="received")
        case "file":
            await world.change(media, state="pending")
        case "delivery":
            await world.change(deliveries, state="pending")
        case "job":
            await world.change(jobs, state="unsure")
        case "replay":
            await world.order(selection={})
    before = await everything(world)
    with pytest.raises(RequestError, match=f"cannot be erased yet: {words}$") as caught:
        await erase(world, "r-1")
    assert (status_of(caught.value), caught.value.code) == (409, "not_settled")
    assert await everything(world) == before
    assert await stored(world, key) == {key}


async def test_a_dead_letter_is_given_up(world: World, ingest: Ingest) -> None:
    """G9: a dead letter does not prevent the erasure."""
    await add_private(world, ingest)
    await world.change(deliveries, state="dead")
    assert await erase(world, "r-1") is not None
    assert await world.rows(deliveries) == []


async def test_erasing_goes_on_after_a_failure(world: World, ingest: Ingest) -> None:
    """G9: if the storage is down, the event is erased and the file recorded; the same call completes it."""
    await world.add_history(plain("r-2"))
    key = await add_file(world, "r-2")
    unreliable: Any = Unreliable(world.storage)
    with pytest.raises(StorageUnavailable):
        await retention.erase(world.database, unreliable, "r-2")
    assert (await show(world, "r-2"))["state"] == "erased"
    (row,) = await world.rows(media)
    assert (row["storage_key"], row["state"]) == (key, "gone")
    assert "private" not in repr(row), "only what finds the file is left"
    assert await deliver(ingest, plain("r-2")) == "duplicate"
    unreliable.fails = False
    erased = await retention.erase(world.database, unreliable, "r-2")
    assert erased is not None
    assert erased.files == 1
    assert (await stored(world, key), await world.rows(media)) == (set(), [])
    assert await erase(world, "r-2") is not None, "a repeat is harmless"


async def test_files_elsewhere_are_named(world: World, tmp_path: Path) -> None:
    """G9: a file outside of the configured storage is named, so that the operator can delete it."""
    await world.add_history(plain("r-1"))
    key = await add_file(world, "r-1")
    elsewhere = open_storage(f"file:{tmp_path / 'elsewhere'}")
    erased = await retention.erase(world.database, elsewhere, "r-1")
    assert erased is not None
    assert (erased.files, erased.files_elsewhere) == (0, [world.storage.uri(key)])


async def test_an_unrecognized_event_is_erased(world: World, ingest: Ingest) -> None:
    """G9: the body of an unrecognized event is erased, too, and is not stored when it comes again."""
    odd = b'{"a private word": true}'
    assert await deliver(ingest, odd) == "unrecognized"
    (row,) = await world.rows(events)
    assert await erase(world, row["request_id"]) is not None
    assert await deliver(ingest, odd) == "unrecognized"
    assert "private" not in await everything(world)


async def test_one_request_id_of_two_sources(world: World, ingest: Ingest) -> None:
    """G9: an ambiguous request_id is rejected; an id is not ambiguous."""
    for source in ("clipia", "staging"):
        await deliver(ingest, PRIVATE, source=source)
    await world.fan_out()
    await world.change(deliveries, state="delivered")
    with pytest.raises(RequestError, match="give the id of one") as caught:
        await erase(world, "r-1")
    assert status_of(caught.value) == 409
    assert await erase(world, str(event_id("staging", "r-1"))) is not None
    assert {row["source"]: row["state"] for row in await world.rows(events)} == {
        "clipia": "ready",
        "staging": "erased",
    }
    assert await erase(world, "r-unknown") is None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_event_that_other_work_has_locked_is_rejected(database: Database, world: World) -> None:
    """G9: if another transaction has locked the event, the erasure is rejected without waiting."""
    await world.add_history(plain("r-1"))
    async with database.write() as connection:
        await connection.execute(select(events.c.seq).with_for_update())
        async with asyncio.timeout(20):
            with pytest.raises(RequestError, match="other work has locked it"):
                await erase(world, "r-1")
    assert await erase(world, "r-1") is not None
