"""The command line starts without the modules of its commands."""

import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from receiver.cli import app
from receiver.cli.commands import GROUPS, SENTENCES, load
from receiver.cli.completion import MODELS
from receiver.cli.examples import EXAMPLES
from receiver.sandbox import catalogue

HEAVY = [
    "sqlalchemy",
    "alembic",
    "httpx",
    "pydantic",
    "pydantic_settings",
    "starlette",
    "uvicorn",
    "structlog",
]
COMPLETES = {"_RECEIVER_COMPLETE": "complete_bash"}


def imported_by(arguments: str, **environment: str) -> tuple[str, set[str]]:
    """Return the output of a command line, and the heavy packages that its process imported."""
    code = f"""
import atexit, sys
atexit.register(lambda: print(*({HEAVY} & sys.modules.keys()), file=sys.stderr))
sys.argv = ["receiver", *{arguments.split()}]
from receiver.__main__ import main
main()
""".replace(str(HEAVY), f"set({HEAVY})")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return run.stdout, set(run.stderr.split())


@pytest.mark.parametrize("arguments", ["--version", "--help", ""])
def test_the_start_imports_no_heavy_package(arguments: str) -> None:
    """`--version` and the list of commands need neither the database's libraries nor those of HTTP."""
    assert imported_by(arguments)[1] & {*HEAVY, "rich"} == set()


def test_the_completion_of_a_name_imports_no_heavy_package() -> None:
    """A shell completes the name of a command without the modules of commands."""
    shown, imported = imported_by("", COMP_WORDS="receiver re", COMP_CWORD="1", **COMPLETES)
    assert set(shown.split()) == {name for name in SENTENCES if name.startswith("re")}
    assert imported <= {"pydantic"}  # typer's own


def test_the_completion_of_a_name_in_a_group_imports_no_heavy_package() -> None:
    """A shell completes the commands of a group without their module."""
    shown, imported = imported_by("", COMP_WORDS="receiver events ", COMP_CWORD="2", **COMPLETES)
    assert set(shown.split()) == set(GROUPS["events"])
    assert imported <= {"pydantic"}


@pytest.mark.parametrize("name", GROUPS)
def test_the_table_has_the_commands_of_each_group(name: str) -> None:
    """The names of a group's commands are those in the table, and its help is its sentence there."""
    assert (
        tuple(each.name or each.callback.__name__ for each in load(name).registered_commands) == GROUPS[name]
    )
    assert load(name).info.help == SENTENCES[name]


def complete(monkeypatch: pytest.MonkeyPatch, *words: str) -> set[str]:
    """Return the words that a shell completes the last word to."""
    monkeypatch.setenv("COMP_WORDS", " ".join(("receiver", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_RECEIVER_COMPLETE", "complete_bash")
    return set(CliRunner().invoke(app, [], prog_name="receiver").stdout.split())


def test_destinations_and_models_are_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, migrated_sqlite: Path
) -> None:
    """A shell completes the configured destinations, and models that Clipia documents or that are in use."""
    database = tmp_path / "receiver.db"
    database.write_bytes(migrated_sqlite.read_bytes())
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{database}")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "INSERT INTO events"
            " (id, source, request_id, origin, state, model, body, body_sha256, received_at)"
            " VALUES (x'00', 'clipia', 'r-1', 'webhook', 'ready', 'nano-in-use', x'', x'', '2026-11-30')"
        )
    Path("receiver.toml").write_text(
        "".join(
            f'[[destinations]]\nname = "{name}"\nurl = "file:{name}.jsonl"\n' for name in ("orders", "other")
        )
    )
    monkeypatch.setenv("RECEIVER_DESTINATION_URL", "file:x.jsonl")
    everything = {"orders", "other", "default"}
    for words in (
        *(("deliveries", "list", "--destination"), ("events", "list", "--destination"), ("replay", "--to")),
        *(("destinations", "pause"), ("tail", "--destination"), ("deliveries", "move", "old")),
    ):
        assert complete(monkeypatch, *words, "''") == everything, words
        assert complete(monkeypatch, *words, "or") == {"orders"}
    for line in ("models", "submit", "estimate", "events list --model", "jobs list --model"):
        assert complete(monkeypatch, *line.split(), "nano") == {"nano-banana-2", "nano-in-use"}, line
    Path("receiver.toml").write_text("broken =")
    assert complete(monkeypatch, "destinations", "pause", "d") == {"default"}
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{tmp_path / 'absent.db'}")
    assert complete(monkeypatch, "models", "nano") == {"nano-banana-2"}
    assert not (tmp_path / "absent.db").exists()


def test_the_completed_models_are_those_of_the_sandbox() -> None:
    """The list of documented models is that of the sandbox, whose import would take too long."""
    assert set(MODELS) == set(catalogue.MODELS)


@pytest.mark.parametrize("words", EXAMPLES)
def test_examples_are_valid_command_lines(words: str) -> None:
    """Each example is parsed by the command's own options, and belongs to the command that shows it."""
    shown = CliRunner().invoke(app, [*words.split(), "--help"]).stdout
    for example in EXAMPLES[words]:
        assert shown.rstrip().endswith("\n".join(f"    {each}" for each in EXAMPLES[words]))
        program, *arguments = shlex.split(example)
        assert program == "receiver"
        command: Any = typer.main.get_command(app)
        context, path = command.make_context("receiver", arguments), []
        while hasattr(command, "commands"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            path.append(name)
            context = command.make_context(name, rest, parent=context)
        assert " ".join(path) == words


def test_every_command_has_examples() -> None:
    """Each command, apart from groups, has an example."""
    group: Any = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():
        found |= {f"{name} {each}" for each in getattr(command, "commands", ())} or {name}
    assert found == set(EXAMPLES)


@pytest.mark.parametrize("name", SENTENCES)
def test_the_table_has_the_sentence_of_each_command(name: str) -> None:
    """The help of a command starts with its sentence in the table, and its object has its name."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # the group's commands
    assert command.get_short_help_str(1000) == SENTENCES[name]
    assert command.name == name
    assert load(name) is load(name)
