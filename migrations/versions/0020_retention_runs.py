"""The record of each run of retention; a scheduled run is also the work of its lane.

Only a table is added, so the release before runs on it.

Revision: 0020
"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None
release_before_runs = True

COUNTED = ("events", "kept", "files", "files_elsewhere", "jobs", "rejections", "actions")


def upgrade() -> None:
    op.create_table(
        "retention_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.String(length=10)),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("host", sa.Text()),
        sa.Column("older_than_days", sa.Integer(), nullable=False),
        sa.Column("before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("media", sa.Boolean(), nullable=False),
        sa.Column("dead_letters", sa.Boolean(), nullable=False),
        sa.Column("position", sa.String(length=32)),
        *(sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False) for name in COUNTED),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("lease", sa.Uuid()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_retention_runs"),
        sa.UniqueConstraint("day", name="uq_retention_runs_day"),
    )


def downgrade() -> None:
    op.drop_table("retention_runs")
