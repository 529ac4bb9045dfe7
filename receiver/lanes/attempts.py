"""Attempts as they are recorded, and the error texts that are stored with them."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self

import orjson
import structlog

from receiver.db.rows import Attempt, AttemptOutcome, Claim
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, ReceiverError, RequestError

MAX_CRASHES: Final = 5
"""If this many leases in a row expire without a result, the work itself seems to crash its workers."""
MAX_ERROR_CHARACTERS: Final = 2048

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class StartedAttempt:
    """An attempt that is under way."""

    number: int
    started_at: datetime
    began: float
    """The start by the monotonic clock."""

    @classmethod
    def of(cls, claim: Claim) -> Self:
        """Start the clock of an attempt."""
        return cls(number=claim.attempt, started_at=datetime.now(UTC), began=time.monotonic())

    def end(self, outcome: AttemptOutcome, error: str | None = None, *, answer: str | None = None) -> Attempt:
        """Return the row to record."""
        return Attempt(
            number=self.number,
            started_at=self.started_at,
            duration_ms=round((time.monotonic() - self.began) * 1000),
            outcome=outcome,
            error=error,
            answer=answer,
        )


def crash_error(claim: Claim, work: str) -> str | None:
    """Return the final error of work that has crashed too many workers; None if it may be tried.

    `work` completes the sentence, such as `delivering this event`.
    """
    return f"gave up: {claim.lost} workers crashed while {work}" if claim.lost >= MAX_CRASHES else None


def jitter() -> float:
    """Return a random number in [0, 1) that spreads attempts in time."""
    return random.random()  # noqa: S311 - spreads load, guards nothing


def log_failure(
    message: str, error: Exception, *, expected: type[Exception] = ReceiverError, **fields: Any
) -> None:
    """Log a warning; an error that is not `expected` is a bug, so its traceback is logged too."""
    exc_info = None if isinstance(error, expected) else error
    log.warning(message, error=stored_text(error), exc_info=exc_info, **fields)


@contextmanager
def logged_failures(message: str, **fields: Any) -> Iterator[None]:
    """Log an error of the block and go on; an unavailable database needs no traceback."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - for loops and shutdowns that an error must not end
        log_failure(message, error, expected=DatabaseUnavailable, **fields)


def stored_text(error: Exception) -> str:
    """Return an error as one bounded text that every database stores.

    A library's error is named by its class only: its message may quote a secret.
    """
    name = type(error).__name__
    words = f"{name}: {error}" if isinstance(error, ReceiverError) else f"{name}, see the log"
    # PostgreSQL stores no NUL, and UTF-8 has no lone surrogates.
    text = words[:MAX_ERROR_CHARACTERS].replace("\x00", "\\0")
    return text.encode(errors="backslashreplace").decode()


def error_json(code: str, message: str, *, status: int | None = None, type_: str | None = None) -> str:
    """Return the error of a job as JSON, in the form of Clipia's own errors."""
    error = {"type": type_, "code": code, "message": message[:MAX_ERROR_CHARACTERS], "status": status}
    return orjson.dumps({name: value for name, value in error.items() if value is not None}).decode()


def stored_json(error: RequestError | ClipiaUnavailable) -> str:
    """Return an error as JSON for a job's row, with the HTTP status if Clipia answered."""
    return error_json(
        error.reason, str(error), status=getattr(error, "status", None), type_=getattr(error, "type", None)
    )
