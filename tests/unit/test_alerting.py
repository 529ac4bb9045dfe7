"""When alerts are raised, resolved and told: the pure rules, and each condition."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from receiver import alerts
from receiver.alerts import Seen, find_conditions, make_message
from receiver.core.alerting import KINDS, RUNBOOKS, Alert, Finding, Told, observe, settle
from receiver.db.alerts import Occurrences
from receiver.db.destinations import Circuit
from receiver.db.rows import Backlog
from receiver.disks import DiskStatus

ROOT = Path(__file__).parents[2]
START = datetime(2026, 1, 31, 12, tzinfo=UTC)
ID = uuid.UUID(int=1)


def at(seconds: float) -> datetime:
    """Return a time after the start."""
    return START + timedelta(seconds=seconds)


class Story:
    """One alert, whose condition is read at given times."""

    def __init__(self) -> None:
        self.alert: Alert | None = None
        self.told: list[tuple[float, Told]] = []
        self.began = 0
        self.watched_since = START

    def see(self, seconds: float, finding: Finding | None) -> None:
        """Read the condition; None if it does not hold."""
        if finding is not None:
            self.began += 1
            self.alert = observe(self.alert, finding, now=at(seconds), occurrence=uuid.UUID(int=self.began))
        if self.alert is not None:
            self.alert, told = settle(self.alert, now=at(seconds), watched_since=self.watched_since)
            if told is not None:
                self.told.append((seconds, told))


def down() -> Finding:
    """Return a state that holds."""
    return Finding(kind="destination_down", subject="orders", text="it is down", command="receiver status")


def dead(count: int, last: float) -> Finding:
    """Return dead letters, the last one at a time."""
    return Finding(
        kind="dead_letters",
        subject="orders",
        text="dead",
        command="receiver status",
        count=count,
        first_at=START,
        last_at=at(last),
    )


def always(finding: Finding) -> Callable[[float], Finding]:
    """Return a condition that always holds."""
    return lambda _seconds: finding


CYCLE: list[tuple[float, Told]] = [(15, "raised"), (105, "resolved")]
# Seconds until which the condition is read every 15 s, the condition, and the messages.
STORIES: dict[str, tuple[float, Callable[[float], Finding | None], list[tuple[float, Told]]]] = {
    "a state is told once": (3600, always(down()), [(15, "raised")]),
    "a state that ends is told as resolved": (
        600,
        lambda seconds: down() if seconds < 300 else None,
        [(15, "raised"), (345, "resolved")],
    ),
    "a state of a moment is not told": (600, lambda seconds: down() if seconds < 10 else None, []),
    "a state that flaps every half minute is one alert": (
        3000,
        lambda seconds: down() if seconds % 60 < 30 else None,
        [(15, "raised")],
    ),
    "a state that flaps slowly is told every ten minutes": (
        1500,
        lambda seconds: down() if seconds % 150 < 60 else None,
        [
            (15, "raised"),
            (105, "resolved"),
            (615, "raised"),
            (705, "resolved"),
            (1215, "raised"),
            (1305, "resolved"),
        ],
    ),
    "an open alert is repeated after a day": (
        100_000,
        always(down()),
        [(15, "raised"), (15 + 86_400, "raised")],
    ),
    "a burst is one message": (
        580,
        lambda seconds: dead(int(seconds) + 1, min(seconds, 9)),
        [(15, "raised")],
    ),
    "later dead letters are told together": (
        1200,
        lambda seconds: dead(1, 0) if seconds < 60 else dead(2, 60) if seconds < 300 else dead(3, 300),
        [(15, "raised"), (615, "raised")],
    ),
    "dead letters that were retried are resolved": (
        300,
        lambda seconds: dead(2, 0) if seconds < 60 else None,
        CYCLE,
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_messages_about_an_alert(name: str) -> None:
    """An alert is gathered, told, limited, repeated and resolved."""
    until, condition, told = STORIES[name]
    story = Story()
    for seconds in range(0, int(until) + 1, 15):
        story.see(seconds, condition(seconds))
    assert story.told == told


def test_a_time_without_readings_resolves_nothing() -> None:
    """After a gap the condition has to be away for a whole minute of readings, and then it is resolved."""
    story = Story()
    for seconds in (0, 15, 30):
        story.see(seconds, down())
    story.watched_since = at(1000)
    for seconds in (1000, 1015, 1030):
        story.see(seconds, None)
    story.see(1045, down())
    assert story.told == [(15, "raised")]
    for seconds in (1060, 1075, 1090, 1105):
        story.see(seconds, None)
    assert story.told == [(15, "raised"), (1105, "resolved")]


def test_an_alert_that_comes_back_is_another_one() -> None:
    """All messages from an alert's start to its end have one id, and the next alert has another."""
    story = Story()
    ids = []
    for seconds in (0, 15, 30, 100, 200, 800, 815):
        story.see(seconds, None if seconds in {100, 200} else down())
        assert story.alert is not None
        ids.append(story.alert.occurrence.int)
    assert ids == [1, 1, 1, 1, 1, 4, 4]
    assert story.alert is not None
    assert (story.alert.raised_at, story.alert.first_at) == (at(800), at(800))


