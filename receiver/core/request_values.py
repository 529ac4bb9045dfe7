"""Checks of the values that the API, the commands and the submitter share; pure."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic import ValidationError

from receiver.errors import RequestError
from receiver.plain_words import in_our_words

MAX_CALLER_LENGTH: Final = 63
MAX_KEY_LENGTH: Final = 255
_MAX_DIGITS: Final = 18  # of a cursor: it is a 64-bit integer in the database
_MAX_FIELD_LENGTH: Final = 64
_Row = TypeVar("_Row", bound=Mapping[str, Any])
_AGE: Final = re.compile(r"([0-9]{1,5})([smhdw])")
_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_INVALID_CURSOR: Final = "invalid cursor: pass the `next` value of the previous page"


def check_caller(caller: str) -> str:
    """Return a caller's name. Raises RequestError if the database cannot store it unchanged."""
    if not 0 < len(caller) <= MAX_CALLER_LENGTH or not caller.isprintable():
        raise _invalid(f"caller: write from 1 to {MAX_CALLER_LENGTH} printable characters")
    return caller


def check_key(key: str) -> str:
    """Return a caller's idempotency key. Raises RequestError if the database cannot store it unchanged."""
    if not 0 < len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise _invalid(f"Idempotency-Key: write from 1 to {MAX_KEY_LENGTH} printable characters")
    return key


def read_cursor(text: str | None) -> int | None:
    """Return the position that a page's `next` stands for; None for the first page. Raises RequestError."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise _invalid(_INVALID_CURSOR)
    return int(text)


def read_id_cursor(text: str | None) -> UUID | None:
    """Return the id that a page's `next` stands for; None for the first page. Raises RequestError."""
    try:
        return None if text is None else UUID(text)
    except ValueError:
        raise _invalid(_INVALID_CURSOR) from None


def read_moment(text: object, *, now: datetime) -> datetime:
    """Return a time: ISO 8601, in UTC if it has no zone, or an age such as `90m`. Raises ValueError."""
    if isinstance(text, str) and (age := _AGE.fullmatch(text)):
        return now - int(age[1]) * _UNITS[age[2]]
    try:
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]  # a wrong type raises TypeError
    except (TypeError, ValueError):
        raise ValueError(
            "write a time such as 2026-01-31T12:00:00Z, or an age such as 90m, 2h or 7d"
        ) from None
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("write a year from 1 to 9999") from None


def split_page(rows: Sequence[_Row], limit: int, cursor: str) -> tuple[Sequence[_Row], str | None]:
    """Return a page of `limit` rows and the cursor of the next one, the value of the last row's `cursor`.

    The query fetches one row more, to see if there is another page.
    """
    return rows[:limit], str(rows[limit - 1][cursor]) if len(rows) > limit else None


def first_problem(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """Return the path of the first invalid field, and why it is invalid."""
    first = error.errors(include_input=False, include_url=False)[0]
    return tuple(str(part)[:_MAX_FIELD_LENGTH] for part in first["loc"]), in_our_words(first["msg"])


def invalid_request(error: ValidationError) -> RequestError:
    """Return the RequestError that names the first invalid field."""
    path, message = first_problem(error)
    return _invalid(f"{'.'.join(path) or 'the body'}: {message}")


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_request")
