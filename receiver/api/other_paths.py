"""The specification of paths that are no rows of the table: callback, health checks, metrics, documents."""

from typing import Any, Final

from receiver.settings import CALLBACK_PATH

_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def _answer(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": _ERROR}


_OK: Final = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"const": "ok"}},
}
_STORED: Final = {
    "type": "object",
    "required": ["status", "event_id"],
    "properties": {
        "status": {"enum": ["accepted", "duplicate", "conflict", "unrecognized"]},
        "event_id": {"type": "string", "format": "uuid"},
    },
}
_CALLBACK_ANSWERS: Final = {
    "200": _answer("The event is stored, now or before.", "application/json", _STORED),
    "401": _error("`invalid_signature`: the signature is missing, wrong or too old"),
    "404": _error("`not_found`: there is no such source"),
    "408": _error("`body_too_slow`: the body did not arrive in time"),
    "413": _error("`body_too_large`: the body is larger than RECEIVER_MAX_BODY_BYTES"),
    "415": _error("`unsupported_encoding`: the body has a Content-Encoding"),
    "503": _error("`service_unavailable`: the event is not stored; send it again"),
}
_SOURCE: Final = {
    "name": "source",
    "in": "path",
    "required": True,
    "description": "The name of a source in the settings.",
    "schema": {"type": "string", "minLength": 1},
}
_JOB: Final = {
    "name": "job",
    "in": "path",
    "required": True,
    "description": "The job's id, a dot, and the token of its path.",
    "schema": {"type": "string", "minLength": 1},
}


def _callback(name: str, summary: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "operationId": name,
            "tags": ["callback"],
            "summary": summary,
            "description": "For Clipia, on the public listener: answered after the event is on disk.",
            "security": [],
            "parameters": [
                *parameters,
                {
                    "name": "X-Clipia-Signature",
                    "in": "header",
                    "required": True,
                    "description": "The signature over the time and the bytes of the body.",
                    "schema": {"type": "string"},
                },
                {"name": "X-Clipia-Webhook-Id", "in": "header", "schema": {"type": "string"}},
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            "responses": _CALLBACK_ANSWERS,
        }
    }


def _plain(name: str, summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    operation = {"operationId": name, "tags": ["operation"], "summary": summary, "security": []}
    return {"get": operation | {"responses": responses}}


OTHER_PATHS: Final[dict[str, Any]] = {
    CALLBACK_PATH: _callback("receive_webhook", "Receive a webhook"),
    f"{CALLBACK_PATH}/{{source}}": _callback("receive_from_source", "Receive a webhook of a source", _SOURCE),
    f"{CALLBACK_PATH}/{{source}}/{{job}}": _callback(
        "receive_for_job", "Receive the webhook of a job", _SOURCE, _JOB
    ),
    "/livez": _plain(
        "is_alive", "Tell that the process runs", {"200": _answer("It runs.", "application/json", _OK)}
    ),
    "/readyz": _plain(
        "is_ready",
        "Tell whether an event can be stored now",
        {
            "200": _answer("It can.", "application/json", _OK),
            "503": _error("`service_unavailable`: the database cannot store an event, or the process stops"),
        },
    ),
    "/metrics": {
        "get": {
            "operationId": "metrics",
            "tags": ["operation"],
            "summary": "Metrics in Prometheus' text format",
            "description": "Needs the scope `read` if any token is configured.",
            "security": [{"token": ["read"]}, {}],
            "responses": {
                "200": _answer("The metrics.", "text/plain", {"type": "string"}),
                "401": _error("`invalid_token`: the token is missing or unknown"),
                "403": _error("`insufficient_scope`: the token lacks the scope"),
                "404": _error("`not_found`: with `--workers`, each process has a port of its own"),
            },
        }
    },
    "/mcp": {
        "post": {
            "operationId": "call_agent_tools",
            "tags": ["operation"],
            "summary": "The calls as tools for agents, over the Model Context Protocol (Streamable HTTP)",
            "description": "Needs a token with any scope; its scopes decide which tools there are.",
            "security": [{"token": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"type": "object"},
                        "example": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
                    }
                },
            },
            "responses": {
                "200": {
                    "description": "A message of the protocol, or a stream of them.",
                    "content": {
                        "application/json": {"schema": {"type": "object"}},
                        "text/event-stream": {"schema": {"type": "object"}},
                    },
                },
                "202": _answer("A notification was accepted; no body.", "text/plain", {"const": ""}),
                "400": {
                    "description": "It is no message of the protocol.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                "401": _error("`invalid_token`: the token is missing or unknown"),
                "403": _error("`unknown_origin`: the Origin header is that of another site"),
                "404": _error("`not_found`: the extra `mcp` is not installed"),
                "413": _error("`invalid_request`: the body is too large"),
                "421": _error("`unknown_host`: the Host header is not that of RECEIVER_INTERNAL_URL"),
            },
        }
    },
    "/openapi.json": _plain(
        "specification",
        "This specification",
        {"200": _answer("OpenAPI 3.1.", "application/json", {"type": "object"})},
    ),
    "/docs": _plain(
        "page", "This specification as a page", {"200": _answer("The page.", "text/html", {"type": "string"})}
    ),
}
