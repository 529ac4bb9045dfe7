"""Replays with `media`: missing or damaged files are downloaded again, from their present URLs."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import select
from support.events import World, opened, plain, until, with_files
from support.servers import free_port

from receiver.clipia.client import Call, ClipiaClient
from receiver.core.output_files import FileRules, Skip
from receiver.core.payload import result_body
from receiver.db import accounts, inbox, outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import MediaRow, StoredEvent
from receiver.db.tables import accounts as account_rows
from receiver.db.tables import attempts, deliveries, events, media
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, StorageUnavailable
from receiver.lanes.fresh_urls import FreshUrls
from receiver.lanes.media import MAX_FRESH_URLS
from receiver.lanes.replay import ReplayPace
from receiver.media.verify import verify
from receiver.sandbox import SandboxOptions, create_app, running

IMAGE = "/sandbox/sample-image.png"
PICTURE = "/sandbox/another.webp"
ABSENT = "/works/absent.txt"
SPEECH, PAIR = "gemini-3-1-flash-tts", "nano-banana-2"
"""Models with one file in their result, and with two: an original and a display version."""
PROMPT = b'{"input":{"prompt":"a cat"}}'


@pytest.fixture
async def clipia() -> AsyncIterator[str]:
    """Run a sandbox, with Clipia's API and its CDN."""
    async with running(create_app(SandboxOptions(duration=0.05))) as url:
        yield url


@pytest.fixture
async def world(database: Database, tmp_path: Path, clipia: str) -> AsyncIterator[World]:
    """Return a world without a web server and without destinations."""
    async with opened(database, tmp_path / "media", clipia) as made:
        yield made


@pytest.fixture
async def client(clipia: str) -> AsyncIterator[ClipiaClient]:
    """Return a client for the API of the sandbox."""
    opened_client = ClipiaClient("clipia_live_x", base_url=clipia)
    yield opened_client
    await opened_client.close()


def path_of(row: dict[str, Any]) -> Path:
    """Return the path of a stored file."""
    return Path(row["uri"].removeprefix("file://"))


async def store(world: World, *contents: bytes, source: str = "clipia") -> list[dict[str, Any]]:
    """Store events and their files, deliver them, and return the rows of the files."""
    for content in contents:
        await world.add(content, source=source)
    async with world.working():

        async def is_done() -> bool:
            states = await world.states(deliveries)
            return states["delivered"] == len(contents) * len(world.targets)

        await until(is_done)
    return await world.rows(media)


def files_in(message: CloudEvent) -> list[dict[str, Any]]:
    """Return the files as a message lists them."""
    data: Any = message.get_data()
    files: list[dict[str, Any]] = data["media"]
    return files


async def test_missing_and_changed_files_are_downloaded_again(world: World, clipia: str) -> None:
    """D11: missing, truncated and overwritten files are downloaded again; intact ones are not."""
    main = world.add_destination("main")
    contents = [with_files(clipia, f"r-{number}", IMAGE, PICTURE) for number in range(4)]
    rows = await store(world, *contents, plain("without"))
    originals = {row["id"]: path_of(row).read_bytes() for row in rows}
    missing, changed, short = (path_of(rows[index]) for index in (0, 2, 5))
    missing.unlink()
    changed.write_bytes(bytes(changed.stat().st_size))
    short.write_bytes(short.read_bytes()[:-1])
    before = len(await world.rows(attempts))
    order = await world.order(media=True)
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["downloads"], done["ordered"]) == (3, 5)
    again = await world.rows(media)
    assert {row["id"]: path_of(row).read_bytes() for row in again} == originals
    assert [row["state"] for row in again] == ["stored"] * 8
    assert [row["restarted_at"] is not None for row in again] == [index in (0, 2, 5) for index in range(8)]
    assert [row["attempts"] for row in again] == [1] * 8
    assert len(await world.rows(attempts)) == before + 3 + 5
    assert await world.states(events) == {"ready": 5}
    for message in main.replayed(order["id"]):
        assert {file["state"] for file in files_in(message)} <= {"stored"}


