"""Replays, their deliveries, and the time at which a dead letter was retried.

Revision: 0003
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
release_before_runs = False  # it would deliver replays without their id

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
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
    op.drop_index("ix_deliveries_due", "deliveries")
    # SQLite changes a constraint by copying the table.
    with op.batch_alter_table("deliveries") as deliveries:
        deliveries.add_column(sa.Column("replay_id", sa.Uuid()))
        deliveries.add_column(sa.Column("restarted_at", sa.DateTime(timezone=True)))
        deliveries.drop_constraint("uq_deliveries_event_seq_destination", type_="unique")
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
    op.add_column("media", sa.Column("restarted_at", sa.DateTime(timezone=True)))
    op.create_index("ix_events_request_id", "events", ["request_id"])


def downgrade() -> None:
    op.drop_index("ix_events_request_id", "events")
    op.drop_column("media", "restarted_at")
    for index in ("dead", "replays_due", "due", "event_seq"):
        op.drop_index(f"ix_deliveries_{index}", "deliveries")
    op.drop_index("uq_deliveries_replayed", "deliveries")
    op.drop_index("uq_deliveries_live", "deliveries")
    op.execute("DELETE FROM deliveries WHERE replay_id IS NOT NULL")
    with op.batch_alter_table("deliveries") as deliveries:
        deliveries.drop_column("restarted_at")
        deliveries.drop_column("replay_id")
        deliveries.create_unique_constraint(
            "uq_deliveries_event_seq_destination", ["event_seq", "destination"]
        )
    op.create_index(
        "ix_deliveries_due", "deliveries", ["destination", "next_attempt_at"], **where("state = 'pending'")
    )
    op.drop_table("replays")
