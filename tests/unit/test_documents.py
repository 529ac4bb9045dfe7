"""The documents name what there is: their links and paths lead to files, and their tables are complete."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from starlette.routing import Route
from support import configuration_reference

from receiver import metrics
from receiver.app import create_app
from receiver.cli import app
from receiver.destination_settings import DestinationSettings
from receiver.destinations import _KINDS
from receiver.setting_fields import SettingFields
from receiver.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
_PATH = re.compile(r"`((?:receiver|tests|docs|deploy|migrations|benchmarks)/(?!.*NAME)[\w./-]+)`")


def text_of(*pages: str) -> str:
    """Return the text of pages."""
    return "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)


def all_text() -> str:
    """Return the text of all pages."""
    return text_of(*(str(page.relative_to(ROOT)) for page in PAGES))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    without_code = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(command: Any, path: str = "") -> Iterator[str]:
    """Return the name of each command, with that of its group in front."""
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{path}{name} ") if hasattr(each, "commands") else [f"{path}{name}"]


def shown_name(metric: MetricWrapperBase) -> str:
    """Return the name that a metric has in `/metrics`."""
    return f"{metric._name}{'_total' if isinstance(metric, Counter) else ''}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    """A page or a heading that is renamed takes its links along."""
    for link in (first or second for first, second in _LINK.findall(page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_index_has_every_page() -> None:
    """Each page of docs/ has one line with a description, and so has it for language models (llmstxt.org)."""
    index = text_of("docs/README.md")
    assert index.startswith("# Clipia receiver\n\n> ")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S.*$", index, re.MULTILINE)
    pages = {os.path.relpath(page, ROOT / "docs") for page in PAGES} - {"README.md"}
    assert sorted(listed) == sorted(pages | {"../CHANGELOG.md"}), "add a line to docs/README.md"
    assert text_of("docs/llms.txt") == index, "run cp docs/README.md docs/llms.txt"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    """A module that is renamed is renamed in the documents, too."""
    for path in _PATH.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_reference_of_settings_is_up_to_date() -> None:
    """Its tables are those that the code makes now."""
    page = configuration_reference.PAGE.read_text(encoding="utf-8")
    assert configuration_reference.render(page) == page, "run python tests/support/configuration_reference.py"


@pytest.mark.parametrize("model", configuration_reference.MODELS)
def test_every_setting_has_a_meaning_and_every_table_a_place(model: str) -> None:
    """Each field has a docstring, and each model a mark in the page."""
    fields = set(configuration_reference.MODELS[model].model_fields) - {"destinations", "sources"}
    assert fields <= configuration_reference.meanings(configuration_reference.MODELS[model]).keys()
    assert f"<!-- fields of {model} -->" in text_of("docs/configuration.md")


def test_the_reference_has_the_settings_that_are_read() -> None:
    """`Settings` adds no field to those of the reference."""
    assert Settings.model_fields.keys() == SettingFields.model_fields.keys()


@pytest.mark.parametrize("name", sorted(DestinationSettings.model_fields))
def test_the_page_of_destinations_has_every_option(name: str) -> None:
    """Each key of a `[[destinations]]` table is in an example or a table."""
    assert re.search(rf"^{name} = |`{name}`|`{name} =", text_of("docs/destinations.md"), re.MULTILINE)


@pytest.mark.parametrize("scheme", _KINDS)
def test_the_page_of_destinations_has_every_scheme(scheme: str) -> None:
    """Each scheme has a row that says when an event counts as delivered, and so does its form with TLS."""
    page = text_of("docs/destinations.md")
    (rows,) = re.findall(r"\| URL \| Delivered means \|\n(.*?)\n\n", page, re.DOTALL)
    assert re.search(rf"`{scheme}(\(s\))?:|`{scheme.removesuffix('s')}\(s\):", rows)


@pytest.mark.parametrize("name", sorted(commands(typer.main.get_command(app))))
def test_the_readme_has_every_command(name: str) -> None:
    """A row may name a group once and then the other commands of it."""
    group, _, command = name.rpartition(" ")
    rows = [
        row for row in text_of("README.md").splitlines() if re.search(rf"^\| .*`(receiver )?{group}\b", row)
    ]
    assert any(re.search(rf"`(receiver )?(\w+ )?{command}\b", row) for row in rows), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    """Each command that a page names in backticks exists, with its options."""
    root: Any = typer.main.get_command(app)
    for span in re.findall(r"`receiver ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        command, (name, *words) = root, re.split(r"[\s=]+", span)
        while name in getattr(command, "commands", {}):
            command, (name, *words) = command.commands[name], words or [""]
        assert command is not root, span
        assert not name or not hasattr(command, "commands"), span
        options = {
            text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word for word in (name, *words) if re.fullmatch("--[a-z-]+", word)}
        assert given <= options | {"--help"}, span


def test_the_documents_have_every_route() -> None:
    """Each path of `/v1` is in a table of calls."""
    app = create_app(Settings.load(clipia_webhook_secret="whsec_test"), worker=False)
    paths = {route.path for route in app.routes if isinstance(route, Route) and route.path.startswith("/v1/")}
    text = all_text()
    assert [path for path in sorted(paths) if not re.search(rf"[`\s]{re.escape(path)}`", text)] == []


@pytest.mark.parametrize(
    "name",
    sorted(shown_name(each) for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)),
)
def test_the_documents_have_every_metric(name: str) -> None:
    """The page of metrics has a table of all of them."""
    assert f"`{name}" in text_of("docs/metrics.md")
