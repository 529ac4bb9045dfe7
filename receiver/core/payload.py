"""Parses the verified body of a webhook into a `Generation`; pure.

An authentic body is an event if it has one `request_id` and one known status. It is the result of a paid
generation, and if it were rejected, the result would be lost. All other fields may have any form, and unknown
fields are kept. The raw bytes are stored as they were signed; values that cannot be forwarded are changed
only in the copy that is parsed from them.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeGuard, TypeVar

import orjson

from receiver.core.lenient_json import REPLACEMENT, Cleaner, decode
from receiver.core.output_files import FileRules, Listing, list_files
from receiver.errors import UnrecognizedBody
from receiver.price import Credits, read_credits

T = TypeVar("T")

CANCELED: Final = "CANCELED"
MAX_MODEL_LENGTH: Final = 255
MAX_ID_LENGTH: Final = 255

# The `request_id` of an event without a readable one.
_OWN_ID = re.compile("sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The readable part of one generation result."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: Credits | None
    output: Any  # a clean copy with unknown fields; None if absent
    error: Any  # the same
    altered: tuple[str, ...] = ()
    """JSON pointers to values that differ from the body, into an object with the fields above."""

    def list_files(self, rules: FileRules) -> Listing:
        """Return its files; a failed generation has none."""
        return list_files(self.output if self.status == "OK" else None, rules)

    @property
    def canceled(self) -> bool:
        """Whether its error is the one of `result_body` for a canceled generation."""
        return isinstance(self.error, dict) and self.error.get("code") == CANCELED


class Summary(NamedTuple):
    """The fields of a generation that are stored beside its raw body."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: Credits | None


def summarize(raw: bytes) -> Summary:
    """Read the fields that ingest stores. Raises UnrecognizedBody for the same bodies as `parse`."""
    return _Body(raw).summary


def parse(raw: bytes) -> Generation:
    """Parse the body of a webhook. Raises UnrecognizedBody, and no other exception."""
    body = _Body(raw)
    summary, output, error = body.summary, body.output, body.error
    return Generation(
        request_id=summary.request_id,
        status=summary.status,
        model=summary.model,
        cost=summary.cost,
        output=output,
        error=error,
        altered=body.cleaner.altered,
    )


class _Body:
    """The fields of a body, as clean copies."""

    def __init__(self, raw: bytes) -> None:
        document = decode(raw)
        members = document.members()
        request_id, status = members.get("request_id"), members.get("status")
        if not is_request_id(request_id):
            raise UnrecognizedBody("request_id")
        if status not in ("OK", "ERROR"):
            raise UnrecognizedBody("status")
        self._document = document
        self._members = members
        self._payload = _object(members.get("payload"))
        self.summary = Summary(
            request_id, status, self._read("model", _model), self._read("cost", read_credits)
        )

    @cached_property
    def cleaner(self) -> Cleaner:
        return Cleaner(self._document)

    def _read(self, name: str, read: Callable[[Any], T | None]) -> T | None:
        """Return a field of the payload, and list it as altered if it was changed."""
        given = self._payload.get(name)
        if given is None:
            return None
        value, altered = given, False
        if not self._document.plain:
            cleaner = Cleaner(self._document)
            value = cleaner.clean(given, depth=2)
            altered = bool(cleaner.altered)
        found = read(value)
        if found != value or altered:
            self.cleaner.note(name)
        return found

    @property
    def output(self) -> Any:
        return self.cleaner.clean(self._payload.get("output"), "output", depth=2)

    @property
    def error(self) -> Any:
        error, depth = self._members.get("error"), 1
        if error is None and self.summary.status == "ERROR":
            # In a polled result the payload is the whole answer, with its error.
            error, depth = self._payload.get("error"), 2
        return self.cleaner.clean(error, "error", depth=depth)


def result_body(request_id: str, status: Literal["COMPLETED", "FAILED", "CANCELED"], result: bytes) -> bytes:
    """Return a polled result in the form of the missing webhook.

    `result` is the answer of `GET /v1/requests/{id}`, byte for byte. It becomes the payload, so that it is
    parsed in the same way as a webhook. If the generation was canceled, for which Clipia has no webhook, the
    body is an ERROR with the code `CANCELED`. Raises UnrecognizedBody if the result is not JSON.
    """
    answer = decode(result).value
    content: dict[str, Any] = {"request_id": request_id, "status": "OK" if status == "COMPLETED" else "ERROR"}
    if status == "CANCELED":
        content["error"] = {"code": CANCELED, "message": "The generation was canceled."}
    elif status == "FAILED" and not _object(answer).get("error"):
        content["error"] = {"code": "GENERATION_FAILED", "message": "The generation failed."}
    head = orjson.dumps(content).removesuffix(b"}")
    return b'%b,"payload":%b}' % (head, result.removeprefix(codecs.BOM_UTF8).strip())


def is_request_id(value: object) -> TypeGuard[str]:
    """Tell whether a value may be an id of Clipia's: 1 to 255 printable characters without white space.

    U+FFFD is not allowed: it replaced another character, so that two different ids could look the same.
    """
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_ID_LENGTH
        and value.isprintable()
        and " " not in value
        and REPLACEMENT not in value
        and not (value.startswith("sha256:") and _OWN_ID.fullmatch(value))
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _model(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_LENGTH else None
