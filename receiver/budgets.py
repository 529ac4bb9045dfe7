"""Limits on the price of a job: its own `max_cost`, and its caller's budget of the day."""

import asyncio
from collections.abc import Mapping
from typing import Final

from receiver.clipia.catalogue import PRICE_CACHE_SECONDS, Catalogue
from receiver.clipia.job_request import JobRequest, read_input
from receiver.db import spending
from receiver.db.connection import SqlConnection
from receiver.db.rows import NewJob, Submission
from receiver.errors import (
    AccountRefused,
    ClipiaUnavailable,
    DatabaseUnavailable,
    RefusedForNow,
    RequestError,
)
from receiver.price import Credits, total

DEFAULT_CALLER: Final = "*"
"""The budget with this name is for callers without one of their own."""
PRICE_TIMEOUT_SECONDS: Final = 15.0
"""An attempt waits at most this long for a price: it must send the submission before its lease expires."""


class Budgets:
    """Credits per caller and UTC day."""

    def __init__(self, budgets: Mapping[str, Credits]) -> None:
        self._budgets = budgets

    async def price(self, request: JobRequest, caller: str, catalogue: Catalogue) -> Credits | None:
        """Return the price if it is limited, else None. Raises RequestError if it is above `max_cost`."""
        if request.max_cost is None and self._of(caller) is None:
            return None
        price = (await catalogue.estimate(request.model, request.input))["credits"]
        _require_at_most(request.max_cost, price)
        return price

    async def require_within(self, connection: SqlConnection, job: NewJob) -> None:
        """Raise RequestError if a job that this transaction inserts exceeds its caller's budget."""
        budget = self._of(job.caller)
        if budget is None:
            return
        spent = await spending.spent_today(connection, job.caller)
        if spent > budget:
            before = total((spent, -(job.cost or 0)))
            raise RequestError(
                f"the job costs {job.cost} credits, but {before} of today's {budget} for {job.caller!r} "
                "are already spent or reserved (a new day begins at 00:00 UTC)",
                code="budget_exceeded",
                type_="billing_error",
            )

    def _of(self, caller: str) -> Credits | None:
        return self._budgets.get(caller, self._budgets.get(DEFAULT_CALLER))


def _require_at_most(max_cost: Credits | None, price: Credits) -> None:
    if max_cost is not None and price > max_cost:
        message = f"the job costs {price} credits, more than its max_cost of {max_cost}"
        raise RequestError(message, code="max_cost_exceeded", type_="billing_error")


async def require_price(submission: Submission, catalogue: Catalogue, *, age: float) -> None:
    """Raise RequestError if the price of a job, made `age` seconds ago, has risen above its `max_cost`.

    Raises ClipiaUnavailable if the price is not available.
    """
    if submission.max_cost is None or age < PRICE_CACHE_SECONDS:
        return
    given = read_input(submission.request) or {}
    try:
        async with asyncio.timeout(PRICE_TIMEOUT_SECONDS):
            estimate = await catalogue.estimate(submission.model, given, or_older=False)
    except (AccountRefused, RefusedForNow):
        raise
    except (ClipiaUnavailable, DatabaseUnavailable, TimeoutError) as error:
        # Without the status: if a price request gets 429, submissions may still be within the quota.
        message = f"the price is not known, and the job has a max_cost: {str(error) or 'no answer in time'}"
        wait = getattr(error, "retry_after", None)
        raise ClipiaUnavailable(
            message, reason="price_unknown", may_have_arrived=False, retry_after=wait
        ) from error
    _require_at_most(submission.max_cost, estimate["credits"])
