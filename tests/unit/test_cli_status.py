"""The screen of `receiver status`."""

import io
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from rich.console import Console

from receiver.api.examples import STATUS
from receiver.cli.status import screen
from receiver.cli.terminal import stdout
from receiver.status import Status, age


def status(**changes: Any) -> Status:
    """Return the status of the specification's example, with changes."""
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)
    times = {"at": at, "last_webhook_at": at, "retention": {"older_than_days": 90, "next_at": at}}
    return cast("Status", {**STATUS, **times, **changes})


def shown(found: Status, *, width: int) -> list[str]:
    """Return the lines of the screen."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(screen(found), crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_the_screen_fits_the_terminal(width: int) -> None:
    """No column is cut, and each problem is followed by its command."""
    lines = shown(status(), width=width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "no worker" not in text
    for column in ("waiting", "oldest", "failing", "dead", "delivered/min", "failed/min"):
        assert column in text
    assert "    $ receiver destinations test orders" in lines
    assert [line.split() for line in lines if line.startswith("orders ")] == [
        ["orders", "(down)", "312", "9", "min", "312", "0", "0", "4"]
    ]


def test_the_last_hour_is_a_line_of_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each minute has a bar, the highest one a full one; without such letters there is only the sum."""
    counts = [0] * 57 + [1, 80, 40]
    monkeypatch.setattr(type(stdout), "encoding", "utf-8")
    lines = shown(status(events_last_hour=counts, delivered_last_hour=[0] * 60), width=80)
    at = lines.index("events of 1 h: 121, 80 in a minute at most")
    assert lines[at + 1] == f"  {' ' * 57}▁█▄"
    assert "delivered in 1 h: 0" in lines
    monkeypatch.setattr(type(stdout), "encoding", "iso-8859-1")
    assert "events of 1 h: 121" in shown(status(events_last_hour=counts), width=80)


def test_a_long_command_stays_in_one_line() -> None:
    """A command that is wrapped cannot be copied."""
    command = "receiver deliveries list --destination " + "x" * 63 + " --state pending"
    lines = shown(status(problems=[{"text": "it fails", "command": command}]), width=80)
    assert f"    $ {command}" in lines


def test_a_healthy_receiver_says_so() -> None:
    """Markup in an error is shown as it is."""
    lines = shown(status(problems=[{"text": "[bold]x[/]", "command": "receiver check"}]), width=80)
    assert "  [bold]x[/]" in lines
    assert "No problems found." in shown(status(problems=[]), width=80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_age(seconds: float, text: str) -> None:
    """A time span has one unit."""
    assert age(seconds) == text
