"""Jobs, the accounts that they are submitted to, and the job in the path of an event's callback.

Revision: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
release_before_runs = True

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
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
    op.add_column("events", sa.Column("job_id", sa.Uuid()))


def downgrade() -> None:
    op.drop_column("events", "job_id")
    op.drop_table("accounts")
    op.drop_table("jobs")
