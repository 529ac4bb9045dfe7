"""Output of the commands for replays, deliveries, routes and stored files, on both databases."""

import hashlib
import json
import re
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.command_line import Commands
from support.events import World, opened, plain, with_files
from support.payloads import failure

from receiver.db import outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.tables import attempts, deliveries, events, media, replays
from receiver.sandbox import SandboxOptions, create_app, running

TWO = (
    '[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n'
    '[[destinations]]\nname = "failures"\nurl = "file:failures.jsonl"\nfilter = { status = "ERROR" }\n'
)


@pytest.fixture
async def commands(
    database: Database,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,  # noqa: ARG001 - a fixture
) -> AsyncIterator[Commands]:
    """Return the commands of a receiver with two destinations; one of them has a filter."""
    (tmp_path / "receiver.toml").write_text(TWO)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    async with (
        running(create_app(SandboxOptions())) as cdn,
        opened(database, tmp_path / "media", cdn) as world,
    ):
        world.add_destination("main")
        world.add_destination("failures", status="ERROR")
        yield Commands(world, capsys, monkeypatch, cdn=cdn)


async def test_dry_runs_count_by_destination(commands: Commands) -> None:
    """E12: dry runs count by destination, as text and as JSON, with each filter of a replay."""
    world = commands.world
    await world.add_job("job", request_id="r-1")
    await world.add_history(plain("r-1"), plain("r-2", model="seedance-2"), failure("e-1"))
    await world.change(events, events.c.request_id == "r-2", received_at=datetime(2026, 3, 1, 12, tzinfo=UTC))
    counted = await commands.run("replay", "--all", "--dry-run")
    assert counted.splitlines() == ["3 events", "main: 3 deliveries", "failures: 1 delivery"]
    for arguments, matched in (
        (["r-1", str(event_id("clipia", "e-1")).upper()], 2),
        ([event_id("clipia", "e-1").hex], 1),
        (["--status", "ERROR"], 1),
        (["--model", "seedance-*"], 1),
        (["--source", "clipia"], 3),
        (["--caller", "shop"], 1),
        (["--destination", "failures"], 1),
        (["--delivery-state", "dead"], 0),
        (["--since", "2026-03-01T12:00:01"], 2),
        (["--until", "2026-03-01T12:00:01"], 1),
        (["--since", "2026-03-01", "--until", "2026-03-02"], 1),
        (["--all", "--status", "OK", "--to", "main"], 2),
    ):
        found = await commands.json("replay", *arguments, "--dry-run")
        assert (arguments, found["events"]) == (arguments, matched)


async def test_an_order_is_watched_to_its_end(commands: Commands) -> None:
    """E12: the command prints a replay's result as text or as JSON; with --no-wait it returns at once."""
    world = commands.world
    await world.add_history(plain("r-1"), plain("r-2"), failure("e-1"))
    order = await commands.json("replay", "--all", "--no-wait", "--rate", "50", "--key", "k", "--reason", "x")
    assert (order["state"], order["matched"], order["rate"], order["reason"]) == ("pending", 3, 50.0, "x")
    said = await commands.try_("replay", "--all", "--no-wait", "--rate", "50", "--key", "k", "--reason", "x")
    assert (said.status, said.out, said.err) == (0, "", f"Replay {order['id']}: 3 events")
    async with world.working():
        shown = await commands.run("replays", "show", order["id"], "--wait")
        assert f"Replay {order['id']}: completed, 3 of 3 events" in shown
        assert "main: 3 delivered" in shown
        assert "failures: 1 delivered" in shown
        assert "no reason given" in await commands.run("replay", "r-1", "--to", "main")
        done = await commands.json("replay", "r-2", "--to", "main")
        assert (done["state"], done["deliveries"]) == ("completed", {"main": {"delivered": 1}})
    assert sorted(world.recorders["main"].subjects) == ["e-1", "r-1", "r-1", "r-2", "r-2"]


