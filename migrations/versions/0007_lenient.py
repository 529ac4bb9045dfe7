"""Longer ids of requests, and an index of the events that were not recognized.

A column is widened and an index is added, so the release before runs on it.

Revision: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
release_before_runs = True

TABLES = {"events": False, "jobs": True}
"""True if `request_id` may be null."""


def upgrade() -> None:
    _set_length(255, before=128)
    condition = sa.text("state = 'unrecognized'")
    op.create_index(
        "ix_events_unrecognized", "events", ["seq"], postgresql_where=condition, sqlite_where=condition
    )


def downgrade() -> None:
    op.drop_index("ix_events_unrecognized", "events")
    _set_length(128, before=255)


def _set_length(length: int, *, before: int) -> None:
    for name, nullable in TABLES.items():
        with op.batch_alter_table(name) as table:
            table.alter_column(
                "request_id",
                type_=sa.String(length),
                existing_type=sa.String(before),
                existing_nullable=nullable,
            )
