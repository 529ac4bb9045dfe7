"""All receipts of an event: the first one, which is in the event's row, and the others."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    LargeBinary,
    String,
    Subquery,
    case,
    cast,
    func,
    null,
    select,
    true,
    union_all,
)

from receiver.db.tables import events, receipts

FIRST_SEQ: Final = 0
"""The `seq` of the first receipt, below those of all others."""

POLLED: Final = "poll"
"""In place of the id of a secret: this body came as the answer to a poll, so it is not signed.

Such a receipt exists only if another body was promoted over it.
"""

FIRST_COLUMNS: Final = ("webhook_id", "secret_id", "signed_at", "first_outcome")
"""The columns of an event that only its first receipt has."""
FIRST_OUTCOME: Final = func.coalesce(
    events.c.first_outcome, case((events.c.status.is_(None), "unrecognized"), else_="accepted")
)
"""An event without a status was not recognized."""

# The same types as in the table: otherwise PostgreSQL would read both tables whole for one event.
_IN_EVENT: Final[dict[str, ColumnElement[Any]]] = {
    "seq": cast(FIRST_SEQ, BigInteger),
    "event_seq": events.c.seq,
    "outcome": cast(FIRST_OUTCOME, String(16)),
    "body": cast(null(), LargeBinary),
    "repeated": cast(0, Integer),
}


def _of_event(name: str) -> ColumnElement[Any]:
    return _IN_EVENT[name] if name in _IN_EVENT else events.c[name]


def receipts_of(which: Callable[[ColumnElement[Any]], ColumnElement[bool]]) -> Subquery:
    """Return all receipts of some events, with the columns of the table of receipts.

    `which` returns the condition for the column with the event's `seq`. It is in both halves, because SQLite
    would apply a condition on the whole only after it has read both tables.
    """
    return union_all(
        select(*(_of_event(column.name).label(column.name) for column in receipts.c)).where(
            events.c.secret_id.is_not(None), which(events.c.seq)
        ),
        select(receipts).where(which(receipts.c.event_seq)),
    ).subquery("all_receipts")


all_receipts: Final = receipts_of(lambda _seq: true())
