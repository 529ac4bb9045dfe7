"""The command line starts without the modules of its commands."""

import subprocess
import sys

import pytest
import typer.main

from receiver.cli import app
from receiver.cli.commands import SENTENCES, load

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


@pytest.mark.parametrize("name", SENTENCES)
def test_the_table_has_the_sentence_of_each_command(name: str) -> None:
    """The help of a command starts with its sentence in the table, and its object has its name."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # the group's commands
    assert command.get_short_help_str(1000) == SENTENCES[name]
    assert command.name == name
    assert load(name) is load(name)
