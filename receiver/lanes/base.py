"""What every kind of work shares: lanes over one table, claimed by lease, the record of each try, targets.

A lane claims rows and gives back pieces of work. Between claim and result no transaction is open.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Protocol
from uuid import UUID

import orjson
import structlog
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.retry import RetryPolicy
from receiver.core.routing import RoutingFacts
from receiver.db import leases
from receiver.db.database import Database
from receiver.db.rows import Attempt, AttemptOutcome, Claim, JobRef, ReplayedEvent, StoredEvent
from receiver.destination_settings import FilterSettings
from receiver.destinations import Destination
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, ReceiverError, RequestError

LEASE: Final = 60.0
"""Seconds that a claim holds; the worker renews it while it works."""
MAX_LOST: Final = 5
"""Claims in a row that may end without a result before the work is taken for what kills its workers."""
ERROR_LIMIT: Final = 2048
FAN_OUT_LANE: Final = "fanout"
MEDIA_LANE: Final = "media"

log = structlog.get_logger()


def destination_lane(name: str) -> str:
    """Return the name of a destination's lane."""
    return f"destination:{name}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One destination, as work needs it."""

    name: str
    destination: Destination
    waits_for_media: bool
    retry: RetryPolicy
    filter: FilterSettings = field(default_factory=FilterSettings)
    is_down: bool = False
    """Whether it could not be opened at start."""
    concurrency: int | None = None
    """Tries under way at once; the destination's own number if none is given."""
    rate: float | None = None
    """Tries that begin per second, any number if none is given."""


def facts_of(event: StoredEvent | ReplayedEvent, model: str | None, job: JobRef | None) -> RoutingFacts:
    """Return what filters look at."""
    return RoutingFacts(
        status=event.status,
        model=model,
        source=event.source,
        caller=job.caller if job else None,
        metadata=job.metadata if job else {},
    )


class Record(Protocol):
    """Ends a try, for the record."""

    def __call__(self, outcome: AttemptOutcome, error: str | None = None) -> Attempt:
        """Return the try as it goes on record."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """One claimed row and what to do with it. `run` records its own result."""

    claim: Claim
    run: Callable[[], Awaitable[None]]


class WorkLane:
    """A lane over one table of work: claims, leases, and results that outlive a restart of the database."""

    left_behind = True
    """Whether the end of work is a reason to claim again: there may be more that is due."""

    def __init__(
        self, database: Database, table: Table, *, name: str, concurrency: int, wake: Callable[[str], None]
    ) -> None:
        self.name = name
        self.concurrency = concurrency
        self._database = database
        self._table = table
        self._wake = wake

    async def renew(self, claims: Collection[Claim]) -> set[UUID]:
        """Extend leases; return the ids that are still ours."""
        return await self._database.run_transaction(
            partial(leases.renew, table=self._table, claims=claims, lease=LEASE)
        )

    async def release(self, claims: Collection[Claim]) -> None:
        """Give claims back untried."""
        await self._database.run_transaction(partial(leases.release, table=self._table, claims=claims))

    async def _record(self, claim: Claim, write: Callable[[AsyncConnection], Awaitable[bool]]) -> bool:
        """Record a result in a transaction of its own; False where the lease was lost meanwhile."""
        return await self._until_recorded(claim, lambda: self._database.run_transaction(write))

    async def _until_recorded(self, claim: Claim, record: Callable[[], Awaitable[bool]]) -> bool:
        # For as long as the database is away: work that is done would else be done, and forwarded, again.
        while True:
            try:
                held = await record()
            except DatabaseUnavailable as error:
                log.warning(
                    "result not recorded yet", lane=self.name, work_id=str(claim.id), error=str(error)
                )
                await asyncio.sleep(1.0)
            else:
                if not held:
                    log.warning("result refused: lease lost", lane=self.name, work_id=str(claim.id))
                return held


def start_attempt(claim: Claim) -> Record:
    """Start the clock of a try; call the result to put it on record."""
    started_at, began = datetime.now(UTC), time.monotonic()

    def attempt(outcome: AttemptOutcome, error: str | None = None) -> Attempt:
        duration = round((time.monotonic() - began) * 1000)
        return Attempt(
            number=claim.attempt, started_at=started_at, duration_ms=duration, outcome=outcome, error=error
        )

    return attempt


def jitter() -> float:
    """Return a random number in [0, 1) that spreads tries in time."""
    return random.random()  # noqa: S311 - spreads load, guards nothing


def log_failure(
    message: str, claim: Claim, error: Exception, description: str, *, delay: float | None, **ids: Any
) -> None:
    """Log a failed try; `delay` is in seconds until the next one, None where there is none."""
    fields = {"work_id": str(claim.id), "attempt": claim.attempt, "error": description, "retry_in": delay}
    # What is not one of ours is a bug and wants its traceback.
    log.warning(message, exc_info=None if isinstance(error, ReceiverError) else error, **fields | ids)


def describe(error: Exception) -> str:
    """Return an error as one bounded text that every database takes.

    What is none of ours is told by its class alone: a library's text may quote a secret.
    """
    name = type(error).__name__
    words = f"{name}: {error}" if isinstance(error, ReceiverError) else f"{name}, see the log"
    text = words[:ERROR_LIMIT].replace("\x00", "\\0")
    return text.encode(errors="backslashreplace").decode()


def error_text(code: str, message: str, *, status: int | None = None, type_: str | None = None) -> str:
    """Return an error in the words of an API as one bounded text, which is JSON."""
    error = {"type": type_, "code": code, "message": message[:ERROR_LIMIT], "status": status}
    return orjson.dumps({name: value for name, value in error.items() if value is not None}).decode()


def stored_error(error: RequestError | ClipiaUnavailable) -> str:
    """Return an error as JSON for a job's row, with the HTTP status if it is Clipia's answer."""
    return error_text(
        error.reason, str(error), status=getattr(error, "status", None), type_=getattr(error, "type", None)
    )
