"""The number of requests of an event that are counted and not kept.

Only a column with a default is added, so the release before runs on it.

Revision: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.add_column(
        "receipts", sa.Column("repeated", sa.Integer(), server_default=sa.text("0"), nullable=False)
    )


def downgrade() -> None:
    op.drop_column("receipts", "repeated")