def circuit(destination: str, seconds: float) -> Circuit:
    """Return an open circuit."""
    return Circuit(
        destination=destination, process=ID, owner="web-1/7", open_since=at(seconds), error="Secret"
    )


def disk(free: int | None) -> DiskStatus:
    """Return a disk of 1,000 bytes."""
    return DiskStatus(holds="media", path="/data", free_bytes=free, total_bytes=1000)


SOME = Occurrences(3, at(1), at(2), ("a", "b", "c"))
CONDITIONS: list[tuple[dict[str, Any], list[tuple[str, str, int]]]] = [
    ({}, []),
    ({"circuits": [circuit("orders", 5), circuit("orders", 3)]}, [("destination_down", "orders", 1)]),
    (
        {
            "circuits": [circuit("orders", 5)],
            "backlog": {"destination:orders": Backlog(rows=7, oldest=9000.0)},
        },
        [("destination_down", "orders", 7)],
    ),
    (
        {"dead_letters": {"orders": SOME, "mail": SOME}},
        [("dead_letters", "orders", 3), ("dead_letters", "mail", 3)],
    ),
    ({"unsure": SOME}, [("jobs_unsure", "jobs", 3)]),
    ({"refused_accounts": ["live-1"]}, [("submissions_paused", "live-1", 1)]),
    ({"frozen_at": at(4)}, [("submissions_paused", "freeze", 1)]),
    ({"mismatches": {"clipia": SOME}}, [("secret_mismatch", "clipia", 3)]),
    ({"mismatches": {"clipia": SOME._replace(number=2)}}, []),
    ({"backlog": {"media": Backlog(rows=2, oldest=601.0)}}, [("backlog_old", "media", 2)]),
    ({"backlog": {"media": Backlog(rows=2, oldest=599.0)}}, []),
    ({"backlog": {"poll": Backlog(rows=2, oldest=9000.0)}}, []),
    ({"backlog": {"destination:a": Backlog(rows=2, oldest=9000.0)}}, [("backlog_old", "destination:a", 2)]),
    ({"backlog": {"destination:a": Backlog(rows=2, oldest=9000.0)}, "paused": ["a"]}, []),
    ({"disks": [disk(49)], "host": "web-1"}, [("disk_nearly_full", "web-1:/data", 1)]),
    ({"disks": [disk(50)], "host": "web-1"}, []),
    ({"disks": [disk(None)], "host": "web-1"}, []),
    ({"failed_pruning": at(1)}, [("retention_failed", "prune", 1)]),
]


@pytest.mark.parametrize(("rows", "found"), CONDITIONS)
def test_conditions(rows: dict[str, Any], found: list[tuple[str, str, int]]) -> None:
    """Each condition is found in its rows, and its absence too."""
    findings = list(find_conditions(Seen(**rows)))
    assert [(each.kind, each.subject, each.count) for each in findings] == found
    for each in findings:
        assert each.command.startswith("receiver ")
        # The words of a peer may quote a payload.
        assert "Secret" not in each.text


def test_every_alert_has_a_condition_and_a_runbook() -> None:
    """Each kind of alert is found by a condition above, and its runbook is a page of the documents."""
    assert {kind for _, found in CONDITIONS for kind, _, _ in found} == {*KINDS}
    assert RUNBOOKS.keys() == {*KINDS}
    for page in RUNBOOKS.values():
        assert (ROOT / page).is_file(), page


def test_a_message_says_what_and_how_many() -> None:
    """A message has the alert's facts, an id of its own, and the same alert id until the end."""
    alert = observe(None, dead(100, 9), now=at(10), occurrence=ID)
    raised, resolved = (make_message(alert, told, at=at(20)) for told in ("raised", "resolved"))
    assert raised["data"] == {
        "id": str(ID),
        "alert": "dead_letters",
        "subject": "orders",
        "text": "dead",
        "command": "receiver status",
        "runbook": "docs/runbooks/dead-letters.md",
        "count": 100,
        "first_at": START.isoformat(),
        "last_at": at(9).isoformat(),
        "raised_at": at(10).isoformat(),
        "resolved_at": None,
        "examples": [],
    }
    assert raised["id"] != resolved["id"]
    assert (raised["type"], resolved["type"]) == (alerts.TYPES["raised"], alerts.TYPES["resolved"])
    assert resolved["data"]["text"] == "over: dead"