async def test_live_deliveries_wait_for_files_that_are_downloaded_again(world: World, clipia: str) -> None:
    """D11: a live delivery that is due and not under way waits for the files too."""
    main = world.add_destination("main")
    early = world.add_destination("early", waits_for_media=False)
    (row,) = await store(world, with_files(clipia, "r-1", IMAGE))
    path_of(row).unlink()
    await world.change(deliveries, state="pending", next_attempt_at=db_time(0.0), finished_at=None)
    main.published.clear()
    early.published.clear()
    order = await world.order(media=True, to=["main"])
    (work,) = await world.replay_lane().claim(1)
    await work.run()
    for index, count in ((0, 0), (1, 1)):
        works = await world.delivery_lane(index).claim(10)
        assert len(works) == count
        for work in works:
            await work.run()
    async with world.working():
        await world.until_replayed(order)
        await world.until_states(deliveries, delivered=3)
    assert [[file["state"] for file in files_in(message)] for message in main.published] == [["stored"]] * 2


async def test_without_media_no_file_is_verified(world: World, clipia: str) -> None:
    """D11: a plain replay sends the recorded files and downloads none."""
    main = world.add_destination("main")
    (row,) = await store(world, with_files(clipia, "r-1", IMAGE))
    path_of(row).unlink()
    order = await world.order()
    async with world.working():
        done = await world.until_replayed(order)
    assert done["downloads"] == 0
    assert not path_of(row).exists()
    assert len(main.replayed(order["id"])) == 1


async def test_deliveries_wait_for_files_that_are_downloaded_again(world: World, clipia: str) -> None:
    """D11: a destination that waits for media gets the message after the file; another one, at once."""
    late, early = world.add_destination("late"), world.add_destination("early", waits_for_media=False)
    rows = await store(world, with_files(clipia, "r-1", IMAGE), with_files(clipia, "r-2", PICTURE))
    path_of(rows[0]).unlink()
    order = await world.order(media=True)
    (work,) = await world.replay_lane().claim(1)
    await work.run()
    held = await world.rows(
        deliveries, deliveries.c.next_attempt_at.is_(None), deliveries.c.state == "pending"
    )
    assert [(row["destination"], row["replay_id"]) for row in held] == [("late", order["id"])]
    assert await world.states(events) == {"fetching": 1, "ready": 1}
    lane = world.delivery_lane(1)
    for each in await lane.claim(10):
        await each.run()
    shown = {str(message.get_subject()): files_in(message) for message in early.replayed(order["id"])}
    assert {subject: file["state"] for subject, (file,) in shown.items()} == {
        "r-1": "pending",
        "r-2": "stored",
    }
    async with world.working():
        await world.until_replayed(order)
    assert {file["state"] for message in late.replayed(order["id"]) for file in files_in(message)} == {
        "stored"
    }
    assert path_of(rows[0]).exists()


async def test_a_replay_of_an_event_in_fetching_waits_with_it(world: World, clipia: str) -> None:
    """D11: a replay of an event that is still fetching waits for its files and does not order them again."""
    main = world.add_destination("main")
    await world.add(with_files(clipia, "r-1", IMAGE))
    await world.fan_out()
    order = await world.order(media=True)
    (work,) = await world.replay_lane().claim(1)
    await work.run()
    (row,) = await world.rows(media)
    assert (row["state"], row["restarted_at"]) == ("pending", None)
    async with world.working():
        done = await world.until_replayed(order)
        await world.until_states(deliveries, delivered=2)
    assert done["downloads"] == 0
    assert [files_in(message)[0]["state"] for message in main.published] == ["stored", "stored"]