async def test_replays_are_listed_and_shown(commands: Commands) -> None:
    """E12: caller, time, reason and progress, newest first; markup in a reason is printed as it is."""
    assert (await commands.run("replays", "list")).strip() == "No replays."
    await commands.world.add_history(plain("r-1"))
    orders = [await commands.world.order(reason=f"[red]{n}", caller=f"caller-{n}") for n in range(3)]
    listed = await commands.run("replays", "list")
    assert [str(order["id"]) in listed for order in orders] == [True] * 3
    assert "[red]2" in listed
    page = await commands.json("replays", "list", "--limit", "2")
    assert [row["id"] for row in page["data"]] == [str(orders[2]["id"]), str(orders[1]["id"])]
    rest = await commands.json("replays", "list", "--cursor", page["next"])
    assert ([row["id"] for row in rest["data"]], rest["next"]) == ([str(orders[0]["id"])], None)
    assert f"--cursor {page['next']}" in (await commands.try_("replays", "list", "--limit", "2")).err
    newest = str(orders[2]["id"])
    assert (await commands.json("replays", "show", newest))["caller"] == "caller-2"
    shown = await commands.run("replays", "show", newest)
    assert "pending, 0 of 1 events" in shown
    assert "by caller-2" in shown
    assert "canceled" in await commands.run("replays", "cancel", newest)
    assert "has ended" in await commands.error("replays", "cancel", newest, status=5)
    for command in ("show", "cancel"):
        assert "there is no replay" in await commands.error("replays", command, str(uuid.uuid4()), status=4)


async def test_a_failed_replay_says_why(commands: Commands) -> None:
    """E8: the error of a replay is shown, and the number of files that were downloaded again."""
    order = await commands.world.order(media=True)
    error = "gave up: 5 workers crashed while carrying out this replay"
    await commands.world.change(replays, state="failed", error=error, downloads=7)
    shown = await commands.run("replays", "show", str(order["id"]))
    assert error in shown
    assert "7 files downloaded again" in shown


async def test_an_invalid_order_is_one_clear_error(commands: Commands) -> None:
    """E12: without a filter, with an invalid one or an unknown destination, the command orders no replay."""
    await commands.world.add_history(plain("r-1"))
    for arguments in ([], ["--to", "main"], ["--reason", "x"], ["--media"], ["--dry-run"]):
        assert "say which events" in await commands.error("replay", *arguments, status=2)
    assert "no event 'absent'" in await commands.error("replay", "r-1", "absent", status=2)
    assert "no destination 'absent'" in await commands.error("replay", "--all", "--to", "absent", status=2)
    for option, value in (
        ("--status", "ok"),
        ("--delivery-state", "canceled"),
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--model", "x" * 256),
        ("--source", "a\x00b"),
        ("--reason", "x" * 1001),
    ):
        assert f"error: {option}: " in await commands.error("replay", "--all", option, value, status=2)
    assert "--since" in await commands.error("replay", "--since", "yesterday", status=2)
    assert (await commands.run("replays", "list")).strip() == "No replays."
    await commands.run("replay", "--all", "--key", "k", "--no-wait")
    assert "another replay" in await commands.error("replay", "r-1", "--key", "k", "--no-wait", status=5)


async def test_a_bad_id_is_named_as_one(commands: Commands) -> None:
    """E12: if an id is empty or too long, the error names the id."""
    for bad in ("", "x" * 256):
        assert re.match("error: (the )?ids?: ", await commands.error("replay", "r-1", bad, status=2))


async def test_a_bad_key_is_one_clear_error(commands: Commands) -> None:
    """F8: a key that the database cannot store is rejected before a replay is ordered."""
    await commands.world.add_history(plain("r-1"))
    for key in ("x" * 256, "a\nb"):
        assert "key" in (await commands.error("replay", "--all", "--key", key, "--no-wait", status=2)).lower()
    assert (await commands.run("replays", "list")).strip() == "No replays."


async def test_without_destinations_there_is_nothing_to_replay(commands: Commands) -> None:
    """E12: if no destination is configured, the error says so; `route` says so too."""
    await commands.world.add_history(plain("r-1"))
    Path("receiver.toml").write_text("")
    assert "no destination is configured" in await commands.error("replay", "--all", status=2)
    assert (await commands.run("route", "r-1")).strip() == "No destination is configured."


