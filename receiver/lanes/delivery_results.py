"""Results of attempts at deliveries: a transaction records a group of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from receiver.db import leases
from receiver.db.connection import SqlConnection
from receiver.db.rows import Attempt, Claim, DeliveryClaim, StoredEvent
from receiver.db.tables import deliveries


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an attempt: the delivery's last state, or the seconds until the next attempt."""

    claim: DeliveryClaim
    event: StoredEvent
    attempt: Attempt
    state: str | None = None
    delay: float = 0.0


async def record(connection: SqlConnection, results: Sequence[Result]) -> set[UUID]:
    """Record results; return the ids of the deliveries with a lease that was still held."""
    held = set[UUID]()
    finished: dict[tuple[str, str | None], list[Claim]] = defaultdict(list)
    await leases.lock(connection, deliveries, [each.claim for each in results])
    for each in results:
        if each.state is not None:
            finished[each.state, each.attempt.error].append(each.claim)
        elif await leases.retry(
            connection, deliveries, each.claim, delay=each.delay, error=each.attempt.error
        ):
            held.add(each.claim.id)
    for (state, error), claims in finished.items():
        held |= await leases.finish_all(connection, deliveries, claims, state=state, error=error)
    attempts = [(each.claim.id, each.attempt) for each in results if each.claim.id in held]
    await leases.record_attempts(connection, attempts)
    return held
