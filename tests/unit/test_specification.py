"""The API's specification: valid, complete, with true examples; and its page for people."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route
from support.specification import closed, fetch, make_app

from receiver.api.answers import ERROR_CODES
from receiver.db.rows import JobState

ROOT = Path(__file__).parents[2]
METHODS = {"get", "post", "delete", "put", "patch"}
Json = dict[str, Any]


@pytest.fixture
def app(tmp_path: Path) -> Starlette:
    """A receiver with both halves."""
    return make_app(tmp_path)


@pytest.fixture
async def specification(app: Starlette) -> Json:
    """The document as it is served."""
    found: Json = (await fetch(app, "/openapi.json")).json()
    return found


def operations(specification: Json) -> Iterator[tuple[str, Json]]:
    """Return the operations with their method and path."""
    for path, methods in specification["paths"].items():
        for method in METHODS & methods.keys():
            yield f"{method.upper()} {path}", methods[method]


def parts(value: Any) -> Iterator[Json]:
    """Return all objects of a document."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(each)


def test_the_specification_is_valid(specification: Json) -> None:
    """The document is OpenAPI 3.1, each reference leads to a schema, and each scheme is declared."""
    validate(specification)
    assert specification["openapi"].startswith("3.1")
    names = specification["components"]["schemas"]
    used = {part["$ref"] for part in parts(specification) if isinstance(part.get("$ref"), str)}
    # A schema that nothing refers to is left over.
    assert used == {f"#/components/schemas/{name}" for name in names}
    for name, operation in operations(specification):
        for choice in operation["security"]:
            assert choice.keys() <= specification["components"]["securitySchemes"].keys(), name
    ids = [operation["operationId"] for _, operation in operations(specification)]
    assert len(ids) == len(set(ids))


def test_the_specification_has_every_route_and_no_other(app: Starlette, specification: Json) -> None:
    """A call that is served is in the document, and one in the document is served. Pages are no calls."""
    served = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, Route) and not route.path.startswith("/dashboard")
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {name for name, _ in operations(specification)} == served


def test_parameters_have_their_bounds(specification: Json) -> None:
    """A parameter has the bounds, the default and the values that the receiver checks."""
    listed, shown = (specification["paths"][path]["get"] for path in ("/v1/jobs", "/v1/jobs/{id}"))
    found = {
        parameter["name"]: parameter["schema"] for parameter in (*listed["parameters"], *shown["parameters"])
    }
    assert found["limit"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert found["wait"] == {"type": "number", "minimum": 0, "maximum": 300, "default": 0}
    assert found["state"] == {"type": "string", "enum": list(get_args(JobState))}
    assert found["model"] == {"type": "string"}
    assert found["since"]["anyOf"] == [
        {"format": "date-time"},
        {"format": "date"},
        {"pattern": "^[0-9]{1,5}[smhdw]$"},
    ]
    assert found["metadata"]["patternProperties"] == {"^metadata\\.": {"type": "string"}}


def test_the_page_of_the_api_has_every_call(specification: Json) -> None:
    """docs/api.md has a row for each call under /v1, with its scope."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name, operation in operations(specification):
        if " /v1/" in name:
            ((scope,),) = (choice["token"] for choice in operation["security"])
            assert re.search(rf"^\| `{re.escape(name)}` \| `{scope}` \|", page, re.MULTILINE), name


def test_the_page_of_the_api_has_every_error() -> None:
    """docs/api.md has a row for each code of the receiver's own errors, with its status."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for code, (status, _) in ERROR_CODES.items():
        assert re.search(rf"^\| {int(status)} \| `{code}` \|", page, re.MULTILINE), code


def test_examples_fit_their_schemas(specification: Json) -> None:
    """Each body and each successful answer has an example, which has no field that its schema lacks."""
    strict = closed(specification)
    for name, operation in operations(specification):
        if "/v1/" not in name:
            continue
        contents = [operation["requestBody"]["content"]] if "requestBody" in operation else []
        contents += [
            answer["content"] for status, answer in operation["responses"].items() if status.startswith("2")
        ]
        for content in contents:
            (media,) = content.values()
            schema = closed(media["schema"]) | {"components": strict["components"]}
            problems = [error.message for error in OAS31Validator(schema).iter_errors(media["example"])]
            assert problems == [], name


class _Page(HTMLParser):
    """Collects tags, addresses and the text of a page, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.styles: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            assert name not in {"style", "src"}, name
            if name == "id":
                assert value not in self.ids, value
                self.ids.add(value or "")
            if name == "href":
                self.links.append(value or "")
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.styles.append(data)


async def test_the_page_needs_no_script_and_no_other_server(app: Starlette, specification: Json) -> None:
    """`/docs` shows each call and each schema; a policy allows its own style and forbids everything else."""
    response = await fetch(app, "/docs")
    page = _Page()
    page.feed(response.text)
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "img", "iframe", "link", "form", "object"}
    assert {operation["operationId"] for _, operation in operations(specification)} <= page.ids
    assert {f"schema-{name}" for name in specification["components"]["schemas"]} <= page.ids
    for link in page.links:
        assert link == "openapi.json" or link.removeprefix("#") in page.ids, link
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert "url(" not in style
    assert "@import" not in style