async def test_events_are_listed_by_job_and_delivery(commands: Commands) -> None:
    """`events list` filters by the job and the deliveries; a time may be an age."""
    await commands.world.add_job("order-1", caller="shop", request_id="r-1", metadata={"tier": "gold"})
    await commands.world.add_history(plain("r-1"), failure("r-2"))
    for arguments, found in (
        (["--caller", "shop"], ["r-1"]),
        (["--key", "order-1"], ["r-1"]),
        (["--metadata", "tier=gold"], ["r-1"]),
        (["--metadata", "tier=tin"], []),
        (["--destination", "failures", "--delivery-state", "delivered"], ["r-2"]),
        (["--delivery-state", "dead"], []),
        (["--since", "1h"], ["r-2", "r-1"]),
        (["--until", "1h"], []),
        (["--since", "2020-01-31T12:00+02:00"], ["r-2", "r-1"]),
    ):
        page = await commands.json("events", "list", *arguments)
        assert [row["request_id"] for row in page["data"]] == found, arguments
    assert "an age such as" in await commands.error("events", "list", "--since", "1y", status=2)


async def test_route_shows_every_verdict(commands: Commands) -> None:
    """`receiver route` shows the destinations of an event, and the filters that exclude the others."""
    await commands.world.add_history(plain("r-1"), failure("e-1"))
    await commands.world.add(b"odd")
    await commands.world.add(plain("new"))
    yes, no = (await commands.run("route", "r-1")).splitlines()
    assert yes.split() == ["yes", "main"]
    assert no.split(maxsplit=1) == ["no", "failures: status is 'OK', the filter allows 'ERROR'"]
    verdicts = [{"destination": name, "refused": None} for name in ("main", "failures")]
    found = await commands.json("route", str(event_id("clipia", "e-1")))
    assert found == {"data": verdicts, "next": None}
    assert "yes main" in " ".join((await commands.run("route", "new")).split())
    (odd,) = await commands.world.rows(events, events.c.state == "unrecognized")
    assert "goes to no destination" in await commands.error("route", str(odd["id"]), status=5)
    assert "no event" in await commands.error("route", "absent", status=4)


async def test_route_knows_the_job(commands: Commands) -> None:
    """A filter on caller or metadata uses the event's job, as in the fan-out."""
    Path("receiver.toml").write_text(
        '[[destinations]]\nname = "gold"\nurl = "file:x"\n'
        'filter = { caller = "shop", metadata = { tier = "gold" } }\n'
    )
    for request_id, metadata in (("gold", {"tier": "gold"}), ("tin", {"tier": "tin"})):
        await commands.world.add_job(request_id, request_id=request_id, metadata=metadata)
    await commands.world.add_history(plain("gold"), plain("tin"), plain("stranger"))
    verdicts = [
        (await commands.json("route", key))["data"][0]["refused"] for key in ("gold", "tin", "stranger")
    ]
    assert verdicts == [
        None,
        "metadata.tier is 'tin', the filter allows 'gold'",
        "caller is absent, the filter allows 'shop'",
    ]


async def kill(world: World, count: int) -> list[str]:
    """Make dead letters; return their ids, newest first."""
    known = {row["id"] for row in await world.rows(deliveries)}
    await world.add_history(*(plain(f"r-{number}") for number in range(count)))
    ids = [row["id"] for row in await world.rows(deliveries) if row["id"] not in known]
    await world.change(
        deliveries,
        deliveries.c.id.in_(ids),
        state="dead",
        error="PublishRejected: [422]",
        attempts=3,
        finished_at=db_time(-86_400.0),
    )
    return [str(each) for each in ids[::-1]]


async def test_deliveries_are_listed_with_their_reasons(commands: Commands) -> None:
    """E4: newest first, in pages, by state, destination and time."""
    assert (await commands.run("deliveries", "list")).strip() == "No deliveries."
    await commands.world.add_history(failure("e-1"))
    ids = await kill(commands.world, 5)
    listed = await commands.run("deliveries", "list", "--state", "dead", "--limit", "2")
    assert [each in listed for each in ids] == [True, True, False, False, False]
    assert "PublishRejected: [422]" in listed
    first = await commands.json("deliveries", "list", "--state", "dead", "--limit", "2")
    assert first["next"] == first["data"][-1]["id"]
    for option in ("--cursor", "--before"):
        rest = await commands.json("deliveries", "list", "--state", "dead", option, first["next"])
        assert [row["id"] for row in first["data"] + rest["data"]] == ids
        assert rest["next"] is None
    assert (first["data"][0]["request_id"], first["data"][0]["attempts"]) == ("r-4", 3)
    for arguments, count in (
        (["--destination", "failures"], 1),
        (["--since", "2100-01-01"], 0),
        (["--until", "2020-01-01"], 0),
        (["--since", "2020-01-01", "--until", "2100-01-01"], 7),
    ):
        assert len((await commands.json("deliveries", "list", *arguments))["data"]) == count
    assert "not the id of a delivery" in await commands.error(
        "deliveries", "list", "--before", "r-1", status=2
    )


