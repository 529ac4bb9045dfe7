"""The tables: events and all that refers to them, jobs, accounts and replays.

Revision: 0005
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = None
branch_labels = None
depends_on = None
release_before_runs = False

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    create_events()
    create_media()
    create_deliveries()
    create_jobs()
    create_replays()
    if op.get_bind().dialect.name == "postgresql":
        for table in ("events", "deliveries"):
            # A poll steps over the dead index entries since the last vacuum. By default those may be a fifth
            # of the history, and if only a small part of a large table is dead, vacuum skips its indexes.
            op.execute(
                f"ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0.02, vacuum_index_cleanup = on)"
            )


def create_events() -> None:
    op.create_table(
        "events",
        sa.Column("seq", SEQUENCE, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("source", sa.String(length=63), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=32)),
        sa.Column("status", sa.String(length=16)),
        sa.Column("model", sa.Text()),
        sa.Column("cost", sa.BigInteger()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_id", sa.Uuid()),
        sa.PrimaryKeyConstraint("seq", name="pk_events"),
        sa.UniqueConstraint("id", name="uq_events_id"),
    )
    op.create_index("ix_events_received", "events", ["seq"], **where("state = 'received'"))
    op.create_index("ix_events_received_at_seq", "events", ["received_at", "seq"])
    op.create_table(
        "sources",
        sa.Column("name", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sources"),
    )
    op.create_table(
        "receipts",
        sa.Column("seq", SEQUENCE, nullable=False),
        sa.Column("event_seq", SEQUENCE, nullable=False),
        sa.Column("webhook_id", sa.String(length=255)),
        sa.Column("secret_id", sa.String(length=16), nullable=False),
        sa.Column("signed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("body", sa.LargeBinary()),
        sa.ForeignKeyConstraint(["event_seq"], ["events.seq"], name="fk_receipts_event_seq"),
        sa.PrimaryKeyConstraint("seq", name="pk_receipts"),
    )
    op.create_index("ix_receipts_event_seq", "receipts", ["event_seq"])
    op.create_table(
        "probes",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_probes"),
    )


def create_media() -> None:
    op.create_table(
        "media",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("event_seq", SEQUENCE, nullable=False),
        sa.Column("position", sa.SmallInteger(), nullable=False),
        sa.Column("variant", sa.String(length=16), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("lease", sa.Uuid()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("size", sa.BigInteger()),
        sa.Column("sha256", sa.String(length=64)),
        sa.Column("content_type", sa.String(length=127)),
        sa.Column("storage_key", sa.Text()),
        sa.Column("uri", sa.Text()),
        sa.Column("restarted_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(["event_seq"], ["events.seq"], name="fk_media_event_seq"),
        sa.PrimaryKeyConstraint("id", name="pk_media"),
        sa.UniqueConstraint("event_seq", "position", "variant", name="uq_media_event_seq_position_variant"),
    )
    op.create_index("ix_media_due", "media", ["next_attempt_at"], **where("state = 'pending'"))
    op.create_table(
        "attempts",
        sa.Column("seq", SEQUENCE, nullable=False),
        sa.Column("work_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("seq", name="pk_attempts"),
    )
    op.create_index("ix_attempts_work_id", "attempts", ["work_id"])


def create_deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("event_seq", SEQUENCE, nullable=False),
        sa.Column("destination", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("lease", sa.Uuid()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("replay_id", sa.Uuid()),
        sa.Column("restarted_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(["event_seq"], ["events.seq"], name="fk_deliveries_event_seq"),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
    )
    op.create_index(
        "uq_deliveries_live",
        "deliveries",
        ["event_seq", "destination"],
        unique=True,
        **where("replay_id IS NULL"),
    )
    op.create_index(
        "uq_deliveries_replayed",
        "deliveries",
        ["replay_id", "destination", "event_seq"],
        unique=True,
        **where("replay_id IS NOT NULL"),
    )
    op.create_index("ix_deliveries_event_seq", "deliveries", ["event_seq"])
    op.create_index(
        "ix_deliveries_due",
        "deliveries",
        ["destination", "next_attempt_at"],
        **where("state = 'pending' AND replay_id IS NULL"),
    )
    op.create_index(
        "ix_deliveries_replays_due",
        "deliveries",
        ["destination", "next_attempt_at"],
        **where("state = 'pending' AND replay_id IS NOT NULL"),
    )
    op.create_index("ix_deliveries_dead", "deliveries", ["id"], **where("state = 'dead'"))


def create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", SEQUENCE, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.String(length=63), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=63), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("has_webhook", sa.Boolean(), nullable=False),
        sa.Column("provider_key", sa.Uuid(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("max_cost", sa.BigInteger()),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("lease", sa.Uuid()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("account", sa.String(length=40)),
        sa.Column("sent_at", sa.DateTime(timezone=True)),
        sa.Column("submitted_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("watched_until", sa.DateTime(timezone=True)),
        sa.Column("request_id", sa.String(length=128)),
        sa.Column("progress", sa.SmallInteger()),
        sa.Column("cost", sa.BigInteger()),
        sa.Column("charged", sa.BigInteger()),
        sa.Column("warnings", sa.JSON()),
        sa.PrimaryKeyConstraint("seq", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sa.UniqueConstraint("caller", "idempotency_key", name="uq_jobs_caller_idempotency_key"),
        sa.UniqueConstraint("source", "request_id", name="uq_jobs_source_request_id"),
    )
    op.create_index("ix_jobs_caller_created", "jobs", ["caller", "created_at"])
    op.create_index("ix_jobs_created", "jobs", ["created_at"])
    for state in ("pending", "submitted"):
        due = sa.text(f"state = '{state}'")
        op.create_index(
            f"ix_jobs_{state}", "jobs", ["next_attempt_at"], postgresql_where=due, sqlite_where=due
        )
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=False),
        sa.Column("submits_until", sa.Double(), nullable=False),
        sa.Column("polls_until", sa.Double(), nullable=False),
        sa.Column("asks_until", sa.Double(), nullable=False),
        sa.Column("calls_after", sa.Double(), nullable=False),
        sa.Column("submits_after", sa.Double(), nullable=False),
        sa.Column("in_flight_limit", sa.Integer(), nullable=False),
        sa.Column("in_flight_refused_at", sa.Double(), nullable=False),
        sa.Column("paused_at", sa.Double(), nullable=False),
        sa.Column("probes", sa.Integer(), nullable=False),
        sa.Column("pause", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
    )


def create_replays() -> None:
    op.create_table(
        "replays",
        sa.Column("seq", SEQUENCE, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.String(length=63), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("selection", sa.JSON(), nullable=False),
        sa.Column("destinations", sa.JSON(), nullable=False),
        sa.Column("media", sa.Boolean(), nullable=False),
        sa.Column("rate", sa.Double()),
        sa.Column("matched", sa.Integer(), nullable=False),
        sa.Column("after_seq", SEQUENCE, nullable=False),
        sa.Column("until_seq", SEQUENCE, nullable=False),
        sa.Column("handled", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("ordered", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("downloads", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("lease", sa.Uuid()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("seq", name="pk_replays"),
        sa.UniqueConstraint("id", name="uq_replays_id"),
        sa.UniqueConstraint("caller", "idempotency_key", name="uq_replays_caller_idempotency_key"),
    )
    op.create_index("ix_replays_due", "replays", ["next_attempt_at"], **where("state = 'pending'"))


def downgrade() -> None:
    tables = ("replays", "accounts", "jobs", "attempts", "receipts", "media", "deliveries", "events")
    for table in (*tables, "sources", "probes"):
        op.drop_table(table)
