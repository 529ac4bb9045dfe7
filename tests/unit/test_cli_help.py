"""The help of every command is readable on a terminal of 80 columns."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from receiver.cli import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command and each group with its path."""
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_name_and_sentence_whole(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name and no help of an option or a command is cut off."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    shown = CliRunner().invoke(app, [*path, "--help"]).stdout
    words = shown.split()
    for parameter in COMMANDS[path].params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("-"):
                assert {name, f"{name},"} & set(words), name
        if parameter.help:
            assert parameter.help.split()[0] in words
            assert " ".join(parameter.help.split()) in " ".join(words)
    for name, each in getattr(COMMANDS[path], "commands", {}).items():
        assert name in words
        assert " ".join(each.get_short_help_str(1000).split()) in " ".join(words)
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        "events list --cursor",
        "replays list --cursor",
        "rejections list --cursor",
        "audit list --cursor",
        "rejections show",
    ],
)
@pytest.mark.parametrize("number", ["-1", "9223372036854775808", "x"])
def test_a_number_that_no_row_has_is_a_usage_error(arguments: str, number: str) -> None:
    """The database's driver would raise OverflowError."""
    assert CliRunner().invoke(app, [*arguments.split(), f"{number}"]).exit_code == 2


def test_aiohttp_is_imported_for_requests_only() -> None:
    """A process that opens no HTTP destination does not import aiohttp, for 0.15 s."""
    code = "import sys, receiver.cli, receiver.process, receiver.app; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("replays show nope", "write an id such as 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e"),
        ("events list --limit x", "write a whole number"),
        ("events list --limit 0", "write 1 or more"),
        (
            "events list --state x",
            "'x' is not one of 'received', 'fetching', 'ready',",
        ),
    ],
)
def test_a_wrong_argument_is_answered_with_advice(arguments: str, advice: str) -> None:
    """A usage error says what to write, in our words."""
    shown = CliRunner().invoke(app, arguments.split())
    assert (shown.exit_code, advice in shown.stderr) == (2, True), shown.stderr
    assert "Input should" not in shown.stderr
    assert "Value error" not in shown.stderr
