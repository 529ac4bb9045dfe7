"""Indexes for the budget of a caller: open jobs, and jobs that were sent today.

Only indexes are added, so the release before runs on it.

Revision: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.create_index("ix_jobs_caller_sent", "jobs", ["caller", "sent_at"])
    where = sa.text("state = 'pending' OR state = 'submitted'")
    op.create_index("ix_jobs_open", "jobs", ["caller"], postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    op.drop_index("ix_jobs_open", "jobs")
    op.drop_index("ix_jobs_caller_sent", "jobs")
