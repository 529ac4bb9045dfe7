"""The tables. The migrations create them, and a test compares the two."""

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Double,
    ForeignKey,
    FromClause,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    and_,
    false,
    or_,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time. A naive datetime is an error, because it depends on the machine's time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store UTC; SQLite keeps it as text without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Read UTC."""
        if value is None:
            return None
        moment: datetime = value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)
        return moment


class PlainUuid(TypeDecorator[UUID]):
    """A UUID of the standard class. asyncpg returns a subclass that orjson rejects."""

    impl = Uuid
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> UUID | None:
        """Read a UUID."""
        return value if value is None or type(value) is UUID else UUID(int=value.int)


class Sha256(LargeBinary):
    """A digest as bytes; JSON has it in hexadecimal digits."""


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# In SQLite only a column of the exact type INTEGER is the rowid.
_Sequence: Final = BigInteger().with_variant(Integer(), "sqlite")


def _event_reference() -> Column[int]:
    return Column("event_seq", _Sequence, ForeignKey("events.seq"), nullable=False)


def _micros(name: str) -> Column[int]:
    """Return the column for the millionths of a credit; the column `name` has the whole credits."""
    return Column(f"{name}_micros", Integer, nullable=False, server_default=text("0"))


def in_state(table: FromClause, state: str) -> ColumnElement[bool]:
    """Return the condition that a row is in a state, with the same SQL text as in the partial indexes.

    If the state were a parameter, a generic plan could not use these indexes.
    """
    return table.c.state == text(f"'{state}'")


def _partial_index(
    name: str, *columns: Column[Any], where: ColumnElement[bool], unique: bool = False
) -> None:
    Index(name, *columns, unique=unique, postgresql_where=where, sqlite_where=where)


def work_columns() -> list[Column[Any]]:
    """Return the columns of a row of work that is claimed by lease.

    A row is due if `next_attempt_at` is past. A claim moves it to the end of the lease, so an abandoned row
    becomes due again. `lost` counts consecutive claims that ended without a recorded result.
    """
    return [
        Column("state", String(16), nullable=False),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("lost", SmallInteger, nullable=False, server_default=text("0")),
        Column("next_attempt_at", UtcDateTime),
        Column("lease", PlainUuid),
        Column("error", Text),
        Column("created_at", UtcDateTime, nullable=False),
        Column("finished_at", UtcDateTime),
    ]


