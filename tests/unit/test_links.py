"""The pages that stand for commands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import receiver
from receiver.dashboard import PAGES
from receiver.dashboard.links import FOR_THE_SHELL, page_of

FOLDER = Path(receiver.__file__).parent
SOURCES = (
    FOLDER / "status.py",
    FOLDER / "destination_control.py",
    *sorted((FOLDER / "explain").glob("*.py")),
    FOLDER / "alerts.py",
    FOLDER / "core" / "alerting.py",
)
"""The modules that name the next command."""
COMMAND = re.compile(r"receiver [a-z][a-z-]*( [a-zA-Z-]|$)")


def texts(path: Path) -> Iterator[str]:
    """Return the strings of a module that are not docstrings; a value in one is the word `VALUE`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inside:
            yield node.value


def commands() -> list[str]:
    """Return the commands that the models may name."""
    found = {text for path in SOURCES for text in texts(path) if COMMAND.match(text)}
    return sorted(found)


def test_commands_are_found() -> None:
    """The commands of each module are seen."""
    found = commands()
    assert "receiver jobs thaw" in found
    assert "receiver deliveries list --destination VALUE --state dead" in found
    assert len(found) > 20


@pytest.mark.parametrize("command", commands())
def test_each_command_has_a_page(command: str) -> None:
    """A command that a model names leads to a page of the dashboard, or is known to be for a shell."""
    page = page_of(command)
    if page is None:
        assert command.split()[1] in FOR_THE_SHELL, command
        return
    path = page.partition("?")[0].removeprefix("/dashboard")
    templates = [re.sub(r"\{[^}]*\}", "[^/]+", each.path) for each in PAGES if each.method == "GET"]
    assert any(re.fullmatch(template, path) for template in templates), (command, page)


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("receiver events show a/b?c", "/dashboard/generations/a%2Fb%3Fc"),
        ("receiver events fetch 'a b&c'", "/dashboard/events/fetch?request_id=a%20b%26c"),
        (
            "receiver deliveries list --destination orders --state dead",
            "/dashboard/dead-letters?destination=orders&state=dead",
        ),
        ("receiver replay 1 --media", "/dashboard/generations/1"),
        ("receiver worker", None),
        ("receiver", None),
        ("receiver events show 'unclosed", None),
        ("", None),
    ],
)
def test_page_of(command: str, page: str | None) -> None:
    """The argument of a command becomes one segment or parameter of the page's address."""
    assert page_of(command) == page