async def test_dead_letters_are_retried(commands: Commands) -> None:
    """E4, E15: by id, by filter or all of them; if an id is no dead letter, the exit status is 1."""
    ids = await kill(commands.world, 6)
    assert await commands.run("deliveries", "retry", ids[0], ids[1]) == "main: 2 restarted\n"
    assert "No dead letter matches" in await commands.error("deliveries", "retry", ids[0])
    assert "known: failures, main" in await commands.error(
        "deliveries", "retry", "--destination", "absent", status=2
    )
    yesterday = (datetime.now(UTC) - timedelta(hours=25)).strftime("%Y-%m-%dT%H:%M:%S")
    assert "No dead letter matches" in await commands.error("deliveries", "retry", "--until", yesterday)
    await commands.world.change(
        deliveries, deliveries.c.id == uuid.UUID(ids[2]), finished_at=db_time(-172_800.0)
    )
    assert await commands.json("deliveries", "retry", "--until", yesterday) == {"restarted": {"main": 1}}
    assert await commands.json("deliveries", "retry", "--since", yesterday, ids[3]) == {
        "restarted": {"main": 1}
    }
    assert await commands.run("deliveries", "retry", "--all") == "main: 2 restarted\n"
    assert "say which dead letters" in await commands.error("deliveries", "retry", status=2)
    assert "not the id of a delivery" in await commands.error("deliveries", "retry", "r-1", status=2)
    assert await commands.world.states(deliveries) == {"pending": 6}
    records = await commands.world.rows(attempts)
    assert {row["outcome"] for row in records} == {"restarted"}
    assert all(re.fullmatch("by .+ on the command line", row["error"]) for row in records)


