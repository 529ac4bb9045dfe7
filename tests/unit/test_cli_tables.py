"""Tables fit terminals of 80 and 200 columns, and nothing is cut or colored for a program that reads them."""

import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.commands import command_environment

from receiver.cli import terminal

ID = "01a1fe1f-4d6d-74d7-af73-a0b5ac94520e"
OTHER = "c7b6521b-55d1-46c4-8952-f1af51482c78"
AT = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)
EVENT = {
    "seq": 12_345,
    "request_id": OTHER,
    "status": "ERROR",
    "model": "seedance-2-0-pro",
    "state": "fetching",
    "received_at": AT,
    "media": {"pending": 1, "stored": 12},
    "deliveries": {"dead": 1, "delivered": 2},
}
DELIVERY = {
    "id": ID,
    "destination": "orders",
    "state": "dead",
    "attempts": 17,
    "request_id": OTHER,
    "created_at": AT,
    "error": "orders answered 422: the field `cost` is missing",
}
JOB = {
    "id": ID,
    "state": "completed",
    "model": "nano-banana-2",
    "caller": "shop",
    "key": "order-4711/hero",
    "created_at": AT,
    "credits": "12 of 12",
}
ROWS: list[dict[str, Any]] = [EVENT, DELIVERY, JOB]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


Print = Callable[..., str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Print:
    """Print rows on a terminal of a width; return the output."""

    def print_(row: dict[str, Any], width: int, **options: Any) -> str:
        console = Console(
            highlight=False, width=width, file=io.StringIO(), force_terminal=True, color_system="standard"
        )
        monkeypatch.setattr(terminal, "stdout", console)
        terminal.print_rows([row, row], *row, none="None.", wrapped="error", **options)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return print_


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("row", ROWS, ids=["event", "delivery", "job"])
def test_rows_fit_the_terminal_and_ids_stay_whole(shown: Print, row: dict[str, Any], width: int) -> None:
    """No line is longer than the terminal, and the id of each row is in one piece."""
    lines = ANSI.sub("", shown(row, width)).splitlines()
    whole = str(row.get("id") or row["request_id"])
    assert sum(whole in line for line in lines) == 2
    # A list of values breaks at the end of the line only, as the terminal does it.
    if width > 40:
        assert all(len(line) <= width for line in lines)
    if width == 200:
        assert all(name in lines[0] for name in row)
        assert len(lines) == 3


def test_a_narrow_terminal_has_the_most_important_columns(
    shown: Print, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns an error wraps, less important columns are left out, and a note names them."""
    text = ANSI.sub("", shown(DELIVERY, 80))
    head = text.splitlines()[0].split()
    assert head == ["id", "destination", "state", "error"]
    assert " ".join(line[59:].strip() for line in text.splitlines()[1:4]) == DELIVERY["error"]
    assert "attempts" in capsys.readouterr().err


def test_a_very_narrow_terminal_has_a_list_of_values(shown: Print) -> None:
    """If even the id and the state do not fit, each value has a line of its own."""
    lines = ANSI.sub("", shown(DELIVERY, 50)).splitlines()
    assert f"id: {ID}" in lines
    assert "state: dead" in lines


def test_dead_is_red(shown: Print) -> None:
    """The state `dead` and the number of dead letters are red, and no other word is."""
    assert "\x1b[31mdead\x1b[0m" in shown(DELIVERY, 200)
    assert "\x1b[31m1 dead\x1b[0m, 2 delivered" in shown(EVENT, 200)
    assert "\x1b[31m" not in shown(JOB | {"key": "dead-end"}, 200)


def in_terminal(code: str, width: int) -> str:
    """Run code of the command line in a terminal of a width; return its output."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {**command_environment(), "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    output, ends = b"", time.monotonic() + 60
    while select.select([parent], [], [], max(0.0, ends - time.monotonic()))[0]:
        try:
            output += os.read(parent, 65_536)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    assert process.wait(timeout=60) == 0
    return output.decode()


CODE = f"""
import json
from datetime import datetime, UTC
from receiver.cli.terminal import print_json, print_line, print_note, print_rows, progress_bar
row = {DELIVERY | {"created_at": None}}
with progress_bar() as progress:
    progress.advance(progress.add_task("files", total=1))
print_rows([row], *row, none="", wrapped="error")
print_line("200 " + json.dumps(row))
print_json(row)
"""


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_has_color_and_its_own_width(width: int) -> None:
    """A real terminal of 80 or 200 columns gets a table that fits it, in color, and a progress bar."""
    table = in_terminal(CODE, width).split("200 {")[0]
    assert "files" in table
    rows = [line for line in ANSI.sub("", table).splitlines() if "files" not in line]
    assert all(len(line) <= width for line in rows)
    assert "\x1b[31mdead\x1b[0m" in table


def test_a_pipe_gets_whole_lines_without_color(tmp_path: Path) -> None:
    """Without a terminal there is no width, no color and no progress bar, and JSON is in one piece."""
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**command_environment(), "COLUMNS": "80", "TERM": "xterm"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stderr == ""
    assert "\x1b" not in run.stdout
    head, row, answer, *document = run.stdout.splitlines()
    assert head.split() == list(DELIVERY)
    assert str(DELIVERY["error"]) in row
    assert answer.endswith("}")
    assert len(document) == len(DELIVERY) + 2
