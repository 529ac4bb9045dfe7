"""Lanes: each claims one kind of work by lease. No transaction is open while the work is done."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Table

from receiver.core.lane_names import Wake
from receiver.db import leases
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Claim
from receiver.errors import DatabaseUnavailable
from receiver.lanes.spans import database_attributes
from receiver.tracing import NO_SPAN, Span

LEASE_SECONDS: Final = 60.0
"""How long a claim holds unless the worker renews it."""

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Work:
    """Claimed rows and the coroutine that does their work and records the results."""

    claim: Claim
    run: Callable[[], Awaitable[None]]
    others: Sequence[Claim] = ()
    """Further rows that the coroutine takes together with `claim`."""
    size: int = 0
    """Bytes of the bodies that it holds in memory."""

    @property
    def claims(self) -> Sequence[Claim]:
        """All rows."""
        return (self.claim, *self.others)


class Lane(ABC):
    """A kind of work: the due rows of one table. Its results outlive an outage of the database."""

    may_have_more = True
    """Whether to claim again as soon as work ends, because the last claim may have left due rows."""
    claims_again = False
    """Whether to claim again at once: the last claim took fewer rows than it was asked for, but not all."""
    lease_seconds = LEASE_SECONDS
    bytes_under_way = 0
    """Sum of the sizes of the work that is under way; the worker keeps it."""

    def __init__(self, database: Database, table: Table, *, name: str, concurrency: int, wake: Wake) -> None:
        self.name = name
        self.concurrency = concurrency
        self._database = database
        self._table = table
        self._wake = wake

    @abstractmethod
    async def claim(self, limit: int) -> Sequence[Work]:
        """Claim up to `limit` rows that are due."""

    async def renew(self, claims: Collection[Claim]) -> set[UUID]:
        """Extend leases; return the ids of the claims that this process still holds."""
        return await self._database.run_transaction(
            partial(leases.renew, table=self._table, claims=claims, lease=self.lease_seconds)
        )

    async def release(self, claims: Collection[Claim]) -> None:
        """Give claims back; their attempts do not count."""
        await self._database.run_transaction(partial(leases.release, table=self._table, claims=claims))

    async def _record(
        self,
        claim: Claim,
        write: Callable[[SqlConnection], Awaitable[T]],
        span: Span = NO_SPAN,
        rows: int = 1,
    ) -> T:
        """Record a result in a transaction; `write` returns False if the lease was lost.

        `span` is that of the work, and `rows` are those that are recorded together.
        """
        with self._recording(span, rows):
            return await self._until_recorded(claim, lambda: self._database.run_transaction(write))

    def _recording(self, span: Span, rows: int = 1) -> Span:
        """Return the span of a transaction that records results."""
        if span is NO_SPAN:
            return NO_SPAN
        name = self._table.name
        attributes = database_attributes(self._database.dialect_name, "UPDATE", name, rows=rows)
        return span.child(f"UPDATE {name}", attributes=attributes)

    async def _until_recorded(self, claim: Claim, record: Callable[[], Awaitable[T]]) -> T:
        """Call `record` until the database is available.

        If a result were dropped, the work would be done a second time when the lease expires.
        """
        while True:
            try:
                result = await record()
            except DatabaseUnavailable as error:
                log.warning(
                    "result not recorded yet", lane=self.name, work_id=str(claim.id), error=str(error)
                )
                await asyncio.sleep(1.0)
            else:
                if result is False:
                    log.warning("result not recorded: lease lost", lane=self.name, work_id=str(claim.id))
                return result
