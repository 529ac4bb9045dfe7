"""The API's specification (OpenAPI 3.1), made of the table that routes its calls."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter

from receiver import __version__
from receiver.api.answers import ERROR_CODES
from receiver.api.endpoints import MAX_REASON_LENGTH, Endpoint
from receiver.api.other_paths import OTHER_PATHS

JsonObject = dict[str, Any]

_REF: Final = "#/components/schemas/{model}"
_DESCRIPTION: Final = """\
The internal API of a receiver of Clipia's webhooks: jobs, events, deliveries and replays.

Each call under `/v1` needs `Authorization: Bearer <token>` with a token of `RECEIVER_API_TOKENS` that has the
call's scope; no scope includes another one. A list is `{"data": [...], "next": cursor}`: pass `next` as
`cursor` for the following page; it is null on the last one. Times have a zone, or are UTC. An error is
`{"error": {"type", "code", "message"}}`, with `job_id` if there is a job; a 503 carries `Retry-After`. Each
answer carries `X-Request-Id`.
"""
_ERROR: Final[JsonObject] = {
    "type": "object",
    "description": "An error in the shape of Clipia's own.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "code", "message"],
            "properties": {
                "type": {"type": "string", "examples": ["invalid_request_error"]},
                "code": {
                    "type": "string",
                    "description": "One of the receiver's, or Clipia's own if Clipia refused.",
                    "examples": list(ERROR_CODES),
                },
                "message": {"type": "string"},
            },
        },
        "job_id": {"type": "string", "format": "uuid"},
    },
}
_EVENT_KEY: Final[JsonObject] = {
    "description": "The event's id, or Clipia's request_id.",
    "schema": {"type": "string", "minLength": 1},
}
_OTHER_IDS: Final[Mapping[str, JsonObject]] = {
    "events": _EVENT_KEY,
    "jobs": {
        "description": "The job's id, or Clipia's request_id.",
        "schema": {"type": "string", "minLength": 1},
    },
    "explain": {
        "description": "An event's id, a request_id, a job's id or idempotency key, a delivery's id, or "
        "a file's id.",
        "schema": {"type": "string", "minLength": 1},
    },
    "rejections": {"schema": {"type": "string", "pattern": "^[0-9]{1,18}$"}, "example": "17"},
}
_PATH_KEYS: Final[Mapping[str, JsonObject]] = {
    "id": {"schema": {"type": "string", "format": "uuid"}},
    "name": {
        "description": "The destination's name in the settings.",
        "schema": {"type": "string", "minLength": 1},
        "example": "orders",
    },
    "seq": {
        "description": "The receipt's `seq`.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
        "example": "42",
    },
    "slug": {
        "description": "The model's slug.",
        "schema": {"type": "string", "minLength": 1},
        "example": "nano-banana-2",
    },
}
_REASON: Final[JsonObject] = {
    "name": "reason",
    "in": "query",
    "description": "Goes on record with the action.",
    "schema": {"type": "string", "maxLength": MAX_REASON_LENGTH, "pattern": "^[^\\x00]*$"},
}
_KEY_HEADER: Final[JsonObject] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key is the same order: send it again after an answer that did not arrive.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "example": "order-4711/hero",
}


def make_specification(table: Sequence[Endpoint]) -> JsonObject:
    """Return the document."""
    schemas = _Schemas(table)
    paths: dict[str, JsonObject] = {}
    for row in table:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, schemas)
    tags = dict.fromkeys(_tag(row.path) for row in table)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Clipia receiver", "version": __version__, "description": _DESCRIPTION},
        "tags": [{"name": name} for name in (*tags, "callback", "operation")],
        "paths": paths | OTHER_PATHS,
        "components": {
            "schemas": {**schemas.definitions, "Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Schemas:
    """The JSON schemas of all bodies and answers."""

    def __init__(self, table: Iterable[Endpoint]) -> None:
        inputs: list[tuple[tuple[str, str], Literal["validation", "serialization"], TypeAdapter[Any]]] = []
        for row in table:
            if row.answer is not None:
                inputs.append(((row.name, "answer"), "serialization", _adapter(row.answer)))
            if row.body is not None:
                inputs.append(((row.name, "body"), "validation", _adapter(row.body)))
        found, rest = TypeAdapter.json_schemas(inputs, ref_template=_REF)
        self._schemas = {key: schema["items"] for (key, _), schema in found.items()}
        self.definitions: JsonObject = rest["$defs"]

    def body(self, row: Endpoint) -> JsonObject:
        schema: JsonObject = self._schemas[row.name, "body"]
        return schema

    def answer(self, row: Endpoint) -> JsonObject:
        schema: JsonObject = self._schemas[row.name, "answer"]
        if not row.is_list:
            return schema
        return {
            "type": "object",
            "required": ["data", "next"],
            "properties": {
                "data": {"type": "array", "items": schema},
                "next": {"type": ["string", "null"], "description": "The `cursor` of the following page."},
            },
        }


def _adapter(type_: Any) -> TypeAdapter[Any]:
    # A list, because only a type that can have no config of its own takes one.
    return TypeAdapter(list[type_], config=ConfigDict(use_attribute_docstrings=True))


def _operation(row: Endpoint, schemas: _Schemas) -> JsonObject:
    operation: JsonObject = {
        "operationId": row.name,
        "tags": [_tag(row.path)],
        "summary": row.summary,
        "description": f"Needs the scope `{row.scope}`.",
        "security": [{"token": [row.scope]}],
        "parameters": [*_path_parameters(row), *_query_parameters(row), *row.headers],
        "responses": {**_answers(row, schemas), **_errors(row)},
    }
    if row.takes_key:
        operation["parameters"].append(_KEY_HEADER)
    if row.body is not None:
        content = {"schema": schemas.body(row), "example": row.body_example}
        operation["requestBody"] = {
            "required": not row.body_is_optional,
            "content": {"application/json": content},
        }
    return operation


def _tag(path: str) -> str:
    return path.split("/")[2]


def _path_parameters(row: Endpoint) -> list[JsonObject]:
    found = []
    for name in re.findall(r"{(\w+)}", row.path):
        facts = (_OTHER_IDS.get(_tag(row.path)) if name == "id" else None) or _PATH_KEYS[name]
        found.append({"name": name, "in": "path", "required": True, **facts})
    return found


def _query_parameters(row: Endpoint) -> list[JsonObject]:
    properties = {} if row.query is None else row.query.model_json_schema()["properties"]
    found = [
        _query_parameter(name, each)
        for name, each in properties.items()
        if name != "reason" or not row.is_action
    ]
    return [*found, _REASON] if row.is_action else found


def _query_parameter(name: str, schema: JsonObject) -> JsonObject:
    # A parameter is left out in place of null.
    rest = {key: value for key, value in schema.items() if key not in ("description", "title")}
    choices = [choice for choice in rest.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del rest["anyOf"]
        rest |= choices[0]
    if rest.get("default", ...) is None:
        del rest["default"]
    parameter: JsonObject = {"name": name, "in": "query", "schema": rest}
    if "description" in schema:
        parameter["description"] = schema["description"]
    if rest.get("type") == "object":
        # Each member of the object is a parameter of its own.
        parameter |= {"style": "form", "explode": True}
    return parameter


def _answers(row: Endpoint, schemas: _Schemas) -> JsonObject:
    others = {str(status): answer for status, answer in row.other_answers}
    if row.answer is None:
        return others
    example = {"data": [row.example], "next": None} if row.is_list else row.example
    content = {"application/json": {"schema": schemas.answer(row), "example": example}}
    return others | {str(status): {"description": text, "content": content} for status, text in row.statuses}


def _errors(row: Endpoint) -> JsonObject:
    by_status: dict[HTTPStatus, list[str]] = {}
    for code in _codes(row):
        by_status.setdefault(ERROR_CODES[code].status, []).append(code)
    found = {str(int(status)): _error(codes) for status, codes in sorted(by_status.items())}
    if row.body is not None:
        found["413"] = {**_error([]), "description": "`invalid_request`: the body is too large"}
    if row.asks_clipia:
        found["4XX"] = {**_error([]), "description": "Clipia refused: its status, its code and its message"}
        found["503"]["description"] += "; or Clipia is away, with its code"
    return found


def _codes(row: Endpoint) -> Iterable[str]:
    yield from ("invalid_token", "insufficient_scope", "service_unavailable", "internal_error")
    if row.query is not None or row.body is not None or row.takes_key or row.is_action:
        yield "invalid_request"
    if row.body is not None:
        yield "request_timeout"
    if row.asks_clipia:
        yield "not_configured"
    yield from row.errors


def _error(codes: Sequence[str]) -> JsonObject:
    content: JsonObject = {"schema": {"$ref": _REF.format(model="Error")}}
    if codes:
        content["examples"] = {code: {"value": _example(code)} for code in codes}
    texts = [f"`{code}`: {ERROR_CODES[code].meaning}" for code in codes]
    return {"description": "; ".join(texts), "content": {"application/json": content}}


def _example(code: str) -> JsonObject:
    status, meaning = ERROR_CODES[code]
    type_ = {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        type_ = "api_error"
    return {"error": {"type": type_, "code": code, "message": f"{meaning[0].upper()}{meaning[1:]}."}}
