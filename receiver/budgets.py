"""What a job may cost: its own `max_cost`, and its caller's budget of the day."""

import asyncio
from collections.abc import Mapping
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.clipia.catalogue import PRICE_CACHE_SECONDS, Catalogue
from receiver.clipia.job_request import JobRequest, read_input
from receiver.db import spending
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
"""The budget of callers that have none of their own."""
PRICE_TIMEOUT_SECONDS: Final = 15.0
"""Seconds that a try waits for a price: the lease must still be held when the submission is sent."""


class Budgets:
    """Credits per caller and UTC day."""

    def __init__(self, budgets: Mapping[str, Credits]) -> None:
        self._budgets = budgets

    async def price(self, request: JobRequest, caller: str, catalogue: Catalogue) -> Credits | None:
        """Return the price if there is a limit to it. Raises RequestError for one above `max_cost`."""
        if request.max_cost is None and self._of(caller) is None:
            return None
        estimate = await catalogue.estimate(request.model, request.input)
        price: Credits = estimate["credits"]
        _require_at_most(request.max_cost, price)
        return price

    async def hold(self, connection: AsyncConnection, job: NewJob) -> None:
        """Raise RequestError if a job of this transaction exceeds the rest of its caller's budget."""
        budget = self._of(job.caller)
        if budget is None:
            return
        spent = await spending.spent_today(connection, job.caller)
        if spent > budget:
            before = total((spent, -(job.cost or 0)))
            raise RequestError(
                f"the job costs {job.cost} credits; of today's {budget} for {job.caller!r} "
                f"{before} are spent or reserved (a new day begins at 00:00 UTC)",
                code="budget_exceeded",
                type_="billing_error",
            )

    def _of(self, caller: str) -> Credits | None:
        return self._budgets.get(caller, self._budgets.get(DEFAULT_CALLER))


def _require_at_most(max_cost: Credits | None, price: Credits) -> None:
    if max_cost is not None and price > max_cost:
        raise RequestError(
            f"the job costs {price} credits, more than its max_cost of {max_cost}",
            code="max_cost_exceeded",
            type_="billing_error",
        )


async def require_price(submission: Submission, catalogue: Catalogue, *, age: float) -> None:
    """Raise RequestError if a job that was made `age` seconds ago costs more than its `max_cost` by now.

    Raises ClipiaUnavailable if the price cannot be known.
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
        # Without the status: a 429 of a question is no reason to hold up submissions.
        raise ClipiaUnavailable(
            f"the price, which max_cost limits, is not known: {str(error) or 'no answer in time'}",
            reason="price_unknown",
            may_have_arrived=False,
            retry_after=getattr(error, "retry_after", None),
        ) from error
    _require_at_most(submission.max_cost, estimate["credits"])
