"""Verified bytes into a `Generation`; pure.

An authentic body is an event if one `request_id` and one known status can be read from it: it stands for a
result that was paid for, and refusing it would lose that. The rest may be written in any way that
`lenient_json` can read, and have any shape. Unknown fields are kept. The raw bytes are stored as they were
signed; what cannot be forwarded as it is, is changed in the copy that is read from them.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
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

# What an event has for a `request_id` if none can be read.
_OWN_ID = re.compile("sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation result, as far as it could be read."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: Credits | None
    output: Any  # as parsed, unknown fields included; None where absent
    error: Any  # likewise

    def list_files(self, rules: FileRules) -> Listing:
        """Return its files; the output of a failed generation is no result, and has none."""
        return list_files(self.output if self.status == "OK" else None, rules)

    @property
    def canceled(self) -> bool:
        """Whether it was canceled, as `result_body` says it."""
        return isinstance(self.error, dict) and self.error.get("code") == CANCELED


class Summary(NamedTuple):
    """What is stored of a generation beside its raw body."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: Credits | None


def summarize(raw: bytes) -> Summary:
    """Read of the body of a webhook what ingest stores; raises as `parse` does, for the same bodies."""
    return _Body(raw).summary


def parse(raw: bytes) -> Generation:
    """Read the body of a webhook. Raises `UnrecognizedBody`, and nothing else."""
    body = _Body(raw)
    output, error = body.output, body.error
    return Generation(**body.summary._asdict(), output=output, error=error)


class Content(NamedTuple):
    """What is forwarded of a generation, beside its files."""

    model: str | None
    cost: Credits | None
    output: Any
    error: Any
    altered: tuple[str, ...]
    """JSON pointers to the places that are not as in the body, into an object with the fields above."""


def reread(raw: bytes) -> Content:
    """Read the body of a stored event again; raises as `parse` does."""
    body = _Body(raw)
    return Content(body.summary.model, body.summary.cost, body.output, body.error, body.cleaner.altered)


class _Body:
    """The fields of a body, each made fit to be stored and forwarded."""

    def __init__(self, raw: bytes) -> None:
        document = decode(raw)
        members = document.members()
        request_id, status = members.get("request_id"), members.get("status")
        if not is_request_id(request_id):
            raise UnrecognizedBody("request_id")
        if status not in ("OK", "ERROR"):
            raise UnrecognizedBody("status")
        self.cleaner = Cleaner(document)
        self._document = document
        self._members = members
        self._payload = _object(members.get("payload"))
        self.summary = Summary(
            request_id, status, self._read("model", _model), self._read("cost", read_credits)
        )

    def _read(self, name: str, read: Callable[[Any], T | None]) -> T | None:
        """Return one of the payload's fields, and list it if it is not as it was."""
        given = self._payload.get(name)
        if given is None:
            return None
        value, mended = given, False
        if not self._document.plain:
            cleaner = Cleaner(self._document)
            value = cleaner.clean(given, depth=2)
            mended = bool(cleaner.altered)
        found = read(value)
        if found != value or mended:
            self.cleaner.note(name)
        return found

    @property
    def output(self) -> Any:
        return self.cleaner.clean(self._payload.get("output"), "output", depth=2)

    @property
    def error(self) -> Any:
        error, depth = self._members.get("error"), 1
        if error is None and self.summary.status == "ERROR":
            # A polled result stands in the payload as a whole.
            error, depth = self._payload.get("error"), 2
        return self.cleaner.clean(error, "error", depth=depth)


def result_body(request_id: str, status: Literal["COMPLETED", "FAILED", "CANCELED"], result: bytes) -> bytes:
    """Return a polled result as the body of the webhook that did not come.

    `result` is the answer of `GET /v1/requests/{id}` as it came: it becomes the payload as a whole, so that
    what is read from it is read, and if need be changed, as in a webhook. A cancellation, of which Clipia's
    webhooks know nothing, is an ERROR with the code `CANCELED`. Raises UnrecognizedBody if it is not JSON.
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
    """Tell whether this may be an id of Clipia's: 1 to 255 printable characters without white space.

    U+FFFD is what remains of another character: two ids must not become one.
    """
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_ID_LENGTH
        and value.isprintable()
        and " " not in value
        and REPLACEMENT not in value
        and _OWN_ID.fullmatch(value) is None
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _model(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_LENGTH else None