async def test_retrying_everything_comes_to_an_end(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: in batches, each dead letter once, even if the destination rejects them again at once."""
    await kill(commands.world, 7)
    monkeypatch.setattr("receiver.api.dead_letters.MAX_RESTARTED", 3)
    restart = outbox.restart
    batches = 0

    async def rejected_at_once(connection: Any, *arguments: Any, **options: Any) -> dict[str, int]:
        nonlocal batches
        batches += 1
        assert batches < 6, "the command must end"
        done = await restart(connection, *arguments, **options)
        again = deliveries.update().where(deliveries.c.state == "pending")
        await connection.execute(again.values(state="dead", finished_at=db_time(0.0)))
        return done

    monkeypatch.setattr(outbox, "restart", rejected_at_once)
    assert await commands.run("deliveries", "retry", "--all") == "main: 7 restarted\n"


async def test_flagged_files_and_pages_are_listed(commands: Commands) -> None:
    """D11: a file with a warning is intact and listed; a page in place of a file is damaged."""
    world = commands.world
    for number in range(3):
        await world.add(with_files(commands.cdn, f"r-{number}", f"/sandbox/{number}.png"))
    async with world.working():
        await world.until_states(media, stored=3)
    rows = await world.rows(media)
    paths = [Path(row["uri"].removeprefix("file://")) for row in rows]
    page = b"<html>Please wait</html>"
    paths[0].write_bytes(page)
    digest = hashlib.sha256(page).hexdigest()
    await world.change(media, media.c.id == rows[0]["id"], size=len(page), sha256=digest)
    await world.change(media, media.c.id == rows[1]["id"], warning="it ends early")
    said = await commands.try_("media", "verify")
    assert said.status == 1
    assert said.out.splitlines()[:3] == [
        f"not_media  file://{paths[0]} of r-0",
        f"flagged    file://{paths[1]} of r-1: it ends early",
        "2 intact (1 with a warning), 1 damaged",
    ]
    found = json.loads((await commands.try_("media", "verify", "--json")).out)
    assert [row["warning"] for row in found["flagged"]] == ["it ends early"]
    assert "force needs media" in await commands.error("replay", "--all", "--force", status=2)
    async with world.working():
        assert "3 files downloaded again" in await commands.run("replay", "--all", "--media", "--force")
    assert await commands.run("media", "verify") == "3 intact, 0 damaged\n"


async def test_stored_files_are_verified(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """D11: each stored file is read; a damaged one is listed with advice, and the exit status is 1."""
    monkeypatch.setattr("receiver.verification.PAGE_ROWS", 2)
    assert await commands.run("media", "verify") == "0 intact, 0 damaged\n"
    world = commands.world
    for number in range(5):
        await world.add(with_files(commands.cdn, f"r-{number}", f"/sandbox/{number}.png"))
    async with world.working():
        await world.until_states(media, stored=5)
    assert await commands.run("media", "verify") == "5 intact, 0 damaged\n"
    assert await commands.run("media", "verify", "--since", "2100-01-01") == "0 intact, 0 damaged\n"
    paths = [Path(row["uri"].removeprefix("file://")) for row in await world.rows(media)]
    paths[0].unlink()
    paths[3].write_bytes(b"x" * paths[3].stat().st_size)
    said = await commands.try_("media", "verify")
    assert said.status == 1
    lines = said.out.splitlines()
    assert lines[:3] == [
        f"missing    file://{paths[0]} of r-0",
        f"changed    file://{paths[3]} of r-3",
        "3 intact, 2 damaged",
    ]
    assert "receiver replay --media" in said.out
    said = await commands.try_("media", "verify", "--json")
    found = json.loads(said.out)
    assert (said.status, found["intact"]) == (1, 3)
    assert [(row["request_id"], row["finding"]) for row in found["damaged"]] == [
        ("r-0", "missing"),
        ("r-3", "changed"),
    ]
    async with world.working():
        assert "2 files downloaded again" in await commands.run("replay", "r-0", "r-3", "--media")
    assert await commands.run("media", "verify") == "5 intact, 0 damaged\n"
    paths[1].unlink()
    paths[1].mkdir()
    said = await commands.try_("media", "verify")
    assert said.status == 1
    lines = said.out.splitlines()
    assert lines[0].startswith(f"unreadable file://{paths[1]} of r-1: Cannot use ")
    assert "Is a directory" in lines[0]
    assert lines[1] == "4 intact, 1 damaged"
    assert "can have links" in await commands.error("media", "link", "r-0", status=5)
    world.folder.rename(world.folder.with_name("elsewhere"))
    world.folder.write_bytes(b"a file in the place of the folder")
    assert "Cannot use" in await commands.error("media", "verify", status=6)


async def test_files_in_a_bucket_have_links(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: each stored file of an event gets a link for some hours, without a request to the bucket."""
    world = commands.world
    await world.add(with_files(commands.cdn, "r-1", "/sandbox/1.png", "/sandbox/2.png"))
    async with world.working():
        await world.until_states(media, stored=2)
    for name, value in {
        "RECEIVER_STORAGE_URL": "s3://files/some?endpoint=http://127.0.0.1:1&region=us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
    }.items():
        monkeypatch.setenv(name, value)
    assert "is not in the storage" in await commands.error("media", "link", "r-1", status=5)
    async with world.database.write() as connection:
        await connection.execute(media.update().values(uri="s3://files/some/" + media.c.storage_key))
    lines = (await commands.run("media", "link", "r-1", "--hours", "2")).splitlines()
    keys = [row["storage_key"] for row in await world.rows(media)]
    assert [urlsplit(line).path for line in lines] == [f"/files/some/{key}" for key in keys]
    assert all("X-Amz-Expires=7200&" in line and "very-secret" not in line for line in lines)
    found = await commands.json("media", "link", "r-1")
    assert [each["uri"] for each in found["data"]] == [f"s3://files/some/{key}" for key in keys]
    assert "there is no event" in await commands.error("media", "link", "r-2", status=4)
    assert await commands.error("media", "link", "r-1", "--hours", "169", status=2)
