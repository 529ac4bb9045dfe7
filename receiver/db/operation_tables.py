"""The tables of the operation: they hold no events, and no work. `tables` has the others."""

from typing import Final

from sqlalchemy import Column, MetaData, String, Table, Text

from receiver.db import tables
from receiver.db.tables import PlainUuid, UtcDateTime

metadata: Final[MetaData] = tables.metadata
"""All tables: those of `tables`, and those of this module."""

destinations = Table(
    "destinations",
    metadata,
    # The row stays after the pause: deliveries have their full time from its end.
    Column("name", String(63), primary_key=True),
    Column("paused_at", UtcDateTime),
    Column("paused_by", Text),
    Column("pause_reason", Text),
    Column("resumed_at", UtcDateTime),
)

circuits = Table(
    "circuits",
    metadata,
    # One row for each process whose circuit breaker is open. A common row would show the view of the process
    # that wrote last, and a process that is cut off from the destination would close the circuit of no other.
    Column("destination", String(63), primary_key=True),
    Column("process", PlainUuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("open_since", UtcDateTime, nullable=False),
    Column("error", Text),
    # Renewed while the circuit is open: that of a process that was killed must not stay open.
    Column("reported_at", UtcDateTime, nullable=False),
)
