"""The time since which Clipia refuses a job for now, and the time of an account's last accepted submission.

Only an index, nullable columns and columns with a default are added, so the release before runs on it.

Revision: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.add_column("jobs", sa.Column("refused_at", sa.DateTime(timezone=True)))
    where = sa.text("state = 'pending' AND refused_at IS NOT NULL")
    op.create_index(
        "ix_jobs_refused", "jobs", ["caller", "model"], postgresql_where=where, sqlite_where=where
    )
    op.add_column(
        "accounts", sa.Column("accepted_at", sa.Double(), server_default=sa.text("0"), nullable=False)
    )


def downgrade() -> None:
    op.drop_column("accounts", "accepted_at")
    op.drop_index("ix_jobs_refused", "jobs")
    op.drop_column("jobs", "refused_at")
