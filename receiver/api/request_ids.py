"""`X-Request-Id`: each answer of the internal API has one, and so have the log lines of its request.

In the log it is `x_request_id`: `request_id` is Clipia's id of an event.
"""

import re
from collections.abc import Iterable
from typing import Final
from uuid import uuid4

from starlette.types import Message, Scope, Send
from structlog.contextvars import bind_contextvars, unbind_contextvars

HEADER: Final = b"x-request-id"
_WELL_FORMED: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def identify(scope: Scope, send: Send) -> Send:
    """Put the client's id, or a new one if that is missing or not well-formed, on the answer and the log.

    The id stays bound to the task, in which the server logs the traceback if the application fails.
    """
    request_id = _find(scope["headers"]) or uuid4().hex.encode()
    bind_contextvars(x_request_id=request_id.decode())

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
        await send(message)

    return send_with_id


def forget() -> None:
    """Remove the id from the task: a pipelined request inherits that of the request before it."""
    unbind_contextvars("x_request_id")


def _find(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    values = [value for name, value in headers if name == HEADER]
    return values[0] if len(values) == 1 and _WELL_FORMED.fullmatch(values[0]) else None
