"""The specification as an HTML page: without scripts, and without requests to other servers."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any, Final

JsonObject = Mapping[str, Any]

_STYLE: Final = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --dim: #57606a; --link: #0a58ca;
  --get: #0a6d3a; --post: #0a58ca; --delete: #b42318; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #1c2128; --dim: #9da7b3;
  --link: #79b8ff; --get: #56d364; --post: #79b8ff; --delete: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3; } }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; text-transform: capitalize; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
a { color: var(--link); } nav a { margin-right: .8rem; white-space: nowrap; }
code, pre { font: .875em/1.5 ui-monospace, monospace; }
code { background: var(--soft); border-radius: 4px; padding: .1em .3em; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; overflow-x: auto;
  padding: .7rem; overflow-wrap: normal; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
details > div { border-top: 1px solid var(--line); padding: .3rem .8rem 1rem; }
summary { cursor: pointer; padding: .5rem .8rem; }
summary code { background: none; font-weight: 600; padding: 0; }
summary small { color: var(--dim); display: block; font-size: .9rem; }
.method { display: inline-block; font: 700 .8rem/1 ui-monospace, monospace; min-width: 3.6rem; }
.get { color: var(--get); } .post { color: var(--post); } .delete { color: var(--delete); }
dl { margin: 0; } dt { margin-top: .5rem; } dd { margin: 0 0 0 1.2rem; }
dt small, dd { color: var(--dim); } dd code, dt code, dd pre { color: CanvasText; }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_METHODS: Final = ("get", "post", "delete", "put", "patch")


def make_page(specification: JsonObject) -> str:
    """Return the page of a specification."""
    info = specification["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    tags = [tag["name"] for tag in specification["tags"]]
    links = [f'<a href="#{escape(tag)}">{escape(tag)}</a>' for tag in (*tags, "schemas")]
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>{_paragraphs(info['description'])}",
            '<p>For programs: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).</p>',
            f"<nav>{' '.join(links)}</nav><main>",
            *(part for tag in tags for part in _section(specification, tag)),
            *_schemas(specification["components"]["schemas"]),
            "</main></body></html>\n",
        )
    )


def _section(specification: JsonObject, tag: str) -> Iterator[str]:
    yield f'<h2 id="{escape(tag)}">{escape(tag)}</h2>'
    for path, methods in specification["paths"].items():
        for method in _METHODS:
            operation = methods.get(method)
            if operation is not None and tag in operation["tags"]:
                yield from _operation(path, method, operation)


def _operation(path: str, method: str, operation: JsonObject) -> Iterator[str]:
    yield f'<details id="{escape(operation["operationId"])}"><summary>'
    yield f'<span class="method {method}">{method.upper()}</span> <code>{escape(path)}</code>'
    yield f"<small>{_inline(operation['summary'])}</small></summary><div>"
    yield _paragraphs(operation.get("description", ""))
    yield from _parameters(operation.get("parameters", ()))
    if "requestBody" in operation:
        yield "<h3>Body</h3>"
        yield from _content(operation["requestBody"]["content"])
    yield "<h3>Answers</h3><dl>"
    for status, answer in operation["responses"].items():
        yield f"<dt><code>{escape(status)}</code> {_inline(answer['description'])}</dt>"
        if status.startswith("2"):
            yield f"<dd>{''.join(_content(answer['content']))}</dd>"
    yield "</dl></div></details>"


def _parameters(parameters: Iterable[JsonObject]) -> Iterator[str]:
    rows = [
        _row(
            each["name"],
            _type(each["schema"]) + _default(each["schema"]),
            f"{each['in']}{', required' if each.get('required') else ''}",
            each.get("description", ""),
        )
        for each in parameters
    ]
    if rows:
        yield f"<h3>Parameters</h3><dl>{''.join(rows)}</dl>"


def _default(schema: JsonObject) -> str:
    return f", default <code>{escape(json.dumps(schema['default']))}</code>" if "default" in schema else ""


def _content(content: JsonObject) -> Iterator[str]:
    for media_type, each in content.items():
        yield f"<p>{escape(media_type)}: {_type(each['schema'])}</p>"
        if each.get("example") is not None:
            text = json.dumps(each["example"], indent=2, ensure_ascii=False)
            yield f"<pre>{escape(text)}</pre>"


def _schemas(schemas: JsonObject) -> Iterator[str]:
    yield '<h2 id="schemas">schemas</h2>'
    for name, schema in schemas.items():
        yield f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary><div>'
        yield _paragraphs(schema.get("description", ""))
        required = schema.get("required", ())
        yield "<dl>"
        for key, value in schema.get("properties", {}).items():
            note = "" if key in required else "optional"
            yield _row(key, _type(value) + _default(value), note, value.get("description", ""))
        yield "</dl></div></details>"


def _row(name: str, type_: str, note: str, description: str) -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    text = f"<dd>{_inline(description)}</dd>" if description else ""
    return f"<dt><code>{escape(name)}</code> {type_}{small}</dt>{text}"


def _type(schema: JsonObject) -> str:
    """Return a type in words, with links to the schemas that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema and "type" not in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if values := _values(schema):
        return " | ".join(f"<code>{escape(str(each))}</code>" for each in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return _object_type(schema) if schema.get("type") == "object" else _scalar_type(schema)


def _values(schema: JsonObject) -> list[Any]:
    """Return the only values that a schema allows; an empty list if it has no such list."""
    return schema.get("enum") or ([schema["const"]] if "const" in schema else [])


def _scalar_type(schema: JsonObject) -> str:
    types = schema.get("type", "any value")
    text = " or ".join(types) if isinstance(types, list) else str(types)
    formats = [str(schema[key]) for key in ("format", "contentEncoding") if key in schema]
    return escape(" ".join((text, *formats)))


def _object_type(schema: JsonObject) -> str:
    members = schema.get("properties", {})
    if members:
        listed = ", ".join(f"<code>{escape(name)}</code>: {_type(each)}" for name, each in members.items())
        return f"object with {listed}"
    values = schema.get("additionalProperties")
    return f"object of {_type(values)}" if isinstance(values, Mapping) and values else "object"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in text.strip().split("\n\n") if part)


def _inline(text: str) -> str:
    """Return text as HTML, with code between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
