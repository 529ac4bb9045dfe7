"""Tables of running workers and of the freeze of submissions; tokens in callbacks' paths.

Only tables and nullable columns are added, so the release before runs on it.

Revision: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("lanes", sa.JSON(), nullable=False),
        sa.Column("account", sa.String(length=40)),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "freezes",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("restored", sa.Boolean(), nullable=False),
        sa.Column("frozen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_freezes"),
    )
    # In the order in which a fan-out locks rows: if the order were reversed, the two could deadlock.
    for table in ("events", "jobs"):
        op.add_column(table, sa.Column("path_token", sa.String(length=64)))


def downgrade() -> None:
    for table in ("jobs", "events"):
        op.drop_column(table, "path_token")
    op.drop_table("freezes")
    op.drop_table("workers")
