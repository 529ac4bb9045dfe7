"""Every command with `--url`: it works with a receiver elsewhere and without a database, or says why not."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
from structlog.testing import capture_logs
from support.events import opened, plain
from support.payloads import SECRET, failure
from support.serving import serving

from receiver.app import create_app
from receiver.cli import app, main
from receiver.client import Client
from receiver.db.database import Database
from receiver.db.tables import deliveries, events
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, running
from receiver.sandbox import create_app as create_sandbox
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"
MODEL = "nano-banana-2"
INPUT = '{"prompt": "a cat"}'

REMOTE: dict[str, tuple[list[str], int, str]] = {
    "status": ([], 0, "fanout"),
    "why": (["r-1"], 0, "deliver"),
    "tail": (["--timeout", "0"], 0, ""),
    "models": ([MODEL], 0, MODEL),
    "estimate": ([MODEL, "--input", INPUT], 0, "12 credits"),
    "account": ([], 0, "credits"),
    "submit": ([MODEL, "--input", INPUT, "--key", "k-2", "--json"], 0, '"caller": "all"'),
    "jobs list": ([], 0, "unsure"),
    "jobs show": (["JOB"], 0, "k-1"),
    "jobs cost": ([], 0, "total"),
    "jobs cancel": (["JOB", "--yes"], 0, "is canceled"),
    "jobs resubmit": (["JOB", "--yes"], 0, "will be submitted again"),
    "jobs freeze": (["--reason", "a test"], 0, "frozen"),
    "jobs thaw": ([], 0, "accepted and submitted again"),
    "events list": (["--limit", "1000"], 0, "r-250"),
    "events show": (["r-1"], 0, "Receipts"),
    "events fetch": (["absent"], 5, "absent"),
    "events recover": ([], 0, "0 events recovered"),
    "events promote": (["r-1", "999999"], 4, "no such receipt"),
    "events erase": (["r-2"], 0, "is erased"),
    "deliveries list": (["--state", "dead"], 0, "refused"),
    "deliveries show": (["DEAD"], 0, "refused"),
    "deliveries failures": ([], 0, "orders"),
    "deliveries retry": (["DEAD"], 0, "orders: 1 restarted"),
    "deliveries move": (["gone", "orders"], 1, "no delivery to 'gone'"),
    "deliveries discard": (["gone"], 1, "no delivery to 'gone'"),
    "destinations list": ([], 0, "orders"),
    "destinations pause": (["orders"], 0, "orders"),
    "destinations resume": (["orders"], 0, "orders"),
    "destinations test": (["orders"], 0, "orders"),
    "replay": (["r-1", "--no-wait"], 0, "1 event"),
    "replays list": ([], 0, "pending"),
    "replays show": (["REPLAY"], 0, "pending"),
    "replays cancel": (["REPLAY"], 0, "canceled"),
    "route": (["r-1"], 0, "orders"),
    "prune": (["--older-than", "90d", "--dry-run"], 0, "0 events"),
    "media verify": ([], 0, "0 intact"),
    "media link": (["r-1"], 0, ""),
    "media give-up": (["r-1"], 1, "No download"),
    "settings": ([], 0, "CLIPIA_KEY"),
    "rejections list": ([], 0, "no_signature"),
    "rejections causes": ([], 0, "no_signature"),
    "rejections show": (["REJECTION"], 0, "no_signature"),
    "alerts list": ([], 0, "No alerts"),
    "audit list": ([], 0, "erase_event"),
    "retention list": ([], 0, "No runs"),
}
"""Arguments of each command that works with a receiver elsewhere, its status, and a part of its output."""
LOCAL: dict[str, list[str]] = {
    "serve": [],
    "worker": [],
    "migrate": [],
    "check": [],
    "healthcheck": [],
    "demo": [],
    "dashboard": [],
    "sandbox": [],
    "send": ["payload.json"],
    "events export": ["-"],
    "events import": ["-"],
}
"""Arguments of each command that only works on this machine."""


def names(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Return the names of all commands."""
    if not hasattr(command, "list_commands"):
        yield " ".join(path)
        return
    for name in command.list_commands(None):
        yield from names(command.get_command(None, name), (*path, name))


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A receiver on another machine."""

    url: str
    ids: dict[str, str]


@pytest.fixture
async def elsewhere(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Elsewhere]:
    """A receiver with rows of each kind, and a worker that is not running."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    options = SandboxOptions(duration=60, **WITHOUT_LIMITS)
    async with running(create_sandbox(options, secret=SECRET)) as clipia:
        settings = Settings.load(
            database_url=f"sqlite:///{path}",
            storage_url=f"file:{tmp_path / 'media'}",
            clipia_webhook_secret=SECRET,
            clipia_key="clipia_live_x",
            clipia_base_url=clipia,
            api_tokens=f"all:{TOKEN}",
            destinations=[{"name": "orders", "url": f"file:{tmp_path / 'events.jsonl'}"}],
        )
        database = Database(f"sqlite:///{path}")
        async with (
            serving(create_app(settings, worker=False)) as url,
            opened(database, tmp_path / "media") as world,
        ):
            world.add_destination("orders")
            await world.add_history(*(plain(f"r-{number}") for number in range(251)), failure("f-1"))
            first = deliveries.c.event_seq == 1
            await world.change(deliveries, first, state="dead", error="refused")
            await world.change(deliveries, ~first, state="delivered")
            await world.change(events, state="ready")
            yield Elsewhere(url=url, ids=await fill(url))
        await database.close()


