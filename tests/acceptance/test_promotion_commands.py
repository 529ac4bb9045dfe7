"""C9: `receiver events promote` on running processes: what a consumer, an operator and a caller see of it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.commands import ReceiverProcess, run_command
from support.consumers import Answer, Consumer, wait_until
from support.payloads import failure, signed

TOKEN = "operator-0123456789abcdef"
PLAIN = json.dumps(
    {"request_id": "r-1", "status": "OK", "payload": {"model": "m", "output": {"text": "a cat"}, "cost": 3}}
).encode()


class LatestConsumer(Consumer):
    """Keeps the last result of each event, as the documents advise."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, str] = {}

    def take(self, path: str, message: dict[str, Any]) -> Answer:
        """Take a message."""
        if message["data"].get("promoted") or message["id"] not in self.results:
            self.results[message["id"]] = message["data"]["status"]
        return super().take(path, message)


@pytest.fixture(scope="module")
def consumer() -> Iterator[LatestConsumer]:
    """A consumer of all events."""
    with LatestConsumer() as made:
        yield made


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, consumer: LatestConsumer) -> Iterator[ReceiverProcess]:
    """A receiver with an event that another webhook contradicts."""
    folder = tmp_path_factory.mktemp("receiver")
    made = ReceiverProcess(
        folder,
        RECEIVER_DESTINATION_URL=consumer.url,
        RECEIVER_API_TOKENS=f"ops:{TOKEN}:operate+read",
    )
    with made:
        for content, outcome in ((failure("r-1"), "accepted"), (PLAIN, "conflict")):
            answer = httpx.post(f"{made.url}/clipia/webhook", content=content, headers=signed(content))
            assert answer.json()["status"] == outcome
            wait_until(lambda: consumer.messages, "the first result at the consumer")
        yield made


def api(receiver: ReceiverProcess) -> httpx.Client:
    """Return a client of the operator."""
    return httpx.Client(base_url=receiver.url, headers={"authorization": f"Bearer {TOKEN}"})


def why(client: httpx.Client) -> dict[str, Any]:
    """Return the explanation of the event."""
    found: dict[str, Any] = client.get("/v1/explain/r-1").json()
    return found


def receipts(client: httpx.Client) -> list[dict[str, Any]]:
    """Return the receipts of the event."""
    found: list[dict[str, Any]] = client.get("/v1/events/r-1/receipts").json()["data"]
    return found


def results(client: httpx.Client) -> list[str]:
    """Return the counters of results."""
    lines = client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("receiver_generations_total{")]


def run(receiver: ReceiverProcess, *arguments: str, status: int = 0) -> str:
    """Run a command on the machine's own database; return its output."""
    result = run_command(*arguments, settings=receiver.settings, cwd=receiver.folder)
    assert result.returncode == status, result.stdout + result.stderr
    return " ".join((result.stdout + result.stderr).decode().split())


def test_an_operator_promotes_the_second_result(receiver: ReceiverProcess, consumer: LatestConsumer) -> None:
    """C9: show → dry run → promote → the consumer has the new result; the audit has who did it and why."""
    with api(receiver) as client:
        assert why(client)["outcome"] == "needs_action"
        before = results(client)
        assert before, "no result was counted"
        (seq,) = (str(row["seq"]) for row in receipts(client) if row["outcome"] == "conflict")
        assert f" {seq} " in run(receiver, "events", "show", "r-1")
        planned = run(receiver, "events", "promote", "r-1", seq, "--dry-run")
        assert "its status was ERROR and would be OK" in planned
        assert len(consumer.messages) == 1
        done = run(receiver, "events", "promote", "r-1", seq, "--reason", "Clipia corrected it")
        assert "its status was ERROR and is OK" in done
        assert "receiver replays show" in done
        wait_until(lambda: len(consumer.messages) == 2, "the promoted result at the consumer")
        first, second = consumer.messages
        assert first["id"] == second["id"]
        assert (first["data"]["status"], second["data"]["status"]) == ("ERROR", "OK")
        assert "promoted" not in first["data"]
        assert (second["data"]["promoted"], second["data"]["output"]) == (True, {"text": "a cat"})
        assert consumer.results == {first["id"]: "OK"}
        assert [row["outcome"] for row in receipts(client)] == ["promoted", "superseded"]
        wait_until(lambda: why(client)["state"] == "delivered", "delivered, in words")
        promoted, tried = client.get("/v1/audit").json()["data"][:2]
        assert (promoted["operation"], promoted["target"]) == ("promote_receipt", f"r-1/{seq}")
        assert (promoted["reason"], promoted["dry_run"]) == ("Clipia corrected it", False)
        assert (tried["operation"], tried["dry_run"]) == ("promote_receipt", True)
        again = client.post(f"/v1/events/r-1/receipts/{seq}/promote")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "not_promotable")
        # One generation, however often its result is corrected.
        assert results(client) == before


def test_the_call_checks_its_path_and_its_body(receiver: ReceiverProcess) -> None:
    """G1: what is not there is 404 before the body is read; a wrong body is 400."""
    with api(receiver) as client:
        for path, content, expected in (
            ("/v1/events/absent/receipts/1/promote", {}, 404),
            ("/v1/events/r-1/receipts/999/promote", {}, 404),
            ("/v1/events/r-1/receipts/-1/promote", {}, 404),
            ("/v1/events/r-1/receipts/one/promote", {}, 404),
            (f"/v1/events/r-1/receipts/{10**30}/promote", {}, 404),
            ("/v1/events/r-1/receipts/1/promote", {"dry_run": "yes"}, 400),
            ("/v1/events/r-1/receipts/1/promote", {"force": True}, 400),
        ):
            assert client.post(path, json=content).status_code == expected, path
