"""What a job may cost: its own `max_cost`, and its caller's budget of the day."""

from collections.abc import Mapping
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import jobs
from receiver.db.rows import NewJob
from receiver.errors import Refused
from receiver.price import Credits, total
from receiver.submitter.catalogue import Catalogue
from receiver.submitter.request import JobRequest

ANYONE: Final = "*"
"""The budget of callers that have none of their own."""


class Budgets:
    """Credits per caller and UTC day."""

    def __init__(self, budgets: Mapping[str, Credits]) -> None:
        self._budgets = budgets

    async def price(self, request: JobRequest, caller: str, catalogue: Catalogue) -> Credits | None:
        """Return the price if there is a limit to it. Raises Refused for one above `max_cost`."""
        if request.max_cost is None and self._of(caller) is None:
            return None
        estimate = await catalogue.estimate(request.model, request.input)
        price: Credits = estimate["credits"]
        if request.max_cost is not None and price > request.max_cost:
            raise Refused(
                f"the job costs {price} credits, more than its max_cost of {request.max_cost}",
                code="max_cost_exceeded",
                status=402,
                type_="billing_error",
            )
        return price

    async def hold(self, connection: AsyncConnection, job: NewJob) -> None:
        """Raise Refused if a job, which this transaction has inserted, exceeds what its caller has left."""
        budget = self._of(job.caller)
        if budget is None:
            return
        spent = await jobs.spent_today(connection, job.caller)
        if spent > budget:
            before = total((spent, -(job.cost or 0)))
            raise Refused(
                f"the job costs {job.cost} credits; of today's {budget} for {job.caller!r} "
                f"{before} are spent or reserved (a new day begins at 00:00 UTC)",
                code="budget_exceeded",
                status=402,
                type_="billing_error",
            )

    def _of(self, caller: str) -> Credits | None:
        return self._budgets.get(caller, self._budgets.get(ANYONE))
