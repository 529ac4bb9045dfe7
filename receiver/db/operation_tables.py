"""The tables of the operation: they hold no events, and no work. `tables` has the others."""

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

from receiver.db import tables
from receiver.db.tables import PlainUuid, UtcDateTime, work_columns

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

actions = Table(
    "actions",
    metadata,
    # One row for each action of an operator. It is written before the action begins; `status` and `code` are
    # those of the answer, and null while the action is under way or if its process died.
    Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("by", Text, nullable=False),
    Column("operation", String(63), nullable=False),
    Column("target", Text),
    Column("reason", Text),
    Column("dry_run", Boolean, nullable=False, server_default=false()),
    Column("status", SmallInteger),
    Column("code", String(63)),
)

alerts = Table(
    "alerts",
    metadata,
    # One row for each alert, open or resolved; it keeps the time of the last message, which limits them.
    Column("kind", String(32), primary_key=True),
    Column("subject", String(255), primary_key=True),
    Column("occurrence", PlainUuid, nullable=False),
    *(Column(name, Text, nullable=False) for name in ("text", "command")),
    Column("count", Integer, nullable=False),
    Column("examples", JSON, nullable=False),
    Column("first_at", UtcDateTime, nullable=False),
    Column("last_at", UtcDateTime),
    *(Column(name, UtcDateTime, nullable=False) for name in ("raised_at", "seen_at")),
    Column("resolved_at", UtcDateTime),
    Column("told", String(16)),
    *(Column(name, UtcDateTime) for name in ("told_at", "told_last_at")),
)

alert_messages = Table(
    "alert_messages",
    metadata,
    # One row for each message that an alert destination has not confirmed yet.
    Column("id", PlainUuid, primary_key=True),
    Column("destination", String(63), nullable=False),
    # The alert's occurrence, and whether it was raised or resolved.
    Column("occurrence", PlainUuid, nullable=False),
    Column("told", String(16), nullable=False),
    # The CloudEvent in structured mode.
    Column("message", JSON, nullable=False),
    *work_columns(),
)

RETENTION_COUNTS: Final = ("events", "kept", "files", "files_elsewhere", "jobs", "rejections", "actions")
"""The columns with the numbers of a run of retention."""

retention_runs = Table(
    "retention_runs",
    metadata,
    # One row for each run. A lane claims those of the schedule; a caller's run is never due.
    Column("id", PlainUuid, primary_key=True),
    # The UTC day of a scheduled run, as a key: there is one a day, however many workers look for it.
    Column("day", String(10)),
    Column("by", Text, nullable=False),
    Column("host", Text),
    Column("older_than_days", Integer, nullable=False),
    Column("before", UtcDateTime, nullable=False),
    *(Column(name, Boolean, nullable=False) for name in ("media", "dead_letters")),
    # Where the next part begins; null at the start and at the end.
    Column("position", String(32)),
    *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in RETENTION_COUNTS),
    Column("seen_at", UtcDateTime, nullable=False),
    *work_columns(),
    UniqueConstraint("day"),
)
