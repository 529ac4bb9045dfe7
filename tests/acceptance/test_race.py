"""Several processes send the same events at the same time."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.commands import ReceiverProcess, run_command
from support.servers import Postgres

CLIENTS = 4
COPIES = 32
IDS = int(os.environ.get("RECEIVER_TEST_RACE_IDS", "100"))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_race_of_identical_webhooks_is_one_event_each(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """C1, T15: 4 processes × 32 in parallel × 100 ids, to two receivers on PostgreSQL and one on SQLite.

    Every answer is 2xx; there is one event per id and one delivery per destination, and each is forwarded.
    """
    config = tmp_path / "receiver.toml"
    tables = [f'[[destinations]]\nname = "{name}"\nurl = "file:{tmp_path / name}"\n' for name in "ab"]
    config.write_text("".join(tables))
    settings = {"RECEIVER_CONFIG": str(config)}
    receivers = 1
    if kind == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        settings["RECEIVER_DATABASE_URL"] = server.url(template="migrated")
        receivers = 2
    with ExitStack() as stack:
        running = []
        for number in range(receivers):
            folder = tmp_path / f"receiver-{number}"
            folder.mkdir()
            settings.setdefault("RECEIVER_DATABASE_URL", f"sqlite:///{folder / 'receiver.db'}")
            receiver = ReceiverProcess(folder, **settings)
            receiver.measured = False
            running.append(stack.enter_context(receiver))
        answers = run_clients([receiver.url.rsplit(":", 1)[1] for receiver in running])
        ledger = wait_until_forwarded(settings, tmp_path)
    assert answers == {"200 accepted": IDS, "200 duplicate": CLIENTS * COPIES * IDS - IDS}
    assert len({event["id"] for event in ledger}) == len(ledger) == IDS
    assert all(event["deliveries"] == {"delivered": 2} for event in ledger)
    for name in "ab":
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert Counter(line["id"] for line in lines) == Counter(event["id"] for event in ledger)
        assert len({line["deliveryid"] for line in lines}) == IDS


def run_clients(ports: list[str]) -> Counter[str]:
    """Run the client processes to their end and add up their answers."""
    clients = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("race_client.py"), str(IDS), *ports],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        for _ in range(CLIENTS)
    ]
    answers: Counter[str] = Counter()
    for client in clients:
        output, _ = client.communicate(timeout=300)
        assert client.returncode == 0
        answers.update(json.loads(output))
    return answers


def wait_until_forwarded(settings: dict[str, str], folder: Path) -> list[dict[str, object]]:
    """Wait until no work is pending, and return the events as the command shows them."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        result = run_command("events", "list", "--limit", "1000", "--json", settings=settings, cwd=folder)
        assert result.returncode == 0, result.stderr
        found: list[dict[str, object]] = json.loads(result.stdout)["data"]
        if found and all(event["deliveries"] == {"delivered": 2} for event in found):
            return found
        time.sleep(0.5)
    raise AssertionError("not everything was forwarded")