async def fill(url: str) -> dict[str, str]:
    """Make a job that has ended, a replay and a rejected request; return the ids of rows."""
    async with Client(url, TOKEN) as client:
        job = await client.submit_job(MODEL, {"prompt": "a cat"}, key="k-1")
        again = await client.submit_job(MODEL, {"prompt": "a cat"}, key="k-1")
        assert (job.new, again.new, again.id) == (True, False, job.id)
        assert (job.has_webhook, job.live) == (False, True)
        assert (await client.cancel_job(job.id)).state == "unsure"
        assert (await client.show_job(job.request_id)).id == job.id
        dead = await client.list_deliveries(state="dead")
        async with httpx.AsyncClient(base_url=url) as other:
            assert (await other.post("/clipia/webhook", content=b"unsigned")).status_code == 401
        rejected: list[Any] = []
        async with asyncio.timeout(30):
            while not rejected:
                await asyncio.sleep(0.05)
                rejected = [*(await client.list_rejections()).data]
    return {"JOB": str(job.id), "DEAD": str(dead.data[0]["id"]), "REJECTION": str(rejected[0]["id"])}


@pytest.fixture
def no_database(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Forbid new databases and the settings of a receiver, once the other machine has its own."""

    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a command for a receiver elsewhere opens a database, or reads the settings")

    monkeypatch.setattr(Database, "__init__", forbidden)
    monkeypatch.setattr(Settings, "load", forbidden)
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    return elsewhere


class Terminal:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = patch

    async def run(self, *arguments: str) -> tuple[int, str]:
        """Return the exit status of a command and its output."""
        self._patch.setattr(sys, "argv", ["receiver", *arguments])
        self._capsys.readouterr()
        # In a thread, because it starts an event loop of its own.
        with pytest.raises(SystemExit) as ended, capture_logs():
            await asyncio.to_thread(main)
        shown = self._capsys.readouterr()
        return int(ended.value.code or 0), " ".join((shown.out + shown.err).split())


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal on a machine without a receiver."""
    return Terminal(capsys, monkeypatch)


def test_every_command_is_in_these_tests() -> None:
    """A new command works with --url, or says why not."""
    # It needs a process of its own: tests/acceptance/test_agent_processes.py.
    elsewhere = {"mcp"}
    assert set(names(typer.main.get_command(app))) == REMOTE.keys() | LOCAL.keys() | elsewhere


async def test_commands_work_with_a_receiver_elsewhere(no_database: Elsewhere, terminal: Terminal) -> None:
    """Each command that reads or acts does so over the API alone."""
    ids = dict(no_database.ids)
    wrong = {}
    for name, (arguments, status, text) in REMOTE.items():
        given = [ids.get(each, each) for each in arguments]
        options = ("--url", no_database.url, "--token", TOKEN)
        found = await terminal.run(*options, *name.split(), *given)
        if name == "replay":
            ids["REPLAY"] = found[1].split()[1].strip(":")
        if found[0] != status or text not in found[1]:
            wrong[name] = found
    assert wrong == {}


async def test_commands_of_this_machine_say_so(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --url they are usage errors; the variable alone does not keep anyone from them."""
    for name, arguments in LOCAL.items():
        status, shown = await terminal.run("--url", "http://receiver.test", *name.split(), *arguments)
        assert status == 2, (name, shown)
        assert "does not work with a receiver elsewhere" in shown, name
    monkeypatch.setenv("RECEIVER_URL", "http://receiver.test")
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")
    assert (await terminal.run("migrate"))[0] == 0


async def test_the_variables_name_the_receiver(
    no_database: Elsewhere, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """RECEIVER_URL and RECEIVER_TOKEN do the same as the options; a token may be in a file."""
    monkeypatch.setenv("RECEIVER_URL", no_database.url)
    status, shown = await terminal.run("events", "list")
    assert (status, "RECEIVER_TOKEN is not set" in shown) == (2, True)
    monkeypatch.setenv("RECEIVER_TOKEN", TOKEN)
    page = json.loads((await terminal.run("events", "list", "--limit", "201", "--json"))[1])
    assert (len(page["data"]), page["data"][0]["request_id"]) == (201, "f-1")
    rest = json.loads((await terminal.run("events", "list", "--cursor", page["next"], "--json"))[1])
    assert rest["data"][0]["seq"] == page["data"][-1]["seq"] - 1
    monkeypatch.delenv("RECEIVER_TOKEN")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert (await terminal.run("--token", f"@{tmp_path / 'token'}", "status"))[0] == 0
    status, shown = await terminal.run("--token", "wrong-0123456789abcdef", "status")
    assert (status, "does not know the token" in shown) == (5, True)
    assert "wrong-0123456789" not in shown
    status, shown = await terminal.run(
        *("--token", TOKEN, "submit", MODEL, "--input", INPUT, "--caller", "shop")
    )
    assert (status, "takes the token's name" in shown) == (2, True)