async def test_a_file_that_is_stored_in_mid_step_holds_no_delivery(
    world: World, clipia: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D11: if the last file is stored between a step's plan and its commit, the delivery is due."""
    world.add_destination("main")
    await world.add(with_files(clipia, "r-1", IMAGE))
    await world.fan_out()
    order = await world.order()
    load_media = outbox.load_media

    async def then_store(*arguments: Any) -> Any:
        found = await load_media(*arguments)
        monkeypatch.setattr(outbox, "load_media", load_media)
        await world.change(media, state="stored")
        async with world.database.write() as connection:
            await outbox.release_held(connection, 1)
        return found

    monkeypatch.setattr(outbox, "load_media", then_store)
    lane = world.replay_lane()
    (work,) = await lane.claim(1)
    await work.run()
    rows = await world.rows(deliveries, deliveries.c.replay_id == order["id"])
    assert [row["next_attempt_at"] is not None for row in rows] == [True]


@pytest.mark.parametrize("state", ["gone", "blocked"])
async def test_files_that_were_given_up_get_another_chance(world: World, clipia: str, state: str) -> None:
    """D15: a file that was gone or blocked is tried from the start, and stored if the URL has it now."""
    main = world.add_destination("main")
    await store(world, with_files(clipia, "r-1", IMAGE))
    await world.change(
        media, state=state, error="404", attempts=9, created_at=db_time(-90_000.0), size=None, sha256=None
    )
    order = await world.order(media=True)
    async with world.working():
        await world.until_replayed(order)
    (row,) = await world.rows(media)
    assert (row["state"], row["error"], row["attempts"]) == ("stored", None, 1)
    (message,) = main.replayed(order["id"])
    assert files_in(message)[0]["state"] == "stored"


async def test_a_restarted_download_has_all_its_time_again(world: World, clipia: str) -> None:
    """D15: its hour starts over: an old file that is still missing is not given up at the first attempt."""
    world.add_destination("main")
    await store(world, with_files(clipia, "r-1", IMAGE))
    await world.change(media, state="gone", url=clipia + ABSENT, created_at=db_time(-90_000.0), attempts=9)
    await world.order(media=True)
    async with world.working():

        async def is_tried() -> bool:
            (row,) = await world.rows(media)
            return row["attempts"] == 1 and row["error"] is not None

        await until(is_tried)
    (row,) = await world.rows(media)
    assert row["state"] == "pending"


async def test_a_file_that_is_lost_for_good_is_reported(world: World, clipia: str) -> None:
    """D15: if a lost file is gone at the CDN too, the message says so and names no stored file."""
    main = world.add_destination("main")
    (row,) = await store(world, with_files(clipia, "r-1", IMAGE))
    path_of(row).unlink()
    await world.change(media, url=clipia + ABSENT)
    order = await world.order(media=True)
    (work,) = await world.replay_lane().claim(1)
    await work.run()
    await world.change(media, attempts=5, restarted_at=db_time(-3601.0))
    async with world.working():
        await world.until_replayed(order)
    (message,) = main.replayed(order["id"])
    (file,) = files_in(message)
    assert (file["state"], "404" in file["error"]) == ("gone", True)
    assert (file["uri"], file["sha256"], file["size"]) == (None, None, None)


async def test_a_storage_that_is_away_holds_a_replay_up(
    world: World, clipia: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16: files that cannot be read now do not count as damaged."""
    world.replay_pace = ReplayPace(failure_pause_seconds=0.0)
    world.add_destination("main")
    (row,) = await store(world, with_files(clipia, "r-1", IMAGE))
    order = await world.order(media=True)
    read = world.storage.open

    async def away(_key: str) -> AsyncIterator[bytes]:
        raise StorageUnavailable("the disk is gone", reason="error")
        yield b""

    lane = world.replay_lane()
    monkeypatch.setattr(world.storage, "open", away)
    (work,) = await lane.claim(1)
    await work.run()
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"]) == ("pending", 0)
    assert "the disk is gone" in (shown["error"] or "")
    monkeypatch.setattr(world.storage, "open", read)
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["downloads"], done["error"]) == (0, None)
    assert await world.rows(media) == [row]


async def test_an_unreadable_file_holds_no_replay_up(world: World, clipia: str) -> None:
    """D16: if a single file cannot be read, its event is sent as recorded, and the replay goes on.

    It is not downloaded again: if the CDN has deleted it, its record would be lost.
    """
    main = world.add_destination("main")
    contents = [with_files(clipia, f"r-{number}", IMAGE) for number in range(3)]
    rows = await store(world, *contents)
    unreadable, missing = path_of(rows[0]), path_of(rows[1])
    unreadable.unlink()
    unreadable.mkdir()
    missing.unlink()
    order = await world.order(media=True)
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["downloads"], done["ordered"], done["error"]) == (1, 3, None)
    files = {file["url"]: file for message in main.replayed(order["id"]) for file in files_in(message)}
    assert len(main.replayed(order["id"])) == 3
    assert {file["state"] for file in files.values()} == {"stored"}
    again = {row["id"]: row for row in await world.rows(media)}
    assert again[rows[0]["id"]] == rows[0]
    assert missing.is_file()


async def test_verify_reports_each_damage(world: World, clipia: str) -> None:
    """D11: intact, missing, or changed in length or content."""
    world.add_destination("main")
    (row,) = await store(world, with_files(clipia, "r-1", IMAGE))
    path, content = path_of(row), path_of(row).read_bytes()

    async def finding() -> str:
        expected = {name: row[name] for name in ("kind", "url", "field", "size", "sha256")}
        return await verify(world.storage, row["storage_key"], **expected)

    assert await finding() == "intact"
    for damaged in (b"", content[:-1], content + b"\x00", bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        assert await finding() == "changed"
    path.unlink()
    assert await finding() == "missing"


async def generate(client: ClipiaClient, model: str = SPEECH) -> bytes:
    """Generate a result in the sandbox; return the body of its webhook."""
    accepted = await client.submit(model, PROMPT, key=uuid.uuid4(), call=Call())

    async def finished() -> bytes | None:
        status = await client.status(accepted.request_id, call=Call())
        return await client.result(accepted.request_id, call=Call()) if status.terminal else None

    return result_body(accepted.request_id, "COMPLETED", await until(finished))


async def move_files(world: World, clipia: str) -> list[dict[str, Any]]:
    """Delete the stored files, and give them their URLs of before they moved; return the rows of before."""
    rows = await world.rows(media)
    for row in rows:
        path_of(row).unlink()
    await world.change(media, url=clipia + ABSENT)
    return rows


async def test_a_file_that_moved_is_found_through_a_fresh_url(
    world: World, clipia: str, client: ClipiaClient
) -> None:
    """D15: if its URL answers 404, Clipia is asked for the present one, and the file is stored from there."""
    main = world.add_destination("main")
    world.fresh_url = FreshUrls(world.database, client).find
    await store(world, await generate(client))
    (before,) = await move_files(world, clipia)
    order = await world.order(media=True)
    async with world.working():
        done = await world.until_replayed(order)
    assert done["downloads"] == 1
    (row,) = await world.rows(media)
    assert [row[name] for name in ("state", "url", "sha256")] == ["stored", before["url"], before["sha256"]]
    assert path_of(row).exists()
    (message,) = main.replayed(order["id"])
    assert [(file["url"], file["state"]) for file in files_in(message)] == [(before["url"], "stored")]
    async with world.database.read() as connection:
        account = (await connection.execute(select(account_rows))).mappings().one()
    assert account["polls_until"] > 0, "the call counts against the account's share"


async def test_all_files_of_a_result_that_moved_are_found(
    world: World, clipia: str, client: ClipiaClient
) -> None:
    """D15: one answer has the URLs of all files, so that the second file needs no call."""
    world.add_destination("main")
    world.fresh_url = FreshUrls(world.database, client).find
    await store(world, await generate(client, PAIR))
    before = await move_files(world, clipia)
    assert len(before) == 2
    await world.order(media=True)
    async with world.working():

        async def are_back() -> bool:
            rows = await world.rows(media)
            found = [(row["state"], row["url"]) for row in rows]
            return found == [("stored", row["url"]) for row in before]

        await until(are_back, seconds=8)


async def test_a_live_download_finds_its_fresh_url_too(
    world: World, clipia: str, client: ClipiaClient
) -> None:
    """D15: if the file of a late event has moved already, it is downloaded from its present URL."""
    world.add_destination("main")
    world.fresh_url = FreshUrls(world.database, client).find
    await world.add(await generate(client))
    await world.fan_out()
    await world.change(media, url=clipia + ABSENT)
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    assert await world.states(media) == {"stored": 1}


@pytest.mark.parametrize("path", [IMAGE, ABSENT])
async def test_a_download_that_comes_too_late_changes_nothing(world: World, clipia: str, path: str) -> None:
    """E10: if its lease was lost meanwhile, a worker records neither the file nor its failure."""
    world.add_destination("main")
    await world.add(with_files(clipia, "r-1", path))
    await world.fan_out()
    for count in (0, 5):
        await world.change(media, attempts=count, created_at=db_time(-3601.0), next_attempt_at=db_time(0.0))
        (late,) = await world.media_lane().claim(1)
        await world.change(media, lease=uuid.uuid4())
        before = await world.rows(media)
        await late.run()
        assert await world.rows(media) == before
        assert await world.rows(attempts) == []
    assert await world.states(events) == {"fetching": 1}


async def test_fresh_urls_are_asked_for_three_times(world: World, clipia: str) -> None:
    """D15: if a file is missing from its fresh URLs too, it is given up after three of them."""
    world.add_destination("main")
    calls: list[str] = []

    async def elsewhere(_event: StoredEvent, row: MediaRow) -> str | None:
        calls.append(row.url)
        return f"{clipia}/works/absent-{len(calls)}.txt"

    world.fresh_url = elsewhere
    await world.add(with_files(clipia, "r-1", ABSENT))
    async with world.working():
        for number in range(1, MAX_FRESH_URLS + 2):

            async def is_tried(count: int = number) -> bool:
                (*_, row) = await world.rows(media) or [{"attempts": 0, "lease": None}]
                return row["attempts"] >= count and row["lease"] is None

            await until(is_tried)
            await world.change(media, next_attempt_at=db_time(0.0))
    assert calls == [
        f"{clipia}{ABSENT}",
        *(f"{clipia}/works/absent-{n}.txt" for n in range(1, MAX_FRESH_URLS)),
    ]
    outcomes = {row["outcome"] for row in await world.rows(attempts)}
    assert outcomes == {"retry"}


async def test_the_same_url_again_is_no_news(world: World, clipia: str) -> None:
    """D15: if Clipia names the old URL, the file is missing like any other, with the same schedule."""
    world.add_destination("main")

    async def the_same(_event: StoredEvent, row: MediaRow) -> str | None:
        return row.url

    world.fresh_url = the_same
    await world.add(with_files(clipia, "r-1", ABSENT))
    async with world.working():

        async def is_tried() -> bool:
            return bool(await world.rows(attempts))

        await until(is_tried)
        await world.change(media, attempts=5, created_at=db_time(-3601.0), next_attempt_at=db_time(0.0))
        await world.until_states(deliveries, delivered=1)
    assert await world.states(media) == {"gone": 1}


def another(event: StoredEvent, **changes: Any) -> StoredEvent:
    """Return an event like this one."""
    return StoredEvent(**({name: getattr(event, name) for name in StoredEvent._fields} | changes))


async def read_event(world: World) -> tuple[StoredEvent, MediaRow]:
    """Return the only event and its first file."""
    async with world.database.read() as connection:
        event = (await inbox.load_events(connection, [1]))[1]
        return event, (await outbox.load_media(connection, [1]))[1][0]


async def test_fresh_urls_are_listed_by_the_rules_of_the_event(world: World, client: ClipiaClient) -> None:
    """D15: the limits of the service apply to a fresh URL as to that of the event."""
    await world.add(await generate(client, PAIR))
    await world.fan_out()
    event, file = await read_event(world)
    skip = Skip(reason="host_not_allowed", message="It is not allowed.")
    for rules, found in (
        (FileRules(), True),
        (FileRules(max_url_length=len(file.url) - 1), False),
        (FileRules(max_files=0), False),
        (FileRules(skip_reason=lambda _url: skip), False),
    ):
        await world.change(account_rows, polls_until=0.0)
        fresh = FreshUrls(world.database, client, rules=rules)
        assert await fresh.find(event, file) == (file.url if found else None)
    # Releases before 0010 did not record the field.
    unnamed = {name: getattr(file, name) for name in MediaRow.__dataclass_fields__} | {"field": None}
    await world.change(account_rows, polls_until=0.0)
    fresh = FreshUrls(world.database, client, rules=FileRules(max_files=1))
    assert await fresh.find(event, MediaRow(**unnamed)) == file.url


async def test_without_an_answer_there_is_no_fresh_url(
    world: World, clipia: str, client: ClipiaClient
) -> None:
    """D15: without a request or a result there is no fresh URL; without an answer there is none yet."""
    fresh = FreshUrls(world.database, client)
    await world.add(await generate(client))
    await world.fan_out()
    event, file = await read_event(world)
    row = {name: getattr(file, name) for name in MediaRow.__dataclass_fields__}
    async with httpx.AsyncClient(base_url=clipia) as control:
        (await control.patch("/_sandbox/options", json={"duration": 600})).raise_for_status()
    unfinished = await client.submit(SPEECH, PROMPT, key=uuid.uuid4(), call=Call())

    async def find(seq: int, wanted: MediaRow = file, **changes: Any) -> str | None:
        await world.change(account_rows, polls_until=0.0)
        return await fresh.find(another(event, seq=seq, **changes), wanted)

    assert await find(1) == file.url
    assert await find(2, MediaRow(**(row | {"field": "images[7].url"}))) is None
    # Releases before 0010 did not record the field: it is found by the event's URL.
    assert await find(2, MediaRow(**(row | {"field": None, "position": 7}))) == file.url
    assert await find(2, MediaRow(**(row | {"field": None, "url": f"{clipia}/elsewhere"}))) is None
    assert await find(3, source="staging") is None
    assert await find(4, request_id=str(uuid.uuid4())) is None
    assert await find(5, request_id=unfinished.request_id) is None
    assert await find(6) == file.url
    event = another(event, seq=7)
    nobody = ClipiaClient("clipia_live_x", base_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ClipiaUnavailable):
        await FreshUrls(world.database, nobody).find(event, file)
    await nobody.close()
    event = another(event, seq=8)
    async with world.database.write() as connection:
        quota, now = await accounts.lock(connection, client.account)
        await accounts.save(connection, client.account, quota.after_calls("poll", 1000, now))
    with pytest.raises(ClipiaUnavailable, match="no call is left"):
        await fresh.find(event, file)


async def test_a_wait_for_a_fresh_url_counts_no_attempt(world: World, clipia: str) -> None:
    """D15: if no call is left to ask for a fresh URL, the file waits for one without losing attempts."""
    world.add_destination("main")
    calls = 0

    async def busy(_event: StoredEvent, _row: MediaRow) -> str:
        nonlocal calls
        calls += 1
        if calls <= 5:
            raise ClipiaUnavailable("no call is left for now", reason="budget", may_have_arrived=False)
        return f"{clipia}{IMAGE}"

    world.fresh_url = busy
    await world.add(with_files(clipia, "r-1", ABSENT))
    await world.fan_out()
    lane = world.media_lane()
    for _ in range(7):
        await world.change(media, media.c.state == "pending", next_attempt_at=db_time(0.0))
        for work in await lane.claim(1):
            await work.run()
    assert await world.states(media) == {"stored": 1}
    (row,) = await world.rows(media)
    assert (row["attempts"], calls) == (2, 6)
    absent = {"url": f"{clipia}{ABSENT}", "storage_key": None}
    await world.change(media, state="pending", created_at=db_time(-3 * 86_400.0), **absent)
    calls = 0
    await world.change(media, next_attempt_at=db_time(0.0), attempts=2)
    (work,) = await lane.claim(1)
    await work.run()
    assert await world.states(media) == {"gone": 1}, "the file is given up in the end"


async def test_a_database_that_is_away_costs_a_download_no_result(
    world: World, clipia: str, client: ClipiaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E3: if the quota cannot be read, a failed download is recorded without a fresh URL."""
    world.add_destination("main")
    world.fresh_url = FreshUrls(world.database, client).find

    async def away(*_arguments: Any) -> Any:
        raise DatabaseUnavailable("away", reason="database")

    monkeypatch.setattr(accounts, "lock", away)
    await world.add(with_files(clipia, "r-1", ABSENT))
    async with world.working():

        async def is_tried() -> bool:
            return bool(await world.rows(attempts))

        await until(is_tried, seconds=5)