events = Table(
    "events",
    metadata,
    # Joins and pages use `seq`, which grows, so that rows and index entries are added at the end.
    Column("seq", _Sequence, primary_key=True),
    Column("id", PlainUuid, nullable=False),
    Column("source", String(63), nullable=False),
    Column("request_id", String(255), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(32)),
    Column("status", String(16)),
    Column("model", Text),
    Column("cost", BigInteger),
    _micros("cost"),
    Column("body", LargeBinary, nullable=False),
    Column("body_sha256", Sha256, nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    # The job in the callback's path; it finds the job if the job's request_id is not known yet.
    Column("job_id", PlainUuid),
    # SHA-256 of the token in the callback's path.
    Column("path_token", String(64)),
    # The first receipt: the request that made the event; `received_at` and `body_sha256` belong to it, too.
    # In a table of its own it would cost each webhook a row, two index entries and a quarter of the
    # write-ahead log. All are null if the event was polled, or if another body was promoted: then all its
    # receipts are in that table.
    Column("webhook_id", String(255)),
    Column("secret_id", String(16)),
    Column("signed_at", UtcDateTime),
    # The outcome of the first receipt if another one follows from the event: it was recognized later; or
    # `promoted`, if the body is that of another receipt.
    Column("first_outcome", String(16)),
    # A hash of source and request_id. It is the only unique key with random values: each insert into the
    # index of such a key dirties another B-tree page, which is written to the disk and to the write-ahead
    # log.
    UniqueConstraint("id"),
    Index(None, "received_at", "seq"),
)
for _state in ("received", "unrecognized"):
    _partial_index(f"ix_events_{_state}", events.c.seq, where=in_state(events, _state))

# One row for each source of events. An event's id is a hash of source and request_id, so the ids that a
# request_id may have are computed from the names of all sources.
sources = Table("sources", metadata, Column("name", String(63), primary_key=True))

# The requests after the first one; `receipts.all_receipts` has the first ones, too.
receipts = Table(
    "receipts",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    _event_reference(),
    Column("webhook_id", String(255)),
    Column("secret_id", String(16), nullable=False),
    Column("signed_at", UtcDateTime, nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    Column("body_sha256", Sha256, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("body", LargeBinary),
    # The number of later requests with this outcome: a captured webhook can be replayed for minutes, and the
    # table must not grow with it.
    Column("repeated", Integer, nullable=False, server_default=text("0")),
    Index(None, "event_seq"),
)

media = Table(
    "media",
    metadata,
    Column("id", PlainUuid, primary_key=True),
    _event_reference(),
    Column("position", SmallInteger, nullable=False),
    Column("variant", String(16), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("url", Text, nullable=False),
    # The path of the URL in the event's output.
    Column("field", Text),
    *work_columns(),
    Column("size", BigInteger),
    Column("sha256", String(64)),
    Column("content_type", String(127)),
    Column("storage_key", Text),
    Column("uri", Text),
    # A doubt about the stored file, and the SHA-256 of the last body that was rejected because of one.
    Column("warning", Text),
    Column("seen_sha256", String(64)),
    Column("restarted_at", UtcDateTime),
    UniqueConstraint("event_seq", "position", "variant"),
)
_partial_index("ix_media_due", media.c.next_attempt_at, where=in_state(media, "pending"))

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", PlainUuid, primary_key=True),
    _event_reference(),
    Column("destination", String(63), nullable=False),
    *work_columns(),
    Column("replay_id", PlainUuid),
    Column("restarted_at", UtcDateTime),
    Index(None, "event_seq"),
)
is_live, is_replayed = deliveries.c.replay_id.is_(None), deliveries.c.replay_id.is_not(None)
_is_pending, _is_dead = (in_state(deliveries, state) for state in ("pending", "dead"))
_partial_index(
    "uq_deliveries_live", deliveries.c.event_seq, deliveries.c.destination, where=is_live, unique=True
)
_partial_index(
    "uq_deliveries_replayed",
    *(deliveries.c.replay_id, deliveries.c.destination, deliveries.c.event_seq),
    where=is_replayed,
    unique=True,
)
# Two indexes: in a common one, a search for live deliveries would step over all those of a long replay.
for _name, _which in (("ix_deliveries_due", is_live), ("ix_deliveries_replays_due", is_replayed)):
    _partial_index(
        _name, deliveries.c.destination, deliveries.c.next_attempt_at, where=and_(_is_pending, _which)
    )
_partial_index("ix_deliveries_dead", deliveries.c.id, where=_is_dead)

attempts = Table(
    "attempts",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("work_id", PlainUuid, nullable=False),
    Column("number", Integer, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("duration_ms", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    *(Column(name, Text) for name in ("error", "answer")),  # the start of a consumer's answer that is no 2xx
    Index(None, "work_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("id", PlainUuid, nullable=False),
    Column("caller", String(63), nullable=False),
    Column("idempotency_key", String(255), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("source", String(63), nullable=False),
    Column("model", Text, nullable=False),
    # The bytes that are sent to Clipia, the same in each attempt. The input is stored in them only.
    Column("request", LargeBinary, nullable=False),
    Column("has_webhook", Boolean, nullable=False),
    Column("provider_key", PlainUuid, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("max_cost", BigInteger),
    _micros("max_cost"),
    *work_columns(),
    # The Clipia account of the first attempt; idempotency keys are valid for one account.
    Column("account", String(40)),
    Column("sent_at", UtcDateTime),
    # The time of the first refusal for now (402, 403).
    Column("refused_at", UtcDateTime),
    Column("submitted_at", UtcDateTime),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("watched_until", UtcDateTime),
    Column("request_id", String(255)),
    Column("progress", SmallInteger),
    Column("cost", BigInteger),
    _micros("cost"),
    Column("charged", BigInteger),
    _micros("charged"),
    Column("warnings", JSON),
    # SHA-256 of the token in the callback's path; None for jobs of releases before 0006.
    Column("path_token", String(64)),
    # The span of the caller that submitted the job (W3C Trace Context).
    *(Column(name, String(length)) for name, length in (("traceparent", 55), ("tracestate", 512))),
    UniqueConstraint("id"),
    UniqueConstraint("caller", "idempotency_key"),
    UniqueConstraint("source", "request_id"),
    Index("ix_jobs_caller_created", "caller", "created_at"),
    Index("ix_jobs_created", "created_at"),
    Index("ix_jobs_caller_sent", "caller", "sent_at"),
)
for _state in ("pending", "submitted"):
    _partial_index(f"ix_jobs_{_state}", jobs.c.next_attempt_at, where=in_state(jobs, _state))
is_refused = and_(in_state(jobs, "pending"), jobs.c.refused_at.is_not(None))
is_open = or_(in_state(jobs, "pending"), in_state(jobs, "submitted"))
_partial_index("ix_jobs_open", jobs.c.caller, where=is_open)
_partial_index("ix_jobs_refused", jobs.c.caller, jobs.c.model, where=is_refused)

accounts = Table(
    "accounts",
    metadata,
    # The quota of one API key and its use, as far as they are known. Times are unix seconds of the database's
    # clock, because they are used in calculations.
    Column("id", String(40), primary_key=True),
    Column("requests_per_minute", Integer, nullable=False),
    Column("submits_until", Double, nullable=False),
    Column("polls_until", Double, nullable=False),
    Column("asks_until", Double, nullable=False),
    Column("calls_after", Double, nullable=False),
    Column("submits_after", Double, nullable=False),
    Column("in_flight_limit", Integer, nullable=False),
    Column("in_flight_refused_at", Double, nullable=False),
    Column("paused_at", Double, nullable=False),
    Column("probes", Integer, nullable=False),
    Column("pause", Text),
    Column("accepted_at", Double, nullable=False, server_default=text("0")),
)

replays = Table(
    "replays",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("id", PlainUuid, nullable=False),
    Column("caller", String(63), nullable=False),
    Column("idempotency_key", String(255), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("selection", JSON, nullable=False),
    Column("destinations", JSON, nullable=False),
    Column("media", Boolean, nullable=False),
    Column("force", Boolean, nullable=False, server_default=false()),
    Column("rate", Double),
    Column("matched", Integer, nullable=False),
    # The events that remain: above `after_seq`, and up to the last event at the time of the order.
    Column("after_seq", _Sequence, nullable=False),
    Column("until_seq", _Sequence, nullable=False),
    Column("handled", Integer, nullable=False, server_default=text("0")),
    Column("ordered", Integer, nullable=False, server_default=text("0")),
    Column("downloads", Integer, nullable=False, server_default=text("0")),
    *work_columns(),
    UniqueConstraint("id"),
    UniqueConstraint("caller", "idempotency_key"),
)
_partial_index("ix_replays_due", replays.c.next_attempt_at, where=in_state(replays, "pending"))

workers = Table(
    "workers",
    metadata,
    # One row for each run of a worker process, which updates `seen_at` every few seconds.
    Column("id", PlainUuid, primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("lanes", JSON, nullable=False),
    # The Clipia account that it submits to and polls; None without CLIPIA_KEY.
    Column("account", String(40)),
    Column("started_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
)

freezes = Table(
    "freezes",
    metadata,
    # While the row `jobs` exists, no job is submitted.
    Column("name", String(16), primary_key=True),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    # Whether the reason is that the database was restored from a dump.
    Column("restored", Boolean, nullable=False),
    Column("frozen_at", UtcDateTime, nullable=False),
)

# Rejected requests to the callback. They are few, so no other index is needed.
rejections = Table(
    "rejections",
    metadata,
    Column("id", _Sequence, primary_key=True),
    Column("received_at", UtcDateTime, nullable=False),
    Column("source", String(63), nullable=False),
    *(Column(name, String(32), nullable=False) for name in ("reason", "cause")),
    *(Column(name, Text, nullable=False) for name in ("diagnosis", "path")),
    Column("peer", Text),
    Column("headers", JSON, nullable=False),
    Column("body_size", Integer),  # of the whole body; None if it was not read
    Column("size", Integer, nullable=False),  # of the row, in bytes, about
    Column("body", LargeBinary),  # its start, on pages of its own
)

probes = Table(
    "probes",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("at", UtcDateTime, nullable=False),
)
